"""What the tests share: a random model, recordings, stand-ins of what the hub has."""
import copy
import io
import json
import os
import signal
import subprocess
import sys
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
from support import cli, meter, recipes, storage, tiny
from support.rows import load_audio

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
    return meter.read_metrics(Path(out) / "metrics.jsonl", 10**9)

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

def torchrun(processes: int, *flags, script: str = "train.py"):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(HERE / script)]
    result = subprocess.run([*command, *map(str, flags)], capture_output=True, text=True, env=env,
                            timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stderr

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
    return nb.add_audio_tokens(copy.deepcopy(plain_tokenizer))

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
    return data.embedded("ru", "train", 60)

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

def whisper_config(width: int, size: int, end: int = 0, start: int = 0, **more) -> hf.WhisperConfig:
    """One layer, a window of 2 s."""
    for part in ("encoder", "decoder"):
        more |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 2 * width}
    return hf.WhisperConfig(d_model=width, max_source_positions=100, vocab_size=size, **more,
                            pad_token_id=end, bos_token_id=end, eos_token_id=end,
                            decoder_start_token_id=start)

@pytest.fixture(scope="session")
def parts(tmp_path_factory, tokenizer, plain_tokenizer):
    """A tiny Whisper and Qwen3, vocabulary padded. plain: without our tokens, as on the hub."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(1)
    hf.WhisperModel(whisper_config(32, 50, num_mel_bins=128)).save_pretrained(folder / "encoder")
    ids = tokenizer.convert_tokens_to_ids
    llm = hf.Qwen3ForCausalLM(hf.Qwen3Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, intermediate_size=96, vocab_size=1500, tie_word_embeddings=True,
        max_position_embeddings=4096, eos_token_id=ids("<|im_end|>"),
        pad_token_id=ids("<|endoftext|>")))
    llm.generation_config.update(do_sample=True, temperature=0.6, top_p=0.95, top_k=20)  # as 4B
    for name, own in (("llm", tokenizer), ("plain", plain_tokenizer)):
        llm.save_pretrained(folder / name)
        own.save_pretrained(folder / name)
    return {path.name: str(path) for path in folder.iterdir()}

@pytest.fixture(scope="session")
def original(tmp_path_factory, parts, plain_tokenizer):
    """As the original's Trainer leaves it: one pickle, its own tokens, the head stored twice."""
    folder = tmp_path_factory.mktemp("original")
    torch.manual_seed(3)
    llm = hf.Qwen3ForCausalLM.from_pretrained(parts["plain"])
    llm.resize_token_embeddings(len(plain_tokenizer) + 2)  # start and end: <|AUDIO|> has no row
    encoder = hf.WhisperModel.from_pretrained(parts["encoder"]).encoder
    weights = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    weights |= {f"llm.{k}": v for k, v in llm.state_dict().items()}
    weights["adapter.w_in.weight"] = torch.randn(64, 4 * 32) / 16
    weights["adapter.w_out.weight"] = torch.randn(64, 64) / 8
    weights["llm.lm_head.weight"] = weights["llm.model.embed_tokens.weight"].clone()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder

def clip(sample, kind: str = "FLAC") -> dict:
    """The audio column of a parquet file on the hub: encoded bytes and a name."""
    return {"bytes": wav_bytes(sample.audio[0], kind=kind), "path": f"clip.{kind.lower()}"}

@pytest.fixture(scope="session")
def hub(tmp_path_factory, corpus):
    root, some = tmp_path_factory.mktemp("hub"), corpus[:12]
    audio = datasets.Audio(sampling_rate=16000, decode=False)
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
    write("GrandMaster-PRO-MAX", "train", conversation=chats, prompt_lang=["ru", "en", "en"] * 5,
          answer_lang=["ru", "en", "ru"] * 5)
    write("Speech-Describe", "500k_part1_nonspeech", audio=clips, question="What is it?",
          answer="a bell")
    write("ToneSlavic", "train", audio=clips, sentence=texts, locale=["ru", "be", "uk"] * 4)
    for config in ("Crowd", "Farfield"):
        write("ToneGolosOpus", "train", config, audio=clips[:3], text=config, original_text="")
    for split in recipes.BENCHMARK:
        write("RuASRBenchmark", split, audio=clips[:3], text=texts[:3])
    return root

@pytest.fixture(scope="session")
def baseline(tmp_path_factory, corpus):
    bpe = tiny.train_tokenizer([s.answer for s in corpus], 400).backend_tokenizer.to_str()
    bpe = json.loads(bpe)["model"]
    tokenizer = hf.WhisperTokenizer(vocab=bpe["vocab"], merges=[tuple(m) for m in bpe["merges"]])
    special = "endoftext startoftranscript en ru translate transcribe startofprev notimestamps"
    tokenizer.add_tokens([f"<|{t}|>" for t in special.split()], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids
    extractor = nb.feature_extractor(80, chunk_length=2)
    end, start = ids("<|endoftext|>"), ids("<|startoftranscript|>")
    torch.manual_seed(0)
    model = hf.WhisperForConditionalGeneration(whisper_config(
        64, len(tokenizer), end, start, num_mel_bins=80, max_target_positions=40, init_std=0.1))
    settings = model.generation_config
    settings.is_multilingual, settings.no_timestamps_token_id = True, ids("<|notimestamps|>")
    settings.lang_to_id = {t: ids(t) for t in ("<|en|>", "<|ru|>")}
    settings.task_to_id = {t: ids(f"<|{t}|>") for t in ("transcribe", "translate")}
    rows = []
    for s in corpus[:4]:  # in English it says "no", so that a test sees which language was forced
        for language, text in (("<|ru|>", s.answer), ("<|en|>", "no")):
            head = [start, ids(language), ids("<|transcribe|>"), ids("<|notimestamps|>")]
            rows.append([*head, *tokenizer(text, add_special_tokens=False).input_ids, end])
    waves = [load_audio(s.audio[0]).numpy() for s in corpus[:4] for _ in range(2)]
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
    folder = tmp_path_factory.mktemp("baseline") / "whisper-tiny"
    model.save_pretrained(folder)
    hf.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder
