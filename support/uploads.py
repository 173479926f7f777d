"""support/uploads.py -- what clients of serve_vllm.py send. A ValueError is a 400."""
import json
import os
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from fastapi import Form, Request
from fastapi.responses import PlainTextResponse
from vllm.entrypoints.speech_to_text.base import serving
from vllm.entrypoints.speech_to_text.transcription import api_router
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, audio

from model import SAMPLE_RATE
from support import pauses, rows
from support.cli import UserError, as_user_error
from support.recipes import TABLES

LIMIT = "BOREALIS_MAX_AUDIO_SECONDS"  # in the environment, which reaches all of vLLM's processes
AUDIO_FILES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
os.environ.update(TABLES["vllm_uploads"] | os.environ)

def decode(data: bytes) -> torch.Tensor:  # (samples,) float32 at 16 kHz, or ValueError
    return rows.load_audio(data, silence=True, max_seconds=float(os.environ[LIMIT]))

def listen(source: str):
    """A file, or "-": raw PCM on standard input -> arrays as they come in. UserError at once."""
    with as_user_error(f"--live {source}: ", ValueError, OSError):
        if source == "-":  # Python cannot exit while a thread reads sys.stdin
            return pauses.from_pcm(open(0, "rb", closefd=False))
        return pauses.in_real_time(decode(Path(source).read_bytes()))

def find_recordings(places: list[str]) -> list[Path]:  # in folders, too; or UserError
    files = []
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"no file or folder at {place}")
        inside = sorted(p for p in place.rglob("*") if p.suffix.lower() in AUDIO_FILES)
        files += inside if place.is_dir() else [place]
    if not files:
        raise UserError(f"no {', '.join(AUDIO_FILES)} files in {' '.join(places)}")
    return files

def load_audio_for_vllm(file, **_) -> tuple[np.ndarray, int]:
    return decode(file.read_bytes() if isinstance(file, Path) else file.read()).numpy(), SAMPLE_RATE

audio.load_audio = serving.load_audio = load_audio_for_vllm  # in messages; in transcriptions

@MEDIA_CONNECTOR_REGISTRY.register("borealis")
class Recordings(MediaConnector):
    """data: URLs, http only from --allowed-media-domains: vLLM's own would fetch from anywhere."""
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
async def transcriptions(raw: Request, form: Annotated[api_router.TranscriptionRequest, Form()]):
    """vLLM's route, but response_format=text is plain text: vLLM 0.32 answers with JSON."""
    answer = await api_router.create_transcriptions(raw_request=raw, request=form)
    plain = form.response_format == "text" and not form.stream
    if not plain or not answer or answer.status_code != 200:  # no answer: the client has left
        return answer
    return PlainTextResponse(json.loads(answer.body)["text"] + "\n", background=answer.background)
