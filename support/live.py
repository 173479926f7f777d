"""support/live.py -- a client of /v1/realtime: what a microphone or a file says, as it is said."""
import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from model import SAMPLE_RATE
from support.cli import UserError, as_user_error
from support.transcripts import decode

CHUNK = SAMPLE_RATE // 10  # samples sent at once

def open_sound(source: str, max_seconds: float) -> Iterator[bytes]:
    """A file as fast as it was spoken, or "-": raw 16-bit mono PCM at 16 kHz on standard input, as
    it comes in -> chunks of such PCM. UserError."""
    with as_user_error(f"--live {source}: ", ValueError, OSError):
        if source == "-":
            return from_pcm(0)
        if not Path(source).is_file():
            raise ValueError("no such file")
        wave = decode(source, max_seconds)
    return in_real_time((wave.numpy() * 32767).round().astype("<i2"))

def from_pcm(file: int | str) -> Iterator[bytes]:
    with open(file, "rb", closefd=False) as raw:  # not sys.stdin: a thread in it blocks the exit
        while len(piece := raw.read(2 * CHUNK)) > 1:
            yield piece[:len(piece) // 2 * 2]

def in_real_time(samples: np.ndarray) -> Iterator[bytes]:
    start = time.monotonic()
    for i in range(0, len(samples), CHUNK):
        time.sleep(max(0, start + min(i + CHUNK, len(samples)) / SAMPLE_RATE - time.monotonic()))
        yield samples[i:i + CHUNK].tobytes()

@contextmanager
def own_server(command: list[str]):
    """Runs it on a free port -> its address, once it is ready; UserError where it ends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, *command, "--port", str(port)], stdout=log,
                                   stderr=log, start_new_session=True)  # Ctrl-C is not for it
        try:
            while not is_ready(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None:
                    log.seek(0)
                    lines = [x for x in log if x.startswith("error: ")] or ["no server: see --help"]
                    raise UserError(lines[-1].removeprefix("error: ").strip())
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()

def is_ready(url: str) -> bool:
    with suppress(OSError):
        return urllib.request.urlopen(url, timeout=5).status == 200
    return False

def follow(pieces: Iterable[bytes], url: str, model: str = "borealis") -> None:
    """Print what the server at `url` hears, a line a phrase. Raises UserError."""
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect
    address = "ws" + url.rstrip("/").removesuffix("/v1").removeprefix("http") + "/v1/realtime"
    key, failed = os.environ.get("OPENAI_API_KEY"), []
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with (as_user_error(f"{url}: ", WebSocketException, OSError, ValueError),
          connect(address, additional_headers=headers) as server):
        def send(**event):
            server.send(json.dumps(event))
        def listen():
            try:
                while (event := json.loads(server.recv()))["type"] != "transcription.done":
                    print(event.get("delta", ""), end="", flush=True)
                    if event["type"] == "error":
                        raise ValueError(event["error"])
            except (ValueError, WebSocketException, BrokenPipeError) as e:
                failed.append(e)
        listener = threading.Thread(target=listen)
        listener.start()
        send(type="session.update", model=model)
        send(type="input_audio_buffer.commit")
        with suppress(KeyboardInterrupt):  # which is how a microphone ends
            for piece in pieces:
                if failed:
                    break
                send(type="input_audio_buffer.append", audio=base64.b64encode(piece).decode())
        send(type="input_audio_buffer.commit", final=True)
        listener.join()
        if failed:
            raise failed[0]
