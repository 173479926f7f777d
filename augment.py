"""augment.py -- the post's effects make clean speech sound like the world, harder by the epoch.

    python augment.py in.wav out/                     # hear and see every effect and every stage
    python augment.py in.wav out/ --noise my_noises/  # with your own; hub: the post's"""
import io
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import soundfile
import torch
from numpy.random import SFC64, Generator
from model import HOP, SAMPLE_RATE, BorealisConfig, cut_windows, log_mel
from support import banks, cli, processing, recipes, rows

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

# ---- Filters: frequencies f in Hz, parameters -> gain at each f
EQ_HZ = np.array([60, 130, 280, 600, 1300, 2800, 6000])  # the original ends at 15 kHz, beyond ours

def eq_response(f: np.ndarray, *gains_db: float) -> np.ndarray:  # straight lines over log f
    gains = np.array(gains_db) * math.log(10) / 20
    return np.exp(np.interp(np.log(f + 1e-3), np.log(EQ_HZ), gains))

def band_response(f: np.ndarray, low: float, high: float) -> np.ndarray:
    """Butterworth, 4th order on both sides: -3 dB at the edges, -24 dB an octave outside."""
    below, above = low / np.maximum(f, 1), f / high        # squares are fast, ** 8 is not
    return 1 / np.sqrt((1 + ((below ** 2) ** 2) ** 2) * (1 + ((above ** 2) ** 2) ** 2))

def resample_response(f: np.ndarray, rate: float) -> np.ndarray:  # a slope over the last 5 %
    return np.clip((rate / 2 - f) / (0.05 * (rate / 2)), 0, 1)

FILTERS = {"eq": eq_response, "band_pass": band_response, "resample": resample_response,
           "telephony": lambda f, rate, *band: resample_response(f, rate) * band_response(f, *band)}

# ---- All that is linear, as one product of spectra
GUARD = 2048  # zeros after a clip: what a filter rings on lands here, not at the clip's start
# Having freed a block of 31 MiB, glibc keeps what it has: page faults cost more than the FFT.
np.empty(31 << 20, np.uint8)
SIZES = [2]  # all even products of 2, 3, 5, 7 and 11 up to 2 ** 34: an FFT is fast at them
for p in (2, 3, 5, 7, 11):
    for s in SIZES:  # grows while it is read
        SIZES += [s * p] * (s * p <= 2 ** 34)
SIZES = np.sort(SIZES)

def fft_sizes(n: int, ratio: float) -> tuple[int, int]:
    """FFT lengths (N, M): N >= n, M / N within 1/1000 of ratio; mostly the first within 3e-4."""
    first = np.searchsorted(SIZES, n)
    if ratio == 1:
        return SIZES[first], SIZES[first]
    N = SIZES[first:first + 64].repeat(2)                  # each with the sizes around N * ratio
    M = SIZES[np.searchsorted(SIZES, np.ceil(N * ratio).astype(int)) - np.arange(1, 129) % 2]
    best = np.argmin(np.maximum(np.abs(M / N / ratio - 1), 3e-4))  # of equals, the first
    return N[best], M[best]

def spectral(wave: np.ndarray, ratio=1.0, length=None, responses=(), irs=(), noise=None):
    """One FFT and one back: (n,) -> (n * ratio,), or cut or filled up to `length`; noise added to
    that; filters, as pairs (function of f, parameters), without phase; impulse responses."""
    n, tail = len(wave), max([GUARD, *map(len, irs)])
    N, M = fft_sizes(n + math.ceil(tail / min(ratio, 1)), ratio)
    bins = min(N, M) // 2                                  # Nyquist's own bin is left out
    # A spectrum of N bins read as one of M bins is the same clip at another sample rate.
    spectrum = np.fft.rfft(wave, N)[:bins] * np.float32(M / N)
    if noise is not None:
        speech, spectrum = spectrum, np.fft.rfft(noise, M)[:M // 2]
        spectrum[:bins] += speech
    f = np.arange(len(spectrum), dtype=np.float32) * np.float32(SAMPLE_RATE / M)
    for response, arguments in responses:
        spectrum *= response(f, *arguments)
    for ir in irs:
        spectrum *= np.fft.rfft(ir, M)[:len(spectrum)]
    return fit(np.fft.irfft(spectrum, M), round(n * M / N) if length is None else length)

def fit(wave: np.ndarray, length: int) -> np.ndarray:
    return np.pad(wave[:length], (0, max(0, length - len(wave))))

def stretch(wave: np.ndarray, factor: float) -> np.ndarray:
    """WSOLA (Verhelst and Roelands 1993): (n,) -> (round(n * factor),) at equal pitch. Overlapping
    frames of 80 ms move apart, each from where, within 8 ms, it best continues the one before."""
    H, D, q = 640, 128, 4                                  # half a frame, reach, decimation
    length = round(len(wave) * factor)
    places = np.round(np.arange(0, length + H, H) / factor).astype(int) + D + q
    x = np.pad(wave, (H + D + q, math.ceil(H / factor) + 3 * H))  # frame 0: around sample 0
    coarse = x[:len(x) // q * q].reshape(-1, q).mean(1)    # at 4 kHz: searched first
    starts = [places[0]]
    for place in places[1:].tolist():
        follow = starts[-1] + H                            # here the last frame would go on
        lo = (place - D) // q
        ahead = coarse[follow // q:follow // q + H // q]
        match = np.correlate(coarse[lo:lo + (2 * D + H) // q], ahead)
        if match.max() > 0:                                # silence continues silence anywhere
            lo = (lo + int(match.argmax())) * q - q
            match = np.correlate(x[lo:lo + 2 * q + H], x[follow:follow + H])
            place = lo + int(match.argmax())
        starts.append(place)
    frames = np.lib.stride_tricks.sliding_window_view(x, 2 * H)[starts]              # (count, 2H)
    fade = np.sin(np.pi / (4 * H) * (2 * np.arange(H, dtype=np.float32) + 1)) ** 2   # + mirror = 1
    out = frames[1:, :H] * fade + frames[:-1, H:] * fade[::-1]                       # (count-1, H)
    return out.reshape(-1)[:length]

def limit(wave: np.ndarray) -> np.ndarray:  # scaled as a whole if its peak passes 1; nothing is cut
    return wave / max(np.float32(1), np.abs(wave).max())

def codec(wave: np.ndarray, kbps: float, kind: str, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Through a real codec at `rate` (8000, 12000 or 16000 Hz), not delayed. kind: "mp3" (40 to
    160 kbit/s; below 16 kHz 32 to 64), "opus" (6 to 256); of phones, at 8 kHz: "gsm", "mu-law"."""
    settings = dict(recipes.TABLES["codecs"][kind])
    rate, levels = settings.pop("rate", rate), settings.pop("levels", None)
    x = fit(wave, max(len(wave), SAMPLE_RATE // 10))       # MP3 wants a few frames at least
    x = processing.resampler(SAMPLE_RATE, rate)(torch.from_numpy(x)).numpy()  # or as it was
    if levels:  # [at 16 kHz, below it]; libsndfile's level 1 is `low` kbit/s, its 0 is `high`
        least, low, high = levels[rate < SAMPLE_RATE]
        settings["compression_level"] = (high - np.clip(kbps, least, high)) / (high - low)
    buffer = io.BytesIO()
    soundfile.write(buffer, limit(x), rate, **settings)
    x, _ = soundfile.read(io.BytesIO(buffer.getvalue()), dtype="float32")
    return fit(processing.resampler(rate, SAMPLE_RATE)(torch.from_numpy(x)).numpy(), len(wave))

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
        x, ratio = stretch(x, shift), ratio / shift
    n = math.ceil(len(x) * ratio * 1.001)                  # a rate change is exact to 1/1000
    noise = draw_noise(x, n, config, rng, noises)
    if noise is not None and ratio == 1:                   # else it waits: its own rate stays
        x, noise = x + noise[:len(x)], None
    irs = []
    if draw(config.room, rng) is not None:
        count = 1 + round(*draw(config.more_room, rng) or [0])
        irs = [rooms[i] for i in rng.integers(len(rooms), size=count)]
    filters = {name: draw(getattr(config, name), rng) for name in FILTERS}  # EQ to telephony
    responses = [(FILTERS[name], drawn) for name, drawn in filters.items() if drawn]
    # Filters and rooms multiply the spectrum, in any order; a spectrum cut or padded is the clip at
    # another rate. So everything linear needs one FFT and one inverse FFT.
    if responses or irs or ratio != 1:                     # -> (n * ratio,), or (length,) if given
        x = spectral(x, ratio, length, responses, irs, noise)
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
        x = codec(x, *kbps, kind, line_rate(config, filters))
    return limit(x)

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
def plot_mels(mels: dict, path: str) -> None:  # {name: log-mel (M, F)} -> a small picture
    lines = math.ceil(len(mels) / 3)
    with cli.picture(path, lines, 3, dpi=80, figsize=(9, 0.9 * lines)) as (_, axes):
        for axis in axes.flat:
            axis.axis("off")
        for axis, (name, mel) in zip(axes.flat, mels.items(), strict=False):
            axis.imshow(mel.numpy().round(1), **recipes.TABLES["picture"])  # rounded: a small file
            axis.set_title(name, loc="left", fontsize=9, pad=2)

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
    plot_mels(shown, f"{args.out}/spectrograms.png")
    print(f"wrote {len(shown)} recordings and spectrograms.png to {args.out}")

cli.run(main, __name__)
