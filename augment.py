"""augment.py -- the post's effects make clean speech sound like the world, harder by the epoch.

    python augment.py in.wav out/                     # hear and see every effect and every stage
    python augment.py in.wav out/ --noise my_noises/  # with your own; hub: the post's"""
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import soundfile
import torch
from numpy.random import SFC64, Generator
from model import HOP, SAMPLE_RATE, BorealisConfig, cut_windows, log_mel
from support import banks, cli, recipes, rows, sound

# ---- What may happen
class AugmentConfig(SimpleNamespace):
    """Of each effect (p, from, to, from, to, ...), by default [effects] of recipes.toml: off."""
    def __init__(self, **given):
        assert given.keys() <= recipes.TABLES["effects"].keys(), f"no such effects in {[*given]}"
        super().__init__(**recipes.TABLES["effects"] | given)

@dataclass(frozen=True)
class AugmentationStage:
    start_epoch: float  # it lasts until the next stage starts; fractions are allowed
    config: AugmentConfig
    name: str = ""

# The original's stages; they start at these epochs, or where train.py --curriculum says.
CURRICULUM = [AugmentationStage(0, AugmentConfig(touched=0), "clean")]
for column, (name, epoch) in enumerate([("light", 1), ("intense", 3), ("heavy", 4)]):
    effects = {effect: values[column] for effect, values in recipes.TABLES["stages"].items()}
    CURRICULUM.append(AugmentationStage(epoch, AugmentConfig(**effects), name))
# What makes two of the six evaluation splits out of clean speech, with noises of their own.
HARD = {name: AugmentConfig(**effects) for name, effects in recipes.TABLES["hard"].items()}

def draw(effect: list, rng: Generator) -> list[float] | None:  # parameters, or not this time
    p, *ends = effect
    return rng.uniform(ends[::2], ends[1::2]).tolist() if rng.random() < p else None

# ---- A clip's fate. Waves are float32 arrays at 16 kHz, of any length from one sample up.
# A tape of Gaussian noise: drawing it anew would take as long as an FFT.
TAPE = np.random.default_rng(0).standard_normal(60 * SAMPLE_RATE, np.float32)

def draw_noise(speech: np.ndarray, n: int, config: AugmentConfig, rng: Generator, noises: list):
    """One source or several, each at an SNR of its own below the speech -> (n,), or None."""
    if not (snr := draw(config.noise, rng)):
        return None
    total, power = 0, np.mean(np.square(speech))
    for _ in range(1 + round(*draw(config.more_noise, rng) or [0])):
        tape = banks.crop(noises[rng.integers(len(noises))], rng, n).astype(np.float32)
        own = np.mean(np.square(tape))
        share = power / own * 10 ** (-snr[0] / 10) if own > 0 else 0
        total = total + tape * np.float32(math.sqrt(share))
        snr = draw((1, *config.noise[1:]), rng)            # of the next source
    return total

def line_rate(config: AugmentConfig, filters: dict) -> int:  # Hz: holds what all let through
    phone, resampled = filters["telephony"] or [SAMPLE_RATE] * 3, filters["resample"] or []
    lowest = min(config.codec_rate, *resampled, phone[0], 2 * phone[2])  # twice its upper edge
    return next(rate for rate in (8000, 12000, SAMPLE_RATE) if rate >= lowest)

def augment(wave: np.ndarray, config: AugmentConfig, rng: Generator, noises: list, rooms: list):
    """Draw a clip's fate and carry it out: float32 (n,) -> (n,), or about n / speed; peak <= 1."""
    x, ratio, length = np.asarray(wave, np.float32), 1.0, None  # ratio: new length over old
    if speed := draw(config.speed, rng):
        ratio /= speed[0]
    if pitch := draw(config.pitch, rng):                   # longer at equal pitch, then faster
        shift, length = 2 ** (pitch[0] / 12), round(len(x) * ratio)
        x, ratio = sound.stretch(x, shift), ratio / shift
    n = math.ceil(len(x) * ratio * 1.001)                  # a rate change is exact to 1/1000
    noise = draw_noise(x, n, config, rng, noises)
    if noise is not None and ratio == 1:                   # else it waits: its own rate stays
        x, noise = x + noise[:len(x)], None
    irs = []
    if draw(config.room, rng) is not None:
        count = 1 + round(*draw(config.more_room, rng) or [0])
        irs = [rooms[i] for i in rng.integers(len(rooms), size=count)]
    filters = {name: draw(getattr(config, name), rng) for name in sound.FILTERS}  # EQ to telephony
    responses = [(sound.FILTERS[name], drawn) for name, drawn in filters.items() if drawn]
    # Filters and rooms multiply the spectrum, in any order; a spectrum cut or padded is the clip at
    # another rate. So everything linear needs one FFT and one inverse FFT.
    if responses or irs or ratio != 1:                     # -> (n * ratio,), or (length,) if given
        x = sound.spectral(x, ratio, length, responses, irs, noise)
    if gain := draw(config.gain, rng):
        x = x * np.float32(10 ** (gain[0] / 20))
    if std := draw(config.gaussian, rng):
        x = x + np.float32(std[0]) * banks.crop(TAPE, rng, len(x))
    if share := draw(config.clipping, rng):
        top = share[0] * np.abs(x).max()
        x = np.clip(x, -top, top) / np.float32(share[0])
    if kbps := draw(config.codec, rng):
        shares = config.opus, config.phone / 2, config.phone / 2
        kind = rng.choice(["opus", "gsm", "mu-law", "mp3"], p=[*shares, max(0, 1 - sum(shares))])
        x = sound.codec(x, *kbps, kind, line_rate(config, filters))
    return sound.limit(x)

def mask(mel: torch.Tensor, frames: int, config: AugmentConfig, rng: Generator) -> torch.Tensor:
    """SpecAugment (Park et al. 2019) of (M, F): bands, stretches of `frames`, become the mean."""
    counts = draw(config.mask, rng)
    if not counts or frames < 1:
        return mel
    # The paper bounds a time mask by the clip too: 100 frames would blot out words of a short one.
    widest = config.mask_width[0], min(config.mask_width[1], frames // 10)
    mel, value = mel.clone(), mel[:, :frames].mean()
    for axis, size in enumerate((mel.shape[0], frames)):
        for _ in range(round(counts[axis])):
            width = rng.integers(widest[axis] + 1)
            mel.narrow(axis, rng.integers(size - width + 1), width).fill_(value)
    return mel

class Augmenter:
    """A clip's fate depends on (seed, epoch, index, recording), not on workers, ranks, resumes."""
    def __init__(self, stages: list[AugmentationStage], noises: list, rooms: list, seed: int = 0):
        self.stages = sorted(stages, key=lambda stage: stage.start_epoch)
        self.banks, self.seed = (noises, rooms), seed % 2 ** 32
    def stage(self, epoch: float) -> AugmentationStage:  # an epoch need not be whole
        return [s for s in self.stages if s.start_epoch <= epoch][-1]
    def rng(self, epoch: float, index: int, use: int):  # 0: touches, 1: masked, 2, 3...: wave
        return Generator(SFC64([self.seed, int(epoch), index, use]))
    def touches(self, epoch: float, index: int) -> bool:  # the sound of this sample?
        return self.rng(epoch, index, 0).random() < self.stage(epoch).config.touched
    def wave(self, epoch: float, index: int, wave: torch.Tensor, part: int) -> torch.Tensor:
        """Recording number `part` of sample `index`, a tensor (n,), as this epoch hears it."""
        rng = self.rng(epoch, index, 2 + part)
        return torch.from_numpy(augment(wave.numpy(), self.stage(epoch).config, rng, *self.banks))
    def masked(self, mels: torch.Tensor, windows: list, index: int, epoch: float) -> torch.Tensor:
        """Spectrograms (W, M, F) of these windows of sound -> masked, whether touched or not."""
        config, rng = self.stage(epoch).config, self.rng(epoch, index, 1)
        new = [mask(mel, math.ceil(len(window) / HOP), config, rng)
               for mel, window in zip(mels, windows, strict=True)]
        return torch.stack(new) if new else mels

# ---- Listen
def examples() -> dict[str, AugmentConfig]:  # each effect alone, each stage, each hard split
    shown = {"before": AugmentConfig()}
    for name, effect in vars(AugmentConfig()).items():
        if isinstance(effect, list) and name not in ("more_noise", "more_room", "mask_width"):
            shown[name] = AugmentConfig(**{name: [1, *effect[1:]]})
    shown |= {f"stage_{stage.name}": stage.config for stage in CURRICULUM}
    return shown | {f"split_{name}": config for name, config in HARD.items()}

def main() -> None:
    args = cli.ArgumentParser().add_tables("augment").parse_args()
    cli.check_out(args.out)
    with cli.as_user_error(f"{args.wav}: ", rows.BadRow, suffix="; give a file with sound in it"):
        wave = rows.load_audio(args.wav)
    if Path(args.wav).resolve() in [Path(args.out, f"{name}.wav").resolve() for name in examples()]:
        raise cli.UserError(f"{args.wav} would be overwritten by a result: give another folder")
    noises, rooms = banks.open_banks(args.noise, args.rooms, data_dir=args.data_dir)
    shown, whisper = {}, BorealisConfig()
    for i, (name, config) in enumerate(examples().items()):
        rng = np.random.default_rng([0, i])
        x = augment(wave.numpy(), config, rng, noises, rooms)
        cli.replace_file(f"{args.out}/{name}.wav", soundfile.write, x, SAMPLE_RATE)
        frames = min(math.ceil(len(x) / HOP), 1000)        # the picture shows the first ten seconds
        mel = log_mel(cut_windows(torch.from_numpy(x), whisper)[:1], whisper)[0]
        shown[name] = mask(mel, frames, config, rng)[:, :frames]
    sound.plot_mels(shown, f"{args.out}/spectrograms.png")
    print(f"wrote {len(shown)} recordings and spectrograms.png to {args.out}")

cli.run(main, __name__)
