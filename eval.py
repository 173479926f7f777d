"""eval.py -- measure a checkpoint: decode, compare with the references, say how sure that is.

    utterances -> greedy decoding -> normalise -> align, count edits -> WER -> interval -> tables

    python eval.py --ckpt out/                   # the post's six benchmarks; a tiny run: its own
    torchrun --nproc_per_node=8 eval.py --ckpt out/ --baseline openai/whisper-large-v3
    python eval.py --ckpt out/ --audio a.wav     # one answer, no score; README.md has more

Writes results.json, report.md, hypotheses.jsonl and wer.png into the checkpoint's folder or --out.
Shapes: n utterances of a split, S splits, R draws of the bootstrap."""
import string
import unicodedata
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path
import jiwer
import numpy as np
import regex
import transformers
from transformers.data.metrics.squad_metrics import compute_f1
from augment import HARD, augment
from data import BadRows, embedded, load_audio, read_manifest
from support import banks, checkpoint, cli, context, corpus, decoding, recipes, report, tasks

# ---- Text, normalised: what is compared
def normalise(text: str) -> str:
    """As WER compares it: NFC, lower case, ё -> е (й stays); digits stay; кто-то is two words."""
    text = unicodedata.normalize("NFC", text).lower().replace("ё", "е")
    text = regex.sub(r"[\p{Cf}\u0301'’ʼ`]", "", text)  # за́мок's stress, apostrophes
    return " ".join(regex.sub(r"[\p{P}\p{S}]", " ", text).split())  # punctuation and symbols

def normalise_as_the_post(text: str) -> str:  # кто-то is ктото; « » — … and ё stay
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())

# ---- Errors of each utterance
def edits(reference: str, hypothesis: str, align=jiwer.process_words) -> list[int]:
    """Two normalised texts -> substitutions, deletions, insertions, words of the reference."""
    pair = align(reference, hypothesis)  # the cheapest way to make one of the other
    return [pair.substitutions, pair.deletions, pair.insertions, len(pair.references[0])]

def grade(row: dict, task: str, normalizer: str) -> dict:
    """A row of hypotheses.jsonl -> with normalised texts, and counts: errors or points, total."""
    clean = normalise if normalizer == "default" else normalise_as_the_post
    ref, hyp = clean(row["reference"]), clean(row["hypothesis"])
    if task == "asr":
        counts = dict(wer=edits(ref, hyp), cer=edits(ref, hyp, jiwer.process_characters))
        counts |= report.more_counts(ref.split(), hyp.split(), row.get("seconds", 0))
    elif task == "qa":
        counts = dict(em=[float(ref == hyp), 1], f1=[compute_f1(ref, hyp), 1])
    else:
        answer = tasks.extract_answer(row["hypothesis"], row["split"])
        counts = dict(accuracy=[float(answer == row["reference"].lower()), 1])
    return row | dict(reference_normalised=ref, hypothesis_normalised=hyp) | counts

# ---- A figure, and how sure it is
def percent(counts: np.ndarray) -> np.ndarray:
    """(..., n, k) -> (...): sums, the first columns' over the last's, in %; nan: nobody speaks."""
    total = counts.sum(-2)  # (..., k)
    share = total[..., :-1].sum(-1) / np.maximum(total[..., -1], 1)
    return np.where(total[..., -1] > 0, 100 * share, np.nan)

def bootstrap(counts: np.ndarray, seed: int = 0, R: int = 2000) -> np.ndarray:
    """(n, k) -> (R,): figures of R sets of n drawn (Bisani and Ney 2004), equal for equal seeds."""
    rng, n = np.random.default_rng(seed), len(counts)
    return np.concatenate([percent(counts[rng.integers(n, size=(100, n))])  # (100, n, k) at once
                           for _ in range(R // 100)])

def rounded(x: float) -> float | None:
    return None if np.isnan(x) else round(float(x), 2)

def interval(draws: np.ndarray) -> list:  # (R,) -> [low, high]: between them lie 95 % of them
    known = draws[np.isfinite(draws)]
    return [rounded(x) for x in np.percentile(known, [2.5, 97.5])] if len(known) else [None, None]

def score(rows: list[dict], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Graded rows -> figures (S + 1,), draws (S + 1, R): of splits; of those not nan, the mean."""
    counts = [np.array([r[metric] for r in own]) for own in report.by_split(rows).values()]
    table = np.array([[percent(x), *bootstrap(x, seed)] for seed, x in enumerate(counts)])
    table = np.vstack([table, np.ma.masked_invalid(table).mean(0).filled(np.nan)])  # (S + 1, 1 + R)
    return table[:, 0], table[:, 1:]

def assess(rows: list[dict], task: str) -> dict:  # graded rows of a system -> its results.json
    results = {name: report.describe(own, task) for name, own in report.by_split(rows).items()}
    mean, main = {}, tasks.TASKS[task][0]
    for metric in tasks.TASKS[task]:  # titles: [titles] in support/recipes.toml
        for own, x, draws in zip([*results.values(), mean], *score(rows, metric), strict=True):
            own |= {metric: rounded(x), f"{metric}_ci": interval(draws)}
    return {"splits": results, f"avg_{main}": mean[main], f"avg_{main}_ci": mean[f"{main}_ci"]}

# ---- Which utterances: {split: samples}
def embedded_split(lang: str, name: str, n: int, seed: int) -> list:
    """n held-out sentences by held-out voices; webinars, devices: clean in new noises and rooms."""
    if name in banks.SPLITS:
        return banks.split(name, n, seed)
    if name.startswith("names_"):
        return context.told(lang, name, embedded(lang, "names", n, seed), seed)
    if name not in HARD:
        return embedded(lang, name, n, seed)
    samples, made = embedded(lang, "clean", n, seed), banks.open_banks(voices="clean")
    for i, s in enumerate(samples):
        rng = np.random.default_rng([seed % 2 ** 32, list(HARD).index(name), i])
        x = augment(load_audio(s.audio[0]).numpy(), HARD[name], rng, *made) * 32767
        samples[i] = replace(s, audio=[x.round().astype(np.int16)], name=f"{s.name}/{name}")
    return samples

def load_splits(cfg, trained_on: dict) -> dict[str, list]:
    """--manifest's; BigBenchAudio; RuASRBenchmark; of a tiny run without it: embedded ones."""
    if cfg.manifest:
        bad = BadRows(cfg.strict)
        samples, total = read_manifest(cfg.manifest, bad, evaluation=True)
        bad.report(total, cfg.manifest)
        return {Path(cfg.manifest).stem: samples}
    wanted = cfg.split.split(",") if cfg.split else []
    manifest, how = trained_on.get("train_manifest"), (cfg.data_dir, cfg.strict)
    benchmark = wanted and set(wanted) <= set(recipes.BENCHMARK)
    if cfg.task == "bigbench":
        available = {name: partial(tasks.load_bigbench, name, *how) for name in tasks.CATEGORIES}
    elif cfg.data_dir or benchmark or not (manifest or trained_on.get("embedded")):
        available = {name: partial(tasks.load_split, source, *how, cfg.limit)
                     for name, source in recipes.BENCHMARK.items()}
    else:
        cli.refuse(manifest, f"{cfg.ckpt} was trained on a manifest: name yours with --manifest")
        available, languages = {}, (cfg.lang or trained_on["lang"]).split(",")
        n = min(cfg.limit or corpus.EVAL_UTTERANCES, corpus.EVAL_UTTERANCES)
        for lang, name in product(languages, (*corpus.EVAL_SPLITS, *HARD, *corpus.MORE_SPLITS)):
            title = name if lang == languages[0] else f"{name}_{lang}"
            available[title] = partial(embedded_split, lang, name, n, trained_on["seed"])
    if unknown := [name for name in wanted if name not in available]:
        raise cli.UserError(f"--split {unknown[0]}: choose from {', '.join(available)}")
    wanted = wanted or [name for name in available if not name.startswith(corpus.MORE_SPLITS)]
    return {name: load() for name, load in available.items() if name in wanted}

def parse_config():  # -> the flags, see [eval] in support/flags.toml
    cfg = cli.ArgumentParser().add_tables("model", "eval").parse_args()
    cfg.batch_size = cfg.batch_size or (128 if cfg.engine == "vllm" else 16)
    cfg.max_new_tokens = cfg.max_new_tokens or (64 if cfg.task == "bigbench" else 256)
    cfg.out = cfg.out or (cfg.ckpt if Path(cfg.ckpt).is_dir() else Path(cfg.ckpt).name)
    with cli.as_user_error("--context: ", ValueError):
        cfg.context = context.parse(cfg.context)
    for_asr = cfg.baseline or cfg.context or cfg.chunk == "vad"
    fixed = cfg.audio or cfg.split or cfg.task == "bigbench"
    cli.refuse(cfg.prompt is not None and not cfg.audio, "--prompt asks about a file: add --audio")
    cli.refuse(cfg.manifest and fixed, "with --audio, --split, bigbench: leave out --manifest")
    cli.refuse(cfg.audio and not Path(cfg.audio).is_file(), f"no file at {cfg.audio}")
    cli.refuse(cfg.task == "qa" and not cfg.manifest, "--task qa: name a --manifest with questions")
    cli.refuse(cfg.task != "asr" and for_asr, "--baseline, --context, --chunk: for asr")
    cli.refuse(decoding.WORLD > 1 and cfg.engine == "vllm", "--engine vllm: leave out torchrun")
    return cfg

def main():
    cfg = parse_config()
    out = Path(cfg.out)
    if not cfg.audio:
        cli.check_out(out)
    if cfg.compare:
        return report.compare(cfg.compare, grade, score, cfg.normalizer, out)
    device = decoding.join_ranks(cfg.device)
    transformers.utils.logging.set_verbosity_error()  # remarks about flags, once a batch
    if cfg.audio:
        model = checkpoint.load_model(cfg.ckpt, device, cfg.encoder, cfg.llm)
        return tasks.answer_one(model, cfg)
    trained_on = checkpoint.training_config(cfg.ckpt)
    name = trained_on.get("preset", Path(cfg.ckpt).resolve().name)
    load = partial(decoding.first_rank_first, load_splits, cfg, trained_on)
    early = load() if cfg.manifest or cfg.engine == "vllm" else None  # wrong rows show at once
    asked = [tasks.open_ours(cfg, name, device)]
    splits = early or load()
    splits = {name: [context.tell(s, cfg.context) for s in own] for name, own in splits.items()}
    if cfg.baseline:
        asked.append(tasks.open_baseline(cfg, name, trained_on.get("lang"), device))
    answers = tasks.answer_all(cfg, asked, splits, out)  # {system: rows}
    if decoding.RANK > 0:
        return 0
    rows, results = {}, {}
    for name, own in answers.items():
        rows[name] = [dict(run=name) | grade(r, cfg.task, cfg.normalizer) for r in own]
        results[name] = assess(rows[name], cfg.task)
    code = report.write_results(out, rows, results, cfg, trained_on.get("step"))
    for part in chain.from_iterable(out.glob(f"hypotheses.{s.settings}.*") for s in asked):
        part.unlink()  # hypotheses.jsonl has it all
    return code

cli.run(main, __name__)
