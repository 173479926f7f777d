"""support/pauses.py -- cut where nobody speaks: recordings into windows, speech into phrases."""
import json
import os
import re
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from xml.sax.saxutils import escape
import numpy as np
import torch
from model import SAMPLE_RATE
from support.processing import FRAME, cut_at_pauses, loud_frames, loudness, word_times
from support.recipes import TABLES
from support.rows import MIN_SECONDS, BadRow

def without_thoughts(text: str) -> str:  # other people's checkpoints may think aloud
    return re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL).strip()

def in_batches(answer: Callable, jobs: Iterable, batch_size: int) -> Iterator[tuple]:
    """Each (sample, waves, ...) of jobs, read as needed, with a system's answer."""
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
STEP, PAUSE, LEAD, UNSURE, MEMORY = TABLES["phrases"].values()  # in frames
PIECE = 10 * FRAME  # samples: how much is looked at, at once

class Phrases:
    """Sound as it comes in -> what to decode when, and which words of that are new and certain."""
    def __init__(self, longest: int):  # samples of a phrase
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

# ---- When was it said? Inside of a piece, words share the time of speech by their letters.
def timed(pieces, texts) -> tuple[list, float]:
    """Pieces of a recording, their texts -> [words of one that has some], see word_times(); s."""
    ends = np.cumsum([0, *map(len, pieces)]) / SAMPLE_RATE
    segments = [word_times(piece, without_thoughts(text), at)
                for piece, text, at in zip(pieces, texts, ends[:-1], strict=True)]
    return [words for words in segments if words], float(ends[-1])

LINE, LINES, SECONDS = TABLES["cues"].values()

def wrap(words: list[tuple]) -> list[str]:
    return textwrap.wrap(" ".join(word for *_, word in words), LINE)

def cues(segments: list[list[tuple]]):
    """Words of each segment -> (start, end, lines) of what fits a screen."""
    for words in segments:
        first = 0
        for i in range(1, len(words) + 1):
            longer = words[first:i + 1]
            fits = len(wrap(longer)) <= LINES and longer[-1][1] - longer[0][0] <= SECONDS
            if i == len(words) or not fits:
                start, end = words[first][0], words[i - 1][1]
                yield start, min(end, start + SECONDS), wrap(words[first:i])
                first = i

def clock(seconds: float, mark: str) -> str:
    ms = round(1000 * seconds)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{mark}{ms % 1000:03}"

# ---- Formats: the words of each segment, and how long the recording is -> a file's text
def spoken(segments) -> list[str]:
    return [" ".join(word for *_, word in words) for words in segments]

def to_json(segments, duration: float) -> dict:
    """As OpenAI's verbose_json; its language is told by the letters, as the model does not say."""
    texts = spoken(segments)
    russian = any("а" <= c <= "я" for c in " ".join(texts).lower())
    return dict(task="transcribe", language="russian" if russian else "english",
                duration=round(duration, 3), text=" ".join(texts), segments=[
                    dict(id=i, start=words[0][0], end=words[-1][1], text=text)
                    for i, (words, text) in enumerate(zip(segments, texts, strict=True))])

def captions(segments, mark: str, change=str) -> str:
    return "\n".join(
        f"{i}\n{clock(start, mark)} --> {clock(end, mark)}\n{change(chr(10).join(lines))}\n"
        for i, (start, end, lines) in enumerate(cues(segments), 1))

FORMATS = dict(
    txt=lambda segments, *_: "".join(f"{text}\n" for text in spoken(segments)),
    srt=lambda segments, *_: captions(segments, ","),
    vtt=lambda segments, *_: "WEBVTT\n\n" + captions(segments, ".", escape),
    json=lambda *facts: json.dumps(to_json(*facts), ensure_ascii=False, indent=2) + "\n")
