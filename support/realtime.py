"""support/realtime.py -- words as they are said, over a websocket: vLLM's /v1/realtime with its
events, but each phrase is a fresh request. vLLM's own session keeps what was said in the prompt: a
model of single turns would repeat it, and slow down by the minute (vllm issues 51374, 58324)."""
import asyncio
import base64
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from uuid import uuid4
import numpy as np
import torch
from vllm.entrypoints.speech_to_text.realtime import connection
from vllm.entrypoints.speech_to_text.transcription.api_router import router
from vllm.sampling_params import RequestOutputKind, SamplingParams
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect
from model import SAMPLE_RATE
from support import cli, pauses, uploads

GREEDY = SamplingParams(temperature=0, max_tokens=256, output_kind=RequestOutputKind.FINAL_ONLY)
AHEAD = 120 * SAMPLE_RATE  # samples that may wait; who sends more is read no faster than heard

class Connection(connection.RealtimeConnection):
    """vLLM's, which reads the events into a queue; all that is ours is what becomes of them."""
    async def handle_event(self, event) -> None:
        if not isinstance(event, dict) or not isinstance(event.get("model", ""), str):
            return await self.send_error("an event is a JSON object, model a name", "invalid_event")
        if self.waiting() >= AHEAD and not self.generation_task:
            return await self.send_error("audio waits for a first commit", "invalid_event")
        await super().handle_event(event)
        while (task := self.generation_task) and not task.done() and self.waiting() > AHEAD:
            await asyncio.sleep(0.05)
    def waiting(self) -> int:  # samples in the queue; a piece counts for 0.1 s at least
        return sum(max(1600, np.size(chunk)) for chunk in self.audio_queue._queue)
    async def send_error(self, message: str, code: str | None = None) -> None:
        slip = code == "processing_error"  # vLLM's, for whatever it trips over
        await super().send_error("a field of a wrong type, or nested" if slip else message, code)
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
        phrases, heard = pauses.Phrases(self.serving.model_config.hf_config.window_samples), []
        async def decode(n, over=False):  # the first n samples of the phrase
            wave, name = torch.from_numpy(phrases.phrase[:n]), f"{self.connection_id}-{uuid4()}"
            output = await uploads.answer(self.serving, wave, GREEDY, name)
            said = pauses.without_thoughts(output.outputs[0].text)
            if new := phrases.take(said, n, over):
                heard.append(new)
                await self.send(connection.TranscriptionDelta(delta=new))
        try:
            async for piece, more, last in self.pieces():
                phrases.add(piece)
                while end := phrases.find_end(last):
                    await decode(end, over=True)
                if phrases.due() and not more:
                    await decode(len(phrases.phrase))
            await self.send(connection.TranscriptionDone(text="".join(heard)))
        except Exception as e:
            connection.logger.exception("a live session ends")
            with suppress(Exception):  # the client may be gone
                await self.send_error(cli.first_line(e), "transcription_error")

@router.websocket("/v1/realtime")
async def realtime(socket: connection.WebSocket):
    await Connection(socket, socket.app.state.openai_serving_transcription).handle_connection()

# ---- A client: serve_vllm.py --live
def follow(url: str) -> None:
    """Print what the server at `url` hears in the PCM on standard input. Raises UserError."""
    address = "ws" + url.rstrip("/").removesuffix("/v1").removeprefix("http") + "/v1/realtime"
    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
    problems, hint = (WebSocketException, OSError, ValueError), "; does serve_vllm.py run there?"
    with (cli.as_user_error(f"--server {url}: ", *problems, suffix=hint),
          connect(address, additional_headers=headers) as server):
        def send(**event):
            server.send(json.dumps(event))
        def listen():
            while (event := json.loads(server.recv()))["type"] != "transcription.done":
                print(event.get("delta", ""), end="", flush=True)
                if event["type"] == "error":
                    raise ValueError(event["error"])
        listener = ThreadPoolExecutor().submit(listen)
        send(type="session.update", model="borealis")
        send(type="input_audio_buffer.commit")
        with suppress(KeyboardInterrupt):  # which is how a microphone ends
            while len(pcm := sys.stdin.buffer.read(SAMPLE_RATE // 5)) > 1 and not listener.done():
                whole = pcm[:len(pcm) // 2 * 2]  # samples of 0.1 s: the last may be cut in half
                send(type="input_audio_buffer.append", audio=base64.b64encode(whole).decode())
        send(type="input_audio_buffer.commit", final=True)
        listener.result()
