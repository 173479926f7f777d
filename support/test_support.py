"""support/test_support.py -- what the rooms behind the chapters promise."""
import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import weakref
from itertools import product
from pathlib import Path
import datasets
import numpy as np
import pytest
import soundfile
import torch
import torch.distributed as dist
import transformers as hf
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
import data
import eval as evaluation
import model as nb
import train
from conftest import HERE, PUBLISHED, A, M, exit_of, is_one_line, losses, newest, pcm, tone

# isort: split
from conftest import Fork, clip, flac, train_now, wav_bytes, write_manifest
from support import banks, bench, export, lora, meter, pauses, ranks, recipes

from support import report, tasks, tiny  # isort: skip
from support import checkpoint as ckpt
from support import corpus as spoken
from support.cli import UserError

# ---- support/checkpoint.py, support/storage.py, support/lora.py and support/export.py
HEAD, LORA = "llm.lm_head.weight", dict(rank=4, alpha=8, dropout=0.0)
RUN = ["--preset", "ru_only", "--workers", 0, "--lora_rank", 4, "--lr", 1e-3,
       "--effective_batch", 4, "--steps", 2]
def said(net):
    return net.generate(tone(1), max_new_tokens=8).tolist()

def batch_of(net, *samples):
    rows = data.Dataset(list(samples), net.tokenizer, net.config)
    return rows.pad([rows.item(i) for i in range(len(samples))])

def test_from_parts_keeps_pretrained_weights(parts):
    """Of a whole Whisper in fp16, of a Qwen3 in bf16 and in shards."""
    net = ckpt.from_parts(parts["encoder"], parts["llm"], torch.float32)
    whisper = hf.WhisperForConditionalGeneration.from_pretrained(parts["encoder"])
    qwen = hf.Qwen3ForCausalLM.from_pretrained(parts["llm"])
    assert (whisper.dtype, qwen.dtype) == (torch.float16, torch.bfloat16)
    theirs, mine = whisper.float().model.encoder.state_dict(), net.encoder.state_dict()
    assert all(torch.equal(theirs[k], mine[k]) for k in theirs)
    with pytest.raises(ValueError, match="is a qwen3 model, not whisper"):
        ckpt.from_parts(parts["plain"], parts["plain"])
    known = len(net.tokenizer) - 2  # the padded vocabulary shrinks, the two new rows are means
    assert net.config.llm_config.vocab_size == known + 2 < 1500
    configs = [m.config for m in net.modules() if hasattr(m, "config")]
    assert {config._attn_implementation for config in configs} == {"sdpa"}
    theirs = qwen.float().state_dict()
    for k, mine in net.llm.state_dict().items():
        if theirs[k].shape[0] == 1500:
            mean = theirs[k][:known].mean(0)
            assert torch.allclose(mine[known:], mean.expand(2, -1))
            mine, theirs[k] = mine[:known], theirs[k][:known]
        assert torch.equal(mine, theirs[k]), k

def test_stand_ins_are_as_published(parts, baseline):
    """Every field of what the hub has, and no other; what model.py says of it agrees."""
    for name, ours in ((nb.LLM, nb.QWEN3_4B), (nb.ENCODER, nb.WHISPER_LARGE_V3)):
        theirs = PUBLISHED[name]["config.json"]
        assert ours.items() <= (theirs | dict(vocab_size=ours.get("vocab_size"))).items()
    small = PUBLISHED["Qwen/Qwen3-0.6B"]["config.json"]
    assert small.keys() == PUBLISHED[nb.LLM]["config.json"].keys() and "pad_token_id" not in small
    for folder, name in ((baseline, nb.ENCODER), *((parts[k], nb.LLM) for k in ("llm", "plain"))):
        for file, fields in PUBLISHED[name].items():
            assert json.loads(Path(folder, file).read_text()).keys() == fields.keys()
        assert len([*Path(folder).glob("model-*.safetensors")]) > 1

@pytest.mark.parametrize("start", ["none", "original"])
def test_padding_is_the_tokenizers(start, original, parts, manifest, tmp_path, monkeypatch, capsys):
    """Qwen3's config names none. Without: no batch trains or answers, and the export lacks it."""
    flags = [*RUN, "--train_manifest", manifest, "--encoder", parts["encoder"], "--llm",
             parts["plain"], "--init_from", original if start == "original" else start]
    runs = [train_now(monkeypatch, *flags, "--batch_size", n, "--out", tmp_path / f"{n}")[1]
            for n in (1, 2)]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    net, waves = ckpt.load_model(tmp_path / "2", "cpu"), [tone(0.5), tone(5.0, 2)]
    for row, wave in zip(net.generate(waves, max_new_tokens=8), waves, strict=True):
        alone = net.generate(wave, max_new_tokens=8)[0].tolist()
        assert row.tolist() == alone + [net.ends[1]] * (len(row) - len(alone))
    evaluate = "--ckpt", tmp_path / "2", "--manifest", manifest, "--max_new_tokens", 3
    code, _, err = exit_of(evaluation.main, monkeypatch, capsys, *evaluate)
    assert code == 0 and "one by one" not in err
    export.export(tmp_path / "2", tmp_path / "hf")
    config, generation = (json.loads((tmp_path / f"hf/{name}.json").read_text())
                          for name in ("config", "generation_config"))
    pads = config["llm_config"]["pad_token_id"], generation["pad_token_id"]
    assert pads == (net.tokenizer.convert_tokens_to_ids("<|endoftext|>"),) * 2

def test_the_original_layout(original, parts, tmp_path):
    """Its own token pair, no AUDIO row; pickle or safetensors, one file or shards: one model."""
    origin = parts["encoder"], parts["plain"]
    net = ckpt.load_checkpoint(original, *origin)
    n, config = len(net.tokenizer), net.config
    ids = net.tokenizer.convert_tokens_to_ids([M, ckpt.END, A])
    assert ids == [config.audio_start_id, config.audio_end_id, config.audio_token_id]
    assert ids == [n - 3, n - 2, n - 1] and config.llm_config.vocab_size == n - 1
    assert lora.new_tokens(config) == ids[:2]
    prompt, _ = nb.build_ids(net.tokenizer, config, [{"role": "user", "content": A}], [1])
    assert [t for t in prompt if t in ids] == [ids[0], *[ids[2]] * 25, ids[1]]
    weights = torch.load(original / "pytorch_model.bin", weights_only=True)
    assert torch.equal(net.adapter.w_in.weight, weights["adapter.w_in.weight"])
    del weights[HEAD]
    for name, write in (("model-{}-of-2.safetensors", save_file),
                        ("pytorch_model-{}-of-2.bin", torch.save)):
        folder = tmp_path / write.__name__
        folder.mkdir()
        for k in (0, 1):
            write({key: weights[key] for key in sorted(weights)[k::2]}, folder / name.format(k + 1))
        assert said(ckpt.load_checkpoint(folder, *origin)) == said(net)
    export.export(original, tmp_path / "hf", *origin)
    assert said(ckpt.load_model(tmp_path / "hf", "cpu")) == said(net)
    weights[HEAD] = weights[ckpt.EMBEDDINGS] + 1  # a head of its own, though --llm has none
    save_file(weights, tmp_path / "own.safetensors")
    own = ckpt.load_checkpoint(tmp_path, *origin)
    assert torch.equal(own.llm.lm_head.weight, weights[HEAD])
    assert torch.equal(own.llm.model.embed_tokens.weight, weights[ckpt.EMBEDDINGS])

class Executes:
    def __reduce__(self):
        return os.system, ("touch executed",)

@pytest.mark.parametrize("says, harm", [
    ("missing keys encoder.conv1.bias", lambda w: w.pop("encoder.conv1.bias")),
    ("unexpected keys adapter.x", lambda w: w.update({"adapter.x": torch.zeros(2)})),
    (r"mismatched keys \('adapter.w_in", lambda w: w["adapter.w_in.weight"].resize_(3, 3)),
    ("no file of plain tensors", lambda w: w.update(x=Executes())),
    ("no llm.model.embed_tokens.weight", lambda w: w.pop(ckpt.EMBEDDINGS)),
    ("is its --llm another", lambda w: w.update({ckpt.EMBEDDINGS: w[ckpt.EMBEDDINGS][:-1]}))])
def test_broken_original_checkpoints(original, parts, tmp_path, monkeypatch, says, harm):
    monkeypatch.chdir(tmp_path)
    weights = torch.load(original / "pytorch_model.bin")
    harm(weights)
    torch.save(weights, "pytorch_model.bin")
    for reason in (says, "no file of plain tensors"):
        with pytest.raises(ValueError, match=reason):
            ckpt.load_checkpoint(tmp_path, parts["encoder"], parts["plain"])
        os.truncate("pytorch_model.bin", 5000)
    assert not Path("executed").exists()

@pytest.mark.parametrize("name, old, new, says", [
    ("config.json", '"intermediate_size": 512', '"intermediate_size": 256', "mismatched keys"),
    ("config.json", "{", "", "config.json is broken"),
    ("model.safetensors", "{", "", "no file of plain tensors"),
    ("model.safetensors", "embed_tokens", "embed_xokens", "missing keys llm."),
    ("config.json", '"encoder_layers": 1', '"encoder_layers": 0', "unexpected keys encoder."),
    ("model.safetensors", None, None, "no checkpoint in"), (".", None, None, "no checkpoint in")])
def test_broken_checkpoints(checkpoint, tmp_path, monkeypatch, capsys, name, old, new, says):
    out = shutil.copytree(checkpoint, tmp_path / "ckpt")
    if old:
        whole = (out / name).read_bytes()
        assert old.encode() in whole
        (out / name).write_bytes(whole.replace(old.encode(), new.encode()))
    else:
        (out / name).rename(tmp_path / "elsewhere")
    for main, flags in ((evaluation.main, []), (export.main, ["--to", tmp_path / "hf"])):
        code, _, err = exit_of(main, monkeypatch, capsys, "--ckpt", out, *flags)
        assert is_one_line(code, err, says)

def test_old_templates_get_labels(checkpoint, net, tmp_path):
    out = shutil.copytree(checkpoint, tmp_path / "ckpt")
    (out / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert "generation" not in hf.AutoTokenizer.from_pretrained(out).chat_template
    old, messages = ckpt.load_checkpoint(out), data.Sample("семь", question="да?").messages()
    ids, labels = nb.build_ids(old.tokenizer, old.config, messages)
    assert (ids, labels) == nb.build_ids(net.tokenizer, net.config, messages)

@pytest.mark.parametrize("tied", [True, False])
def test_lora_starts_as_the_base_and_merges_into_it(parts, tmp_path, tied):
    """New rows included. A head of its own, as Qwen3 has from 8B on, survives a checkpoint."""
    torch.manual_seed(0)
    config = hf.Qwen3Config.from_pretrained(parts["plain"], tie_word_embeddings=tied)
    llm = shutil.copytree(parts["plain"], tmp_path / "llm")
    hf.Qwen3ForCausalLM(config).save_pretrained(llm)
    net = ckpt.from_parts(parts["encoder"], str(llm), torch.float32).eval()
    batch = batch_of(net, data.Sample("анна", [pcm(3)])) | {"labels": None}
    twin, before = copy.deepcopy(net), net(**batch).logits
    lora.prepare(twin, "lora", LORA).eval()
    assert torch.allclose(before, twin(**batch).logits, atol=1e-5)
    for p in lora.stored(twin).values():  # as if it had been trained
        p.data += 0.05 * torch.randn_like(p)
    learned = twin(**batch).logits
    assert (learned - before).abs().max() > 0.1
    assert torch.allclose(learned, lora.merge(twin, torch.float32)(**batch).logits, atol=1e-4)
    old, new = net.state_dict(), twin.state_dict()
    changed = (old[ckpt.EMBEDDINGS] != new[ckpt.EMBEDDINGS]).any(1).nonzero().flatten()
    assert old.keys() == new.keys() and changed.tolist() == lora.new_tokens(net.config)
    assert torch.equal(old[HEAD], new[HEAD]) != tied
    torch.save(new, tmp_path / "pytorch_model.bin")
    again = ckpt.load_checkpoint(tmp_path, parts["encoder"], str(llm))
    assert torch.equal(again.llm.lm_head.weight, new[HEAD])

@pytest.mark.parametrize("trained", ["adapter", "lora", "full"])
def test_the_dtypes_of_a_gpu_run(net, trained):
    """Frozen weights in bf16, trained ones in fp32, autocast: on the CPU here, text-only too."""
    twin = copy.deepcopy(net)
    samples = data.Sample("анна", [pcm(3)]), data.Sample("2", question="раз")
    batches = [batch_of(net, sample) for sample in samples]
    exact = [twin(**batch).loss.item() for batch in batches]
    lora.prepare(lora.cast(twin, torch.bfloat16), trained, LORA).train()
    assert twin.llm.model.rotary_emb.inv_freq.dtype == torch.float32  # bf16 is off by radians
    for batch, loss_before in zip(batches, exact, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = twin(**batch).loss
        loss.backward()
        assert loss.item() == pytest.approx(loss_before, rel=0.02)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
               for p in lora.stored(twin).values())

def test_a_run_and_its_base_move_together(manifest, original, parts, tmp_path, monkeypatch):
    """LoRA on LoRA on an original checkpoint: found from another folder, through a link, after a
    move; refused when the base is gone or another, by loading and by --resume."""
    home, moved = tmp_path / "home", tmp_path / "moved"
    shutil.copytree(Path(parts["encoder"]).parent, home)
    shutil.copytree(original, home / "original")
    (home / "disk").mkdir()
    (home / "second").symlink_to(home / "disk")
    monkeypatch.chdir(home)
    run = [*RUN, "--train_manifest", manifest, "--encoder", "encoder", "--llm", "plain"]
    first, second = ("--init_from", "original", "--out", "first"), ("--init_from", "first")
    train_now(monkeypatch, *run, *first)
    train_now(monkeypatch, *run, *second, "--lora_rank", 2, "--save_every", 1, "--out", "second")
    net = ckpt.load_checkpoint("second")
    assert not [k for k in net.state_dict() if "lora" in k]
    monkeypatch.chdir(tmp_path)
    home.rename(moved)
    (moved / "second").unlink()
    (moved / "disk").rename(moved / "second")
    assert said(ckpt.load_checkpoint("moved/second")) == said(net)
    shutil.rmtree(newest("moved/second"))  # back to step 1, and on, from another folder
    _, rows = train_now(monkeypatch, "--resume", "--out", "moved/second")
    assert said(ckpt.load_checkpoint("moved/second")) == said(net) and len(rows) == 2
    monkeypatch.chdir(moved)
    train_now(monkeypatch, *run, *first, "--steps", 3, "--overwrite")
    shutil.rmtree(newest("second"))
    for load in (lambda: ckpt.load_model("second", "cpu"),
                 lambda: train_now(monkeypatch, "--resume", "--out", "second")):
        with pytest.raises(UserError, match="is gone|has changed"):
            load()

SNIPPET = """
import sys
for name in ("peft", "data", "soundfile", "datasets", "torchaudio", "jiwer"):
    sys.modules[name] = None  # as if not installed
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained("hf", trust_remote_code=True, device="cpu")
audio = torch.load("audio.pt", weights_only=True)
output = model.generate(audio=audio, user_prompt=sys.argv[1], system_prompt=sys.argv[2],
                        max_new_tokens=12)
print(output.tolist(), model.decode(output[0]), sep="\\n")
"""
ASKED = ["О чём говорится в этом аудио? <|start_of_audio|><|end_of_audio|>",
         "Ты полезный голосовой ассистент."]  # the post's own words

def test_the_posts_snippet_runs_anywhere(manifest, original, parts, tmp_path, monkeypatch, capsys):
    """A LoRA run, exported: without this project, peft and network it gives the run's tokens."""
    out, hf = tmp_path / "out", tmp_path / "far" / "hf"
    hf.parent.mkdir()
    train_now(monkeypatch, *RUN, "--train_manifest", manifest, "--init_from", original, "--encoder",
              parts["encoder"], "--llm", parts["plain"], "--lr", 0.01, "--out", out)
    assert exit_of(export.main, monkeypatch, capsys, "--ckpt", out, "--to", hf)[0] == 0
    assert {p.name for p in hf.iterdir()} >= {
        "README.md", "config.json", "generation_config.json", "model.py", "model.safetensors",
        "processor_config.json", "tokenizer.json", "train_config.json"}
    config = json.loads((hf / "config.json").read_text())
    assert [config["auto_map"]["AutoModel"]] == [f"model.{n}" for n in config["architectures"]]
    assert config["audio_start_id"] != config["audio_end_id"]  # the original's own pair
    assert config.get("base") is None  # it is whole
    card = (hf / "README.md").read_text()
    assert "](train_config.json)" in card and str(tmp_path) not in card
    torch.save(tone(3.0), hf.parent / "audio.pt")
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", SNIPPET, *ASKED], cwd=hf.parent, env=env,
                          text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    net = ckpt.load_checkpoint(out)  # in bf16, as it is stored and as transformers loads it
    ids = net.generate(tone(3.0), *ASKED, max_new_tokens=12)
    assert done.stdout.splitlines() == [str(ids.tolist()), net.decode(ids[0])]

def test_a_folder_of_the_hub_comes_back_whole(checkpoint, tmp_path, monkeypatch, capsys):
    """A failed export leaves nothing; its card says how to load it; what we fetch answers."""
    monkeypatch.chdir(tmp_path)
    hf, fetched = Path("me/mine"), tmp_path / "fetched"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(export, "model_card", lambda *_: 1 / 0)
        export.export(checkpoint, hf)
    assert not list(Path("me").iterdir())
    code, out, _ = exit_of(export.main, monkeypatch, capsys, "--ckpt", checkpoint, "--to", hf)
    assert not code and "me/mine holds" in out
    assert 'from_pretrained("me/mine"' in (hf / "README.md").read_text()
    def fetch(name, allow_patterns):
        fetched.mkdir()
        for file in filter_repo_objects(sorted(os.listdir(hf)), allow_patterns=allow_patterns):
            shutil.copy(hf / file, fetched)
        return fetched
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    hf = hf.rename("ours")
    shutil.rmtree("me")
    assert said(ckpt.load_checkpoint("me/mine")) == said(ckpt.load_checkpoint(hf))
    assert set(os.listdir(fetched)) == set(os.listdir(hf)) - {"README.md"}

# ---- support/: rows, the embedded corpus, the tiny tokenizer, datasets of the hub
BESIDE_THREADS = """
import torch
torch.ones(1 << 20).add(1)  # on all cores
torch.set_num_threads = id  # as vLLM does
from support import corpus
print(len(corpus.embedded_rows("en", "speak", 2)))
"""

@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_a_corpus_is_spoken_beside_threads(tmp_path):
    """Whose locks a fork would inherit, and wait for."""
    env = os.environ | {"NANOBOREALIS_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", BESIDE_THREADS], env=env, text=True,
                          capture_output=True, timeout=120)
    assert done.stdout == "2\n", done.stderr

@pytest.mark.parametrize("name, rate, channels", [
    ("a.wav", 8000, 1), ("a.wav", 44100, 2), ("a.flac", 48000, 3), ("a.ogg", 16000, 1),
    ("a.mp3", 22050, 2), ("a.wav", 15999, 1), ("a.wav", 11025, 1)])
def test_audio_of_any_rate_and_channels(tmp_path, name, rate, channels):
    wave = np.zeros((rate, channels))
    wave[:, 0] = np.sin(2 * np.pi * 440 * np.arange(rate) / rate) * 0.5
    soundfile.write(tmp_path / name, wave, rate)
    x = data.load_audio(str(tmp_path / name))
    assert x.dim() == 1 and abs(len(x) - 16000) <= 16000 * 0.1  # mp3 pads its ends
    x = x[2000:14000]
    assert abs(torch.fft.rfft(x).abs().argmax().item() * 16000 / 12000 - 440) < 2
    assert x.abs().max().item() == pytest.approx(0.5 / channels, rel=0.1)  # the channels' mean

@pytest.mark.parametrize("kind, subtype", [
    ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "MS_ADPCM"), ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")])
def test_blocks_are_the_whole(kind, subtype, tmp_path, monkeypatch):
    """Decoded a block at a time, a recording is what it was, to the bit."""
    monkeypatch.setattr(data.rows, "BLOCK", 1000)
    for channels in (1, 2):
        wave = np.stack([tone(3, seed).numpy() for seed in range(channels)], axis=1)
        (tmp_path / "a").write_bytes(wav_bytes(wave, kind=kind, subtype=subtype))
        whole, _ = soundfile.read(tmp_path / "a", dtype="float32", always_2d=True)
        whole = nb.check_wave(torch.from_numpy(whole.mean(axis=1)))
        for source in (str(tmp_path / "a"), (tmp_path / "a").read_bytes()):
            assert torch.equal(data.load_audio(source), whole) and len(whole) >= 48000

def test_headers_are_not_believed(tmp_path):
    """A length of 0 (of a pipe) or 2^36 costs no memory and no error; a long recording ends."""
    wave = tone(1)
    whole = data.load_audio(wav_bytes(wave, kind="FLAC"))
    assert flac(wave, total=16000) == wav_bytes(wave, kind="FLAC")
    for total in (0, 20_000, 1 << 35, (1 << 36) - 1):
        tracemalloc.start()
        assert torch.equal(data.load_audio(flac(wave, total=total)), whole)
        assert tracemalloc.get_traced_memory()[1] < 4e6
        tracemalloc.stop()
    for header, says in ((dict(rate=1), "rate of 1 Hz"), (dict(channels=8), "not audio"),
                         (dict(rate=655350), "shorter than 0.1 s"), (dict(rate=0), "not audio")):
        with pytest.raises(data.BadRow, match=says):
            data.load_audio(flac(wave, total=16000, **header))
    assert len(data.load_audio(flac(wave), max_seconds=1)) == 16000
    silence = np.zeros(20_000_000, np.int16)  # 80 MB as float32, in a file of 60 kB
    for rate, seconds, says in ((16000, 3, "3 s"), (192_000, 60, "30 s"), (16000, 1249, "1249 s")):
        tracemalloc.start()
        with pytest.raises(data.rows.TooLong, match=f"longer than {says}"):
            data.load_audio(flac(silence, rate), max_seconds=seconds)
        assert says == "1249 s" or tracemalloc.get_traced_memory()[1] < 3e7
        tracemalloc.stop()

def test_corpus_same_seed_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOBOREALIS_CACHE", str(tmp_path))
    for lang in ("ru", "en"):  # caches of earlier versions stay valid
        spoken.embedded_rows(lang, "train", 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["en-0-0e76672b", "ru-0-8729db0f"]
    monkeypatch.setattr(spoken, "CHUNK", 12)
    runs = []
    for folder, seed in [("a", 0), ("b", 0), ("c", 1)]:
        monkeypatch.setenv("NANOBOREALIS_CACHE", str(tmp_path / folder))
        runs.append(data.embedded("ru", "train", 20, seed) + data.embedded("en", "books", 5, seed))
    said = [[(s.answer, s.audio[0].tobytes()) for s in run] for run in runs]
    assert said[0] == said[1] and not set(said[0]) & set(said[2])
    for s in runs[0]:
        assert 0.2 < len(s.audio[0]) / 16000 < 6 and np.abs(s.audio[0]).max() > 1000

@pytest.mark.parametrize("lang", ["ru", "en"])
def test_corpus_holds_out_voices_and_sentences(lang):
    assert not set(spoken.TRAIN_VOICES) & set(spoken.EVAL_VOICES)
    train_set, held_out = (data.embedded(lang, split, 250) for split in ("train", "clean"))
    texts, words = {s.answer for s in held_out}, spoken.vocabulary(lang)
    assert not {s.answer for s in train_set} & texts and len(texts) == 250
    assert set(" ".join(texts).split()) <= set(words) and len(words) >= 150
    assert {s.name.split("/")[2] for s in held_out} == set(spoken.EVAL_VOICES)
    assert {s.name.split("/")[2] for s in train_set} <= set(spoken.TRAIN_VOICES)

def test_tiny_pools():
    asked = [s for s in data.tiny_pool("ru_audio", 40, 0) if s.question != nb.ASR_PROMPT]
    assert 0 < len(asked) < 30 and {s.system for s in asked} == {data.TASK_SYSTEM}
    for s in data.tiny_pool("text", 40, 0):
        assert s.audio == [] and s.system == data.TEXT_SYSTEM
        assert not spoken.held_out(s.question.split("\n")[1])
    both = [s.name.split("/")[0] for s in data.tiny_pool("pretrain", 11, 0, ("ru", "en"))]
    assert both == ["ru-train"] * 6 + ["en-train"] * 6

def test_tokenizer_round_trip(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = hf.AutoTokenizer.from_pretrained(tmp_path)
    text = f"анна купила 9 конфет, ё-й! {A}<|im_end|> hello\n\n<think>"
    ids = loaded(text).input_ids
    assert ids == tokenizer(text).input_ids and loaded.decode(ids) == text
    assert loaded.chat_template == tokenizer.chat_template
    assert len(tokenizer("анна").input_ids) == 1  # a known word is a token

BOOKS, TEXT = recipes.POOLS["ru_audio"][1], recipes.POOLS["text"][0]

def changed(source, **settings):
    return recipes.Source(**vars(source) | settings)

def test_rows_of_the_pools(hub, tmp_path, monkeypatch):
    """Columns arrive where they belong; filters come before a limit. A path can be a hub."""
    monkeypatch.setenv("NANOBOREALIS_CACHE", str(tmp_path))
    def read(pool, number):
        return data.HubSamples(recipes.POOLS[pool][number], hub)
    asked, books, gemini, text = *(read("ru_audio", i) for i in range(3)), read("text", 0)
    assert [len(r) for r in (books, asked, gemini, text)] == [12, 12, 12, 10]
    assert (books[3].question, books[3].system) == (nb.ASR_PROMPT, nb.ASR_SYSTEM)
    assert books[3].name == "Vikhrmodels/ToneBooks/train:3"
    assert (asked[3].question, asked[3].system) == ("Что сказано?", data.TASK_SYSTEM)
    assert asked[3].answer == books[3].answer and gemini[0].answer == "О разном."
    assert gemini[0].messages()[1]["content"] == f"О чём речь? {A}"
    questions = [f"Вопрос {i}" for i in (0, 2, 3, 5)]  # the prompt or the answer is Russian
    assert [text[i].question for i in range(4)] == questions
    assert text[0].system == "Отвечай кратко." and text[0].audio == []
    assert [s.answer for s in read("pretrain", 9)] == [books[i].answer for i in (0, 3, 6, 9)]
    assert read("pretrain", 8)[0].answer == "Farfield" and read("en_audio", 2)[0].answer == "a bell"
    a, b = data.load_audio(books[3].audio[0]), data.load_audio(asked[3].audio[0])
    assert torch.allclose(a, b, atol=1e-4) and len(data.load_audio(gemini[0].audio[0])) > 8000
    assert {s.rows for s in recipes.POOLS["ru_audio"]} == {70_000, 90_000, 0}
    assert len(recipes.BENCHMARK) == 6 and recipes.open_source(TEXT, hub, 2).num_rows == 2
    some, few = (data.HubSamples(changed(source, hub=str(hub / source.hub)), limit=limit)
                 for source, limit in ((BOOKS, 5), (TEXT, 4)))
    assert [s.answer for s in some] == [books[i].answer for i in range(5)]
    assert torch.equal(*(data.load_audio(pool[2].audio[0]) for pool in (some, books)))
    assert [s.question for s in few] == questions

HUB = """
import sys
from pathlib import Path
import datasets, data
from support import banks, recipes
real, streams = datasets.load_dataset, []
def counted(*args, streaming=False, **settings):
    streams.extend(args[:1] * streaming)
    return real(*args, streaming=streaming, **settings)
datasets.load_dataset, banks.NOISE_DATASET = counted, sys.argv[2]
for pool, number, limit in [("ru_audio", 1, 5)] * 2 + [("ru_audio", 1, 4), ("pretrain", 9, 3)]:
    source = recipes.Source(**vars(recipes.POOLS[pool][number]))
    source.hub = f"{sys.argv[1]}/{source.hub}"
    pool = data.HubSamples(source, limit=limit)
    print([(s.answer, len(data.load_audio(s.audio[0]))) for s in pool])
for split in ("Musan", "Echo", "Musan"):
    bank = banks.open_bank("hub", split)
    print([(str(clip.dtype), len(clip), float(clip.sum())) for clip in bank])
maps = Path("/proc/self/maps")  # of Linux
assert not maps.exists() or "-Musan.safetensors" in maps.read_text()
print(len(streams))
"""

def test_the_hub_is_streamed_once(hub, corpus, tmp_path, monkeypatch):
    """By the first process; the next one, and a second call, read what that left in the cache."""
    table = datasets.Dataset.from_dict({"audio": [clip(s) for s in corpus[:3]]})
    table = table.cast_column("audio", datasets.Audio(16000))  # as published: it wants decoding
    for split in ("Musan", "Echo"):
        table.to_parquet(tmp_path / f"noise/data/{split}-00000-of-00001.parquet")
    (tmp_path / "script.py").write_text(HUB)
    def run(name):
        process = Fork(tmp_path / "script.py", hub, tmp_path / "noise", out=tmp_path / name,
                       err=tmp_path / "err", NANOBOREALIS_CACHE=str(tmp_path / "cache"))
        out, err = process.communicate(120)
        assert process.returncode == 0, err
        return out.splitlines()
    first, second = run("first"), run("second")
    assert first[:-1] == second[:-1] and (first[-1], second[-1]) == ("5", "0")
    assert first[0] == first[1] == str([(s.answer, len(s.audio[0])) for s in corpus[:5]])
    assert first[3] == str([(s.answer, len(s.audio[0])) for s in corpus[:7:3]])  # those with ru
    assert first[4] == first[6] and first[4].count("int16") == 3 == first[5].count("float32")

def test_half_a_stream_is_not_kept(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOBOREALIS_CACHE", str(tmp_path / "cache"))
    source = changed(BOOKS, hub=str(hub / BOOKS.hub))
    monkeypatch.setattr(banks, "NOISE_DATASET", source.hub)
    real = datasets.load_dataset
    def breaks_at(n):
        def check(text, i):
            if i == n:
                raise ConnectionError("reset by peer")
            return True
        def load_dataset(*args, **settings):
            rows = real(*args, **settings).cast_column("audio", datasets.Audio(decode=False))
            return rows.filter(check, with_indices=True, input_columns="text")
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for n in (0, 3):
        breaks_at(n)
        with pytest.raises(UserError, match="reset by peer"):
            data.HubSamples(source, limit=12)
        with pytest.raises(UserError, match="reset by peer"):
            banks.open_bank("hub", "train")
        assert not list((tmp_path / "cache").iterdir())
    breaks_at(None)
    assert len(data.HubSamples(source, limit=12)) == len(banks.open_bank("hub", "train")) == 12

def test_rows_that_break_on_the_way(tmp_path, tokenizer, net):
    """Datasets are too big to look through before: the next good row takes a bad one's place."""
    chat = [dict(role="user", content="раз"), dict(role="assistant", content="два")]
    table = datasets.Dataset.from_dict({"conversation": [[], chat]})
    table.to_parquet(tmp_path / "owner/chats/train.parquet")
    source = recipes.Source(hub="owner/chats", conversation="conversation")
    chats = data.HubSamples(source, tmp_path)
    broken = [data.Sample("да", [b"RIFF is not enough"], name="set:0")]
    dataset = data.Dataset(data.Chain([broken, chats]), tokenizer, net.config)
    item, left_out = dataset[0, 0.0]
    assert [row[1:] for row in left_out] == [("set:0", False), ("owner/chats/train:0", False)]
    assert left_out[0][0] == "not audio" and item[0] == dataset.item(2)[0] and len(item[2]) == 0
    item, left_out = data.Dataset(broken, tokenizer, net.config)[0, 0.0]
    assert item is None and len(left_out) == data.RETRIES
    batch = dataset.collate([dataset[2, 0.0], (None, left_out)])
    assert batch["hopeless"] == 1 and batch["left_out"] == left_out and len(batch["micro"]) == 1
    only_long = data.Dataset([chats[1]], tokenizer, net.config, max_tokens=1)
    assert len(only_long[0, 0.0][1]) == data.RETRIES

@pytest.mark.parametrize("text", [A, f"три {nb.TAG_PAIR}"])
def test_a_placeholder_without_a_recording_is_left_out(text, tmp_path, tokenizer, net):
    """In a question of any turn: training takes the next row. Elsewhere it is text."""
    roles = ["system", *["user", "assistant"] * 2]
    chats = [[dict(role=role, content=text if i == bad else "раз") for i, role in enumerate(roles)]
             for bad in range(6)]  # the last is good
    table = datasets.Dataset.from_dict({"conversation": chats})
    table.to_parquet(tmp_path / "owner/chats/train.parquet")
    pool = data.HubSamples(recipes.Source(hub="owner/chats", conversation="conversation"), tmp_path)
    item, left_out = data.Dataset(pool, tokenizer, net.config)[0, 0.0]
    reason = "placeholders and recordings differ in number"
    assert left_out == []
    for bad in (1, 3):
        item, left_out = data.Dataset(pool, tokenizer, net.config)[bad, 0.0]
        assert left_out == [(reason, f"owner/chats/train:{bad}", False)]
        assert item[0] == data.encode(pool[bad + 1], tokenizer, net.config)[0]

def test_data_dir_takes_what_datasets_writes(hub, corpus, tmp_path):
    table = recipes.open_source(BOOKS, hub)
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "saved" / BOOKS.hub)
    table.to_parquet(tmp_path / "parquet" / BOOKS.hub / "train.parquet")
    for place in map(tmp_path.joinpath, ("saved", "parquet")):
        found = {s.answer: len(data.load_audio(s.audio[0])) for s in data.HubSamples(BOOKS, place)}
        assert found == {s.answer: len(s.audio[0]) for s in corpus[:12]}, place

@pytest.mark.parametrize("source, copied, says", [
    (recipes.Source(hub="Vikhrmodels/Nothing"), True, "no folder .*Vikhrmodels/Nothing"),
    (changed(BOOKS, split="test"), True, "split test"),
    (changed(BOOKS, answer="sentence"), True, "ToneBooks.*no column sentence: it has audio, text"),
    (BOOKS, False, "cannot read Vikhrmodels/ToneBooks, split train, .*go online.*--data_dir")])
def test_datasets_that_cannot_be_read_are_named(hub, source, copied, says):
    with pytest.raises(UserError, match=says):
        recipes.open_source(source, hub if copied else None)

def model_and_batch(trained: str, tokenizer):
    model = nb.BorealisForConditionalGeneration(tiny.tiny_config(tokenizer, frozen=()))
    model.tokenizer = tokenizer
    if trained != "scratch":
        lora.prepare(model, trained, LORA | dict(rank=8))
    return model.train(), batch_of(model, data.Sample("анна купила", [pcm(3)]))

@pytest.mark.parametrize("trained", ["adapter", "lora", "full"])
def test_gradient_checkpointing_and_compile_change_no_step(tokenizer, trained):
    """And checkpointing keeps less, also where the LLM is frozen and else in eval mode."""
    model, batch = model_and_batch(trained, tokenizer)
    def step(**settings):
        sizes, net = [], train.wrap(train.TrainConfig(**settings), model, 1)
        hooks = (lambda x: sizes.append(x.numel()) or x), (lambda x: x)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            loss = net(**batch).loss
        loss.backward()
        learned = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return sum(sizes), torch.cat([loss.detach()[None], *learned])
    (plain, numbers), (less, same) = step(), step(grad_checkpoint=True)
    assert less < 0.7 * plain and (numbers - same).abs().max() < 1e-6
    model.llm.gradient_checkpointing_disable()
    if trained == "lora":
        assert (numbers - step(compile=True)[1]).abs().max() < 1e-4

@pytest.mark.parametrize("trained", ["adapter", "lora", "full", "scratch"])
def test_flops_are_those_that_run(tokenizer, trained):
    model, batch = model_and_batch(trained, tokenizer)
    tokens, labels = batch["input_ids"].numel(), (batch["labels"] != -100).sum().item()
    # The count leaves out the CPU's fused attention, hence MATH.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**batch).loss.backward()
    c = model.config.llm_config
    heads = c.num_attention_heads * c.head_dim * c.num_hidden_layers
    other_half = 3 * 2 * tokens**2 * heads  # of causal attention: torch counts it
    ours = meter.step_flops(model, tokens, tokens**2, 2, labels) + other_half
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)  # 2 %: RoPE's products

def test_speed_on_a_gpu(net, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3e9)
    total = dict(tokens=100, squares=5000, windows=2, labels=20, seconds=4, hopeless=0)
    mfu = meter.step_flops(net, 100, 5000, 2, 20) / 0.5 / 2 / 756e12
    assert meter.speed(net, total, 0.5, 2, torch.device("cuda", 0)) == dict(
        ms=500, tokens_per_s=200, audio_s_per_s=8, memory_gb=3, mfu=mfu)

def kept_for_backward(layers: int, tokens: int) -> int:
    """Bytes that autograd keeps, besides weights, of full-size layers with the default LoRA."""
    small = dict(num_hidden_layers=layers, vocab_size=1, pad_token_id=0)
    llm = lora.cast(hf.Qwen3Model(hf.Qwen3Config(**nb.QWEN3_4B | small)), torch.bfloat16)
    lora.add_matrices(llm, rank=256, alpha=512, dropout=0.0)
    trained = [p for p in llm.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    weights, kept = {p.untyped_storage().data_ptr() for p in llm.parameters()}, {}
    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from reuse
        return x
    x = torch.randn(1, tokens, nb.QWEN3_4B["hidden_size"], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), \
            torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        llm(inputs_embeds=x, use_cache=False)
    copies = sum(2 * p.numel() for p in trained)  # autocast's, which memory() has elsewhere
    return sum(storage.nbytes() for storage in kept.values()) - copies

def test_what_a_layer_keeps():
    layer = kept_for_backward(2, 300) - kept_for_backward(1, 300)
    assert layer == pytest.approx(meter.KEPT * 300 * nb.QWEN3_4B["hidden_size"], rel=0.03)

class Live(TorchDispatchMode):
    """How many bytes of tensors are alive, and were at most."""
    def __init__(self, tensors):
        super().__init__()
        self.sizes, self.total, self.most = {}, 0, 0
        for x in tensors:
            self.add(getattr(x, "_local_tensor", x).untyped_storage())  # of what is sharded
    def add(self, storage):
        if storage._cdata not in self.sizes:
            weakref.finalize(storage, self.set_size, storage._cdata, 0)
        self.set_size(storage._cdata, storage.nbytes())
    def set_size(self, key, size):
        self.total += size - self.sizes.pop(key, 0)
        self.most = max(self.most, self.total)
        if size:
            self.sizes[key] = size
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(results):
            if isinstance(x, torch.Tensor):
                self.add(getattr(x, "_local_tensor", x).untyped_storage())
        return results

@pytest.mark.parametrize("kind, checkpoint, world", [
    ("lora", False, 1), ("full", True, 1), ("full", True, 8), ("lora", True, 8)])
def test_memory_on_paper_is_what_lives(plain_tokenizer, monkeypatch, kind, checkpoint, world):
    """A 16th as wide as full size, with a 16th of the tokens, as on a GPU; one rank of 8."""
    encoder = dict(d_model=80, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=320,
                   num_mel_bins=80, max_source_positions=94)
    llm = nb.QWEN3_4B | dict(
        hidden_size=160, num_attention_heads=4, num_key_value_heads=1, head_dim=64,
        intermediate_size=608, vocab_size=9479, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = nb.BorealisConfig(encoder_config=encoder, llm_config=llm, audio_token_id=9,
                               audio_start_id=8, audio_end_id=8)
    model = lora.cast(nb.BorealisForConditionalGeneration(config), torch.bfloat16)
    lora.prepare(model, kind, dict(rank=16, alpha=32, dropout=0.0) if kind == "lora" else None)
    ids = torch.tensor([[8] + [9] * 24 + [8] + [5] * 32])
    batch = dict(input_ids=ids, labels=ids.masked_fill(ids > 5, -100),
                 input_features=torch.zeros(1, 80, 188))
    paper = sum(meter.memory(model, ids.numel(), 32, checkpoint, world).values())
    if world > 1:
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        policy = ranks.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        monkeypatch.setattr(ranks, "MixedPrecisionPolicy", lambda *_: policy)  # a GPU's
    net = train.wrap(train.TrainConfig(grad_checkpoint=checkpoint, shard=True), model, world)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    live, resize = Live([*model.parameters(), *model.buffers()]), torch.UntypedStorage.resize_
    def resized(storage, size):  # so a layer's weights go, and come again
        resize(storage, size)
        live.add(storage)
    monkeypatch.setattr(torch.UntypedStorage, "resize_", resized)
    with live:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = net(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    if world > 1:
        dist.destroy_process_group()
    assert live.most <= paper <= 1.12 * live.most

class CountKernels(TorchDispatchMode):
    """Counts ATen's operations, but for views and new memory, which launch no kernel."""
    kernels = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        view = any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
        self.kernels += not (view or "empty" in func.__name__ or "_unsafe_view" in func.__name__)
        return func(*args, **(kwargs or {}))

def count_kernels(rows: int) -> int:
    """Of a micro-batch, forward and backward, with LoRA, at full depth."""
    encoder, llm = bench.TINY
    model = bench.random_model(encoder | dict(encoder_layers=32),
                               llm | dict(num_hidden_layers=36), torch.bfloat16)
    lora.prepare(model, "lora", LORA | dict(rank=64)).train()
    dataset = data.Dataset([data.Sample("1" * 100, [pcm(2)])], model.tokenizer, model.config,
                           batch_size=rows)
    batch = dataset.collate([dataset[0, 0.0]] * rows)["micro"][0]
    for _ in range(2):  # at first there are no gradients yet to add to
        with CountKernels() as counter:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
    return counter.kernels

def test_a_micro_batch_of_any_size_launches_as_many_kernels(capsys):
    x = torch.ones(2, 3, requires_grad=True)
    with CountKernels() as counter:
        torch.empty_like((x.view(3, 2).t() * 2).exp_())
    assert counter.kernels == 2
    assert count_kernels(8) == count_kernels(1) == pytest.approx(9809, rel=0.01)  # MEASURED.md

def test_memory_at_full_size_is_as_written():
    text = (HERE / "docs" / "MEASURED.md").read_text()
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    written = [[cell.strip(" `*") for cell in line] for line in lines]
    for kind in ("adapter", "lora", "lora --grad_checkpoint", "full --grad_checkpoint",
                 "full --grad_checkpoint --shard"):
        with torch.device("meta"):
            model = lora.prepare(nb.BorealisForConditionalGeneration(nb.BorealisConfig()),
                                 kind.split()[0], dict(rank=256, alpha=512, dropout=0))
        gpus = 8 if "shard" in kind else 1
        parts = meter.memory(model, 377 + 512, 512, "checkpoint" in kind, gpus)
        sizes = [f"{size / 1e9:.2f}" for size in (*parts.values(), sum(parts.values()))]
        assert [kind, *sizes] in written
        if kind == "lora":
            flops = meter.step_flops(model, 128 * 537, 128 * 537 ** 2, 0.9 * 128, 128 * 100)
            assert f"{flops / 1e15:.2f} PFLOP" in text

def test_bench_gpu_runs_on_a_cpu(monkeypatch, capsys):
    """All its parts but vLLM; where something does not fit, what was measured stays."""
    settings = functools.partial(train.TrainConfig, effective_batch=64, lora_rank=8)
    monkeypatch.setattr(train, "TrainConfig", settings)
    monkeypatch.setattr(bench.engine, "INSTALLED", False)
    def table(text):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
        names, _, *rows = [line for line in lines if line]
        return [dict(zip(names, row, strict=True)) for row in rows]
    run = "gpu", "--size", "tiny"
    with torch.compiler.set_stance("force_eager"):  # another test compiles
        code, out, err = exit_of(bench.main, monkeypatch, capsys, *run)
    rows = table(out)
    names = [row["what"] for row in rows]
    assert code == 0 and [names.count(name) for name in (
        "train", "train --grad_checkpoint", "train --compile", "native")] == [4, 4, 4, 4]
    assert all(float(row["ms"].replace(",", "")) > 0 for row in rows) and len(rows) == 16
    assert "ended early, vllm: no vLLM" in out and all("mfu" not in row for row in rows)
    calls, backward = [], train.backward
    def full(*args):
        calls.append(1)
        if len(calls) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return backward(*args)
    monkeypatch.setattr(train, "backward", full)
    code, out, err = exit_of(bench.main, monkeypatch, capsys, *run)
    (first,) = table(out)
    assert code == 0 and float(first["samples_per_s"]) > 0
    assert float(first["batch"]) == float(first["x one"]) == 1
    assert "ended early, train: CUDA out of memory" in out and "Traceback" not in err

def row(reference, hypothesis, task="asr", **more):
    r = dict(reference=reference, hypothesis=hypothesis, cut=False, id="u", seconds=2) | more
    return evaluation.grade(r, task, "default")

@pytest.mark.parametrize("text, n", [
    (" ".join(map(str, range(5000))) + " да да" * 9, 18), ("на на на на столе", 4),
    ("кот спит кот спит", 0), ("я на на на на на", 5), ("", 0),
    ("я" + " кот спит" * 3, 6), ("а б а б а б а", 6), ("да да да", 0),
    ("а б в " * 4, 12)])
def test_loops(text, n):
    assert report.longest_loop(text.split()) == n

def test_diagnosis_by_hand():
    rows = [
        row("раз два три четыре", "раз два"),  # 4 > 1.5 * 2: stopped early
        row("раз два три", "раз два"),  # 3 = 1.5 * 2: not yet
        row("раз два", "раз два два два два два", cut=True),  # a loop, cut
        row("да да да да", "да да да да"),                     # it was said so
        row("на", "нананананана"), row("ананас", "ананас"),  # in a word
        row("", "спасибо за просмотр"), row("…", "")]          # nobody spoke
    assert report.diagnose(rows) == dict(stopped_early=1, cut=1)
    assert [r["made_up"][0] for r in rows] == [0] * 6 + [3, 0]
    assert [r["loops"] for r in rows] == [[float(i in (2, 4)), 1] for i in range(8)]
    text = report.worst(rows, "asr")
    assert text.split("\n", 4)[1:4] == ["REF: раз два *** *** *** ***",
                                        "HYP: раз два два два два два",
                                        "               I   I   I   I"]
    assert text.count("errors") == 5 and report.worst(rows[3:4], "asr") == ""

@pytest.mark.parametrize("reference, hypothesis, em, f1", [
    ("Париж.", "париж", 1, 1), ("в саду", "кот в саду", 0, 4 / 5),
    ("да", "", 0, 0), ("да", "нет", 0, 0),
    ("кот кот пёс", "кот пес лис", 0, 2 / 3)])  # кот: said once
def test_answers_by_hand(reference, hypothesis, em, f1):
    r = row(reference, hypothesis, "qa")
    assert r["em"] == [em, 1] and r["f1"] == [pytest.approx(f1), 1]

@pytest.mark.parametrize("category, text, answer", [
    ("formal_fallacies", "The argument is invalid.", "invalid"), ("navigate", "True", "yes"),
    ("formal_fallacies", "Valid", "valid"), ("formal_fallacies", "it is not valid", "invalid"),
    ("formal_fallacies", "Some would say valid. The answer is: invalid", "invalid"),
    ("formal_fallacies", "It is not deductively valid.", "invalid"), ("web_of_lies", "No.", "no"),
    ("formal_fallacies", "Valid arguments look otherwise: this isn’t valid", "invalid"),
    ("navigate", "Yes, you return.", "yes"), ("navigate", "knowing nothing", ""),
    ("navigate", "No, that is not correct.", "no"), ("web_of_lies", "incorrect", "no"),
    ("navigate", "Yes. There are no extra steps.", "yes"), ("web_of_lies", "**No**", "no"),
    ("object_counting", "3 pianos and 4 flutes, so the answer is 7.", "7"),
    ("object_counting", "You have seven.", "7"), ("object_counting", "Twenty-one.", "21"),
    ("object_counting", "7.0", "7"), ("object_counting", "3, then thirty", "30"),
    ("object_counting", "3.", "3"), ("object_counting", "many", "")])
def test_what_an_answer_comes_down_to(category, text, answer):
    assert tasks.extract_answer(text, category) == answer

def evaluated(folder, rng, rate, ids=40):
    folder.mkdir()
    rows = []
    for split, i in product(("clean", "webinars"), range(ids)):
        words = spoken.vocabulary("ru")[i:i + 8]
        hypothesis = " ".join(w if rng.random() > rate else "ой" for w in words)
        rows.append(dict(run="x", split=split, id=f"{split}/{i}", reference=" ".join(words),
                         hypothesis=hypothesis, seconds=3))
    write_manifest(folder / "hypotheses.jsonl", rows)
    (folder / "results.json").write_text(json.dumps(dict(run="x", step=1, task="asr")))
    return folder

def test_compare_tells_what_is_real(tmp_path, monkeypatch, capsys):
    def run(*folders, out="all"):
        code, text, err = exit_of(evaluation.main, monkeypatch, capsys, "--compare", *folders,
                                  "--out", tmp_path / out)
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
        return code, text, {line[0]: line for line in cells if line}, err
    rng = np.random.default_rng(0)
    folders = {name: evaluated(tmp_path / f"out_{name}", rng, rate)
               for name, rate in (("bad", 0.3), ("good", 0.1), ("alike", 0.1))}
    code, out, lines, _ = run(*folders.values())
    assert code == 0 and out.index("| good ") < out.index("| bad ")  # best first
    pairs = {name: line for name, line in lines.items() if " - " in name}
    p = {name: float(line[-1].split("(")[1].rstrip(")")) for name, line in pairs.items()}
    assert len(p) == 3 and all((v < 0.05) == ("bad" in name) for name, v in p.items())
    wers = [float(x) for x in lines["bad"][2:]]
    assert wers[2] == pytest.approx((wers[0] + wers[1]) / 2, abs=0.02)
    assert "WER %; normaliser: default." in out and "published" not in out  # that is other speech
    assert (tmp_path / "all" / "table.md").read_text() in out
    theirs = (folders["alike"] / "hypotheses.jsonl").read_text().splitlines()
    for name, source in (("x", "bad"), ("y", "good")):  # two runs of one name, one baseline
        folder = shutil.copytree(folders[source], tmp_path / name / "out_run")
        with open(folder / "hypotheses.jsonl", "a") as f:
            for line in theirs:
                f.write(json.dumps(json.loads(line) | dict(run="w", took=ord(name))) + "\n")
    code, out, lines, _ = run(tmp_path / "x" / "out_run", tmp_path / "y" / "out_run", out="two")
    second = str(tmp_path / "y" / "out_run" / "run")
    runs = {name for name in lines if " - " not in name and "(" not in name and ":-" not in name}
    assert code == 0 and runs - {"Run", "Difference"} == {"run", second, "w"}
    code, _, _, err = run(*folders.values(), evaluated(tmp_path / "other", rng, 0.1, ids=39))
    assert code == 2 and "other has other utterances or another --task than bad" in err
    assert run(tmp_path)[0] == 2
    for _, *wers, average in report.PUBLISHED.values():  # published averages are means
        assert not np.isfinite(wers).all() or average == pytest.approx(np.mean(wers), abs=0.006)

# ---- Cutting at pauses, and words as they are said: support/pauses.py
@pytest.mark.parametrize("longest, n", [
    *[(32000, n) for n in (30400, 32000, 32160, 80000, 980800)],
    *[(16000, n) for n in (16000, 16001, 19000, 20001, 24001, 50000)]])
def test_cuts_at_pauses(longest, n):
    """Nothing is lost, no piece is longer than a window or a sliver, the cuts are in the pauses."""
    spoken = torch.ones(n)
    for start in range(2000, n, 7000):  # pauses of 0.25 s
        spoken[start:start + 4000] = 0
    wave = tone(n / 16000) * spoken
    pieces = pauses.cut_at_pauses(wave, longest)
    assert torch.equal(torch.cat(pieces), wave) and (len(pieces) > 1) == (n > longest)
    assert all(longest // 4 <= len(p) <= longest for p in pieces)
    for cut in np.cumsum([len(p) for p in pieces])[:-1]:
        assert longest == 16000 or not spoken[cut - 1000:cut + 1000].any()

WORDS = [f"слово{i}" for i in range(30)]

def live(wave) -> list[str]:
    """What a system says to it that hears a word a tone, as support/realtime.py asks it."""
    phrases, said = pauses.Phrases(160_000), []
    def decode(n, over=False):
        loud = (phrases.phrase[:n // 800 * 800].reshape(-1, 800) ** 2).mean(1) > 1e-3
        words = WORDS[:(np.diff(loud.astype(int)) == 1).sum() + loud[0]]
        said.append(phrases.take(" ".join(words), n, over))
    pieces = np.split(np.float32(wave), range(pauses.PIECE, len(wave), pauses.PIECE))
    for i, piece in enumerate(pieces, 1):
        phrases.add(piece)
        while end := phrases.find_end(last=i == len(pieces)):
            decode(end, over=True)
        if phrases.due():
            decode(len(phrases.phrase))
    return said

BEEP, GAP, REST = 0.3 * np.sin(np.arange(9600) * 0.2), np.zeros(2400), np.zeros(12800)
@pytest.mark.parametrize("sounds, noise, lines", [
    ([REST, BEEP, GAP, BEEP, REST, REST, BEEP, GAP, BEEP, GAP, BEEP, REST], 0.0, [2, 3]),
    ([REST, BEEP, GAP, BEEP, REST, BEEP, REST], 0.02, [2, 1]),  # a room 21 dB below the voice
    ([0.05 * BEEP, 0.05 * GAP, BEEP, GAP, BEEP, REST], 0.0, [2]),  # too soft to hear, then loud
    ([0.12 * BEEP, GAP, 0.12 * BEEP, GAP, BEEP, GAP, BEEP, REST], 0.0, [2]),
    ([REST, REST], 0.02, []), ([REST, BEEP], 0.001, [1]),
    ([REST, *[BEEP] * 20], 0.001, [1, 1])])  # longer than a phrase may be
def test_phrases_say_only_what_they_keep(sounds, noise, lines):
    """Nothing is taken back, each phrase ends with its pause, and a quiet room says nothing."""
    wave = np.concatenate(sounds)
    said = live(wave + noise * np.random.default_rng(0).standard_normal(len(wave)))
    assert "".join(said) == "".join(" ".join(WORDS[:n]) + "\n" for n in lines)
    early = [text for text in said if text and "\n" not in text]
    assert early or len(sounds) < 9  # words before the phrase is over

def test_the_walk_names_what_exists():
    walk = (HERE / "docs" / "WALK.md").read_text()
    steps = re.findall(r"`([\w/]+\.py): (\w+)`", walk)
    assert len(steps) > 20 and len(walk.splitlines()) <= 80
    for path, name in steps:
        assert re.search(rf"(def|class) {name}\b|^{name} = ", (HERE / path).read_text(), re.M), path
