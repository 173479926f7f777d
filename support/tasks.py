"""support/tasks.py -- eval.py besides transcripts: questions, BigBenchAudio, SNR, --audio."""
import functools
import math
import re
import sys
from collections import Counter
from dataclasses import replace

from data import HubSamples
from model import ASR_PROMPT, SAMPLE_RATE
from support import pauses, rows
from support.cli import UserError, as_user_error
from support.recipes import BIG_BENCH_AUDIO, TABLES, Source

TASKS = {"asr": ("wer", "cer"), "qa": ("em", "f1"), "bigbench": ("accuracy",)}  # main one first
TITLES = dict(wer="WER", cer="CER", em="exact match", f1="F1", accuracy="accuracy")

@functools.cache  # BigBenchAudio's categories are asked for one by one
def load_split(source: Source, data_dir: str | None, strict: bool, limit: int | None = None):
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

def token_f1(reference: str, hypothesis: str) -> float:
    """Harmonic mean of precision and recall over words, as SQuAD scores answers (1606.05250)."""
    reference, hypothesis = reference.split(), hypothesis.split()
    common = sum((Counter(reference) & Counter(hypothesis)).values())
    if not common:
        return float(reference == hypothesis)
    return 2 * common / (len(reference) + len(hypothesis))

CATEGORIES = TABLES["categories"]  # of BigBenchAudio: how to answer, a pattern of the answers
SAME = {"true": "yes", "correct": "yes", "false": "no", "incorrect": "no"}
OPPOSITE = {"valid": "invalid", "invalid": "valid", "yes": "no", "no": "yes"}
UNITS, TENS = TABLES["numerals"].values()
NUMBERS = dict(zip(f"{UNITS}|{TENS}".split("|"), [*range(20), *range(20, 100, 10)], strict=True))
NUMERAL = re.compile(rf"\b(?:({TENS})[- ])?({UNITS}|{TENS})\b")

def extract_answer(text: str, category: str) -> str:
    """A free answer -> one of its category's, or "": the word it begins with; else the last one
    after "answer is", or anywhere. "not valid" is invalid, "twenty-one" is 21."""
    text = text.lower().replace("’", "'")
    text = NUMERAL.sub(lambda m: str(NUMBERS.get(m[1], 0) + NUMBERS[m[2]]), text)
    text = re.sub(r"(?<=\d)\.0+\b", "", text).lstrip(" \n*\"'")
    options = rf"\b(?:{CATEGORIES[category][1]})\b"
    first = re.match(rf"({options})\s*(?:[.,;:!*\n]|$)", text)
    if first and not first[1].isdigit():  # an answer that counts begins with parts of the sum
        return SAME.get(first[1], first[1])
    for part in (re.split(r"answer(?: is)?\b:?", text)[-1], text):
        if found := list(re.finditer(options, part)):
            option = SAME.get(found[-1][0], found[-1][0])
            before = part[:found[-1].start()].split()[-3:]  # as in "is not deductively valid"
            negated = any(word == "not" or word.endswith("n't") for word in before)
            return OPPOSITE.get(option, option) if negated else option
    return ""

def load_bigbench(category: str, data_dir: str | None, strict: bool) -> list:
    """The samples of one of BigBenchAudio's categories, each with its instruction."""
    samples = load_split(BIG_BENCH_AUDIO, data_dir, strict)
    for unknown in {s.question for s in samples} - set(CATEGORIES):  # that column, see recipes.py
        raise UserError(f"{unknown!r} is none of the categories {', '.join(CATEGORIES)}")
    own, question = CATEGORIES[category][0], "Listen carefully and answer the question."
    return [replace(s, system=own, question=question) for s in samples if s.question == category]

def answer_one(model, path: str, prompt: str | None, max_new_tokens: int) -> None:
    """Print the answer to a question about one file; without a question, its transcript."""
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt is empty: ask something, or leave it out to transcribe")
    with as_user_error(f"{path}: ", ValueError):
        wave = rows.load_audio(path)
        windows = -(-len(wave) // model.config.window_samples)
        print(f"{path}: {len(wave) / SAMPLE_RATE:.2f} s, {windows} window(s), "
              f"{windows * model.config.tokens_per_window} audio tokens", file=sys.stderr)
        ids = model.generate(wave, prompt or ASR_PROMPT, max_new_tokens=max_new_tokens)
    print(pauses.without_thoughts(model.decode(ids[0])))

def estimate_snr(wave) -> float:
    """(samples,) at 16 kHz -> speech power over noise power in dB, within -10 to 60. Noise: the 5th
    percentile of 20 ms frames, digital silence aside. Without a pause, speech passes for noise."""
    frame = SAMPLE_RATE // 50
    power = wave.unfold(0, min(frame, len(wave)), frame).square().mean(1)
    power = power[power > 1e-10]
    if not len(power):
        return -10.0
    noise = power.quantile(0.05).item()
    snr = 10 * math.log10(max(power.mean().item() - noise, 1e-12) / max(noise, 1e-12))
    return min(60.0, max(-10.0, snr))
