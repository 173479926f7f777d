"""support/cli.py -- how every script talks to its user: flags, errors, files written whole."""
import argparse
import contextlib
import hashlib
import math
import os
import signal
import socket
import sys
import time
import tomllib
from pathlib import Path
import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

class UserError(Exception):
    """Something the user can fix; the message says how, in a line, without a traceback."""

def refuse(wrong, message: str, kind: type[Exception] = UserError) -> None:
    """Raise kind(message) if something is wrong."""
    if wrong:
        raise kind(message)

def run(main, name="__main__") -> None:  # name: __name__, for nothing happens on import
    """Call main() and exit: 2 and a line for a UserError, 1 and a line for an OSError."""
    if name != "__main__":
        return
    disable_progress_bar()  # one for each file that is read or written is noise
    try:
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # whoever reads our output has had enough, as in "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as e:  # the latter: a full disk, a lost folder
        if int(os.environ.get("RANK", 0)) > 0:  # rank 0 mostly says the same, and its end ends us
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        tqdm.write(f"error: {e}", file=sys.stderr)  # below a progress bar, not behind it
        sys.exit(1 if isinstance(e, OSError) else 2)
    except KeyboardInterrupt:
        sys.exit(130)

def first_line(e: Exception) -> str:  # of its message, or its type where it has none
    message = e.errors()[0]["msg"] if callable(getattr(e, "errors", None)) else str(e)  # pydantic's
    return (message.strip() or type(e).__name__).splitlines()[0]

@contextlib.contextmanager
def as_user_error(prefix: str, *kinds: type[Exception], suffix: str = ""):
    """Within it, exceptions of these kinds become UserErrors: prefix, their first line, suffix."""
    try:
        yield
    except kinds as e:
        raise UserError(prefix + first_line(e) + suffix) from None

# ---- Flags. Tables declare them, ranges and choices too; argparse enforces them.
FLAGS = tomllib.loads(Path(__file__).with_name("flags.toml").read_text(encoding="utf-8"))
TYPES = dict(str=str, int=int, float=float)

class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one line, not a page of usage."""
    def add_tables(self, *tables: str) -> "ArgumentParser":
        """A --flag for each line of these tables of flags.toml; [scripts] has what --help says."""
        vars(self).update(FLAGS["scripts"].get(tables[-1], {}), allow_abbrev=False)
        for name, f in (line for table in tables for line in FLAGS[table].items()):
            self.add_flag(name, TYPES.get(f.get("type")) or type(f["default"]), **f)
        return self
    def add_flag(self, name, kind, low=-math.inf, high=math.inf, aliases=(), type="", **settings):
        names = [settings.pop("prefix", "--") + name, *aliases]
        names += [name.replace("_", "-") for name in names if "_" in name]
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction  # also --no-x
        elif kind in (int, float):
            settings["type"] = ranged(kind, low, high)
        self.add_argument(*names, **settings)
    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')}; see --help")

def ranged(kind: type, low: float, high: float):  # -> an argparse type: within [low, high]
    def number(text):  # where it raises ValueError, argparse says "invalid number value"
        value = kind(text)
        if not low <= value <= high:  # nan lies in no range
            bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value
    return number

def pick_device(name: str) -> str:  # "cpu", "cuda" or "auto" -> "cpu" or "cuda", or UserError
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but no GPU is visible: use --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"

def digest(*facts) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

def cache_dir() -> Path:  # of spoken corpora, exports, streamed rows
    return Path(os.environ.get("NANOBOREALIS_CACHE", Path(__file__).parents[1] / ".cache"))

def cached(name: str, *facts) -> Path:  # in it, of what these facts alone decide
    return cache_dir() / f"{digest(*facts)}-{name}"

def check_out(folder: str | Path) -> None:  # may be new, but must be writable, or UserError
    place = next(p for p in Path(folder, "any").absolute().parents if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{place} is a file or not writable: choose another folder for results")

def check_port(host: str, port: int) -> None:
    with as_user_error(f"{host}:{port}: ", OSError, suffix="; choose another with --port"):
        socket.create_server((host, port)).close()

def replace_file(path: str | Path, write, *args) -> None:
    """write(temporary path, *args), then rename: there is the old file or the new, never half."""
    tmp = Path(path).with_name(f"tmp.{os.getpid()}.{Path(path).name}")  # one for each process
    tmp.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(tmp, *args)
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)

def write_text(path: str | Path, text: str) -> None:  # whole or not at all
    replace_file(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))

@contextlib.contextmanager
def picture(path: str | Path, *shape: int, figsize: tuple, dpi: int = 120):
    """with picture("a.png", rows, columns, figsize=(7, 4)) as (figure, axes): ... writes it."""
    from matplotlib.figure import Figure
    figure = Figure(figsize, layout="constrained")
    yield figure, figure.subplots(*shape)
    replace_file(path, lambda tmp: figure.savefig(tmp, dpi=dpi))
