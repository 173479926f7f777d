"""support/test_doors.py -- doors.py before the real server, with small limits and a key."""
import base64
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
import pytest
from conftest import HERE, needs_vllm, start, tone, wait_for, wav_bytes

# isort: split
from conftest import openai
from support import engine
from support.recipes import TABLES

httpx = pytest.importorskip("httpx")
live = pytest.importorskip("websockets.sync.client")
websockets = pytest.importorskip("websockets.exceptions")
pytestmark = needs_vllm
KEY, CANARY, WAV = "s3cret", "zanzibar", wav_bytes(tone(0.5))
BEARER = dict(Authorization=f"Bearer {KEY}")
ENDLESS = dict(ignore_eos=True, repetition_detection=dict(max_pattern_size=1, min_count=10**6))
UPGRADE = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13",
           "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="}
CHAT, INDUCTOR = "/v1/chat/completions", "TORCHINDUCTOR_CACHE_DIR"

class Server:
    def __init__(self, process, log, client, place):
        self.process, self.log, self.place = process, log, place
        self.url, self.port = str(client.base_url)[:-4], client.base_url.port
        self.client = client.with_options(api_key=KEY)
        self.http = httpx.Client(base_url=self.url, headers=BEARER, timeout=60)
    def live(self, path="/v1/realtime", **more):
        return live.connect(f"ws://127.0.0.1:{self.port}{path}",
                            additional_headers=BEARER | more)
    def chat(self, text, **more):
        return dict(dict(model="borealis", messages=[dict(role="user", content=text)],
                         max_tokens=2), **more)
    def transcribe(self, file=WAV, name="a.wav", **more):
        return self.http.post("/v1/audio/transcriptions", data=more, files=dict(file=(name, file)))
    def raw(self, *pieces, pause=1.0):
        """Send them, wait for the end -> what was answered, seconds after the last piece."""
        with socket.create_connection(("127.0.0.1", self.port)) as s:
            for i, piece in enumerate(pieces):
                time.sleep(pause * bool(i))
                s.sendall(piece)
            began, got = time.monotonic(), b""
            s.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                while data := s.recv(9999):
                    got += data
            return got, time.monotonic() - began

def head(address, start=f"POST {CHAT}", **more) -> bytes:
    """Of a request from that address, as a proxy on this machine would say."""
    fields = BEARER | dict(host="x") | {"x-forwarded-for": address} | more
    lines = [f"{start} HTTP/1.1", *(f"{k.replace('_', '-')}: {v}" for k, v in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode()

@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """It has a home, a folder and a system's place for temporary files of its own, all empty."""
    place = tmp_path_factory.mktemp("doors")
    for name in "home", "temp":
        (place / name).mkdir()
    flags = ["--max_request_mb", 2, "--max_requests", 6, "--max_request_seconds", 8, "--api-key",
             KEY, "another", "--middleware", "starlette.middleware.gzip.GZipMiddleware"]
    with pytest.MonkeyPatch.context() as patch:
        for name in {"TMPDIR", "XDG_CACHE_HOME", *TABLES["vllm_places"]} - {INDUCTOR}:
            patch.delenv(name, raising=False)  # set when support/engine.py was imported
        patch.setenv("HOME", str(place / "home"))
        patch.setenv("TEMP", str(place / "temp"))  # where tempfile looks after $TMPDIR
        patch.setenv("VLLM_API_KEY", "nobody's")  # the flag counts
        process, log, client = start(place, "--ckpt", checkpoint, *flags, fresh=True)
    server = Server(process, log, client.with_options(api_key=KEY), place)
    try:
        wait_for(process, log, server.client)
        while server.transcribe().status_code == 503:  # torch compiles for the first one
            pass
        yield server
    finally:
        process.terminate()
        process.wait(60)

def all_at_once(*tasks):
    with ThreadPoolExecutor(len(tasks)) as pool:
        return [task.result() for task in [pool.submit(task) for task in tasks]]

def test_who_stops_is_sent_away(server):
    """Nothing, half a header, a header in drops, half of a second one, a body that stops."""
    good = head("10.0.0.2", "GET /v1/models")
    body = b"5\r\n{\"a\":\r\n"
    answers = all_at_once(
        lambda: server.raw(),
        lambda: server.raw(good[:30]),
        lambda: server.raw(*[good[i:i + 1] for i in range(5)]),
        lambda: server.raw(good + good[:30]),
        lambda: server.raw(head("10.0.0.3", content_length=999) + b"{"),
        lambda: server.raw(head("10.0.0.4", transfer_encoding="chunked") + body),
        lambda: server.raw(head("10.0.0.5", "GET /health", content_length=9) + b"{"),
        lambda: server.raw(head("10.0.0.6", "GET /v1/realtime", **UPGRADE)),  # ignores our close
        lambda: server.raw(head("10.0.0.7", "GET /v1/realtime", **UPGRADE, content_length=5)),
        lambda: server.raw(head("10.0.0.8", "GET /v1/realtime", **UPGRADE, x="y" * 9000)))
    assert max(seconds for _, seconds in answers) < 6, answers  # 4, where nobody is busy
    said = [got.split(b"\r\n")[0] for got, _ in answers]
    assert said == [b"", b"", b"", b"HTTP/1.1 200 OK", b"", b"", b"HTTP/1.1 200 OK",
                    b"HTTP/1.1 101 Switching Protocols", b"", b""]
    assert b"no event in time" in answers[-3][0]

def test_headers_end(server):
    """Nobody may fill the memory with one, before or behind another request, with a key or none."""
    start = b"GET /v1/models HTTP/1.1\r\n"
    def pour(first: bytes, line: bytes):
        sent = 0
        with (socket.create_connection(("127.0.0.1", server.port)) as s,
              contextlib.suppress(ConnectionError)):
            s.sendall(first)
            while sent < 1 << 26:
                s.sendall(line)
                sent += len(line)
        return sent
    slow = json.dumps(server.chat("а", max_tokens=200, **ENDLESS)).encode()
    busy = head("10.0.0.9", content_type="application/json", content_length=len(slow)) + slow
    sent = all_at_once(*(partial(pour, first, line * 999) for first in (start, busy + start)
                         for line in (b"a:b\r\n", b"c: " + b"d" * 200 + b"\r\n")),
                       lambda: pour(b"GET /", b"e" * 9999))
    assert max(sent) < 16 << 20, sent  # what the sockets between us hold
    assert server.http.post(CHAT, json=server.chat("а")).status_code == 200

def test_who_is_slow_is_served(server):
    body = json.dumps(server.chat("привет")).encode()
    pieces = [body[i * 20:][:20] for i in range(5)] + [body[100:]]
    def drip():
        for piece in pieces:
            yield piece
            time.sleep(1)
    def listen():
        with server.live() as socket:
            json.loads(socket.recv())
            for _ in range(3):  # longer than a request may take
                socket.send('{"type": "session.update", "model": "borealis"}')
                time.sleep(3.5)
            socket.send("{}")
            return json.loads(socket.recv())["code"]
    def sleep():
        with server.live() as socket:
            socket.recv()
            socket.send('{"type": "session.update", "model": "borealis"}')
            with pytest.raises(websockets.ConnectionClosed) as e:
                socket.recv()
            return e.value.rcvd.code
    headers = {"content-type": "application/json"}
    def post():
        return server.http.post(CHAT, content=drip(), headers=headers)
    answer, code, closed = all_at_once(post, listen, sleep)
    assert answer.status_code == 200 and code == "unknown_event" and closed == 1008

def test_sizes(server):
    def pour():
        for _ in range(30):
            yield bytes(100_000)
    def error(**body):
        answer = server.http.post(CHAT, **body)
        assert answer.status_code == 413 and answer.headers["content-type"] == "application/json"
        return answer.json()["error"]
    assert error(content=bytes(3 << 20)) == error(content=pour()) == dict(
        message="more than 2 MB in a request", type="refused", code=413)
    got, seconds = server.raw(head("10.0.0.2", content_length=3 << 20))
    assert b" 413 " in got and seconds < 3  # before it was sent
    with pytest.raises(openai.APIStatusError, match="413"):
        server.client.audio.transcriptions.create(model="borealis", file=("a", bytes(9 << 20)))
    with server.live() as socket:
        socket.send("x" * (1 << 19))
        assert "Invalid JSON" in [socket.recv(), socket.recv()][1]
        socket.send("x" * (2 << 20) + "x")
        with pytest.raises(websockets.ConnectionClosed) as e:
            socket.recv()
        assert e.value.rcvd.code == 1009

def test_numbers(server):
    def ask(address):
        return server.http.get("/v1/models", headers={"x-forwarded-for": address})
    with contextlib.ExitStack() as stack:
        for address in ("10.0.1.1", "10.0.1.1", "10.0.1.1", "10.0.1.2", "10.0.1.2"):
            socket = stack.enter_context(server.live(**{"x-forwarded-for": address}))
            socket.send("{}")
        mine = ask("10.0.1.1")
        assert mine.status_code == 429 and mine.headers["retry-after"] == "1"
        assert "too many of yours" in mine.json()["error"]["message"]
        assert ask("10.0.1.2").status_code == 200
        stack.enter_context(server.live(**{"x-forwarded-for": "10.0.1.2"})).send("{}")
        assert "6 requests" in ask("10.0.1.3").json()["error"]["message"]
        with pytest.raises(websockets.InvalidStatus, match="429"):
            server.live(**{"x-forwarded-for": "10.0.1.3"}).__enter__()
        assert server.http.get("/health").status_code == 200
    while (status := ask("10.0.1.1").status_code) != 200:  # they may still be closing
        assert status == 429
        time.sleep(0.2)

def test_time_of_a_request(server):
    """It ends with a reason, a stream just ends, and the engine stops both."""
    length = server.client.models.list().data[0].max_model_len - 100
    def metric(name):
        lines = server.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))
    before = metric("generation_tokens_total")
    def ask():
        body = server.chat("привет", max_tokens=length, n=8, temperature=1, **ENDLESS)
        return server.http.post(CHAT, json=body)
    def stream():
        body = server.chat("привет", max_tokens=length, n=8, temperature=1, stream=True,
                           **ENDLESS)
        lines = []
        with (pytest.raises(httpx.RemoteProtocolError),  # it was not whole
              server.http.stream("POST", CHAT, json=body) as got):
            for line in got.iter_lines():
                lines.append(line)
        return len(lines)
    answer, pieces = all_at_once(ask, stream)
    assert answer.status_code == 503 and "not done within 8 s" in answer.text and pieces > 9
    while metric("num_requests_running"):
        time.sleep(0.1)
    assert metric("generation_tokens_total") - before < 2 * 8 * length

@pytest.mark.parametrize("method,path,status", [
    ("POST", CHAT, 200), ("POST", "/invocations", 200), ("POST", "/tokenize", 200),
    ("POST", "/v1/audio/transcriptions", 200), ("GET", "/metrics", 200), ("GET", "/docs", 200),
    ("GET", "/openapi.json", 200), ("GET", "/load", 200), ("GET", "/version", 200),
    ("GET", "/v1/models", 200), ("GET", "/ping", 200), ("GET", "/nowhere", 404),
    ("OPTIONS", CHAT, 405), ("OPTIONS", "/metrics", 200)])
def test_keys(server, method, path, status):
    """Without one nothing works but /health; with one, all that vLLM has."""
    more = dict(json=server.chat("a") if path != "/tokenize" else dict(prompt="a"))
    if "audio" in path:
        more = dict(files=dict(file=("a.wav", WAV)))
    def ask(**headers):
        return httpx.request(method, server.url + path, headers=headers, timeout=60, **more)
    for key in {}, dict(Authorization="Bearer nobody's"), dict(Authorization=f"Basic {KEY}"):
        answer = ask(**key)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == 401
    assert ask(Authorization="Bearer another").status_code == ask(**BEARER).status_code == status

def test_health_and_live_sockets(server):
    assert httpx.get(server.url + "/health").status_code == 200
    for path in "//health", "/health/", "/healthy", "/v1/../health/x":
        assert httpx.get(server.url + path).status_code == 401, path
    for key in "", "Bearer nobody's":
        with pytest.raises(websockets.InvalidStatus, match="401"):
            server.live(Authorization=key).__enter__()
    with server.live() as socket:
        assert "session.created" in socket.recv()

ALONE = """
import os, socket, sys, threading
from types import SimpleNamespace
import httpx, uvicorn
from starlette.applications import Starlette
from support import engine
from support.doors import Doors
app = Starlette()
app.add_middleware(Doors)
app.state.args = SimpleNamespace(api_key=None)
door = socket.create_server(("127.0.0.1", 0))
server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
threading.Thread(target=server.run, args=[[door]], daemon=True).start()
for key in sys.argv[1:]:
    answer = httpx.get("http://127.0.0.1:%d/" % door.getsockname()[1], timeout=60,
                       headers=dict(Authorization="Bearer " + key))
    print(answer.status_code)
print(os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["VLLM_CACHE_ROOT"])
"""

def test_the_environment(tmp_path):
    """A key in it counts where no flag says another; what is compiled goes into our cache."""
    clean = {k: v for k, v in os.environ.items() if k not in TABLES["vllm_places"]}
    env = clean | dict(VLLM_API_KEY=KEY, PYTHONPATH=str(HERE), NANOBOREALIS_CACHE=str(tmp_path))
    command = [sys.executable, "-c", ALONE, "wrong", KEY, KEY + "x"]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=120)
    assert done.stdout.split() == ["401", "404", "401", f"{tmp_path}/vllm/inductor",
                                   f"{tmp_path}/vllm"], done.stderr

def test_temporary_files(tmp_path, monkeypatch):
    """Those of the server are in the cache, unless its path is too long for a socket."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        for cache, own in (Path(short), True), (tmp_path / "long" / ("x" * 60), False):
            monkeypatch.delenv("TMPDIR")
            monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
            monkeypatch.setattr(engine, "CACHE", cache)
            with engine.keep_inside() as folder:
                assert os.environ["TMPDIR"] == tempfile.gettempdir() == folder
                assert Path(folder).parent == (cache if own else tmp_path)
            assert not Path(folder).exists()

def test_no_cors(server):
    """Nor does a browser's question get past the key."""
    ask = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    question = httpx.options(server.url + CHAT, headers=ask)
    assert question.status_code == 400 and "Disallowed CORS origin" in question.text
    for answer in question, server.http.get("/v1/models", headers=ask):
        assert "access-control-allow-origin" not in answer.headers
    for name in ask:  # a question needs both
        for path in CHAT, "/metrics":
            assert httpx.options(server.url + path, headers={name: ask[name]}).status_code == 401

def canaries(server):
    """Requests of every kind, right and wrong, with a word that no log may have."""
    word, ask = CANARY, server.chat(CANARY)
    bad = [dict(model=word), dict(temperature=word), dict(messages=word), dict(tools=[word]),
           dict(messages=[{word: word}]), dict(chat_template="{{ " + word), dict(stream=True),
           dict(structured_outputs=dict(regex=f"({word}")), dict(logit_bias={word: 1}),
           dict(messages=[dict(role="user", content=[dict(type=word, text=word)])]),
           dict(response_format=dict(type="json_schema", json_schema=dict(name=word, schema=word)))]
    for url in (f"data:audio/wav;base64,{word}", f"http://{word}.invalid/a.wav", f"file:///{word}"):
        part = dict(type="audio_url", audio_url=dict(url=url))
        bad.append(dict(messages=[dict(role="user", content=[part])]))
    bodies = [json.dumps(ask | more) for more in ({}, *bad)]
    for body in (*bodies, f'{{"{word}', f'"{word}"', f'["{word}"]'):
        yield server.http.post(f"{CHAT}?q={word}", content=body,
                               headers={"content-type": "application/json",
                                        "x-request-id": f"{word} !"})
    for path in "/v1/completions", "/tokenize", "/detokenize", "/invocations", "/v1/responses":
        for body in dict(prompt=word), dict(model=word, input=word), dict(tokens=[word]):
            yield server.http.post(path, json=body | dict(max_tokens=1))
    for more in ({}, dict(model=word), dict(language=word), dict(prompt=f"<|im_end|>{word}"),
                 dict(hotwords=word), dict(temperature=word), dict(response_format=word)):
        for file in WAV, word.encode(), b"ID3\x03\0\0\0\0\x0f\x76" + word.encode() * 99:
            yield server.transcribe(file, word, **more)
    events = [dict(type=word), dict(type="session.update", model=word), [word], word,
              dict(type=[word]),
              dict(type="input_audio_buffer.append", audio=[word]),
              dict(type="input_audio_buffer.append", audio=word + "я"),
              dict(type="input_audio_buffer.commit", final=word)]
    for event in (*map(json.dumps, events), f'{{"{word}', word.encode()):
        with server.live(f"/v1/realtime?q={word}") as socket:
            socket.send('{"type": "session.update", "model": "borealis"}')
            socket.send(event)
            with contextlib.suppress(websockets.ConnectionClosed):
                socket.recv(), socket.recv(5)

def test_a_log_line_each_and_no_words(server):
    def lines():
        return server.log.read_text().splitlines()
    before = len(lines())
    answers = [answer.status_code for answer in canaries(server)]
    assert {*answers} == {200, 400, 404}
    named = [server.http.get(f"/v1/models?q={CANARY}", headers={"x-request-id": name})
             for name in ("my-request.1", "a b", "x" * 65, "тест".encode())]
    names = [answer.headers["x-request-id"] for answer in named]
    assert names[0] == "my-request.1" and all(re.fullmatch("[0-9a-f]{32}", n) for n in names[1:])
    twice = [server.http.post(CHAT, json=server.chat("а"), headers={"x-request-id": "same"})
             for _ in range(2)]
    assert [answer.json()["id"] for answer in twice] == ["chatcmpl-same"] * 2
    with server.live(**{"x-request-id": "live-1"}) as socket:
        assert socket.response.headers["x-request-id"] == "live-1"
        socket.send("{}")
        assert "unknown_event" in [socket.recv(), socket.recv()][1]
    while "live-1" not in server.log.read_text():
        time.sleep(0.1)
    text = server.log.read_text()
    assert CANARY not in text and "Logging error" not in text and "Traceback" not in text
    one = r"INFO: +my-request.1 127.0.0.1 GET /v1/models 200 \d+\.\d{3} s"
    assert len([line for line in lines() if re.fullmatch(one, line)]) == 1
    assert re.search(r"live-1 127.0.0.1 LIVE /v1/realtime 1000 \d", text)
    requests = [line for line in lines()[before:] if line.startswith("INFO:")]
    assert all(line.endswith(" s") for line in requests) and len(requests) > len(answers)
    assert "/v1/realtime?" not in text and "WebSocket" not in text

def test_the_users_own_middleware(server):
    answer = server.http.get("/openapi.json", headers={"accept-encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"

def children(pid: int) -> list[int]:  # and theirs
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    own = [int(child) for task in tasks for child in task.read_text().split()]
    return [pid, *(more for child in own for more in children(child))]

def test_nothing_is_written_elsewhere(server):
    """Last, for it ends the server: its home, folder and place for temporary files stay empty."""
    sound = dict(data=base64.b64encode(WAV).decode(), format="wav")
    content = [dict(type="input_audio", input_audio=sound)]
    body = server.chat("") | dict(messages=[dict(role="user", content=content)])
    assert server.http.post(CHAT, json=body).status_code == 200
    upload = wav_bytes(tone(9), rate=48_000, subtype="DOUBLE")  # more than is kept in memory
    assert server.transcribe(upload).status_code == 200
    opened = set()
    for pid in children(server.process.pid):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                opened.add(os.readlink(file))
    sockets = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()}
    assert [path for path in sockets if path.startswith(f"{server.place}/cache/tmp.")]
    system = tempfile.gettempdir(), str(Path.home())
    assert all(path.startswith(str(server.place)) for path in opened if path.startswith(system))
    server.process.terminate()
    server.process.wait(60)
    assert sorted(p.name for p in server.place.iterdir()) == ["cache", "home", "log", "temp"]
    assert not [*(server.place / "home").iterdir(), *(server.place / "temp").iterdir()]
    assert not [*(server.place / "cache").glob("tmp.*")]
