"""support/tasks.py -- tasks besides transcripts: questions, BigBenchAudio; and who answers them."""
import functools
import re
import sys
from dataclasses import replace
from pathlib import Path
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from data import HubSamples
from model import ASR_PROMPT, ASR_SYSTEM, SAMPLE_RATE, with_context
from support import checkpoint, cli, pauses, recipes, rows
from support.decoding import System, digest_model, stamp

TASKS = recipes.TABLES["tasks"]  # {task: its metrics, the main one first}
TITLES = recipes.TABLES["titles"]

@functools.cache  # BigBenchAudio's categories are asked for one by one
def load_split(source, data_dir: str | None, strict: bool, limit: int | None = None):
    """A hub dataset's usable samples, maybe from its copy in data_dir. limit: rows streamed."""
    pool = HubSamples(source, data_dir, None if data_dir else limit or source.rows)
    bad, samples = rows.BadRows(strict), []
    for i in range(len(pool)):
        try:
            samples.append(pool[i])
        except rows.BadRow as e:
            bad.add(str(e), e.where)
    bad.report(len(pool), source.split)
    return samples

CATEGORIES = recipes.TABLES["categories"]  # of BigBenchAudio: how to answer, pattern of answers
SAME, OPPOSITE = recipes.TABLES["synonyms"].values()
UNITS, TENS = recipes.TABLES["numerals"].values()
NUMBERS = dict(zip(f"{UNITS}|{TENS}".split("|"), [*range(20), *range(20, 100, 10)], strict=True))
NUMERAL = re.compile(rf"\b(?:({TENS})[- ])?({UNITS}|{TENS})\b")
NOT = re.compile(r"(?:(?<!\S)not|n't)(?:\s+\S+){0,2}\s*$")  # as before "deductively valid"

def extract_answer(text: str, category: str) -> str:
    """One of its category's answers or "": the first word, or else the last (after "answer is")."""
    text = text.lower().replace("’", "'")
    text = NUMERAL.sub(lambda m: str(NUMBERS.get(m[1], 0) + NUMBERS[m[2]]), text)
    text = re.sub(r"[a-z]+", lambda m: SAME.get(m[0], m[0]), text)
    text = re.sub(r"(?<=\d)\.0+\b", "", text).lstrip(" \n*\"'")
    option = rf"\b({CATEGORIES[category][1]})\b"
    first = re.match(rf"{option}\s*(?:[.,;:!*\n]|$)", text)
    if first and not first[1].isdigit():  # an answer that counts begins with parts of the sum
        return first[1]
    for part in (re.split(r"answer(?: is)?\b:?", text)[-1], text):
        if last := re.match(f"(.*){option}", part, re.DOTALL):
            return OPPOSITE.get(last[2], last[2]) if NOT.search(last[1]) else last[2]
    return ""

def load_bigbench(category: str, data_dir: str | None, strict: bool) -> list:
    """The samples of one of BigBenchAudio's categories, each with its instruction."""
    samples = load_split(recipes.BIG_BENCH_AUDIO, data_dir, strict)  # question: the category
    own, question = CATEGORIES[category][0], "Listen carefully and answer the question."
    return [replace(s, system=own, question=question) for s in samples if s.question == category]

def native(model, max_new_tokens: int, loop_guard=True):  # ours, as decoding.System wants it
    def answer(samples, waves):
        chats = [s.messages(False) for s in samples]
        ids = model.chat(chats, waves, max_new_tokens=max_new_tokens, loop_guard=loop_guard)
        rows = [[x for x in row if x != model.config.audio_start_id] for row in ids.tolist()]
        return [(text, len(row), set(row).isdisjoint(model.ends))  # cut, as no end token came?
                for text, row in zip(model.decode(ids), rows, strict=True)]
    return answer

def answer_one(model, cfg) -> None:
    """Print the answer to --prompt about --audio; without a question, its transcript."""
    path, prompt, system = cfg.audio, cfg.prompt, with_context(ASR_SYSTEM, cfg.context)
    with cli.as_user_error(f"{path}: ", ValueError):
        asked = ASR_PROMPT if prompt is None else rows.check_text(prompt, recordings=1)
        wave = rows.load_audio(path)
        print(f"{path}: {len(wave) / SAMPLE_RATE:.2f} s", file=sys.stderr)
        ids = model.generate(wave, asked, system, max_new_tokens=cfg.max_new_tokens,
                             loop_guard=cfg.loop_guard)
    print(pauses.without_thoughts(model.decode(ids[0])))

# ---- Who answers: our checkpoint, or a Whisper
def open_baseline(cfg, ours: str, lang: str | None, device: torch.device) -> System:
    """A Whisper, greedy, in --lang or that of training, by another name than `ours`. UserError."""
    where, language = cfg.baseline, cfg.lang or lang or "ru"
    with cli.as_user_error(f"cannot load --baseline {where}: ", Exception):  # it fails in many ways
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = checkpoint.load_part(WhisperForConditionalGeneration, where, dtype=dtype)
        model = model.to(device).eval()
        processor = WhisperProcessor.from_pretrained(where)
    if f"<|{language}|>" not in getattr(model.generation_config, "lang_to_id", {}):
        raise cli.UserError(f"--baseline {where} knows no {language}: multilingual? or see --lang")
    most = min(cfg.max_new_tokens, model.config.max_target_positions - 4)  # 4: of its prompt
    def answer(samples, waves):
        sounds = [wave.numpy() for wave, in waves]
        mel = processor(sounds, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        ids = model.generate(mel.to(device, model.dtype), max_new_tokens=most, do_sample=False,
                             num_beams=1, language=language, task="transcribe").cpu()
        texts = processor.batch_decode(ids, skip_special_tokens=True)
        lengths = ids.ne(model.config.eos_token_id).sum(1).tolist()  # which is its padding, too
        return [(text, n, n >= most) for text, n in zip(texts, lengths, strict=True)]
    answer = pauses.in_pieces(answer, processor.feature_extractor.n_samples, cfg.batch_size)
    name = Path(where).name + (" (baseline)" if Path(where).name == ours else "")
    return System(name, answer, (digest_model(where), language, cfg.max_new_tokens, device.type))

def open_ours(cfg, name: str, device: torch.device) -> System:  # the checkpoint, or UserError
    if cfg.engine == "vllm":
        from support.engine import Offline
        answer = model = Offline(cfg.ckpt, cfg.max_new_tokens, cfg.encoder, cfg.llm, cfg.loop_guard)
    else:
        model = checkpoint.load_model(cfg.ckpt, device, cfg.encoder, cfg.llm)
        answer = native(model, cfg.max_new_tokens, cfg.loop_guard)
    if cfg.chunk == "vad":
        answer = pauses.in_pieces(answer, model.config.window_samples, cfg.batch_size)
    facts = digest_model(cfg.ckpt), cfg.encoder, cfg.llm, cfg.task, cfg.max_new_tokens, cfg.chunk
    return System(name, answer, (*facts, cfg.engine, device.type, cfg.loop_guard))

def answer_all(cfg, systems: list[System], splits: dict, out: Path) -> dict[str, list]:
    """{split: samples} -> {system: rows}"""
    data = cli.digest([(split, s.name, s.messages(), [stamp(a) for a in s.audio])
                   for split, own in splits.items() for s in own])  # all, so that --reuse may limit
    jobs = [((split, i), s) for split, own in splits.items() for i, s in enumerate(own[:cfg.limit])]
    answers = {}
    for system in systems:
        system.settings = cli.digest(system.facts, data)
        rows_of = system.decode(jobs, out, cfg.batch_size, cfg.reuse)
        answers[system.name] = [rows_of[key] for key, _ in jobs]
    return answers
