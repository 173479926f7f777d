"""support/uploads.py -- what clients of serve_vllm.py send. A ValueError is a 400."""
import asyncio
import json
import math
import os
import threading
import time
import zlib
from itertools import starmap
from pathlib import Path
from typing import Annotated
import msgspec
import numpy as np
import torch
from fastapi import Form, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import ValidationError
from vllm.entrypoints.serve.exception_handling.handlers import exception, vllm_error
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.entrypoints.speech_to_text.base.utils import read_upload_with_limit
from vllm.entrypoints.speech_to_text.transcription import api_router
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, audio
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.engine.async_llm import AsyncLLM
import model
from data import TRANSCRIBE
from model import SAMPLE_RATE
from support import cli, context, engine, pauses, recipes, rows

# In the environment, which reaches all of vLLM's processes. GUARD "0": off
LIMIT, GUARD = "BOREALIS_MAX_AUDIO_SECONDS", "BOREALIS_LOOP_GUARD"
os.environ.update(recipes.TABLES["vllm_uploads"] | os.environ)
AT_ONCE = threading.Semaphore(2)  # recordings decoded: a tiny file may take a gigabyte
SLIPS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, UnicodeError,
         ValidationError)

# ---- All routes: what vLLM would trip over is refused, and no reason shows its code
async def parse(self):  # Request.json, but strict: no half characters, no NaN, no 1e400
    if (body := await self.body()).count(b",") > 100_000:  # messages, parts, prompts
        raise HTTPException(400, "more than 100,000 values")
    try:
        return msgspec.json.decode(body)
    except (ValueError, RecursionError) as e:
        raise HTTPException(400, f"unusable JSON: {e}") from None

def refuse(error: Exception):  # -> vLLM's ErrorResponse
    slip = isinstance(error.__cause__ or error, SLIPS)
    return plain_refuse("a field is of a wrong type or out of range" if slip else error)

Request.json, plain_refuse = parse, exception.create_error_response
exception.create_error_response = vllm_error.create_error_response = refuse

def decode(data: bytes) -> torch.Tensor:  # (samples,) float32 at 16 kHz, or ValueError
    with AT_ONCE:
        return rows.load_audio(data, silence=True, max_seconds=float(os.environ[LIMIT]))

def load_audio_for_vllm(file, **_) -> tuple[np.ndarray, int]:
    return decode(file.read_bytes() if isinstance(file, Path) else file.read()).numpy(), SAMPLE_RATE

audio.load_audio = load_audio_for_vllm

@MEDIA_CONNECTOR_REGISTRY.register("borealis")
class Recordings(MediaConnector):
    """data: URLs, http only from --allowed-media-domains: vLLM's own would fetch from anywhere."""
    async def load_from_url_async(self, *args, **kwargs):
        self.allowed_media_domains = self.allowed_media_domains or ["none: send data: URLs"]
        try:
            return await super().load_from_url_async(*args, **kwargs)
        except Exception as e:  # not audio, file://, an unreachable host, ...
            raise ValueError(f"unusable recording: {cli.first_line(e)}") from None

# ---- The loop guard of model.py, over all routes; repeats that were streamed cannot be taken back
async def generate(self, prompt, sampling_params, *args, limit: int | None = None, **kwargs):
    """AsyncLLM's. limit: of the tokens in an answer, see model.guard()."""
    on = os.environ[GUARD] != "0" and isinstance(sampling_params, SamplingParams)
    if len(repr(getattr(sampling_params, "structured_outputs", None))) > 3000:
        raise ValueError("a grammar, regex or schema of more than 3000 characters")  # costs n^3
    params = engine.guarded(sampling_params, limit) if on else sampling_params
    whole = on and params.output_kind != RequestOutputKind.DELTA
    ends = ("repetition", "length") if limit else ("repetition",)
    tokenizer = cached_tokenizer_from_config(self.model_config)
    async for output in plain_generate(self, prompt, params, *args, **kwargs):
        for said in output.outputs:
            if said.finish_reason == "error" and params.structured_outputs:
                raise ValueError("the grammar, regex or schema cannot be followed")
            if said.finish_reason == "error":  # no words, but not because nobody speaks
                raise RuntimeError("the engine fails at this request: send it again")
            if whole and said.finish_reason in ends:
                said.token_ids = model.guard([*said.token_ids], limit)
                said.text = tokenizer.decode(said.token_ids, skip_special_tokens=True)
                said.logprobs = said.logprobs and said.logprobs[:len(said.token_ids)]
        yield output

plain_generate, AsyncLLM.generate = AsyncLLM.generate, generate

# ---- Transcripts
async def ask(server, wave: torch.Tensor, params, name: str, lora=None, sample=TRANSCRIBE):
    """One fresh request: the transcription prompt with this wave -> vLLM's RequestOutputs."""
    tokenizer = cached_tokenizer_from_config(server.model_config)
    prompt = parse_model_prompt(server.model_config, engine.prompt(tokenizer, [wave], sample))
    inputs = await server.renderer.render_cmpl_async([prompt])
    return server.engine_client.generate(inputs[0], params, name, lora_request=lora,
                                         limit=model.speech_limit(len(wave)))

async def answer(*request):  # the last of them
    return [output async for output in await ask(*request)][-1]

async def events(server, form, name: str, asked: list):
    """Texts as they are decoded, one piece after the other, in vLLM's server-sent events."""
    about = dict(id=name, object="transcription.chunk", created=int(time.time()), model=form.model)
    try:
        for request in asked:
            async for output in await ask(*request):
                said = output.outputs[0]
                text = said.text + " " * bool(said.finish_reason)  # the next piece follows
                choice = dict(delta=dict(content=text), finish_reason=said.finish_reason)
                yield f"data: {json.dumps(about | dict(choices=[choice]))}\n\n"
    except Exception as e:
        yield f"data: {server.create_streaming_error_response(e)}\n\n"
    yield "data: [DONE]\n\n"

api_router.router.routes.clear()  # vLLM's knows no times
@api_router.router.post("/v1/audio/transcriptions")
@with_cancellation
async def transcribe(raw_request: Request,
                     request: Annotated[api_router.TranscriptionRequest, Form()]) -> Response:
    """Each piece between two pauses is a request, and in verbose_json, srt and vtt a segment."""
    server, form = raw_request.app.state.openai_serving_transcription, request
    timed = form.response_format not in ("json", "text")
    if form.use_beam_search or "word" in form.timestamp_granularities or timed and form.stream:
        raise ValueError("no beam search; times of segments only, and none of what is streamed")
    if form.language not in (None, *server.model_cls.supported_languages):
        raise ValueError(f"language {form.language!r}: choose from ru, en")
    words = ", ".join(filter(None, (form.prompt, form.hotwords)))
    sample, lora = context.tell(TRANSCRIBE, context.parse(words)), server._maybe_get_adapters(form)
    wave = await asyncio.to_thread(decode, await read_upload_with_limit(form.file))
    config, name = server.model_config, f"transcribe-{server._base_request_id(raw_request)}"
    pieces = pauses.cut_at_pauses(wave, config.hf_config.window_samples)
    params = form.to_sampling_params(form.max_completion_tokens or config.max_model_len)
    params.logprobs = 1
    asked = [(server, piece, params, f"{name}-{i}", lora, sample) for i, piece in enumerate(pieces)]
    if form.stream:
        return StreamingResponse(events(server, form, name, asked), media_type="text/event-stream")
    answers = [output.outputs[0] for output in await asyncio.gather(*starmap(answer, asked))]
    segments, seconds = pauses.timed(pieces, [said.text for said in answers])
    body = pauses.to_json(segments, seconds)
    if form.response_format in ("text", "srt", "vtt"):
        write = dict(pauses.FORMATS, text=lambda *_: body["text"] + "\n")[form.response_format]
        return PlainTextResponse(write(segments, seconds))
    spoken = (said for said in answers if pauses.without_thoughts(said.text))  # others: no segment
    for said, segment in zip(spoken, body["segments"], strict=True):
        data, steps = said.text.encode(), zip(said.logprobs, said.token_ids, strict=True)
        segment |= dict(  # what else OpenAI's clients expect; the last is Whisper's alone
            seek=int(segment["start"]), tokens=[*said.token_ids], temperature=form.temperature,
            avg_logprob=np.mean([step[i].logprob for step, i in steps]).item(),
            compression_ratio=len(data) / len(zlib.compress(data)), no_speech_prob=None)
    body = body if form.response_format == "verbose_json" else dict(text=body["text"])
    return JSONResponse(body | dict(usage=dict(type="duration", seconds=math.ceil(seconds))))
