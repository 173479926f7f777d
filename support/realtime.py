"""support/realtime.py -- words as they are said, over a websocket: vLLM's /v1/realtime with its
events, but each phrase is a fresh request. vLLM's own session keeps what was said in the prompt: a
model of single turns would repeat it, and slow down by the minute (vllm issues 51374, 58324)."""
import asyncio
from contextlib import suppress
from uuid import uuid4

import numpy as np
import torch
from fastapi import WebSocket
from vllm import SamplingParams
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.entrypoints.speech_to_text.realtime import connection, protocol
from vllm.entrypoints.speech_to_text.transcription.api_router import router
from vllm.sampling_params import RequestOutputKind

from support import pauses, uploads
from support.cli import first_line

GREEDY = dict(temperature=0, max_tokens=256, output_kind=RequestOutputKind.FINAL_ONLY)
AHEAD = 1000  # pieces of sound that may wait; who sends more is read no faster than heard

class Connection(connection.RealtimeConnection):
    """vLLM's, which reads the events into a queue; all that is ours is what becomes of them."""
    async def handle_event(self, event) -> None:
        if not isinstance(event, dict):
            return await self.send_error("an event is a JSON object", "invalid_event")
        if self.audio_queue.qsize() >= AHEAD and not self.generation_task:
            return await self.send_error("audio waits for a first commit", "invalid_event")
        await super().handle_event(event)
        while self.audio_queue.qsize() >= AHEAD and not self.generation_task.done():
            await asyncio.sleep(0.05)

    async def start_generation(self) -> None:
        if self.generation_task is None or self.generation_task.done():
            self.generation_task = asyncio.create_task(self.transcribe())

    async def pieces(self):
        """Samples, a PIECE at a time, then the rest; do more wait already? Are these the last?"""
        rest = np.zeros(0, np.float32)
        while (chunk := await self.audio_queue.get()) is not None:
            rest = np.concatenate([rest, chunk])
            while len(rest) >= pauses.PIECE:
                piece, rest = np.split(rest, [pauses.PIECE])
                more = len(rest) >= pauses.PIECE or not self.audio_queue.empty()
                yield piece, more, False
        yield rest, False, True

    async def transcribe(self) -> None:
        window = self.serving.model_config.hf_config.window_samples
        phrases, params = pauses.Phrases(window), SamplingParams(**GREEDY)
        text, usage = "", UsageInfo()
        async def decode(n, over=False):  # the first n samples of the phrase
            nonlocal text
            wave, name = torch.from_numpy(phrases.phrase[:n]), f"{self.connection_id}-{uuid4()}"
            output = await uploads.answer(self.serving, wave, params, name)
            said = output.outputs[0]
            usage.prompt_tokens += len(output.prompt_token_ids)
            usage.completion_tokens += len(said.token_ids)
            if new := phrases.take(pauses.without_thoughts(said.text), n, over):
                text += new
                await self.send(protocol.TranscriptionDelta(delta=new))
        try:
            async for piece, more, last in self.pieces():
                phrases.add(piece)
                while end := phrases.find_end(last):
                    await decode(end, over=True)
                if phrases.due() and not more:
                    await decode(len(phrases.phrase))
            usage.total_tokens = usage.prompt_tokens + usage.completion_tokens
            await self.send(protocol.TranscriptionDone(text=text, usage=usage))
        except Exception as e:
            connection.logger.exception("a live session ends")
            with suppress(Exception):  # the client may be gone
                await self.send_error(first_line(e), "processing_error")

@router.websocket("/v1/realtime")
async def realtime(socket: WebSocket):
    await Connection(socket, socket.app.state.openai_serving_transcription).handle_connection()
