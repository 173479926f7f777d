"""support/test_people.py -- transcripts as files, subtitles, words as they are said: with the
real model, the real server and real clients."""
import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
import numpy as np
import pytest
import torch
import data
import eval as evaluation
import model as nb
from conftest import HERE, exit_of, is_one_line, needs_vllm, start, tone, wait_for, wav_bytes
from support import pauses, processing, rows, tiny, transcripts

srt = pytest.importorskip("srt", reason="pip install -r support/requirements-dev.txt")
av = pytest.importorskip("av", reason="pip install -r support/requirements-page.txt")
with suppress(ImportError):  # vLLM brings it
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

# ---- support/pauses.py
@pytest.mark.parametrize("seed", range(6))
def test_cues_fit_a_screen(seed):
    """Whatever is said: at most two lines of 42 letters and 7 s, in order, no word lost."""
    rng = np.random.default_rng(seed)
    segments, at, said = [], 0.0, []
    for n in rng.integers(1, 80, 8):
        words = ["ы" * k for k in rng.integers(1, 14, n)]
        seconds = rng.uniform(0.5, 30)
        piece = tone(seconds) * torch.from_numpy(rng.random(round(seconds * 16000)) > 0.5)
        piece[:len(piece) // 5] = 0  # nobody speaks yet
        segments.append(processing.word_times(piece, " ".join(words), at))
        assert at + seconds / 5 - 0.1 <= segments[-1][0][0] <= segments[-1][-1][1] <= at + seconds
        said, at = said + words, at + seconds
    cues = list(pauses.cues(segments))
    for first, last, lines in cues:
        assert len(lines) <= 2 and max(map(len, lines)) <= 42 and 0 <= last - first <= 7.001
    assert all(last <= first for (_, last, _), (first, *_) in zip(cues, cues[1:], strict=False))
    assert " ".join(" ".join(lines) for *_, lines in cues).split() == said
    parsed = list(srt.parse(pauses.FORMATS["srt"](segments)))
    assert [p.content.split("\n") for p in parsed] == [lines for *_, lines in cues]
    for cue, (first, last, _) in zip(parsed, cues, strict=True):
        assert abs(cue.start.total_seconds() - first) < 1e-3 > abs(cue.end.total_seconds() - last)

def test_other_formats_of_a_transcript():
    segments = [[(0.5, 1.0, "да"), (1.0, 3661.5, "<i>")], [(3661.5, 3662.25, "нет")]]
    formats = {kind: write(segments, 4000.0) for kind, write in pauses.FORMATS.items()}
    assert formats["txt"] == "да <i>\nнет\n"
    assert formats["vtt"].startswith("WEBVTT\n\n1\n00:00:00.500 --> 00:00:01.000\nда\n\n")
    assert "&lt;i&gt;" in formats["vtt"] and "01:01:01.500 --> 01:01:02.250" in formats["vtt"]
    parsed = json.loads(formats["json"])
    assert parsed["text"] == "да <i> нет" and parsed["duration"] == 4000.0
    assert parsed["segments"][1] == dict(id=1, start=3661.5, end=3662.25, text="нет")

# ---- support/transcripts.py
def encoded(wave: np.ndarray, kind: str, codec: str) -> bytes:
    """m4a, mp4 or webm, in stereo at 48 kHz, as phones and browsers record."""
    with av.open(buffer := io.BytesIO(), "w", format=kind) as container:
        stream = container.add_stream(codec, rate=48000)
        stream.layout = "stereo"
        samples = np.float32(np.tile(wave.repeat(3), (2, 1)))
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        frame.rate = 48000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return buffer.getvalue()

CONTAINERS = dict(m4a=("ipod", "aac"), mp4=("mp4", "aac"), webm=("webm", "libopus"))

@pytest.mark.parametrize("ending", CONTAINERS)
def test_recordings_of_phones_and_browsers(ending, monkeypatch, tmp_path):
    wave = tone(2.0).numpy()
    file = encoded(wave, *CONTAINERS[ending])
    (tmp_path / "a").write_bytes(file)
    heard = rows.load_audio(file).numpy()
    assert np.array_equal(heard, rows.load_audio(str(tmp_path / "a")).numpy())
    assert abs(len(heard) - 32000) < 1600 and np.corrcoef(
        np.abs(np.fft.rfft(heard, 32000)), np.abs(np.fft.rfft(wave)))[0, 1] > 0.9
    for broken in (file[:60], file[:8] + b"junk" * 99):
        with pytest.raises(rows.BadRow, match="not audio"):
            rows.load_audio(broken)
    with pytest.raises(rows.TooLong):
        rows.load_audio(file, max_seconds=1)
    monkeypatch.setattr(rows, "PYAV", False)
    with pytest.raises(rows.BadRow, match="pip install av"):
        rows.load_audio(file)

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Recordings of several kinds, one of several windows, one that is none, two of one name."""
    long = torch.cat([tone(1.4, 1), torch.zeros(4800), tone(5.5, 2)])
    (tmp_path / "rec" / "sub").mkdir(parents=True)
    for name, content in {"a.wav": wav_bytes(tone(1)), "a.mp3": wav_bytes(tone(1, 3), kind="MP3"),
                          "sub/long.flac": wav_bytes(long, kind="FLAC"), "bad.ogg": b"no sound",
                          "b.m4a": encoded(tone(1, 4).numpy(), "ipod", "aac"), "x.txt": b"-",
                          "quiet.wav": wav_bytes(np.zeros(48000))}.items():
        (tmp_path / "rec" / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path

FILES = "--ckpt CKPT --max_new_tokens 6 --transcribe rec --out_dir texts --format"

def test_transcripts_of_a_folder(folder, checkpoint, net, monkeypatch, capsys):
    flags = FILES.replace("CKPT", str(checkpoint)).split()
    code, out, err = exit_of(transcripts.main, monkeypatch, capsys, *flags, "json,srt")
    assert (code, out) == (0, "") and "rec/bad.ogg: not audio" in err and "100%" in err
    texts = folder / "texts"
    found = {str(p.relative_to(texts)) for p in texts.rglob("*") if p.is_file()}
    names = ["a.wav", "a.mp3", "sub/long", "b", "quiet"]
    assert found == {f"{name}.{kind}" for name in names for kind in ("json", "srt")}
    long = json.loads((texts / "sub/long.json").read_text())
    pieces = pauses.cut_at_pauses(rows.load_audio("rec/sub/long.flac"), net.config.window_samples)
    said = [net.decode(net.generate(piece, max_new_tokens=6)[0]).split() for piece in pieces]
    assert [s["text"].split() for s in long["segments"]] == [words for words in said if words]
    assert len(said) > 3 and long["duration"] == pytest.approx(7.2) and "cut off" in err
    ends = np.cumsum([len(piece) for piece in pieces]) / 16000
    at = [np.searchsorted(ends, [s["start"] + 1e-3, s["end"] - 1e-3]) for s in long["segments"]]
    assert all(first == last for first, last in at)  # each within its piece
    assert srt.make_legal_content((texts / "a.mp3.srt").read_text())
    # What is done stays; what is missing, or older than its recording, is done.
    before = {p: p.stat().st_mtime_ns for p in texts.rglob("*") if p.is_file()}
    (texts / "b.srt").unlink()
    os.utime("rec/a.wav", (time.time() + 9, time.time() + 9))
    assert exit_of(transcripts.main, monkeypatch, capsys, *flags, "srt,json")[0] == 0
    again = {p.name for p in before if p.stat().st_mtime_ns != before[p]}
    assert again == {"b.json", "b.srt", "a.wav.json", "a.wav.srt"}
    # Without --out_dir: JSON lines.
    code, out, err = exit_of(transcripts.main, monkeypatch, capsys, *flags[:-3])
    lines = {row["audio"]: row for row in map(json.loads, out.splitlines())}
    assert len(lines) == 6 and lines["rec/bad.ogg"]["error"] == "not audio" and code == 0
    assert lines["rec/sub/long.flac"]["text"] == long["text"] and lines["rec/sub/long.flac"]["cut"]

@pytest.mark.parametrize("argv, says", [
    ("", "--transcribe a.mp3"), ("--transcribe nowhere", "no file or folder at nowhere"),
    ("--transcribe texts", "files in texts"), ("--transcribe rec/bad.ogg", "not audio: rec/bad"),
    ("--transcribe rec --format srt", "with --out_dir"), ("--max_new_tokens 0", "at least 1"),
    ("--transcribe rec --out_dir x --format srt,doc", "--format doc: choose from txt"),
    ("--transcribe rec --out_dir rec/x.txt", "is a file"),
    ("--trancribe rec", "arguments: --trancribe"),
    ("--transcribe rec --ckpt nowhere", "no checkpoint in"), ("--device tpu", "choose from")])
def test_wrong_transcription_flags(folder, checkpoint, monkeypatch, capsys, argv, says):
    (folder / "texts").mkdir()
    argv = argv if "--ckpt" in argv else f"--ckpt {checkpoint} {argv}"
    code, _, err = exit_of(transcripts.main, monkeypatch, capsys, *argv.split())
    assert is_one_line(code, err, says)
    assert not (folder / "x").exists() and not list((folder / "texts").iterdir())

@needs_vllm
def test_server_tells_when_it_was_said(clients, tmp_path):
    wave = torch.cat([tone(1.5, 3), torch.zeros(9600), tone(3.1, 1), torch.zeros(4800), tone(1, 2)])
    def ask(kind, **settings):
        settings = dict(extra_body=dict(max_completion_tokens=10)) | settings
        return clients[0].audio.transcriptions.create(
            model="borealis", file=("a.wav", wav_bytes(wave)), response_format=kind, **settings)
    told = ask("verbose_json", timestamp_granularities=["segment"])
    assert told.duration == pytest.approx(len(wave) / 16000, abs=1e-3)
    assert told.text == ask("json").text
    assert told.text == " ".join(s.text for s in told.segments) and told.usage.seconds == 7
    times = [t for s in told.segments for t in (s.start, s.end)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= told.duration
    for s in told.segments:
        assert s.tokens and s.avg_logprob < 0 < s.compression_ratio and s.temperature == 0
    cues = list(srt.parse(ask("srt")))
    assert " ".join(c.content for c in cues).split() == told.text.split() and len(cues) >= 3
    assert ask("vtt").startswith("WEBVTT\n\n1\n00:00:0")
    with pytest.raises(Exception, match="segments only"):
        ask("verbose_json", timestamp_granularities=["word"])
    for settings in (dict(language="fr"), dict(stream=True), dict(extra_body=dict(temperature=-1)),
                     dict(extra_body=dict(use_beam_search=True))):
        with pytest.raises(Exception, match="400"):
            ask("srt", **settings)
    assert ask("verbose_json").text == told.text

# ---- support/realtime.py: a model that knows eight sentences, and their beginnings, by heart
def beginning(sample, rng):
    """Of a sentence: some of it or all, with quiet around it, and what was said by then."""
    wave, words, share = sample.audio[0], sample.answer.split(), min(1.0, rng.uniform(0.2, 1.8))
    quiet = [rng.normal(0, 20, rng.integers(0, 6000)).astype(np.int16) for _ in range(2)]
    wave = np.concatenate([quiet[0], wave[:int(share * len(wave))], quiet[1]])
    return data.Sample(" ".join(words[:int(share * len(words) + 0.1)]), [wave])

@pytest.fixture(scope="module")
def sentences():
    found = {}
    for s in data.embedded("ru", "train", 150):
        if len(s.audio[0]) <= 26000 and len(s.answer.split()) > 2:
            found.setdefault(s.answer.split()[0], s)
    return list(found.values())[:8]

@pytest.fixture(scope="module")
def heard(sentences, tmp_path_factory):
    """The address of a server of that model."""
    torch.manual_seed(0)
    tokenizer, rng = tiny.train_tokenizer(tiny.texts_of(sentences), 400), np.random.default_rng(0)
    net = nb.BorealisForConditionalGeneration(tiny.tiny_config(tokenizer)).train()
    net.freeze()  # nothing: the encoder learns, too
    optimizer, net.tokenizer = torch.optim.AdamW(net.parameters()), tokenizer
    for step in range(240):
        batch = data.Dataset([beginning(s, rng) for s in sentences], tokenizer, net.config)
        net(**batch.pad([batch.item(i) for i in range(8)])).loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, step / 20) * (1 - step / 240)
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("by_heart")
    net.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for s in sentences:
        assert net.decode(net.generate(rows.load_audio(s.audio[0]))[0]) == s.answer
    server = process, *_, client = start(tmp_path_factory.mktemp("live"), "--ckpt", folder)
    try:
        wait_for(*server)
        yield f"ws://127.0.0.1:{client.base_url.port}/v1/realtime"
    finally:
        process.terminate()
        process.wait(60)

QUIET = np.zeros(12800, np.int16)  # 0.8 s

class Speaker:
    """A client of the socket, which remembers how much it had sent when an event came."""
    def __init__(self, address: str, model: str = "borealis"):
        self.socket, self.sent, self.events = connect(address), 0, []
        assert json.loads(self.socket.recv())["type"] == "session.created"
        self.send(type="session.update", model=model)
        self.send(type="input_audio_buffer.commit")

    def send(self, **event):
        self.socket.send(json.dumps(event))

    def say(self, wave: np.ndarray, pace: float = 0.0, chunk: int = 2048):
        """pace: times real time; 0: at once."""
        for i in range(0, len(wave), chunk):
            part = wave[i:i + chunk].astype("<i2")
            self.sent += len(part)
            time.sleep(len(part) / 16000 / pace if pace else 0)
            self.send(type="input_audio_buffer.append", audio=base64.b64encode(part).decode())

    def hear(self, until: str = "transcription.done") -> str:
        """The text of events up to one of this type, or with this text."""
        text = ""
        while True:
            event = json.loads(self.socket.recv(timeout=60))
            self.events.append((self.sent / 16000, event))
            text += event.get("delta", "")
            if event["type"] == until or until in event.get("delta", ""):
                return text

    def end(self) -> str:
        """-> the whole text, which is that of all deltas."""
        self.send(type="input_audio_buffer.commit", final=True)
        self.hear()
        text = self.events[-1][1]["text"]
        assert "".join(e.get("delta", "") for _, e in self.events) == text
        self.socket.close()
        return text

def talk(address, sentences, pace=0.0):
    """Sentences with 0.8 s of quiet between -> what was heard, and how late each phrase was."""
    speaker, ends = Speaker(address), []
    listener = ThreadPoolExecutor(1).submit(speaker.hear)
    for s in sentences:
        speaker.say(np.concatenate([QUIET, s.audio[0]]), pace)
        ends.append(speaker.sent / 16000)
    speaker.say(QUIET, pace)
    speaker.send(type="input_audio_buffer.commit", final=True)
    listener.result(60)
    done = [at for at, event in speaker.events if "\n" in event.get("delta", "")]
    assert len(done) == len(sentences), speaker.events
    return speaker.events[-1][1]["text"], np.subtract(done, ends)

def lines(sentences) -> str:
    return "".join(f"{s.answer}\n" for s in sentences)

@needs_vllm
@pytest.mark.heavy
def test_one_speaker_and_eight_at_once(heard, sentences):
    """Each phrase once, in order, by the model's words; early where the machine keeps up."""
    text, late = talk(heard, sentences, pace=1)
    assert text == lines(sentences)
    assert np.median(late) <= 1.0, late  # seconds of sound after the end of the phrase
    orders = [sentences[i:] + sentences[:i] for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        heard_by = list(pool.map(talk, [heard] * 8, orders))
    assert [text for text, _ in heard_by] == [lines(order) for order in orders]

@needs_vllm
@pytest.mark.heavy
def test_words_come_before_their_phrase_is_over(heard, sentences):
    speaker, longest = Speaker(heard), max(sentences, key=lambda s: len(s.audio[0]))
    speaker.say(np.concatenate([QUIET, longest.audio[0]]), pace=0.7)
    early = speaker.hear(longest.answer.split()[0])
    assert longest.answer.startswith(early) and "\n" not in early
    speaker.say(QUIET)
    assert speaker.end() == lines([longest])

@needs_vllm
@pytest.mark.heavy
def test_silence_says_nothing_and_brings_nothing_back(heard, sentences):
    first, second = sentences[:2]
    speaker, noise = Speaker(heard), np.random.default_rng(0).normal(0, 30, 160000)
    speaker.say(np.concatenate([first.audio[0], QUIET]))
    assert speaker.hear("\n") == lines([first])
    speaker.say(np.concatenate([noise, second.audio[0], noise]))
    assert speaker.hear("\n") == lines([second])
    assert speaker.end() == lines([first, second])
    quiet = Speaker(heard)
    quiet.say(np.concatenate([np.zeros(80000), noise]))
    assert quiet.end() == ""
    assert Speaker(heard).end() == ""  # nothing was sent at all

@needs_vllm
@pytest.mark.heavy
def test_clients_that_vanish_or_send_garbage(heard, sentences):
    for _ in range(5):  # in mid-word
        speaker = Speaker(heard)
        speaker.say(sentences[0].audio[0][:12000])
        speaker.socket.socket.close()
    speaker = Speaker(heard)
    garbage = ["{", "[]", "7", "{}", '{"type": "x"}', '{"type": "input_audio_buffer.append"}']
    garbage += [json.dumps(dict(type="input_audio_buffer.append", audio=a)) for a in ("", "AA=", 7)]
    for frame in garbage:
        speaker.socket.send(frame)
        assert speaker.hear("error") == "", frame
        message = speaker.events.pop()[1]["error"]
        assert message and "Traceback" not in message and "object has no" not in message
    speaker.say(np.concatenate([sentences[0].audio[0], QUIET]))
    assert speaker.end() == lines(sentences[:1])
    unknown = Speaker(heard, model="whisper")
    assert unknown.hear("error") == "" and "whisper" in unknown.events[-1][1]["error"]
    binary = Speaker(heard)
    binary.socket.send(b"\0\1")
    with pytest.raises(ConnectionClosed):
        binary.hear()
    assert talk(heard, sentences[:2])[0] == lines(sentences[:2])

@needs_vllm
@pytest.mark.heavy
def test_ten_minutes_are_as_quick_as_one(heard, sentences):
    """Phrase by phrase: the time to answer does not grow, nor does the prompt."""
    speaker, took, n = Speaker(heard), [], 0
    while speaker.sent < 600 * 16000:
        s, n = sentences[n % 8], n + 1
        speaker.say(np.concatenate([s.audio[0], QUIET]), chunk=100_000)
        began = time.perf_counter()
        assert speaker.hear("\n") == lines([s])
        took.append(time.perf_counter() - began)
    assert speaker.end().count("\n") == n > 200
    assert np.median(took[-40:]) < 2 * np.median(took[:40])

@needs_vllm
@pytest.mark.heavy
def test_live_is_a_client_of_the_socket(heard, sentences, tmp_path):
    """A microphone on standard input, which Ctrl-C ends, and a file that ends by itself."""
    url, pipe = heard.replace("ws:", "http:").removesuffix("/realtime"), subprocess.PIPE
    command = [sys.executable, HERE / "serve_vllm.py", "--live", "--server", url]
    file, microphone = (subprocess.Popen(command, cwd=tmp_path, stdin=pipe, stdout=pipe)
                        for _ in range(2))
    for s in sentences[:2]:
        microphone.stdin.write(np.concatenate([s.audio[0], QUIET]).astype("<i2").tobytes())
    microphone.stdin.flush()
    assert microphone.stdout.readline().decode() == lines(sentences[:1])
    assert microphone.stdout.readline().decode() == lines(sentences[1:2])
    microphone.stdin.write(sentences[2].audio[0].astype("<i2").tobytes()[:-1])  # half a sample less
    microphone.stdin.flush()
    time.sleep(1)
    microphone.send_signal(signal.SIGINT)
    out, _ = microphone.communicate(timeout=60)
    assert out.decode() == lines(sentences[2:3]) and microphone.returncode == 0
    pcm = sentences[0].audio[0].astype("<i2").tobytes()
    assert file.communicate(pcm + b"x", timeout=60)[0].decode() == lines(sentences[:1])

@needs_vllm
@pytest.mark.heavy
@pytest.mark.skipif(not (HERE / "out" / "results.json").exists(), reason="make demo comes first")
def test_books_are_heard_live_as_well_as_in_files(tmp_path):
    """WER of 150 sentences in real time, eight at once, and of the same as files: within 10 %."""
    server = process, *_, client = start(tmp_path, "--ckpt", HERE / "out")
    samples = evaluation.embedded_split("ru", "books", 150, 0)
    address = f"ws://127.0.0.1:{client.base_url.port}/v1/realtime"
    def live(sample):
        speaker = Speaker(address)
        speaker.say(sample.audio[0], pace=1)
        return speaker.end()
    def as_file(sample):
        file = "a.wav", wav_bytes(sample.audio[0])
        return client.audio.transcriptions.create(model="borealis", file=file).text
    def wer(hear):
        with ThreadPoolExecutor(8) as pool:
            pairs = zip(samples, pool.map(hear, samples), strict=True)
        counts = [evaluation.edits(*map(evaluation.normalise, (s.answer, h))) for s, h in pairs]
        return float(evaluation.percent(np.array(counts)))
    try:
        wait_for(*server)
        files, lives = wer(as_file), wer(live)
    finally:
        process.terminate()
        process.wait(60)
    print(f"WER of files {files:.2f}, live {lives:.2f}")
    assert lives <= 1.1 * files
