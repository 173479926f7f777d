"""support/soak_test.py -- many clients for minutes: each must get its own answer, and the server
neither grow nor wedge nor keep what clients leave behind.

    python -m support.bench soak --clients 64 --minutes 10

A random model answers at various lengths; what it says is known beforehand, from its generate()."""
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
import numpy as np
import psutil
import soundfile
import torch
import model as nb
from data import TRANSCRIBE, embedded
from model import AUDIO, SAMPLE_RATE
from support import corpus, engine, pauses, recipes, rows, tiny

with contextlib.suppress(ImportError):  # they come with vLLM
    import httpx
    import openai
    from websockets.asyncio.client import connect

HERE = Path(__file__).parents[1]
TOKENS = 64   # of an answer, at most
LONGEST = 30  # seconds of a recording
SURE = 1e-4   # an answer that hangs on less than this between two logits is not asked for
PATIENCE = 300  # seconds that a client waits
# Blocks of 128 tokens: a cache so small that it is full in the first minute.
FLAGS = ("--max_audio_seconds", str(LONGEST), "--limit-mm-per-prompt", '{"audio": 2}',
         "--num-gpu-blocks-override", "512")

# ---- The model, and what it says
def make_model(seed: int) -> nb.BorealisForConditionalGeneration:
    """Random, but it says whole letters only, and ends some of its answers by itself."""
    torch.manual_seed(seed)
    model = tiny.scratch_model(embedded("ru", "clean", corpus.CHUNK), 512).eval()
    table = model.llm.get_input_embeddings().weight.data  # tied: the logits' too
    for i, row in enumerate(table):
        text = model.tokenizer.decode([i])
        special = i in (*model.tokenizer.all_special_ids, model.config.audio_token_id)
        if special or "\ufffd" in text or not text.isprintable():
            row *= 1.5 * (i == model.ends[0])  # 0 is never the highest logit
    return model

@dataclass
class Case:
    """A request and its answers: tokens of a whole one and of a stream (from which no loop can be
    taken back), or texts."""
    parts: list  # texts and waves; or pieces of one recording, if it is a transcript's
    whole: list[int] | list[list[int]]
    streamed: list[int] | str | set[str]
    formats: dict | None = None

def with_quiet(waves: list, seconds: float) -> np.ndarray:
    quiet = np.zeros(round(seconds * SAMPLE_RATE), waves[0].dtype)
    return np.concatenate([part for wave in waves for part in (wave, quiet)])

class Native:
    """The same model without vLLM."""
    def __init__(self, model):
        self.model, self.config = model, model.config
    def answer(self, chats: list, waves: list) -> list:
        """Chats, the recordings of each -> (whole, streamed) tokens of each, None if unsure."""
        answers = []
        for i in range(0, len(chats), 32):
            some = chats[i:i + 32], waves[i:i + 32]
            guarded, free = (self.model.chat(*some, max_new_tokens=TOKENS, loop_guard=on).tolist()
                             for on in (True, False))
            for chat, sounds, kept, said in zip(*some, guarded, free, strict=True):
                streamed = self.until_stopped(said, chat, sounds)
                sure = self.is_sure(chat, sounds, streamed)
                answers.append((self.until_end(kept), streamed) if sure else None)
        return answers
    def until_end(self, ids: list[int]) -> list[int]:
        if (marker := self.config.audio_start_id) in ids:  # the guard's
            return ids[:ids.index(marker)]
        end = self.model.ends[0]
        return ids[:ids.index(end) + 1] if end in ids else ids
    def until_stopped(self, ids, chat, waves) -> list[int]:
        if chat[-1]["content"] == nb.ASR_PROMPT:
            ids = ids[:nb.speech_limit(sum(map(len, waves))) + 1]
        ids = self.until_end(ids)
        loops = (n for n in range(len(ids)) if len(nb.guard(ids[:n], None)) < n)
        return ids[:next(loops, None)]
    def is_sure(self, chat, waves, said: list[int]) -> bool:
        """Would another order of additions say the same?"""
        windows = [nb.cut_windows(wave, self.config) for wave in waves]
        ids, _ = nb.build_ids(self.model.tokenizer, self.config, chat, map(len, windows))
        mels = nb.log_mel(sum(windows, []), self.config)
        with torch.no_grad():
            logits = self.model(torch.tensor([ids + said]), mels).logits[0, len(ids) - 1:-1]
        first, second = logits.topk(2).values.T
        return bool((first - second).min() > SURE) and logits.argmax(1).tolist() == said
    def text(self, ids: list[int]) -> str:
        return self.model.decode(torch.tensor(ids)) if ids else ""
    def chats(self, contents: list[list]) -> list[Case]:
        asked = [[dict(role="user", content="".join(p if isinstance(p, str) else AUDIO
                                                    for p in parts))] for parts in contents]
        waves = [[p for p in parts if not isinstance(p, str)] for parts in contents]
        answers = self.answer(asked, waves)
        return [Case(parts, *a) for parts, a in zip(contents, answers, strict=True) if a]
    def transcripts(self, waves: list[torch.Tensor]) -> list[Case]:
        cut = [pauses.cut_at_pauses(wave, self.config.window_samples) for wave in waves]
        cases, jobs = [], [[piece] for pieces in cut for piece in pieces]
        answers = iter(self.answer([TRANSCRIBE.messages(False)] * len(jobs), jobs))
        for pieces in cut:
            own = [next(answers) for _ in pieces]
            if all(own):
                cases.append(self.transcript(pieces, *zip(*own, strict=True)))
        return cases
    def transcript(self, pieces, whole, streamed) -> Case:
        times = pauses.timed(pieces, map(self.text, whole))
        body = pauses.to_json(*times)
        spoken = [ids for ids in whole if self.text(ids)]
        for segment, ids in zip(body["segments"], spoken, strict=True):
            segment["tokens"] = ids
        formats = dict(json=body["text"], text=body["text"] + "\n", verbose_json=body)
        formats |= {kind: pauses.FORMATS[kind](*times) for kind in ("srt", "vtt")}
        return Case(pieces, whole, " ".join(map(self.text, streamed)), formats)
    def live(self, waves: list[np.ndarray]) -> list[Case]:
        """int16 -> cases with all texts that may come. How far a phrase has come when it is decoded
        for the first time depends on the server's load, so on which words two passes agree, too."""
        heard = [self.passes(wave) for wave in waves]
        jobs = [[torch.from_numpy(sound)] for passes in heard for *_, sound in passes]
        answers = iter(self.answer([TRANSCRIBE.messages(False)] * len(jobs), jobs))
        cases = []
        for wave, passes in zip(waves, heard, strict=True):
            own = [next(answers) for _ in passes]
            if all(own):
                texts, early = {""}, []
                for (over, sound), (ids, _) in zip(passes, own, strict=True):
                    early.append((len(sound), self.text(ids)))
                    if over:
                        texts = {a + b for a in texts for b in self.lines(*early)}
                        early = []
                cases.append(Case([wave], [], texts))
        return cases
    def lines(self, *passes) -> set[str]:
        """(samples, text) of passes over a phrase that may happen; the last one does -> what a
        client may get, by the real Phrases."""
        *early, last = passes
        found, gap = set(), pauses.STEP * pauses.FRAME
        for n in range(len(early) + 1):
            for some in combinations(early, n):
                if all(b - a >= gap for (a, _), (b, _) in pairwise(some)):
                    phrases = pauses.Phrases(self.config.window_samples)
                    said = [phrases.take(text, size, False) for size, text in some]
                    found.add("".join([*said, phrases.take(last[1], last[0], True)]))
        return found
    def passes(self, wave: np.ndarray) -> list[tuple]:
        """-> (is the phrase over?, samples) of whatever a live session may decode."""
        found = []
        wave = wave.astype(np.float32) / 32768
        phrases, whole = pauses.Phrases(self.config.window_samples), len(wave) // pauses.PIECE
        for i in range(whole + 1):
            phrases.add(wave[i * pauses.PIECE:][:pauses.PIECE])
            while end := phrases.find_end(i == whole):
                found.append((True, phrases.phrase[:end]))
                phrases.take("", end, True)
            if phrases.due():
                found.append((False, phrases.phrase))
        return found

def make_cases(model, seed: int) -> dict[str, list[Case]]:
    """{kind: requests with their answers}"""
    native, rng = Native(model), random.Random(seed)
    spoken = [s.audio[0] for s in rng.sample(embedded("ru", "clean", corpus.CHUNK), 60)]
    waves = [rows.load_audio(wave) for wave in spoken]
    def joined(low, high):
        some = [wave.numpy() for wave in rng.sample(waves, rng.randint(low, high))]
        return torch.from_numpy(with_quiet(some, rng.uniform(0.1, 0.5)))
    long = [joined(2, 10) for _ in range(12)]
    short = native.chats([["что? ", wave] for wave in waves[:24]])
    cases = dict(
        short=short, long=native.chats([[wave, "о чём?"] for wave in long]),
        two=native.chats([["раз ", *rng.sample(waves, 1), " и ", *rng.sample(waves, 1)]
                          for _ in range(16)]),
        text=native.chats([[f"скажи {i} раз"] for i in range(16)]),
        transcript=native.transcripts(waves[24:36] + long[:6]),
        live=native.live([with_quiet(rng.sample(spoken, n), 0.8) for n in (1, 1, 2, 2, 3, 3) * 3]))
    cases["streamed"] = short[:12] + cases["long"][:6] + cases["two"][:6]
    cases["transcript_streamed"] = cases["transcript"]
    assert all(cases.values()), {kind: len(some) for kind, some in cases.items()}
    return cases

# ---- The server
def start(place: Path, model):
    """-> the process of serve_vllm.py, its address."""
    model.save_pretrained(place / "ckpt")
    model.tokenizer.save_pretrained(place / "ckpt")
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = str(s.getsockname()[1])
    env = dict(os.environ, NANOBOREALIS_CACHE=str(place / "cache"), PYTHONPATH="",
               VLLM_CPU_KVCACHE_SPACE="1")
    command = [sys.executable, HERE / "serve_vllm.py", "--ckpt", place / "ckpt", "--port", port]
    with open(place / "log", "w") as log:
        process = subprocess.Popen([*command, *FLAGS], cwd=place, env=env, stdout=log, stderr=log)
    return process, f"http://127.0.0.1:{port}"

def wait_for(process, address: str, log: Path) -> None:
    for _ in range(PATIENCE):
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{address}/v1/models").raise_for_status()
        time.sleep(1)
    raise RuntimeError(f"the server does not start:\n{log.read_text()[-3000:]}")

@dataclass
class Usage:
    """Of all processes of the server."""
    at: float        # time.monotonic()
    mib: float       # of their own: no libraries and files, which others may share
    files: int       # open ones, sockets too
    threads: int

def usage(process) -> Usage:
    total = Usage(time.monotonic(), 0, 0, 0)
    processes = []
    with contextlib.suppress(psutil.NoSuchProcess):  # it may have died
        parent = psutil.Process(process.pid)
        processes = [parent, *parent.children(recursive=True)]
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            rollup = Path(f"/proc/{each.pid}/smaps_rollup").read_text()
            total.mib += sum(map(int, re.findall(r"Pss_(?:Anon|Shmem): +(\d+) kB", rollup))) / 1024
            total.files += each.num_fds()
            total.threads += each.num_threads()
    return total

async def settled(process, wanted: int | None = None) -> Usage:
    """When clients are gone: usage once as many files are open as `wanted`, or as many as for the
    last five seconds; after thirty, whatever there is."""
    now = calm = usage(process)
    while now.files != wanted and now.at - calm.at < (30 if wanted else 5):
        await asyncio.sleep(1)
        now = usage(process)
        calm = now if now.files != calm.files else calm
    return now

# ---- The clients
class Wrong(Exception):
    """An answer that is not the native model's."""

class Expected(Exception):
    """What becomes of malformed requests, and of those whose client hung up, as it should."""

def wav(wave, kind: str = "WAV") -> bytes:
    soundfile.write(buffer := io.BytesIO(), np.asarray(wave), SAMPLE_RATE, "FLOAT", format=kind)
    return buffer.getvalue()

def nudged(wave: torch.Tensor, rng: random.Random) -> np.ndarray:
    """For caches another recording, for ears and networks the same: some samples differ in their
    last bit. In one of three cases it is left as it is."""
    wave = np.asarray(wave)
    if rng.random() < 1 / 3:
        return wave
    chosen = np.random.default_rng(rng.getrandbits(32)).random(len(wave)) < 0.01
    return np.where(chosen, np.nextafter(wave, 2 * wave), wave)

def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()

def message(parts: list, rng: random.Random) -> list[dict]:
    content = [dict(type="text", text=p) if isinstance(p, str) else dict(
        type="input_audio", input_audio=dict(data=encoded(wav(nudged(p, rng))), format="wav"))
        for p in parts]
    return [dict(role="user", content=content)]

def compare(got, expected, what="") -> None:
    if got != expected:
        raise Wrong(f"{what}: {got!r}, not {expected!r}")

def check_refusal(status: int, text: str) -> None:
    """Is it a 4xx, and the reason none in words of our code?"""
    error = json.loads(text)
    reason = error.get("error", error)
    reason = reason.get("message", "") if isinstance(reason, dict) else str(reason)
    if not 400 <= status < 500 or not reason or "Traceback" in reason or "object has" in reason:
        raise RuntimeError(f"{status}: {text[:300]}")

class Clients:
    """So many at once; each asks, waits for the answer, checks it, asks for something else."""
    def __init__(self, address: str, cases: dict, mix: dict, seed: int):
        self.address, self.cases, self.mix, self.seed = address, cases, mix, seed
        self.records, self.hostile, self.attacks = [], 0, 0
        self.http = httpx.AsyncClient(base_url=address, timeout=PATIENCE, limits=httpx.Limits())
        self.openai = openai.AsyncOpenAI(
            base_url=f"{address}/v1", api_key="-", max_retries=0, timeout=PATIENCE)
    async def close(self) -> None:
        await self.http.aclose()
        await self.openai.close()
    async def run(self, number: int, until: float) -> None:
        rng = random.Random(f"{self.seed} {number}")
        while time.monotonic() < until:
            kind, = rng.choices([*self.mix], self.mix.values())
            record = await self.ask(kind, rng)
            if record["problem"]:
                await asyncio.sleep(0.5)
    async def ask(self, kind: str, rng: random.Random) -> dict:
        """One request of this kind -> what became of it."""
        hostile = kind in ("hang_up", "malformed")
        attacks, beside, began = self.attacks, self.hostile, time.monotonic()
        self.attacks += hostile
        self.hostile += hostile
        first, outcome, problem = None, "right", None
        case = rng.choice(self.cases[kind]) if kind in self.cases else None
        try:
            first = await getattr(self, kind)(case, rng)
        except Expected as e:
            outcome = str(e)
        except Wrong as e:
            outcome = problem = f"wrong: {e}"
        except Exception as e:
            outcome = problem = f"{type(e).__name__}: {str(e).strip()[:200]}"
        self.hostile -= hostile
        ended = time.monotonic()
        record = dict(kind=kind, outcome=outcome, problem=problem, took=ended - began,
                      first=first and first - began, beside=bool(beside or self.attacks > attacks))
        self.records.append(record)
        return record
    # ---- Healthy ones -> when the first token came, if it could be seen
    async def short(self, case: Case, rng) -> None:
        answer = await self.openai.chat.completions.create(
            model="borealis", messages=message(case.parts, rng), max_tokens=TOKENS,
            extra_body=dict(return_token_ids=True))
        compare(answer.choices[0].token_ids, case.whole, "tokens")
    long = two = short
    async def text(self, case: Case, rng) -> None:
        body = dict(model="borealis", messages=message(case.parts, rng), max_tokens=TOKENS,
                    return_token_ids=True)
        answer = (await self.http.post("/v1/chat/completions", json=body)).raise_for_status()
        compare(answer.json()["choices"][0]["token_ids"], case.whole, "tokens")
    async def streamed(self, case: Case, rng) -> float:
        stream = await self.openai.chat.completions.create(
            model="borealis", messages=message(case.parts, rng), max_tokens=TOKENS, stream=True,
            extra_body=dict(return_token_ids=True))
        tokens, first = [], None
        async for chunk in stream:
            for choice in chunk.choices:
                tokens += getattr(choice, "token_ids", None) or []
            first = first or (time.monotonic() if tokens else None)
        compare(tokens, case.streamed, "tokens")
        return first
    async def transcript(self, case: Case, rng) -> None:
        kind = rng.choice([*case.formats])
        answer = await self.openai.audio.transcriptions.create(
            model="borealis", file=("a.wav", wav(nudged(np.concatenate(case.parts), rng))),
            response_format=kind)
        wanted = case.formats[kind]
        if kind == "verbose_json":
            got = answer.model_dump()
            known = "id", "start", "end", "text", "tokens"
            got["segments"] = [{key: s[key] for key in known} for s in got["segments"]]
            return compare({key: got[key] for key in wanted}, wanted, kind)
        compare(answer.text if kind == "json" else answer, wanted, kind)
    async def transcript_streamed(self, case: Case, rng) -> float:
        file = "a.wav", wav(nudged(np.concatenate(case.parts), rng))
        text, first = "", None
        async with self.http.stream("POST", "/v1/audio/transcriptions", files=dict(file=file),
                                    data=dict(model="borealis", stream="true")) as answer:
            async for line in answer.raise_for_status().aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"]["content"]
                    first = first or time.monotonic()
        compare(text.split(), case.streamed.split(), "words")
        return first
    def socket(self):
        return connect(self.address.replace("http", "ws") + "/v1/realtime", open_timeout=PATIENCE)
    async def say(self, live, wave: np.ndarray, chunk: int) -> None:
        await live.send(json.dumps(dict(type="session.update", model="borealis")))
        await live.send(json.dumps(dict(type="input_audio_buffer.commit")))
        for i in range(0, len(wave), chunk):
            audio = encoded(wave[i:i + chunk].astype("<i2").tobytes())
            await live.send(json.dumps(dict(type="input_audio_buffer.append", audio=audio)))
    async def live(self, case: Case, rng) -> float | None:
        heard, first = "", None
        async with self.socket() as live:
            await self.say(live, case.parts[0], rng.choice([2000, 16000, LONGEST * SAMPLE_RATE]))
            await live.send(json.dumps(dict(type="input_audio_buffer.commit", final=True)))
            while True:
                event = json.loads(await asyncio.wait_for(live.recv(), PATIENCE))
                if event["type"] == "error":
                    raise RuntimeError(event["error"])
                if event["type"] == "transcription.done":
                    break
                if "delta" in event:
                    first, heard = first or time.monotonic(), heard + event["delta"]
        compare(heard, event["text"], "deltas")
        if heard not in case.streamed:
            raise Wrong(f"text: {heard!r}, not one of {case.streamed}")
        return first
    # ---- Those that hang up: in the middle of what they send, or of what they hear
    async def hang_up(self, _, rng) -> None:
        where = rng.choice(["body", "answer", "stream", "transcript", "socket"])
        short, live = rng.choice(self.cases["short"]), rng.choice(self.cases["live"])
        body = dict(model="borealis", messages=message(short.parts, rng), max_tokens=TOKENS)
        if where == "body":
            host, port = self.address.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            data = json.dumps(body).encode()
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: "
                         b"application/json\r\nContent-Length: %d\r\n\r\n" % len(data))
            writer.write(data[:rng.randrange(len(data))])
            await writer.drain()
            writer.transport.abort()
        elif where == "answer":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.uniform(0.05, 1)):
                    await self.http.post("/v1/chat/completions", json=body)
        elif where == "socket":
            async with self.socket() as socket:
                await self.say(socket, live.parts[0], 4000)
                await asyncio.sleep(rng.uniform(0, 1))
                socket.transport.abort()
        else:
            file = "a.wav", wav(nudged(np.concatenate(rng.choice(
                self.cases["transcript"]).parts), rng))
            asked = dict(url="/v1/chat/completions", json=body | dict(stream=True))
            if where == "transcript":
                asked = dict(url="/v1/audio/transcriptions", files=dict(file=file),
                             data=dict(model="borealis", stream="true"))
            async with self.http.stream("POST", **asked) as answer:
                async for _ in answer.raise_for_status().aiter_lines():
                    break
        raise Expected(f"in the middle of: {where}")
    # ---- and malformed ones
    async def malformed(self, _, rng) -> None:
        short = rng.choice(self.cases["short"]).parts
        sound, model, chat = short[1].numpy(), dict(model="borealis"), "/v1/chat/completions"
        nan, long = np.full(16000, np.nan, np.float32), np.tile(sound, 99)[:31 * SAMPLE_RATE]
        def ask(data: str):
            audio = dict(type="input_audio", input_audio=dict(data=data, format="wav"))
            return dict(json=model | dict(messages=[dict(role="user", content=[audio])]))
        def upload(data: bytes, **more):
            return dict(files=dict(file=("a.wav", data)), data=model | more)
        bad = {
            "broken JSON": (chat, dict(content=b'{"model": "borealis", "messages": [')),
            "another model": (chat, dict(json=dict(model="x", messages=message(short, rng)))),
            "no base64": (chat, ask("%%%")), "NaN": (chat, ask(encoded(wav(nan)))),
            "broken audio": (chat, ask(encoded(b"RIFF" + rng.randbytes(999)))),
            "half a header": (None, upload(wav(sound)[:30])), "empty": (None, upload(b"")),
            "too long": (None, upload(wav(long))), "NaN upload": (None, upload(wav(nan))),
            "another language": (None, upload(wav(sound), language="xx")),
            "no file": (None, dict(data=model)), "no event": (None, None)}
        name = rng.choice([*bad])
        url, asked = bad[name]
        if asked:
            answer = await self.http.post(url or "/v1/audio/transcriptions", **asked)
            check_refusal(answer.status_code, answer.text)
            raise Expected(f"{name}: {answer.status_code}")
        async with self.socket() as socket:
            await socket.send(rng.choice(["{", "[]", "7", '{"type": "x"}', '{"type": 1}']))
            events = [json.loads(await asyncio.wait_for(socket.recv(), PATIENCE))
                      for _ in range(2)]
        compare([event["type"] for event in events], ["session.created", "error"])
        raise Expected("no event: an error event")

# ---- The report
def seconds(records, key: str, share: float) -> float | None:
    values = [r[key] for r in records if r[key] is not None]
    return float(np.percentile(values, share)) if values else None

def by_kind(records: list[dict]) -> list[dict]:
    table = []
    for kind in sorted({r["kind"] for r in records}) + ["all"]:
        own = [r for r in records if kind in (r["kind"], "all")]
        good = [r for r in own if r["outcome"] == "right"]
        wrong = sum(r["outcome"].startswith("wrong: ") for r in own)
        problems = sum(bool(r["problem"]) for r in own)
        table.append(dict(
            kind=kind.replace("_", " "), requests=len(own), right=len(good), wrong=wrong,
            expected_errors=len(own) - len(good) - problems, unexpected=problems - wrong) | {
            f"{name}, p{share} s": seconds(good, key, share)
            for name, key in (("first token", "first"), ("whole", "took")) for share in (50, 99)})
    return table

def errors(records: list[dict]) -> list[dict]:
    counts = Counter((bool(r["problem"]), r["kind"].replace("_", " "), r["outcome"][:100])
                     for r in records if r["outcome"] != "right")
    return [dict(kind=kind, outcome=outcome, expected="no" if problem else "yes", requests=n)
            for (problem, kind, outcome), n in sorted(counts.items())]

def memory(samples: list[Usage], before: Usage, after: Usage, began: float, ended: float):
    """Rows: medians of ten seconds, so that a single moment does not count."""
    table = [dict(when="before") | vars(before)]
    minute = began + min(60, (ended - began) / 4)
    for when, at in (("first minute", minute), ("half", (began + ended) / 2), ("end", ended)):
        near = [s for s in samples if at - 10 < s.at <= at] or samples[-1:]
        table.append(dict(when=when) | {key: float(np.median([vars(s)[key] for s in near]))
                                        for key in ("mib", "files", "threads")})
    table.append(dict(when="all clients gone") | vars(after))
    for row in table:
        row.pop("at", None)
    for row in table[2:]:
        row["growth %"] = 100 * (row["mib"] / max(1, table[1]["mib"]) - 1)
    return table

async def measure(process, address: str, cases: dict, clients: int, length: float, seed: int):
    """-> records, and rows of memory()."""
    mix = recipes.TABLES["benches"]["soak"]["mix"]
    async def all_at_once(tasks, seed):
        crowd = Clients(address, cases, mix, seed)
        await asyncio.gather(*tasks(crowd))
        await crowd.close()
        return crowd.records
    def each_kind(crowd):  # whatever is made when it is needed for the first time
        return [crowd.ask(kind, random.Random(i)) for i in range(3) for kind in mix]
    records = await all_at_once(each_kind, seed)
    before, samples = await settled(process), []
    began = time.monotonic()
    async def watch():
        while process.poll() is None:
            samples.append(await asyncio.to_thread(usage, process))
            await asyncio.sleep(2)
    watcher = asyncio.create_task(watch())
    until = began + length
    timed = await all_at_once(lambda crowd: [crowd.run(i, until) for i in range(clients)], seed)
    watcher.cancel()
    ended = time.monotonic()
    after = await settled(process, before.files)
    return records, timed, memory(samples, before, after, began, ended)

def soak(clients: int, minutes: float, seed: int = 0) -> tuple[list, list[str]]:
    """-> tables (each a list of rows), and what was not as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        place, model = Path(folder), make_model(seed)
        process, address = start(place, model)
        try:
            cases = make_cases(model, seed)  # while it loads
            wait_for(process, address, place / "log")
            first, timed, grown = asyncio.run(
                measure(process, address, cases, clients, 60 * minutes, seed))
            problems = [r["problem"] for r in first + timed if r["problem"]]
            if problems:
                print((place / "log").read_text()[-2000:], *problems[:5], sep="\n",
                      file=sys.stderr)
        finally:
            process.terminate()
            process.wait(60)
    healthy = [r for r in timed if r["beside"] and r["outcome"] == "right"]
    slowest = max(healthy, key=lambda r: r["took"], default=dict(kind="-", took=None))
    beside = dict(slowest_beside_hostile_ones=slowest["kind"].replace("_", " "),
                  seconds=slowest["took"], healthy_beside=len(healthy), minutes=minutes,
                  clients=clients, requests_per_s=len(timed) / 60 / minutes)
    left = grown[-1]["files"] - grown[0]["files"]
    failures = problems + ([f"{left} files left open"] if left > 0 else [])
    if minutes >= 5 and (growth := grown[-2]["growth %"]) > 3:  # sooner, caches still fill up
        failures.append(f"memory has grown by {growth:.1f} % since the first minute")
    return [by_kind(timed), errors(first + timed), [beside], grown], failures

def main(args, show) -> int:
    """The exit code: 1 if an answer was wrong, an error unexpected, or a file left open."""
    engine.check_installed()
    tables, failures = soak(args.clients, args.minutes, args.seed)
    for table in tables:
        show(table)
    return int(bool(failures))
