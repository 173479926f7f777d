"""support/nonspeech.py -- sounds without speech: rows of training, two splits of eval.py."""
import numpy as np
from data import Sample
from model import SAMPLE_RATE
from support.banks import crop, open_bank

MAINS, NOTES = 50, 110 * 2 ** (np.array([0, 3, 5, 7, 10, 12, 15, 17]) / 12)  # Hz
VOWELS = [(300, 870), (270, 2290), (730, 1090), (530, 1840), (570, 840)]  # formants, Peterson 1952

def at_level(x: np.ndarray, rng, low: float, high: float) -> np.ndarray:  # dB of full scale, RMS
    return x * 10 ** (rng.uniform(low, high) / 20) / max(1e-9, np.sqrt(np.mean(np.square(x))))

def nothing(rng, n, noises):
    return np.zeros(n)

def noise(rng, n, noises):  # of the bank
    tape = crop(noises[rng.integers(len(noises))], rng, n).astype(np.float32)
    return at_level(tape, rng, -60, -10)

def room_tone(rng, n, noises):  # hiss and hum of the mains
    t = np.arange(n) / SAMPLE_RATE
    hum = sum(np.sin(2 * np.pi * MAINS * k * t) / k for k in (1, 2, 3))
    return at_level(rng.standard_normal(n) + rng.uniform(0, 2) * hum, rng, -75, -50)

def cough(rng, n, noises):  # up to three bursts of noise in a room
    x, t = room_tone(rng, n, noises), np.arange(n) / SAMPLE_RATE
    for start in rng.uniform(0, 0.9 * n / SAMPLE_RATE, rng.integers(1, 4)):
        fall = np.exp(np.minimum(0, start - t) / rng.uniform(0.02, 0.1)) * (t > start)
        x += fall * at_level(noise(rng, n, noises), rng, -26, -10)
    return x

def music(rng, n, noises):  # chords of tones with harmonics, which fade
    parts, t = [], np.arange(int(rng.uniform(0.2, 0.8) * SAMPLE_RATE)) / SAMPLE_RATE
    for _ in range(-(-n // len(t))):
        tones = [np.sin(2 * np.pi * k * f * t) / k for f in rng.choice(NOTES, 3) for k in (1, 2, 3)]
        parts.append(sum(tones) * np.exp(-3 * t))
    return at_level(np.concatenate(parts)[:n], rng, -35, -12)

def hum(rng, n, noises):  # one long vowel: harmonics of a voice, strong near two formants
    pitch = rng.uniform(90, 260) * (1 + 0.05 * np.sin(2 * np.pi * 3 * np.arange(n) / SAMPLE_RATE))
    phase, x = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE, 0
    formants = VOWELS[rng.integers(len(VOWELS))]
    for k in range(1, int(4000 / pitch.max())):
        x = x + sum(np.sin(k * phase) / (1 + ((k * pitch.mean() - f) / 100) ** 2) for f in formants)
    return at_level(x, rng, -35, -12)

TRAINED = nothing, room_tone, noise, cough
SPLITS = dict(silence=(nothing, room_tone, noise, cough), sounds=(noise, music, hum))

def sample(makers, noises, name: str, rng, longest: float) -> Sample:
    """Of 0.3 to `longest` seconds, whose transcript is empty."""
    n = int(rng.uniform(0.3, longest) * SAMPLE_RATE)
    x = makers[rng.integers(len(makers))](rng, n, noises)
    pcm = (np.clip(x, -1, 1) * 32767).round().astype(np.int16)
    return Sample("", [pcm], name=name)

class Silence:
    """A pool of n samples for training, made when asked for. longest: seconds"""
    def __init__(self, noises: list, n: int, longest: float, seed: int):
        self.noises, self.n, self.longest, self.seed = noises, n, longest, seed % 2 ** 32
    def __len__(self):
        return self.n
    def __getitem__(self, i: int) -> Sample:
        if i >= self.n:
            raise IndexError(i)
        rng = np.random.default_rng([self.seed, i])
        return sample(TRAINED, self.noises, f"silence/{i}", rng, self.longest)

def without_babble(noises: list) -> list:  # of a bank made here, where every third is of voices
    return [noise for i, noise in enumerate(noises) if i % 3]

def split(name: str, n: int, seed: int) -> list[Sample]:  # each kind of sound in turn
    rngs = [np.random.default_rng([seed % 2 ** 32, i, len(name)]) for i in range(n)]
    makers, noises = SPLITS[name], without_babble(open_bank("made", "Musan", "clean"))
    return [sample([makers[i % len(makers)]], noises, f"{name}/{i}", rng, 6)
            for i, rng in enumerate(rngs)]
