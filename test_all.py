"""
test_all.py -- one property a test, literal numbers where a number is claimed, equality to a reference where one exists.

    make test            # or: python -m pytest -q test_all.py -k labels
"""
import base64
import contextlib
import http.server
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the hub, and a wrong name shall fail at once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while other processes want the cores slow both down manyfold

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, WhisperConfig, WhisperModel

import augment
import data
import eval as evaluation
import model as nb
import train

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"  # real data beside the project; users do not have it, so its tests skip
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared/ folder beside the project")
A, M = nb.AUDIO, nb.MARKER


# -----------------------------------------------------------------------------
# Fixtures: a tokenizer, a random model, a folder of recordings

@pytest.fixture(scope="session")
def tokenizer():
    texts = ["анна купила девять конфет", "сейчас семь часов двадцать минут", "the cat sleeps under the table"]
    return data.train_tokenizer(data.texts_of([data.Sample(t, question=nb.ASR_PROMPT.replace(A, "")) for t in texts]), 600)


@pytest.fixture(scope="session")
def net(tokenizer):
    torch.manual_seed(0)
    net = nb.BorealisForConditionalGeneration(nb.tiny_config(tokenizer)).eval()
    net.tokenizer = tokenizer
    return net


def tone(seconds, seed=0):
    """Not speech, but not silence: a noisy chirp, float32 at 16 kHz."""
    t = torch.arange(round(seconds * 16000)) / 16000
    noise = torch.randn(len(t), generator=torch.Generator().manual_seed(seed))
    return 0.3 * torch.sin(2 * torch.pi * (200 + 300 * seed + 400 * t) * t) + 0.05 * noise


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
                    {"audio": f"{i}.wav", "question": "что слышно на аудио?", "answer": s.answer})
    rows += [{"conversation": [{"role": "user", "content": f"скажи {s.answer}"},
                               {"role": "assistant", "content": s.answer}]} for s in corpus[26:32]]
    return write_manifest(folder / "own.jsonl", rows)


def write_manifest(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows))
    return str(path)


def train_now(monkeypatch, *flags):
    """train.main() in this process -> (exit code, rows of metrics.jsonl)."""
    flags = [str(f) for f in flags]
    out = Path(flags[flags.index("--out") + 1])
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = train.main()
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return code, train.read_metrics(out / "metrics.jsonl", 10**9)


def exit_of(main, monkeypatch, capsys, *argv):
    """What a user sees: (exit code, stdout, stderr) of a script's main."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, argv)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        data.run(main)
    text = capsys.readouterr()
    return e.value.code or 0, text.out, text.err


def newest(out):
    return nb.find_checkpoint(out)


def losses(rows):
    return np.array([r["loss"] for r in rows])


# -----------------------------------------------------------------------------
# model.py

@pytest.mark.parametrize("seconds, tokens", [([0.1], 25), ([2.0], 25), ([2.0 + 1 / 16000], 50), ([7.5], 100),
                                             ([1.0, 4.0], 25 + 50), ([], 0)])
def test_token_counts(net, tokenizer, seconds, tokens):
    waves = [tone(s) for s in seconds]
    windows = [nb.cut_windows(w, net.config) for w in waves]
    message = {"role": "user", "content": nb.place_audio("что?", len(waves))}
    ids, _ = nb.build_ids(tokenizer, net.config, [message], map(len, windows))
    assert ids.count(net.config.audio_token_id) == tokens
    assert ids.count(net.config.audio_start_id) == 2 * len(waves)  # one marker on both sides of each recording
    assert nb.log_mel(sum(windows, []), net.config).shape == (tokens // 25, 80, 200)


def test_token_counts_at_full_size():
    config = nb.BorealisConfig()
    assert (config.window_samples, config.tokens_per_window) == (480_000, 375)
    for seconds, n in [(1, 375), (30, 375), (30.001, 750), (61, 1125)]:
        assert len(nb.cut_windows(torch.zeros(round(seconds * 16000)), config)) * config.tokens_per_window == n


def test_real_sizes_on_meta():
    """The numbers the README states, from the published shapes, without a byte of weights."""
    for adapter, ours in [("simple", 19_660_800), ("deep", 78_643_200 + 4 * 2 * 2560)]:
        with torch.device("meta"):
            net = nb.BorealisForConditionalGeneration(nb.BorealisConfig(adapter=adapter))
        assert nb.count(net.encoder) == 636_968_960
        assert nb.count(net.llm) == 4_021_789_696
        assert nb.count(net.adapter) == ours
        assert nb.count(net) == 636_968_960 + 4_021_789_696 + ours
        assert net.llm.get_input_embeddings().weight.shape == (151671, 2560)
    assert nb.count(net.encoder, trained_only=True) == 0


def test_downsample_is_a_concat():
    x = torch.randn(2, 10, 3)
    by_hand = torch.zeros(2, 3, 12)
    for w in range(2):
        for t in range(10):
            by_hand[w, t // 4, (t % 4) * 3:(t % 4) * 3 + 3] = x[w, t]
    assert torch.equal(nb.downsample(x, 4), by_hand)
    assert nb.downsample(torch.zeros(1, 1500, 1280), 4).shape == (1, 375, 5120)


@pytest.mark.parametrize("adapter", ["simple", "deep"])
def test_adapter_state_dict(tokenizer, adapter):
    keys = nb.BorealisForConditionalGeneration(nb.tiny_config(tokenizer, adapter=adapter)).state_dict()
    assert {k.split(".")[0] for k in keys} == {"encoder", "adapter", "llm"}
    assert {"adapter.w_in.weight", "adapter.w_out.weight"} <= set(keys)
    assert not any("adapter" in k and "w_" in k and k.endswith("bias") for k in keys)


def test_splice_fills_the_slots_in_order(net, tokenizer):
    prompt = f"сравни {A} и {A}"
    ids, _ = nb.build_ids(tokenizer, net.config, [{"role": "user", "content": prompt}], [2, 1])
    mel = nb.log_mel([tone(2, 1), tone(1.5, 2), tone(1, 3)], net.config)
    embeds = net.embed(torch.tensor([ids]), mel)[0]
    slots = [i for i, t in enumerate(ids) if t == net.config.audio_token_id]
    assert torch.equal(embeds[slots], net.encode_audio(mel).flatten(0, 1))
    rest = [i for i in range(len(ids)) if i not in slots]
    assert torch.equal(embeds[rest], net.llm.get_input_embeddings()(torch.tensor(ids))[rest])
    assert slots[50] - slots[49] > 2 and slots[49] - slots[0] == 49  # two recordings, each in one piece


@pytest.mark.parametrize("prompt, n, placed", [
    ("что?", 1, f"{A}\nчто?"), ("что?", 2, f"{A}\n{A}\nчто?"), (f"что? {A}", 1, f"что? {A}"), ("что?", 0, "что?"),
    ("что? <|start_of_audio|><|end_of_audio|>", 1, f"что? {A}"),
    (f"{A} или <|start_of_audio|><|end_of_audio|>?", 2, f"{A} или {A}?")])
def test_placeholders(prompt, n, placed):
    assert nb.place_audio(prompt, n) == placed


def test_placeholders_must_match():
    with pytest.raises(ValueError, match="2 .* for 1"):
        nb.place_audio(f"{A} {A}", 1)


def test_labels_are_the_answer_and_its_end(net, tokenizer):
    sample = data.Sample("анна купила девять конфет", [np.full(16000, 99, np.int16)])
    ids, labels, _ = data.encode(sample, tokenizer, net.config)
    assert tokenizer.decode([t for t in labels if t != -100]) == "анна купила девять конфет<|im_end|>"
    prompt, no_labels, _ = data.encode(sample, tokenizer, net.config, with_answer=False)
    assert ids[:len(prompt)] == prompt and len(prompt) < len(ids) and set(no_labels) == {-100}
    assert set(labels[:len(prompt)]) == {-100}
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_labels_of_a_conversation(net, tokenizer):
    turns = [{"role": "user", "content": "раз"}, {"role": "assistant", "content": "два"}]
    sample = data.Sample("четыре", question="три", system="", history=turns)
    ids, labels, windows = data.encode(sample, tokenizer, net.config)
    assert windows == [] and net.config.audio_token_id not in ids
    assert tokenizer.decode([t for t in labels if t != -100]) == "два<|im_end|>четыре<|im_end|>"
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(sample.messages(), tokenize=False).rstrip("\n")


def test_template_takes_content_parts(tokenizer):
    def render(content):
        return tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert render([{"type": "audio"}, {"type": "text", "text": "\nчто?"}]) == render(f"{A}\nчто?")


def test_loss_is_full_cross_entropy(net, tokenizer):
    """Logits at label rows only, without padding masks: the same loss as all logits with a mask, row by row."""
    rows = data.Dataset([data.Sample("анна купила девять конфет", [(tone(4) * 9999).numpy().astype(np.int16)]),
                         data.Sample("семь", [(tone(1) * 9999).numpy().astype(np.int16)])], tokenizer, net.config)
    out = net(**rows.pad([rows.item(0), rows.item(1)]))
    total, n = 0, 0
    for ids, labels, mel, _ in (rows.item(0), rows.item(1)):
        logits = net(torch.tensor([ids]), mel).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
        n += sum(t != -100 for t in labels)
    assert out.logits.shape == (n, len(tokenizer))
    assert out.loss.item() == pytest.approx((total / n).item(), rel=1e-5)


def test_frozen_means_frozen(tokenizer):
    net = nb.BorealisForConditionalGeneration(nb.tiny_config(tokenizer, frozen=["encoder"]))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    assert not net.encoder.training and not any(m.training for m in net.encoder.modules()) and net.llm.training
    rows = data.Dataset([data.Sample("семь", [(tone(1) * 9999).numpy().astype(np.int16)])], tokenizer, net.config)
    batch = rows.pad([rows.item(0)])
    seen = []
    net.encoder.register_forward_hook(lambda m, i, o: seen.append(o.last_hidden_state.requires_grad))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(**batch).loss.backward()
    assert seen == [False]  # no graph through the encoder
    assert all(p.grad is None for p in net.encoder.parameters())
    optimizer.step()
    after = net.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("encoder."))
    assert not any(torch.equal(before[k], after[k]) for k in before if k.startswith("adapter."))


def test_batched_generation_is_single_generation(net):
    """Short, long, two recordings, text only; greedy tokens of the batch equal each row's own, to the token."""
    audio = [[tone(1, 1)], [tone(7, 2)], [tone(2, 3), tone(4, 4)], [], [tone(0.1, 5)]]
    prompts = ["что?", f"слушай {A} и скажи", f"{A} или {A}?", "сколько будет семь", "<|start_of_audio|><|end_of_audio|>"]
    together = net.generate(audio, prompts, max_new_tokens=24)
    for i in range(len(audio)):
        alone = net.generate([audio[i]], [prompts[i]], max_new_tokens=24)[0]
        assert together[i][:len(alone)].tolist() == alone.tolist()
    assert together.shape[1] <= 24  # new tokens only, no prompt


def test_generate_takes_what_users_have(net):
    wave = tone(1)
    reference = net.generate(wave, max_new_tokens=6).tolist()
    assert net.generate(wave.numpy(), max_new_tokens=6).tolist() == reference
    assert net.generate([wave, wave], max_new_tokens=6).tolist() == reference * 2
    both = net.generate([wave, tone(2)], user_prompt=f"{A} {A}", max_new_tokens=6)
    assert both.shape[0] == 1  # a prompt with two placeholders takes both recordings
    assert isinstance(net.decode(both[0]), str) and len(net.decode(both)) == 1
    assert net.generate(user_prompt="семь", system_prompt=None, max_new_tokens=6).shape[0] == 1


@pytest.mark.parametrize("audio, says", [
    (torch.zeros(2, 100), "1-D"), (torch.zeros(0), "empty"), (torch.tensor([0.1, float("nan")]), "NaN"),
    (np.zeros(100, np.int16), "float"), (torch.full((100,), 1e30), "scale"), (torch.full((99,), -np.inf), "Inf")])
def test_generate_refuses(net, audio, says):
    with pytest.raises(ValueError, match=says):
        net.generate(audio)


def test_whisper_as_the_hub_has_it(parts, tmp_path):
    """openai/whisper-*: the model with its decoder and head, in fp16."""
    from transformers import WhisperForConditionalGeneration
    config = WhisperConfig.from_pretrained(parts["encoder"])
    hub = WhisperForConditionalGeneration(config).half()
    hub.save_pretrained(tmp_path)
    net = nb.BorealisForConditionalGeneration.from_parts(str(tmp_path), parts["plain"], torch.float32)
    assert torch.equal(net.encoder.layers[0].fc1.weight, hub.model.encoder.layers[0].fc1.weight.float())
    with pytest.raises(ValueError, match="is a qwen3 model, not whisper"):
        nb.BorealisForConditionalGeneration.from_parts(parts["plain"], parts["plain"])


def test_from_parts_keeps_pretrained_weights(tokenizer, parts):
    net = nb.BorealisForConditionalGeneration.from_parts(parts["encoder"], parts["llm"])
    assert {m.config._attn_implementation for m in net.modules() if hasattr(m, "config")} == {"sdpa"}
    encoder = WhisperModel.from_pretrained(parts["encoder"]).encoder.state_dict()
    assert all(torch.equal(v, net.encoder.state_dict()[k]) for k, v in encoder.items())
    llm = Qwen3ForCausalLM.from_pretrained(parts["llm"]).state_dict()
    for k, v in llm.items():  # the padded vocabulary shrinks to the tokenizer's, the two new rows are means, all else stays
        mine = net.llm.state_dict()[k]
        if v.shape[0] == 1500:
            assert torch.allclose(mine[-2:], v[:len(mine) - 2].mean(0).expand(2, -1))
            mine, v = mine[:-2], v[:len(mine) - 2]
        assert torch.equal(mine, v), k
    assert net.config.llm_config.vocab_size == len(net.tokenizer) < 1500


@needs_shared
def test_real_tokenizer_ids():
    real = AutoTokenizer.from_pretrained(SHARED / "qwen3_tokenizer")
    stock = real.chat_template
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    theirs = real.apply_chat_template(chat, tokenize=False)
    prompt = real.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    tok = nb.add_audio_tokens(real)
    assert tok.convert_tokens_to_ids([A, M]) == [151669, 151670] and len(tok) == 151671 and stock != tok.chat_template
    assert tok.apply_chat_template(chat, tokenize=False) == theirs
    assert tok.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True) == prompt
    ids, labels = nb.build_ids(tok, nb.BorealisConfig(), [{"role": "user", "content": f"Что? {A}"}, chat[2]], [2])
    assert ids.count(151669) == 750 and ids.count(151670) == 2
    assert tok.decode([t for t in labels if t != -100]) == "a<|im_end|>"
    theirs = nb.add_audio_tokens(AutoTokenizer.from_pretrained(SHARED / "qwen3_tokenizer"), original=True)
    assert theirs.convert_tokens_to_ids([M, nb.END, A]) == [151669, 151670, 151671]


# -----------------------------------------------------------------------------
# data.py

@pytest.mark.parametrize("name, rate, channels", [
    ("a.wav", 8000, 1), ("a.wav", 44100, 2), ("a.flac", 48000, 3), ("a.ogg", 16000, 1), ("a.mp3", 22050, 2),
    ("a.wav", 15999, 1), ("a.wav", 11025, 1)])
def test_audio_of_any_rate_and_channels(tmp_path, name, rate, channels):
    t = np.arange(rate) / rate
    wave = np.stack([np.sin(2 * np.pi * 440 * t)] + [np.zeros(rate)] * (channels - 1), 1) * 0.5
    soundfile.write(tmp_path / name, wave, rate)
    x = data.load_audio(str(tmp_path / name))
    assert x.dim() == 1 and abs(len(x) - 16000) <= 16000 * 0.1  # mp3 pads its ends
    spectrum = torch.fft.rfft(x[2000:14000])
    assert abs(spectrum.abs().argmax().item() * 16000 / 12000 - 440) < 2
    assert x[2000:14000].abs().max().item() == pytest.approx(0.5 / channels, rel=0.1)  # the mean of the channels


def test_corpus_same_seed_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 12)
    runs = []
    for folder, seed in [("a", 0), ("b", 0), ("c", 1)]:
        monkeypatch.setenv("NANOBOREALIS_CACHE", str(tmp_path / folder))
        runs.append(data.embedded("ru", "train", 20, seed) + data.embedded("en", "books", 5, seed))
    pcm = [[s.audio[0].tobytes() for s in r] for r in runs]
    assert pcm[0] == pcm[1] != pcm[2]
    assert [s.answer for s in runs[0]] == [s.answer for s in runs[1]]
    assert all(0.2 < len(s.audio[0]) / 16000 < 6 and np.abs(s.audio[0]).max() > 1000 for s in runs[0])


def test_corpus_holds_out_voices_and_sentences():
    assert not set(data.TRAIN_VOICES) & set(data.EVAL_VOICES)
    for lang in ("ru", "en"):
        train_set, held_out = data.embedded(lang, "train", 250), data.embedded(lang, "clean", 250)
        assert not {s.answer for s in train_set} & {s.answer for s in held_out}
        assert len({s.answer for s in held_out}) == 250
        assert set(" ".join(s.answer for s in held_out).split()) <= set(data.vocabulary(lang))
        assert {s.name.split("/")[2] for s in held_out} == set(data.EVAL_VOICES)
        assert {s.name.split("/")[2] for s in train_set} <= set(data.TRAIN_VOICES)
        assert len(data.vocabulary(lang)) >= 150


def test_tokenizer_round_trip(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"анна купила 9 конфет, ё-й! {A}<|im_end|> hello\n\n<think>"
    ids = loaded(text).input_ids
    assert ids == tokenizer(text).input_ids and loaded.decode(ids) == text
    assert loaded.chat_template == nb.CHAT_TEMPLATE
    assert len(tokenizer("анна").input_ids) == 1  # a known word is a token


def bad_manifest(folder, good=60):
    """Good rows, and three bad ones in a hundred of different kinds."""
    soundfile.write(folder / "good.wav", tone(1).numpy(), 16000)
    return [{"audio": "good.wav", "text": "семь"}] * good


BAD = [('{"audio": "good.wav", "text": ', "broken JSON"), ({"audio": "nowhere.wav", "text": "семь"}, "missing file"),
       ({"audio": "noise.wav", "text": "семь"}, "not audio"), ({"audio": "good.wav", "text": "  "}, "empty text"),
       ({"audio": "nan.wav", "text": "семь"}, "audio holds NaN or Inf"), ({"audio": "short.wav", "text": "семь"}, "shorter than 0.1 s"),
       ({"audio": "silent.wav", "text": "семь"}, "silent"), ({"text": "семь"}, "no audio field"), ("[1]", "not a JSON object"),
       ({"audio": "good.wav", "text": "семь " * 2000}, "does not fit into 2048 tokens"),
       ({"audio": "good.wav", "text": "семь<|im_end|>"}, "control token in the text"),
       ({"audio": "good.wav", "question": f"{A} {A}", "answer": "семь"}, "placeholders and recordings differ in number"),
       ({"conversation": [{"role": "user", "content": "раз"}]}, "conversation does not end with a question and its answer")]


@pytest.fixture
def bad_files(tmp_path):
    (tmp_path / "noise.wav").write_bytes(b"RIFF this is no recording" * 9)
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan] * 4000, np.float32), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "short.wav", tone(0.09).numpy(), 16000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    return tmp_path


def check_manifest(path, tokenizer, config, strict=False):
    bad = data.BadRows(strict)
    samples, total = data.read_manifest(path, bad)
    kept = data.usable(samples, data.Dataset(samples, tokenizer, config, max_tokens=2048), bad, progress=False)
    bad.report(total, path)
    return kept, bad


@pytest.mark.parametrize("row, reason", BAD, ids=[r for _, r in BAD])
def test_bad_rows_are_counted_by_reason(bad_files, tokenizer, net, capsys, row, reason):
    good = bad_manifest(bad_files)
    path = write_manifest(bad_files / "m.jsonl", good[:30] + [row] + good[30:])
    kept, bad = check_manifest(path, tokenizer, net.config)
    assert len(kept) == 60 and dict(bad.reasons) == {reason: 1}
    assert f"left out 1 of 61 rows: 1 {reason} (first: m.jsonl:31)" in capsys.readouterr().err
    with pytest.raises(data.UserError, match="m.jsonl:31"):
        check_manifest(path, tokenizer, net.config, strict=True)


def test_too_many_bad_rows_stop_the_run(bad_files, tokenizer, net):
    path = write_manifest(bad_files / "m.jsonl", bad_manifest(bad_files, 100) + [r for r, _ in BAD])
    with pytest.raises(data.UserError, match="13 of 113 rows are unusable"):
        check_manifest(path, tokenizer, net.config)


@pytest.mark.parametrize("sizes, shares", [([10], [1]), ([7, 30], [0.9, 0.1])])
def test_schedule_does_not_depend_on_ranks(sizes, shares):
    one = list(data.Schedule(sizes, shares, 0, range(3, 6), 8))
    assert [len(step) for step in one] == [8, 8, 8]
    for world in (1, 2, 4, 8):
        ranks = [list(data.Schedule(sizes, shares, 0, range(3, 6), 8, r, world)) for r in range(world)]
        for step in range(3):
            assert {len(r[step]) for r in ranks} == {8 // world}
            assert sorted(key for r in ranks for key in r[step]) == sorted(one[step])


def test_schedule_keeps_the_shares_and_walks_through_each_pool():
    schedule = data.Schedule([50, 7, 400], [0.6, 0.155, 0.245], 1, range(1000), 2)
    dealt = [i for step in schedule for i, _ in step]
    pools = np.searchsorted([50, 57], dealt, side="right")
    for block in (pools[:1000], pools[1000:]):
        assert np.bincount(block).tolist() == [600, 155, 245]
    for pool, size in enumerate((50, 7, 400)):  # each sample once before any comes again
        walk = [i for i, p in zip(dealt, pools) if p == pool]
        for start in range(0, len(walk) - size, size):
            assert len(set(walk[start:start + size])) == size
    assert sum(pools[:1000] != pools[1000:]) > 300  # and the turns are shuffled, not a pattern


def test_data_script_shows_a_sample(tmp_path, monkeypatch, capsys):
    code, out, _ = exit_of(data.main, monkeypatch, capsys, "--wav", tmp_path / "s.wav")
    assert code == 0 and "the labels say" in out and "x 25" in out
    assert soundfile.info(tmp_path / "s.wav").samplerate == 16000


# -----------------------------------------------------------------------------
# augment.py

RATE = 16000
RANGES = {name: effect[1:] for name, effect in ((f.name, f.default) for f in fields(augment.AugmentConfig))
          if isinstance(effect, tuple)}


@pytest.fixture(scope="session")
def banks():
    return augment.open_banks()


@pytest.fixture(scope="session")
def speech(corpus):
    return np.concatenate([s.audio[0] for s in corpus[:8]]).astype(np.float32) / 32768 * 0.1  # far from full scale


def change(wave, banks=(None, None), seed=0, **effects):
    """A wave through effects with fixed parameters: change(w, gain=3) or change(w, band_pass=(300, 3400))."""
    fixed = {k: v if k == "opus" else (1, *np.repeat(np.atleast_1d(v), 2)) for k, v in effects.items()}
    return augment.augment(wave, augment.AugmentConfig(**fixed), np.random.default_rng(seed), *banks)


def sine(hz, seconds=2.0):
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def pitch_of(wave):
    """Frequency of the strongest component, by a parabola through the peak of a windowed spectrum."""
    level = np.log(np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 1 << 18)) + 1e-12)
    k = level[1:-1].argmax() + 1
    a, b, c = level[k - 1:k + 2]
    return (k + (a - c) / (2 * (a - 2 * b + c))) * RATE / (1 << 18)


def power(wave, low=0, high=8000):
    """Mean square between two frequencies."""
    f = np.fft.rfftfreq(len(wave), 1 / RATE)
    return (np.abs(np.fft.rfft(wave)[(f >= low) & (f < high)]) ** 2).sum() / len(wave) ** 2


WHITE = (0.05 * np.random.default_rng(0).standard_normal(4 * RATE)).astype(np.float32)


def test_published_ranges():
    """The post's table, and the original's stages: literal numbers, and nothing is drawn outside."""
    assert RANGES["noise"] == (18, 28) and RANGES["eq"] == 7 * (-6, 6) and RANGES["gain"] == (-3, 3)
    assert RANGES["band_pass"] == (150, 350, 3200, 5200) and RANGES["resample"] == (14000, 16000)
    assert RANGES["telephony"] == (8000, 12000, 180, 180, 4200, 4200) and RANGES["codec"] == (96, 160)
    assert RANGES["clipping"] == (0.82, 0.95) and RANGES["pitch"] == (-4, 4) and RANGES["speed"] == (0.8, 1.2)
    assert RANGES["mask"] == (0, 2, 0, 2) and augment.AugmentConfig().mask_width == (27, 100)
    assert [(s.start_epoch, s.name, s.config.touched) for s in augment.CURRICULUM] == [
        (0, "clean", 0), (1, "light", 0.40), (3, "intense", 0.65), (4, "heavy", 0.72)]
    heavy = augment.CURRICULUM[3].config
    assert heavy.telephony == (.5, 6000, 9600, 220, 360, 2500, 3600) and heavy.codec == (.35, 56, 128)
    rng = np.random.default_rng(0)
    for effect in (heavy.telephony, heavy.eq, heavy.noise, heavy.speed):
        drawn = [d for d in (augment.draw(effect, rng) for _ in range(2000)) if d]
        assert abs(len(drawn) / 2000 - effect[0]) < 0.05
        assert (np.min(drawn, 0) >= effect[1::2]).all() and (np.max(drawn, 0) <= effect[2::2]).all()
        assert (np.ptp(drawn, 0) > 0.98 * np.subtract(effect[2::2], effect[1::2])).all()


@pytest.mark.parametrize("snr", [-5, 0, 10, 18, 28])
def test_noise_reaches_its_snr(speech, banks, snr):
    for seed in range(10):
        noise = change(speech, banks, seed, noise=snr) - speech
        assert 10 * np.log10(np.mean(speech ** 2) / np.mean(noise ** 2)) == pytest.approx(snr, abs=0.5)


@pytest.mark.parametrize("effects", [dict(pitch=4), dict(pitch=-4), dict(speed=1.2), dict(speed=0.8), dict(pitch=-4, speed=0.8)])
def test_noise_comes_after_pitch_and_speed(speech, banks, effects):
    """Its SNR and its bandwidth are what was asked for: nothing of the rate change is in it."""
    white = [(8000 * np.random.default_rng(1).standard_normal(60 * RATE)).astype(np.int16)]
    noise = change(speech, (white, None), noise=10, **effects) - change(speech, **effects)
    assert 10 * np.log10(np.mean(change(speech, **effects) ** 2) / np.mean(noise ** 2)) == pytest.approx(10, abs=0.5)
    assert power(noise, 6500, 7800) / power(noise) == pytest.approx(1300 / 8000, rel=0.1)
    assert np.std(noise[-400:]) == pytest.approx(np.std(noise), rel=0.2)  # to the very end


def test_loud_sound_does_not_clip_in_a_codec(speech):
    loud = speech / np.abs(speech).max() * 2
    for kind in ("mp3", "opus"):
        assert np.corrcoef(augment.codec(loud, 32, kind), augment.codec(loud / 2, 32, kind))[0, 1] > 0.999


def test_fft_sizes_are_a_rate():
    for n in (1, 500, 2049, 3449, 16000, 34048, 160000, 480000):
        for ratio in np.linspace(0.6, 1.6, 60):
            N, M = augment.fft_sizes(n + 2048, ratio)
            assert N >= n + 2048 and N % 2 == M % 2 == 0 and abs(M / N / ratio - 1) < 1e-3


def test_more_noise_and_rooms(speech, banks):
    one, three = (change(speech, banks, 3, noise=20, more_noise=n) - speech for n in (1, 2))
    assert np.mean(one ** 2) < np.mean(three ** 2)
    assert not np.allclose(change(speech, banks, 3, room=(), more_room=1), change(speech, banks, 3, room=()))


@pytest.mark.parametrize("low, high", [(150, 3200), (350, 5200), (120, 2400), (300, 3400)])
def test_band_pass(low, high):
    out, inside = change(WHITE, band_pass=(low, high)), (low * 1.5, high / 1.5)
    assert 10 * np.log10(power(out, *inside) / power(WHITE, *inside)) == pytest.approx(0, abs=0.3)
    for edges in ((1, low / 2), (min(2 * high, 7999), 8000)) if 2 * high < 7900 else ((1, low / 2),):
        assert 10 * np.log10(power(out, *edges) / power(WHITE, *edges)) < -20


def test_eq_at_its_centres():
    gains = [6, -6, 3, -4, 5, -2, 1]
    for hz, gain in zip(augment.EQ_HZ, gains):
        wave = sine(hz, 4)
        out = change(wave, eq=gains)
        assert 10 * np.log10(power(out, hz - 5, hz + 5) / power(wave, hz - 5, hz + 5)) == pytest.approx(gain, abs=1)


@pytest.mark.parametrize("effect, rate", [("resample", 14000), ("resample", 8800), ("telephony", 8000), ("telephony", 6000)])
def test_nothing_is_left_above_a_lower_rate(effect, rate):
    out = change(WHITE, **{effect: rate if effect == "resample" else (rate, 180, 4200)})
    assert power(out, rate / 2 + 50, 8000) < 1e-5 * power(WHITE, rate / 2 + 50, 8000)
    assert power(out, 500, rate / 2 * 0.6) > 0.8 * power(WHITE, 500, rate / 2 * 0.6) and len(out) == len(WHITE)


@pytest.mark.parametrize("db", [-5, -3, 0, 3])
def test_gain(speech, db):
    assert np.allclose(change(speech, gain=db), speech * 10 ** (db / 20), atol=1e-5)


def test_gaussian_and_clipping(speech):
    assert np.std(change(speech, gaussian=0.01) - speech) == pytest.approx(0.01, rel=0.02)
    out, top = change(speech, clipping=0.85), np.abs(speech).max()
    loud = np.abs(speech) >= 0.85 * top
    assert np.allclose(np.abs(out[loud]), top, rtol=1e-5) and np.allclose(out[~loud], speech[~loud] / 0.85, rtol=1e-5)


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.1, 1.2])
@pytest.mark.parametrize("n", [1600, 16001, 160000])
def test_speed(factor, n):
    wave = sine(440, n / RATE)
    out = change(wave, speed=factor)
    assert abs(len(out) - n / factor) <= max(1, n / factor / 1000)
    if n > 1600:
        assert pitch_of(out) == pytest.approx(440 * factor, rel=0.002)
    body = slice(len(out) // 4, 3 * len(out) // 4)
    assert np.std(out[body]) == pytest.approx(np.std(wave), rel=0.03)


@pytest.mark.parametrize("semitones", [-4, -2.5, -1, 1, 3, 4])
@pytest.mark.parametrize("hz", [110, 440, 1500])
def test_pitch(semitones, hz):
    wave = sine(hz)
    out = change(wave, pitch=semitones)
    assert len(out) == len(wave) and pitch_of(out) == pytest.approx(hz * 2 ** (semitones / 12), rel=0.01)
    assert np.std(out) == pytest.approx(np.std(wave), rel=0.05)


def test_pitch_keeps_time(speech):
    """The words stay where they were: loudness over time correlates."""
    def loudness(x):
        return np.sqrt(np.convolve(x ** 2, np.ones(800) / 800, "same"))
    for semitones in (-4, 4):
        assert np.corrcoef(loudness(speech), loudness(change(speech, pitch=semitones)))[0, 1] > 0.9
    both = change(speech, pitch=3, speed=1.2)
    assert len(both) == round(len(speech) / 1.2)


@pytest.mark.parametrize("kind", ["mp3", "opus"])
@pytest.mark.parametrize("rate, kbps", [(16000, 128), (16000, 56), (16000, 40), (12000, 64), (12000, 32), (8000, 48), (8000, 32)])
def test_codec(speech, kind, rate, kbps, monkeypatch):
    written = []
    real = soundfile.write
    monkeypatch.setattr(soundfile, "write", lambda f, *a, **k: (real(f, *a, **k), written.append(f.tell()))[0])
    out = augment.codec(speech, kbps, kind, rate)
    assert written[0] * 8 / 1000 / (len(speech) / RATE) == pytest.approx(kbps, rel=0.15)
    assert len(out) == len(speech) and not np.allclose(out, speech, atol=1e-4)
    low = augment.spectral(speech, responses=[lambda f: augment.resample_response(f, rate * 0.9)])
    out = augment.spectral(out, responses=[lambda f: augment.resample_response(f, rate * 0.9)])
    assert np.corrcoef(low, out)[0, 1] > 0.97  # any delay would show here
    for low_kbps in (8, 16, 24, 30, 36):  # not delayed either, whatever is asked for
        x = augment.spectral(augment.codec(speech, low_kbps, kind, rate), responses=[lambda f: augment.band_response(f, 300, 3000)])
        assert np.corrcoef(augment.spectral(speech, responses=[lambda f: augment.band_response(f, 300, 3000)]), x)[0, 1] > 0.8


def test_the_linear_effects_commute_into_one_fft(speech, banks):
    """All at once is one after another, and a room is a plain convolution."""
    gains, tail = [3, -2, 4, -5, 1, 2, -3], 2048
    wave = np.pad(speech, (tail, 4 * tail))
    together = change(wave, banks, eq=gains, band_pass=(200, 4000), gain=-2, telephony=(9000, 200, 3500))
    one_by_one = wave
    for effect in (dict(eq=gains), dict(band_pass=(200, 4000)), dict(gain=-2), dict(telephony=(9000, 200, 3500))):
        one_by_one = change(one_by_one, banks, **effect)
    assert np.abs(together - one_by_one).max() < 2e-3 * np.abs(together).max()
    ir = banks[1][0]
    assert np.allclose(augment.spectral(speech, irs=[ir]), np.convolve(speech, ir)[:len(speech)], atol=1e-4)


@pytest.mark.parametrize("name, config", [*augment.examples().items()])
@pytest.mark.parametrize("n", [1, 1600, 24000])
def test_any_sound_passes(name, config, n, banks):
    """Silence, 0.1 s, one sample, full scale: finite, no longer or shorter than the speed says, never beyond full scale."""
    full = np.sign(np.sin(np.arange(n) / 20)).astype(np.float32)
    for wave in (np.zeros(n, np.float32), full, 1e-6 * full):
        for seed in range(3):
            out = augment.augment(wave, config, np.random.default_rng(seed), *banks)
            assert out.dtype == np.float32 and np.isfinite(out).all() and np.abs(out).max() <= 1
            assert len(out) == n or (config.speed[0] and n / 1.25 - 1 <= len(out) <= n / 0.79 + 1)


def test_silence_stays_silent(banks):
    for name in ("pitch", "speed", "noise", "room", "eq", "band_pass", "gain", "clipping", "resample", "telephony"):
        out = augment.augment(np.zeros(8000, np.float32), augment.examples()[name], np.random.default_rng(0), *banks)
        assert np.abs(out).max() == 0


def test_no_clipping_by_accident(speech, banks):
    """A result beyond full scale is turned down as a whole: its shape stays."""
    loud = speech / np.abs(speech).max()
    out = change(loud, gain=6)
    assert np.abs(out).max() == pytest.approx(1) and np.allclose(out, loud, atol=1e-3)


def test_level_rule_is_one(tmp_path):
    """A float file beyond full scale is turned down, a quiet one is not turned up."""
    for peak, expected in ((3.0, 1.0), (0.2, 0.2)):
        soundfile.write(tmp_path / "a.wav", peak * sine(440) / 0.3, RATE, subtype="FLOAT")
        wave = data.load_audio(str(tmp_path / "a.wav"))
        assert wave.abs().max().item() == pytest.approx(expected, rel=1e-3)
        assert torch.equal(nb.check_wave(wave), wave)
    assert nb.check_wave(torch.tensor([0.5, -4.0])).tolist() == [0.125, -1.0]


def test_a_clip_is_a_function_of_seed_epoch_and_index(speech, banks):
    stage = [augment.AugmentationStage(0, augment.CURRICULUM[3].config)]
    wave = torch.from_numpy(speech)
    one, two = (augment.Augmenter(stage, *banks, seed=5) for _ in range(2))
    one.wave(wave, 0, 99, 0)  # what came before does not matter
    assert all(torch.equal(one.wave(wave, e, i, 0), two.wave(wave, e, i, 0)) for e in (0, 1) for i in range(4))
    variants = [one.wave(wave, *key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    variants.append(augment.Augmenter(stage, *banks, seed=6).wave(wave, 0, 0, 0))
    assert len({(len(v), round(v.abs().sum().item(), 3)) for v in variants}) == 5
    assert torch.equal(one.wave(wave, 0.1, 3, 0), one.wave(wave, 0.9, 3, 0))  # within an epoch, a sample comes once
    touched = [i for i in range(3000) if one.touches(0, i)]
    assert len(touched) / 3000 == pytest.approx(0.72, abs=0.03)
    slow = augment.Augmenter([augment.AugmentationStage(0, augment.AugmentConfig(touched=.72, speed=(.4, .5, .5)))], *banks)
    assert np.mean([len(slow.wave(wave[:9], 0, i, 0)) > 9 for i in touched]) == pytest.approx(0.4, abs=0.04)


def test_stages_by_epoch():
    config = augment.AugmentConfig()
    stages = [augment.AugmentationStage(start, config, str(start)) for start in (2.5, 0, 1)]
    augmenter = augment.Augmenter(stages, None, None)
    assert [augmenter.stage(e).start_epoch for e in (0, 0.99, 1, 2, 2.49, 2.5, 100)] == [0, 0, 1, 1, 1, 2.5, 2.5]
    default = augment.Augmenter(augment.CURRICULUM, None, None)
    assert [default.stage(e).name for e in range(6)] == ["clean", "light", "light", "intense", "heavy", "heavy"]


def test_spec_augment():
    mel, config = torch.randn(128, 3000), augment.AugmentConfig(mask=(1, 2, 2, 2, 2))
    sizes = []
    for seed in range(200):
        out = augment.mask(mel, 2000, config, np.random.default_rng(seed))
        changed = out != mel
        assert (out[changed] == mel[:, :2000].mean()).all()
        bands, times = changed.all(1).sum().item(), changed.all(0).sum().item()
        assert bands <= 2 * 27 and times <= 2 * 100 and not changed[:, 2000:][~changed.all(1)].any()
        sizes.append((bands, times))
    assert (np.max(sizes, 0) > [40, 150]).all()
    short = augment.mask(mel, 100, config, np.random.default_rng(0)) != mel
    assert short.all(0).sum() <= 20  # at most a tenth of a short clip a mask
    assert augment.mask(mel, 0, config, np.random.default_rng(0)) is mel
    assert augment.mask(mel, 2000, augment.AugmentConfig(), np.random.default_rng(0)) is mel


def test_augmented_data_does_not_depend_on_workers(corpus, tokenizer, net, banks):
    samples = [*corpus[:11], data.Sample("два", question="раз", system="")]
    stages = [replace(s, start_epoch=i / 2) for i, s in enumerate(augment.CURRICULUM)]
    def batches(workers):
        dataset = data.Dataset(samples, tokenizer, net.config, 100, augment.Augmenter(stages, *banks))
        schedule = data.Schedule([12], [1], 0, range(7), 4)
        return list(torch.utils.data.DataLoader(dataset, batch_sampler=schedule, num_workers=workers,
                                                collate_fn=dataset.collate))
    alone, two = batches(0), batches(2)
    assert all(torch.equal(x[k], y[k]) for a, b in zip(alone, two) for x, y in zip(a["micro"], b["micro"]) for k in x)
    plain = data.Dataset(samples, tokenizer, net.config)
    same = [torch.equal(alone[s]["micro"][m]["input_features"], micro["input_features"])
            for s, keys in enumerate(data.Schedule([12], [1], 0, range(7), 4))
            for m, micro in enumerate(plain.collate([plain[key] for key in keys])["micro"])]
    assert all(same[:4]) and not all(same[12:])  # clean first, changed later


def test_a_slowed_row_still_fits(corpus, tokenizer, net, banks):
    """Half the speed would be a window more, and too long: the clip is taken as it was."""
    sample = data.Sample("семь", [np.resize(corpus[0].audio[0], 30000)])
    slow = augment.Augmenter([augment.AugmentationStage(0, augment.AugmentConfig(speed=(1, .5, .5)))], *banks)
    n = len(data.encode(sample, tokenizer, net.config)[0])
    lengths = [data.Dataset([sample], tokenizer, net.config, 0, slow, limit)[0, 0.0][0][3] for limit in (n + 25, n)]
    assert list(map(sum, lengths)) == [60000, 30000]


def test_made_banks_are_the_same_every_time(banks):
    again = augment.open_banks()
    for a, b in zip(banks, again):
        assert len(a) == augment.MADE and all(np.array_equal(x, y) for x, y in zip(a, b))
    other = augment.open_bank("made", "Echo", "clean")
    assert not np.array_equal(other[0], banks[1][0])  # evaluation has rooms of its own
    assert all(np.sum(ir ** 2) == pytest.approx(1, rel=1e-4) and np.abs(ir).argmax() == 0 for ir in banks[1])


def test_banks_from_a_folder(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    for i in range(30):
        short = i < 10  # like the impulse response of a microphone
        soundfile.write(tmp_path / "sub" / f"{i}.flac", np.stack([sine(200 + i, 0.05 if short else 0.5)] * 2, 1),
                        8000 if i % 2 else 44100)
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    (tmp_path / "notes.txt").write_text("not a recording at all")
    bank = augment.open_bank(str(tmp_path), "Musan")
    assert len(bank) == 30 and "broken.wav" in capsys.readouterr().err
    rng = np.random.default_rng(0)
    assert [len(augment.crop(bank[0], rng, n)) for n in (1, 1000, 16000, 50000)] == [1, 1000, 16000, 50000]
    assert all(ir.dtype == np.float32 for ir in augment.open_bank(str(tmp_path), "Echo"))
    for source, says in ((tmp_path / "nowhere", "no folder"), (tmp_path / "empty", "no audio in")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(data.UserError, match=says):
            augment.open_bank(str(source), "Musan")


def test_banks_from_the_hub(tmp_path, monkeypatch):
    """The dataset's layout, parquet with a struct of bytes and path, in a local folder; and no hub at all."""
    import datasets
    monkeypatch.setattr(augment, "NOISE_DATASET", str(tmp_path / "hub"))
    with pytest.raises(data.UserError, match="give a folder of audio"):
        augment.open_bank("hub", "Musan")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split in ("Musan", "Echo"):
        rows = []
        for i in range(3):
            soundfile.write(buffer := io.BytesIO(), sine(300 + i, 1), RATE, format="WAV")
            rows.append({"audio": {"bytes": buffer.getvalue(), "path": f"{i}.wav"}})
        table = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(sampling_rate=RATE, decode=False))
        table.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    assert [len(augment.open_bank("hub", split)) for split in ("Musan", "Echo")] == [3, 3]


def test_augment_script(tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "in.wav", np.stack([sine(300), sine(500)], 1), 22050)
    code, out, _ = exit_of(augment.main, monkeypatch, capsys, tmp_path / "in.wav", tmp_path / "out")
    assert code == 0 and {f"{n}.wav" for n in augment.examples()} | {"spectrograms.png"} == {
        p.name for p in (tmp_path / "out").iterdir()}
    assert {"pitch", "speed", "noise", "room", "eq", "band_pass", "gain", "gaussian", "clipping", "resample", "telephony", "mp3",
            "opus", "mask", "stage_clean", "stage_light", "stage_intense", "stage_heavy"} <= set(augment.examples())
    before, _ = soundfile.read(tmp_path / "out" / "before.wav")
    clean, _ = soundfile.read(tmp_path / "out" / "stage_clean.wav")
    assert np.array_equal(before, clean)
    (tmp_path / "text.wav").write_text("no")
    soundfile.write(tmp_path / "noise.wav", sine(300), RATE)
    for argv, says in (([tmp_path / "no.wav", tmp_path / "o"], "missing"), ([tmp_path / "text.wav", tmp_path / "o"], "not audio"),
                       ([tmp_path / "in.wav", tmp_path / "in.wav"], "is a file"),
                       ([tmp_path / "in.wav", tmp_path / "in.wav" / "o"], "is a file"),
                       ([tmp_path / "noise.wav", tmp_path], "overwritten"), ([tmp_path / "in.wav"], "required"),
                       ([tmp_path / "in.wav", tmp_path / "o", "--noise", "nowhere"], "no folder nowhere")):
        code, _, err = exit_of(augment.main, monkeypatch, capsys, *argv)
        assert code == 2 and says in err and err.startswith("error:") and err.count("\n") == 1 and not (tmp_path / "o").exists()


# -----------------------------------------------------------------------------
# train.py

FAST = ["--preset", "tiny", "--workers", "0", "--save_every", "1000"]
NOISY = ["--curriculum", "0,0,0.5,1.5"]  # light from the start, intense and heavy within the first two epochs


def test_accumulation_is_one_big_batch(manifest, tmp_path, monkeypatch):
    """Mixed lengths and text-only rows; a mean of micro-batch means would fail this."""
    runs = [train_now(monkeypatch, *FAST, "--train_manifest", manifest, "--steps", 4, "--batch_size", b,
                      "--out", tmp_path / str(b))[1] for b in (16, 5, 1)]
    assert np.abs(losses(runs[0]) - losses(runs[1])).max() < 1e-5
    assert np.abs(losses(runs[0]) - losses(runs[2])).max() < 1e-5


def torchrun(processes, *flags, script="train.py"):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port",
                           "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(HERE / script), *map(str, flags)],
                          capture_output=True, text=True, env=env, timeout=300)


def test_two_processes_are_one(manifest, tmp_path, monkeypatch):
    """torchrun, gloo, DDP: the losses of one process to 1e-5, text-only micro-batches on one rank included."""
    flags = [*FAST, "--train_manifest", manifest, "--steps", 6, "--batch_size", 2, *NOISY]
    code, alone = train_now(monkeypatch, *flags, "--out", tmp_path / "one")
    result = torchrun(2, *flags, "--out", tmp_path / "two")
    assert result.returncode == 0, result.stderr[-2000:]
    together = train.read_metrics(tmp_path / "two" / "metrics.jsonl", 99)
    assert [r["step"] for r in together] == [1, 2, 3, 4, 5, 6]
    assert np.abs(losses(alone) - losses(together)).max() < 1e-5


class Killed(BaseException):
    pass


@pytest.mark.parametrize("more", [["--adapter", "deep"], NOISY])  # deep has dropout: its randomness resumes too
def test_resume_is_bit_for_bit(manifest, tmp_path, monkeypatch, more):
    flags = ["--preset", "tiny", "--workers", "0", "--train_manifest", manifest, "--steps", 6, "--save_every", 3, *more]
    _, whole = train_now(monkeypatch, *flags, "--out", tmp_path / "whole")
    real_step, steps = torch.optim.AdamW.step, []

    def dies_in_step_five(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 5:
            raise Killed
        return real_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", dies_in_step_five)
        with pytest.raises(Killed):
            train_now(monkeypatch, *flags, "--out", tmp_path / "parts")
    assert newest(tmp_path / "parts").name == "step-0000003"
    _, rest = train_now(monkeypatch, "--resume", "--out", tmp_path / "parts")
    assert [r["step"] for r in rest] == [1, 2, 3, 4, 5, 6]
    assert losses(rest).tolist() == losses(whole).tolist()
    a, b = (load_file(newest(tmp_path / d) / "model.safetensors") for d in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_signals_save_first(manifest, tmp_path):
    """To the whole process group, as terminals, torchrun and queues send them: the loader's processes must not die of it."""
    cases = [(signal.SIGTERM, 0, 0), (signal.SIGTERM, 0, 2), (signal.SIGINT, 130, 2)]
    runs = [subprocess.Popen([sys.executable, HERE / "train.py", "--preset", "tiny", "--train_manifest", manifest, "--steps", "5000",
                              "--out", tmp_path / f"out{i}", "--workers", str(workers), "--effective_batch", "4"], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, start_new_session=True) for i, (_, _, workers) in enumerate(cases)]
    try:
        for i, (process, (number, code, _)) in enumerate(zip(runs, cases)):
            out, deadline = tmp_path / f"out{i}", time.time() + 120
            while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text()) and time.time() < deadline:
                assert process.poll() is None, process.stderr.read()[-2000:]
                time.sleep(0.2)
            os.killpg(process.pid, number)
            stdout, stderr = process.communicate(timeout=60)
            assert process.returncode == code and "--resume" in stdout and "Traceback" not in stderr, stderr[-2000:]
            step = torch.load(newest(out) / "state.pt", weights_only=True)["step"]
            assert step == len(train.read_metrics(out / "metrics.jsonl", 10**9)) > 0
            evaluation.load_model(out, torch.device("cpu"))
    finally:
        for process in runs:
            process.kill()


def test_divergence_keeps_the_last_checkpoint(manifest, tmp_path, monkeypatch, capsys):
    flags = ["--preset", "tiny", "--workers", "0", "--train_manifest", manifest, "--steps", 9, "--save_every", 1]
    real = torch.nn.functional.cross_entropy
    calls = []

    def poisoned(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (float("nan") if len(calls) == 3 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", poisoned)
        code, rows = train_now(monkeypatch, *flags, "--out", tmp_path / "out")
    err = capsys.readouterr().err
    assert code == 1 and "loss nan" in err and "step 3" in err and "stays in" in err
    assert newest(tmp_path / "out").name == "step-0000002" and len(rows) == 2
    assert all(torch.isfinite(v).all() for v in load_file(newest(tmp_path / "out") / "model.safetensors").values())


def test_run_folder(manifest, tmp_path, monkeypatch):
    out = tmp_path / "out"
    train_now(monkeypatch, *FAST, "--train_manifest", manifest, "--steps", 2, "--out", out)
    assert {p.name for p in out.iterdir()} == {"step-0000002", "metrics.jsonl", "loss.png"}
    assert {p.name for p in newest(out).iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "train_config.json",
                                                       "state.pt"}
    assert set(train.read_metrics(out / "metrics.jsonl", 9)[0]) == {"step", "loss", "lr", "grad_norm", "ms", "tokens_per_s",
                                                                    "audio_s_per_s"}
    assert json.loads((newest(out) / "train_config.json").read_text())["lr"] == train.PRESETS["tiny"]["lr"]


def strip_added(tokenizer, config):
    """Take our two tokens out of a saved tokenizer."""
    text = json.loads(tokenizer.read_text())
    text["added_tokens"] = [t for t in text["added_tokens"] if t["content"] not in (A, M)]
    tokenizer.write_text(json.dumps(text))
    text = json.loads(config.read_text())
    text.pop("extra_special_tokens", None), text.pop("additional_special_tokens", None), text.pop("added_tokens_decoder", None)
    config.write_text(json.dumps(text))


@pytest.fixture(scope="session")
def parts(tmp_path_factory, tokenizer):
    """A tiny Whisper and a tiny Qwen3 saved as the hub has them: one window is 2 s, the vocabulary is padded."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(1)
    WhisperModel(WhisperConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, num_mel_bins=128,
                               decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=100,
                               vocab_size=50, pad_token_id=0, bos_token_id=0, eos_token_id=0,
                               decoder_start_token_id=0)).save_pretrained(folder / "whisper")
    ids = tokenizer.convert_tokens_to_ids
    llm = Qwen3ForCausalLM(Qwen3Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                                       head_dim=32, intermediate_size=96, vocab_size=1500, tie_word_embeddings=True,
                                       max_position_embeddings=4096, eos_token_id=ids("<|im_end|>"),
                                       pad_token_id=ids("<|endoftext|>")))
    llm.generation_config.update(do_sample=True, temperature=0.6, top_p=0.95, top_k=20)  # as Qwen3-4B ships it
    llm.save_pretrained(folder / "qwen")
    tokenizer.save_pretrained(folder / "qwen")
    # And with a tokenizer as Qwen3's is, without our two tokens.
    llm.save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    strip_added(folder / "plain" / "tokenizer.json", folder / "plain" / "tokenizer_config.json")
    return {"encoder": str(folder / "whisper"), "llm": str(folder / "qwen"), "plain": str(folder / "plain")}


def test_pretrain_on_stand_ins(manifest, parts, tmp_path, monkeypatch, capsys):
    """Pretrained parts by path, only the adapter learns and is stored, and the result evaluates greedily."""
    out = tmp_path / "out"
    code, rows = train_now(monkeypatch, "--preset", "pretrain", "--train_manifest", manifest, "--encoder", parts["encoder"],
                           "--llm", parts["llm"], "--steps", 2, "--effective_batch", 4, "--workers", 0, "--out", out)
    assert code == 0 and len(rows) == 2
    assert load_file(newest(out) / "model.safetensors").keys() == {"adapter.w_in.weight", "adapter.w_out.weight"}
    net = evaluation.load_model(out, torch.device("cpu"))
    llm, encoder = load_file(Path(parts["llm"]) / "model.safetensors"), load_file(Path(parts["encoder"]) / "model.safetensors")
    assert torch.equal(net.llm.model.layers[1].mlp.up_proj.weight, llm["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(net.encoder.conv1.weight, encoder["encoder.conv1.weight"])
    for _ in range(2):  # twice the same: Qwen3's sampling defaults are off
        code, _, _ = exit_of(evaluation.main, monkeypatch, capsys, "--ckpt", out, "--manifest", manifest, "--max_new_tokens", 5)
        assert code == 0
    heard = [json.loads(line)["hypothesis"] for line in (out / "hypotheses.jsonl").read_text().splitlines()]
    folder = Path(manifest).parent
    assert net.decode(net.generate(data.load_audio(str(folder / "1.wav")), max_new_tokens=5)[0]) == heard[1]


def test_learns_a_manifest_by_heart(corpus, tmp_path, monkeypatch, capsys):
    """From noise to zero errors on four recordings: gradients reach every part, and evaluation hears what was trained."""
    for i, s in enumerate(corpus[:4]):
        soundfile.write(tmp_path / f"{i}.wav", s.audio[0], 16000)
    path = write_manifest(tmp_path / "four.jsonl", [{"audio": f"{i}.wav", "text": s.answer} for i, s in enumerate(corpus[:4])])
    train_now(monkeypatch, *FAST, "--train_manifest", path, "--steps", 60, "--effective_batch", 4, "--batch_size", 4,
              "--out", tmp_path / "out")
    code, out, _ = exit_of(evaluation.main, monkeypatch, capsys, "--ckpt", tmp_path / "out", "--manifest", path)
    assert code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["splits"]["four"]["wer"] == 0.0 and results["splits"]["four"]["samples"] == 4


# -----------------------------------------------------------------------------
# The real recipe: the post's datasets, pretrained parts, LoRA, checkpoints

def clip(sample, kind="FLAC"):
    """The audio column of a parquet file on the hub: encoded bytes and a name."""
    soundfile.write(buffer := io.BytesIO(), sample.audio[0], 16000, format=kind)
    return {"bytes": buffer.getvalue(), "path": f"clip.{kind.lower()}"}


@pytest.fixture(scope="session")
def hub(tmp_path_factory, corpus):
    """Stand-ins of the hub's datasets: its columns, its file names, a few rows each."""
    import datasets
    root = tmp_path_factory.mktemp("hub")

    def write(name, split, rows, where="data", shards=1):
        folder = root / "Vikhrmodels" / name / where
        folder.mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_list(rows)
        if "audio" in rows[0]:
            table = table.cast_column("audio", datasets.Audio(sampling_rate=16000, decode=False))
        for k in range(shards):
            table.shard(shards, k, contiguous=True).to_parquet(folder / f"{split}-{k:05d}-of-{shards:05d}.parquet")

    say = corpus[:12]
    write("ToneBooks", "train", [dict(audio=clip(s), text=s.answer, text_description="спокойный голос", voice_name="анна")
                                 for s in say], shards=2)
    write("ToneBooks", "validation", [dict(audio=clip(corpus[20]), text="не для обучения", text_description="", voice_name="")])
    write("Speech-Instructions", "train", [dict(audio=clip(s, "WAV"), question="Что сказано?", answer=s.answer) for s in say])
    write("AudioBooksInstructGemini2.5", "train", [dict(
        audio=clip(s, "MP3"), text=s.answer, question="О чём речь? <|start_of_audio|><|end_of_audio|>", answer="О разном.",
        task_type="ner", conversations=json.dumps([]), voice_name="анна") for s in say])
    turn = lambda role, content: dict(role=role, content=content)
    write("GrandMaster-PRO-MAX", "train", [dict(
        conversation=[turn("system", "Отвечай кратко."), turn("user", f"Вопрос {i}"), turn("assistant", f"Ответ {i}")],
        prompt_lang=prompt, answer_lang=answer) for i, (prompt, answer) in enumerate([("ru", "ru"), ("en", "en"), ("en", "ru")] * 5)])
    write("Speech-Describe", "500k_part1_nonspeech", [dict(audio=clip(s), question="What is it?", answer="a bell") for s in say])
    write("ToneSlavic", "train", [dict(audio=clip(s), sentence=s.answer, locale=l) for s, l in zip(say, ["ru", "be", "uk"] * 4)])
    for config in ("Crowd", "Farfield"):
        write("ToneGolosOpus", "train", [dict(audio=clip(s), text=config, original_text="") for s in say[:3]], where=config)
    for split in data.BENCHMARK:
        write("RuASRBenchmark", split, [dict(audio=clip(s), text=s.answer) for s in say[:3]])
    return root


def test_rows_of_the_pools(hub):
    """Every dataset's own columns arrive where they belong."""
    def rows(pool, name, **which):
        (source,) = [s for s in data.POOLS[pool] if s.hub == f"Vikhrmodels/{name}" and all(getattr(s, k) == v for k, v in which.items())]
        return data.Rows(source, hub)
    books, asked, gemini, text = (rows(*names) for names in (
        ("ru_audio", "ToneBooks"), ("ru_audio", "Speech-Instructions"), ("ru_audio", "AudioBooksInstructGemini2.5"),
        ("text", "GrandMaster-PRO-MAX")))
    assert [len(r) for r in (books, asked, gemini, text)] == [12, 12, 12, 10]
    assert (books[3].question, books[3].system) == (nb.ASR_PROMPT, nb.ASR_SYSTEM) and books[3].name == "Vikhrmodels/ToneBooks/train:3"
    assert asked[3].question == "Что сказано?" and asked[3].answer == books[3].answer and asked[3].system == data.INSTRUCT_SYSTEM
    assert gemini[0].messages()[1]["content"] == f"О чём речь? {A}" and gemini[0].answer == "О разном."
    assert [text[i].question for i in range(4)] == ["Вопрос 0", "Вопрос 2", "Вопрос 3", "Вопрос 5"]  # prompt or answer in Russian
    assert text[0].system == "Отвечай кратко." and text[0].audio == []
    assert len(rows("pretrain", "ToneSlavic")) == 4 and rows("pretrain", "ToneSlavic")[1].answer == books[3].answer
    assert rows("pretrain", "ToneGolosOpus", config="Farfield")[0].answer == "Farfield"
    assert rows("en_audio", "Speech-Describe", split="500k_part1_nonspeech")[0].answer == "a bell"
    a, b = data.load_audio(books[3].audio[0]), data.load_audio(asked[3].audio[0])
    assert torch.allclose(a, b, atol=1e-4) and len(data.load_audio(gemini[0].audio[0])) > 8000
    assert {s.rows for s in data.POOLS["ru_audio"]} == {70_000, 90_000, None} and len(data.BENCHMARK) == 6
    assert data.open_source(data.POOLS["text"][0], hub, 2).num_rows == 2


def test_a_first_trial_streams_a_few_rows(hub):
    """--max_rows: the hub is asked for so many rows and no more; filters come first. (A local path is a hub to datasets.)"""
    at = lambda source: replace(source, hub=str(hub / source.hub))
    books, text = data.Rows(at(data.POOLS["ru_audio"][1]), limit=5), data.Rows(at(data.POOLS["text"][0]), limit=4)
    whole = data.Rows(data.POOLS["ru_audio"][1], hub)
    assert len(books) == 5 and [books[i].answer for i in range(5)] == [whole[i].answer for i in range(5)]
    assert torch.equal(data.load_audio(books[2].audio[0]), data.load_audio(whole[2].audio[0]))
    assert [text[i].question for i in range(4)] == ["Вопрос 0", "Вопрос 2", "Вопрос 3", "Вопрос 5"]


def test_data_dir_takes_what_datasets_writes(hub, corpus, tmp_path):
    """A folder of save_to_disk, one parquet file, and a folder of audio files with metadata.csv."""
    import datasets
    source = data.POOLS["ru_audio"][1]
    table = datasets.load_dataset(str(hub / source.hub), split="train").cast_column("audio", datasets.Audio(decode=False))
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "a" / source.hub)
    (tmp_path / "b").mkdir()
    table.to_parquet(tmp_path / "b" / "ToneBooks.parquet")
    folder = tmp_path / "c" / "ToneBooks" / "train"
    folder.mkdir(parents=True)
    for i, s in enumerate(corpus[:12]):
        soundfile.write(folder / f"{i}.flac", s.audio[0], 16000)
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.flac,{s.answer}\n" for i, s in enumerate(corpus[:12])))
    whole = data.Rows(source, hub)
    for place in "abc":
        rows = data.Rows(source, tmp_path / place)
        assert sorted(rows[i].answer for i in range(len(rows))) == sorted(whole[i].answer for i in range(12)), place
        assert len(data.load_audio(rows[4].audio[0])) in [len(s.audio[0]) for s in corpus[:12]]


@pytest.mark.parametrize("source, says", [
    (data.Source("Vikhrmodels/Nothing"), "has no Vikhrmodels/Nothing: put the dataset's files into"),
    (data.Source("Vikhrmodels/ToneBooks", "test"), "split test"),
    (data.Source("Vikhrmodels/ToneBooks", answer="sentence"), "has no column sentence: it has audio, text")])
def test_wrong_datasets_are_named(hub, source, says):
    with pytest.raises(data.UserError, match=says):
        data.open_source(source, hub)


def test_an_unreachable_hub_names_the_dataset_and_two_ways_out():
    with pytest.raises(data.UserError, match="cannot reach Vikhrmodels/ToneBooks, split train, .*go online.*--data_dir"):
        data.open_source(data.Source("Vikhrmodels/ToneBooks"))


@pytest.fixture(scope="session")
def original(tmp_path_factory, parts):
    """A checkpoint as the original's Trainer leaves it: one pickle of tensors, its own two tokens, a head stored twice."""
    folder = tmp_path_factory.mktemp("original")
    torch.manual_seed(3)
    tokenizer = nb.add_audio_tokens(AutoTokenizer.from_pretrained(parts["plain"]), original=True)
    llm = Qwen3ForCausalLM.from_pretrained(parts["plain"])
    llm.resize_token_embeddings(len(tokenizer) - 1)  # start and end have rows, <|AUDIO|> has none
    encoder = WhisperModel.from_pretrained(parts["encoder"]).encoder
    D = llm.config.hidden_size
    weights = {f"encoder.{k}": v for k, v in encoder.state_dict().items()} | {f"llm.{k}": v for k, v in llm.state_dict().items()}
    weights |= {"adapter.w_in.weight": torch.randn(D, 4 * 32) / 16, "adapter.w_out.weight": torch.randn(D, D) / 8}
    weights["llm.lm_head.weight"] = weights["llm.model.embed_tokens.weight"].clone()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def test_the_original_layout(original, parts, tmp_path):
    """Its own token pair, no <|AUDIO|> row; as pickle or safetensors, in one file or in shards: one model."""
    net = nb.load_checkpoint(original, parts["encoder"], parts["plain"])
    n = len(net.tokenizer)
    ids = net.tokenizer.convert_tokens_to_ids([M, nb.END, A])
    assert ids == [n - 3, n - 2, n - 1] == [net.config.audio_start_id, net.config.audio_end_id, net.config.audio_token_id]
    assert net.config.llm_config.vocab_size == n - 1 and net.config.new_tokens == ids[:2]
    prompt, _ = nb.build_ids(net.tokenizer, net.config, [{"role": "user", "content": A}], [1])
    assert [t for t in prompt if t in ids] == [ids[0], *[ids[2]] * 25, ids[1]]
    said = net.generate(tone(1), max_new_tokens=8)
    weights = torch.load(original / "pytorch_model.bin", weights_only=True)
    assert torch.equal(net.adapter.w_in.weight, weights["adapter.w_in.weight"])
    del weights["llm.lm_head.weight"]
    keys = sorted(weights)
    for kind, write in (("model", save_file), ("pytorch_model", torch.save)):
        (tmp_path / kind).mkdir()
        for k, half in enumerate((keys[::2], keys[1::2])):
            write({key: weights[key] for key in half}, tmp_path / kind / f"{kind}-{k + 1:05d}-of-00002{'.safetensors' if kind == 'model' else '.bin'}")
        assert torch.equal(nb.load_checkpoint(tmp_path / kind, parts["encoder"], parts["plain"]).generate(tone(1), max_new_tokens=8), said)
    weights["llm.model.embed_tokens.weight"] = weights["llm.model.embed_tokens.weight"][:-1]  # one row short of its tokens
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is its --llm another"):
        nb.load_checkpoint(tmp_path, parts["encoder"], parts["plain"])
    nb.export(original, tmp_path / "hf", parts["encoder"], parts["plain"])
    assert torch.equal(evaluation.load_model(tmp_path / "hf", torch.device("cpu")).generate(tone(1), max_new_tokens=8), said)


class Executes:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("harm, says", [
    ("missing", "missing keys encoder.conv1.bias"), ("unexpected", "unexpected keys adapter.lora_A"), ("shape", "mismatched keys adapter.w_in"),
    ("pickle", "not a file of plain tensors"), ("truncated", "not a file of plain tensors"), ("head", "differs from the embeddings"),
    ("other", "no llm.model.embed_tokens.weight")])
def test_broken_original_checkpoints(original, parts, tmp_path, monkeypatch, harm, says):
    monkeypatch.chdir(tmp_path)
    weights = torch.load(original / "pytorch_model.bin", weights_only=True)
    if harm == "missing":
        del weights["encoder.conv1.bias"]
    weights |= {"unexpected": {"adapter.lora_A.weight": torch.zeros(2)}, "shape": {"adapter.w_in.weight": torch.zeros(3, 3)},
                "pickle": {"x": Executes()}, "head": {"llm.lm_head.weight": weights["llm.lm_head.weight"] + 1}}.get(harm, {})
    if harm == "other":
        weights = {"model.weight": torch.zeros(2)}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    if harm == "truncated":
        (tmp_path / "pytorch_model.bin").write_bytes((tmp_path / "pytorch_model.bin").read_bytes()[:5000])
    with pytest.raises(ValueError, match=says):
        nb.load_checkpoint(tmp_path, parts["encoder"], parts["plain"])
    assert not (tmp_path / "executed").exists()


def test_the_default_preset_on_stand_ins(hub, original, parts, tmp_path, monkeypatch, capsys):
    """`train.py` as the post runs it: LoRA + adapter on an original checkpoint, audio and text from datasets; then eval.py on
    the six benchmarks, and export."""
    out = tmp_path / "out"
    for name, folder in (("AlexWortega/Borealis5b_90k", original), ("openai/whisper-large-v3", parts["encoder"]), ("Qwen/Qwen3-4B", parts["plain"])):
        (hub / name).parent.mkdir()
        (hub / name).symlink_to(folder)
    code, rows = train_now(monkeypatch, "--data_dir", hub, "--steps", 2, "--workers", 1, "--out", out)
    assert code == 0 and len(rows) == 2
    saved = json.loads((newest(out) / "train_config.json").read_text())
    assert (saved["preset"], saved["mix"], saved["lr"], saved["effective_batch"]) == ("ru_text_10pct", "ru_text_10pct", 1e-5, 128)
    weights = load_file(newest(out) / "model.safetensors")
    kinds = {k.split(".")[-3] + "." + k.split(".")[-2] if "lora" in k else k for k in weights}
    assert len([k for k in weights if "lora_A" in k]) == 2 * 7 and weights["new_rows"].shape == (2, 64)
    assert {"adapter.w_in.weight", "adapter.w_out.weight", "new_rows"} < kinds and not [k for k in weights if k.startswith("encoder")]
    assert (newest(out) / "model.safetensors").stat().st_size < 2 * 2**20 and all(v.dtype == torch.float32 for v in weights.values())
    code, text, _ = exit_of(evaluation.main, monkeypatch, capsys, "--ckpt", out, "--data_dir", hub, "--max_new_tokens", 3)
    assert code == 0 and all(f"| {split} |" in text for split in data.BENCHMARK)
    net = evaluation.load_model(out, torch.device("cpu"))
    monkeypatch.setattr(sys, "argv", ["model.py", "export", "--ckpt", str(out), "--to", str(tmp_path / "hf")])
    assert nb.main() == 0
    whole = nb.load_checkpoint(tmp_path / "hf")
    assert whole.config.base is None and whole.config.audio_end_id != whole.config.audio_start_id
    assert torch.equal(whole.generate(tone(1), max_new_tokens=9), net.generate(tone(1), max_new_tokens=9))
    assert nb.main() == 2 and "exists already" in capsys.readouterr().err
    # Where the original checkpoint has changed, what was trained on top of it is worth nothing.
    tensors = torch.load(original / "pytorch_model.bin", weights_only=True)
    (tmp_path / "moved").mkdir()
    torch.save({k: v + 1 for k, v in tensors.items()}, tmp_path / "moved" / "pytorch_model.bin")
    config = json.loads((newest(out) / "config.json").read_text())
    config["base"]["checkpoint"] = str(tmp_path / "moved")
    (newest(out) / "config.json").write_text(json.dumps(config))
    with pytest.raises(data.UserError, match="has changed since"):
        evaluation.load_model(out, torch.device("cpu"))


LORA = ["--preset", "ru_only", "--workers", "0", "--lora_rank", "4", "--lr", "1e-3", "--effective_batch", "8"]


def test_two_processes_and_one_resume_each_other(manifest, original, parts, tmp_path, monkeypatch):
    """The post's kind of run, 20 steps of mixed lengths and text-only rows: two processes compute the losses of one to 1e-5,
    and a run goes from two to one and back without a difference."""
    flags = [*LORA, "--train_manifest", manifest, "--init_from", original, "--encoder", parts["encoder"], "--llm", parts["plain"],
             "--steps", 20, "--save_every", 6, "--keep", 0]
    _, alone = train_now(monkeypatch, *flags, "--out", tmp_path / "one")
    out = tmp_path / "two"
    assert (result := torchrun(2, *flags, "--out", out)).returncode == 0, result.stderr[-2000:]
    assert np.abs(losses(alone) - losses(train.read_metrics(out / "metrics.jsonl", 99))).max() < 1e-5
    whole = load_file(out / "step-0000020" / "model.safetensors")

    def back_to(step):
        for later in out.glob("step-*"):
            if int(later.name[5:]) > step:
                shutil.rmtree(later)

    back_to(6)
    train_now(monkeypatch, "--resume", "--out", out)
    back_to(12)
    assert (result := torchrun(2, "--resume", "--out", out)).returncode == 0, result.stderr[-2000:]
    rows = train.read_metrics(out / "metrics.jsonl", 99)
    assert [r["step"] for r in rows] == list(range(1, 21)) and np.abs(losses(alone) - losses(rows)).max() < 1e-5
    again = load_file(out / "step-0000020" / "model.safetensors")
    assert max((whole[k] - again[k]).abs().max().item() for k in whole) < 1e-4


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import train

def start(out):
    pid = os.fork()  # this process imports and computes nothing: its children start at once
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["train.py", *(["--resume"] if list(Path(out).glob("step-*")) else sys.argv[2:]), "--out", out]
        code = 99
        try:
            code = train.main()
        finally:
            os._exit(code)
    return pid

folder, began = Path(sys.argv[1]), time.time()
pid = start(f"{folder}/whole")
while not list(folder.glob("whole/step-*")):
    time.sleep(0.01)
first = time.time() - began  # seconds to the first checkpoint
assert os.waitpid(pid, 0)[1] == 0
random.seed(0)
at = []
for _ in range(20):
    pid = start(f"{folder}/killed")
    time.sleep(first * random.uniform(0.5, 1.0) + random.uniform(0, 0.8))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "it ended by itself"
    at.append(max((int(p.name[5:]) for p in folder.glob("killed/step-*")), default=0))
print("killed at", at)
assert 0 < at[-1] < 50
assert os.waitpid(start(f"{folder}/killed"), 0)[1] == 0
"""


def test_twenty_kills(manifest, original, parts, tmp_path):
    """SIGKILL at random moments, while a run reads, computes, saves and deletes: every resume goes on from a whole checkpoint,
    and what comes out is what an uninterrupted run gives, to the bit."""
    flags = [*LORA, "--train_manifest", manifest, "--init_from", original, "--encoder", parts["encoder"], "--llm", parts["plain"],
             "--steps", 50, "--save_every", 1, "--keep", 2]
    done = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path), *map(str, flags)], capture_output=True, text=True, timeout=500,
                          env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(HERE)))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)
    a, b = (load_file(newest(tmp_path / d) / "model.safetensors") for d in ("whole", "killed"))
    assert newest(tmp_path / "killed").name == "step-0000050" and all(torch.equal(a[k], b[k]) for k in a)
    whole, killed = (train.read_metrics(tmp_path / d / "metrics.jsonl", 99) for d in ("whole", "killed"))
    assert losses(whole).tolist() == losses(killed).tolist()


def test_lora_counts_at_full_size():
    with torch.device("meta"):
        net = nb.BorealisForConditionalGeneration(nb.BorealisConfig())
        net.prepare("lora", dict(rank=256, alpha=512, dropout=0.0))
    lora = sum(p.numel() for k, p in net.stored().items() if "lora_" in k)
    assert lora == 2_064_384 * 256 == 528_482_304
    assert nb.count(net, trained_only=True) == lora + 19_660_800 + 2 * 2560


def test_lora_starts_as_the_base_and_merges_into_it(net, tokenizer):
    """New LoRA changes nothing; trained LoRA computes the same merged as unmerged, new rows and tied head included."""
    twin = nb.BorealisForConditionalGeneration(net.config)
    twin.load_state_dict(net.state_dict())
    rows = data.Dataset([data.Sample("анна купила девять конфет", [(tone(3) * 9999).numpy().astype(np.int16)])], tokenizer, net.config)
    batch = rows.pad([rows.item(0)])
    before = twin.eval()(batch["input_ids"], batch["input_features"]).logits
    torch.manual_seed(0)
    twin.prepare("lora", dict(rank=4, alpha=8, dropout=0.0)).eval()
    after = twin(batch["input_ids"], batch["input_features"]).logits
    assert torch.allclose(before, after, atol=1e-5)
    with torch.no_grad():
        for p in twin.stored().values():
            p += 0.05 * torch.randn_like(p)
    learned = twin(batch["input_ids"], batch["input_features"]).logits
    assert (learned - before).abs().max() > 0.1
    merged = twin.merge(torch.float32)(batch["input_ids"], batch["input_features"]).logits
    assert torch.allclose(learned, merged, atol=1e-4)
    assert twin.state_dict().keys() == net.state_dict().keys()
    old, new = (n.llm.model.embed_tokens.weight for n in (net, twin))
    assert [i for i in range(len(old)) if not torch.equal(old[i], new[i])] == net.config.new_tokens


@pytest.mark.parametrize("trained", ["adapter", "lora", "full"])
def test_the_dtypes_of_a_gpu_run(net, tokenizer, trained):
    """Frozen weights in bf16, trained ones in fp32, autocast: on the CPU here, with audio and without."""
    twin = nb.BorealisForConditionalGeneration(net.config)
    twin.load_state_dict(net.state_dict())
    rows = data.Dataset([data.Sample("анна", [(tone(3) * 9999).numpy().astype(np.int16)]), data.Sample("два", question="раз")],
                        tokenizer, net.config)
    batches = [rows.pad([rows.item(i)]) for i in (0, 1)]
    exact = [twin(**batch).loss.item() for batch in batches]
    twin.cast(torch.bfloat16).prepare(trained, dict(rank=4, alpha=8, dropout=0.0)).train()
    assert twin.llm.model.rotary_emb.inv_freq.dtype == torch.float32  # in bf16, far positions are off by radians
    for batch, loss_before in zip(batches, exact):
        with torch.autocast("cpu", torch.bfloat16):
            loss = twin(**batch).loss
        loss.backward()
        assert loss.item() == pytest.approx(loss_before, rel=0.02)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in twin.stored().values())


@pytest.mark.parametrize("trained", ["adapter", "lora", "full", "scratch"])
def test_flops_are_those_that_run(net, tokenizer, trained):
    """The formula of MFU against torch's own count of what ran, forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model = nb.BorealisForConditionalGeneration(nb.tiny_config(tokenizer, frozen=()))
    if trained != "scratch":
        model.prepare(trained, dict(rank=8, alpha=8, dropout=0.0))
    rows = data.Dataset([data.Sample("анна купила девять конфет", [(tone(3) * 9999).numpy().astype(np.int16)])], tokenizer, net.config)
    batch = rows.pad([rows.item(0)])
    tokens, labels = batch["input_ids"].numel(), (batch["labels"] != -100).sum().item()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it does not count the CPU's fused attention
        model.train()(**batch).loss.backward()
    c = model.config.llm_config
    other_half = 3 * 2 * tokens**2 * c.num_attention_heads * c.head_dim * c.num_hidden_layers  # of causal attention: torch counts it
    rope = 0.02  # of little products in positions, which the formula leaves out
    ours = train.step_flops(model, tokens, tokens**2, 2, labels) + other_half
    assert ours == pytest.approx(counter.get_total_flops(), rel=rope)


def stand_in_flags(original, parts, *more):
    return [*LORA, "--init_from", original, "--encoder", parts["encoder"], "--llm", parts["plain"], *more]


def test_gradient_checkpointing_and_compile_change_no_step(manifest, original, parts, tmp_path, monkeypatch):
    flags = stand_in_flags(original, parts, "--train_manifest", manifest, "--steps", 2, "--effective_batch", 4)
    more = [[], ["--grad_checkpoint"], ["--compile"], ["--train", "adapter"], ["--train", "adapter", "--grad_checkpoint"]]
    a, b, c, d, e = (losses(train_now(monkeypatch, *flags, *m, "--out", tmp_path / str(i))[1]) for i, m in enumerate(more))
    assert np.abs(a - b).max() < 1e-6 and np.abs(a - c).max() < 1e-4 and np.abs(d - e).max() < 1e-6 and a[1] != d[1]


def test_checkpointing_keeps_less(net, tokenizer):
    """Also where the whole LLM is frozen and, but for this, in eval mode."""
    rows = data.Dataset([data.Sample("анна", [(tone(3) * 9999).numpy().astype(np.int16)])], tokenizer, net.config)
    batch = rows.pad([rows.item(0)])

    def kept(trained, checkpoint):
        model, total = nb.BorealisForConditionalGeneration(net.config).prepare(trained, dict(rank=4, alpha=8, dropout=0.0)), []
        if checkpoint:
            model.llm.gradient_checkpointing_enable(dict(use_reentrant=False))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: total.append(x.numel()) or x, lambda x: x):
            model.train()(**batch)
        return sum(total)
    for trained in ("adapter", "lora", "full"):
        assert kept(trained, True) < 0.7 * kept(trained, False)


def test_a_run_and_its_base_move_together(manifest, original, parts, tmp_path, monkeypatch):
    """LoRA on LoRA on an original checkpoint: found from another folder, through a link, after a move; refused when the base
    is gone or another, by eval.py and by --resume."""
    home = tmp_path / "home"
    (home / "disk").mkdir(parents=True)
    for name in ("whisper", "plain"):
        shutil.copytree(Path(parts["encoder"]).parent / name, home / name)
    shutil.copytree(original, home / "original")
    (home / "second").symlink_to(home / "disk")
    monkeypatch.chdir(home)
    flags = [*LORA, "--train_manifest", manifest, "--encoder", "whisper", "--llm", "plain", "--steps", 2, "--effective_batch", 4]
    train_now(monkeypatch, *flags, "--init_from", "original", "--out", "first")
    train_now(monkeypatch, *flags, "--init_from", "first", "--lora_rank", 2, "--save_every", 1, "--out", "second")
    net = nb.load_checkpoint(home / "second")
    said = net.generate(tone(1), max_new_tokens=8)
    assert not [k for k in net.state_dict() if "lora" in k]
    monkeypatch.chdir(tmp_path)
    home.rename(tmp_path / "moved")
    (tmp_path / "moved" / "second").unlink()
    (tmp_path / "moved" / "disk").rename(tmp_path / "moved" / "second")
    assert torch.equal(nb.load_checkpoint("moved/second").generate(tone(1), max_new_tokens=8), said)
    shutil.rmtree(newest("moved/second"))  # back to step 1, and on, from another folder than it began in
    _, rows = train_now(monkeypatch, "--resume", "--out", "moved/second")
    assert torch.equal(nb.load_checkpoint("moved/second").generate(tone(1), max_new_tokens=8), said) and len(rows) == 2
    train_now(monkeypatch, *flags[:-4], "--steps", 3, "--effective_batch", 4, "--init_from", "moved/original", "--encoder", "moved/whisper",
              "--llm", "moved/plain", "--overwrite", "--out", "moved/first")
    shutil.rmtree(newest("moved/second"))
    for look in (lambda: nb.load_checkpoint("moved/second"), lambda: train_now(monkeypatch, "--resume", "--out", "moved/second")):
        with pytest.raises((ValueError, data.UserError), match="is gone|has changed"):
            look()


def test_untied_llms(parts, tmp_path, tokenizer):
    """Qwen3 from 8B on has a head of its own: new rows are input rows only, and all of it survives a checkpoint."""
    llm = Qwen3ForCausalLM(Qwen3Config(**{**Qwen3Config.from_pretrained(parts["plain"]).to_dict(), "tie_word_embeddings": False}))
    llm.save_pretrained(tmp_path / "untied")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(parts["plain"]) / name, tmp_path / "untied")
    net = nb.BorealisForConditionalGeneration.from_parts(parts["encoder"], str(tmp_path / "untied")).prepare("lora", dict(rank=2, alpha=4, dropout=0.0))
    assert not torch.equal(net.llm.lm_head.weight, net.llm.model.embed_tokens.weight)
    with torch.no_grad():
        for p in net.stored().values():
            p += 0.05 * torch.randn_like(p)
    ids = torch.tensor([[5, net.config.audio_start_id, 7, 9, net.config.audio_start_id]])
    learned = net.eval()(ids).logits
    assert torch.allclose(net.merge(torch.float32)(ids).logits, learned, atol=1e-4)
    torch.save({k: v for k, v in net.state_dict().items()}, tmp_path / "pytorch_model.bin")
    again = nb.load_checkpoint(tmp_path, parts["encoder"], str(tmp_path / "untied"))
    assert torch.equal(again.llm.lm_head.weight, net.llm.lm_head.weight)


def test_long_recordings_are_capped_and_counted(corpus, tokenizer, net, tmp_path, monkeypatch, capfd):
    """The tiny long_audio pool: recordings of several windows train, longer ones are counted, their place is filled."""
    long = data.tiny_pool("long_audio", 60, 0)
    windows = [-(-len(s.audio[0]) // 32000) for s in long]
    assert max(windows) > 4 > min(windows) and sum(len(s.answer.split()) for s in long) == sum(len(s.answer.split()) for s in data.embedded("ru", "train", 60))
    dataset = data.Dataset(long, tokenizer, net.config, max_windows=4)
    items = [dataset[i, 0.0] for i in range(len(long))]
    assert all(len(item[3]) <= 4 for item, _ in items)
    assert sum(bool(left) for _, left in items) == sum(w > 4 for w in windows)
    assert {reason for _, left in items for reason, _, too_long in left if too_long} == {"longer than 4 windows"}


def test_rows_that_break_on_the_way(tokenizer, net):
    """Datasets are too big to look through before: a bad row's place goes to the next good one, and the reason travels."""
    samples = [data.Sample("да", [b"RIFF is not enough"], name="set:0"), data.Sample("да", [], "раз", name="set:1")]
    dataset = data.Dataset(samples, tokenizer, net.config)
    assert dataset[0, 0.0][1] == [("not audio", "set:0", False)] and dataset[0, 0.0][0][0] == dataset.item(1)[0]
    assert data.Dataset(samples[:1], tokenizer, net.config)[0, 0.0][0] is None
    bad, long = data.BadRows(), data.BadRows()
    train.tell(bad, long, [("not audio", "set:0", False)] * 50, 0, 1000, 1)  # 5 % pass
    with pytest.raises(data.UserError, match="51 of 1000 rows are unusable"):
        train.tell(bad, long, [("not audio", "set:0", False)], 0, 1000, 1)
    train.tell(data.BadRows(), long, [("longer than 4 windows", "set:9", True)] * 900, 0, 1000, 1)  # no harm
    with pytest.raises(data.UserError, match="--strict"):
        train.tell(data.BadRows(strict=True), long, [("not audio", "set:0", False)], 0, 9, 1)


def test_batches_hold_neighbours_in_length(corpus, tokenizer, net):
    samples = [s for k, s in enumerate(corpus[:24]) for s in [replace(s, audio=s.audio * (1 + k % 3), question=(A + " ") * (1 + k % 3))]]
    dataset = data.Dataset(samples, tokenizer, net.config, batch_size=4)
    share = dataset.collate([dataset[i, 0.0] for i in range(24)])
    lengths = [len(dataset.item(i)[0]) for i in range(24)]
    assert share["tokens"] == sum(lengths) and share["squares"] == sum(n * n for n in lengths)
    padded = sum(b["input_ids"].numel() for b in share["micro"])
    unsorted = sum(4 * max(lengths[i:i + 4]) for i in range(0, 24, 4))
    assert len(share["micro"]) == 6 and sum(lengths) <= padded < sum(lengths) * 1.1 < unsorted


def test_tensorboard(manifest, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    train_now(monkeypatch, *FAST, "--train_manifest", manifest, "--steps", 2, "--log", "tensorboard", "--out", tmp_path / "out")
    assert list((tmp_path / "out").glob("events.out.tfevents.*"))


# -----------------------------------------------------------------------------
# Leaving home: an exported folder needs nothing of this project

SNIPPET = """
import sys
for name in ("peft", "data", "soundfile", "datasets", "torchaudio", "jiwer"):
    sys.modules[name] = None  # as if not installed
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained("hf", trust_remote_code=True, device="cpu")
audio = torch.load("audio.pt", weights_only=True)
output = model.generate(audio=audio, user_prompt="О чём говорится в этом аудио? <|start_of_audio|><|end_of_audio|>",
                        system_prompt="Ты полезный голосовой ассистент.", max_new_tokens=12)
print(output.tolist())
print(model.decode(output[0]))
"""


def test_the_posts_snippet_runs_far_from_home(manifest, original, parts, tmp_path, monkeypatch, capsys):
    """A run with LoRA on top of a checkpoint in the original's layout, evaluated and exported: offline, in a process that knows
    neither this project nor peft, the post's snippet gives the tokens that the run itself gives."""
    out, hf = tmp_path / "out", tmp_path / "far" / "hf"
    hf.parent.mkdir()
    train_now(monkeypatch, *stand_in_flags(original, parts, "--train_manifest", manifest, "--steps", 2, "--lr", 0.01, "--out", out))
    exit_of(evaluation.main, monkeypatch, capsys, "--ckpt", out, "--manifest", manifest, "--max_new_tokens", 3)
    assert exit_of(nb.main, monkeypatch, capsys, "export", "--ckpt", out, "--to", hf)[0] == 0
    assert {p.name for p in hf.iterdir()} >= {"README.md", "config.json", "generation_config.json", "model.py", "model.safetensors",
                                             "preprocessor_config.json", "tokenizer.json", "train_config.json"}
    config = json.loads((hf / "config.json").read_text())
    assert config["architectures"] == ["BorealisForConditionalGeneration"] and config["auto_map"]["AutoModel"].startswith("model.")
    assert config["audio_start_id"] != config["audio_end_id"]  # the original's own pair
    card = (hf / "README.md").read_text()
    assert f"| {results_of(out)[0]['avg_wer']} |" in card and "| lora_rank |" in card and str(tmp_path) not in card
    wave = tone(3.0)
    torch.save(wave, hf.parent / "audio.pt")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", SNIPPET], cwd=hf.parent, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    net = evaluation.load_model(out, torch.device("cpu"))
    ids = net.generate(wave, "О чём говорится в этом аудио? <|start_of_audio|><|end_of_audio|>", "Ты полезный голосовой ассистент.",
                       max_new_tokens=12)
    assert done.stdout.splitlines()[0] == str(ids.tolist()) and done.stdout.splitlines()[1] == net.decode(ids[0])


def test_pushing_offline_says_what_to_do(checkpoint, tmp_path, monkeypatch, capsys):
    code, _, err = exit_of(nb.main, monkeypatch, capsys, "export", "--ckpt", checkpoint, "--to", tmp_path / "hf", "--push", "me/mine")
    assert code == 2 and "is written, but not pushed to me/mine" in err and (tmp_path / "hf" / "config.json").is_file()


# -----------------------------------------------------------------------------
# eval.py

@pytest.mark.parametrize("text, clean, posts", [
    ("Ещё, «Ёлка» — 5 шт.!", "еще елка 5 шт", "ещё «ёлка» — 5 шт"), ("кто-то", "кто то", "ктото"),
    ("Мой и\u0306од, е\u0308ж", "мой йод еж", "мой и\u0306од е\u0308ж"), ("за\u0301мок", "замок", "за\u0301мок"),
    ("don't  STOP…", "dont stop", "dont stop…"), ("тёмно–синий", "темно синий", "тёмно–синий"), ("  ", "", ""), ("50%", "50", "50"),
    ("№ 7 — №7", "7 7", "№ 7 — №7"), ("сло\u00adво\u200b", "слово", "сло\u00adво\u200b"), ("т.е. ну…да,но", "т е ну да но", "те ну…дано"),
    ("12:30, 5\u22126", "12 30 5 6", "1230 5\u22126")])
def test_normalisers(text, clean, posts):
    assert evaluation.normalise(text) == clean and evaluation.normalise_as_the_post(text) == posts


def row(reference, hypothesis, **more):
    return dict(reference=reference, hypothesis=hypothesis, cut=False, failed=None, seconds=1.0, took=0.1, tokens=2, split="s",
                id="u") | more


def assess(pairs, task="asr", normalizer="default"):
    rows = evaluation.normalised([row(*p) for p in pairs], normalizer)
    return evaluation.assess({"s": rows}, task)["splits"]["s"]


@pytest.mark.parametrize("reference, hypothesis, sub, del_, ins, words, wer, cer", [
    ("мама мыла раму", "мама мыла раму", 0, 0, 0, 3, 0.0, 0.0),
    ("мама мыла раму", "мама раму", 0, 1, 0, 3, 33.33, 35.71),           # 5 of 14 characters go, a space with them
    ("мама мыла раму", "мама мыла белую раму вчера", 0, 0, 2, 3, 66.67, 85.71),
    ("мама мыла раму", "папа мыл раму", 2, 0, 0, 3, 66.67, 21.43),       # м->п twice, а gone
    ("мама мыла раму", "", 0, 3, 0, 3, 100.0, 100.0),
    ("Ёлка кто-то мой", "елка кто то мои", 1, 0, 0, 4, 25.0, 6.67),      # й is not и; 1 of 15
    ("Ещё раз: 25 марта!", "еще раз 25 марта", 0, 0, 0, 4, 0.0, 0.0),
    ("в 25 домах", "в двадцать пять домах", 1, 0, 1, 3, 66.67, 130.0),   # digits stay digits: 13 edits of 10
    ("по-русски", "по русски", 0, 0, 0, 2, 0.0, 0.0),
    ("по-русски", "порусски", 1, 1, 0, 2, 100.0, 11.11)])
def test_wer_by_hand(reference, hypothesis, sub, del_, ins, words, wer, cer):
    r = assess([(reference, hypothesis)])
    assert (r["sub"], r["del"], r["ins"], r["words"], r["wer"], r["cer"]) == (sub, del_, ins, words, wer, cer)


def test_the_posts_normaliser_counts_differently():
    """кто-то against "кто то": right by ours; by the post's one word replaced and one inserted. ё is not е there."""
    assert assess([("Кто-то пришёл.", "кто то пришел")])["wer"] == 0
    posts = assess([("Кто-то пришёл.", "кто то пришел")], normalizer="post")
    assert (posts["sub"], posts["ins"], posts["words"], posts["wer"]) == (2, 1, 2, 150.0)


def levenshtein(a, b):
    """By the book, as another opinion than jiwer's."""
    line = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, line[0] = line[0], i
        for j, y in enumerate(b, 1):
            previous, line[j] = line[j], min(line[j] + 1, line[j - 1] + 1, previous + (x != y))
    return line[-1]


def test_agreement_on_random_pairs():
    """200 pairs of random Russian texts: with jiwer on the corpus, and with the book on each utterance."""
    rng = np.random.default_rng(0)
    words = [w for w in data.vocabulary("ru") if evaluation.normalise(w) == w]
    pairs = []
    for _ in range(200):
        reference = list(rng.choice(words, rng.integers(1, 12)))
        hypothesis = [str(rng.choice(words)) if rng.random() < 0.3 else w for w in reference for _ in range(rng.choice([0, 1, 1, 1, 2]))]
        pairs.append((" ".join(reference), " ".join(hypothesis)))
    references, hypotheses = map(list, zip(*pairs))
    result, theirs = assess(pairs), jiwer.process_words(references, hypotheses)
    assert (result["sub"], result["del"], result["ins"]) == (theirs.substitutions, theirs.deletions, theirs.insertions)
    assert result["wer"] == round(100 * theirs.wer, 2) and result["cer"] == round(100 * jiwer.cer(references, hypotheses), 2)
    ours = evaluation.edits(references, hypotheses)
    assert ours[:, :3].sum(1).tolist() == [levenshtein(r.split(), h.split()) for r, h in pairs]
    assert ours[:, 3].tolist() == [len(r.split()) for r in references]


def test_wer_is_over_the_corpus():
    """1 error in 1 word and 0 in 9: 10 %, not the mean of 100 % and 0 %. CER: раз -> кот is 3 edits of 3 + 17 characters."""
    r = assess([("раз", "кот"), ("а б в г д е ж з и", "а б в г д е ж з и")])
    assert r["wer"] == 10.0 and r["words"] == 10 and r["cer"] == 15.0


def simulated(rng, n, rate):
    """n utterances of 1 to 20 words; each speaker errs at a rate of their own -> (n, 2) errors and words."""
    words = rng.integers(1, 21, n)
    return np.stack([rng.binomial(words, np.clip(rng.gamma(2, rate / 2, n), 0, 1)), words], axis=1)


def test_intervals_cover_the_truth():
    """On simulated data the 95 % interval holds the true WER about 95 times in 100."""
    rng = np.random.default_rng(0)
    truth = evaluation.figure(simulated(rng, 2_000_000, 0.1))
    inside = 0
    for seed in range(300):
        low, high = evaluation.interval(evaluation.bootstrap(simulated(rng, 150, 0.1), seed))
        inside += low <= truth <= high
    assert 0.91 <= inside / 300 <= 0.98


def test_p_values_call_chance_chance():
    """Two systems of equal quality differ "significantly" one time in twenty; one that is truly better nearly always does."""
    rng = np.random.default_rng(1)
    def p(better):
        hard = rng.gamma(2, 0.05, 200)  # some utterances are hard for both: pairing takes that out
        a, b = (np.stack([rng.binomial(10, np.clip(hard * k, 0, 1)), np.full(200, 10)], axis=1) for k in (1, better))
        return evaluation.p_value(evaluation.bootstrap(a) - evaluation.bootstrap(b))
    assert np.mean([p(1) < 0.05 for _ in range(200)]) == pytest.approx(0.05, abs=0.04)
    assert np.mean([p(0.6) < 0.05 for _ in range(50)]) > 0.9
    same = evaluation.bootstrap(simulated(rng, 100, 0.2))
    assert evaluation.p_value(same - same) == 1.0


@pytest.mark.parametrize("text, n", [
    ("раз два три", 0), ("на на на на столе", 4), ("кто на на на на на", 5), ("а б а б а б а", 6), ("да да да", 0), ("мой кот спит кот спит кот спит", 6),
    ("а б в а б в а б в а б в", 12), ("", 0), ("кот спит кот спит", 0)])
def test_loops(text, n):
    assert evaluation.longest_loop(text.split()) == n


def test_loops_in_long_answers_and_in_words():
    long = [str(i) for i in range(5000)]
    assert evaluation.longest_loop(long) == 0 and evaluation.longest_loop(long + ["да", "да"] * 9) == 18
    rows = evaluation.normalised([row("на", "нананананана"), row("ананас", "ананас"), row("ха", "хахаха ха")], "default")
    assert evaluation.diagnose(rows)["loops"] == 2


def test_diagnosis_by_hand():
    rows = evaluation.normalised([
        row("раз два три четыре", "раз два"),                            # 4 > 1.5 * 2: stopped early
        row("раз два три", "раз два"),                                   # 3 = 1.5 * 2: not yet
        row("раз два", "раз два два два два два", cut=True),             # a loop, and it ran into the limit
        row("да да да да", "да да да да"),                               # it was said so
        row("", "спасибо за просмотр"), row("…", "")], "default")        # nobody spoke
    assert evaluation.diagnose(rows) == dict(stopped_early=1, loops=1, cut=1, silence=2, text_on_silence=1)
    text = evaluation.worst(rows, "asr")
    assert text.splitlines()[1:4] == ["REF: раз два *** *** *** ***", "HYP: раз два два два два два", "               I   I   I   I"]
    assert text.count("errors") == 4 and evaluation.worst(rows[3:4], "asr") == ""


@pytest.mark.parametrize("snr", [0, 5, 10, 15, 20])
def test_snr_is_estimated(corpus, snr):
    """Speech with white noise at a known SNR: the mean of 20 clips, and each of them."""
    rng = np.random.default_rng(snr)
    clips = [data.load_audio(s.audio[0]).numpy() for s in corpus[:20]]
    mixed = [x + augment.noise_at(rng.normal(size=len(x)), np.mean(x ** 2), snr) for x in clips]
    estimates = np.array([augment.estimate_snr(torch.as_tensor(x)) for x in mixed])
    assert estimates.mean() == pytest.approx(snr, abs=1.5) and np.abs(estimates - snr).max() < 5
    padded = [augment.estimate_snr(torch.cat([torch.zeros(4800), torch.as_tensor(x)])) for x in mixed]
    assert np.allclose(padded, estimates, atol=0.5)
    assert augment.estimate_snr(torch.zeros(16000)) <= 0 and -10 <= augment.estimate_snr(torch.ones(100)) <= 60


@pytest.mark.parametrize("seconds, most", [(1.9, 1), (2.0, 1), (2.01, 2), (5.0, 5), (61.3, 61)])
def test_cuts_at_pauses(seconds, most):
    """Nothing is lost, no piece is longer than a window or a sliver, and the cuts lie in the pauses."""
    wave = tone(seconds)
    spoken = torch.ones(len(wave))
    for start in range(2000, len(wave), 7000):  # pauses of 0.25 s
        spoken[start:start + 4000] = 0
    pieces = nb.cut_at_pauses(wave * spoken, 32000)
    assert torch.equal(torch.cat(pieces), wave * spoken) and len(pieces) <= most
    assert all(8000 <= len(p) <= 32000 for p in pieces)
    for cut in np.cumsum([len(p) for p in pieces])[:-1]:
        assert not spoken[cut - 1000:cut + 1000].any()


@pytest.mark.parametrize("n", [16000, 16001, 19000, 20001, 24001, 50000])
def test_cuts_for_windows_of_a_second(n):
    pieces = nb.cut_at_pauses(tone(n / 16000), 16000)
    assert sum(map(len, pieces)) == n and max(map(len, pieces)) <= 16000 and min(map(len, pieces)) >= 4000


@pytest.fixture(scope="session")
def splits():
    return evaluation.embedded_splits("ru", 0)


def test_six_splits_climb_the_ladder(splits):
    assert list(splits) == ["clean", "voices", "books", "speak", "webinars", "devices"]
    assert all(len(s) == 250 and {x.name.split("/")[2] for x in s} == set(data.EVAL_VOICES) for s in splits.values())
    def waves(name):
        return [data.load_audio(s.audio[0]).numpy() for s in splits[name]]
    assert np.mean([len(w) > 32000 for w in waves("books")]) > 0.9  # longer than a window of 2 s
    seconds = {name: np.array([len(w) / 16000 for w in waves(name)]) for name in ("clean", "voices")}
    assert seconds["voices"].std() > 1.2 * seconds["clean"].std()
    words = [s.answer.split() for s in splits["speak"]]
    assert all(len({s.answer for s in split}) == 250 for split in splits.values())
    assert all(any(a == b for a, b in zip(w, w[1:])) for w in words)  # says a word again
    assert [s.answer for s in splits["webinars"]] == [s.answer for s in splits["devices"]] == [s.answer for s in splits["clean"]]
    high = {name: np.mean([power(w, 5500, 8000) / power(w) for w in waves(name)]) for name in ("clean", "webinars", "devices")}
    assert high["webinars"] < high["clean"] / 3 and high["devices"] < high["clean"] / 3
    for s in (s for split in splits.values() for s in split):
        assert 4000 < len(s.audio[0]) and np.abs(s.audio[0].astype(int)).max() <= 32767


def test_hard_splits_are_the_same_every_time(splits):
    again = evaluation.embedded_splits("ru", 0, names=["webinars", "devices"])
    assert list(again) == ["webinars", "devices"]
    assert all(np.array_equal(a.audio[0], b.audio[0]) for name in again for a, b in zip(splits[name], again[name]))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, net, tokenizer):
    """An untrained checkpoint in the layout of train.py."""
    out = tmp_path_factory.mktemp("ckpt")
    net.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "train_config.json").write_text(json.dumps(dict(preset="tiny", embedded=True, lang="ru", seed=0)))
    return out


def results_of(folder):
    """-> (results.json, rows of hypotheses.jsonl)."""
    return json.loads((folder / "results.json").read_text()), [
        json.loads(line) for line in (folder / "hypotheses.jsonl").read_text().splitlines()]


def heard_in(folder):
    """What an evaluation found, without how long it took."""
    return [{k: v for k, v in r.items() if k != "took"} for r in results_of(folder)[1]]


def test_eval_writes_what_it_promises(checkpoint, tmp_path, monkeypatch, capsys):
    code, out, _ = exit_of(evaluation.main, monkeypatch, capsys, "--ckpt", checkpoint, "--out", tmp_path, "--limit", 5,
                           "--max_new_tokens", 4)
    results, rows = results_of(tmp_path)
    assert set(results) == {"run", "step", "task", "normalizer", "settings", "splits", "avg_wer", "avg_wer_ci", "others"}
    assert results["run"] == "tiny" and results["others"] == {}
    assert code == 0 and "said" in out and all(f"| {name} |" in out for name in results["splits"])
    assert list(results["splits"]) == ["clean", "voices", "books", "speak", "webinars", "devices"]
    assert results["avg_wer"] == pytest.approx(np.mean([r["wer"] for r in results["splits"].values()]), abs=0.01)
    for name, r in results["splits"].items():
        own = [x for x in rows if x["split"] == name]
        assert r["wer_ci"][0] <= r["wer"] <= r["wer_ci"][1] and r["samples"] == len(own) == 5 and r["cut"] == sum(x["cut"] for x in own)
        assert r["rtf"] == pytest.approx(sum(x["took"] for x in own) / sum(x["seconds"] for x in own), abs=1e-4)
        assert r["wer"] == round(100 * jiwer.wer([x["reference_normalised"] for x in own], [x["hypothesis_normalised"] for x in own]), 2)
    assert all(1 <= x["tokens"] <= 4 and x["reference_normalised"] == evaluation.normalise(x["reference"]) for x in rows)
    report = (tmp_path / "report.md").read_text()
    assert "## The worst of tiny, webinars" in report and "REF: " in report
    assert (tmp_path / "wer.png").read_bytes()[:4] == b"\x89PNG" and not list(tmp_path.glob("*.part*"))
    exit_of(evaluation.main, monkeypatch, capsys, "--ckpt", checkpoint, "--out", tmp_path, "--limit", 2, "--max_new_tokens", 4,
            "--split", "devices,voices")
    assert list(results_of(tmp_path)[0]["splits"]) == ["voices", "devices"]


def test_failed_utterances_count_as_empty(checkpoint, bad_files, tmp_path, monkeypatch, capsys):
    """One file does not decode, one generation raises: both stay in the score, the rest is untouched."""
    soundfile.write(bad_files / "good.wav", tone(1).numpy(), 16000)
    soundfile.write(bad_files / "long.wav", tone(8).numpy(), 16000)
    path = write_manifest(bad_files / "m.jsonl", [{"audio": f"{n}.wav", "text": "раз два"} for n in ("good", "nan", "long")])
    real = nb.BorealisForConditionalGeneration.chat

    def fragile(self, conversations, recordings, **settings):
        if any(len(w) > 100_000 for waves in recordings for w in waves):
            raise RuntimeError("out of memory\nand more")
        return real(self, conversations, recordings, **settings)

    flags = ["--ckpt", checkpoint, "--manifest", path, "--out", tmp_path / "e", "--max_new_tokens", 3]
    exit_of(evaluation.main, monkeypatch, capsys, *flags)
    whole = heard_in(tmp_path / "e")
    with monkeypatch.context() as patch:
        patch.setattr(nb.BorealisForConditionalGeneration, "chat", fragile)
        code, _, err = exit_of(evaluation.main, monkeypatch, capsys, *flags)
    assert code == 0 and "tiny: 2 of 3 utterances failed" in err and "m.jsonl:2" in err and "out of memory" in err
    results, rows = results_of(tmp_path / "e")
    result = results["splits"]["m"]
    assert result["words"] == 6 and result["failed"] == 2 and result["samples"] == 3
    assert [r["hypothesis"] for r in rows] == [whole[0]["hypothesis"], "", ""]
    report = (tmp_path / "e" / "report.md").read_text()
    assert "m.jsonl:3 (tiny, m): RuntimeError: out of memory" in report and "m.jsonl:2 (tiny, m): audio holds NaN" in report
    with monkeypatch.context() as patch:
        patch.setattr(nb.BorealisForConditionalGeneration, "chat", lambda *a, **k: 1 / 0)
        assert exit_of(evaluation.main, monkeypatch, capsys, *flags)[0] == 1


def test_text_on_silence(checkpoint, tmp_path, monkeypatch, capsys):
    """A row without words is no bad row: whatever is heard there was made up. Digital silence is decoded like any sound."""
    soundfile.write(tmp_path / "zeros.wav", np.zeros(16000), 16000)
    soundfile.write(tmp_path / "hum.wav", tone(1).numpy(), 16000)
    path = write_manifest(tmp_path / "m.jsonl", [{"audio": "zeros.wav", "text": ""}, {"audio": "hum.wav", "text": "…"},
                                                 {"audio": "hum.wav", "text": "раз"}, {"audio": "zeros.wav", "text": "раз"}])
    code, out, err = exit_of(evaluation.main, monkeypatch, capsys, "--ckpt", checkpoint, "--manifest", path, "--out", tmp_path / "e",
                             "--max_new_tokens", 4)
    result, rows = results_of(tmp_path / "e")
    assert code == 0 and result["splits"]["m"]["silence"] == 2 and result["splits"]["m"]["words"] == 2
    assert result["splits"]["m"]["text_on_silence"] == sum(bool(r["hypothesis_normalised"]) for r in rows[:2])
    assert f"{result['splits']['m']['text_on_silence']} of 2 |" in out and [r["failed"] for r in rows] == [None] * 3 + ["silent"]


def test_a_split_without_words_has_no_wer(checkpoint, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "hum.wav", tone(1).numpy(), 16000)
    path = write_manifest(tmp_path / "m.jsonl", [{"audio": "hum.wav", "text": ""}])
    code, out, _ = exit_of(evaluation.main, monkeypatch, capsys, "--ckpt", checkpoint, "--manifest", path, "--out", tmp_path / "e",
                           "--max_new_tokens", 4)
    result, _ = results_of(tmp_path / "e")
    assert code == 0 and result["splits"]["m"]["wer"] is None and result["avg_wer"] is None and "| m | - | - | 0 | 0 |" in out
    code, out, _ = exit_of(evaluation.main, monkeypatch, capsys, "--compare", tmp_path / "e", "--out", tmp_path / "c")
    assert code == 0 and "| e | - | - | - |" in out
    rows = [evaluation.normalised([row("раз два", "раз")], "default"), evaluation.normalised([row("", "раз")], "default")]
    assert evaluation.assess(dict(zip("ab", rows)), "asr")["avg_wer"] == 50  # of the split that has words


def test_rows_without_a_recording_stay_in_the_score(checkpoint, tmp_path, monkeypatch, capsys):
    """A reference whose recording is missing, empty or null is an error of the data, and counts as one."""
    soundfile.write(tmp_path / "hum.wav", tone(1).numpy(), 16000)
    path = write_manifest(tmp_path / "m.jsonl", [{"audio": "hum.wav", "text": "раз"}, {"audio": "", "text": "раз"},
                                                 {"audio": None, "text": "раз"}, {"text": "раз"}])
    code, _, err = exit_of(evaluation.main, monkeypatch, capsys, "--ckpt", checkpoint, "--manifest", path, "--out", tmp_path / "e",
                           "--max_new_tokens", 4)
    result, rows = results_of(tmp_path / "e")
    assert code == 0 and "tiny: 3 of 4 utterances failed" in err and result["splits"]["m"]["failed"] == 3
    assert [r["failed"] for r in rows] == [None, "not audio", "not audio", "not audio"] and result["splits"]["m"]["words"] == 4


def test_texts_may_hold_anything(checkpoint, tmp_path, monkeypatch, capsys):
    """Line separators inside a text do not tear a row apart; half a character is a bad row, not a traceback."""
    soundfile.write(tmp_path / "hum.wav", tone(1).numpy(), 16000)
    rows = [{"audio": "hum.wav", "text": text} for text in ["раз\u2028два", "раз\u0085два", "раз \U0001f600"] * 10]
    lines = [json.dumps(r) for r in rows] + ['{"audio": "hum.wav", "text": "раз \\ud83d"}']
    path = write_manifest(tmp_path / "m.jsonl", lines)
    code, _, err = exit_of(evaluation.main, monkeypatch, capsys, "--ckpt", checkpoint, "--manifest", path, "--out", tmp_path / "e",
                           "--max_new_tokens", 2)
    assert code == 0 and "1 broken text (first: m.jsonl:31)" in err
    code, out, _ = exit_of(evaluation.main, monkeypatch, capsys, "--compare", tmp_path / "e", "--out", tmp_path / "c")
    assert code == 0 and "| e | - |" in out


class Stopped(KeyboardInterrupt):
    pass


def test_an_interrupted_evaluation_goes_on(checkpoint, hub, tmp_path, monkeypatch, capsys):
    """Stopped after three batches, on a half-written line: the same result as in one go, and no batch is decoded twice."""
    flags = ["--ckpt", checkpoint, "--data_dir", hub, "--batch_size", 2, "--max_new_tokens", 4]
    assert exit_of(evaluation.main, monkeypatch, capsys, *flags, "--out", tmp_path / "whole")[0] == 0
    real, calls = nb.BorealisForConditionalGeneration.chat, []

    def counted(self, *args, **settings):
        if len(calls) == limit:
            raise Stopped
        calls.append(1)
        return real(self, *args, **settings)

    monkeypatch.setattr(nb.BorealisForConditionalGeneration, "chat", counted)
    limit = 3
    code, _, err = exit_of(evaluation.main, monkeypatch, capsys, *flags, "--out", tmp_path / "e")
    assert code == 130 and "6 answers are kept" in err
    assert not (tmp_path / "e" / "results.json").exists()
    (part,) = (tmp_path / "e").glob("*.part.jsonl")
    part.write_bytes(part.read_bytes() + '\n17\n{"key": "x"}\n{"key": "аб'.encode()[:-1])  # cut inside a letter
    limit = 99
    code, _, err = exit_of(evaluation.main, monkeypatch, capsys, *flags, "--out", tmp_path / "e")
    assert code == 0 and "6 of 18 utterances were answered before" in err and len(calls) == 9
    assert heard_in(tmp_path / "e") == heard_in(tmp_path / "whole") and not list((tmp_path / "e").glob("*.part*"))
    # What is finished is decoded anew, unless --reuse says otherwise; and never for other settings or weights.
    exit_of(evaluation.main, monkeypatch, capsys, *flags, "--out", tmp_path / "e", "--reuse")
    assert len(calls) == 9
    exit_of(evaluation.main, monkeypatch, capsys, *flags, "--out", tmp_path / "e", "--reuse", "--limit", 1)
    assert len(calls) == 9 and not list((tmp_path / "e").glob("*.part*"))
    exit_of(evaluation.main, monkeypatch, capsys, *flags[:-1], 3, "--out", tmp_path / "e", "--reuse")
    exit_of(evaluation.main, monkeypatch, capsys, *flags, "--out", tmp_path / "whole")
    assert len(calls) == 27
    other = shutil.copytree(checkpoint, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    exit_of(evaluation.main, monkeypatch, capsys, *flags, "--ckpt", other, "--out", tmp_path / "whole", "--reuse")
    assert len(calls) == 36


def test_ranks_share_the_work(checkpoint, hub, baseline, tmp_path, monkeypatch, capsys):
    """Two processes under torchrun find what one finds."""
    flags = ["--ckpt", checkpoint, "--data_dir", hub, "--batch_size", 2, "--max_new_tokens", 4, "--baseline", baseline]
    assert exit_of(evaluation.main, monkeypatch, capsys, *flags, "--out", tmp_path / "one")[0] == 0
    torchrun(2, *flags, "--out", tmp_path / "two", script="eval.py")
    assert heard_in(tmp_path / "two") == heard_in(tmp_path / "one")
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["hypotheses.jsonl", "report.md", "results.json", "wer.png"]


# ---- the baseline

@pytest.fixture(scope="session")
def baseline(tmp_path_factory, corpus):
    """A small multilingual Whisper, saved as the hub has it, that knows four sentences by heart, in Russian only."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor, WhisperTokenizer
    bpe = json.loads(data.train_tokenizer([s.answer for s in corpus], 400).backend_tokenizer.to_str())["model"]
    tokenizer = WhisperTokenizer(vocab=bpe["vocab"], merges=[tuple(m) for m in bpe["merges"]])
    tokenizer.add_tokens(["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|ru|>", "<|translate|>", "<|transcribe|>",
                          "<|startofprev|>", "<|notimestamps|>"], special_tokens=True)
    ids, extractor = tokenizer.convert_tokens_to_ids, WhisperFeatureExtractor(feature_size=80, chunk_length=2)
    end, start = ids("<|endoftext|>"), ids("<|startoftranscript|>")
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=128,
        decoder_ffn_dim=128, num_mel_bins=80, max_source_positions=100, max_target_positions=40, vocab_size=len(tokenizer),
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start, init_std=0.1))
    settings = model.generation_config
    settings.is_multilingual, settings.no_timestamps_token_id = True, ids("<|notimestamps|>")
    settings.lang_to_id, settings.task_to_id = {t: ids(t) for t in ("<|en|>", "<|ru|>")}, {
        t: ids(f"<|{t}|>") for t in ("transcribe", "translate")}
    rows = []
    for s in corpus[:4]:  # in English it says something else, so that a test sees which language was forced
        for language, text in (("<|ru|>", s.answer), ("<|en|>", "no")):
            rows.append([start, ids(language), ids("<|transcribe|>"), ids("<|notimestamps|>"),
                         *tokenizer(text, add_special_tokens=False).input_ids, end])
    mel = extractor([data.load_audio(s.audio[0]).numpy() for s in corpus[:4] for _ in range(2)], sampling_rate=16000,
                    return_tensors="pt").input_features
    L = max(map(len, rows))
    told = torch.tensor([r[:-1] + [end] * (L - len(r)) for r in rows])
    labels = torch.tensor([[-100] * 3 + r[4:] + [-100] * (L - len(r)) for r in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(120):
        loss = model(input_features=mel, decoder_input_ids=told, labels=labels).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
    assert loss < 0.05
    folder = tmp_path_factory.mktemp("baseline") / "whisper-tiny"
    model.save_pretrained(folder), WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def four(corpus, tmp_path):
    """A manifest of the four sentences the baseline knows, and of two of them in one recording."""
    for i, s in enumerate(corpus[:4]):
        soundfile.write(tmp_path / f"{i}.wav", s.audio[0], 16000)
    pause = np.zeros(8000, np.int16)
    soundfile.write(tmp_path / "both.wav", np.concatenate([corpus[0].audio[0], pause, corpus[1].audio[0]]), 16000)
    return write_manifest(tmp_path / "four.jsonl", [{"audio": f"{i}.wav", "text": s.answer.upper() + "!"} for i, s in enumerate(
        corpus[:4])] + [{"audio": "both.wav", "text": f"{corpus[0].answer} {corpus[1].answer}"}])


def test_the_baseline_is_whisper_in_russian(checkpoint, baseline, four, tmp_path, monkeypatch, capsys):
    """Its language is forced, its long recordings are cut at pauses, and generation_config may be as old as Whisper."""
    flags = ["--ckpt", checkpoint, "--manifest", four, "--max_new_tokens", 30, "--out", tmp_path / "e"]
    code, out, _ = exit_of(evaluation.main, monkeypatch, capsys, *flags, "--baseline", baseline)
    results, rows = results_of(tmp_path / "e")
    theirs = results["others"]["whisper-tiny"]["splits"]["four"]
    assert code == 0 and theirs["wer"] == 0 and theirs["wer_ci"] == [0, 0] and results["splits"]["four"]["wer"] > 50
    assert "| whisper-tiny | 0.00 | 0.00 [0.00, 0.00] |" in out and [r["run"] for r in rows] == ["tiny"] * 5 + ["whisper-tiny"] * 5
    exit_of(evaluation.main, monkeypatch, capsys, *flags, "--baseline", baseline, "--lang", "en")
    assert {r["hypothesis"] for r in results_of(tmp_path / "e")[1][5:9]} == {"no"}
    old = shutil.copytree(baseline, tmp_path / "old")
    settings = json.loads((old / "generation_config.json").read_text())
    for name in ("is_multilingual", "lang_to_id", "task_to_id", "no_timestamps_token_id"):
        del settings[name]
    (old / "generation_config.json").write_text(json.dumps(settings))
    exit_of(evaluation.main, monkeypatch, capsys, *flags, "--baseline", old)
    assert results_of(tmp_path / "e")[0]["others"]["old"]["splits"]["four"]["wer"] == 0
    settings["is_multilingual"] = False  # as in whisper-tiny.en
    del settings["_from_model_config"]  # which tells transformers to make a new one
    (old / "generation_config.json").write_text(json.dumps(settings))
    code, _, err = exit_of(evaluation.main, monkeypatch, capsys, *flags, "--baseline", old)
    assert code == 2 and "name a multilingual Whisper" in err


def test_noisy_ones_fall_back(checkpoint, baseline, four, tmp_path, monkeypatch, capsys):
    """Below the threshold the baseline's answer counts, above it ours; and only those are sent to it."""
    wave, rate = soundfile.read(tmp_path / "2.wav", dtype="float32")
    soundfile.write(tmp_path / "2.wav", wave + np.random.default_rng(0).normal(size=len(wave)) * wave.std() * 0.5, rate)  # 6 dB
    flags = ["--ckpt", checkpoint, "--manifest", four, "--max_new_tokens", 30, "--out", tmp_path / "e", "--fallback", "whisper"]
    code, _, err = exit_of(evaluation.main, monkeypatch, capsys, *flags, "--baseline", baseline, "--fallback_snr", 9)
    results, rows = results_of(tmp_path / "e")
    assert code == 0 and "whisper-tiny answers for 1 of 5" in err and list(results["others"]) == [
        "whisper-tiny", "tiny, noisy ones by whisper-tiny"]
    ours, theirs, mixed = ([r["hypothesis"] for r in rows[k:k + 5]] for k in (0, 5, 10))
    assert mixed == [*ours[:2], theirs[2], *ours[3:]] and mixed != ours and 4 < rows[2]["snr"] < 8
    monkeypatch.setattr(evaluation, "ENCODER", str(baseline))  # as --baseline's default, and without a row of its own
    code, _, err = exit_of(evaluation.main, monkeypatch, capsys, *flags, "--fallback_snr", 9)
    assert list(results_of(tmp_path / "e")[0]["others"]) == ["tiny, noisy ones by whisper-tiny"]
    assert [r["hypothesis"] for r in results_of(tmp_path / "e")[1]] == ours + mixed


def test_the_benchmark_end_to_end(checkpoint, hub, baseline, tmp_path, monkeypatch, capsys):
    """RuASRBenchmark with its real splits and columns, from parquet: a tiny checkpoint beside a tiny Whisper."""
    flags = ["--ckpt", checkpoint, "--data_dir", hub, "--baseline", baseline, "--max_new_tokens", 30]
    code, out, _ = exit_of(evaluation.main, monkeypatch, capsys, *flags, "--out", tmp_path / "a", "--normalizer", "post")
    results, rows = results_of(tmp_path / "a")
    assert code == 0 and list(results["splits"]) == list(data.BENCHMARK) and len(rows) == 2 * 6 * 3
    assert results["normalizer"] == "post" and "| tiny, default normaliser |" in out and "| whisper-tiny, default normaliser |" in out
    assert rows[0]["id"] == "Vikhrmodels/RuASRBenchmark/Russian_LibriSpeech:0"
    assert results["others"]["whisper-tiny"]["splits"]["Tone_Speak"]["wer"] == 0  # the corpus's first sentences: it knows them
    for folder in (hub / "Vikhrmodels", hub / "Vikhrmodels" / "RuASRBenchmark"):  # as people name a copy
        exit_of(evaluation.main, monkeypatch, capsys, "--ckpt", checkpoint, "--data_dir", folder, "--max_new_tokens", 8, "--out",
                tmp_path / "b", "--split", "Tone_Webinars,Tone_Books")
        assert list(results_of(tmp_path / "b")[0]["splits"]) == ["Tone_Webinars", "Tone_Books"]
    code, out, _ = exit_of(evaluation.main, monkeypatch, capsys, "--compare", tmp_path / "a", "--out", tmp_path / "c")
    assert code == 0 and "| ru_text_10pct (published) | 1624 | 6.42 | 15.79 | 60.69 | 11.36 | 1.99 | 18.75 | 19.17 |" in out
    lines = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|") and "(" not in line.split("|")[2]]
    assert "decoded by sampling" in out and lines.index("whisper-tiny") < lines.index("Whisper-v3 (published)") < lines.index("a") and "other speech" not in out


# ---- long recordings, questions

def test_long_recordings_by_pieces(checkpoint, net, four, corpus, tmp_path, monkeypatch, capsys):
    """--chunk vad: what each piece says alone, joined."""
    flags = ["--ckpt", checkpoint, "--manifest", four, "--max_new_tokens", 6, "--out", tmp_path / "e"]
    exit_of(evaluation.main, monkeypatch, capsys, *flags)
    whole = heard_in(tmp_path / "e")
    exit_of(evaluation.main, monkeypatch, capsys, *flags, "--chunk", "vad", "--batch_size", 3)
    pieces = heard_in(tmp_path / "e")
    wave = data.load_audio(str(tmp_path / "both.wav"))
    parts = nb.cut_at_pauses(wave, net.config.window_samples)
    assert len(parts) > 1 and pieces[4]["hypothesis"] == " ".join(filter(None, net.decode(net.generate(parts, max_new_tokens=6))))
    assert pieces[4]["tokens"] > whole[4]["tokens"] and [p["hypothesis"] for p in pieces[:4]] == [w["hypothesis"] for w in whole[:4]]


@pytest.mark.parametrize("reference, hypothesis, em, f1", [
    ("Париж.", "париж", 100, 100), ("в саду", "кот в саду", 0, 80), ("кот кот пёс", "кот пес лис", 0, 66.67), ("да", "нет", 0, 0),
    ("да", "", 0, 0)])
def test_answers_by_hand(reference, hypothesis, em, f1):
    """F1: 2 * shared / (words of both); кот is shared once, for it was said once."""
    r = assess([(reference, hypothesis)], task="qa")
    assert (r["em"], r["f1"]) == (em, f1)


def test_questions(checkpoint, four, corpus, tmp_path, monkeypatch, capsys):
    path = write_manifest(tmp_path / "qa.jsonl", [
        {"audio": "0.wav", "question": "Какое слово первое?", "answer": corpus[0].answer.split()[0]},
        {"conversation": [{"role": "user", "content": "Столица Франции?"}, {"role": "assistant", "content": "Париж"}]}])
    real = nb.BorealisForConditionalGeneration.decode
    monkeypatch.setattr(nb.BorealisForConditionalGeneration, "decode", lambda self, ids: [
        "<think>хм</think>\n\n ПАРИЖ." for _ in real(self, ids)])
    code, out, _ = exit_of(evaluation.main, monkeypatch, capsys, "--ckpt", checkpoint, "--manifest", path, "--task", "qa", "--out",
                           tmp_path / "e", "--max_new_tokens", 3)
    results, rows = results_of(tmp_path / "e")
    assert code == 0 and results["splits"]["qa"]["em"] == results["avg_em"] == 50 and "exact match % [95 %]" in out
    assert rows[1]["hypothesis"] == "ПАРИЖ." and rows[1]["seconds"] == 0 and rows[1]["snr"] is None
    code, out, _ = exit_of(evaluation.main, monkeypatch, capsys, "--compare", tmp_path / "e", "--out", tmp_path / "c")
    assert code == 0 and "| e | - | 50.00 | 50.00 |" in out and "published" not in out


@pytest.mark.parametrize("category, text, answer", [
    ("formal_fallacies", "The argument is invalid.", "invalid"), ("formal_fallacies", "Valid", "valid"),
    ("formal_fallacies", "it is not valid", "invalid"), ("formal_fallacies", "Some would say valid. The answer is: invalid", "invalid"),
    ("navigate", "Yes, you return.", "yes"), ("navigate", "True", "yes"), ("web_of_lies", "No.", "no"), ("web_of_lies", "incorrect", "no"),
    ("object_counting", "3 pianos and 4 flutes, so the answer is 7.", "7"), ("object_counting", "You have seven.", "7"),
    ("object_counting", "many", ""), ("navigate", "knowing nothing", ""), ("formal_fallacies", "It is not deductively valid.", "invalid"),
    ("formal_fallacies", "Valid arguments look otherwise: this isn’t valid", "invalid"), ("navigate", "No, that is not correct.", "no"),
    ("navigate", "Yes. There are no extra steps.", "yes"), ("object_counting", "Twenty-one.", "21"), ("object_counting", "7.0", "7"),
    ("object_counting", "3, then thirty", "30"), ("object_counting", "3.", "3"), ("web_of_lies", "**No**", "no")])
def test_what_an_answer_comes_down_to(category, text, answer):
    assert evaluation.chosen(text, category) == answer


def test_big_bench_audio(checkpoint, corpus, tmp_path, monkeypatch, capsys):
    """The hub's layout: data/question_0.mp3 and a metadata file; accuracy by category."""
    folder = tmp_path / "hub" / "ArtificialAnalysis" / "big_bench_audio" / "data"
    folder.mkdir(parents=True)
    items = [("formal_fallacies", "invalid"), ("navigate", "Yes"), ("object_counting", "7"), ("web_of_lies", "No"), ("navigate", "No")]
    for i, (category, answer) in enumerate(items):
        (folder / f"question_{i}.mp3").write_bytes(clip(corpus[i], "MP3")["bytes"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(dict(
        file_name=f"question_{i}.mp3", category=c, official_answer=a, id=i)) + "\n" for i, (c, a) in enumerate(items)))
    asked = []

    def chat(self, conversations, recordings, max_new_tokens):
        asked.extend((c[0]["content"], max_new_tokens) for c in conversations)
        return torch.zeros(len(conversations), 2, dtype=torch.long)

    monkeypatch.setattr(nb.BorealisForConditionalGeneration, "chat", chat)
    monkeypatch.setattr(nb.BorealisForConditionalGeneration, "decode", lambda self, ids: ["The answer is yes, or 7, or valid."] * len(ids))
    code, out, _ = exit_of(evaluation.main, monkeypatch, capsys, "--ckpt", checkpoint, "--task", "bigbench", "--data_dir",
                           tmp_path / "hub", "--out", tmp_path / "e")
    results, _ = results_of(tmp_path / "e")
    assert code == 0 and {k: r["accuracy"] for k, r in results["splits"].items()} == dict(
        formal_fallacies=0, navigate=50, object_counting=100, web_of_lies=0)
    assert len(asked) == 5 and {n for _, n in asked} == {64} and len({s for s, _ in asked}) == 4 and results["avg_accuracy"] == 37.5


# ---- several runs

def evaluated(folder, names, rng, rate, step=1, ids=40):
    """A folder as an evaluation leaves it, of a system that gets words wrong at a rate."""
    folder.mkdir()
    rows = []
    for split in names:
        for i in range(ids):
            words = data.vocabulary("ru")[i:i + 8]
            rows.append(dict(run="x", split=split, id=f"{split}/{i}", reference=" ".join(words),
                             hypothesis=" ".join(w if rng.random() > rate else "ой" for w in words)))
    (folder / "hypotheses.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "results.json").write_text(json.dumps(dict(run="x", step=step, task="asr")))
    return folder


def test_compare_tells_what_is_real(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    folders = [evaluated(tmp_path / f"out_{name}", ["clean", "webinars"], rng, rate) for name, rate in (
        ("bad", 0.3), ("good", 0.1), ("alike", 0.1))]
    code, out, _ = exit_of(evaluation.main, monkeypatch, capsys, "--compare", *folders, "--out", tmp_path / "all")
    assert code == 0 and out.index("| good |") < out.index("| bad |")  # best first
    differences = {line.split("|")[1].strip(): line for line in out.splitlines() if line.startswith("|") and " - " in line.split("|")[1]}
    assert len(differences) == 3
    p = {name: float(line.rsplit("(", 1)[1].split(")")[0]) for name, line in differences.items()}
    assert [v < 0.05 for k, v in sorted(p.items(), key=lambda item: "bad" in item[0])] == [False, True, True]
    wers = [float(x) for x in next(line for line in out.splitlines() if line.startswith("| bad |")).split("|")[3:6]]
    assert wers[2] == pytest.approx((wers[0] + wers[1]) / 2, abs=0.02)
    assert "| Whisper-v3 (published) | - | 11.68 | 12.23 | 7.77 | 11.95 | 2.68 | 19.87 | 11.03 |" in out and "other speech" in out
    assert (tmp_path / "all" / "heatmap.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "all" / "table.md").read_text() in out
    for name in ("x", "y"):  # two runs of one name, and the same baseline beside both
        folder = shutil.copytree(folders[0] if name == "x" else folders[1], tmp_path / name / "out_run")
        with open(folder / "hypotheses.jsonl", "a") as f:
            for line in (folders[2] / "hypotheses.jsonl").read_text().splitlines():
                f.write(json.dumps(json.loads(line) | dict(run="w", took=ord(name))) + "\n")
    code, out, _ = exit_of(evaluation.main, monkeypatch, capsys, "--compare", tmp_path / "x" / "out_run", tmp_path / "y" / "out_run",
                           "--out", tmp_path / "two")
    assert code == 0 and [out.count(f"\n| {n} | ") for n in ("run", tmp_path / "y" / "out_run" / "run", "w")] == [1, 1, 1]
    other = evaluated(tmp_path / "other", ["clean", "webinars"], rng, 0.1, ids=39)
    code, _, err = exit_of(evaluation.main, monkeypatch, capsys, "--compare", *folders, other, "--out", tmp_path / "all")
    assert code == 2 and "other was evaluated on other utterances or another --task than bad" in err
    assert exit_of(evaluation.main, monkeypatch, capsys, "--compare", tmp_path, "--out", tmp_path / "all")[0] == 2


def test_published_averages_are_means():
    for name, (_, wers, average) in evaluation.PUBLISHED.items():
        if None not in wers:
            assert average == pytest.approx(np.mean(wers), abs=0.006), name


@needs_shared
def test_a_real_recording_takes_several_windows(checkpoint, monkeypatch, capsys):
    code, out, err = exit_of(evaluation.main, monkeypatch, capsys, "--ckpt", checkpoint, "--audio",
                             SHARED / "audio" / "jfk.flac", "--max_new_tokens", 5)
    assert code == 0 and "11.00 s, 6 window(s), 150 audio tokens" in err


# -----------------------------------------------------------------------------
# serve_vllm.py: the real server, the real client

VLLM = importlib.util.find_spec("vllm") and importlib.util.find_spec("openai")
needs_vllm = pytest.mark.skipif(not VLLM, reason="vLLM is not installed: make vllm")
VLLM_ENV = dict(os.environ, HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", PYTHONPATH="")


def wav_bytes(wave, rate=16000, kind="WAV", subtype=None):
    soundfile.write(buffer := io.BytesIO(), np.asarray(wave), rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def sound(data):
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def words(text):
    return {"type": "text", "text": text}


def start(place, *argv):
    """serve_vllm.py on a free port, from another working directory -> (process, its log, its openai client)."""
    import openai
    place.mkdir()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with open(place / "log", "w") as log:
        process = subprocess.Popen([sys.executable, str(HERE / "serve_vllm.py"), "--port", str(port), *map(str, argv)], cwd=place,
                                   env=VLLM_ENV | dict(NANOBOREALIS_CACHE=str(place / "cache")), stdout=log, stderr=log)
    return process, place / "log", openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="session", autouse=True)
def servers(request, tmp_path_factory):
    """Two servers: a run's folder, up to two recordings a prompt of 20 s at most; and a checkpoint in the original's layout. They
    take half a minute to load, so they begin before the first test, if any test will ask for them."""
    if not VLLM or not any({"server", "original_server"} & set(i.fixturenames) for i in request.session.items):
        yield None
        return
    place, (checkpoint, original, parts) = tmp_path_factory.mktemp("servers"), map(request.getfixturevalue, ("checkpoint", "original", "parts"))
    started = dict(
        ours=start(place / "ours", "--ckpt", checkpoint, "--max_audio_seconds", 20, "--limit-mm-per-prompt", '{"audio": 2}'),
        original=start(place / "original", "--ckpt", original, "--encoder", parts["encoder"], "--llm", parts["plain"],
                       "--allowed-media-domains", "localhost"))
    try:
        yield started
    finally:
        for process, *_ in started.values():
            process.terminate()
        for process, *_ in started.values():
            process.wait(60)


def ready(process, log, client):
    import openai
    for _ in range(180):
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(openai.APIConnectionError):
            client.models.list()
            return client
        time.sleep(1)
    pytest.fail("no server after 3 minutes: " + log.read_text()[-3000:])


@pytest.fixture(scope="session")
def server(servers):
    return ready(*servers["ours"])


@pytest.fixture(scope="session")
def original_server(servers):
    return ready(*servers["original"])


def chat(client, content, **settings):
    return client.chat.completions.create(model="borealis", messages=[{"role": "user", "content": content}], **(
        dict(max_tokens=10, extra_body=dict(return_token_ids=True)) | settings))


def native_ids(net, text, waves, n=10):
    ids = net.chat([[{"role": "user", "content": text}]], [waves], max_new_tokens=n)[0].tolist()
    return ids[:ids.index(net.ends[0]) + 1] if net.ends[0] in ids else ids


@needs_vllm
def test_server_gives_the_tokens_of_generate(server, net, tokenizer):
    """Short, longer than a window, two recordings, text only, sound anywhere in the prompt: prompt and answer, to the token."""
    a, b = tone(1.3, 1), tone(5.0, 2)
    for parts, text, waves in [
            ([words("что? "), sound(wav_bytes(a, subtype="FLOAT"))], f"что? {A}", [a]),
            ([sound(wav_bytes(b, subtype="FLOAT")), words("и что?")], f"{A}и что?", [b]),
            ([words("сравни "), sound(wav_bytes(a, subtype="FLOAT")), words(" и "), sound(wav_bytes(b, subtype="FLOAT")), words("?")],
             f"сравни {A} и {A}?", [a, b]),
            ("просто текст", "просто текст", [])]:
        answer = chat(server, parts)
        expected, _ = nb.build_ids(tokenizer, net.config, [{"role": "user", "content": text}],
                                   [len(nb.cut_windows(w, net.config)) for w in waves])
        assert answer.prompt_token_ids == expected
        assert answer.choices[0].token_ids == native_ids(net, text, waves)


@needs_vllm
def test_server_under_sixteen_requests_at_once(server, net):
    waves = [tone(0.5 + i % 5, i) if i % 4 else None for i in range(16)]
    def one(i):
        parts = [words(f"номер {i} ")] + ([sound(wav_bytes(waves[i], subtype="FLOAT"))] if waves[i] is not None else [])
        return chat(server, parts).choices[0].token_ids
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(16)))
    assert answers == [native_ids(net, f"номер {i} " + (A if w is not None else ""), [w] if w is not None else [])
                       for i, w in enumerate(waves)]


@needs_vllm
def test_server_takes_what_clients_send(server, net):
    wave = tone(1.5, 3)
    whole = chat(server, [sound(wav_bytes(wave))]).choices[0].message.content
    url = "data:audio/wav;base64," + base64.b64encode(wav_bytes(wave)).decode()
    assert chat(server, [{"type": "audio_url", "audio_url": {"url": url}}]).choices[0].message.content == whole
    stream = chat(server, [sound(wav_bytes(wave))], stream=True, extra_body=None)
    assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == whole
    stereo = np.stack([wave.repeat_interleave(3)] * 2, axis=1)
    for encoded in (wav_bytes(stereo, 48000), wav_bytes(wave, kind="FLAC"), wav_bytes(wave, kind="MP3"), wav_bytes(wave, kind="OGG")):
        assert chat(server, [sound(encoded)]).choices[0].finish_reason
    asked = net.generate(torch.from_numpy(soundfile.read(io.BytesIO(wav_bytes(wave)), dtype="float32")[0]), max_new_tokens=10)
    heard = net.decode(asked[0])
    for language in ("ru", "en"):
        file = ("a.wav", wav_bytes(wave))
        said = server.audio.transcriptions.create(model="borealis", file=file, language=language, extra_body=dict(max_completion_tokens=10))
        assert said.text == heard
    plain = server.audio.transcriptions.create(model="borealis", file=file, response_format="text", extra_body=dict(max_completion_tokens=10))
    assert plain == heard + "\n"
    events = server.audio.transcriptions.create(model="borealis", file=file, stream=True, extra_body=dict(max_completion_tokens=10))
    assert "".join(c["delta"].get("content") or "" for e in events for c in e.choices).strip() == heard


@needs_vllm
def test_server_refuses_and_goes_on(server):
    """Every fault of a client is a 4xx with a reason, and the next request gets its usual answer."""
    import openai
    wave, full = tone(1.0, 4), lambda x: np.full(16000, x, np.float32)
    good = [words("что?"), sound(wav_bytes(wave))]
    usual = chat(server, good).choices[0].token_ids
    file, link = lambda data: [words("что?"), sound(data)], lambda url: [words("что?"), {"type": "audio_url", "audio_url": {"url": url}}]
    for name, content, says in [
            ("NaN", file(wav_bytes(full(np.nan), subtype="FLOAT")), "NaN"), ("Inf", file(wav_bytes(full(np.inf), subtype="FLOAT")), "Inf"),
            ("1e30", file(wav_bytes(full(1e30), subtype="FLOAT")), "1e+30"), ("empty", file(b""), "empty"),
            ("no samples", file(wav_bytes(full(0)[:0])), "0.1 s"), ("0.01 s", file(wav_bytes(wave[:160])), "0.1 s"),
            ("truncated", file(wav_bytes(wave)[:30]), "not audio"), ("not audio", file(b"hello" * 99), "not audio"),
            ("junk", file(b"OggS" + b"\0\xff" * 500), "not audio"), ("too long", file(wav_bytes(tone(21))), "20 s at most"),
            ("host", link("http://example.com/a.wav"), "allowed domains"), ("unreachable", link("http://127.0.0.1:9/a.wav"), "allowed domains"),
            ("file", link("file:///etc/passwd"), "cannot take"), ("placeholder", [words(f"что {A}?"), sound(wav_bytes(wave))], "part of its own"),
            ("placeholder alone", f"что {A}?", "part of its own"), ("three", [*good, *good[1:] * 2], "At most 2")]:
        with pytest.raises(openai.APIStatusError) as e:
            chat(server, content)
        assert 400 <= e.value.status_code < 500 and says in str(e.value), (name, str(e.value))
        assert chat(server, good).choices[0].token_ids == usual, name
    for broken in (b"", b"hello", wav_bytes(full(np.nan), subtype="FLOAT"), wav_bytes(wave[:160]), wav_bytes(tone(21))):
        with pytest.raises(openai.BadRequestError):
            server.audio.transcriptions.create(model="borealis", file=("a.wav", broken))
    assert chat(server, good).choices[0].token_ids == usual


@needs_vllm
def test_server_cuts_long_recordings_at_pauses(server, net):
    """/v1/audio/transcriptions hears more than a window window by window; streamed, the pieces join to the same text."""
    file, settings = ("a.wav", wav_bytes(torch.cat([tone(1.4, 1), torch.zeros(4800), tone(1.5, 2)]))), dict(max_completion_tokens=10)
    heard = server.audio.transcriptions.create(model="borealis", file=file, extra_body=settings).text
    events = server.audio.transcriptions.create(model="borealis", file=file, stream=True, extra_body=settings)
    streamed = "".join(c["delta"].get("content") or "" for e in events for c in e.choices)
    alone = net.decode(net.generate(tone(1.4, 1), max_new_tokens=10)[0])
    assert heard.split() == streamed.split() and len(heard) > len(alone) > 0


@needs_vllm
def test_the_original_layout_is_served(original_server, original, parts):
    """Straight from its pickle, with its own pair of tokens: prompts and answers as natively."""
    net = nb.load_checkpoint(original, parts["encoder"], parts["plain"])
    for text, wave in (("что слышно? ", tone(1.0, 1)), ("", tone(5.0, 2))):
        answer = chat(original_server, [*([words(text)] if text else []), sound(wav_bytes(wave, subtype="FLOAT"))])
        expected, _ = nb.build_ids(net.tokenizer, net.config, [{"role": "user", "content": text + A}], [len(nb.cut_windows(wave, net.config))])
        assert answer.prompt_token_ids == expected and answer.choices[0].token_ids == native_ids(net, text + A, [wave])
    c = net.config
    assert {c.audio_start_id, c.audio_end_id} < set(expected) and c.audio_start_id != c.audio_end_id


@needs_vllm
def test_links_are_followed_only_where_allowed(original_server):
    """--allowed-media-domains names the one host; a redirect from there to another is not followed."""
    import openai
    asked = []

    class Host(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.headers["Host"].split(":")[0], self.path))
            self.send_response(302 if self.path == "/moved.wav" else 200)
            if self.path == "/moved.wav":
                self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/a.wav")
            self.end_headers()
            self.wfile.write(b"" if self.path == "/moved.wav" else wav_bytes(tone(1.0)))

        def log_message(self, *_):
            pass
    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=host.serve_forever, daemon=True).start()

    def hear(name, path):
        return chat(original_server, [{"type": "audio_url", "audio_url": {"url": f"http://{name}:{host.server_port}/{path}"}}])
    assert hear("localhost", "a.wav").choices
    for place in (("127.0.0.1", "a.wav"), ("localhost", "moved.wav")):
        with pytest.raises(openai.APIStatusError) as e:
            hear(*place)
        assert 400 <= e.value.status_code < 500
    host.shutdown()
    assert set(asked) == {("localhost", "/a.wav"), ("localhost", "/moved.wav")}


@needs_vllm
def test_offline_in_vllm(checkpoint, net, manifest, tmp_path, monkeypatch, capsys):
    """eval.py --engine vllm finds what native generation finds; --transcribe hears long recordings piece by piece."""
    folder, hf = Path(manifest).parent, tmp_path / "hf"
    nb.export(checkpoint, hf)
    flags = ["--ckpt", hf, "--manifest", manifest, "--max_new_tokens", 6]
    (tmp_path / "bad.wav").write_text("no sound")
    soundfile.write(tmp_path / "long.wav", torch.cat([tone(1.4, 1), torch.zeros(4800), tone(5.5, 2)]).numpy(), 16000)
    jobs = [subprocess.Popen([sys.executable, *map(str, argv)], cwd=tmp_path, env=VLLM_ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for argv in ([HERE / "eval.py", *flags, "--engine", "vllm", "--out", tmp_path / "vllm"],
                         [HERE / "serve_vllm.py", "--ckpt", hf, "--max_new_tokens", 6, "--transcribe", folder / "1.wav", "bad.wav", "long.wav"])]
    assert exit_of(evaluation.main, monkeypatch, capsys, *flags, "--out", tmp_path / "native")[0] == 0
    (_, err), (out, _) = (job.communicate(timeout=300) for job in jobs)
    assert jobs[0].returncode == 0, err[-2000:]
    ours, theirs = ([(r["id"], r["hypothesis"], r["tokens"], r["cut"]) for r in heard_in(tmp_path / n)] for n in ("native", "vllm"))
    assert ours == theirs and len(ours) == 32 and sum(bool(r[1]) for r in ours) > 20
    short, bad, long = map(json.loads, out.splitlines())
    assert jobs[1].returncode == 0 and short["audio"] == str(folder / "1.wav") and short["text"] == ours[1][1] and "not audio" in bad["error"]
    pieces = nb.cut_at_pauses(data.load_audio(str(tmp_path / "long.wav")), net.config.window_samples)
    heard = [net.decode(net.generate(p, max_new_tokens=6)[0]) for p in pieces]
    assert long["text"].split() == " ".join(heard).split() and len(pieces) > 3 and long["cut"]


def listener(heard=None):
    """Hears a word a tone; before it answers it notes what has been printed, by way of heard()."""
    def answer(samples, waves):
        if heard:
            heard()
        loud = (waves[0][0].unfold(0, 800, 800).square().mean(1) > 1e-3).int()
        return [(" ".join(f"слово{i}" for i in range(int((loud.diff() == 1).sum() + loud[0]))), 1, False)]
    return answer


BEEP, GAP, REST = 0.3 * np.sin(np.arange(9600) * 0.2), np.zeros(2400), np.zeros(12800)


def in_halves(*sounds, noise=0.0):
    wave = np.concatenate(sounds)
    wave = (wave + noise * np.random.default_rng(0).standard_normal(len(wave))).astype(np.float32)
    return [wave[i:i + 8000] for i in range(0, len(wave), 8000)]


@needs_vllm
def test_live_says_only_what_it_keeps(tmp_path, monkeypatch, capsys):
    """Nothing is taken back, each phrase ends with its pause, and silence says nothing."""
    import serve_vllm
    soundfile.write(tmp_path / "a.wav", np.concatenate([REST, BEEP, GAP, BEEP, REST, REST, BEEP, GAP, BEEP, GAP, BEEP, REST]), 16000)
    printed = []
    monkeypatch.setattr(serve_vllm.time, "sleep", lambda s: time.monotonic() and threading.Event().wait(0.02))
    serve_vllm.live(listener(lambda: printed.append(capsys.readouterr().out)), serve_vllm.pieces_of(str(tmp_path / "a.wav")), 160_000)
    printed.append(capsys.readouterr().out)
    assert [line.split() for line in "".join(printed).splitlines()] == [["слово0", "слово1"], ["слово0", "слово1", "слово2"]]
    assert len(printed) > 5 and any(p.strip() and "\n" not in p for p in printed)  # words come before the phrase is over


@needs_vllm
@pytest.mark.parametrize("sounds, noise, lines", [
    ([REST, BEEP, GAP, BEEP, REST, BEEP, REST], 0.02, [2, 1]),                        # pauses in a room 21 dB below the voice
    ([0.05 * BEEP, 0.05 * GAP, BEEP, GAP, BEEP, REST], 0.0, [2]),                     # too soft for this listener, then loud
    ([0.12 * BEEP, GAP, 0.12 * BEEP, GAP, BEEP, GAP, BEEP, REST], 0.0, [2]),
    ([REST, REST], 0.02, []), ([REST, BEEP], 0.001, [1]), ([REST, *[BEEP] * 20], 0.001, [1, 1])])
def test_live_tells_voice_from_background(capsys, sounds, noise, lines):
    import serve_vllm
    serve_vllm.live(listener(), in_halves(*sounds, noise=noise), 160_000)
    assert [len(line.split()) for line in capsys.readouterr().out.splitlines()] == lines


@needs_vllm
def test_live_ends_on_ctrl_c_with_all_that_was_heard(capsys):
    """The microphone stays open; the signal comes in the middle of a pass."""
    import serve_vllm
    before = signal.getsignal(signal.SIGINT)

    def microphone():
        yield from in_halves(*[BEEP, GAP] * 4)
        threading.Event().wait()
    interrupt = iter([lambda: (time.sleep(0.3), os.kill(os.getpid(), signal.SIGINT))])
    serve_vllm.live(listener(lambda: next(interrupt, lambda: None)()), microphone(), 160_000)
    assert capsys.readouterr().out.split() == [f"слово{i}" for i in range(4)] and signal.getsignal(signal.SIGINT) == before


@needs_vllm
def test_live_reads_raw_samples_as_they_drip_in():
    """Standard input in pieces of any length, the last one cut in the middle of a sample."""
    import serve_vllm
    samples = np.arange(-10000, 10001).astype("<i2")
    keep, (read, write) = os.dup(0), os.pipe()
    os.dup2(read, 0)
    try:
        def drip():
            sent = samples.tobytes() + b"x"
            for i in range(0, len(sent), 3001):
                os.write(write, sent[i:i + 3001])
            os.close(write)
        threading.Thread(target=drip).start()
        heard = list(serve_vllm.pieces_of("-"))
    finally:
        os.dup2(keep, 0)
    assert [len(p) for p in heard] == [8000, 8000, 4001]
    assert np.array_equal(np.concatenate(heard) * 32768, samples.astype(np.float32))


@needs_vllm
def test_live_catches_up(capsys):
    """While one pass takes as long as many pieces, they wait and are decoded together."""
    import serve_vllm
    passes = []
    serve_vllm.live(listener(lambda: (passes.append(1), time.sleep(0.1))), in_halves(*[BEEP, GAP] * 10, REST), 160_000)
    assert len(capsys.readouterr().out.split()) == 10 and len(passes) <= 4


@needs_vllm
@pytest.mark.parametrize("argv, says", [
    (["--max_audio_seconds", "nan"], "between"), (["--max_audio_seconds", "0"], "between"), (["--transcribe", "nowhere.wav"], "no file or folder"),
    (["--transcribe", "."], "no recordings in"), (["--live", "nowhere.wav"], "no file at"), (["--live", "-", "--nonsense", "1"], "--nonsense"),
    (["--live", "-", "--transcribe", "a.wav"], "not both"), (["--ckpt", "nowhere"], "no checkpoint in"), (["--ckpt", "no/where"], "cannot fetch"),
    (["--live", "-", "--max_new_tokens", "0"], "at least 1")])
def test_wrong_serving_flags(tmp_path, monkeypatch, capsys, argv, says):
    import serve_vllm
    monkeypatch.chdir(tmp_path)
    code, out, err = exit_of(serve_vllm.main, monkeypatch, capsys, *argv)
    assert code == 2 and says in err and err.startswith("error:") and len(err.splitlines()) == 1


@needs_vllm
def test_what_is_served_is_what_the_checkpoint_is_now(checkpoint, original, parts, tmp_path, monkeypatch):
    """Exported once; again when anything that matters has changed. A whole folder is served as it is."""
    import serve_vllm
    monkeypatch.setenv("NANOBOREALIS_CACHE", str(tmp_path / "cache"))
    run = shutil.copytree(checkpoint, tmp_path / "run")
    first = serve_vllm.servable(run)
    assert serve_vllm.servable(run) == first and serve_vllm.servable(first) == first
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | dict(audio_end_id=config["audio_start_id"])))
    second = serve_vllm.servable(run)
    assert second != first and json.loads((second / "config.json").read_text())["audio_end_id"] == config["audio_start_id"]
    foreign = shutil.copytree(original, tmp_path / "foreign")  # the original, with a config of its own kind
    (foreign / "config.json").write_text(json.dumps(dict(auto_map={"AutoModel": "modeling.Audio"}, model_type="audio_llm")))
    (foreign / "generation_config.json").write_text("{}")
    assert "encoder_config" in json.loads((serve_vllm.servable(foreign, parts["encoder"], parts["plain"]) / "config.json").read_text())


def test_a_failed_export_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(nb, "model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        nb.export(checkpoint, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_a_pushed_folder_comes_back_whole(checkpoint, tmp_path, monkeypatch):
    """The hub as a folder, and huggingface_hub's own matching of names: what we fetch of an export answers, and serves."""
    from huggingface_hub.utils import filter_repo_objects
    nb.export(checkpoint, tmp_path / "hf", title="someone/model")
    assert 'from_pretrained("someone/model"' in (tmp_path / "hf" / "README.md").read_text()

    def fetch(name, allow_patterns):
        (tmp_path / "fetched").mkdir()
        for file in filter_repo_objects(sorted(os.listdir(tmp_path / "hf")), allow_patterns=allow_patterns):
            shutil.copy(tmp_path / "hf" / file, tmp_path / "fetched")
        return tmp_path / "fetched"
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    net, there = nb.load_checkpoint("someone/model"), nb.load_checkpoint(tmp_path / "hf")
    assert torch.equal(net.generate(tone(1), max_new_tokens=4), there.generate(tone(1), max_new_tokens=4))
    assert {p.name for p in (tmp_path / "fetched").iterdir()} == set(os.listdir(tmp_path / "hf")) - {"README.md"}


# -----------------------------------------------------------------------------
# What a user can get wrong: one line, exit code 2, nothing touched

@pytest.mark.parametrize("argv, says", [
    (["--presett", "tiny"], "did you mean --preset"), (["--preset", "huge"], "choose from"), (["--lr", "fast"], "--lr"),
    (["--preset", "tiny", "--lr", "0"], "must be positive"), (["--preset", "tiny", "--steps", "0"], "at least 1"),
    (["--preset", "tiny", "--train_manifest", "nowhere.jsonl"], "no manifest at"), ([], "--data_dir"),
    (["--preset", "tiny_ru_only"], "--preset tiny_pretrain"), (["--mix", "soup"], "choose from"), (["--data_dir", "nowhere"], "no folder at"),
    (["--train_manifest", "OWN", "--init_from", "nowhere/c"], "cannot fetch the checkpoint nowhere/c"),
    (["--resume"], "nothing to resume"), (["--preset", "tiny", "--batch_size", "0"], "at least 1"),
    (["--preset", "tiny", "--keep", "-1"], "at least 0"), (["--lora_dropout", "2"], "below 1"), (["--preset", "tiny", "--workers", "-1"], "at least 0"),
    (["--preset", "tiny_ru_only", "--resume"], "nothing to resume"),
    (["--preset", "tiny", "--lang", "fr"], "speaks ru, en"),
    (["--preset", "tiny", "--curriculum", "0,1,2"], "4 ascending epochs"),
    (["--preset", "tiny", "--curriculum", "0,0,0,0", "--noise", "nowhere"], "no folder nowhere"), (["--preset", "tiny", "stray"], "stray"),
    (["--preset", "tiny", "--device", "cuda"], "no GPU"),
    (["--train_manifest", "OWN", "--encoder", "nowhere/a", "--llm", "nowhere/b", "--init_from", "none"], "--encoder")])
def test_wrong_training_flags(tmp_path, manifest, monkeypatch, capsys, argv, says):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    argv = [manifest if a == "OWN" else a for a in argv]
    code, out, err = exit_of(train.main, monkeypatch, capsys, *argv, "--out", tmp_path / "out")
    message = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(message) == 1 and says in message[0] and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_batch_is_shared_evenly(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, _, err = exit_of(train.main, monkeypatch, capsys, "--preset", "tiny", "--out", tmp_path / "out")
    assert code == 2 and "--effective_batch 16 cannot be shared by 3" in err


def test_a_run_is_not_overwritten(manifest, tmp_path, monkeypatch, capsys):
    flags = [*FAST, "--train_manifest", manifest, "--steps", 1, "--out", tmp_path / "out"]
    train_now(monkeypatch, *flags)
    before = (newest(tmp_path / "out") / "state.pt").read_bytes()
    code, _, err = exit_of(train.main, monkeypatch, capsys, *flags)
    assert code == 2 and "already holds a run" in err
    code, _, err = exit_of(train.main, monkeypatch, capsys, "--resume", "--lr", 1, "--out", tmp_path / "out")
    assert code == 2 and "--lr was" in err
    assert (newest(tmp_path / "out") / "state.pt").read_bytes() == before
    code, _, err = exit_of(train.main, monkeypatch, capsys, "--preset", "ru_only", "--train_manifest", manifest, "--init_from",
                           tmp_path / "out" / "step-0000001", "--overwrite", "--out", tmp_path / "out")
    assert code == 2 and "lies in --out" in err and newest(tmp_path / "out").name == "step-0000001"
    assert train_now(monkeypatch, *flags, "--overwrite")[0] == 0


def test_a_preset_with_a_folder_of_its_own_resumes_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--preset", "tiny_it_fresh", "--utterances", 40, "--effective_batch", 2, "--out"]
    train_now(monkeypatch, *flags[:-1], "--steps", 2, "--save_every", 1, "--out", "out_tiny_it_fresh")
    shutil.rmtree(newest("out_tiny_it_fresh"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "tiny_it_fresh", "--resume"])
    with monkeypatch.context() as patch:
        patch.setattr(train, "catch_signals", list)
        assert train.main() == 0 and newest("out_tiny_it_fresh").name == "step-0000002"


@pytest.mark.parametrize("argv, says", [
    (["--ckpt", "nowhere"], "no checkpoint in"), (["--manifest", "nowhere.jsonl"], "no manifest at"),
    (["--audio", "nowhere.wav"], "no file at"), (["--audio", "noise.wav"], "not audio"), (["--audio", "silent.wav"], "silent"),
    (["--audio", "short.wav"], "shorter"), (["--audio", "nan.wav"], "NaN"), (["--prompt", "что?"], "--audio"),
    (["--audio", "good.wav", "--prompt", f"{A} {A}"], "placeholders"), (["--manifest", "empty.jsonl"], "is empty"),
    (["--batch_size", "0"], "at least 1"), (["--nonsense"], "--nonsense"), (["--device", "tpu"], "choose cpu"),
    (["--out", "good.wav"], "is a file"), (["--task", "qa"], "name a --manifest"), (["--task", "bigbench", "--manifest", "m"], "leave out"),
    (["--split", "clean,nowhere"], "choose from clean, voices"), (["--split", "clean", "--baseline", "nowhere/w"], "cannot load --baseline nowhere/w"),
    (["--split", "clean", "--limit", "1", "--baseline", "CKPT"], "is a borealis model, not whisper"), (["--data_dir", "nowhere"], "no folder"),
    (["--data_dir", "."], "has no Vikhrmodels/RuASRBenchmark"), (["--task", "qa", "--manifest", "m", "--baseline", "w"], "for transcripts"),
    (["--lang", "ru,en", "--limit", "1", "--fallback", "whisper"], "one language"), (["--fallback", "piano"], "whisper"),
    (["--compare", "nowhere"], "no results of eval.py in nowhere"), (["--ckpt", "nowhere/x", "--engine", "vllm"], "cannot fetch the checkpoint"),
    (["--task", "bigbench", "--split", "clean"], "formal_fallacies")])
def test_wrong_evaluation_flags(checkpoint, bad_files, monkeypatch, capsys, argv, says):
    (bad_files / "empty.jsonl").write_text("\n")
    soundfile.write(bad_files / "good.wav", tone(1).numpy(), 16000)
    monkeypatch.chdir(bad_files)
    argv = [checkpoint if a == "CKPT" else a for a in argv]
    argv = argv if "--ckpt" in argv else [*argv, "--ckpt", checkpoint]
    code, _, err = exit_of(evaluation.main, monkeypatch, capsys, *argv)
    message = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(message) == 1 and says in message[0] and "Traceback" not in err


@pytest.mark.parametrize("harm, says", [
    ("shape", "mismatched"), ("missing", "missing keys"), ("unexpected", "unexpected keys"), ("truncated", "cannot load"),
    ("other", "whisper model"), ("config", "cannot load"), ("weights", "cannot load")])
def test_broken_checkpoints(checkpoint, tmp_path, monkeypatch, capsys, harm, says):
    out = shutil.copytree(checkpoint, tmp_path / "ckpt")
    weights, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    if harm == "shape":
        config["llm_config"]["intermediate_size"] = 256
    elif harm == "other":
        config["model_type"] = "whisper"
    elif harm == "missing":
        del weights["adapter.w_in.weight"], weights["llm.model.embed_tokens.weight"]
    elif harm == "unexpected":
        weights["adapter.lora_A.weight"] = torch.zeros(2, 2)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text("{" if harm == "config" else json.dumps(config))
    if harm == "truncated":
        (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:1000])
    if harm == "weights":
        (out / "model.safetensors").unlink()
    code, _, err = exit_of(evaluation.main, monkeypatch, capsys, "--ckpt", out)
    message = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(message) == 1 and says in message[0] and "Traceback" not in err
    (out / "train_config.json").write_text("{")
    assert exit_of(evaluation.main, monkeypatch, capsys, "--ckpt", out)[0] == 2
    assert exit_of(nb.main, monkeypatch, capsys, "export", "--ckpt", out, "--to", tmp_path / "hf")[0] == 2
