"""Loops end, silence is silent, words told beforehand are a help: model.py's guard, rows without
speech, lists of words."""
import json
import random
import sys
from collections import Counter
import numpy as np
import pytest
import torch
import transformers as hf
import data
import eval as evaluation
import model as nb
from conftest import (
    SHARED,
    exit_of,
    is_one_line,
    needs_shared,
    rows_in,
    tone,
    train_now,
    wav_bytes,
    write_manifest,
)
from support import banks, context, corpus, report, rows
from support.tasks import native

# ---- Loops
@pytest.mark.parametrize("start, phrase, times, kept", [
    ([1, 2], [5], 11, [1, 2, 5]), ([1, 2], [5], 10, None), ([], [1, 2, 3], 11, [1, 2, 3]),
    ([4], [*range(10, 18)], 11, [4, *range(10, 18)]), ([4], [*range(10, 19)], 30, None),
    ([5, 5, 5, 5], [5], 7, [5]), ([], [7, 7, 8], 11, [7, 7, 8])])
def test_a_loop_is_cut_back_to_its_first_phrase(start, phrase, times, kept):
    ids = start + phrase * times
    assert nb.guard(ids, None) == (ids if kept is None else kept)
    assert nb.guard([*ids, 99], None) == [*ids, 99]  # it went on: no loop

def test_a_transcript_is_as_long_as_speech_can_be():
    ids = [*range(100, 300)]
    assert nb.speech_limit(0) == 16 and nb.speech_limit(16000) == 32
    assert nb.guard(ids, 40) == ids[:40] and nb.guard(ids[:40], 40) == ids[:40]
    assert nb.guard([1, 2] + [3, 4] * 20, 22) == [1, 2, 3, 4]
    assert nb.guard([1, 2, 3, 4, 3, 4, 3, 4, 3, 4], 10) == [1, 2, 3, 4, 3, 4, 3, 4, 3, 4]

def test_no_text_of_the_corpus_is_cut():
    for lang in ("ru", "en"):
        spoken = [s for split in ("train", "voices", "books")
                  for s in data.embedded(lang, split, corpus.CHUNK)]
        tokenizer = data.tiny.train_tokenizer(data.tiny.texts_of(spoken))
        for s in spoken:
            ids = [*tokenizer(s.answer).input_ids, 0]
            for n in range(len(ids)):
                assert nb.guard(ids[:n], nb.speech_limit(len(s.audio[0]))) == ids[:n], s.answer

@needs_shared
def test_nor_by_the_tokens_of_qwen3():
    tokenizer = hf.AutoTokenizer.from_pretrained(SHARED / "qwen3_tokenizer")
    for s in data.embedded("ru", "voices", 250):
        ids = tokenizer(s.answer).input_ids
        assert nb.guard(ids, nb.speech_limit(len(s.audio[0]))) == ids

def looping(net, monkeypatch, period: int):
    """A network whose answers say tokens 300, 301, ... again and again, `period` of them."""
    def forward(*args, inputs_embeds=None, input_ids=None, past_key_values=None, **kwargs):
        out = plain(*args, inputs_embeds=inputs_embeds, input_ids=input_ids,
                    past_key_values=past_key_values, **kwargs)
        said = input_ids[:, -1:] if input_ids is not None else torch.full((len(out.logits), 1), -1)
        following = torch.where(said < 300, 300, 300 + (said - 299) % period)
        out.logits = torch.nn.functional.one_hot(following, out.logits.shape[-1]).float()
        return out
    plain = net.llm.forward
    monkeypatch.setattr(net.llm, "forward", forward)

@pytest.mark.parametrize("period", [1, 3, 8])
def test_generate_ends_loops(net, monkeypatch, period):
    looping(net, monkeypatch, period)
    marker = net.config.audio_start_id
    once = [*range(300, 300 + period)]
    asked = dict(user_prompt=["что слышно?", "ещё?"], max_new_tokens=100)
    ids = net.generate([tone(1), tone(2)], **asked).tolist()
    assert ids == [once + [marker] * (len(ids[0]) - period)] * 2
    assert len(ids[0]) == 11 * period  # it stopped at once
    free = net.generate([tone(1), tone(2)], loop_guard=False, **asked)
    assert free.shape == (2, 100) and free[0, 99] == 300 + 99 % period
    beams = net.generate(tone(1), num_beams=3, num_return_sequences=2, **asked | dict(
        user_prompt="что слышно?"))
    assert len(beams) == 2
    (text, n, cut), = native(net, 100)([data.TRANSCRIBE], [[tone(3)]])
    assert (text, n, cut) == (net.decode(torch.tensor(once)), period, True)

def test_transcripts_end_where_no_speech_is_as_long(net, monkeypatch):
    looping(net, monkeypatch, 120)
    long, short = native(net, 256)([data.TRANSCRIBE] * 2, [[tone(4)], [tone(0.5)]])
    assert (long[1], long[2], short[1], short[2]) == (80, True, 24, True)
    (_, n, cut), = native(net, 50)([data.TRANSCRIBE], [[tone(4)]])
    assert (n, cut) == (50, True)
    (_, n, _), = native(net, 256, loop_guard=False)([data.TRANSCRIBE], [[tone(0.5)]])
    assert n == 256
    ids = net.generate(tone(0.5), "что слышно?", max_new_tokens=60)  # any question: no such limit
    assert ids.shape == (1, 60)

# ---- Silence
def test_sounds_without_speech(tmp_path):
    bank = banks.without_babble(banks.open_bank("made", "Musan"))
    assert len(bank) == banks.MADE * 2 // 3
    pool = banks.Silence(banks.TRAINED, bank, 40, 3, seed=5)
    own = list(pool)
    assert len(own) == 40 and {s.answer for s in own} == {""} and own[8].name == "cough/8"
    assert all(0.3 * 16000 <= len(s.audio[0]) <= 3 * 16000 for s in own)
    own_kinds = banks.TRAINED, bank, 40, 3
    assert data.digest(pool) == data.digest(banks.Silence(*own_kinds, seed=5))
    peaks = [np.abs(s.audio[0].astype(int)).max() for s in own]
    assert min(peaks) == 0 and max(peaks) > 3000 and len({*peaks}) > 20
    again, other = pool[7].audio[0], banks.Silence(*own_kinds, seed=6)[7].audio[0]
    assert np.array_equal(own[7].audio[0], again) and not np.array_equal(again, other)

@pytest.mark.parametrize("name", banks.SPLITS)
def test_splits_without_speech(name):
    samples = banks.split(name, 12, 0)
    assert [s.answer for s in samples] == [""] * 12
    assert [np.array_equal(a.audio[0], b.audio[0]) for a, b in
            zip(samples, banks.split(name, 12, 0), strict=True)] == [True] * 12
    assert all(rows.load_audio(s.audio[0]).isfinite().all() for s in samples)
    levels = [np.abs(s.audio[0].astype(int)).max() for s in samples]
    assert (levels[0] == 0) == (name == "silence") and max(levels) > 1000

def test_training_hears_silence(tmp_path, monkeypatch, manifest):
    flags = ["--preset", "tiny", "--train_manifest", manifest, "--steps", 2, "--batch_size", 8,
             "--effective_batch", 8, "--curriculum", "none", "--out", tmp_path / "a"]
    code, _ = train_now(monkeypatch, *flags, "--silence", 0.25)
    known = json.loads((tmp_path / "a/step-0000002/train_config.json").read_text())
    assert code == 0 and known["silence"] == 0.25
    assert known["data"]["silence"][0] == 4  # 0.25 * 2 steps * 8
    schedule = data.Schedule([32, 8], [1, 1 / 3], 0, range(125), 8)
    drawn = Counter(i >= 32 for step in schedule for i, _ in step)
    assert drawn[True] == 250

def test_runs_from_before_silence_go_on(tmp_path, monkeypatch, manifest):
    flags = ["--preset", "tiny", "--train_manifest", manifest, "--steps", 2, "--batch_size", 8,
             "--effective_batch", 8, "--curriculum", "none", "--save_every", 1]
    train_now(monkeypatch, *flags, "--silence", 0, "--context", 0, "--out", tmp_path / "a")
    config = tmp_path / "a/step-0000001/train_config.json"
    known = json.loads(config.read_text())
    for folder in (tmp_path / "a").glob("step-0000002"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    old = {k: v for k, v in known.items() if k not in ("silence", "context")}
    config.write_text(json.dumps(old))
    before = rows_in(tmp_path / "a")
    code, after = train_now(monkeypatch, "--resume", "--out", tmp_path / "a")
    assert code == 0 and after[1]["loss"] == before[1]["loss"]

# ---- Words of context
def test_the_one_sentence(tokenizer, net):
    assert nb.with_context("Слушай.", []) == "Слушай."
    system = nb.with_context(nb.ASR_SYSTEM, ["Омск", "чайник"])
    assert system == nb.ASR_SYSTEM + " Возможные слова: Омск, чайник."
    sample = context.tell(data.TRANSCRIBE, ["Омск"])
    assert sample.messages()[0]["content"].endswith("Возможные слова: Омск.")
    assert sample.question == data.TRANSCRIBE.question
    assert context.parse(" Сергей, Омск,, чайник ,") == ["Сергей", "Омск", "чайник"]
    assert context.parse("") == context.parse(" , ") == []
    with pytest.raises(rows.BadRow, match="broken text"):
        context.parse("Омск\ud800")

def told_in(sample) -> list[str]:
    _, mark, words = sample.system.partition(nb.CONTEXT)
    return words.removesuffix(".").split(", ") if mark else []

def test_training_tells_rare_words_among_others():
    common = [data.Sample("мой номер пять два один") for _ in range(3000)]
    rng = random.Random(0)
    rare = [data.Sample("здесь живёт " + "".join(rng.choices("абвгдезиклмн", k=8)))
            for _ in range(1000)]
    asks = [data.Sample("что-то", question="кто это?")] * 1000
    tell = context.Context([common + rare, asks], 0.5, seed=1)
    told = [tell(s, 0.2, i) for i, s in enumerate(rare)]
    lists = [told_in(s) for s in told]
    assert 400 < sum(map(bool, lists)) < 600
    own = [s.answer.split()[-1] in words for s, words in zip(rare, lists, strict=True) if words]
    assert 0.55 < np.mean(own) < 0.78  # in two of three
    assert max(map(len, lists)) <= context.MOST + 1 and len({len(w) for w in lists}) > 5
    assert not {"номер", "пять", "живёт"} & {w for words in lists for w in words}
    first = [words.index(s.answer.split()[-1]) for s, words in zip(rare, lists, strict=True)
             if s.answer.split()[-1] in words and len(words) > 3]
    assert len({*first}) > 3  # at any place
    assert [tell(s, 0.7, i) for i, s in enumerate(rare[:50])] == told[:50]
    assert [tell(s, 1.2, i) for i, s in enumerate(rare[:50])] != told[:50]  # anew in each epoch
    assert all(tell(s, 0, i) is s for i, s in enumerate(asks))
    assert all(told_in(tell(s, 0, i)) for i, s in enumerate(common[:50])
               if tell(s, 0, i) is not s)  # others alone

def test_a_list_too_long_is_left_out(net, corpus):
    tell = context.Context([corpus], 1.0, 0)
    tell.rare = [f"слово{i}" * 30 for i in range(50)]
    most = max(len(data.encode(s, net.tokenizer, net.config)[0]) for s in corpus)
    dataset = data.Dataset(corpus, net.tokenizer, net.config, context=tell, max_tokens=most)
    for i in range(20):
        (ids, *_), left_out = dataset[i, 0.0]
        assert len(ids) <= most and not left_out

def test_names_training_never_says():
    names = {name for own in corpus.NAMES.values() for name in own["held_out"]}
    for lang in ("ru", "en"):
        own, rng = set(corpus.NAMES[lang]["held_out"]), random.Random(0)
        said = {w for _ in range(3000) for w in corpus.named(lang, "named", rng).split()}
        assert not said & own and not own & set(corpus.vocabulary(lang))
        assert len(said) > 2000  # and new ones nearly each time
    samples = data.embedded("ru", "names", 50)
    assert all(names & set(s.answer.split()) for s in samples)
    assert {s.name.split("/")[-1] for s in samples} <= set(corpus.EVAL_VOICES)
    right = context.told("ru", "names_context", samples, 0)
    wrong = context.told("ru", "names_wrong", samples, 0)
    for s, a, b in zip(samples, right, wrong, strict=True):
        own = names & set(s.answer.split())
        assert own <= set(told_in(a)) and not own & set(told_in(b))
        assert len(told_in(a)) == len(told_in(b)) == 10 and a.answer == s.answer

def test_counts_of_names_loops_and_words_made_up():
    counts = report.more_counts(["кирилл", "и", "полина"], ["кирилл", "и", "калина"], 2)
    assert counts == dict(loops=[0, 1], made_up=[0, 0], found=[1, 2])
    counts = report.more_counts([], ["да", "нет", "да", "нет", "да", "нет"], 30.0)
    assert counts == dict(loops=[1, 1], made_up=[6, 50.0], found=[0, 0])
    assert evaluation.percent(np.array([[6, 50.0], [0, 50.0]])) == 6  # words a minute

def test_eval_tells_words(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.wav").write_bytes(wav_bytes(tone(1)))
    manifest = write_manifest(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "привет"}])
    seen = []
    monkeypatch.setattr(nb.BorealisForConditionalGeneration, "chat", spy(seen, nb))
    flags = ["--ckpt", checkpoint, "--manifest", manifest, "--max_new_tokens", 4]
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags), "--context", "Омск, чайник",
                                      "--out", str(tmp_path / "out")])
    evaluation.main()
    assert seen[0][0]["content"].endswith(" Возможные слова: Омск, чайник.")
    code, _, err = exit_of(evaluation.main, monkeypatch, capsys, *flags, "--context", "a\ud800")
    assert is_one_line(code, err, "--context: broken text")
    code, _, err = exit_of(evaluation.main, monkeypatch, capsys, *flags, "--context", "a",
                           "--task", "qa")
    assert is_one_line(code, err, "for asr")

def spy(seen: list, code):
    plain = code.BorealisForConditionalGeneration.chat
    def chat(self, conversations, *args, **settings):
        seen.extend(conversations)
        return plain(self, conversations, *args, **settings)
    return chat
