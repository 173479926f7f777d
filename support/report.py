"""support/report.py -- what eval.py writes: tables, kinds of errors, worst utterances, a chart."""
import json
import re
import sys
from collections import Counter
from pathlib import Path
import jiwer
import numpy as np
from tabulate import tabulate
from support.cli import picture, write_text
from support.corpus import NAMES
from support.recipes import TABLES
from support.tasks import TASKS, TITLES

KNOWN_NAMES = Counter(name for own in NAMES.values() for name in own["held_out"] * 9)
NOTES, KINDS = TABLES["notes"], TABLES["kinds"]  # {kind of error: which ones, out of what}
PAIR = "REF: {reference}\nHYP: {hypothesis}"

def by_split(rows: list[dict], key: str = "split") -> dict[str, list[dict]]:
    splits = dict.fromkeys(r[key] for r in rows)
    return {split: [r for r in rows if r[key] == split] for split in splits}

def longest_loop(words: list[str] | str) -> int:
    """Words or letters, 4 or more, in the longest stretch that says a phrase (up to 30) thrice."""
    loops = re.finditer(r"(?<!\S)((?:\S++ ){1,30}?)\1{2,}", " ".join(words) + " ")
    lengths = [loop[0].count(" ") for loop in loops]
    return max((n for n in lengths if n >= 4), default=0)

def has_loop(ref: list[str], hyp: list[str]) -> bool:  # one that the reference has not
    in_words = [longest_loop(max(words, key=len, default="")) for words in (ref, hyp)]
    return longest_loop(hyp) > longest_loop(ref) or in_words[1] > in_words[0]

def more_counts(ref: list[str], hyp: list[str], seconds: float) -> dict[str, list[float]]:
    """Of a transcript: does it loop? Of silence: its words, and 100 minutes' part of it, for
    eval.percent() gives words a minute so. Of corpus.NAMES in it: found, all."""
    names = Counter(ref) & KNOWN_NAMES
    return dict(loops=[float(has_loop(ref, hyp)), 1],
                made_up=[0, 0] if ref else [len(hyp), 100 * seconds / 60],
                found=[(names & Counter(hyp)).total(), names.total()])

def diagnose(rows: list[dict]) -> dict[str, int]:  # in how many of a split's rows what went wrong
    texts = [(r["reference_normalised"].split(), r["hypothesis_normalised"].split()) for r in rows]
    silence = [hyp for ref, hyp in texts if not ref]
    return dict(stopped_early=sum(len(ref) > 1.5 * len(hyp) for ref, hyp in texts),
                cut=sum(r["cut"] for r in rows), silence=len(silence),
                text_on_silence=sum(map(bool, silence)))

def describe(rows: list[dict], task: str) -> dict:  # what a split's figure is made of, and took
    sound, took, tokens = (sum(r[k] for r in rows) for k in ("seconds", "took", "tokens"))
    facts = {}
    if task == "asr":
        counts = np.array([r["wer"] for r in rows]).sum(0).tolist()
        facts = dict(zip(("sub", "del", "ins", "words"), counts, strict=True)) | diagnose(rows)
    return facts | dict(samples=len(rows), failed=sum(bool(r["failed"]) for r in rows),
                        seconds=round(sound, 1), rtf=round(took / sound, 5) if sound else None,
                        tokens_per_s=round(tokens / max(took, 1e-9), 1))

def worst(rows: list[dict], task: str, n: int = 10) -> str:  # aligned word by word
    def errors(r):
        return sum(r["wer"][:3]) if task == "asr" else 1 - r[TASKS[task][-1]][0]
    blocks = []
    for r in sorted(filter(errors, rows), key=errors, reverse=True)[:n]:
        words = jiwer.process_words(r["reference_normalised"], r["hypothesis_normalised"])
        text = jiwer.visualize_alignment(words, show_measures=False, line_width=110)
        text = text.split("===\n", 1)[1].strip("\n")  # below its own headline
        blocks.append(f"{r['id']}: {errors(r):.3g} errors\n{text}")
    return "\n\n".join(blocks)

def markdown(rows: list, header="keys") -> str:  # names left, figures right; None: "-"
    return tabulate(rows, header, "pipe", disable_numparse=True, missingval="-",
                    colalign=("left", *["right"] * (len(rows[0]) - 1)))

def plain(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.2f}"

def with_interval(result: dict, metric: str) -> str:
    low, high = map(plain, result[f"{metric}_ci"])
    return "-" if result[metric] is None else f"{plain(result[metric])} [{low}, {high}]"

def results_table(system: dict, task: str) -> str:  # by split; of transcripts also kinds of errors
    figures, kinds = [], []
    for split, r in system["splits"].items():
        known = [m for m in TASKS[task]
                 if any(x[m] is not None for x in system["splits"].values())]
        row = {f"{TITLES[metric]} [95 %]": with_interval(r, metric) for metric in known}
        columns = "sub", "del", "ins", "words", "samples", "failed", "rtf", "tokens_per_s"
        figures.append({"split": split, **row} | {name: r[name] for name in columns if name in r})
        if task == "asr":
            row = {k: f"{100 * r[n] / max(1, r[total]):.1f}" for k, (n, total) in KINDS.items()}
            silent = f"{r['text_on_silence']} of {r['silence']}"
            kinds.append({"split": split, **row, "text on silence": silent})
    return "\n\n".join(map(markdown, filter(None, (figures, kinds))))

def overview(systems: dict[str, dict], task: str) -> str:  # one line a system, as in the post
    metric, rows = TASKS[task][0], []
    for name, system in systems.items():
        own = {split: plain(r[metric]) for split, r in system["splits"].items()}
        average = with_interval(system, f"avg_{metric}")
        rows.append({TITLES[metric]: name, **own, "average [95 %]": average})
    return markdown(rows)

def plot_bars(systems: dict[str, dict], task: str, path: Path) -> None:  # by split, with intervals
    metric, width = TASKS[task][0], 0.7 / len(systems)
    splits = [split.replace("_", "\n") for split in next(iter(systems.values()))["splits"]]
    with picture(path, figsize=(max(4, (1 + 0.5 * len(systems)) * len(splits)), 4.5)) as (_, axis):
        for k, (name, system) in enumerate(systems.items()):
            table = [[r[metric], *r[f"{metric}_ci"]] for r in system["splits"].values()]
            values, *ends = np.array(table, float).T  # (splits,), None becomes nan
            bars = axis.bar(np.arange(len(splits)) + k * width, values, width, label=name,
                            yerr=abs(ends - values).tolist(), capsize=3)
            axis.bar_label(bars, map(plain, values), padding=3, fontsize=8)
        axis.set_xticks(np.arange(len(splits)) + 0.35 - width / 2, splits)
        axis.set(ymargin=0.15, ylabel=f"{TITLES[metric]} (bars: 95 % intervals)")
        axis.legend(frameon=False)

def write_results(out: Path, rows: dict, systems: dict, more: dict, cfg, facts: dict) -> int:
    """{system: graded rows}, ours first; {system: assessed}, more -> exit code, 1 if all failed."""
    name, task = next(iter(rows)), cfg.task
    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in sum(rows.values(), [])]
    write_text(out / "hypotheses.jsonl", "".join(lines))
    result = dict(run=name, **facts, task=task, normalizer=cfg.normalizer,
                  settings={k: str(v) for k, v in vars(cfg).items() if v}, **systems[name],
                  others={k: v for k, v in systems.items() if k != name})
    write_text(out / "results.json", json.dumps(result, indent=1, ensure_ascii=False))
    plot_bars(systems, task, out / ("wer.png" if task == "asr" else f"{task}.png"))
    tables = [f"{system}\n\n{results_table(own, task)}" for system, own in systems.items()]
    tables.append(overview(systems | more, task))
    text = [f"# {name}", NOTES["how"].format(cfg.max_new_tokens, cfg.normalizer), *tables]
    for system, own in rows.items():
        failed = [f"{r['id']} ({system}, {r['split']}): {r['failed']}" for r in own if r["failed"]]
        if failed:
            text.append("\n- ".join([f"## Failed, counted as empty: {system}\n", *failed]))
            facts = system, len(failed), len(own), "; ".join(failed[:5])
            print(NOTES["failed"].format(*facts), file=sys.stderr)
        for split, some in by_split(own).items():
            if block := worst(some, task):
                text.append(f"## The worst of {system}, {split}\n\n```\n{block}\n```")
    write_text(out / "report.md", "\n\n".join(text) + "\n")
    tables += map(PAIR.format_map, rows[name][:3])
    print("", *tables, NOTES["wrote"].format(out), sep="\n\n")
    return int(any(all(r["failed"] for r in own) for own in rows.values()))
