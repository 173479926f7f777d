"""support/uploads.py -- what clients of serve_vllm.py send. A ValueError is a 400."""
import asyncio
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
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.engine.async_llm import AsyncLLM
import model
from data import TRANSCRIBE, Sample
from model import SAMPLE_RATE
from support import context, engine, pauses, processing, rows
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

# ---- The loop guard of model.py, over all routes; repeats that were streamed cannot be taken back
GUARD = "BOREALIS_LOOP_GUARD"  # in the environment, 0: off

def cut_back(said, limit: int | None, tokenizer) -> None:  # said: vLLM's CompletionOutput
    kept = model.guard([*said.token_ids], limit)
    if len(kept) < len(said.token_ids):
        said.token_ids, said.text = kept, tokenizer.decode(kept, skip_special_tokens=True)
        said.logprobs = said.logprobs and said.logprobs[:len(kept)]

async def generate(self, prompt, sampling_params, *args, **kwargs):
    on = os.environ[GUARD] != "0" and isinstance(sampling_params, SamplingParams)
    params = engine.guarded(sampling_params) if on else sampling_params
    async for output in plain_generate(self, prompt, params, *args, **kwargs):
        for said in output.outputs:
            if said.finish_reason == "repetition" and params.output_kind != RequestOutputKind.DELTA:
                cut_back(said, None, cached_tokenizer_from_config(self.model_config))
        yield output

plain_generate, AsyncLLM.generate = AsyncLLM.generate, generate

# ---- Transcripts
def asked(*lists: str | None) -> Sample:  # the transcription prompt; prompt and hotwords of a form
    return context.tell(TRANSCRIBE, context.parse(", ".join(filter(None, lists))))

async def answer(server, wave: torch.Tensor, params, name: str, lora=None, sample=TRANSCRIBE):
    """One fresh request: the transcription prompt with this wave -> vLLM's RequestOutput."""
    config, limit = server.model_config, model.speech_limit(len(wave))
    tokenizer, on = cached_tokenizer_from_config(config), os.environ[GUARD] != "0"
    prompt = parse_model_prompt(config, engine.prompt(tokenizer, [wave], sample))
    inputs = await server.renderer.render_cmpl_async([prompt])
    params = engine.guarded(params, limit) if on else params
    async for output in server.engine_client.generate(inputs[0], params, name, lora_request=lora):
        last = output
    if on and last.outputs[0].finish_reason == "length":
        cut_back(last.outputs[0], limit, tokenizer)
    return last

@with_cancellation
async def transcribe(raw_request: Request, request) -> Response:
    """Each piece between two pauses is a request, and in verbose_json, srt and vtt a segment."""
    server, form = raw_request.app.state.openai_serving_transcription, request
    if "word" in form.timestamp_granularities:
        raise ValueError("times are told of segments only: no word granularity")
    if error := await server._check_model(form):
        return JSONResponse(error.model_dump(), error.error.code)
    server.model_cls.validate_language(form.language)
    lora = server._maybe_get_adapters(form)
    wave = await asyncio.to_thread(decode, await read_upload_with_limit(form.file))
    pieces = pauses.cut_at_pauses(wave, server.model_config.hf_config.window_samples)
    most = form.max_completion_tokens or server.model_config.max_model_len
    params = form.to_sampling_params(most)
    params.logprobs, name = 1, f"transcribe-{server._base_request_id(raw_request)}"
    sample = asked(form.prompt, form.hotwords)
    outputs = await asyncio.gather(*(answer(server, piece, params, f"{name}-{i}", lora, sample)
                                     for i, piece in enumerate(pieces)))
    texts = [pauses.without_thoughts(output.outputs[0].text) for output in outputs]
    segments, facts, at = [], [], 0.0
    for piece, output, text in zip(pieces, outputs, texts, strict=True):
        said = output.outputs[0]
        if words := processing.word_times(piece, text, at):
            data, n = said.text.encode(), len(said.token_ids)
            segments.append(words)
            facts.append(dict(  # what else OpenAI's clients expect; the last is Whisper's alone
                seek=int(at), tokens=[*said.token_ids], temperature=form.temperature,
                avg_logprob=said.cumulative_logprob / n,
                compression_ratio=len(data) / len(zlib.compress(data)), no_speech_prob=None))
        at += len(piece) / SAMPLE_RATE
    text, body = " ".join(filter(None, texts)), pauses.to_json(segments, at)
    if form.response_format not in ("json", "verbose_json"):
        make = dict(pauses.FORMATS, text=lambda *_: text + "\n")[form.response_format]
        return PlainTextResponse(make(segments, at))
    body["segments"] = [a | b for a, b in zip(body["segments"], facts, strict=True)]
    body = body if form.response_format == "verbose_json" else dict(text=text)
    return JSONResponse(body | dict(usage=dict(type="duration", seconds=math.ceil(at))))

api_router.router.routes.clear()
@api_router.router.post("/v1/audio/transcriptions")
async def transcriptions(raw: Request, form: Annotated[api_router.TranscriptionRequest, Form()]):
    """vLLM's route has no times; it is left what is streamed, and beam search."""
    if not form.stream and not form.use_beam_search:
        return await transcribe(raw_request=raw, request=form)
    if form.response_format not in ("json", "text"):
        raise ValueError("times are not streamed: ask without stream")
    if os.environ[GUARD] != "0":  # of a whole window
        config = raw.app.state.openai_serving_transcription.model_config.hf_config
        limit = model.speech_limit(config.window_samples)
        form.max_completion_tokens = min(form.max_completion_tokens or limit, limit)
    return await api_router.create_transcriptions(raw_request=raw, request=form)
