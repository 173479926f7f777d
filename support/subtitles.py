"""support/subtitles.py -- when was it said? The model tells no times. A long recording is cut at
pauses into pieces, and inside of a piece its words share the time in which somebody speaks, by
their letters: right for the piece, and within a second or so for a word (docs/MEASURED.md)."""
import html
import json
import textwrap
import numpy as np
import torch
from model import SAMPLE_RATE
from support import pauses

LINE, LINES, SECONDS = 42, 2, 7  # of a cue, at most: letters in a line, lines, seconds

# ---- Times
def word_times(piece: torch.Tensor, text: str, offset: float = 0.0) -> list[tuple]:
    """(samples,) from `offset` seconds on, and its text -> [(start, end, word)], in seconds."""
    words, loud = text.split(), pauses.loud_frames(piece.numpy())
    if not len(loud):
        loud = np.arange(max(1, len(piece) // pauses.FRAME))
    edges = np.cumsum([0, *(len(word) + 1 for word in words)])
    at = edges / max(1, edges[-1]) * len(loud)  # in frames of speech
    last = np.minimum(at[:-1].astype(int), len(loud) - 1)
    until = np.maximum(np.ceil(at[1:]).astype(int) - 1, 0)
    seconds = pauses.FRAME / SAMPLE_RATE
    starts, ends = (loud[last] + at[:-1] - last), (loud[until] + at[1:] - until)
    return [(round(offset + start * seconds, 3), round(offset + end * seconds, 3), word)
            for start, end, word in zip(starts, ends, words, strict=True)]

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

def to_json(segments, duration: float, **more) -> dict:
    """As OpenAI's verbose_json; its language is told by the letters, as the model does not say."""
    texts = spoken(segments)
    russian = any("а" <= c <= "я" for c in " ".join(texts).lower())
    return dict(task="transcribe", language="russian" if russian else "english", **more,
                duration=round(duration, 3), text=" ".join(texts), segments=[
                    dict(id=i, start=words[0][0], end=words[-1][1], text=text)
                    for i, (words, text) in enumerate(zip(segments, texts, strict=True))])

def to_srt(segments, *_) -> str:
    return "\n".join(f"{i}\n{clock(start, ',')} --> {clock(end, ',')}\n" + "\n".join(lines) + "\n"
                     for i, (start, end, lines) in enumerate(cues(segments), 1))

def to_vtt(segments, *_) -> str:
    return "WEBVTT\n\n" + "\n".join(
        f"{clock(start, '.')} --> {clock(end, '.')}\n{html.escape(chr(10).join(lines), False)}\n"
        for start, end, lines in cues(segments))

def to_tsv(segments, *_) -> str:  # Whisper's: milliseconds
    lines = [f"{1000 * words[0][0]:.0f}\t{1000 * words[-1][1]:.0f}\t{text}\n"
             for words, text in zip(segments, spoken(segments), strict=True)]
    return "".join(["start\tend\ttext\n", *lines])

FORMATS = dict(
    txt=lambda segments, *_: "".join(f"{text}\n" for text in spoken(segments)), srt=to_srt,
    vtt=to_vtt, tsv=to_tsv,
    json=lambda *facts: json.dumps(to_json(*facts), ensure_ascii=False, indent=2) + "\n")
