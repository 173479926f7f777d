"""support/processing.py -- what users of transformers expect: AutoProcessor and pipeline(). It
travels inside exported folders, beside model.py, and needs nothing but torch and transformers."""
import io
import re
import urllib.request
import wave as riff
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.pipelines.base import ChunkPipeline
import model
from model import AUDIO, HOP, SAMPLE_RATE, as_list

try:  # or transformers would demand them of whoever loads the folder
    import soundfile
    from torchaudio.transforms import Resample
except (ImportError, OSError):
    soundfile = Resample = None
resampler = Resample and lru_cache(maxsize=16)(Resample)  # its kernel takes long to make

KEYS = "audio", "array", "raw", "bytes", "path", "url", "base64", "data", "input_audio", "audio_url"
LANGUAGES, ASKED = ("ru", "en", "russian", "english"), ("language", "prompt", "hotwords")
FRAME = SAMPLE_RATE // 40  # samples; loudness is measured in frames of 25 ms

# ---- Recordings as users have them
def load_audio(source, rate: int = SAMPLE_RATE) -> torch.Tensor:
    """A path, a URL (data: too), a file's bytes, samples (n,), (n, 2) or (2, n) at `rate`, or a
    dict with one, as in chats and datasets -> (samples,) float32, 16 kHz. Raises ValueError."""
    try:
        while isinstance(source, dict):
            rate = source.get("sampling_rate", rate)
            key = next((key for key in KEYS if source.get(key) is not None), "audio")
            source = f"data:;base64,{source[key]}" if key in ("base64", "data") else source.get(key)
        if isinstance(source, (str, Path, bytes)):
            source, rate = decode(source)
        wave = torch.as_tensor(source)
        wave = wave / 32768 if wave.dtype == torch.int16 else wave
        channels = wave.dim() == 2 and min(wave.shape) <= 2
        wave = model.check_wave(wave.mean(int(np.argmin(wave.shape))) if channels else wave)
        return wave if rate == SAMPLE_RATE else model.check_wave(resample(wave, rate))
    except Exception as e:  # it fails in many ways, as files and networks do
        hint = "" if soundfile else "; beyond 16-bit WAV, pip install soundfile torchaudio"
        raise ValueError(f"unusable recording {str(source)[:80]!r}: {e!r}{hint}") from None

def decode(source: str | Path | bytes) -> tuple[np.ndarray, int]:
    """-> (n,) float32, its sample rate; raises whatever goes wrong."""
    if not isinstance(source, bytes):
        online = re.match("(https?|data):", str(source))
        source = urllib.request.urlopen(source).read() if online else Path(source).read_bytes()
    if soundfile:
        samples, rate = soundfile.read(io.BytesIO(source), dtype="float32", always_2d=True)
        return samples.mean(axis=1), rate
    with riff.open(io.BytesIO(source)) as file:
        assert file.getsampwidth() == 2, f"{8 * file.getsampwidth()}-bit WAV"
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32)
        return samples.reshape(-1, file.getnchannels()).mean(axis=1) / 32768, file.getframerate()

def resample(wave: torch.Tensor, rate: int) -> torch.Tensor:  # (n,) at `rate` -> at 16 kHz
    # Odd rates would need huge kernels (15999 Hz: 977 MiB): one in a million is not heard.
    ratio = Fraction(SAMPLE_RATE, int(rate)).limit_denominator(1000)
    if resampler:
        return resampler(ratio.denominator, ratio.numerator)(wave)
    n = max(1, round(len(wave) * ratio))  # or all at once: a spectrum cut off, or filled up
    return torch.fft.irfft(torch.fft.rfft(wave), n) * (n / len(wave))

# ---- Cutting where nobody speaks, and when it was said
def cut_at_pauses(wave: torch.Tensor, longest: int) -> list[torch.Tensor]:
    """(samples,) -> pieces of <= `longest`, each cut at the quietest 0.2 s of its second half."""
    pieces, span = [], SAMPLE_RATE // 5
    while len(wave) > longest:
        end = min(longest, len(wave) - SAMPLE_RATE // 2)  # in a sliver a model would invent words
        start = min(longest // 2, end - span)
        power = wave[start:end].unfold(0, span, HOP).square().mean(1)
        cut = end - span // 2 - HOP * int(power.flip(0).argmin())  # the last of equally quiet ones
        pieces.append(wave[:cut])
        wave = wave[cut:]
    return [*pieces, wave]

def loudness(wave: np.ndarray) -> np.ndarray:  # dB of full scale, one a frame
    frames = wave[:len(wave) // FRAME * FRAME].reshape(-1, FRAME)
    return 10 * np.log10(np.square(frames).mean(1) + 1e-10)

def loud_frames(wave: np.ndarray, levels=None) -> np.ndarray:
    """Numbers of the frames in which somebody speaks, beside the levels (in dB) around them."""
    own = loudness(wave)
    quiet, voice = np.maximum(np.percentile(own if levels is None else levels, (2, 95)), -70)
    return np.flatnonzero(own > quiet + max(9, (voice - quiet) / 3))

def word_times(piece: torch.Tensor, text: str, offset: float = 0.0) -> list[tuple]:
    """(samples,) from `offset` seconds on, and its text -> [(start, end, word)], in seconds."""
    words, loud = text.split(), loud_frames(piece.numpy()) if len(piece) >= FRAME else []
    if not len(loud):
        loud = np.arange(max(1, len(piece) // FRAME))
    edges = np.cumsum([0, *(len(word) + 1 for word in words)])
    at = edges / max(1, edges[-1]) * len(loud)  # in frames of speech
    last = np.minimum(at[:-1].astype(int), len(loud) - 1)
    until = np.maximum(np.ceil(at[1:]).astype(int) - 1, 0)
    seconds = FRAME / SAMPLE_RATE
    starts, ends = (loud[last] + at[:-1] - last), (loud[until] + at[1:] - until)
    return [(round(offset + start * seconds, 3), round(offset + end * seconds, 3), word)
            for start, end, word in zip(starts, ends, words, strict=True)]

# ---- Chats in, what generate() takes out
class BorealisProcessor(ProcessorMixin):
    """Chats with recordings -> input_ids (B, L), padded on the left, attention_mask (B, L), and
    input_features (W, M, F) of all their windows. facts: what it needs of a BorealisConfig."""
    def __init__(self, feature_extractor, tokenizer, chat_template=None, facts=None):
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)
        self.facts, self.config = facts, model.BorealisConfig(**facts)
    def __call__(self, text, audio=None, sampling_rate=SAMPLE_RATE, **_):
        """Rendered chats, and recordings for their AUDIO, in reading order. Raises ValueError."""
        texts, sounds = as_list(text), sum(map(as_list, as_list(audio)), [])
        if (n := "".join(texts).count(AUDIO)) != len(sounds):
            raise ValueError(f"{n} {AUDIO} placeholders for {len(sounds)} recordings")
        waves = [load_audio(sound, sampling_rate) for sound in sounds]
        cut = [model.cut_windows(wave, self.config) for wave in waves]
        counts = map(len, cut)
        rows = [sum(model.fill_slots(ids, self.config, counts), [])
                for ids in self.tokenizer(texts, add_special_tokens=False).input_ids]
        ids = self.tokenizer.pad(dict(input_ids=rows), padding_side="left", return_tensors="pt")
        mels = dict(input_features=model.log_mel(sum(cut, []), self.config)) if cut else {}
        return BatchFeature({**ids, **mels})
    def apply_chat_template(self, conversation, tokenize=False, return_dict=False, **settings):
        """A conversation or a list of them; {"type": "audio"} parts are load_audio()'s. -> text, or
        ids, or all of __call__. By default it ends where the answer starts, if one is due."""
        several = isinstance(conversation[0], (list, tuple))
        texts, sounds = [], []
        for chat in conversation if several else [conversation]:
            asks = settings.get("add_generation_prompt", chat[-1]["role"] != "assistant")
            texts.append(self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=asks))
            for message in chat:
                parts = [] if isinstance(message["content"], str) else message["content"]
                sounds += [part for part in parts if part["type"] != "text"]
        if not tokenize:
            return texts if several else texts[0]
        inputs = self(texts, sounds, **settings)
        return inputs if return_dict else inputs["input_ids"]
    def apply_transcription_request(self, audio, language=None, prompt=None, hotwords=None, **more):
        """A recording or a list of them, as in training. language, or a list: ru, en, or in words;
        the same prompt for both. prompt, hotwords: words that may be said, separated by commas."""
        if wrong := {str(name).lower() for name in as_list(language) if name} - {*LANGUAGES}:
            raise ValueError(f"language {wrong.pop()!r}: choose from {', '.join(LANGUAGES)}")
        words = map(str.strip, ",".join(as_list(prompt) + as_list(hotwords)).split(","))
        system = model.with_context(model.ASR_SYSTEM, [*filter(None, words)])
        chat = [dict(role="system", content=system), dict(role="user", content=model.ASR_PROMPT)]
        texts = self.apply_chat_template([chat] * len(as_list(audio)))
        return self(texts, audio, **more)

class BorealisPipeline(ChunkPipeline):
    """pipeline("automatic-speech-recognition"): recordings of any length, see load_audio() -> text,
    and, with return_timestamps, chunks, one for each piece between two pauses."""
    _load_processor = True
    def _sanitize_parameters(self, return_timestamps=None, generate_kwargs=None, **settings):
        if return_timestamps not in (None, False, True, "segment"):
            raise ValueError(f"return_timestamps={return_timestamps!r}: only segments have times")
        settings |= generate_kwargs or {}
        asked = {key: settings.pop(key) for key in ASKED if key in settings}
        return asked, settings, {} if return_timestamps is None else dict(times=return_timestamps)
    def preprocess(self, source, **asked):
        at, pieces = 0, cut_at_pauses(load_audio(source), self.processor.config.window_samples)
        for i, piece in enumerate(pieces, 1):
            (start, end, _), = word_times(piece, "-", at / SAMPLE_RATE)  # as if all were one word
            inputs = self.processor.apply_transcription_request(piece, **asked)
            limit = model.speech_limit(len(piece))
            yield {**inputs, "limits": limit, "times": (start, end), "is_last": i == len(pieces)}
            at += len(piece)
    def _forward(self, inputs, **settings):
        kept = {key: inputs.pop(key) for key in ("times", "is_last")}
        settings["limits"] = np.ravel(inputs.pop("limits")).tolist()  # batched, or one
        ids = self.model.generate(**inputs, **settings)
        return dict(ids=ids[:, inputs["input_ids"].shape[1]:], **kept)
    def postprocess(self, pieces, times=False):
        texts = [self.model.decode(piece["ids"][0]) for piece in pieces]
        chunks = [dict(timestamp=piece["times"], text=text)
                  for piece, text in zip(pieces, texts, strict=True) if text]
        whole = dict(text=" ".join(filter(None, texts)))
        return whole | dict(chunks=chunks) if times else whole
