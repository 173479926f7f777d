"""support/nonspeech.py -- sounds without speech: rows of training, two splits of eval.py."""
import numpy as np
from data import Sample
from model import SAMPLE_RATE
from support.banks import crop, open_bank

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
