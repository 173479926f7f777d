"""
support/cli.py -- how every script talks to its user: flags, errors, files written whole.

A mistake of the user's is a UserError: one line on standard error that says what to do, exit
code 2, no traceback.
"""
import argparse
import contextlib
import difflib
import math
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import MISSING, field, fields
from pathlib import Path

import torch


class UserError(Exception):
    """Something the user can fix; the message says how."""


def run(main: Callable) -> None:
    """Call main() and exit: 2 and one line for a UserError, 130 for Ctrl-C, 1 for a closed pipe."""
    try:
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # whoever reads our output has had enough, as in "| head"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        raise  # some other pipe


def first_line(e: Exception) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return (str(e).strip() or type(e).__name__).splitlines()[0]


# -----------------------------------------------------------------------------
# Flags. A dataclass declares them, ranges and choices included; argparse enforces what is declared.

def flag(default, help: str, low: float = -math.inf, high: float = math.inf, **settings):
    """A dataclass field that is a command-line flag. low, high: a number's allowed range, ends
    included. settings: more of argparse's add_argument (choices, nargs, ...), and aliases."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, **settings))


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one line, not a page of usage, and a near miss gets a hint."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def add_flags(self, config: type) -> "ArgumentParser":
        """One --flag for each field of the dataclass `config`; returns the parser."""
        for f in fields(config):
            settings = dict(f.metadata)
            low, high = settings.pop("low", -math.inf), settings.pop("high", math.inf)
            names = [f"--{f.name}", *settings.pop("aliases", ())]
            kind = next(t for t in (*typing.get_args(f.type), f.type) if t is not type(None))
            if kind is bool:
                self.add_argument(*names, action="store_true", default=f.default, **settings)
                continue
            default = None if f.default is MISSING else f.default
            if kind in (int, float):
                settings["type"] = ranged(kind, low, high)
            self.add_argument(*names, default=default, **settings)
        return self

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, 1)
            hint = f", did you mean {near[0]}?" if near and name.startswith("-") else ""
            self.error(f"unknown flag {unknown[0]}{hint}" if name.startswith("-") else
                       f"{unknown[0]} belongs to no flag")
        return parsed

    def error(self, message):
        program = f"python {self.prog}" if self.prog.endswith(".py") else self.prog
        raise UserError(f"{message.removeprefix('argument ')}; see {program} --help")


def ranged(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable:
    """An argparse type: an int or float within [low, high]."""
    def convert(text):
        try:
            number = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not low <= number <= high:  # nan lies in no range
            bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return number
    return convert


def pick_device(name: str) -> str:
    """"cpu", "cuda" or "auto" -> "cpu" or "cuda". Raises UserError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but no GPU is visible: use --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


# -----------------------------------------------------------------------------
# Files

def cache_dir() -> Path:
    """Where spoken corpora and exported checkpoints lie: $NANOBOREALIS_CACHE, or .cache here."""
    return Path(os.environ.get("NANOBOREALIS_CACHE", Path(__file__).parents[1] / ".cache"))


def check_out(folder: str | Path) -> None:
    """A folder for results may be new, but its path must not lead through a file, and must be
    writable. Raises UserError."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{place} is a file: results need a folder")
    if not os.access(place, os.W_OK):
        raise UserError(f"{place} is not writable: choose another folder for the results")


def replace_file(path: str | Path, write: Callable) -> None:
    """write(temporary name), then rename: there is the old file or the new one, never half."""
    tmp = f"{path}.{os.getpid()}.tmp"  # several processes may write the same file
    try:
        write(tmp)
        os.replace(tmp, path)
    finally:
        Path(tmp).unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    replace_file(path, lambda tmp: Path(tmp).write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def picture(path: str | Path, *shape: int, dpi: int = 120, **settings):
    """with picture("a.png", rows, columns, figsize=(7, 4)) as (figure, axes): ...

    Draws without a screen; the PNG is written at the end."""
    import matplotlib
    matplotlib.use("Agg")  # works without a screen
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(*shape, layout="constrained", **settings)
    yield figure, axes
    replace_file(path, lambda tmp: figure.savefig(tmp, dpi=dpi, format="png"))
    plt.close(figure)
