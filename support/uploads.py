"""
support/uploads.py -- what clients of serve_vllm.py send: files in chat messages, links, uploads.

Decoder and resampler are those of training, in vLLM's place. Whatever is wrong with a recording is
a ValueError, which vLLM answers with 400; any other exception would be a 500.
"""
import io
import json
import os
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile
import torch
from fastapi import Form, Request
from fastapi.responses import PlainTextResponse
from vllm.entrypoints.speech_to_text.base import serving
from vllm.entrypoints.speech_to_text.transcription import api_router
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, audio

from model import SAMPLE_RATE
from support.cli import UserError
from support.rows import MIN_SECONDS, BadRow, load_audio

LIMIT = "BOREALIS_MAX_AUDIO_SECONDS"  # in the environment, which reaches all of vLLM's processes
AUDIO_FILES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
os.environ.setdefault("VLLM_AUDIO_FETCH_TIMEOUT", "30")  # seconds
os.environ.setdefault("VLLM_MEDIA_CONNECTOR", "borealis")  # Recordings, below
os.environ.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")  # an allowed host may name any other


def max_audio_seconds() -> float:
    """Of one recording; --max_audio_seconds."""
    return float(os.environ.get(LIMIT, 600))


def decode(data: bytes) -> np.ndarray:
    """A file's bytes -> (samples,) float32 at 16 kHz. Raises ValueError."""
    try:
        info = soundfile.info(io.BytesIO(data))  # what is too long is not decoded
        if info.frames * info.channels > 96_000 * max(600, max_audio_seconds()):  # 48 kHz stereo
            raise ValueError(f"the recording is too large ({info.channels} channels at "
                             f"{info.samplerate} Hz), or its header does not say how long it is")
        if not MIN_SECONDS <= info.duration <= max_audio_seconds():
            raise ValueError(f"the recording has {info.duration:.2f} s: send {MIN_SECONDS} s to "
                             f"{max_audio_seconds():g} s (--max_audio_seconds)")
        return load_audio(data, silence=True).numpy()
    except soundfile.LibsndfileError:
        raise ValueError("not audio: send wav, flac, ogg or mp3") from None
    except BadRow as e:
        raise ValueError(f"the recording is unusable: {e}") from None


def read_recording(path: str | Path) -> torch.Tensor:
    """A file -> (samples,) float32 at 16 kHz. Raises ValueError."""
    try:
        return torch.from_numpy(decode(Path(path).read_bytes()))
    except OSError as e:
        raise ValueError(e.strerror or str(e)) from None


def find_recordings(places: list[str]) -> list[Path]:
    """Files, and folders of files -> files. Raises UserError."""
    files = []
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"no file or folder at {place}")
        inside = [p for p in place.rglob("*") if p.suffix.lower() in AUDIO_FILES]
        files += sorted(inside) if place.is_dir() else [place]
    if not files:
        raise UserError(f"no recordings in {' '.join(places)}: give {', '.join(AUDIO_FILES)} "
                        "files, or folders of them")
    return files


def load_audio_for_vllm(file, **_) -> tuple[np.ndarray, int]:
    return decode(file.read_bytes() if isinstance(file, Path) else file.read()), SAMPLE_RATE


audio.load_audio = load_audio_for_vllm    # in chat messages
serving.load_audio = load_audio_for_vllm  # in /v1/audio/transcriptions


@MEDIA_CONNECTOR_REGISTRY.register("borealis")
class Recordings(MediaConnector):
    """data: URLs, and http from --allowed-media-domains. Without that flag vLLM's own connector
    would fetch from anywhere."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.allowed_media_domains = self.allowed_media_domains or ["data-urls-only.invalid"]

    async def load_from_url_async(self, *args, **kwargs):
        try:
            return await super().load_from_url_async(*args, **kwargs)
        except ValueError:
            raise
        except Exception as e:  # file://, an unreachable host, ...
            raise ValueError(f"cannot fetch the recording: {type(e).__name__}: {e}") from None


api_router.router.routes.clear()


@api_router.router.post("/v1/audio/transcriptions")
async def transcriptions(raw_request: Request,
                         request: Annotated[api_router.TranscriptionRequest, Form()]):
    """vLLM's route, but response_format=text is plain text: vLLM 0.32 answers with JSON."""
    answer = await api_router.create_transcriptions(raw_request=raw_request, request=request)
    if request.response_format != "text" or request.stream:
        return answer
    if not answer or answer.status_code != 200:  # none: the client has left
        return answer
    return PlainTextResponse(json.loads(answer.body)["text"] + "\n", background=answer.background)
