"""
eval.py -- measure a checkpoint: decode greedily, compare with what was said, and say how sure the figures are.

    python eval.py --ckpt out/                        # the post's six benchmarks; for a tiny checkpoint, its own six
    torchrun --nproc_per_node=8 eval.py --ckpt out/ --baseline openai/whisper-large-v3    # eight GPUs, beside Whisper
    python eval.py --ckpt out/ --manifest my.jsonl    # your own recordings (data.py describes the format); --task qa: answers
    python eval.py --ckpt out/ --audio a.wav --prompt "О чём говорится в этом аудио?"     # one answer, no score
    python eval.py --compare out_a/ out_b/ --out out  # several runs as one table and one heat map; which differences are real?

Writes into the checkpoint's folder, or --out: results.json, report.md (tables, diagnosis, the worst utterances),
hypotheses.jsonl (every answer as it came) and wer.png. Interrupted, the same command goes on where it stopped.

Letters in shape comments: n utterances of a split, R draws of the bootstrap.
"""
import contextlib
import functools
import hashlib
import json
import os
import re
import string
import sys
import time
import unicodedata
import zlib
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from itertools import combinations
from pathlib import Path

import jiwer
import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

from augment import HARD, augment, estimate_snr, open_banks
from data import BENCHMARK, BIG_BENCH_AUDIO, EVAL_SPLITS, EVAL_UTTERANCES, ArgumentParser, BadRow, BadRows, Rows, Sample, \
    UserError, check_out, embedded, load_audio, pick_device, picture, read_manifest, replace_file, run
from model import ASR_PROMPT, ENCODER, LLM, SAMPLE_RATE, cut_at_pauses, find_checkpoint, fingerprint, load_checkpoint, part_of, \
    place_audio

# -----------------------------------------------------------------------------
# What is compared: text, normalised

UNSAID = "\u0301'’ʼ`"  # the accent of за́мок, a reading aid; apostrophes


def normalise(text):
    """What WER compares: NFC, lower case, ё -> е, punctuation and symbols -> space, apostrophes and what nobody sees out.

    й stays й, decomposed or not (NFC joins it before anything is removed). A space, so that кто-то and "кто то", т.е. and
    "т. е." score alike, as two words; the post's normaliser glues them into one. Digits stay digits."""
    text = unicodedata.normalize("NFC", text).lower().replace("ё", "е")
    kept = []
    for c in text:
        kind = unicodedata.category(c)  # Cf: soft hyphens, zero-width spaces
        kept.append("" if c in UNSAID or kind == "Cf" else " " if kind[0] in "PS" else c)
    return " ".join("".join(kept).split())


def normalise_as_the_post(text):
    """The original's: lower case, and the 32 ASCII marks deleted. So кто-то becomes ктото, « » — … stay, and ё is not е."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


NORMALIZERS = {"default": normalise, "post": normalise_as_the_post}


def normalised(rows, normalizer):
    """Rows of hypotheses.jsonl, with what is compared."""
    clean = NORMALIZERS[normalizer]
    return [r | dict(reference_normalised=clean(r["reference"]), hypothesis_normalised=clean(r["hypothesis"])) for r in rows]


def said_and_heard(rows):
    return [r["reference_normalised"] for r in rows], [r["hypothesis_normalised"] for r in rows]


# -----------------------------------------------------------------------------
# Figures, and how sure they are

TASKS = {"asr": ("wer", "cer"), "qa": ("em", "f1"), "bigbench": ("accuracy",)}  # the first is the one that counts
TITLES = dict(wer="WER", cer="CER", em="exact match", f1="F1", accuracy="accuracy")
DRAWS = 2000


def edits(references, hypotheses, process=jiwer.process_words):
    """Normalised texts -> (n, 4): substitutions, deletions, insertions, and words of the reference, of each utterance."""
    output, rows = process(references, hypotheses), []
    for chunks, reference in zip(output.alignments, output.references):
        counts = Counter()
        for c in chunks:
            counts[c.type] += max(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx)
        rows.append([counts["substitute"], counts["delete"], counts["insert"], len(reference)])
    return np.array(rows)


def measure(task, rows):
    """Normalised rows of a split -> {metric: (n, k) counts of each utterance}; see figure()."""
    said, heard = said_and_heard(rows)
    if task == "asr":
        return dict(wer=edits(said, heard), cer=edits(said, heard, jiwer.process_characters))
    if task == "qa":
        values = dict(em=[s == h for s, h in zip(said, heard)], f1=[token_f1(s, h) for s, h in zip(said, heard)])
    else:
        values = dict(accuracy=[r["reference"].lower() == chosen(r["hypothesis"], r["split"]) for r in rows])
    return {metric: np.stack([x, np.ones(len(rows))], axis=1) for metric, x in values.items()}


def token_f1(reference, hypothesis):
    """Harmonic mean of precision and recall over the words both texts share, as SQuAD scores answers (arXiv:1606.05250)."""
    reference, hypothesis = reference.split(), hypothesis.split()
    shared = sum((Counter(reference) & Counter(hypothesis)).values())
    return 2 * shared / (len(reference) + len(hypothesis)) if shared else float(reference == hypothesis)


def figure(counts):
    """(..., n, k) counts -> (...) percent: all that is in the first columns over all that is in the last. So WER is over the
    corpus: all edits over all words of the references."""
    total = counts.sum(-2)
    return np.where(total[..., -1] > 0, 100 * total[..., :-1].sum(-1) / np.maximum(total[..., -1], 1), np.nan)  # nan: nobody spoke


def bootstrap(counts, seed=0):
    """(n, k) -> (R,): the figure of R sets of n utterances drawn from these with replacement (Bisani and Ney 2004). The same
    seed draws the same utterances, so that two systems are compared on equal terms, however hard a draw is."""
    rng, n = np.random.default_rng(seed), len(counts)
    return np.concatenate([figure(counts[rng.integers(n, size=(100, n))]) for _ in range(DRAWS // 100)])  # 100: of memory


def interval(draws):
    """(R,) -> [low, high], 95 %."""
    return [rounded(x) for x in (np.nanpercentile(draws, [2.5, 97.5]) if np.isfinite(draws).any() else (np.nan, np.nan))]


def rounded(x):
    """To two digits; None for what is not defined."""
    return None if np.isnan(x) else round(float(x), 2)


def average(figures):
    """(splits, ...) -> (...): the plain mean, as in the post, over the splits in which somebody speaks."""
    figures = np.array(figures, float)
    return np.nansum(figures, 0) / np.where((n := np.isfinite(figures).sum(0)) > 0, n, np.nan)


def p_value(differences):
    """(R,) paired differences -> two-sided p: how often the draws disagree about which of the two is better."""
    differences = differences[np.isfinite(differences)]
    either = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (either + 1) / (len(differences) + 1)))


# -----------------------------------------------------------------------------
# Diagnosis: what kind of errors make up a figure

def longest_loop(words):
    """How many words the longest stretch has that says one phrase three times in a row or more, four words at least:
    "на на на на столе" -> 4. 0 if there is none. A phrase has 30 words at most; letters of a word will do as well."""
    longest = 0
    for size in range(1, min(30, len(words) // 3) + 1):
        same = 0  # words in a row that equal the one a phrase earlier
        for i in range(size, len(words)):
            same = same + 1 if words[i] == words[i - size] else 0
            stretch = (same // size + 1) * size
            if stretch >= max(4, 3 * size):
                longest = max(longest, stretch)
    return longest


def diagnose(rows):
    """Normalised rows of a split -> in how many utterances what went wrong."""
    kinds = Counter(dict.fromkeys(("stopped_early", "loops", "cut", "silence", "text_on_silence"), 0))
    for r, said, heard in zip(rows, *said_and_heard(rows)):
        said, heard = said.split(), heard.split()
        kinds["stopped_early"] += len(said) > 1.5 * len(heard)
        kinds["loops"] += any(longest_loop(h) > longest_loop(s) for h, s in ((heard, said), (max(heard, key=len, default=""),
                                                                                              max(said, key=len, default=""))))
        kinds["cut"] += r["cut"]
        kinds["silence"] += not said
        kinds["text_on_silence"] += bool(heard) and not said
    return dict(kinds)


def worst(rows, task, n=10):
    """The utterances with the most errors, as text: reference above hypothesis, word by word."""
    counts = list(measure(task, rows).values())
    errors = counts[0][:, :3].sum(1) if task == "asr" else 1 - counts[-1][:, 0]
    blocks = []
    for i in np.argsort(-errors, kind="stable")[:n]:
        said, heard = rows[i]["reference_normalised"], rows[i]["hypothesis_normalised"]
        if errors[i] and task == "asr":
            aligned = jiwer.visualize_alignment(jiwer.process_words(said, heard), show_measures=False, line_width=110)
            blocks.append(f"{rows[i]['id']}: {errors[i]} errors\n" + aligned.split("===\n", 1)[1].strip("\n"))
        elif errors[i]:
            blocks.append(f"{rows[i]['id']}\nREF: {rows[i]['reference']}\nHYP: {rows[i]['hypothesis']}")
    return "\n\n".join(blocks)


# -----------------------------------------------------------------------------
# What is decoded: samples by split

YES_NO = "yes|no|true|false|correct|incorrect"
RIDDLES = {  # how a category of BigBenchAudio wants to be answered, and the answers there are
    "formal_fallacies": ("Is the argument deductively valid? Answer with one word: valid or invalid.", "valid|invalid"),
    "navigate": ("Does the walk end where it began? Answer with one word: yes or no.", YES_NO),
    "object_counting": ("Count what is asked for. Answer with the number alone.", r"\d+"),
    "web_of_lies": ("Does the last person tell the truth? Answer with one word: yes or no.", YES_NO)}
SAME = {"true": "yes", "correct": "yes", "false": "no", "incorrect": "no"}
OPPOSITE = {"valid": "invalid", "invalid": "valid", "yes": "no", "no": "yes"}
NUMBERS = {word: n for n, word in enumerate((
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen").split())} | {
        word: n for n, word in zip(range(20, 100, 10), "twenty thirty forty fifty sixty seventy eighty ninety".split())}


def chosen(text, category):
    """What an answer comes down to, "" if to nothing: the option it begins with; else the last one behind "answer is", or
    anywhere. "not valid" is invalid, "twenty-one" 21."""
    text, words = text.lower().replace("’", "'"), "|".join(NUMBERS)
    for numeral in (rf"\b(\w+ty)[- ]({words})\b", rf"\b({words})()\b"):
        text = re.sub(numeral, lambda m: str(NUMBERS.get(m[1], 0) + NUMBERS.get(m[2], 0)), text)
    text = re.sub(r"(?<=\d)\.0+\b", "", text).lstrip(" \n*\"'")
    options = rf"\b(?:{RIDDLES[category][1]})\b"
    first = re.match(rf"({options})\s*(?:[.,;:!*\n]|$)", text)
    if first and not first[1].isdigit():  # who counts begins with parts of the sum
        return SAME.get(first[1], first[1])
    for part in (re.split(r"answer(?: is)?\b:?", text)[-1], text):
        if found := [*re.finditer(options, part)]:
            option = SAME.get(found[-1][0], found[-1][0])
            before = part[:found[-1].start()].split()[-3:]  # "is not deductively valid"
            return OPPOSITE.get(option, option) if any(w == "not" or w.endswith("n't") for w in before) else option
    return ""


def training_config(where):
    try:
        path = find_checkpoint(where) / "train_config.json"
    except ValueError as e:
        raise UserError(str(e)) from None
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        raise UserError(f"{path} is broken: bring it back, or remove it and name what to evaluate with --manifest") from None


def embedded_splits(lang, seed, n=EVAL_UTTERANCES, names=(*EVAL_SPLITS, *HARD)):
    """The post's ladder of difficulty, made here -> {split: n samples}. Voices and sentences were never trained on; webinars
    and devices are the clean split again, with noises and rooms never trained on."""
    splits = {name: embedded(lang, name, n, seed) for name in EVAL_SPLITS if name in names}
    banks = open_banks(voices="clean") if set(HARD) & set(names) else None
    for k, (name, config) in enumerate(HARD.items()):
        if name not in names:
            continue
        splits[name] = []
        for i, s in enumerate(splits.get("clean") or embedded(lang, "clean", n, seed)):
            x = augment(load_audio(s.audio[0]).numpy(), config, np.random.default_rng([seed % 2 ** 32, k, i]), *banks)
            splits[name].append(replace(s, audio=[(x * 32767).round().astype(np.int16)], name=f"{s.name}/{name}"))
    return splits


def from_hub(source, args):
    """The samples of one dataset, from the hub or --data_dir. What has no reference is left out, and counted."""
    limit = None if source is BIG_BENCH_AUDIO or args.data_dir else args.limit or source.rows  # so many are streamed
    rows, bad, samples = Rows(source, args.data_dir, limit), BadRows(args.strict), []
    for i in range(len(rows)):
        try:
            samples.append(rows[i])
        except BadRow as e:
            bad.add(str(e), e.where)
    bad.report(len(rows), source.split)
    return samples


def riddles(args):
    """BigBenchAudio by category."""
    splits = {category: [] for category in RIDDLES}
    for s in from_hub(BIG_BENCH_AUDIO, args):
        if s.question not in RIDDLES:  # the category came in place of a question
            raise UserError(f"{BIG_BENCH_AUDIO.hub} has the category {s.question!r}: known are {', '.join(RIDDLES)}")
        splits[s.question].append(replace(s, question="Listen carefully and answer the question.",
                                          system=RIDDLES[s.question][0]))
    return splits


def load_splits(args, trained_on):
    """-> {split: samples}: the manifest that was given; or the post's six benchmarks; or the embedded held-out sets of the
    training languages."""
    if args.manifest:
        bad = BadRows(args.strict)
        samples, total = read_manifest(args.manifest, bad, evaluation=True)
        bad.report(total, args.manifest)
        return {Path(args.manifest).stem: samples}
    if args.task == "bigbench":
        names = wanted(args, list(RIDDLES))
        return {category: samples for category, samples in riddles(args).items() if category in names}
    if args.data_dir or not (trained_on.get("embedded") or trained_on.get("train_manifest")) or (
            args.split and set(args.split) <= set(BENCHMARK)):
        return {name: from_hub(BENCHMARK[name], args) for name in wanted(args, list(BENCHMARK))}
    if trained_on.get("train_manifest"):
        raise UserError(f"{args.ckpt} was trained on a manifest: name your recordings with --manifest FILE")
    first, *others = (args.lang or trained_on["lang"]).split(",")
    makeable = [*EVAL_SPLITS, *HARD] + [f"{name}_{lang}" for lang in others for name in (*EVAL_SPLITS, *HARD)]
    names, n = wanted(args, makeable), min(args.limit or EVAL_UTTERANCES, EVAL_UTTERANCES)  # the rest need not be made
    splits = embedded_splits(first, trained_on["seed"], n, names)
    for lang in others:
        ours = [name.removesuffix(f"_{lang}") for name in names if name.endswith(f"_{lang}")]
        splits |= {f"{name}_{lang}": s for name, s in embedded_splits(lang, trained_on["seed"], n, ours).items()}
    return splits


def wanted(args, names):
    """--split among what there is; raises UserError."""
    if missing := [name for name in args.split or () if name not in names]:
        raise UserError(f"--split {missing[0]}: choose from {', '.join(names)}")
    return [name for name in names if not args.split or name in args.split]


# -----------------------------------------------------------------------------
# Who answers. A system is a function: (samples, their waves) -> [(text, tokens generated, cut by the limit?)]

THINK = re.compile(r"<think>.*?(</think>|$)", re.DOTALL)  # other people's checkpoints may think aloud


def without_thoughts(text):
    return THINK.sub("", text).strip()


def load_model(folder, device, encoder=ENCODER, llm=LLM):
    """Any checkpoint, ready to answer; a UserError says what is missing or does not fit."""
    try:
        return load_checkpoint(folder, encoder, llm, torch.bfloat16 if device.type == "cuda" else torch.float32).to(device)
    except (OSError, ValueError, AttributeError, TypeError, RuntimeError, SafetensorError) as e:
        raise UserError(f"cannot load {folder}: {str(e).strip().splitlines()[0]}") from None


def until_end(ids, ends):
    """One answer's ids, padded -> (tokens, its end included; was there none?)."""
    stops = torch.isin(ids, ends).nonzero()
    return (int(stops[0]) + 1, False) if len(stops) else (len(ids), True)


def in_pieces(answer, longest, batch_size):
    """A system that hears long recordings piece by piece, cut at pauses, and joins the texts."""
    def pieces_of(waves):
        if len(waves) != 1:
            raise BadRow(f"a transcript is of one recording, not of {len(waves)}")
        return cut_at_pauses(waves[0], longest)

    def joined(samples, waves):
        jobs = [(i, piece) for i, w in enumerate(waves) for piece in pieces_of(w)]
        parts = [[] for _ in samples]
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start:start + batch_size]
            for (i, _), part in zip(batch, answer([samples[i] for i, _ in batch], [[piece] for _, piece in batch])):
                parts[i].append(part)
        return [(" ".join(filter(None, map(without_thoughts, texts))), sum(tokens), any(cut))
                for texts, tokens, cut in (zip(*p) for p in parts)]
    return joined


def native(model, args):
    """Our model."""
    ends = torch.tensor(model.ends)

    def answer(samples, waves):
        ids = model.chat([s.messages(with_answer=False) for s in samples], waves, max_new_tokens=args.max_new_tokens).cpu()
        return [(text, *until_end(row, ends)) for text, row in zip(model.decode(ids), ids)]
    return answer if args.chunk == "window" else in_pieces(answer, model.config.window_samples, args.batch_size)


def vllm_engine(args):
    """Our model in vLLM, in this process; the same tokens in float32, sooner."""
    try:
        from serve_vllm import offline
    except ImportError as e:
        raise UserError(f"--engine vllm needs vLLM ({e}): pip install vllm==0.32.0, without a GPU make vllm") from None
    try:
        answer, config = offline(args.ckpt, args.max_new_tokens, args.encoder, args.llm)
    except (ValueError, OSError, RuntimeError) as e:
        raise UserError(f"cannot load {args.ckpt} into vLLM: {(str(e).strip() or type(e).__name__).splitlines()[0]}") from None
    return answer if args.chunk == "window" else in_pieces(answer, config.window_samples, args.batch_size)


def whisper(where, args, device, language):
    """The baseline: Whisper with its own decoder, by transformers, greedy, its language forced."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor
    try:
        model = part_of(WhisperForConditionalGeneration, where, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
        processor = WhisperProcessor.from_pretrained(where)
    except (OSError, ValueError, AttributeError, TypeError, RuntimeError) as e:
        raise UserError(f"cannot load --baseline {where}: {str(e).strip().splitlines()[0]}") from None
    settings, vocabulary, language = model.generation_config, processor.tokenizer.get_vocab(), f"<|{language}|>"
    if language not in vocabulary or getattr(settings, "is_multilingual", None) is False:
        raise UserError(f"--baseline {where} does not know {language}: name a multilingual Whisper")
    for name, value in dict(is_multilingual=True, lang_to_id={language: vocabulary[language]},  # which old files lack
                            task_to_id={"transcribe": vocabulary.get("<|transcribe|>")},
                            no_timestamps_token_id=vocabulary.get("<|notimestamps|>")).items():
        if getattr(settings, name, None) is None:
            setattr(settings, name, value)
    model.to(device).eval()
    ends = torch.tensor([i for i in (model.config.eos_token_id, settings.eos_token_id, settings.pad_token_id) if isinstance(i, int)])
    most = min(args.max_new_tokens, model.config.max_target_positions - 4)  # four go to start, language, task, no timestamps

    def answer(samples, waves):
        mel = processor.feature_extractor([w.numpy() for w, in waves], sampling_rate=SAMPLE_RATE, return_tensors="pt")
        ids = model.generate(mel.input_features.to(device, model.dtype), language=language, task="transcribe",
                             max_new_tokens=most, do_sample=False, num_beams=1).cpu()
        texts, lengths = processor.batch_decode(ids, skip_special_tokens=True), [until_end(row, ends) for row in ids]
        return [(text.strip(), n, endless and n >= most) for text, (n, endless) in zip(texts, lengths)]
    return in_pieces(answer, processor.feature_extractor.n_samples, args.batch_size)


def answer_one(model, path, prompt, max_new_tokens):
    """The answer to a prompt about one file."""
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt is empty: ask something, or leave it out to transcribe")
    try:
        wave = load_audio(path)
        question = place_audio(prompt or ASR_PROMPT, 1)
    except BadRow as e:
        raise UserError(f"{path}: {e}; give a wav, flac, ogg or mp3 file with sound in it") from None
    except ValueError as e:
        raise UserError(str(e)) from None
    windows = -(-len(wave) // model.config.window_samples)
    print(f"{path}: {len(wave) / SAMPLE_RATE:.2f} s, {windows} window(s), "
          f"{windows * model.config.tokens_per_window} audio tokens", file=sys.stderr)
    messages = Sample("", [path], question).messages(with_answer=False)
    print(without_thoughts(model.decode(model.chat([messages], [[wave]], max_new_tokens=max_new_tokens)[0])))


# -----------------------------------------------------------------------------
# Decoding. Blocks of a few batches are dealt out over the ranks; how a batch is made up depends on neither the number of
# ranks nor on where an earlier attempt stopped. Every answer is on disk as soon as it is there.

BLOCK = 4  # batches


class Answers(dict):
    """{key: row of hypotheses.jsonl}: what has been answered so far, by any rank. Kept in part files until finish()."""

    def __init__(self, folder, rank=0, world=1, also=()):
        self.folder, self.rank, self.world, self.finished = folder, rank, world, set()
        for path in [*also, *self.parts()]:
            for line in path.read_bytes().split(b"\n") if path.is_file() else ():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a kill may have cut it; another program may have made it
                    row = json.loads(line)
                    if not row["failed"]:  # what failed is tried again
                        self[row["key"]] = {k: row[k] for k in ROW}
            if path in also:
                self.finished = set(self)
        self.meet()  # nobody writes before all have read
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / f"hypotheses.{rank}.part.jsonl", "a", buffering=1)

    def parts(self):
        return sorted(self.folder.glob("hypotheses.*.part.jsonl"))

    def meet(self):
        if self.world > 1:
            dist.barrier()

    def add(self, row):
        self[row["key"]] = row
        self.file.write("\n" + line_of(row))  # on a line of its own, whatever a kill has left

    def share(self):
        """Let every rank know what all have."""
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, dict(self))
            for answers in everyone:
                self.update(answers)

    def finish(self, used):
        """The results are written: forget the answers in them, but keep those of another, unfinished evaluation."""
        self.file.close()
        self.meet()
        if self.rank == 0:
            for path in self.parts():
                path.unlink()
            if left := [row for key, row in self.items() if key not in used | self.finished and not row["failed"]]:
                replace_file(self.folder / "hypotheses.0.part.jsonl", lambda tmp: Path(tmp).write_text("".join(map(line_of, left))))


ROW = ("key", "split", "id", "reference", "hypothesis", "failed", "seconds", "took", "tokens", "cut", "snr")


def line_of(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


def identity(where):
    """What a local model is, by its files; a model on the hub by its name."""
    if not Path(where).exists():
        return str(where)
    folder = find_checkpoint(where)
    return fingerprint(folder), [zlib.crc32(p.read_bytes()) for p in (
        folder / name for name in ("config.json", "generation_config.json", "tokenizer.json")) if p.is_file()]


def key_of(system, split, sample):
    """What an answer depends on: the system with its settings, the question, and the recordings."""
    def what(audio):
        if isinstance(audio, str):
            facts = os.stat(audio) if os.path.isfile(audio) else None
            return (audio, facts.st_size, facts.st_mtime_ns) if facts else audio
        return len(audio), zlib.crc32(audio)
    facts = [system, split, sample.name, sample.messages(), list(map(what, sample.audio))]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def decode(answer, todo, answers, batch_size, label):
    """Answer what is not in `answers` yet. todo: list of (key, split, sample).

    An utterance that cannot be decoded, or whose generation raises, counts as an empty hypothesis: it stays in the
    score, and it is named. A batch that raises is tried again one by one, so that one bad row harms no other."""
    size = BLOCK * batch_size
    mine = [todo[i:i + size] for i in range(0, len(todo), size)][answers.rank::answers.world]
    with tqdm(total=sum(map(len, mine)), desc=label, unit=" utterances", disable=answers.rank > 0,
              mininterval=0.1 if sys.stderr.isatty() else 10) as bar:
        for block in mine:
            if any(key not in answers for key, *_ in block):
                queue = hear(block, answers)
                for start in range(0, len(queue), batch_size):
                    if any(row["key"] not in answers for row, *_ in queue[start:start + batch_size]):
                        for row in decode_batch(answer, queue[start:start + batch_size]):
                            answers.add(row)
            bar.update(len(block))
    answers.share()


def hear(block, answers):
    """Read the recordings of a block -> [(row, sample, waves)], longest first: memory shows early."""
    queue = []
    for key, split, sample in block:
        row = dict(zip(ROW, (key, split, sample.name, sample.answer, "", None, 0.0, 0.0, 0, False, None)))
        try:
            waves = [load_audio(a, silence=not normalise(sample.answer)) for a in sample.audio]
        except BadRow as e:
            answers.add(row | dict(failed=str(e)))
        else:
            row["seconds"] = round(sum(map(len, waves)) / SAMPLE_RATE, 3)
            row["snr"] = round(min(map(estimate_snr, waves)), 1) if waves else None
            queue.append((row, sample, waves))
    return sorted(queue, key=lambda item: -item[0]["seconds"])


def decode_batch(answer, batch):
    """-> the rows, filled in."""
    rows, samples, waves = zip(*batch)
    began = time.perf_counter()
    try:
        heard = answer(samples, waves)
    except Exception:
        heard = []
        for sample, wave in zip(samples, waves):
            try:
                heard += answer([sample], [wave])
            except Exception as e:
                heard.append(e)
    took = round((time.perf_counter() - began) / len(rows), 5)
    for row, x in zip(rows, heard):
        if isinstance(x, Exception):
            reason = str(x) if isinstance(x, BadRow) else f"{type(x).__name__}: {x}"
            yield row | dict(took=took, failed=reason.splitlines()[0])
        else:
            text, tokens, cut = x
            yield row | dict(hypothesis=without_thoughts(text), tokens=tokens, cut=cut, took=took)


# -----------------------------------------------------------------------------
# Report

def assess(rows, task):
    """{split: normalised rows} of one system -> what results.json says about it."""
    splits, figures, draws = {}, [], []
    for seed, (split, own) in enumerate(rows.items()):
        counts, result = measure(task, own), {}
        for metric, x in counts.items():
            drawn = bootstrap(x, seed)
            result |= {metric: rounded(figure(x)), f"{metric}_ci": interval(drawn)}
            if metric == TASKS[task][0]:
                figures.append(figure(x)), draws.append(drawn)
        if task == "asr":
            result |= dict(zip(("sub", "del", "ins", "words"), counts["wer"].sum(0).tolist())) | diagnose(own)
        seconds, took = sum(r["seconds"] for r in own), sum(r["took"] for r in own)
        splits[split] = result | dict(
            samples=len(own), failed=sum(bool(r["failed"]) for r in own), seconds=round(seconds, 1),
            rtf=round(took / seconds, 5) if seconds else None, tokens_per_s=round(sum(r["tokens"] for r in own) / max(took, 1e-9), 1))
    metric = TASKS[task][0]
    return dict(splits=splits) | {f"avg_{metric}": rounded(average(figures)), f"avg_{metric}_ci": interval(average(draws))}


def markdown(header, rows):
    """A table; the first column reads from the left, figures from the right."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (
        header, ["---"] + ["--:"] * (len(header) - 1), *rows)).replace("| --- |", "|---|").replace(" --: |", "--:|")


def certain(result, metric):
    value, (low, high) = result[metric], result[f"{metric}_ci"]
    return "-" if value is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def results_table(result, task):
    """A system's figures by split, and for transcripts what kind of errors they are made of."""
    asr = task == "asr"
    names = ["sub", "del", "ins", "words"] * asr + ["samples", "failed"]
    tables = [markdown(
        ["split", *(f"{TITLES[m]} % [95 %]" for m in TASKS[task]), *names, "RTF", "tokens/s"],
        [[split, *(certain(r, m) for m in TASKS[task]), *(r[n] for n in names), f"{r['rtf']:.4f}" if r["rtf"] else "-", f"{r['tokens_per_s']:.0f}"]
         for split, r in result["splits"].items()])]
    if asr:
        def share(r, name):
            return f"{100 * r[name] / r['samples']:.1f}"
        tables.append(markdown(
            ["split", "deletions %", "insertions %", "stopped early %", "loops %", "cut by the limit %", "text on silence"],
            [[split, *(f"{100 * r[n] / max(1, r['words']):.1f}" for n in ("del", "ins")),
              *(share(r, n) for n in ("stopped_early", "loops", "cut")),
              f"{r['text_on_silence']} of {r['silence']}" if r["silence"] else "-"] for split, r in result["splits"].items()]))
    return "\n\n".join(tables)


def overview(systems, task):
    """{name: assessed} -> one line a system, in the shape of the post's table."""
    metric = TASKS[task][0]
    columns = list(next(iter(systems.values()))["splits"])
    return markdown([f"{TITLES[metric]} %", *columns, "average [95 %]"], [
        [name, *(plain(r["splits"][c][metric]) for c in columns), certain(r, f"avg_{metric}")] for name, r in systems.items()])


def plain(value):
    return "-" if value is None or np.isnan(value) else f"{value:.2f}"


def transcripts(rows, n=6):
    """A few lines to read: the first utterances, and the first wrong ones."""
    right, wrong = ([r for r in rows if (r["reference_normalised"] == r["hypothesis_normalised"]) == same] for same in (True, False))
    shown = right[:n - min(n // 2, len(wrong))] + wrong[:n // 2]
    return "\n".join(f"  {'✗' if r in wrong[:n] else '✓'} {r['id']}\n      said   {r['reference']}\n"
                     f"      heard  {r['hypothesis'] or '(nothing)'}" for r in shown)


def plot_figures(systems, task, path):
    """Bars by split, one a system, with their intervals."""
    metric = TASKS[task][0]
    columns, width = list(next(iter(systems.values()))["splits"]), 0.7 / len(systems)
    with picture(path, figsize=(max(4, (1 + 0.5 * len(systems)) * len(columns)), 4.5)) as (_, axis):
        for k, (name, result) in enumerate(systems.items()):
            values = np.array([r[metric] for r in result["splits"].values()], float)
            low, high = np.array([r[f"{metric}_ci"] for r in result["splits"].values()], float).T
            bars = axis.bar(np.arange(len(columns)) + (k - (len(systems) - 1) / 2) * width, values, 0.9 * width, label=name,
                            yerr=np.clip([values - low, high - values], 0, None), capsize=3, ecolor="#555555",
                            color=("#1f4e9c", "#e08a1e", "#4f9c5a")[k % 3])
            axis.bar_label(bars, [plain(v) for v in values], padding=3, fontsize=8)
        axis.set(ylabel=f"{TITLES[metric]}, % (bars: 95 % intervals)", xlim=(-0.6, len(columns) - 0.4))
        axis.set_xticks(range(len(columns)), [c.replace("_", "\n") for c in columns])
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)


def write_results(out, rows, args, step):
    """{system: {split: rows}}, ours first -> results.json, hypotheses.jsonl, report.md and a picture; prints the short version."""
    task, name = args.task, next(iter(rows))
    clean = {n: {split: normalised(own, args.normalizer) for split, own in splits.items()} for n, splits in rows.items()}
    systems = {n: assess(splits, task) for n, splits in clean.items()}
    flat = [(n, split, r) for n, splits in clean.items() for split, own in splits.items() for r in own]
    replace_file(out / "hypotheses.jsonl", lambda tmp: Path(tmp).write_text("".join(line_of(dict(run=n) | r) for n, _, r in flat)))
    replace_file(out / "results.json", lambda tmp: Path(tmp).write_text(json.dumps(
        dict(run=name, step=step, task=task, normalizer=args.normalizer, settings={k: str(v) for k, v in vars(args).items() if v},
             **systems[name],
             others={n: r for n, r in systems.items() if n != name}), indent=1, ensure_ascii=False)))
    plot_figures(systems, task, out / "wer.png" if task == "asr" else out / f"{task}.png")

    tables = [("" if len(systems) == 1 else f"{n}\n\n") + results_table(r, task) for n, r in systems.items()]
    if task == "asr" and args.normalizer != "default":  # beside the default one
        systems |= {f"{n}, default normaliser": assess({s: normalised(r, "default") for s, r in splits.items()}, task)
                    for n, splits in rows.items()}
    if len(systems) > 1 or len(rows[name]) > 1:
        tables.append(overview(systems, task))
    report = [f"# {name}", f"Greedy, at most {args.max_new_tokens} tokens, normaliser: {args.normalizer}. Intervals: 95 %, bootstrap "
              "over utterances. RTF: seconds of computing for a second of audio, of one process.", *tables]
    if failed := [f"- {r['id']} ({n}, {split}): {r['failed']}" for n, split, r in flat if r["failed"]]:
        report += ["## Failed, counted as empty", "\n".join(failed)]
    report += [f"## The worst of {n}, {split}\n\n```\n{text}\n```" for n, splits in clean.items() for split, own in splits.items()
               if (text := worst(own, task))]
    replace_file(out / "report.md", lambda tmp: Path(tmp).write_text("\n\n".join(report) + "\n"))
    print("\n" + "\n\n".join(tables) + f"\n\n{transcripts([r for n, _, r in flat if n == name])}\n\nwrote results.json, report.md "
          f"(the worst utterances are there), hypotheses.jsonl and a picture to {out}")


# -----------------------------------------------------------------------------
# Several runs in one table

PUBLISHED = {  # the post's tables, WER % on RuASRBenchmark: steps, six splits, average
    "Whisper-v3": (None, (11.68, 12.23, 7.77, 11.95, 2.68, 19.87), 11.03),
    "ru_text_10pct": (1624, (6.42, 15.79, 60.69, 11.36, 1.99, 18.75), 19.17),
    "ru_only": (1000, (6.54, 13.64, 61.32, 10.06, 1.94, 22.43), 19.32),
    "en_only": (1172, (6.89, 27.92, 59.76, 8.56, 2.09, 20.03), 20.88),
    "mixed_large": (1000, (6.65, 26.69, 62.09, 11.69, 1.75, 23.82), 22.11),
    "ru_text_25pct": (1000, (6.35, 35.02, None, None, None, None), 24.02),  # the other four were not published
    "IT_fresh (no pretrain)": (2400, (14.85, 181.09, 100.67, 44.83, 24.83, 42.81), 68.18)}  # seems another run's row


def read_run(folder):
    """-> {name: (step, task, {split: rows})} of every system that was evaluated into a folder. Raises UserError."""
    folder, runs = Path(folder), {}
    try:
        result = json.loads((folder / "results.json").read_text())
        for line in (folder / "hypotheses.jsonl").read_text().strip().split("\n"):
            r = json.loads(line)
            main = r.get("run", result["run"]) == result["run"]
            name = folder.resolve().name.removeprefix("out_") if main else r["run"]
            run_ = runs.setdefault(name, (result["step"] if main else None, result.get("task", "asr"), {}))
            run_[2].setdefault(r["split"], []).append({k: r[k] for k in ("split", "id", "reference", "hypothesis")})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        runs = {}
    if not runs:
        raise UserError(f"no results of eval.py in {folder}: run python eval.py --ckpt {folder}")
    return runs


def read_runs(folders):
    """Several folders -> as read_run. Raises UserError if they were not evaluated on the same utterances."""
    def texts(run_, *kinds):
        return run_[1], {split: [[r[k] for k in kinds] for r in rows] for split, rows in run_[2].items()}
    runs = {}
    for folder in folders:
        for name, run_ in read_run(folder).items():
            if name in runs and texts(runs[name], "id", "hypothesis") != texts(run_, "id", "hypothesis"):
                name = f"{folder}/{name}"  # but a baseline that several folders hold is shown once
            runs[name] = run_
    first = next(iter(runs))
    if other := [name for name in runs if texts(runs[name], "id", "reference") != texts(runs[first], "id", "reference")]:
        raise UserError(f"{other[0]} was evaluated on other utterances or another --task than {first}: only results on the same "
                        "ones compare")
    return runs


def compare(folders, out, normalizer):
    """Runs as the post's table, best first, with p-values of all differences, and as a heat map: table.md, heatmap.png."""
    runs = read_runs(folders)
    _, task, splits = next(iter(runs.values()))
    columns, metric = list(splits), TASKS[task][0]
    figures, draws = {}, {}  # {run: (splits + 1,)}, {run: (splits + 1, R)}: the last is the average
    for name, (_, _, splits) in runs.items():
        counts = [measure(task, normalised(splits[c], normalizer))[metric] for c in columns]
        figures[name] = [figure(x) for x in counts]
        drawn = [bootstrap(x, seed) for seed, x in enumerate(counts)]
        figures[name], draws[name] = [*figures[name], average(figures[name])], np.array([*drawn, average(drawn)])
    steps, sign = {name: run_[0] for name, run_ in runs.items()}, 1 if metric == "wer" else -1
    published, same = {}, metric == "wer" and set(columns) <= set(BENCHMARK)  # beside ours, where it is the same speech
    for name, (step, splits, mean) in PUBLISHED.items():
        if same:
            splits = [splits[list(BENCHMARK).index(c)] for c in columns]
            mean = mean if len(columns) == len(BENCHMARK) else None if None in splits else average(splits)
        published[f"{name} (published)"] = [np.nan if x is None else x for x in (*splits, mean)]
        steps[f"{name} (published)"] = step
    figures |= published if same else {}
    figures = dict(sorted(figures.items(), key=lambda item: sign * np.nan_to_num(item[1][-1], nan=1e9 * sign)))

    def line(name, values):
        return [name, steps[name] or "-", *map(plain, values)]
    how = "published by the post, decoded by sampling and normalised its way (see --normalizer post)."
    tables = [f"{TITLES[metric]}, %, normaliser: {normalizer}." + (f" Published rows: {how}" if same else ""), markdown(
        ["Run", "Steps", *columns, "Avg"], [line(name, values) for name, values in figures.items()])]
    pairs = list(combinations([name for name in figures if name in draws], 2))
    if pairs:
        tables += [f"Differences and, in brackets, their p-value by a paired bootstrap over utterances, {DRAWS} draws. Below 0.05 a "
                   "difference on these utterances is unlikely to be chance; of twenty pairs that do not differ, one will look "
                   "so. Another seed of training is another source of chance, which no such test sees.", markdown(
                       ["Difference", *columns, "Avg"], [[f"{a} - {b}", *("-" if np.isnan(x - y) else f"{x - y:+.2f} ({p_value(d):.3f})" for x, y, d in zip(
                           figures[a], figures[b], draws[a] - draws[b]))] for a, b in pairs])]
    if metric == "wer" and not same:
        tables += [f"On RuASRBenchmark, which is other speech than the above: WER, %, {how}", markdown(
            ["Run", "Steps", *BENCHMARK, "Avg"], [line(name, values) for name, values in published.items()])]
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "table.md", lambda tmp: Path(tmp).write_text("\n\n".join(tables) + "\n"))
    plot_heatmap(list(figures), [*columns, "Avg"], list(figures.values()), metric, out / "heatmap.png")
    print("\n\n".join(tables) + f"\n\nwrote table.md and heatmap.png to {out}")


def plot_heatmap(rows, columns, values, metric, path):
    """Green is good. WER is shaded by its logarithm: 1 against 2 is as much as 50 against 100, and beyond 100 all is lost."""
    values = np.array(values, float)
    shade = np.log(np.clip(values, 0.5, 100)) if metric == "wer" else -values
    low, high = (np.log(0.5), np.log(100)) if metric == "wer" else (-100, 0)
    with picture(path, figsize=(1.3 * len(columns) + 0.1 * max(map(len, rows)) + 0.5, 0.5 * len(rows) + 1.4)) as (_, axis):
        axis.imshow(np.ma.masked_invalid(shade), cmap="RdYlGn_r", aspect="auto", vmin=low, vmax=high)
        for (i, j), value in np.ndenumerate(values):
            dark = (shade[i, j] - low) / (high - low) > 0.83
            axis.text(j, i, plain(value), ha="center", va="center", color="white" if dark else "black")
        axis.axvline(len(columns) - 1.5, color="white", linewidth=4)
        axis.set_xticks(range(len(columns)), [c.replace("_", "\n", 1) for c in columns])
        axis.set_yticks(range(len(rows)), rows)
        axis.tick_params(length=0, labeltop=True, labelbottom=False)
        axis.spines[:].set_visible(False)
        axis.set_xlabel(f"{TITLES[metric]}, %")


# -----------------------------------------------------------------------------

def parse_args():
    parser = ArgumentParser(prog="eval.py", allow_abbrev=False, description="Measure a checkpoint, or ask it about one file.")
    parser.add_argument("--ckpt", default="out", help="folder that train.py wrote, or any other checkpoint")
    parser.add_argument("--encoder", default=ENCODER, help="what a checkpoint in the original's layout was made of")
    parser.add_argument("--llm", default=LLM, help="the same")
    parser.add_argument("--task", default="asr", choices=TASKS, help="transcripts by WER; qa: answers by exact match and F1; "
                        "bigbench: BigBenchAudio by accuracy")
    parser.add_argument("--manifest", help="JSONL with recordings and references; default: what the checkpoint is for")
    parser.add_argument("--split", type=lambda s: s.split(","), help="only these, separated by commas")
    parser.add_argument("--lang", choices=("ru", "en", "ru,en"), help="of the embedded splits (default: as trained), and of --baseline")
    parser.add_argument("--data_dir", help="folder with a copy of the hub's dataset, at owner/name")
    parser.add_argument("--limit", type=int, help="at most so many utterances a split")
    parser.add_argument("--baseline", help="a Whisper, hub name or path, as another row")
    parser.add_argument("--fallback", choices=("whisper",), help="one more row: noisy utterances go to the baseline "
                        f"(default: {ENCODER}), all others to the checkpoint")
    parser.add_argument("--fallback_snr", type=float, default=12, help="noisy: with an estimated SNR below this, in dB")
    parser.add_argument("--chunk", default="window", choices=("window", "vad"), help="recordings longer than a window: all windows "
                        "at once, or cut at pauses and the texts joined")
    parser.add_argument("--normalizer", default="default", choices=NORMALIZERS, help="post: the original's")
    parser.add_argument("--engine", default="native", choices=("native", "vllm"), help="what generates; vllm: see serve_vllm.py")
    parser.add_argument("--batch_size", type=int, help="default: 16; 128 with --engine vllm")
    parser.add_argument("--max_new_tokens", type=int, help="default: 256; 64 for bigbench")
    parser.add_argument("--reuse", action="store_true", help="take the answers that --out holds already, if checkpoint, settings "
                        "and recordings are the same")
    parser.add_argument("--audio", help="answer for this file instead of measuring")
    parser.add_argument("--prompt", help="the question for --audio; default: transcribe")
    parser.add_argument("--compare", nargs="+", metavar="DIR", help="evaluated runs to put into one table instead")
    parser.add_argument("--out", help="where results go; default: the checkpoint's folder")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--strict", action="store_true", help="stop at the first unusable row of the manifest")
    args = parser.parse_args()
    args.batch_size = (128 if args.engine == "vllm" else 16) if args.batch_size is None else args.batch_size
    args.max_new_tokens = 64 if args.max_new_tokens is None and args.task == "bigbench" else args.max_new_tokens
    args.max_new_tokens = 256 if args.max_new_tokens is None else args.max_new_tokens
    for name in ("batch_size", "max_new_tokens", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    for wrong, says in (
            (args.prompt is not None and not args.audio, "--prompt asks about one file: name it with --audio"),
            (args.audio and args.manifest, "--audio answers for one file, --manifest measures many: give one of the two"),
            (args.audio and not Path(args.audio).is_file(), f"no file at {args.audio}"),
            (args.data_dir and not Path(args.data_dir).is_dir(), f"no folder at --data_dir {args.data_dir}"),
            (args.task == "qa" and not args.manifest, "--task qa: name a --manifest with questions and answers"),
            (args.task == "bigbench" and args.manifest, "--task bigbench has its own data: leave out --manifest"),
            (args.task != "asr" and (args.baseline or args.fallback or args.chunk == "vad"),
             f"--baseline, --fallback and --chunk vad are for transcripts, not for --task {args.task}"),
            (args.split and args.manifest, "--split chooses among benchmarks, a manifest is one split: give one of the two")):
        if wrong:
            raise UserError(says)
    return args


def main():
    args = parse_args()
    out = Path(args.out or ("out" if args.compare else args.ckpt if Path(args.ckpt).is_dir() else Path(args.ckpt).name or "out"))
    if not args.audio:
        check_out(out)
    if args.compare:
        return compare(args.compare, out, args.normalizer)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(pick_device(args.device))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if world > 1 and args.engine == "vllm":
        raise UserError("--engine vllm shares the work by itself: leave out torchrun")
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(hours=3))  # only texts travel
    transformers.utils.logging.set_verbosity_error()  # remarks about generation flags, once a batch
    if args.audio:
        return answer_one(load_model(args.ckpt, device, args.encoder, args.llm), args.audio, args.prompt, args.max_new_tokens)
    trained_on = training_config(args.ckpt)
    load = functools.cache(lambda: load_splits(args, trained_on))
    if args.manifest or args.engine == "vllm":  # a wrong row is found sooner than a model is loaded
        load()
    ours = vllm_engine(args) if args.engine == "vllm" else native(load_model(args.ckpt, device, args.encoder, args.llm), args)
    systems, language = {"run": ours}, None
    if rank == 0:  # fetches or speaks what the others then find
        load()
    if world > 1:
        dist.barrier()
    with contextlib.redirect_stderr(sys.stderr if rank == 0 else open(os.devnull, "w")):
        splits = {split: samples[:args.limit] for split, samples in load().items()}
    if empty := [split for split, samples in splits.items() if not samples]:
        raise UserError(f"the split {empty[0]} has no utterances: nothing to measure")
    if args.baseline or args.fallback:
        language, *more = (args.lang or trained_on.get("lang") or "ru").split(",")
        if more and not (args.manifest or set(splits) <= set(BENCHMARK)):
            raise UserError("--baseline listens in one language: give --lang ru or --lang en")
        systems["baseline"] = whisper(args.baseline or ENCODER, args, device, language)

    run_name = trained_on.get("preset", Path(args.ckpt).resolve().name)
    answers = Answers(out, rank, world, [out / "hypotheses.jsonl"] if args.reuse else [])
    try:
        rows, used = answer_all(systems, splits, answers, args, run_name, [device.type, language])
    except KeyboardInterrupt:
        if rank == 0:
            print(f"stopped; {len(answers)} answers are kept in {out}, the same command goes on with them", file=sys.stderr)
        raise
    if rank == 0:
        write_results(out, rows, args, trained_on.get("step"))
    answers.finish(used)
    if world > 1:
        dist.destroy_process_group()
    code = 0
    for name, splits in rows.items():
        broken = [r for own in splits.values() for r in own if r["failed"]]
        if total := sum(map(len, splits.values())) if broken else 0:
            code |= len(broken) == total
            if rank == 0:
                print(f"warning: {name}: {len(broken)} of {total} utterances failed and count as empty: " + "; ".join(
                    f"{r['id']}: {r['failed']}" for r in broken[:5]) + ("; ..." if len(broken) > 5 else ""), file=sys.stderr)
    return int(code)


def answer_all(systems, splits, answers, args, run_name, machine):
    """Every system on every split -> ({system: {split: rows}}, the keys of the rows). machine: what else answers depend on."""
    baseline = args.baseline or ENCODER
    names = {"run": run_name, "baseline": Path(baseline).name + " (baseline)" * (Path(baseline).name == run_name)}
    places, keys, noisy = {"run": args.ckpt, "baseline": baseline}, {}, set()
    for kind, answer in systems.items():
        settings = [identity(places[kind]), kind, *machine[:1 if kind == "run" else 2], args.encoder, args.llm, args.task,
                    args.max_new_tokens, args.chunk, args.engine]
        keys[kind] = {split: [key_of(settings, split, s) for s in samples] for split, samples in splits.items()}
        todo = [(key, split, s) for split, samples in splits.items() for key, s in zip(keys[kind][split], samples)]
        if kind == "baseline" and not args.baseline:  # only what falls back to it
            todo = [job for job, ours in zip(todo, sum(keys["run"].values(), [])) if ours in noisy]
        if answers.rank == 0 and (again := sum(key in answers for key, *_ in todo)):
            print(f"{names[kind]}: {again} of {len(todo)} utterances were answered before", file=sys.stderr)
        decode(answer, todo, answers, args.batch_size, names[kind])
        if kind == "run":
            noisy = {key for key, *_ in todo if answers[key]["snr"] is not None and answers[key]["snr"] < args.fallback_snr}

    rows = {names[kind]: {split: [answers[key] for key in own] for split, own in keys[kind].items()}
            for kind in systems if kind == "run" or args.baseline}
    if args.fallback:
        if answers.rank == 0:
            print(f"{names['baseline']} answers for {len(noisy)} of {sum(map(len, splits.values()))} utterances, whose SNR is "
                  f"estimated below {args.fallback_snr:g} dB", file=sys.stderr)
        rows[f"{names['run']}, noisy ones by {names['baseline']}"] = {
            split: [answers[theirs if ours in noisy else ours] for ours, theirs in zip(keys["run"][split], keys["baseline"][split])]
            for split in splits}
    return rows, {key for own in keys.values() for split in own.values() for key in split}


if __name__ == "__main__":
    run(main)
