"""support/pauses.py -- cut where nobody speaks: recordings into windows, speech into phrases."""
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
import numpy as np
import torch
from model import HOP, SAMPLE_RATE
from support.rows import MIN_SECONDS, BadRow

def cut_at_pauses(wave: torch.Tensor, longest: int) -> list[torch.Tensor]:
    """(samples,) -> pieces of <= `longest`, each cut at the quietest 0.2 s of its second half."""
    pieces, span = [], SAMPLE_RATE // 5
    while len(wave) > longest:
        end = min(longest, len(wave) - SAMPLE_RATE // 2)  # in a sliver a model would invent words
        start = min(longest // 2, end - span)
        power = wave[start:end].unfold(0, span, HOP).square().mean(1)
        cut = end - span // 2 - HOP * int(power.flip(0).argmin())  # the last of equally quiet ones
        pieces.append(wave[:cut])
        wave = wave[cut:]
    return [*pieces, wave]

def without_thoughts(text: str) -> str:  # other people's checkpoints may think aloud
    return re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL).strip()

def in_batches(answer: Callable, jobs: Iterable, batch_size: int) -> Iterator[tuple]:
    """Each (sample, waves, ...) of jobs, which may be read as they are needed, with the answer of a
    system as eval.py's."""
    jobs = iter(jobs)
    while batch := list(islice(jobs, batch_size)):
        samples, waves, *_ = zip(*batch, strict=True)
        yield from zip(batch, answer(samples, waves), strict=True)

def in_pieces(answer: Callable, longest: int, batch_size: int) -> Callable:
    """A system as eval.py's: asks another about pieces of <= `longest` samples, joins the texts."""
    def joined(samples, waves):
        if any(len(recordings) != 1 for recordings in waves):
            raise BadRow("a transcript is of one recording, not of several or none")
        cuts = [cut_at_pauses(wave, longest) for wave, in waves]
        jobs = [(s, [piece]) for s, cut in zip(samples, cuts, strict=True) for piece in cut]
        parts = (part for _, part in in_batches(answer, jobs, batch_size))
        return [join(islice(parts, len(cut))) for cut in cuts]
    def join(parts):
        texts, tokens, cut = zip(*parts, strict=True)
        return " ".join(filter(None, map(without_thoughts, texts))), sum(tokens), any(cut)
    return joined

# ---- Words as they are said. The phrase so far is decoded anew every half second; the words that
# two passes in a row agree on are certain (local agreement: Liu et al. 2020, arXiv:2005.11185).
FRAME = SAMPLE_RATE // 40  # samples; loudness is measured in frames of 25 ms
STEP = PAUSE = 20          # frames between passes; frames of quiet that end a phrase
PIECE = 10 * FRAME         # samples: how much is looked at, at once
LEAD = 3                   # frames kept before the first loud one of a phrase
UNSURE = 40                # frames kept while nobody speaks
MEMORY = 800               # frames that loud and quiet are told from

def loudness(wave: np.ndarray) -> np.ndarray:  # dB of full scale, one a frame
    frames = wave[:len(wave) // FRAME * FRAME].reshape(-1, FRAME)
    return 10 * np.log10(np.square(frames).mean(1) + 1e-10)

def loud_frames(wave: np.ndarray, levels=None) -> np.ndarray:
    """Numbers of the frames in which somebody speaks, beside the levels (in dB) around them."""
    own = loudness(wave)
    quiet, voice = np.maximum(np.percentile(own if levels is None else levels, (2, 95)), -70)
    return np.flatnonzero(own > quiet + max(9, (voice - quiet) / 3))

class Phrases:
    """Sound as it comes in -> what to decode when, and which words of that are new and certain.
    longest: samples of a phrase."""
    def __init__(self, longest: int):
        self.longest, self.levels = longest, deque(maxlen=MEMORY)  # dB
        self.start(np.zeros(0, np.float32))
    def start(self, phrase: np.ndarray) -> None:
        self.phrase, self.begun, self.last_pass, self.said, self.heard = phrase, False, [], 0, 0
    def add(self, piece: np.ndarray) -> None:  # a PIECE of samples, or the rest
        self.phrase = np.concatenate([self.phrase, piece])
        self.levels.extend(loudness(piece))
    def due(self) -> bool:  # is a pass over the phrase so far worth it?
        return self.begun and len(self.phrase) - self.heard >= STEP * FRAME
    def find_end(self, last: bool = False) -> int:
        """Drop the quiet before the phrase -> samples of the phrase if it is over, else 0. last: no
        more will come. A long phrase is cut where cut_at_pauses() cuts a recording."""
        if not self.levels:
            return 0
        loud, frames = loud_frames(self.phrase, self.levels), len(self.phrase) // FRAME
        if not self.begun:
            first = max(0, loud[0] - LEAD if len(loud) else frames - UNSURE)
            self.phrase, loud, frames = self.phrase[first * FRAME:], loud - first, frames - first
            self.begun = len(loud) > 0
        end = len(self.phrase) if last or len(self.phrase) >= self.longest + SAMPLE_RATE // 2 else 0
        pauses = np.flatnonzero(np.diff(loud, append=frames) > PAUSE)
        if len(pauses):
            end = (loud[pauses[0]] + 1 + PAUSE // 2) * FRAME
        elif not len(loud):  # what was loud is quiet beside what came later
            end = len(self.phrase)
        if not self.begun or end < MIN_SECONDS * SAMPLE_RATE:
            return 0
        return len(cut_at_pauses(torch.from_numpy(self.phrase[:end]), self.longest)[0])
    def take(self, text: str, n: int, over: bool) -> str:
        """The text of the first n samples -> its words that are new and certain (if the phrase is
        over, all), which are never taken back. A phrase ends with a line break."""
        words = text.split()
        certain = words if over else os.path.commonprefix([words, self.last_pass])
        new = " " * (0 < self.said < len(certain)) + " ".join(certain[self.said:])
        self.said, self.last_pass, self.heard = max(self.said, len(certain)), words, n
        if not over:
            return new
        new += "\n" * bool(self.said)
        self.start(self.phrase[n:])  # what follows may become the next phrase
        return new
