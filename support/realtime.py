"""support/realtime.py -- words as they are said, over a websocket: vLLM's /v1/realtime with its
events, but each phrase is a fresh request. vLLM's own session keeps what was said in the prompt: a
model of single turns would repeat it, and slow down by the minute (vllm issues 51374, 58324)."""
import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from uuid import uuid4
import numpy as np
import torch
from vllm.entrypoints.speech_to_text.realtime import connection
from vllm.entrypoints.speech_to_text.transcription.api_router import router
from vllm.sampling_params import RequestOutputKind, SamplingParams
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect
from model import SAMPLE_RATE
from support import cli, pauses, rows, uploads

GREEDY = SamplingParams(temperature=0, max_tokens=256, output_kind=RequestOutputKind.FINAL_ONLY)
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
        phrases = pauses.Phrases(self.serving.model_config.hf_config.window_samples)
        text, usage = "", connection.UsageInfo()
        async def decode(n, over=False):  # the first n samples of the phrase
            nonlocal text
            wave, name = torch.from_numpy(phrases.phrase[:n]), f"{self.connection_id}-{uuid4()}"
            output = await uploads.answer(self.serving, wave, GREEDY, name)
            said = output.outputs[0]
            usage.prompt_tokens += len(output.prompt_token_ids)
            usage.completion_tokens += len(said.token_ids)
            if new := phrases.take(pauses.without_thoughts(said.text), n, over):
                text += new
                await self.send(connection.TranscriptionDelta(delta=new))
        try:
            async for piece, more, last in self.pieces():
                phrases.add(piece)
                while end := phrases.find_end(last):
                    await decode(end, over=True)
                if phrases.due() and not more:
                    await decode(len(phrases.phrase))
            usage.total_tokens = usage.prompt_tokens + usage.completion_tokens
            await self.send(connection.TranscriptionDone(text=text, usage=usage))
        except Exception as e:
            connection.logger.exception("a live session ends")
            with suppress(Exception):  # the client may be gone
                await self.send_error(cli.first_line(e), "processing_error")

@router.websocket("/v1/realtime")
async def realtime(socket: connection.WebSocket):
    await Connection(socket, socket.app.state.openai_serving_transcription).handle_connection()

# ---- A client: serve_vllm.py --live
CHUNK = SAMPLE_RATE // 10  # samples sent at once

def open_sound(source: str, max_seconds: float):
    """A file as it was spoken, or "-": standard input -> chunks of 16-bit mono PCM at 16 kHz."""
    if source == "-":
        return chunks(open(0, "rb", closefd=False))  # not sys.stdin: a thread in it blocks the exit
    with cli.as_user_error(f"--live {source}: ", ValueError, OSError):
        wave = rows.load_audio(source, silence=True, max_seconds=max_seconds)
    pcm = (wave.numpy() * 32767).round().astype("<i2")
    return chunks(io.BytesIO(pcm.tobytes()), in_real_time=True)

def chunks(raw, in_real_time: bool = False):
    start, sent = time.monotonic(), 0
    while len(piece := raw.read(2 * CHUNK)) > 1:
        sent += len(piece) // 2
        if in_real_time:
            time.sleep(max(0, start + sent / SAMPLE_RATE - time.monotonic()))
        yield piece[:len(piece) // 2 * 2]

@contextmanager
def own_server(command: list[str]):
    """Runs it on a free port -> its address, once it is ready; UserError where it ends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, *command, "--port", str(port)], stdout=log,
                                   stderr=log, start_new_session=True)  # Ctrl-C is not for it
        try:
            while not is_open(port):
                if process.poll() is not None:
                    log.seek(0)
                    lines = [x for x in log if x.startswith("error: ")] or ["the server ended"]
                    raise cli.UserError(lines[-1].removeprefix("error: ").strip())
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()

def is_open(port: int) -> bool:  # vLLM opens it when all is loaded
    with socket.socket() as test:
        return test.connect_ex(("127.0.0.1", port)) == 0

def follow(pieces, url: str) -> None:
    """Print what the server at `url` hears, a line a phrase. Raises UserError."""
    address = "ws" + url.rstrip("/").removesuffix("/v1").removeprefix("http") + "/v1/realtime"
    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
    with (cli.as_user_error(f"{url}: ", WebSocketException, OSError, ValueError),
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
            for piece in pieces:
                if listener.done():
                    break
                send(type="input_audio_buffer.append", audio=base64.b64encode(piece).decode())
        send(type="input_audio_buffer.commit", final=True)
        listener.result()
