"""
support/pauses.py -- cut where nobody speaks: recordings into windows, live speech into phrases.
"""
import os
import queue
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from data import Sample
from model import HOP, SAMPLE_RATE
from support.rows import MIN_SECONDS, BadRow


def cut_at_pauses(wave: torch.Tensor, longest: int) -> list[torch.Tensor]:
    """(samples,) -> pieces of at most `longest` samples, each cut at the quietest 0.2 s of its
    second half."""
    pieces, span = [], SAMPLE_RATE // 5
    while len(wave) > longest:
        end = min(longest, len(wave) - SAMPLE_RATE // 2)  # in a sliver a model would invent words
        start = min(longest // 2, end - span)
        power = wave[start:end].unfold(0, span, HOP).square().mean(1)
        cut = end - span // 2 - HOP * int(power.flip(0).argmin())  # the last of equally quiet ones
        pieces.append(wave[:cut])
        wave = wave[cut:]
    return [*pieces, wave]


def without_thoughts(text: str) -> str:
    """Other people's checkpoints may think aloud."""
    return re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL).strip()


def in_pieces(answer: Callable, longest: int, batch_size: int) -> Callable:
    """A system as eval.py's that transcribes long recordings piece by piece and joins the texts.
    answer: a system, called with pieces of at most `longest` samples, batch_size at a time."""
    def joined(samples, waves):
        jobs, parts = [], [[] for _ in samples]
        for i, recordings in enumerate(waves):
            if len(recordings) != 1:
                raise BadRow(f"a transcript is of one recording, not of {len(recordings)}")
            jobs += [(i, piece) for piece in cut_at_pauses(recordings[0], longest)]
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start:start + batch_size]
            answers = answer([samples[i] for i, _ in batch], [[piece] for _, piece in batch])
            for (i, _), part in zip(batch, answers, strict=True):
                parts[i].append(part)
        return [join(p) for p in parts]

    def join(part):
        texts, tokens, cut = zip(*part, strict=True)
        return " ".join(filter(None, map(without_thoughts, texts))), sum(tokens), any(cut)
    return joined


# -----------------------------------------------------------------------------
# Live. The phrase so far is decoded anew every half second; the words that two passes in a row
# agree on are printed (local agreement: Liu et al. 2020, arXiv:2005.11185; whisper_streaming).

FRAME = SAMPLE_RATE // 40  # samples; loudness is measured in frames of 25 ms
STEP = PAUSE = 20          # frames between passes; frames of quiet that end a phrase
LEAD = 3                   # frames kept before the first loud one of a phrase
UNSURE = 40                # frames kept while nobody speaks
MEMORY = 800               # frames that loud and quiet are told from


def from_stdin() -> Iterator[np.ndarray]:
    """Raw 16-bit mono PCM at 16 kHz on standard input -> float32 arrays of half a second."""
    with open(0, "rb", closefd=False) as stdin:  # Python cannot exit while sys.stdin is read
        while len(data := stdin.read(2 * STEP * FRAME)) > 1:
            yield np.frombuffer(data[:len(data) // 2 * 2], "<i2").astype(np.float32) / 32768


def in_real_time(wave: np.ndarray) -> Iterator[np.ndarray]:
    """A recording, half a second at a time, as fast as it was spoken."""
    began = time.monotonic()
    for end in range(STEP * FRAME, len(wave) + STEP * FRAME, STEP * FRAME):
        time.sleep(max(0, began + end / SAMPLE_RATE - time.monotonic()))
        yield wave[end - STEP * FRAME:end]


def arriving(pieces: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, bool]]:
    """Each piece, and whether the next is there already: a thread reads on while this one is
    decoded. Ctrl-C, which is how a microphone ends, only ends the reading; a second one stops."""
    waiting = queue.SimpleQueue()  # its put() may be interrupted by a signal that puts, too

    def read():
        try:
            for piece in pieces:
                waiting.put(piece)
        except Exception as e:  # raised below, where it is seen
            waiting.put(e)
        waiting.put(None)

    def stop(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        waiting.put(None)

    before = signal.signal(signal.SIGINT, stop)
    threading.Thread(target=read, daemon=True).start()
    try:
        while (piece := waiting.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece, not waiting.empty()
    finally:
        signal.signal(signal.SIGINT, before)


def loudness(wave: np.ndarray) -> np.ndarray:
    """dB of full scale, one a frame."""
    frames = wave[:len(wave) // FRAME * FRAME].reshape(-1, FRAME)
    return 10 * np.log10(np.square(frames).mean(1) + 1e-10)


class Live:
    """Prints words when they are certain, a line for each phrase; nothing printed is taken back.
    answer: a system as eval.py's, asked `sample` of each phrase. longest: samples of a phrase."""

    def __init__(self, answer: Callable, sample: Sample, longest: int):
        self.answer, self.sample, self.longest = answer, sample, longest
        self.levels = deque(maxlen=MEMORY)  # dB
        self.start(np.zeros(0, np.float32))

    def start(self, phrase: np.ndarray) -> None:
        self.phrase, self.begun, self.last_pass, self.printed = phrase, False, [], 0

    def run(self, pieces: Iterable[np.ndarray]) -> None:
        for piece, behind in arriving(pieces):
            self.phrase = np.concatenate([self.phrase, piece])
            self.levels.extend(loudness(piece))
            while self.levels and self.phrase_ended():
                pass
            if self.begun and not behind:
                words = self.words(len(self.phrase))
                self.print(os.path.commonprefix([words, self.last_pass]))
                self.last_pass = words
        if self.begun and len(self.phrase) >= MIN_SECONDS * SAMPLE_RATE:
            self.finish(len(self.phrase))

    def phrase_ended(self) -> bool:
        """Drop the quiet before a phrase; finish the phrase if it is over."""
        quiet, voice = np.maximum(np.percentile(self.levels, (2, 95)), -70)
        threshold = quiet + max(9, (voice - quiet) / 3)  # dB
        loud = np.flatnonzero(loudness(self.phrase) > threshold)  # frames
        if not self.begun:
            first = max(0, loud[0] - LEAD if len(loud) else len(self.phrase) // FRAME - UNSURE)
            self.phrase, loud = self.phrase[first * FRAME:], loud - first
            self.begun = len(loud) > 0
            if not self.begun:
                return False
        pauses = np.flatnonzero(np.diff(loud, append=len(self.phrase) // FRAME) > PAUSE)
        if len(pauses):
            self.finish((loud[pauses[0]] + 1 + PAUSE // 2) * FRAME)
        elif not len(loud):  # what was loud is quiet beside what came later
            self.finish(len(self.phrase))
        elif len(self.phrase) >= self.longest:
            phrase = torch.from_numpy(self.phrase)
            self.finish(len(cut_at_pauses(phrase, self.longest - 1)[0]))
        return not self.begun

    def finish(self, n: int) -> None:
        """The first n samples are the phrase; what follows may become the next."""
        self.print(self.words(n), end="\n")
        self.start(self.phrase[n:])

    def words(self, n: int) -> list[str]:
        return self.answer([self.sample], [[torch.from_numpy(self.phrase[:n])]])[0][0].split()

    def print(self, words: list[str], end: str = "") -> None:
        """Print what is new."""
        end = end if self.printed or words else ""
        print("".join(f"{w} " for w in words[self.printed:]), end=end, flush=True)
        self.printed = max(self.printed, len(words))
