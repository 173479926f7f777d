"""support/test_instruct.py -- what support/instruct.py promises, with vLLM and with servers that
are slow, busy, broken or talkative."""
import contextlib
import http.server
import json
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path
import pytest
import soundfile
import data
from conftest import Fork, exit_of, is_one_line, needs_vllm, train_now, wav_bytes, write_manifest
from support import cli, instruct
from support.corpus import sentence
from support.rows import BadRow, BadRows

KEY = "sk-nobody-may-read-this"
ALL = ("--kinds", *instruct.KINDS)

def said(question: str, answer: str) -> str:
    return json.dumps(dict(question=question, answer=answer), ensure_ascii=False)

def number_of(request: dict) -> int:
    return zlib.crc32(request["messages"][0]["content"].encode())

def good(request: dict) -> str:
    """As a careful model answers: by kind, with a number of its own in each question."""
    prompt, number = request["messages"][0]["content"], number_of(request)
    _, task, text = prompt.rsplit("\n\n", 2)
    kind = next(k for k, v in instruct.KINDS.items() if task in (v["ru"], v.get("en")))
    russian = instruct.language(text) == "ru"
    words = text.split()
    answer = dict(what=" ".join(words[-2:]), who=words[0], when=words[-1].upper() + ".",
                  summary=words[0], tone="Спокойный тон." if russian else "It sounds calm.",
                  translation="Good.", absent="зебра" if russian else "zebra")[kind]
    return said(f"Вопрос номер {number}?" if russian else f"What is number {number}?", answer)

class Server(http.server.ThreadingHTTPServer):
    """Answers like OpenAI. script(request, number of tries so far of the same) -> what the model
    says, or (status, headers, body), or None after which the line is cut."""
    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def __init__(self, script=lambda request, tries: good(request)):
        self.script, self.asked, self.keys, self.lock = script, Counter(), set(), threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = number_of(request)
        with self.server.lock:
            tries = self.server.asked[name]
            self.server.asked[name] += 1
            self.server.keys.add(self.headers["Authorization"])
        assert self.path == "/v1/chat/completions"
        answer = self.server.script(request, tries)
        if isinstance(answer, str):
            choice = dict(index=0, finish_reason="stop", message=dict(role="assistant",
                                                                      content=answer))
            usage = dict(prompt_tokens=100, completion_tokens=10, total_tokens=110)
            answer = 200, {}, json.dumps(dict(id="1", object="chat.completion", created=1,
                                              model="m", choices=[choice], usage=usage))
        if answer is None:
            return
        status, headers, body = answer
        headers = {"Content-Type": "application/json"} | headers
        with contextlib.suppress(OSError):  # who asked did not wait
            self.send_response(status)
            for header in headers.items():
                self.send_header(*header)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

    def log_message(self, *_):
        pass

@contextlib.contextmanager
def serving(*script):
    with Server(*script) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()

def transcripts(folder: Path, n: int, lang: str = "ru") -> str:
    """n different sentences, of one recording, in a folder of their own."""
    (folder / "in").mkdir(exist_ok=True)
    (folder / "in" / "a.wav").write_bytes(wav_bytes([0.1, -0.1] * 4000))
    rng, texts = random.Random(0), {}
    while len(texts) < n:
        texts[sentence(lang, rng)] = None
    return write_manifest(folder / "in" / f"{lang}{n}.jsonl",
                          [dict(audio="a.wav", text=text) for text in texts])

@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(manifest, url, *flags) -> exit code, standard error, rows of OUT."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    def run(manifest, url, *flags, out=tmp_path / "out.jsonl"):
        flags = ["--model", "m", "--out", out, "--manifest", manifest, "--url", url, *flags]
        code, _, err = exit_of(instruct.main, monkeypatch, capsys, *flags)
        lines = out.read_text().splitlines() if out.is_file() else []
        return code, err, [json.loads(line) for line in lines]
    return run

def counts(err: str) -> dict[str, int]:  # the table
    return {name: int(n) for n, name in re.findall(r"^ *(\d+) ([a-z].*)$", err, re.M)}

# ---- A server that works
@needs_vllm
def test_vllm(clients, corpus, tmp_path, monkeypatch, run):
    """Structured output: even a random model's answers are what the schema says. The checks refuse
    them by reason; where any letter is Russian, and it may say "transcribe", most pass."""
    kinds = dict(what=dict(found="either", max=10**6, per=10**6, ru="Спроси что угодно."),
                 tone=instruct.KINDS["tone"])
    monkeypatch.setattr(instruct, "KINDS", kinds)
    strict = dict(instruct.TABLES)
    instruct.TABLES.update(letters=r"(?P<ru>[^\W\d_])", mentions="^$")
    rows = []
    for i, sample in enumerate(corpus[:16]):
        soundfile.write(tmp_path / f"{i}.wav", sample.audio[0], 16000)
        rows.append(dict(audio=f"{i}.wav", text=sample.answer))
    manifest = write_manifest(tmp_path / "texts.jsonl", rows)
    url, flags = str(clients[0].base_url), ["--model", "borealis", "--concurrency", 4]
    try:
        code, err, kept = run(manifest, url, *flags, "--kinds", "what")
    finally:
        instruct.TABLES.update(strict)
    table = counts(err)
    assert code == 0, err
    assert "broken JSON" not in err and "failed" not in err
    assert table["usable"] == len(kept) >= 8 and sum(table.values()) == 16, err
    numbers = [int(row["audio"].removesuffix(".wav")) for row in kept]
    assert numbers == sorted(numbers)  # as in the manifest
    bad = BadRows(strict=True)
    samples, _ = data.read_manifest(str(tmp_path / "out.jsonl"), bad)
    assert len(samples) == len(kept) and all(len(data.load_audio(s.audio[0])) for s in samples)
    part = tmp_path / "strict.jsonl.part"
    code, err, kept = run(manifest, url, *flags, "--kinds", "tone", out=tmp_path / "strict.jsonl")
    assert sum(counts(err).values()) == 16 and "broken JSON" not in err
    assert bool(kept) == (code == 0) == (not part.exists())

def test_output_trains(corpus, tmp_path, monkeypatch, run):
    (tmp_path / "clips").mkdir()
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    rows = []
    for i, sample in enumerate(corpus[:8]):
        soundfile.write(tmp_path / "clips" / f"{i}.wav", sample.audio[0], 16000)
        audio = str(tmp_path / "clips" / f"{i}.wav") if i % 2 else f"{i}.wav"
        rows.append(dict(audio=audio, text=sample.answer))
    manifest = write_manifest(tmp_path / "clips" / "texts.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    out = Path("sub/deep/out.jsonl")
    with serving() as server:
        code, err, kept = run("clips/texts.jsonl", server.url, "--per_row", 3, out=out)
    table = counts(err)  # of a kind that came twice, this server says the same
    assert code == 0 and len(kept) == table["usable"] == 24 - table["refused: duplicate"], err
    assert server.asked.total() == 24
    assert {row["audio"] for row in kept} == {f"../../clips/{i}.wav" for i in range(8)}
    assert all(row.keys() == {"audio", "question", "answer", "kind"} for row in kept)
    assert manifest.endswith("texts.jsonl") and os.listdir("sub/deep") == ["out.jsonl"]
    code, steps = train_now(monkeypatch, "--preset", "tiny", "--train_manifest", out, "--steps", 2,
                            "--curriculum", "none", "--effective_batch", 4, "--batch_size", 4,
                            "--out", tmp_path / "trained")
    assert not code and len(steps) == 2 and steps[-1]["loss"] > 0

def test_shares(tmp_path):
    """Kinds come as often as their shares say, the same for each run, and only where they fit."""
    parser = cli.ArgumentParser().add_tables("instruct")
    def kinds(lang, *flags):
        flags = ["--manifest", transcripts(tmp_path, 1000, lang), "--url", "", "--model", "m",
                 "--out", str(tmp_path / "out.jsonl"), *flags]
        jobs = instruct.make_jobs(parser.parse_args(flags))
        return list(jobs), Counter(kind for _, kind, _ in jobs.values())
    keys, drawn = kinds("ru")
    for kind, share in Counter(parser.get_default("kinds")).items():
        assert abs(drawn[kind] / 1000 - share / 10) < 0.05, kind
    assert kinds("ru") == (keys, drawn)
    assert not {*kinds("ru", "--seed", "1")[0]} & {*keys}
    assert not {*kinds("ru", "--model", "other")[0]} & {*keys}
    _, drawn = kinds("en", "--kinds", "translation", "translation", "tone", "--per_row", "2")
    assert drawn == {"tone": 2000}  # of one row too, each is asked

# ---- Answers that are refused, and those that are not
TEXT = "вчера вечером анна купила девять спелых яблок на рынке"
REFUSED = [
    ("what", "Что купила Анна?", "девять спелых яблок", None),
    ("what", "Что купила Анна?", "Девять спелых яблок!", None),
    ("what", "Что купила Анна?", "яблок девять", "answer is not said"),
    ("what", "Что купила Анна?", "пелых яблок", "answer is not said"),  # half a word
    ("what", "Что купила Анна?", "", "empty text"),
    ("what", "Что купила Анна?", "...", "question tells the answer"),  # has no word
    ("what", "Что купила Анна <|AUDIO|>?", "яблок", "placeholders and recordings differ in number"),
    ("what", "Что?", "яблок", "length"),
    ("what", "Что" * 70 + "?", "яблок", "length"),
    ("what", "What did Anna buy?", "яблок", "question in another language"),
    ("what", "Кто купил девять спелых яблок на рынке?", "анна", "question tells what is said"),
    ("what", "Верно ли, что Анна купила яблоки?", "Анна", "question tells the answer"),
    ("what", "Что купили, судя по расшифровке?", "яблок", "mentions a transcript"),
    ("who", "Кто купил яблоки?", "анна", None),
    ("who", "Кто купил яблоки?", "Мария", "answer is not said"),
    ("when", "Когда это было?", "вчера вечером", None),
    ("summary", "О чём речь?", "Анна сходила на рынок.", None),
    ("summary", "О чём речь?", "Анна " * 20, "length"),  # longer than what is said
    ("tone", "Какой тон у говорящего?", "Спокойный.", None),
    ("tone", "Какой тон у говорящего?", "It is calm.", "answer in another language"),
    ("tone", "Какой тон у говорящего?", "很平静", "answer in another language"),
    ("tone", "Сколько раз?", "12", None),
    ("tone", "Какой тон у говорящего?", "Спокойный " * 30, "length"),
    ("translation", "Переведи на английский.", "Anna bought nine ripe apples.", None),
    ("translation", "Переведи на английский.", "Анна купила яблоки.", "answer in another language"),
    ("translation", "Переведи на английский.", "Anna " * 60, "length"),
    ("absent", "Сколько стоили яблоки?", "сто рублей", None),
    ("absent", "Сколько было яблок?", "девять", "answer is said"),
    ("absent", "Где Анна живёт?", "на севере", None),  # "на" is said, but says nothing
]

@pytest.mark.parametrize(("kind", "question", "answer", "reason"), REFUSED)
def test_checks(kind, question, answer, reason):
    sample, seen = data.Sample(TEXT, ["a.wav"]), set()
    content = said(question, answer)
    if reason:
        with pytest.raises(BadRow, match=f"^{re.escape(reason)}$"):
            instruct.check(content, sample, kind, seen)
        assert not seen
    else:
        row = instruct.check(f"<think>Hm.</think>```json\n{content}\n```", sample, kind, seen)
        expected = "В записи об этом не говорится." if kind == "absent" else answer.strip()
        assert row == dict(audio="a.wav", question=question, answer=expected, kind=kind)
        with pytest.raises(BadRow, match="^duplicate$"):
            instruct.check(content, sample, kind, seen)
        other = data.Sample(TEXT, ["b.wav", "c.wav"])
        assert instruct.check(content, other, kind, seen)["audio"] == ["b.wav", "c.wav"]

@pytest.mark.parametrize("content", [
    "", "Вот вопрос: что купила Анна?", "{", "}{", "[1, 2]", '"a"', "null", "{'question': 'a'}",
    '{"question": "Что купила Анна?"}', '{"question": 5, "answer": "анна"}',
    said("Кто это?", "\ud800")])
def test_not_as_the_schema(content):
    with pytest.raises(BadRow, match="broken JSON|broken text|empty text|tells the answer"):
        instruct.check(content, data.Sample(TEXT, ["a.wav"]), "who", set())

def test_english():
    sample = data.Sample("the cat sleeps under the old table", ["a.wav"])
    row = instruct.check(said("Where is the cat?", "Under the old table."), sample, "what", set())
    assert row["answer"] == "Under the old table."
    row = instruct.check(said("What is the cat's name?", "Tom"), sample, "absent", set())
    assert row["answer"] == "The recording does not say."

# ---- Servers in trouble
def test_slow_busy_broken_talkative(tmp_path, run):
    """Each request fails at first in some way; retries get an answer for all. Prose is refused."""
    def script(request, tries):
        way = number_of(request) % 5
        if way == 4:
            return "Конечно! Вот вопрос: что было сказано?"
        if tries:
            return good(request)
        if way == 0:
            time.sleep(5)
        return [good(request), (429, {"retry-after-ms": "20"}, "{}"), (500, {}, "oh"), None][way]
    with serving(script) as server:
        code, err, kept = run(transcripts(tmp_path, 40), server.url, "--timeout", 3, *ALL)
    ways = Counter(number % 5 for number in server.asked)
    assert code == 0 and set(ways) == {0, 1, 2, 3, 4}, err
    assert counts(err) == {"usable": len(kept), "refused: broken JSON": ways[4]}
    assert len(kept) == 40 - ways[4]
    assert all(n == (1 if number % 5 == 4 else 2) for number, n in server.asked.items())
    assert {row["kind"] for row in kept} == {*instruct.KINDS}
    assert f"prompt_tokens={40 * 100}, completion_tokens={40 * 10}" in err
    assert not list(tmp_path.glob("*.part"))

@pytest.mark.parametrize(("answer", "reason"), [
    ((500, {}, "oh"), "InternalServerError"), ((429, {}, "{}"), "RateLimitError"),
    ((400, {}, '{"error": {"message": "too long"}}'), "BadRequestError"),
    ((200, {"Content-Type": "text/html"}, "<html>hello"), "AttributeError"),
    ((200, {}, '{"choices": []}'), "IndexError"), ((200, {}, '{"choices": null}'), "TypeError"),
    ((200, {}, "hello"), "JSONDecodeError"), ("slow", "APITimeoutError")])
def test_failures_are_asked_again(answer, reason, tmp_path, run):
    """What failed is counted; the other rows are there, and only the failed are asked again."""
    broken = True
    def script(request, tries):
        if broken and number_of(request) % 3 == 0:
            time.sleep(4 * (answer == "slow"))
            return good(request) if answer == "slow" else answer
        return good(request)
    manifest, flags = transcripts(tmp_path, 20), ["--retries", 0, "--timeout", 2]
    with serving(script) as server:
        code, err, kept = run(manifest, server.url, *flags)
        failed = sum(number % 3 == 0 for number in server.asked)
        assert is_one_line(code, err, "repeat"), err
        assert counts(err) == {"usable": 20 - failed, f"failed: {reason}": failed}
        assert len(kept) == 20 - failed and 0 < failed < 20
        broken = False
        code, err, kept = run(manifest, server.url, *flags)
        assert code == 0 and counts(err) == {"usable": 20} and len(kept) == 20
        assert all(n == (2 if number % 3 == 0 else 1) for number, n in server.asked.items())
        code, err, again = run(manifest, server.url, *flags)
    assert is_one_line(code, err, "is finished: delete it") and again == kept
    assert os.listdir(tmp_path / "in") and not list(tmp_path.glob("*.part"))

def test_nothing_usable(tmp_path, run):
    """No OUT, a line that says so, and the same is not asked twice."""
    manifest = transcripts(tmp_path, 5)
    with serving(lambda *_: "no") as server:
        for _ in range(2):
            code, err, kept = run(manifest, server.url)
            assert is_one_line(code, err, "no answer is usable") and not kept
            assert counts(err) == {"usable": 0, "refused: broken JSON": 5}
        assert set(server.asked.values()) == {1} and not (tmp_path / "out.jsonl").exists()

@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_resume(how, tmp_path, run):
    """Stopped in the middle, a half line left: what was kept is not asked again, and the result is
    that of an uninterrupted run."""
    manifest, out = transcripts(tmp_path, 80), tmp_path / "out.jsonl"
    part, flags = tmp_path / "out.jsonl.part", ["--concurrency", "3"]
    def script(request, tries):
        time.sleep(0.05)
        return good(request)
    with serving(script) as server:
        process = Fork("support/instruct.py", "--manifest", manifest, "--url", server.url,
                       "--model", "m", "--out", out, *flags, out=tmp_path / "said")
        while not part.exists() or part.read_text().count("\n") < 30:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(how)
        err, _ = process.communicate(timeout=60)
        assert process.returncode == (-9 if how == signal.SIGKILL else 130), err
        assert "Traceback" not in err and not out.exists()
        kept = re.findall(r'^\["(\w{16})"', part.read_text(), re.M)
        assert 15 <= len(kept) < 80 and len({*kept}) == len(kept)
        with part.open("a") as file:
            file.write('\n["0123456789abcdef", "{\\"question\\": \\"a]')
        asked = server.asked.total()
        assert asked <= len(kept) + 3
        code, err, rows = run(manifest, server.url, *flags)
        assert code == 0 and len(rows) == 80, err
        assert server.asked.total() == asked + 80 - len(kept) and len(server.asked) == 80
        assert os.listdir(tmp_path / "in") and not part.exists()
        code, _, whole = run(manifest, server.url, *flags, out=tmp_path / "whole.jsonl")
    assert code == 0 and whole == rows

# ---- Keys and mistakes
def test_key_stays_secret(tmp_path, run, monkeypatch):
    manifest = transcripts(tmp_path, 3)
    refused = 401, {}, json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}})
    answers = [refused]
    with serving(lambda request, _: answers[0] or good(request)) as server:
        code, err, _ = run(manifest, server.url)
        assert is_one_line(code, err, "refuses the key: set OPENAI_API_KEY")
        assert server.keys == {"Bearer none"} and not list(tmp_path.glob("out*"))
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        code, err, _ = run(manifest, server.url)
        assert is_one_line(code, err, "refuses the key") and KEY not in err
        answers[0] = 400, {}, refused[2]
        code, err, _ = run(manifest, server.url)
        assert code == 2 and KEY not in err
        answers[0] = None
        code, err, rows = run(manifest, server.url)
        assert code == 0 and len(rows) == 3 and server.keys == {"Bearer none", f"Bearer {KEY}"}
    assert KEY not in err + (tmp_path / "out.jsonl").read_text()

@pytest.mark.parametrize(("flags", "says"), [
    (["--manifest", "none.jsonl"], "no manifest at none.jsonl"),
    (["--manifest", "empty.jsonl"], "is empty"),
    (["--manifest", "other.jsonl"], "3 of 3 rows are unusable, fix them: 2 no transcript, or"),
    (["--url", "http://127.0.0.1:{port}/v1", "--retries", "0"], "does not answer"),
    (["--url", "127.0.0.1:1", "--retries", "0"], "does not answer"),
    (["--manifest", "in/en3.jsonl", "--kinds", "translation"], "no kind of question for its lang"),
    (["--kinds", "where"], "choose from 'what', 'who'"), (["--kinds"], "at least one argument"),
    (["--per_row", "0"], "--per_row/--per-row: must be between 1 and 100"),
    (["--concurrency", "x"], "invalid number value"),
    (["--out", "in/a.wav/out.jsonl"], "is a file or not writable"),
    (["--out", "in"], "is finished: delete it, or choose another"),
    (["--modle", "m"], "unrecognized arguments: --modle m")])
def test_mistakes(flags, says, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    manifest, _ = transcripts(tmp_path, 3), transcripts(tmp_path, 3, "en")
    Path("empty.jsonl").write_text("\n")
    write_manifest(tmp_path / "other.jsonl", [
        dict(audio="gone.wav", text="раз"), dict(audio="in/a.wav", text="1 2 3"),
        dict(audio="in/a.wav", question="Что это?", answer="Звук.")])
    before = sorted(tmp_path.rglob("*"))
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    flags = [flag.format(port=port) for flag in flags]
    code, err, _ = run(manifest, f"http://127.0.0.1:{port}/v1", *flags)
    assert is_one_line(code, err, says), err
    assert sorted(tmp_path.rglob("*")) == before

def test_no_model_and_no_openai(tmp_path, run, monkeypatch):
    manifest = transcripts(tmp_path, 3)
    with serving(lambda *_: (404, {}, '{"error": {"message": "no such model"}}')) as server:
        code, err, _ = run(manifest, server.url)
    assert is_one_line(code, err, "has no such --model") and not list(tmp_path.glob("out*"))
    monkeypatch.setitem(sys.modules, "openai", None)
    code, err, _ = run(manifest, "http://127.0.0.1:1/v1")
    assert is_one_line(code, err, "pip install -r support/requirements-page.txt")
