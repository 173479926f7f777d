"""support/banks.py -- noises (int16), rooms (impulse responses, float32), sounds without speech."""
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from safetensors.torch import load_file
from data import Sample
from model import SAMPLE_RATE
from support import cli, corpus, recipes, rows

NOISE_DATASET, MOST, MADE = recipes.TABLES["banks"].values()
CLIP = 10 * SAMPLE_RATE  # so much of each recording

def open_banks(noise="made", rooms="made", voices="train", data_dir=None) -> tuple:
    """(noises, rooms), each "made", "hub", or a folder. voices: the corpus split that babbles."""
    return open_bank(noise, "Musan", voices, data_dir), open_bank(rooms, "Echo", voices, data_dir)

def open_bank(source: str, split: str, voices="train", data_dir=None) -> list[np.ndarray]:
    """One bank; split: "Musan" for noises, "Echo" for rooms. Raises UserError."""
    check_source(source)
    rooms, clips, bad = split == "Echo", [], rows.BadRows()
    if source == "made":
        rng = np.random.default_rng([rooms, voices == "train"])
        return make_rooms(rng) if rooms else make_noises(voices, rng)
    bank = cli.cached(f"{split}.safetensors", NOISE_DATASET, CLIP, MOST)
    if source == "hub" and bank.exists():  # all processes map one file
        return [clip.numpy() for _, clip in sorted(load_file(bank).items())]
    if source == "hub":
        column = recipes.Source(hub=NOISE_DATASET, split=split, conversation="audio")  # no other
        table = recipes.open_source(column, data_dir, MOST)
        found = ((f"{split}/{i}", row["audio"]["bytes"]) for i, row in enumerate(table))
    else:
        found = ((path.name, str(path)) for path in rows.find_audio(Path(source))[:MOST])
    for name, audio in found:
        try:
            wave = rows.load_audio(audio, min_seconds=0, max_seconds=np.inf).numpy()[:CLIP]
            clips.append(as_room(wave) if rooms else (wave * 32767).astype(np.int16))
        except rows.BadRow as e:
            bad.add(str(e), name)
    bad.report(len(clips) + bad.reasons.total(), source)
    cli.refuse(not clips, f"no audio in {source}: give a folder of audio, hub, or made")
    if source == "hub":
        numbered = {f"{i:06}": clip for i, clip in enumerate(clips)}
        cli.replace_file(bank, lambda tmp: save_file(numbered, tmp))
    return clips

def check_source(source: str) -> None:
    if source not in ("made", "hub") and not Path(source).is_dir():
        raise cli.UserError(f"no folder {source}: give a folder of audio, hub, or made")

def crop(tape: np.ndarray, rng, n: int) -> np.ndarray:  # (n,); a shorter tape starts again
    start = rng.integers(max(1, len(tape) - n + 1))
    return tape[start:start + n] if len(tape) >= n else np.resize(tape, n)

# ---- Made here, the same every time
def make_noises(voices: str, rng: np.random.Generator) -> list[np.ndarray]:
    """In turn: babble of 3 to 7 voices; noise, power falling as f^0 to f^-2; such that swells."""
    clips, speech = [], corpus.embedded_rows("ru", voices, corpus.CHUNK)
    for i in range(MADE):
        if i % 3 == 0:
            x = np.zeros(CLIP, np.float32)
            for nine in rng.integers(len(speech), size=(rng.integers(3, 8), 9)):
                x += np.resize(np.concatenate([speech[j]["audio"] for j in nine]), CLIP)
        else:
            white = np.fft.rfft(rng.standard_normal(CLIP))
            x = np.fft.irfft(white * np.arange(1, CLIP // 2 + 2) ** -rng.uniform(0, 1), CLIP)
        if i % 3 == 2:
            x *= 1.2 + np.sin(2 * np.pi * rng.uniform(0.1, 3) * np.arange(CLIP) / SAMPLE_RATE)
        clips.append((x / np.abs(x).max() * 32767).astype(np.int16))
    return clips

def make_rooms(rng: np.random.Generator) -> list[np.ndarray]:
    """Polack's model: 2-10 ms after the direct sound noise, 0-10 dB less, -60 dB in 0.15-0.8 s."""
    clips, t = [], np.arange(SAMPLE_RATE) / SAMPLE_RATE
    for _ in range(MADE):
        tail = rng.standard_normal(len(t)) * 10 ** (-3 * t / rng.uniform(0.15, 0.8))
        tail *= t > rng.uniform(0.002, 0.01)
        tail *= 10 ** (-rng.uniform(0, 10) / 20) / np.sqrt(np.sum(np.square(tail)))
        clips.append(as_room(np.concatenate([[1.0], tail])))
    return clips

def as_room(wave: np.ndarray) -> np.ndarray:  # a second from its peak on, with energy 1
    ir = wave[np.abs(wave).argmax():][:SAMPLE_RATE]
    return (ir / np.sqrt(np.sum(np.square(ir)))).astype(np.float32)

# ---- Sounds without speech: rows of training, two splits of eval.py
NOTES = 110 * 2 ** (np.array([0, 3, 5, 7, 10, 12, 15, 17]) / 12)  # Hz
VOWELS = [(300, 870), (270, 2290), (730, 1090), (530, 1840)]  # formants, Hz: Peterson, Barney 1952

def at_level(x: np.ndarray, rng, low: float, high: float) -> np.ndarray:  # dB of full scale, RMS
    return x * 10 ** (rng.uniform(low, high) / 20) / max(1e-9, np.sqrt(np.mean(np.square(x))))

def nothing(rng, t, noises):  # t: the times of n samples, in seconds
    return 0 * t

def noise(rng, t, noises):  # of the bank
    return at_level(crop(noises[rng.integers(len(noises))], rng, len(t)) / 32768, rng, -60, -10)

def room_tone(rng, t, noises):  # hiss and hum of the mains
    mains = sum(np.sin(2 * np.pi * 50 * k * t) / k for k in (1, 2, 3))
    return at_level(rng.standard_normal(len(t)) + rng.uniform(0, 2) * mains, rng, -75, -50)

def cough(rng, t, noises):  # up to three bursts of noise in a room
    x = room_tone(rng, t, noises)
    for start in rng.uniform(0, 0.9 * t[-1], rng.integers(1, 4)):
        fall = np.exp(np.minimum(0, start - t) / rng.uniform(0.02, 0.1)) * (t > start)
        x += fall * at_level(noise(rng, t, noises), rng, -26, -10)
    return x

def music(rng, t, noises):  # chords of three notes, which fade
    chords = rng.choice(NOTES, (int(t[-1] / 0.4) + 1, 3))[(t / 0.4).astype(int)]
    phases = 2 * np.pi * np.cumsum(chords, 0) / SAMPLE_RATE
    x = sum(np.sin(k * phases).sum(1) / k for k in (1, 2, 3))
    return at_level(x * np.exp(-8 * (t % 0.4)), rng, -35, -12)

def hum(rng, t, noises):  # a long vowel: harmonics of a voice, strong near two formants
    pitch, formants = rng.uniform(90, 260), VOWELS[rng.integers(len(VOWELS))]
    phase, x = 2 * np.pi * pitch * t + np.sin(2 * np.pi * 3 * t), 0
    for k in range(1, int(4000 / pitch)):
        x = x + sum(np.sin(k * phase) / (1 + ((k * pitch - f) / 100) ** 2) for f in formants)
    return at_level(x, rng, -35, -12)

TRAINED = nothing, room_tone, cough, noise, noise, noise
SPLITS = dict(silence=(nothing, room_tone, noise, cough), sounds=(noise, music, hum))

class Silence:
    """A pool of n samples of 0.3 to `longest` seconds, made when asked for, of each kind in turn"""
    def __init__(self, makers: tuple, noises: list, n: int, longest: float, seed: int):
        self.makers, self.noises, self.n, self.longest, self.seed = makers, noises, n, longest, seed
    def __len__(self):
        return self.n
    def __getitem__(self, i: int) -> Sample:
        i = range(self.n)[i]  # its IndexError ends a loop over the pool
        kind = self.makers[i % len(self.makers)]
        rng = np.random.default_rng([self.seed % 2 ** 32, i])
        t = np.arange(int(rng.uniform(0.3, self.longest) * SAMPLE_RATE)) / SAMPLE_RATE
        pcm = (np.clip(kind(rng, t, self.noises), -1, 1) * 32767).round().astype(np.int16)
        return Sample("", [pcm], name=f"{kind.__name__}/{i}")

def without_babble(noises: list) -> list:  # of a bank made here, where every third is of voices
    return [noise for i, noise in enumerate(noises) if i % 3]

def split(name: str, n: int, seed: int) -> list[Sample]:  # held-out noises, in other places
    noises = without_babble(open_bank("made", "Musan", "clean"))
    return list(Silence(SPLITS[name], noises, n, 6, seed + 1000))
