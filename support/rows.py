"""support/rows.py -- what a row's text and recording must be, and a count of rows that fail."""
import io
import os
import re
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
import numpy as np
import soundfile
import torch
from tqdm.contrib.concurrent import thread_map
from model import AUDIO, TAG_PAIR, check_wave
from support import cli, processing

MIN_SECONDS = 0.1        # shorter recordings hold no word
MAX_SECONDS = 86_400     # where decoding stops, if nobody says otherwise; train.py says 3600
MAX_BAD_SHARE = 0.05     # more unusable rows than this: the manifest is wrong, not a few files
BLOCK = 1 << 14          # samples decoded at once, of all channels
PYAV = find_spec("av") is not None
FILES = ".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".m4a", ".mp4", ".webm"
CONTAINERS = {b"ftyp": "mov", b"\x1aE\xdf\xa3": "matroska"}  # no playlists, which name others

class BadRow(ValueError):
    """One unusable row or recording. The message is the reason it is counted under."""
    where = ""  # the row's name, if it has no Sample to tell it

class TooLong(BadRow):
    """A good row beyond --max_tokens, --max_windows or --max_seconds."""

class BadRows:
    """Counts unusable rows by reason, none is dropped silently. strict: the first is an error."""
    def __init__(self, strict: bool = False):
        self.strict, self.reasons, self.first = strict, Counter(), {}
    def add(self, reason: str, where: str) -> None:
        cli.refuse(self.strict, f"{where}: {reason} (--strict stops at the first bad row)")
        self.reasons[reason] += 1
        self.first.setdefault(reason, where)
    def check(self, total: int, name: str) -> None:  # UserError if too many of `total` are unusable
        if (bad := self.reasons.total()) > MAX_BAD_SHARE * total:
            raise cli.UserError(f"{name}: {bad} of {total} rows are unusable, fix them: {self}")
    def report(self, total: int, name: str) -> None:  # check(), then say once what was left out
        self.check(total, name)
        if bad := self.reasons.total():
            print(f"{name}: left out {bad} of {total} rows: {self}", file=sys.stderr)
    def __str__(self):
        reasons = self.reasons.most_common()
        return ", ".join(f"{n} {reason} (first: {self.first[reason]})" for reason, n in reasons)

def find_audio(place: Path) -> list[Path]:  # the FILES in a folder, or a file itself
    inside = (path for path in place.rglob("*") if path.suffix.lower() in FILES)
    return sorted(inside) if place.is_dir() else [place]

def usable(samples: list, dataset, bad: BadRows) -> list:
    """The samples that dataset.encode takes; the others go to `bad`. Threads decode the audio."""
    most, found, good = dataset.encode.keywords.get("max_seconds", MAX_SECONDS), {}, []
    def look(path):  # notes how many samples it has, or why it cannot be used
        try:
            found[path] = len(load_audio(path, max_seconds=most))
        except BadRow as e:
            found[path] = e
    def load(path, **_):  # -> as long as load_audio's, without the sound
        if isinstance(found[path], BadRow):
            raise found[path]
        return torch.empty(1).expand(found[path])
    paths = {path for sample in samples for path in sample.audio}
    thread_map(look, paths, max_workers=os.cpu_count(), desc="checking audio")
    for sample in samples:  # not in threads: tokenizers mark what the assistant says in one place
        try:
            dataset.encode(sample, load=load)
            good.append(sample)
        except BadRow as e:
            bad.add(str(e), sample.name)
    return good

def check_text(text, empty: bool = False, recordings: int | None = None) -> str:
    """-> stripped, or BadRow. empty: "" will do. recordings: of a question about so many."""
    cli.refuse(not isinstance(text, str) or not (text.strip() or empty), "empty text", BadRow)
    # Half a character, or checkpoint.ESCAPE, which tokenizers drop.
    cli.refuse(re.search("[\ud800-\udfff\ufdd0]", text), "broken text", BadRow)
    if recordings is not None and text.replace(TAG_PAIR, AUDIO).count(AUDIO) not in (0, recordings):
        raise BadRow("placeholders and recordings differ in number")
    return text.strip()

class OneWay(soundfile.SoundFile):
    def seekable(self):  # or soundfile seeks after each read: a FLAC of unknown length cannot
        return False

def decode(source):
    """A path or a file's bytes -> its sample rate, then mono float32 blocks. Raises many kinds."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    head = np.fromfile(file, np.uint8, 8).tobytes() if file is source else source[:8]
    kind = CONTAINERS.get(head[4:]) or CONTAINERS.get(head[:4])
    if not kind:
        with OneWay(file) as sound:
            yield sound.samplerate
            sound.seek(0)  # as soundfile.read: without it, the last bits of some MP3 differ
            while len(block := sound.read(BLOCK // sound.channels, "float32", True)):
                yield block.mean(axis=1)
        return
    cli.refuse(not PYAV, "m4a, mp4 or webm: needs PyAV, pip install av", BadRow)
    import av
    with av.open(file, format=kind) as container:
        stream = container.streams.audio[0]
        yield stream.rate
        mono = av.AudioResampler("fltp", "mono", stream.rate)
        for frame in container.decode(stream):
            yield from (part.to_ndarray()[0] for part in mono.resample(frame))

def load_audio(source, min_seconds=MIN_SECONDS, silence=False, max_seconds=MAX_SECONDS):
    """A path, a file's bytes or int16 at 16 kHz -> (samples,) float32 at 16 kHz, mono, peak <= 1.
    Raises BadRow, for silence too if unwanted. Memory follows what a file holds, not its header."""
    if isinstance(source, np.ndarray):
        return torch.from_numpy(source.astype(np.float32) / 32768)
    cli.refuse(isinstance(source, str) and not os.path.isfile(source), "missing file", BadRow)
    try:
        sound = decode(source)
        n, rate, blocks = 0, next(sound), [np.zeros(0, np.float32)]
        most = max_seconds * min(rate, 96_000)  # of higher rates, memory takes less
        while n <= most and (block := next(sound, None)) is not None:
            blocks.append(block)
            n += len(block)
    except Exception as e:  # of many kinds, some PyAV's own
        raise e if isinstance(e, BadRow) else BadRow("not audio") from None
    cli.refuse(not 1000 <= rate <= 1_000_000, f"a sample rate of {rate} Hz", BadRow)
    cli.refuse(n > most, f"longer than {most / rate:g} s", TooLong)
    wave = torch.from_numpy(np.concatenate(blocks))
    cli.refuse(len(wave) < max(1, min_seconds * rate), f"shorter than {min_seconds} s", BadRow)
    try:
        wave = check_wave(processing.resample(wave, rate))
    except ValueError as e:
        raise BadRow(str(e)) from None
    cli.refuse(wave.abs().max() < 1e-6 and not silence, "silent", BadRow)
    return wave
