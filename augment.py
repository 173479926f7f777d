"""
augment.py -- make clean speech sound like the world: the post's effects, and the curriculum that brings them in.

    python augment.py in.wav out_dir/                     # hear every effect and every stage, see them in one picture
    python augment.py in.wav out_dir/ --noise my_noises/  # with noises of your own; --noise hub takes the post's

The order is the world's, not shuffled as in the original: the speaker (pitch, speed), noise, the room, the microphone (EQ,
band, gain, its own noise, overload), the line (resampling, telephony, codec); and on the mel, SpecAugment. Whatever is
linear (room, EQ, bands, gain, resampling, and the rate change in speed and pitch) takes one FFT forth and one back:
responses multiply, and a spectrum cut or padded to another length is the clip at another sample rate.
"""
import io
import math
import os
import sys
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch

from data import CHUNK, ArgumentParser, BadRow, BadRows, Source, UserError, check_out, embedded, load_audio, load_table, \
    picture, replace_file, run
from model import HOP, SAMPLE_RATE, BorealisConfig, cut_windows, log_mel

# glibc hands buffers of this size back to the system at every free, and the page faults then cost more than the FFT (3.4
# ms instead of 1.1 for 10 s of audio). Having freed one block of 31 MiB, it keeps what it has.
np.empty(31 << 20, np.uint8)

# -----------------------------------------------------------------------------
# What may happen: (probability, range of each parameter: from, to, from, to ...)

@dataclass(frozen=True)
class AugmentConfig:
    """The ranges are the post's; nothing is switched on. Probabilities hold for a clip that is touched at all."""
    touched: float = 1.0
    pitch: tuple = (0, -4, 4)                              # semitones; the length stays
    speed: tuple = (0, 0.8, 1.2)                           # a plain rate change: pitch and formants move along
    noise: tuple = (0, 18, 28)                             # SNR in dB, by mean power over the whole clip
    more_noise: tuple = (0, 1, 1)                          # so many more sources, if there is noise
    room: tuple = (0,)                                     # convolution with an impulse response
    more_room: tuple = (0, 1, 1)
    eq: tuple = (0, *7 * (-6, 6))                          # dB in each of seven bands
    band_pass: tuple = (0, 150, 350, 3200, 5200)           # Hz: lower edge, upper edge
    gain: tuple = (0, -3, 3)                               # dB
    gaussian: tuple = (0, 0.001, 0.015)                    # std of the microphone's own noise; full scale is 1
    clipping: tuple = (0, 0.82, 0.95)                      # share of the peak
    resample: tuple = (0, 14000, 16000)                    # Hz, there and back; the post's 20 kHz end at 16 here
    telephony: tuple = (0, 8000, 12000, 180, 180, 4200, 4200)  # Hz: rate there and back, lower edge, upper edge
    codec: tuple = (0, 96, 160)                            # kbit/s
    codec_rate: int = SAMPLE_RATE                          # Hz; lower where the line carries no more: 8000, 12000
    opus: float = 0.5                                      # share of Opus among the codecs, the others are MP3
    mask: tuple = (0, 0, 2, 0, 2)                          # SpecAugment: how many bands, how many times
    mask_width: tuple = (27, 100)                          # at most so many mel bins, so many frames


@dataclass(frozen=True)
class AugmentationStage:
    """From this epoch on, until the next stage starts. Fractions are allowed, so that a short run sees every stage."""
    start_epoch: float
    config: AugmentConfig
    name: str = ""


# The original's table of stages. Its codec is MP3 only; one in twenty is Opus here. And at these bitrates MP3 leaves 16 kHz
# speech as it was (correlation 0.999), so that the later stages code it at lower rates, as lines do; MP3 has at most 64
# kbit/s there.
CURRICULUM = [
    AugmentationStage(0, AugmentConfig(touched=0), "clean"),
    AugmentationStage(1, AugmentConfig(
        touched=0.40, pitch=(.2, -2, 2), speed=(.2, .9, 1.1), noise=(.55, 20, 32), more_noise=(.3, 1, 1), room=(.2,),
        more_room=(.1, 1, 1), eq=(.3, *7 * (-5, 5)), band_pass=(.2, 180, 320, 3200, 5200), gain=(.4, -2.5, 2.5),
        gaussian=(.25, .001, .006), clipping=(.1, .82, .95), resample=(.15, 13600, 16000),
        telephony=(.1, 9000, 12000, 160, 260, 3300, 4300), codec=(.05, 112, 160), opus=.05,
        mask=(.2, 0, 1, 0, 1), mask_width=(15, 50)), "light"),
    AugmentationStage(3, AugmentConfig(
        touched=0.65, pitch=(.3, -3, 3), speed=(.3, .85, 1.15), noise=(.7, 10, 25), more_noise=(.5, 1, 2), room=(.3,),
        more_room=(.2, 1, 2), eq=(.45, *7 * (-8, 8)), band_pass=(.35, 150, 380, 2800, 4600), gain=(.5, -4, 4),
        gaussian=(.35, .002, .015), clipping=(.2, .82, .95), resample=(.28, 10400, 15200),
        telephony=(.35, 7000, 11000, 200, 320, 2900, 3800), codec=(.2, 72, 144), codec_rate=12000, opus=.05,
        mask=(.4, 0, 2, 0, 2)), "intense"),
    AugmentationStage(4, AugmentConfig(
        touched=0.72, pitch=(.4, -4, 4), speed=(.4, .8, 1.2), noise=(.75, 10, 25), more_noise=(.6, 1, 2), room=(.4,),
        more_room=(.3, 1, 2), eq=(.5, *7 * (-10, 10)), band_pass=(.4, 120, 360, 2400, 4200), gain=(.55, -5, 5),
        gaussian=(.45, .003, .015), clipping=(.3, .82, .95), resample=(.35, 8800, 14400),
        telephony=(.5, 6000, 9600, 220, 360, 2500, 3600), codec=(.35, 56, 128), codec_rate=8000, opus=.05,
        mask=(.5, 1, 2, 1, 2)), "heavy"),
]
# What makes two of the six evaluation splits out of clean speech: always on, with noises and rooms of their own.
HARD = {
    "webinars": AugmentConfig(noise=(1, 8, 16), more_noise=(.5, 1, 1), room=(1,), band_pass=(1, 150, 350, 3200, 4200),
                              gain=(1, -6, 0), gaussian=(1, .001, .004)),
    "devices": AugmentConfig(eq=(1, *7 * (-6, 6)), noise=(.5, 18, 28), band_pass=(1, 200, 350, 2800, 4200),
                             gaussian=(1, .002, .008), clipping=(.5, .7, .9), codec=(1, 16, 48), opus=.5),
}


def draw(effect, rng):
    """(p, from, to, ...) -> the drawn parameters with probability p, else None."""
    p, *ends = effect
    return rng.uniform(ends[::2], ends[1::2]).tolist() if rng.random() < p else None


def extra(effect, rng):
    """How many more of something: 0, or the drawn number."""
    return round(sum(draw(effect, rng) or [0]))


# -----------------------------------------------------------------------------
# The linear part: one FFT forth, one back

EQ_HZ = np.array([60, 130, 280, 600, 1300, 2800, 6000])  # seven bands, equal ratios (the original's seventh, 15 kHz,
#                                                          lies above the 8 kHz that a 16 kHz recording holds)
GUARD = 2048  # zeros after a clip: what rings out of a filter in a circular convolution ends up here


def eq_response(f, gains_db):
    """Gain at frequencies f in Hz: the given dB at EQ_HZ, a straight line in dB over log f between them."""
    return np.exp(np.interp(np.log(f + 1e-3), np.log(EQ_HZ), np.array(gains_db) * math.log(10) / 20))


def band_response(f, low, high):
    """Butterworth, 4th order on both sides, magnitude only: -3 dB at the edges, -24 dB an octave outside."""
    return 1 / np.sqrt((1 + (low / np.maximum(f, 1)) ** 8) * (1 + (f / high) ** 8))


def resample_response(f, rate):
    """Down to `rate` and back loses what lies above rate / 2; resamplers begin to fall 5 % before it."""
    edge = rate / 2
    return np.clip((edge - f) / (0.05 * edge), 0, 1)


@lru_cache
def fast_sizes(limit):
    """All even products of 2, 3, 5, 7 and 11 up to limit, ascending: lengths that an FFT likes."""
    sizes = [2]
    for p in (2, 3, 5, 7, 11):
        for s in sizes:  # grows while it is read
            if s * p <= limit:
                sizes.append(s * p)
    return np.array(sorted(set(sizes)))


def fft_sizes(n, ratio):
    """FFT lengths (N, M): N >= n, and M / N within 1/1000 of ratio: going from one to the other is a rate change."""
    sizes = fast_sizes(1 << max(16, int(4 * n).bit_length()))
    first = np.searchsorted(sizes, n)
    if ratio == 1:
        return sizes[first], sizes[first]
    N = sizes[first:first + 64, None]
    near = np.searchsorted(sizes, N[:, 0] * ratio)
    M = sizes[np.stack([near - 1, near], 1)]
    error = np.abs(M / N / ratio - 1)
    i, j = np.unravel_index(np.argmax(error < 3e-4) if (error < 3e-4).any() else np.argmin(error), error.shape)
    return N[i, 0], M[i, j]


def spectral(wave, ratio=1.0, length=None, responses=(), irs=(), noise=None):
    """Everything linear at once: a rate change (n samples -> n * ratio), noise on top of its result, then responses of
    frequency and impulse responses.

    length: cut the result to it, or fill up with zeros. Filters have no phase, so that nothing moves in time."""
    n, tail = len(wave), max([GUARD, *map(len, irs)])
    N, M = fft_sizes(n + math.ceil(tail / min(ratio, 1)), ratio)
    bins = min(N, M) // 2                                  # Nyquist's own bin is left out
    spectrum = np.fft.rfft(wave, N)[:bins] * np.float32(M / N)
    if noise is not None:
        speech, spectrum = spectrum, np.fft.rfft(noise, M)[:M // 2]
        spectrum[:bins] += speech
    for response in responses:                             # of frequencies in Hz, after the rate change
        spectrum *= response(np.arange(len(spectrum), dtype=np.float32) * np.float32(SAMPLE_RATE / M))
    for ir in irs:
        spectrum *= np.fft.rfft(ir, M)[:len(spectrum)]
    out = np.fft.irfft(spectrum, M)
    length = round(n * M / N) if length is None else length
    return out[:length] if length <= M else np.pad(out, (0, length - M))


# -----------------------------------------------------------------------------
# The rest, one function an effect. Waves are float32 arrays at 16 kHz, of any length from one sample up.

def stretch(wave, factor):
    """WSOLA (Verhelst and Roelands 1993): `factor` times as long, pitch kept -> round(n * factor) samples.

    80 ms frames, half overlapping, are laid out at a new distance; each is taken up to 8 ms beside its place, where it
    best continues the one before. The search runs at 4 kHz and is then refined to a sample."""
    H, D, q = 640, 128, 4                                  # hop = half a frame, reach of the search, decimation
    length = round(len(wave) * factor)
    count = -(-length // H) + 1
    places = np.round(np.arange(count) * (H / factor)).astype(int) + D + q
    start = H + D + q                                      # the first frame is centred on the first sample
    x = np.zeros(max(places[-1] + 3 * H + 2 * D, start + len(wave)), np.float32)
    x[start:start + len(wave)] = wave
    coarse = x[:len(x) // q * q].reshape(-1, q).mean(1)
    starts = [places[0]]
    for place in places[1:].tolist():
        follow = starts[-1] + H                            # where the last frame would go on
        lo = (place - D) // q
        match = np.correlate(coarse[lo:lo + (2 * D + H) // q], coarse[follow // q:follow // q + H // q])
        if match.max() <= 0:                               # silence continues silence anywhere
            starts.append(place)
            continue
        lo = (lo + int(match.argmax())) * q - q
        starts.append(lo + int(np.correlate(x[lo:lo + 2 * q + H], x[follow:follow + H]).argmax()))
    frames = np.lib.stride_tricks.sliding_window_view(x, 2 * H)[starts]               # (count, 2H)
    fade = np.sin(np.pi / (4 * H) * (2 * np.arange(H, dtype=np.float32) + 1)) ** 2    # sums to one with its mirror
    out = frames[1:, :H] * fade + frames[:-1, H:] * fade[::-1]                        # (count - 1, H)
    return out.reshape(-1)[:length]


# Gaussian noise is cut from a tape of a minute: drawing it anew would take as long as an FFT.
TAPE = np.random.default_rng(0).standard_normal(60 * SAMPLE_RATE, np.float32)


def limit(wave):
    """Turned down as a whole if its peak passes 1; nothing is cut."""
    return wave / max(np.float32(1), np.abs(wave).max())


def pick(bank, rng):
    return bank[rng.integers(len(bank))]


def crop(tape, rng, n):
    """n samples from a random place on; a shorter tape starts again."""
    start = rng.integers(max(1, len(tape) - n + 1))
    return tape[start:start + n] if len(tape) >= n else np.resize(tape, n)


def noise_at(noise, power, snr_db):
    """int16 noise -> float32, scaled to lie snr_db below `power`, the speech's mean square."""
    noise = noise.astype(np.float32)
    own = np.mean(np.square(noise))
    return noise * np.float32(math.sqrt(power / own * 10 ** (-snr_db / 10)) if own > 0 else 0)


def estimate_snr(wave):
    """(samples,) at 16 kHz -> speech power over noise power in dB, -10 to 60, as a mix made by noise_at has it.

    The noise is what the quietest twentieth of the 20 ms frames holds, the speech what is left of the mean; digital silence,
    which files are padded with, does not count. White noise mixed in at 0 to 20 dB is read to within 1.5 dB on average;
    without any pause, speech itself passes for noise."""
    frame = SAMPLE_RATE // 50
    power = wave[:max(1, len(wave) // frame) * frame].unfold(0, min(frame, len(wave)), frame).square().mean(1)
    power = power[power > 1e-10]
    if not len(power):
        return -10.0
    noise = power.quantile(0.05).item()
    return min(60.0, max(-10.0, 10 * math.log10(max(power.mean().item() - noise, 1e-12) / max(noise, 1e-12))))


def codec(wave, kbps, kind, rate=SAMPLE_RATE):
    """Through a real encoder and decoder of libsndfile, in memory, at `rate` (8000, 12000 or 16000 Hz) -> the same length,
    not delayed. kind: "mp3" (40 to 160 kbit/s, below 16 kHz 32 to 64) or "opus" (6 to 256); kbps is put into that range."""
    n = len(wave)
    x = np.pad(wave, (0, max(0, SAMPLE_RATE // 10 - n)))   # MP3 wants a few frames at least
    x = limit(spectral(x, rate / SAMPLE_RATE) if rate != SAMPLE_RATE else x)  # Opus would cut what passes full scale
    # MP3 reaches down to 8 kbit/s, but its smallest frames have no room for the note about the encoder's delay.
    least, low, high = (6, 6, 256) if kind == "opus" else (40, 8, 160) if rate >= 16000 else (32, 8, 64)
    settings = dict(format="OGG", subtype="OPUS") if kind == "opus" else dict(
        format="MP3", subtype="MPEG_LAYER_III", bitrate_mode="CONSTANT")
    buffer = io.BytesIO()
    soundfile.write(buffer, x, rate, compression_level=(high - np.clip(kbps, least, high)) / (high - low), **settings)
    buffer.seek(0)
    x, _ = soundfile.read(buffer, dtype="float32")
    if rate != SAMPLE_RATE:
        x = spectral(x, SAMPLE_RATE / rate, n)
    return np.pad(x[:n], (0, max(0, n - len(x))))


def augment(wave, config, rng, noises, rooms):
    """Draw a clip's fate and carry it out: float32 (n,) -> (n,), or about n / speed where the speed changes.

    noises, rooms: banks, see below. Silence stays finite, and the peak never passes 1: a louder result is turned down as a
    whole, never cut."""
    x, ratio, length, noise = np.asarray(wave, np.float32), 1.0, None, None
    if speed := draw(config.speed, rng):
        ratio /= speed[0]
    if pitch := draw(config.pitch, rng):                   # slower at equal pitch, then the rate change that undoes it
        shift, length = 2 ** (pitch[0] / 12), round(len(x) * ratio)
        x, ratio = stretch(x, shift), ratio / shift
    if snr := draw(config.noise, rng):
        power = np.mean(np.square(x))
        for _ in range(1 + extra(config.more_noise, rng)):
            new = noise_at(crop(pick(noises, rng), rng, math.ceil(len(x) * ratio * 1.001)), power, *snr)
            noise = new if noise is None else noise + new
            snr = draw((1, *config.noise[1:]), rng)        # of the next source
        if ratio == 1:                                     # else it waits for the rate change
            x, noise = x + noise[:len(x)], None

    edge, irs, responses = config.codec_rate / 2, [], []   # no frequency above edge outlives the codec
    if draw(config.room, rng) is not None:
        irs = [pick(rooms, rng) for _ in range(1 + extra(config.more_room, rng))]
    if gains := draw(config.eq, rng):
        responses.append(lambda f: eq_response(f, gains))
    if band := draw(config.band_pass, rng):
        responses.append(lambda f: band_response(f, *band))
    if rate := draw(config.resample, rng):
        edge = min(edge, rate[0] / 2)
        responses.append(lambda f: resample_response(f, *rate))
    if phone := draw(config.telephony, rng):
        edge = min(edge, phone[0] / 2, phone[2])
        responses.append(lambda f: resample_response(f, phone[0]) * band_response(f, *phone[1:]))
    if responses or irs or ratio != 1:
        x = spectral(x, ratio, length, responses, irs, noise)

    if gain := draw(config.gain, rng):
        x = x * np.float32(10 ** (gain[0] / 20))
    if std := draw(config.gaussian, rng):
        x = x + np.float32(std[0]) * crop(TAPE, rng, len(x))
    if share := draw(config.clipping, rng):
        top = share[0] * np.abs(x).max()
        x = np.clip(x, -top, top) / np.float32(share[0])
    if kbps := draw(config.codec, rng):                    # at the lowest rate that holds what the line carries
        rate = next(r for r in (8000, 12000, SAMPLE_RATE) if edge <= r / 2)
        x = codec(x, *kbps, "opus" if rng.random() < config.opus else "mp3", rate)
    return limit(x)


def mask(mel, frames, config, rng):
    """SpecAugment (Park et al. 2019) on one window (M, F): bands of mel bins, and stretches of its first `frames` frames
    (those that hold sound), become the mean of those frames."""
    if not (counts := draw(config.mask, rng)) or frames < 1:
        return mel
    # The paper bounds a time mask as a share of the clip too: 100 frames would blot out whole words of a short one.
    widest = config.mask_width[0], min(config.mask_width[1], frames // 10)
    mel, value = mel.clone(), mel[:, :frames].mean()
    for axis, size in enumerate((mel.shape[0], frames)):
        for _ in range(round(counts[axis])):
            width = rng.integers(widest[axis] + 1)
            mel.narrow(axis, rng.integers(size - width + 1), width).fill_(value)
    return mel


class Augmenter:
    """The curriculum over a training set. A clip's fate depends on (seed, epoch, index, recording) and nothing else: not
    on workers, ranks or resumes."""

    def __init__(self, stages, noises, rooms, seed=0):
        self.stages, self.banks, self.seed = sorted(stages, key=lambda s: s.start_epoch), (noises, rooms), seed % 2 ** 32

    def stage(self, epoch):
        """The stage at an epoch; whole numbers are epoch starts."""
        return [s for s in self.stages if s.start_epoch <= epoch][-1]

    def rng(self, epoch, index, purpose):  # 0: touched or not, 1: the mel, 2, 3, ...: recording 0, 1, ...
        return np.random.Generator(np.random.SFC64([self.seed, int(epoch), index, purpose]))

    def touches(self, epoch, index):
        """Does the sound of this sample change at all? If not, what was computed from it before still holds."""
        return self.rng(epoch, index, 0).random() < self.stage(epoch).config.touched

    def wave(self, wave, epoch, index, part):
        """Recording number `part` of sample `index`, a float32 tensor (n,), as this epoch hears it."""
        rng = self.rng(epoch, index, 2 + part)
        return torch.from_numpy(augment(wave.numpy(), self.stage(epoch).config, rng, *self.banks))

    def masked(self, mels, frames, epoch, index):
        """(W, M, F) and each window's frames with sound -> masked, each window on its own. Independent of touches."""
        config, rng = self.stage(epoch).config, self.rng(epoch, index, 1)
        return torch.stack([mask(m, n, config, rng) for m, n in zip(mels, frames)]) if config.mask[0] and frames else mels


# -----------------------------------------------------------------------------
# Banks of noises (a list of int16 arrays) and of rooms (float32): a folder, the hub, or made here

NOISE_DATASET = "Vikhrmodels/Audio_Noise_Dataset"  # splits Musan (noises) and Echo (impulse responses)
BANK_SECONDS, CLIP_SECONDS = 8 * 3600, 10          # in memory at most (int16: 920 MB), and so much of each recording
MADE = 48                                          # noises, or rooms, in a bank that is made here


def as_room(wave):
    """An impulse response from its direct sound on, at most a second, with energy 1: speech is not shifted, and keeps its
    level."""
    ir = wave[np.abs(wave).argmax():][:SAMPLE_RATE]
    return (ir / np.sqrt(np.sum(np.square(ir)))).astype(np.float32)


def make_noises(speech, rng):
    """Coloured noise (power falling as f^0 to f^-2), every other one swelling and fading, and babble of 3 to 7 voices."""
    clips, n = [], CLIP_SECONDS * SAMPLE_RATE
    for i in range(MADE):
        if i % 3 == 0:
            x = sum(np.resize(np.concatenate([speech[j] for j in rng.integers(len(speech), size=9)]).astype(np.float32), n)
                    for _ in range(rng.integers(3, 8)))
        else:
            spectrum = np.fft.rfft(rng.standard_normal(n)) * np.arange(1, n // 2 + 2) ** -rng.uniform(0, 1)
            x = np.fft.irfft(spectrum, n)
        if i % 3 == 2:
            x *= 1.2 + np.sin(2 * np.pi * rng.uniform(0.1, 3) * np.arange(n) / SAMPLE_RATE)
        clips.append((x / np.abs(x).max() * 32767).astype(np.int16))
    return clips


def make_rooms(rng):
    """Polack's model: the direct sound, then noise that decays by 60 dB in 0.15 to 0.8 s, 0 to 10 dB below it in all."""
    clips, t = [], np.arange(SAMPLE_RATE) / SAMPLE_RATE
    for _ in range(MADE):
        tail = rng.standard_normal(len(t)) * 10 ** (-3 * t / rng.uniform(0.15, 0.8)) * (t > rng.uniform(0.002, 0.01))
        tail *= 10 ** (-rng.uniform(0, 10) / 20) / np.sqrt(np.sum(np.square(tail)))
        clips.append(as_room(np.concatenate([[1.0], tail])))
    return clips


def check_source(source):
    """Is there such a source of recordings, as far as a glance tells? Raises UserError."""
    if source not in ("made", "hub") and not os.path.isdir(source):
        raise UserError(f"no folder {source}: give a folder of audio, or hub, or made")


def recordings(source, split):
    """(name, what load_audio takes) of every file in a folder, or every row of the hub's split. Raises UserError."""
    if source != "hub":
        check_source(source)
        kinds = {"." + kind.lower() for kind in soundfile.available_formats()} | {".opus"}
        yield from ((p.name, str(p)) for p in sorted(Path(source).rglob("*")) if p.suffix.lower() in kinds)
        return
    try:
        rows = load_table(Source(NOISE_DATASET, split, answer=""), streaming=True)
        yield from ((f"{split}/{i}", row["audio"]["bytes"]) for i, row in enumerate(rows))
    except Exception as e:  # the hub fails in many ways, and none of them is ours
        raise UserError(f"cannot read {NOISE_DATASET}, split {split} ({type(e).__name__}): give a folder of audio "
                        "instead of hub, or made") from None


def open_bank(source, split, voices="train"):
    """A bank from a folder, from the "hub", or "made", with babble of a split's voices. split: "Musan" for noises, "Echo"
    for rooms. Raises UserError."""
    if source == "made":
        rng = np.random.default_rng([split == "Echo", voices == "train"])
        return make_rooms(rng) if split == "Echo" else make_noises(
            [s.audio[0] for s in embedded("ru", voices, CHUNK)], rng)
    clips, bad, total, samples = [], BadRows(), 0, 0
    for name, audio in recordings(source, split):
        total += 1
        try:
            wave = load_audio(audio, min_seconds=0).numpy()[:CLIP_SECONDS * SAMPLE_RATE]
            clips.append(as_room(wave) if split == "Echo" else (wave * 32767).astype(np.int16))
            samples += len(clips[-1])
        except BadRow as e:
            bad.add(str(e), name)
        if samples > BANK_SECONDS * SAMPLE_RATE:
            print(f"{source}: the first {total} recordings are {BANK_SECONDS // 3600} hours, the rest is left out",
                  file=sys.stderr)
            break
    bad.report(total, source)
    if not clips:
        raise UserError(f"no audio in {source}: give a folder of audio, or hub, or made")
    return clips


def open_banks(noise="made", rooms="made", voices="train"):
    """(noises, rooms), as augment and Augmenter take them."""
    return open_bank(noise, "Musan", voices), open_bank(rooms, "Echo", voices)


# -----------------------------------------------------------------------------
# Listen

def effects():
    """{name: config} with each effect alone, at its own range."""
    ranges = {f.name: f.default for f in fields(AugmentConfig) if f.name in (
        "pitch", "speed", "noise", "room", "eq", "band_pass", "gain", "gaussian", "clipping", "resample", "telephony", "mask")}
    kbps = AugmentConfig.codec[1:]
    return {name: AugmentConfig(**{name: (1, *r[1:])}) for name, r in ranges.items()} | {
        "mp3": AugmentConfig(codec=(1, *kbps), opus=0), "opus": AugmentConfig(codec=(1, *kbps), opus=1)}


def examples():
    """{name: config} of everything there is to hear: each effect, each stage, each split made with effects."""
    return {"before": AugmentConfig()} | effects() | {f"stage_{s.name}": s.config for s in CURRICULUM} | {
        f"split_{name}": config for name, config in HARD.items()}


def plot(mels, path):
    """{name: log-mel (M, F)} -> one picture."""
    rows, columns = -(-len(mels) // 3), 3
    with picture(path, rows, columns, figsize=(15, 1.7 * rows + 1), sharey=True) as (figure, axes):
        for axis in axes.flat[len(mels):]:
            axis.axis("off")
        for axis, (name, mel) in zip(axes.flat, mels.items()):
            axis.imshow(mel.numpy(), origin="lower", aspect="auto", cmap="magma", vmin=-1, vmax=1.5,
                        extent=(0, mel.shape[1] * HOP / SAMPLE_RATE, 0, len(mel)))
            axis.set_title(name, loc="left", fontsize=10)
            axis.set_yticks([])
        figure.supxlabel("seconds")
        figure.supylabel("mel bin")


def main():
    parser = ArgumentParser(prog="augment.py", allow_abbrev=False, description="Hear and see every effect and every stage.")
    parser.add_argument("wav", help="a recording: wav, flac, ogg or mp3")
    parser.add_argument("out", help="folder for the results")
    parser.add_argument("--noise", default="made", help="made, hub, or a folder of audio")
    parser.add_argument("--rooms", default="made", help="impulse responses: made, hub, or a folder of audio")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    check_out(args.out)
    try:
        wave = load_audio(args.wav)
    except BadRow as e:
        raise UserError(f"{args.wav}: {e}; give a wav, flac, ogg or mp3 file with sound in it") from None
    if any(Path(args.out, f"{name}.wav").resolve() == Path(args.wav).resolve() for name in examples()):
        raise UserError(f"{args.out} holds {args.wav} itself, which would be overwritten: give another folder")
    banks = open_banks(args.noise, args.rooms)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    shown, whisper = {}, BorealisConfig()
    for i, (name, config) in enumerate(examples().items()):
        rng = np.random.default_rng([args.seed % 2 ** 32, i])
        x = torch.from_numpy(augment(wave.numpy(), config, rng, *banks))
        replace_file(f"{args.out}/{name}.wav", lambda tmp: soundfile.write(tmp, x.numpy(), SAMPLE_RATE, format="WAV"))
        frames = min(-(-len(x) // HOP), 1000)              # the picture shows the first ten seconds
        mel = log_mel(cut_windows(x, whisper)[:1], whisper)[0]
        shown[name] = mask(mel, frames, config, rng)[:, :frames]
    plot(shown, f"{args.out}/spectrograms.png")
    print(f"wrote {len(shown)} recordings and spectrograms.png to {args.out}")


if __name__ == "__main__":
    run(main)
