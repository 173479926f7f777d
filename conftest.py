"""What the tests share: a random model, recordings, stand-ins of what the hub has."""
import atexit
import contextlib
import copy
import io
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the hub; a wrong name shall fail at once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow other processes down

import datasets
import numpy as np
import pytest
import soundfile
import torch
import transformers as hf
import data
import model as nb
import train
from support import checkpoint as checkpoints
from support import cli, decoding, engine, meter, recipes, storage, tiny
from support.rows import load_audio

openai = None
with contextlib.suppress(ImportError):  # vLLM brings it
    import openai

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"  # real data beside the project; users do not have it
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared/ beside the project")
A, M, newest = nb.AUDIO, nb.MARKER, storage.newest_step

def tone(seconds: float, seed: int = 0) -> torch.Tensor:
    """Not speech, but not silence: a noisy chirp, float32 at 16 kHz."""
    t = torch.arange(round(seconds * 16000)) / 16000
    noise = torch.randn(len(t), generator=torch.Generator().manual_seed(seed))
    return 0.3 * torch.sin(2 * torch.pi * (200 + 300 * seed + 400 * t) * t) + 0.05 * noise

def pcm(seconds: float, seed: int = 0) -> np.ndarray:
    """The same as int16 samples, as the embedded corpus keeps them."""
    return (tone(seconds, seed) * 9999).numpy().astype(np.int16)

def wav_bytes(wave, rate: int = 16000, kind: str = "WAV", subtype: str | None = None) -> bytes:
    soundfile.write(buffer := io.BytesIO(), np.asarray(wave), rate, format=kind, subtype=subtype)
    return buffer.getvalue()

def flac(wave, rate: int = 16000, channels: int = 1, total: int = 0) -> bytes:
    """A FLAC whose header says so, in 20, 3, 5 and 36 bits; total: samples, 0 if from a pipe."""
    file = wav_bytes(wave, kind="FLAC")
    bits = rate << 44 | channels - 1 << 41 | 15 << 36 | total
    return file[:18] + bits.to_bytes(8, "big") + file[26:]

def write_manifest(path: Path, rows: list) -> str:
    """Rows as dicts, or as text where a line should be broken -> the path."""
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)

def rows_in(out) -> list[dict]:
    return [*map(json.loads, meter.metrics(Path(out) / "metrics.jsonl", 10**9).splitlines())]

def train_now(monkeypatch, *flags):
    """train.main() in this process, signals left alone -> (exit code, rows of metrics.jsonl)."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    return train.main(), rows_in(flags[flags.index("--out") + 1])

def exit_of(main, monkeypatch, capsys, *argv):
    """What a user sees: (exit code, stdout, stderr) of a script's main."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, argv)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        cli.run(main)
    text = capsys.readouterr()
    return e.value.code or 0, text.out, text.err

def is_one_line(code: int, err: str, says: str) -> bool:
    """Is it a user's mistake as it should be: exit code 2, one line, no traceback?"""
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    return code == 2 and len(lines) == 1 and says in lines[0] and "Traceback" not in err

def torchrun(processes: int, *flags, script: str = "train.py", code: int = 0):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(HERE / script)]
    result = subprocess.run([*command, *map(str, flags)], capture_output=True, text=True, env=env,
                            timeout=300)
    assert result.returncode == code, result.stderr[-2000:]
    return result.stderr

# A fresh Python imports for seconds before it does anything. Forks of one that has done that, and
# has computed nothing, start at once: for tests of what comes after.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "train", "eval", "peft", "conftest", "support.realtime", "support.uploads",
    "vllm.entrypoints.llm", "vllm.entrypoints.launchers.api_server.entry",
    "vllm.v1.worker.cpu_worker"])

def open_forks() -> None:
    with pytest.MonkeyPatch.context() as patch:  # what it starts with is what its forks know
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(HERE))
        forkserver.ensure_running()

class Fork(FORKS.Process):
    """`python SCRIPT ARGV`, with what tests use of Popen. Outputs go to files, by default one."""
    def __init__(self, script: str | Path, *argv, out: Path, err: Path | None = None, cwd=HERE,
                 **env):
        super().__init__()
        self.script, self.argv, self.cwd = str(HERE / script), [*map(str, argv)], str(cwd)
        self.out, self.err, self.env = out, err or out, os.environ | env
        open_forks()
        self.start()
    def run(self):
        multiprocessing.set_start_method("fork", force=True)  # Python's default, for its workers
        signal.signal(signal.SIGINT, signal.default_int_handler)  # `make test &` ignores Ctrl-C
        for number, path in ((1, self.out), (2, self.err)):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, number)
            os.close(file)
        os.environ.update(self.env)  # what imports have set stays
        decoding.RANK = int(os.environ.get("RANK", 0))  # but this is read when it is imported
        decoding.WORLD = int(os.environ.get("WORLD_SIZE", 1))
        os.chdir(self.cwd)
        sys.argv = [self.script, *self.argv]
        try:
            runpy.run_path(self.script, run_name="__main__")
        finally:
            atexit._run_exitfuncs()  # as Python does when it ends; multiprocessing leaves them out
    def poll(self) -> int | None:
        return self.exitcode
    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.script, timeout)
        return self.exitcode
    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()
    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)
    returncode = property(poll)

def pytest_sessionfinish():  # Python would wait for them
    for process in multiprocessing.active_children():
        process.kill()

def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]

def fork_ranks(processes: int, *flags, script: str = "train.py", **env) -> str:
    """As torchrun(), but forks, without its agent -> their stderr."""
    env |= dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with tempfile.TemporaryDirectory() as place:
        ranks = [Fork(script, *flags, out=Path(place, "out"), err=Path(place, str(rank)),
                      RANK=str(rank), LOCAL_RANK=str(rank), **env) for rank in range(processes)]
        until = time.monotonic() + 300
        while any(p.poll() is None for p in ranks) and not any(p.poll() for p in ranks):
            assert time.monotonic() < until, "ranks hang"
            time.sleep(0.02)
        for process in ranks:  # of one that failed, the others would wait for ever
            process.kill()
        said = "".join(process.communicate(60)[1] for process in ranks)
        assert [process.returncode for process in ranks] == [0] * processes, said[-3000:]
    return said

def losses(rows) -> np.ndarray:
    return np.array([r["loss"] for r in rows])

@pytest.fixture(scope="session")
def plain_tokenizer():
    texts = ["анна купила девять конфет", "the cat sleeps under the table",
             "сейчас семь часов двадцать минут"]
    samples = [data.Sample(t, question=nb.ASR_PROMPT.replace(A, "")) for t in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "add_audio_tokens", lambda tokenizer: tokenizer)
        return tiny.train_tokenizer(tiny.texts_of(samples), 600)

@pytest.fixture(scope="session")
def tokenizer(plain_tokenizer):
    return checkpoints.add_audio_tokens(copy.deepcopy(plain_tokenizer))

@pytest.fixture(scope="session")
def net(tokenizer):
    torch.manual_seed(0)
    net = nb.BorealisForConditionalGeneration(tiny.tiny_config(tokenizer)).eval()
    net.tokenizer = tokenizer
    return net

@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, net, tokenizer):
    out = tmp_path_factory.mktemp("ckpt")
    net.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "train_config.json").write_text(
        json.dumps(dict(preset="tiny", embedded=True, lang="ru", seed=0)))
    return out

@pytest.fixture(scope="session")
def corpus():
    spoken = data.embedded("ru", "train", 150)
    return [s for s in spoken if len(s.audio[0]) <= 32000][:60]  # of one window

@pytest.fixture(scope="session")
def manifest(tmp_path_factory, corpus):
    """32 rows: recordings of one and of several windows, and text-only conversations."""
    folder, rows = tmp_path_factory.mktemp("own"), []
    for i, s in enumerate(corpus[:26]):
        wave = s.audio[0] if i % 5 else np.concatenate([s.audio[0]] * 3)
        soundfile.write(folder / f"{i}.wav", wave, 16000)
        rows.append({"audio": f"{i}.wav", "text": s.answer} if i % 4 else
                    {"audio": f"{i}.wav", "question": "что слышно?", "answer": s.answer})
    rows += [{"conversation": [{"role": "user", "content": f"скажи {s.answer}"},
                               {"role": "assistant", "content": s.answer}]} for s in corpus[26:32]]
    return write_manifest(folder / "own.jsonl", rows)

@pytest.fixture
def bad_files(tmp_path):
    (tmp_path / "noise.wav").write_bytes(b"RIFF this is no recording" * 9)
    for name, wave in dict(nan=torch.full((8000,), torch.nan), short=tone(0.09), good=tone(1),
                           silent=torch.zeros(16000)).items():
        (tmp_path / f"{name}.wav").write_bytes(wav_bytes(wave, subtype="FLOAT"))
    return tmp_path

@pytest.fixture
def four(corpus, tmp_path):
    """A manifest of the four sentences the baseline knows, and of two of them in one recording."""
    a, b, *_ = corpus
    both = np.concatenate([a.audio[0], np.zeros(8000, np.int16), b.audio[0]])
    spoken = {str(i): (s.audio[0], f"{s.answer.upper()}!") for i, s in enumerate(corpus[:4])}
    spoken["both"] = both, f"{a.answer} {b.answer}"
    for name, (wave, _) in spoken.items():
        soundfile.write(tmp_path / f"{name}.wav", wave, 16000)
    rows = [{"audio": f"{name}.wav", "text": text} for name, (_, text) in spoken.items()]
    return write_manifest(tmp_path / "four.jsonl", rows)

# ---- Stand-ins of what the hub has: sizes are smaller, and all else is as published.
PUBLISHED = json.loads((HERE / "support" / "published.json").read_text())
FIRST = {"Qwen": 151643, "openai": 50257}  # <|endoftext|>: their other special tokens follow it
QWEN = dict(hidden_size=64, num_hidden_layers=2, max_window_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, intermediate_size=96)
WHISPER = dict(d_model=64, num_hidden_layers=1, max_source_positions=100, max_target_positions=40,
               max_length=40)  # a window of 2 s
for part in ("encoder", "decoder"):
    WHISPER |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 256}

def published(repo: str, file: str, tokenizer, **sizes) -> dict:
    """A file's fields, these and no other; special tokens by their ids in another tokenizer."""
    first, end = FIRST[repo.split("/")[0]], tokenizer.convert_tokens_to_ids("<|endoftext|>")
    def moved(value):
        if isinstance(value, dict):
            return {key: moved(v) for key, v in value.items()}
        if isinstance(value, list):
            return [moved(v) for v in value]
        return value - first + end if isinstance(value, int) and value >= first - 1 else value
    fields = PUBLISHED[repo][file]
    assert sizes.keys() <= fields.keys()
    return {key: moved(v) if "_id" in key else v for key, v in fields.items()} | sizes

def write_weights(model, folder: Path, **files) -> None:
    """Weights in the published dtype, in shards; then the files, by hand: transformers would add
    fields to config.json and rename some."""
    dtype = getattr(torch, files["config"]["torch_dtype"])
    model.to(dtype).save_pretrained(folder, max_shard_size="100KB")
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields, indent=2))

def whisper_tokenizer(texts: list[str]):
    """BPE of these texts, and the special tokens of whisper-large-v3 for windows of 2 s."""
    bpe = json.loads(tiny.train_tokenizer(texts, 400).backend_tokenizer.to_str())["model"]
    end = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    tokenizer = hf.WhisperTokenizer(
        vocab=bpe["vocab"], merges=[tuple(m) for m in bpe["merges"]], **end)
    languages = PUBLISHED[nb.ENCODER]["generation_config.json"]["lang_to_id"]
    names = ["<|endoftext|>", "<|startoftranscript|>", *sorted(languages, key=languages.get)]
    tasks = "translate transcribe startoflm startofprev nospeech notimestamps"
    for name in tasks.split():
        names.append(f"<|{name}|>")
    names += [f"<|{i * 0.02:.2f}|>" for i in range(101)]
    tokenizer.add_tokens(names, special_tokens=True)
    return tokenizer

def write_whisper(folder: Path, corpus, known: int = 0) -> None:
    """whisper-large-v3, random, or knowing so many sentences by heart; in English it says "no" to
    each, so that a test sees which language was forced."""
    tokenizer = whisper_tokenizer([s.answer for s in corpus])
    first = [tokenizer.convert_tokens_to_ids("Ġ"), tokenizer.eos_token_id]  # not: silence, the end
    special = PUBLISHED[nb.ENCODER]["generation_config.json"]["suppress_tokens"][-6:]
    special = [i - FIRST["openai"] + tokenizer.eos_token_id for i in special]
    def file(kind, **sizes):
        return published(nb.ENCODER, f"{kind}.json", tokenizer, **sizes)
    config = file("config", **WHISPER, vocab_size=len(tokenizer), begin_suppress_tokens=first)
    torch.manual_seed(0)
    std = 0.1 if known else config["init_std"]  # learns sooner
    model = hf.WhisperForConditionalGeneration(hf.WhisperConfig(**config | dict(init_std=std)))
    if known:
        learn_by_heart(model, tokenizer, corpus[:known])
    tokenizer.save_pretrained(folder)
    write_weights(
        model, folder, config=config, generation_config=file(
            "generation_config", alignment_heads=[[0, 0]], max_length=WHISPER["max_length"],
            begin_suppress_tokens=first, suppress_tokens=special),
        preprocessor_config=file("preprocessor_config", chunk_length=2, n_samples=32000,
                                 nb_max_frames=200))

def learn_by_heart(model, tokenizer, samples) -> None:
    ids, end = tokenizer.convert_tokens_to_ids, tokenizer.eos_token_id
    rows = []
    for s in samples:
        for language, text in (("<|ru|>", s.answer), ("<|en|>", "no")):
            head = ids(["<|startoftranscript|>", language, "<|transcribe|>", "<|notimestamps|>"])
            rows.append([*head, *tokenizer(text, add_special_tokens=False).input_ids, end])
    waves = [load_audio(s.audio[0]).numpy() for s in samples for _ in range(2)]
    extractor = nb.feature_extractor(model.config.num_mel_bins, chunk_length=2)
    mel = extractor(waves, sampling_rate=16000, return_tensors="pt").input_features
    L = max(map(len, rows))
    inputs = torch.tensor([r[:-1] + [end] * (L - len(r)) for r in rows])
    labels = torch.tensor([[-100] * 3 + r[4:] + [-100] * (L - len(r)) for r in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(120):
        loss = model(input_features=mel, decoder_input_ids=inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05

@pytest.fixture(scope="session")
def baseline(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("baseline") / "whisper-tiny"
    write_whisper(folder, corpus, known=4)
    return folder

def write_qwen(folder: Path, tokenizer) -> None:
    """Qwen3-4B, random, its vocabulary padded as there."""
    torch.manual_seed(1)
    sizes = QWEN | (dict(vocab_size=1500) if len(tokenizer) < 1500 else {})
    config = published(nb.LLM, "config.json", tokenizer, **sizes)
    tokenizer.save_pretrained(folder)
    varied = hf.Qwen3Config(**config | dict(initializer_range=0.1))  # else it repeats one token
    write_weights(hf.Qwen3ForCausalLM(varied), folder, config=config,
                  generation_config=published(nb.LLM, "generation_config.json", tokenizer))

@pytest.fixture(scope="session")
def parts(tmp_path_factory, corpus, tokenizer, plain_tokenizer):
    """A Whisper, a Qwen3 that knows our tokens, and, as on the hub, a plain one that does not."""
    folder = tmp_path_factory.mktemp("parts")
    write_whisper(folder / "encoder", corpus)
    for name, own in (("llm", tokenizer), ("plain", plain_tokenizer)):
        write_qwen(folder / name, own)
    return {path.name: str(path) for path in folder.iterdir()}

def write_original(folder: Path, encoder: str, llm: str) -> None:
    """As the original's Trainer leaves it: one pickle, its own tokens, the head stored twice."""
    torch.manual_seed(3)
    qwen = hf.Qwen3ForCausalLM.from_pretrained(llm)
    # Start and end of a recording: <|AUDIO|> has no row.
    qwen.resize_token_embeddings(len(hf.AutoTokenizer.from_pretrained(llm)) + 2)
    whisper = hf.WhisperModel.from_pretrained(encoder).encoder.to(qwen.dtype)
    weights = {f"encoder.{k}": v for k, v in whisper.state_dict().items()}
    weights |= {f"llm.{k}": v for k, v in qwen.state_dict().items()}
    D, E = QWEN["hidden_size"], WHISPER["d_model"]
    weights["adapter.w_in.weight"] = (torch.randn(D, 4 * E) / 16).to(qwen.dtype)
    weights["adapter.w_out.weight"] = (torch.randn(D, D) / 8).to(qwen.dtype)
    weights["llm.lm_head.weight"] = weights["llm.model.embed_tokens.weight"].clone()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "pytorch_model.bin")

@pytest.fixture(scope="session")
def original(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("original")
    write_original(folder, parts["encoder"], parts["plain"])
    return folder

def clip(sample, kind: str = "FLAC") -> dict:
    """The audio column of a parquet file on the hub: encoded bytes and a name."""
    return {"bytes": wav_bytes(sample.audio[0], kind=kind), "path": f"clip.{kind.lower()}"}

@pytest.fixture(scope="session")
def hub(tmp_path_factory, corpus):
    root, some = tmp_path_factory.mktemp("hub"), corpus[:12]
    audio = datasets.Audio(sampling_rate=16000)
    def write(name, split, where="data", shards=1, **columns):
        n = max(len(v) for v in columns.values() if isinstance(v, list))
        table = datasets.Dataset.from_dict(
            {k: v if isinstance(v, list) else [v] * n for k, v in columns.items()})
        table = table.cast_column("audio", audio) if "audio" in columns else table
        for k in range(shards):
            file = root / "Vikhrmodels" / name / where / f"{split}-{k:05d}-of-{shards:05d}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            table.shard(shards, k, contiguous=True).to_parquet(file)
    clips, texts = [clip(s) for s in some], [s.answer for s in some]
    voice = dict(text_description="спокойный голос", voice_name="анна")
    write("ToneBooks", "train", audio=clips, text=texts, shards=2, **voice)
    write("ToneBooks", "validation", audio=[clip(corpus[20])], text="не для нас", **voice)
    write("Speech-Instructions", "train", audio=[clip(s, "WAV") for s in some],
          question="Что сказано?", answer=texts)
    write("AudioBooksInstructGemini2.5", "train", audio=[clip(s, "MP3") for s in some], text=texts,
          question=f"О чём речь? {nb.TAG_PAIR}", answer="О разном.", task_type="ner",
          conversations="[]", voice_name="анна")
    chats = [[dict(role="system", content="Отвечай кратко."),
              dict(role="user", content=f"Вопрос {i}"),
              dict(role="assistant", content=f"Ответ {i}")] for i in range(15)]
    for split in ("train", "test"):
        write("GrandMaster-PRO-MAX", split, conversation=chats, answer_lang=["ru", "en", "ru"] * 5,
              prompt_lang=["ru", "en", "en"] * 5)
    write("Speech-Describe", "500k_part1_nonspeech", audio=clips, question="What is it?",
          answer="a bell")
    write("ToneSlavic", "train", audio=clips, sentence=texts, locale=["ru", "be", "uk"] * 4)
    for config in ("Crowd", "Farfield"):
        write("ToneGolosOpus", "train", config, audio=clips[:3], text=config, original_text="")
    for split in recipes.BENCHMARK:
        write("RuASRBenchmark", split, audio=clips[:3], text=texts[:3])
    return root

# ---- The real server
needs_vllm = pytest.mark.vllm
def pytest_collection_modifyitems(items):
    for item in items:  # the rehearsal's server needs what its other tests have trained
        asks = item.get_closest_marker("vllm") and "test_rehearsal" not in item.nodeid
        if asks or "test_faults" in item.nodeid:
            item.add_marker(pytest.mark.half)

def pytest_runtest_setup(item):
    if item.get_closest_marker("vllm") and not engine.INSTALLED:
        pytest.skip("vLLM is not installed: make vllm")

def begin(place, script, *argv, out=subprocess.PIPE):
    command = [sys.executable, HERE / script, *map(str, argv)]
    return subprocess.Popen(command, cwd=place, env=os.environ | beside(place), stdout=out,
                            stderr=out)

def beside(place) -> dict[str, str]:  # environment of what runs vLLM in a folder of its own
    return dict(VLLM_CPU_KVCACHE_SPACE="1", PYTHONPATH="", NANOBOREALIS_CACHE=f"{place}/cache")

def start(place, *argv, fresh: bool = False):
    argv += "--limit-mm-per-prompt", '{"audio": 2}'
    port, log = free_port(), place / "log"
    argv = "serve_vllm.py", "--port", port, *argv
    if fresh:
        with open(log, "w") as file:
            process = begin(place, *argv, out=file)
    else:
        log.touch()
        process = Fork(*argv, out=log, cwd=place, **beside(place))
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)
    return process, log, client

def wait_for(process, log, client):
    for _ in range(180):
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(openai.APIConnectionError):
            return client.models.list()
        time.sleep(1)

@pytest.fixture(scope="session", autouse=True)
def early(request):
    """What takes long to start does so beside the first tests, on the other core."""
    open_forks()  # before the corpus, which would start a server of forks without these imports
    if any("clients" in item.fixturenames for item in request.session.items) and engine.INSTALLED:
        request.getfixturevalue("servers")

@pytest.fixture(scope="session")
def servers(tmp_path_factory, checkpoint, original, parts):
    flags = [["--ckpt", checkpoint, "--max_audio_seconds", 20],
             ["--ckpt", original, "--encoder", parts["encoder"], "--llm", parts["plain"],
              "--allowed-media-domains", "localhost"]]
    started = [start(tmp_path_factory.mktemp("server"), *argv, fresh=argv is flags[0])
               for argv in flags]
    yield started
    for process, *_ in started:
        process.terminate()
    for process, *_ in started:
        process.wait(60)

@pytest.fixture(scope="session")
def clients(servers):
    for server in servers:
        wait_for(*server)
    return [client for *_, client in servers]
