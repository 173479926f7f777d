"""
support/rows.py -- the door for data: what a row's text and recording must be, and a count of the
rows that are not.
"""
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache

import numpy as np
import soundfile
import torch
import torchaudio
from tqdm import tqdm

from model import AUDIO, SAMPLE_RATE, TAG_PAIR, check_wave, place_audio
from support.cli import UserError

MIN_SECONDS = 0.1        # shorter recordings hold no word
MAX_BAD_SHARE = 0.05     # more unusable rows than this: the manifest is wrong, not a few files


class BadRow(ValueError):
    """One unusable row or recording. The message is the reason it is counted under."""
    where = ""  # the row's name, if it has no Sample to tell it


class TooLong(BadRow):
    """A good row beyond --max_tokens or --max_windows."""


class BadRows:
    """Counts unusable rows by reason. None is dropped without showing up here: a few are reported,
    more than 5 % are an error, and with `strict` the first one is."""

    def __init__(self, strict: bool = False):
        self.strict, self.reasons, self.first = strict, Counter(), {}

    def add(self, reason: str, where: str) -> None:
        if self.strict:
            raise UserError(f"{where}: {reason} (--strict stops at the first bad row)")
        self.reasons[reason] += 1
        self.first.setdefault(reason, where)

    def check(self, total: int, name: str) -> None:
        """Raises UserError if too many of `total` rows are unusable."""
        bad = self.reasons.total()
        if bad > MAX_BAD_SHARE * total:
            raise UserError(f"{name}: {bad} of {total} rows are unusable, more than "
                            f"{MAX_BAD_SHARE:.0%}: {self}; fix or remove them")

    def report(self, total: int, name: str) -> None:
        """check(), then say once what was left out."""
        self.check(total, name)
        if self.reasons:
            print(f"{name}: left out {self.reasons.total()} of {total} rows: {self}",
                  file=sys.stderr)

    def __str__(self):
        return ", ".join(f"{n} {reason} (first: {self.first[reason]})"
                         for reason, n in self.reasons.most_common())


def read_jsonl(path: str, parse: Callable, bad: BadRows) -> tuple[list, int]:
    """-> ([parse(row, name=), ...], number of rows). Broken lines, and rows for which parse raises
    BadRow, go to `bad`. Raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f"no manifest at {path}: give a JSONL file, one object a line")
    parsed, total = [], 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            total += 1
            name = f"{os.path.basename(path)}:{number}"
            try:
                parsed.append(parse(parse_json(line), name=name))
            except BadRow as e:
                bad.add(str(e), name)
    if not total:
        raise UserError(f"{path} is empty: a manifest has one JSON object a line")
    return parsed, total


def parse_json(line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError:
        raise BadRow("broken JSON") from None
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")
    return row


def usable(samples: list, dataset, bad: BadRows, progress: bool = True) -> list:
    """The samples that dataset.encode takes, for their recordings decode and are within its limits;
    the others go to `bad`."""
    def problem(sample):
        try:
            dataset.encode(sample)
        except BadRow as e:
            return str(e)

    kept = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # soundfile decodes outside the GIL
        problems = tqdm(pool.map(problem, samples), "checking audio", len(samples),
                        disable=not progress)
        for sample, reason in zip(samples, problems, strict=True):
            if reason:
                bad.add(reason, sample.name)
            else:
                kept.append(sample)
    return kept


# -----------------------------------------------------------------------------

def check_text(text, placeholders: bool = False, empty: bool = False) -> str:
    """Text that a model may read and say, stripped. Raises BadRow. placeholders: a question's may
    stand for recordings; any other control token would forge the chat. empty: "" will do."""
    if not isinstance(text, str) or not (text.strip() or empty):
        raise BadRow("empty text")
    if re.search("[\ud800-\udfff]", text):
        raise BadRow("broken text")  # half a character, which no file can hold
    rest = text.replace(TAG_PAIR, "").replace(AUDIO, "") if placeholders else text
    if re.search(r"<\|\w+\|>", rest):
        raise BadRow("control token in the text")
    return text.strip()


def check_placeholders(question: str, recordings: int) -> None:
    try:
        place_audio(question, recordings)
    except ValueError:
        raise BadRow("placeholders and recordings differ in number") from None


def check_audio(audio, folder: str = "", missing: bool = False) -> list:
    """What a row has under "audio" -> list of what load_audio takes, paths below `folder`. Raises
    BadRow if there is none; missing: load_audio will, so that evaluation counts it as failed."""
    audio = audio if isinstance(audio, list) else [audio]
    if not audio or not all(isinstance(a, (str, bytes, np.ndarray)) and len(a) for a in audio):
        if not missing:
            raise BadRow("no audio field")
        return [b""]
    return [os.path.join(folder, a) if isinstance(a, str) else a for a in audio]


def check_turns(turns) -> tuple[str, list[dict], str, str]:
    """A text-only conversation -> (system prompt or "", earlier turns, question, answer). Raises
    BadRow. Turns of other roles, as of tools, are left out."""
    turns = [{"role": t["role"], "content": check_text(t.get("content"))}
             for t in (turns if isinstance(turns, list) else [])
             if isinstance(t, dict) and t.get("role") in ("system", "user", "assistant")]
    if [t["role"] for t in turns[-2:]] != ["user", "assistant"]:
        raise BadRow("conversation does not end with a question and its answer")
    system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
    return system, turns[:-2], turns[-2]["content"], turns[-1]["content"]


def load_audio(source, min_seconds: float = MIN_SECONDS, silence: bool = False) -> torch.Tensor:
    """A path, the bytes of a file, or int16 samples at 16 kHz -> (samples,) float32 at 16 kHz,
    channels averaged, peak at most 1. Raises BadRow; silence is one, unless it is wanted."""
    if isinstance(source, np.ndarray):
        return torch.from_numpy(source.astype(np.float32) / 32768)
    if isinstance(source, str) and not os.path.isfile(source):
        raise BadRow("missing file")
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        wave, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, TypeError, ValueError):
        raise BadRow("not audio") from None
    if not 1000 <= rate <= 1_000_000:
        raise BadRow(f"a sample rate of {rate} Hz")
    wave = torch.from_numpy(wave.mean(axis=1))
    if len(wave) < max(1, min_seconds * rate):
        raise BadRow(f"shorter than {min_seconds} s")
    if rate != SAMPLE_RATE:
        # The kernel grows with the reduced ratio (977 MiB for 15999 -> 16000 Hz). Usual rates are
        # exact below 1000; in odd ones, less than one in a million is not heard.
        ratio = Fraction(SAMPLE_RATE, rate).limit_denominator(1000)
        wave = resampler(ratio.denominator, ratio.numerator)(wave)
    try:
        wave = check_wave(wave)
    except ValueError as e:
        raise BadRow(str(e)) from None
    if wave.abs().max() < 1e-6 and not silence:
        raise BadRow("silent")
    return wave


@lru_cache(maxsize=16)  # computing a kernel costs more than using it
def resampler(rate: int, new_rate: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(rate, new_rate)
