"""
support/banks.py -- the noises and rooms that augment.py mixes in: made here, from a folder of
audio, or from the hub (the post's: MUSAN's noises, EchoThief's rooms).

A bank is a list of arrays at 16 kHz: noises in int16, rooms (impulse responses) in float32.
"""
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from data import BadRow, BadRows, load_audio
from model import SAMPLE_RATE
from support.cli import UserError, first_line
from support.corpus import CHUNK, embedded_rows
from support.hub import load_table
from support.recipes import NOISE_DATASET, Source

BANK_SECONDS = 8 * 3600  # in memory at most (int16: 920 MB)
CLIP_SECONDS = 10        # of each recording
MADE = 48                # noises, or rooms, in a bank made here


def open_banks(noise: str = "made", rooms: str = "made", voices: str = "train") -> tuple:
    """(noises, rooms). Each is "made", "hub", or a folder; voices: the corpus split that babbles in
    made noise. Raises UserError."""
    return open_bank(noise, "Musan", voices), open_bank(rooms, "Echo", voices)


def open_bank(source: str, split: str, voices: str = "train") -> list[np.ndarray]:
    """One bank; split: "Musan" for noises, "Echo" for rooms. Raises UserError."""
    if source == "made":
        rng = np.random.default_rng([split == "Echo", voices == "train"])
        if split == "Echo":
            return make_rooms(rng)
        return make_noises([row["audio"] for row in embedded_rows("ru", voices, CHUNK)], rng)
    clips, bad, total, samples = [], BadRows(), 0, 0
    for name, audio in recordings(source, split):
        total += 1
        try:
            wave = load_audio(audio, min_seconds=0).numpy()[:CLIP_SECONDS * SAMPLE_RATE]
        except BadRow as e:
            bad.add(str(e), name)
            continue
        clips.append(as_room(wave) if split == "Echo" else (wave * 32767).astype(np.int16))
        samples += len(clips[-1])
        if samples > BANK_SECONDS * SAMPLE_RATE:
            print(f"{source}: the first {total} recordings are {BANK_SECONDS // 3600} hours, the "
                  "rest is left out", file=sys.stderr)
            break
    bad.report(total, source)
    if not clips:
        raise UserError(f"no audio in {source}: give a folder of audio, hub, or made")
    return clips


def crop(tape: np.ndarray, rng: np.random.Generator, n: int) -> np.ndarray:
    """n samples from a random place on; a shorter tape starts again."""
    start = rng.integers(max(1, len(tape) - n + 1))
    return tape[start:start + n] if len(tape) >= n else np.resize(tape, n)


def check_source(source: str) -> None:
    """Is there such a source, as far as a glance tells? Raises UserError."""
    if source not in ("made", "hub") and not os.path.isdir(source):
        raise UserError(f"no folder {source}: give a folder of audio, hub, or made")


def recordings(source: str, split: str) -> Iterator[tuple]:
    """(name, what load_audio takes) of each file in a folder, or row of the hub's split."""
    check_source(source)
    if source != "hub":
        kinds = {f".{kind.lower()}" for kind in (*soundfile.available_formats(), "opus")}
        for path in sorted(Path(source).rglob("*")):
            if path.suffix.lower() in kinds:
                yield path.name, str(path)
        return
    try:
        table = load_table(Source(NOISE_DATASET, split, answer=""), streaming=True)
        for i, row in enumerate(table):
            yield f"{split}/{i}", row["audio"]["bytes"]
    except Exception as e:  # the hub fails in many ways, at any row
        raise UserError(f"cannot read {NOISE_DATASET}, split {split} ({first_line(e)}): give a "
                        "folder of audio instead of hub, or made") from None


# -----------------------------------------------------------------------------
# Made here, the same every time

def make_noises(speech: list, rng: np.random.Generator) -> list[np.ndarray]:
    """Babble of 3 to 7 voices; coloured noise (power falling as f^0 to f^-2); the same swelling."""
    clips, n = [], CLIP_SECONDS * SAMPLE_RATE
    for i in range(MADE):
        if i % 3 == 0:
            x = sum(talk(speech, rng, n) for _ in range(rng.integers(3, 8)))
        else:
            white = np.fft.rfft(rng.standard_normal(n))
            x = np.fft.irfft(white * np.arange(1, n // 2 + 2) ** -rng.uniform(0, 1), n)
        if i % 3 == 2:
            x *= 1.2 + np.sin(2 * np.pi * rng.uniform(0.1, 3) * np.arange(n) / SAMPLE_RATE)
        clips.append((x / np.abs(x).max() * 32767).astype(np.int16))
    return clips


def talk(speech: list, rng: np.random.Generator, n: int) -> np.ndarray:
    """n samples of nine utterances, over and over."""
    nine = [speech[i] for i in rng.integers(len(speech), size=9)]
    return np.resize(np.concatenate(nine), n).astype(np.float32)


def make_rooms(rng: np.random.Generator) -> list[np.ndarray]:
    """Polack's model: the direct sound, after 2 to 10 ms noise that decays by 60 dB in 0.15 to
    0.8 s and has 0 to 10 dB less energy."""
    clips, t = [], np.arange(SAMPLE_RATE) / SAMPLE_RATE
    for _ in range(MADE):
        tail = rng.standard_normal(len(t)) * 10 ** (-3 * t / rng.uniform(0.15, 0.8))
        tail *= t > rng.uniform(0.002, 0.01)
        tail *= 10 ** (-rng.uniform(0, 10) / 20) / np.sqrt(np.sum(np.square(tail)))
        clips.append(as_room(np.concatenate([[1.0], tail])))
    return clips


def as_room(wave: np.ndarray) -> np.ndarray:
    """An impulse response from its loudest sample on, one second at most, with energy 1: speech is
    neither delayed nor made louder by it."""
    ir = wave[np.abs(wave).argmax():][:SAMPLE_RATE]
    return (ir / np.sqrt(np.sum(np.square(ir)))).astype(np.float32)
