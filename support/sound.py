"""support/sound.py -- signal processing under augment.py. Waves: float32, 16 kHz, any length."""
import io
import math
import numpy as np
import soundfile
import torch
from model import SAMPLE_RATE
from support import cli, processing, recipes

GUARD = 2048  # zeros after a clip: what a filter rings on lands here, not at the clip's start

# Having freed a block of 31 MiB, glibc keeps what it has: page faults cost more than the FFT.
np.empty(31 << 20, np.uint8)

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

def plot_mels(mels: dict, path: str) -> None:  # {name: log-mel (M, F)} -> a small picture
    rows = math.ceil(len(mels) / 3)
    with cli.picture(path, rows, 3, dpi=80, figsize=(9, 0.9 * rows)) as (_, axes):
        for axis in axes.flat:
            axis.axis("off")
        for axis, (name, mel) in zip(axes.flat, mels.items(), strict=False):
            axis.imshow(mel.numpy().round(1), "magma", aspect="auto", interpolation="nearest",
                        origin="lower", vmin=-1, vmax=1.5)  # rounded, the file is small
            axis.set_title(name, loc="left", fontsize=9, pad=2)
