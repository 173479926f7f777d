"""support/pauses.py -- cut where nobody speaks: recordings into windows, speech into phrases."""
import os
import queue
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

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

def in_pieces(answer: Callable, longest: int, batch_size: int) -> Callable:
    """A system as eval.py's: asks another about pieces of <= `longest` samples, joins the texts."""
    def joined(samples, waves):
        if any(len(recordings) != 1 for recordings in waves):
            raise BadRow("a transcript is of one recording, not of several or none")
        cuts = [cut_at_pauses(wave, longest) for wave, in waves]
        jobs = [(s, [piece]) for s, cut in zip(samples, cuts, strict=True) for piece in cut]
        batches = (jobs[i:i + batch_size] for i in range(0, len(jobs), batch_size))
        parts = chain.from_iterable(answer(*zip(*batch, strict=True)) for batch in batches)
        return [join(islice(parts, len(cut))) for cut in cuts]
    def join(parts):
        texts, tokens, cut = zip(*parts, strict=True)
        return " ".join(filter(None, map(without_thoughts, texts))), sum(tokens), any(cut)
    return joined

# ---- Live. The phrase so far is decoded anew every half second; the words that two passes in a row
# agree on are printed (local agreement: Liu et al. 2020, arXiv:2005.11185; whisper_streaming).
FRAME = SAMPLE_RATE // 40  # samples; loudness is measured in frames of 25 ms
STEP = PAUSE = 20          # frames between passes; frames of quiet that end a phrase
LEAD = 3                   # frames kept before the first loud one of a phrase
UNSURE = 40                # frames kept while nobody speaks
MEMORY = 800               # frames that loud and quiet are told from

def from_pcm(file) -> Iterator[np.ndarray]:
    """Raw 16-bit mono samples at 16 kHz -> float32 arrays of half a second, as they come in."""
    while len(data := file.read(2 * STEP * FRAME)) > 1:
        yield np.frombuffer(data[:len(data) // 2 * 2], "<i2").astype(np.float32) / 32768

def in_real_time(wave: torch.Tensor) -> Iterator[np.ndarray]:  # as fast as it was spoken
    for piece in wave.split(STEP * FRAME):
        time.sleep(len(piece) / SAMPLE_RATE)
        yield piece.numpy()

def arriving(pieces: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, bool]]:
    """Each piece, and whether the next is there already: a thread reads on while this one is
    decoded. Ctrl-C, which is how a microphone ends, only ends the reading; a second one stops."""
    waiting = queue.SimpleQueue()  # its put() may be interrupted by a signal that puts, too
    def read():
        try:
            for piece in pieces:
                waiting.put(piece)
            waiting.put(None)
        except Exception as e:
            waiting.put(e)  # raised below
    def stop(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        waiting.put(None)
    before = signal.signal(signal.SIGINT, stop)
    threading.Thread(target=read, daemon=True).start()
    while isinstance(piece := waiting.get(), np.ndarray):
        yield piece, not waiting.empty()
    signal.signal(signal.SIGINT, before)
    if piece:
        raise piece

def loudness(wave: np.ndarray) -> np.ndarray:  # dB of full scale, one a frame
    frames = wave[:len(wave) // FRAME * FRAME].reshape(-1, FRAME)
    return 10 * np.log10(np.square(frames).mean(1) + 1e-10)

class Live:
    """Prints words when they are certain, a line for each phrase; nothing printed is taken back.
    answer: a system as eval.py's, asked the Sample of each phrase. longest: samples of a phrase."""
    def __init__(self, answer: Callable, sample, longest: int):
        self.answer, self.sample, self.longest = answer, sample, longest
        self.levels = deque(maxlen=MEMORY)  # dB
        self.start(np.zeros(0, np.float32))

    def start(self, phrase: np.ndarray) -> None:
        self.phrase, self.begun, self.last_pass, self.printed = phrase, False, [], 0

    def run(self, pieces: Iterable[np.ndarray]) -> None:
        for piece, behind in arriving(pieces):
            self.phrase = np.concatenate([self.phrase, piece])
            self.levels.extend(loudness(piece))
            while self.levels and (end := self.find_end()):
                self.decode(end, over=True)
            if self.begun and not behind and len(self.phrase) >= MIN_SECONDS * SAMPLE_RATE:
                self.decode(len(self.phrase))
        if self.begun and len(self.phrase) >= MIN_SECONDS * SAMPLE_RATE:
            self.decode(len(self.phrase), over=True)

    def find_end(self) -> int:
        """Drop the quiet before the phrase -> samples of the phrase if it is over, else 0."""
        quiet, voice = np.maximum(np.percentile(self.levels, (2, 95)), -70)  # dB
        loud = np.flatnonzero(loudness(self.phrase) > quiet + max(9, (voice - quiet) / 3))  # frames
        frames = len(self.phrase) // FRAME
        if not self.begun:
            first = max(0, loud[0] - LEAD if len(loud) else frames - UNSURE)
            self.phrase, loud, frames = self.phrase[first * FRAME:], loud - first, frames - first
            self.begun = len(loud) > 0
        elif not len(loud):  # what was loud is quiet beside what came later
            return len(self.phrase)
        pauses = np.flatnonzero(np.diff(loud, append=frames) > PAUSE)
        if self.begun and len(pauses):
            return (loud[pauses[0]] + 1 + PAUSE // 2) * FRAME
        if self.begun and len(self.phrase) >= self.longest:
            return len(cut_at_pauses(torch.from_numpy(self.phrase), self.longest - 1)[0])
        return 0

    def decode(self, n: int, over: bool = False) -> None:
        """Print what is new and certain in the first n samples: if the phrase is over, all."""
        words = self.answer([self.sample], [[torch.from_numpy(self.phrase[:n])]])[0][0].split()
        certain = words if over else os.path.commonprefix([words, self.last_pass])
        end = "\n" if over and (words or self.printed) else ""
        print("".join(f"{w} " for w in certain[self.printed:]), end=end, flush=True)
        self.printed, self.last_pass = max(self.printed, len(certain)), words
        if over:
            self.start(self.phrase[n:])  # what follows may become the next phrase
