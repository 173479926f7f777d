"""support/uploads.py -- what clients of serve_vllm.py send. A ValueError is a 400."""
import asyncio
import json
import math
import os
import zlib
from pathlib import Path
from typing import Annotated
import numpy as np
import torch
from fastapi import Form, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.entrypoints.speech_to_text.base import serving
from vllm.entrypoints.speech_to_text.base.utils import read_upload_with_limit
from vllm.entrypoints.speech_to_text.transcription import api_router
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, audio
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.tokenizers import cached_tokenizer_from_config
from model import SAMPLE_RATE
from support import engine, pauses, processing, rows
from support.recipes import TABLES

LIMIT = "BOREALIS_MAX_AUDIO_SECONDS"  # in the environment, which reaches all of vLLM's processes
os.environ.update(TABLES["vllm_uploads"] | os.environ)

def decode(data: bytes) -> torch.Tensor:  # (samples,) float32 at 16 kHz, or ValueError
    return rows.load_audio(data, silence=True, max_seconds=float(os.environ[LIMIT]))

def load_audio_for_vllm(file, **_) -> tuple[np.ndarray, int]:
    return decode(file.read_bytes() if isinstance(file, Path) else file.read()).numpy(), SAMPLE_RATE

def split_audio_for_vllm(audio_data, sample_rate, max_clip_duration_s, **_) -> list[np.ndarray]:
    longest = int(max_clip_duration_s * sample_rate)
    return [p.numpy() for p in pauses.cut_at_pauses(torch.from_numpy(audio_data), longest)]

audio.load_audio = serving.load_audio = load_audio_for_vllm  # in messages; in transcriptions
serving.split_audio = split_audio_for_vllm  # as --transcribe cuts, so that all texts are the same

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

async def answer(server, wave: torch.Tensor, params, name: str):
    """One fresh request: the transcription prompt with this wave -> vLLM's RequestOutput."""
    config = server.model_config
    prompt = engine.prompt(cached_tokenizer_from_config(config), [wave])
    inputs = await server.renderer.render_cmpl_async([parse_model_prompt(config, prompt)])
    async for output in server.engine_client.generate(inputs[0], params, name):
        last = output
    return last

@with_cancellation
async def with_times(raw_request: Request, request) -> Response:
    """verbose_json, srt and vtt: each piece between two pauses is a request, and a segment."""
    server, form = raw_request.app.state.openai_serving_transcription, request
    if form.stream or "word" in form.timestamp_granularities:
        raise ValueError("times are told of segments only: no stream, no word granularity")
    if error := await server._check_model(form):
        return JSONResponse(error.model_dump(), error.error.code)
    server.model_cls.validate_language(form.language)
    wave = await asyncio.to_thread(decode, await read_upload_with_limit(form.file))
    pieces = pauses.cut_at_pauses(wave, server.model_config.hf_config.window_samples)
    most = form.max_completion_tokens or server.model_config.max_model_len
    params = form.to_sampling_params(most)
    params.logprobs, name = 1, f"transcribe-{server._base_request_id(raw_request)}"
    outputs = await asyncio.gather(
        *(answer(server, piece, params, f"{name}-{i}") for i, piece in enumerate(pieces)))
    segments, facts, at = [], [], 0.0
    for piece, output in zip(pieces, outputs, strict=True):
        said = output.outputs[0]
        if words := processing.word_times(piece, pauses.without_thoughts(said.text), at):
            data, n = said.text.encode(), len(said.token_ids)
            segments.append(words)
            facts.append(dict(  # what else OpenAI's clients expect; the last is Whisper's alone
                seek=int(at), tokens=[*said.token_ids], temperature=form.temperature,
                avg_logprob=said.cumulative_logprob / n,
                compression_ratio=len(data) / len(zlib.compress(data)), no_speech_prob=None))
        at += len(piece) / SAMPLE_RATE
    if form.response_format != "verbose_json":
        return PlainTextResponse(pauses.FORMATS[form.response_format](segments, at))
    body = pauses.to_json(segments, at)
    body["segments"] = [a | b for a, b in zip(body["segments"], facts, strict=True)]
    return JSONResponse(body | dict(usage=dict(type="duration", seconds=math.ceil(at))))

api_router.router.routes.clear()
@api_router.router.post("/v1/audio/transcriptions")
async def transcriptions(raw: Request, form: Annotated[api_router.TranscriptionRequest, Form()]):
    """vLLM's route; it has no times, and where plain text is asked for, it answers with JSON."""
    if form.response_format in ("verbose_json", "srt", "vtt"):
        return await with_times(raw_request=raw, request=form)
    answer = await api_router.create_transcriptions(raw_request=raw, request=form)
    plain = form.response_format == "text" and not form.stream
    if not plain or not answer or answer.status_code != 200:  # no answer: the client has left
        return answer
    return PlainTextResponse(json.loads(answer.body)["text"] + "\n", background=answer.background)
