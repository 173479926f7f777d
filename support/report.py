"""
support/report.py -- what eval.py writes: tables, what kind of errors they are made of, the worst
utterances, a bar chart. A row is a line of hypotheses.jsonl, graded; a system is what assess() of
eval.py says about one.
"""
import json
import sys
from pathlib import Path

import jiwer
import numpy as np
import pandas as pd
from tabulate import tabulate

from support.cli import picture, write_text
from support.tasks import TASKS, TITLES


def by_split(rows: list[dict]) -> dict[str, list[dict]]:
    splits = {}
    for r in rows:
        splits.setdefault(r["split"], []).append(r)
    return splits


# -----------------------------------------------------------------------------
# Diagnosis

def longest_loop(words: list[str] | str) -> int:
    """Words in the longest stretch of at least four that says a phrase (of up to 30 words) three
    times in a row or more: "на на на на столе" -> 4. Or letters of a word."""
    longest = 0
    for size in range(1, min(30, len(words) // 3) + 1):
        same = 0  # words in a row that equal the one a phrase earlier
        for i in range(size, len(words)):
            same = same + 1 if words[i] == words[i - size] else 0
            stretch = (same // size + 1) * size
            if stretch >= max(4, 3 * size):
                longest = max(longest, stretch)
    return longest


def diagnose(rows: list[dict]) -> dict[str, int]:
    """Rows of a split -> in how many utterances what went wrong."""
    counts = dict.fromkeys(("stopped_early", "loops", "cut", "silence", "text_on_silence"), 0)
    for r in rows:
        said, heard = r["reference_normalised"].split(), r["hypothesis_normalised"].split()
        word_said, word_heard = max(said, key=len, default=""), max(heard, key=len, default="")
        counts["stopped_early"] += len(said) > 1.5 * len(heard)
        counts["loops"] += (longest_loop(heard) > longest_loop(said)
                            or longest_loop(word_heard) > longest_loop(word_said))
        counts["cut"] += r["cut"]
        counts["silence"] += not said
        counts["text_on_silence"] += bool(heard) and not said
    return counts


def describe(rows: list[dict], task: str) -> dict:
    """Rows of a split -> what its figure is made of, how many rows there are, what they took."""
    seconds, took = sum(r["seconds"] for r in rows), sum(r["took"] for r in rows)
    facts = {}
    if task == "asr":
        counts = np.array([r["wer"] for r in rows]).sum(0).tolist()
        facts = dict(zip(("sub", "del", "ins", "words"), counts, strict=True)) | diagnose(rows)
    return facts | dict(
        samples=len(rows), failed=sum(bool(r["failed"]) for r in rows), seconds=round(seconds, 1),
        rtf=round(took / seconds, 5) if seconds else None,
        tokens_per_s=round(sum(r["tokens"] for r in rows) / max(took, 1e-9), 1))


def worst(rows: list[dict], task: str, n: int = 10) -> str:
    """The rows with the most errors, reference above hypothesis, transcripts word by word."""
    def errors(r):
        return sum(r["wer"][:3]) if task == "asr" else 1 - r[TASKS[task][-1]][0]

    blocks = []
    for r in sorted(filter(errors, rows), key=errors, reverse=True)[:n]:
        if task == "asr":
            words = jiwer.process_words(r["reference_normalised"], r["hypothesis_normalised"])
            text = jiwer.visualize_alignment(words, show_measures=False, line_width=110)
            text = text.split("===\n", 1)[1].strip("\n")  # below its own headline
            blocks.append(f"{r['id']}: {errors(r)} errors\n{text}")
        else:
            blocks.append(f"{r['id']}\nREF: {r['reference']}\nHYP: {r['hypothesis']}")
    return "\n\n".join(blocks)


def examples(rows: list[dict], n: int = 3) -> str:
    """A few rows to read: the first ones that are right, and the first that are not."""
    shown = {"✓": [], "✗": []}
    for r in rows:
        mark = "✓" if r["reference_normalised"] == r["hypothesis_normalised"] else "✗"
        shown[mark].append(f"  {mark} {r['id']}\n      said   {r['reference']}\n"
                           f"      heard  {r['hypothesis'] or '(nothing)'}")
    return "\n".join(shown["✓"][:n] + shown["✗"][:n])


# -----------------------------------------------------------------------------
# Tables

def markdown(header: list[str], rows: list[list]) -> str:
    """A table, names to the left, figures to the right. None becomes "-"."""
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True, missingval="-",
                    colalign=("left", *["right"] * (len(header) - 1)))


def plain(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.2f}"


def with_interval(result: dict, metric: str) -> str:
    low, high = map(plain, result[f"{metric}_ci"])
    return "-" if result[metric] is None else f"{plain(result[metric])} [{low}, {high}]"


KINDS = {"deletions %": ("del", "words"), "insertions %": ("ins", "words"),  # which, out of what
         "stopped early %": ("stopped_early", "samples"), "loops %": ("loops", "samples"),
         "cut by the limit %": ("cut", "samples")}


def results_table(system: dict, task: str) -> str:
    """A system's figures by split; of transcripts also what kind of errors they are made of."""
    counts = (["sub", "del", "ins", "words"] if task == "asr" else []) + ["samples", "failed"]
    figures, kinds = [], []
    for split, r in system["splits"].items():
        rtf = f"{r['rtf']:.4f}" if r["rtf"] else None
        figures.append([split, *(with_interval(r, metric) for metric in TASKS[task]),
                        *(r[c] for c in counts), rtf, f"{r['tokens_per_s']:.0f}"])
        if task == "asr":
            shares = [f"{100 * r[n] / max(1, r[total]):.1f}" for n, total in KINDS.values()]
            silent = f"{r['text_on_silence']} of {r['silence']}" if r["silence"] else None
            kinds.append([split, *shares, silent])
    titles = [f"{TITLES[metric]} % [95 %]" for metric in TASKS[task]]
    tables = [markdown(["split", *titles, *counts, "RTF", "tokens/s"], figures)]
    tables += [markdown(["split", *KINDS, "text on silence"], kinds)] if kinds else []
    return "\n\n".join(tables)


def overview(systems: dict[str, dict], task: str) -> str:
    """One line a system, in the shape of the post's table."""
    metric = TASKS[task][0]
    rows = [[name, *(plain(r[metric]) for r in system["splits"].values()),
             with_interval(system, f"avg_{metric}")] for name, system in systems.items()]
    splits = next(iter(systems.values()))["splits"]
    return markdown([f"{TITLES[metric]} %", *splits, "average [95 %]"], rows)


def plot_bars(systems: dict[str, dict], task: str, path: Path) -> None:
    """Bars by split, one a system, with their intervals."""
    metric = TASKS[task][0]
    results = {name: system["splits"].values() for name, system in systems.items()}
    splits = [split.replace("_", "\n") for split in next(iter(systems.values()))["splits"]]
    values = pd.DataFrame({name: [r[metric] for r in own] for name, own in results.items()},
                          index=splits, dtype=float)  # (splits, systems)
    ends = np.array([[r[f"{metric}_ci"] for r in own] for own in results.values()], float)
    reach = np.abs(ends.transpose(0, 2, 1) - values.T.to_numpy()[:, None])  # (systems, 2, splits)
    size = (max(4, (1 + 0.5 * len(systems)) * len(splits)), 4.5)
    with picture(path, figsize=size) as (_, axis):
        values.plot.bar(ax=axis, yerr=reach, width=0.7, capsize=3, ecolor="#555555", rot=0,
                        color=["#1f4e9c", "#e08a1e", "#4f9c5a"])
        for name, bars in zip(results, axis.containers[1::2], strict=True):  # [::2]: error bars
            axis.bar_label(bars, [plain(v) for v in values[name]], padding=3, fontsize=8)
        axis.set_ylabel(f"{TITLES[metric]}, % (bars: 95 % intervals)")
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)


# -----------------------------------------------------------------------------
# Files

def write_results(out: Path, rows: dict, systems: dict, more: dict, cfg, step: int | None) -> int:
    """rows: {system: graded rows}, ours first; systems: {system: assessed}; more: as systems, for
    the overview only. Writes all files, prints the short version -> exit code, 1 if all failed."""
    name, task = next(iter(rows)), cfg.task
    lines = [json.dumps(dict(run=system) | r, ensure_ascii=False)
             for system, own in rows.items() for r in own]
    write_text(out / "hypotheses.jsonl", "\n".join([*lines, ""]))
    result = dict(run=name, step=step, task=task, normalizer=cfg.normalizer,
                  settings={k: str(v) for k, v in vars(cfg).items() if v}, **systems[name],
                  others={k: v for k, v in systems.items() if k != name})
    write_text(out / "results.json", json.dumps(result, indent=1, ensure_ascii=False))
    plot_bars(systems, task, out / ("wer.png" if task == "asr" else f"{task}.png"))

    tables = [(f"{system}\n\n" if len(systems) > 1 else "") + results_table(result, task)
              for system, result in systems.items()]
    if len(systems | more) > 1 or len(systems[name]["splits"]) > 1:
        tables.append(overview(systems | more, task))
    text = [f"# {name}", f"Greedy, at most {cfg.max_new_tokens} tokens, normaliser: "
            f"{cfg.normalizer}. Intervals: 95 %, bootstrap over utterances. RTF: seconds of "
            "computing for a second of audio, of one process.", *tables]
    failed = [f"- {r['id']} ({system}, {r['split']}): {r['failed']}"
              for system, own in rows.items() for r in own if r["failed"]]
    text += ["## Failed, counted as empty", "\n".join(failed)] if failed else []
    for system, own in rows.items():
        for split, some in by_split(own).items():
            if block := worst(some, task):
                text.append(f"## The worst of {system}, {split}\n\n```\n{block}\n```")
    write_text(out / "report.md", "\n\n".join(text) + "\n")
    print("\n" + "\n\n".join([*tables, examples(rows[name]), "wrote results.json, report.md (the "
          f"worst utterances are there), hypotheses.jsonl and a picture to {out}"]))
    return max(warn(system, own) for system, own in rows.items())


def warn(system: str, rows: list[dict]) -> int:
    """Say which of a system's utterances failed -> 1 if all of them did."""
    failed = [f"{r['id']}: {r['failed']}" for r in rows if r["failed"]]
    if failed:
        named = failed[:5] + ["..."] * (len(failed) > 5)
        print(f"warning: {system}: {len(failed)} of {len(rows)} utterances failed and count as "
              f"empty: {'; '.join(named)}", file=sys.stderr)
    return int(len(failed) == len(rows))
