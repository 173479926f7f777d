"""support/report.py -- what eval.py writes: tables, worst utterances, a chart, comparisons."""
import json
import re
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
import jiwer
import numpy as np
from tabulate import tabulate
from support.cli import UserError, as_user_error, picture, write_text
from support.corpus import NAMES
from support.recipes import BENCHMARK, PUBLISHED, TABLES
from support.tasks import TASKS, TITLES

KNOWN_NAMES = Counter(name for own in NAMES.values() for name in own["held_out"] * 9)
NOTES, COLUMNS = TABLES["notes"], TABLES["columns"]["of_a_split"]

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
    """Does it loop? In silence: words a minute, as eval.percent() says it. Names: found, all."""
    names = Counter(ref) & KNOWN_NAMES
    return dict(loops=[float(has_loop(ref, hyp)), 1],
                made_up=[0, 0] if ref else [len(hyp), 100 * seconds / 60],
                found=[(names & Counter(hyp)).total(), names.total()])

def diagnose(rows: list[dict]) -> dict[str, int]:  # in how many of a split's rows what went wrong
    texts = [(r["reference_normalised"].split(), r["hypothesis_normalised"].split()) for r in rows]
    return dict(stopped_early=sum(len(ref) > 1.5 * len(hyp) for ref, hyp in texts),
                cut=sum(r["cut"] for r in rows))

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

def results_table(system: dict, task: str) -> str:  # a line a split
    rows, splits = [], system["splits"]
    known = [m for m in TASKS[task] if any(r[m] is not None for r in splits.values())]
    for split, r in splits.items():
        row = {f"{TITLES[metric]} [95 %]": with_interval(r, metric) for metric in known}
        rows.append({"split": split, **row} | {name: r[name] for name in COLUMNS if name in r})
    return markdown(rows)

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

def write_results(out: Path, rows: dict, systems: dict, cfg, step) -> int:
    """{system: graded rows}, ours first; {system: assessed} -> exit code, 1 if all failed."""
    name, task = next(iter(rows)), cfg.task
    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in sum(rows.values(), [])]
    write_text(out / "hypotheses.jsonl", "".join(lines))
    result = dict(run=name, step=step, task=task, normalizer=cfg.normalizer,
                  settings={k: str(v) for k, v in vars(cfg).items() if v}, **systems[name],
                  others={k: v for k, v in systems.items() if k != name})
    write_text(out / "results.json", json.dumps(result, indent=1, ensure_ascii=False))
    plot_bars(systems, task, out / ("wer.png" if task == "asr" else f"{task}.png"))
    tables = [f"{system}\n\n{results_table(own, task)}" for system, own in systems.items()]
    tables.append(overview(systems, task))
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
    tables += map(NOTES["pair"].format_map, rows[name][:3])
    print("", *tables, NOTES["wrote"].format(out), sep="\n\n")
    return int(any(all(r["failed"] for r in own) for own in rows.values()))

# ---- Several runs in the post's table, and which differences are real
def read_run(folder: Path) -> dict[str, dict]:  # its systems: {name: {"step", "task", "rows"}}
    with as_user_error(f"no results of eval.py in {folder}: ", OSError, ValueError, KeyError):
        result = json.loads((folder / "results.json").read_text())
        lines = (folder / "hypotheses.jsonl").read_text().strip().split("\n")
        systems = by_split([json.loads(line) for line in lines], "run")
        main, task, step = systems.pop(result["run"]), result["task"], result["step"]
    runs = {name: dict(step=None, task=task, rows=rows) for name, rows in systems.items()}
    name = folder.resolve().name.removeprefix("out_")
    return {name: dict(step=step, task=task, rows=main)} | runs

def read_runs(folders: list[str]) -> dict[str, dict]:
    """read_run() of all. Raises UserError if they were not evaluated on the same utterances."""
    def columns(run, *names):
        return [[row[name] for name in names] for row in run["rows"]]
    def asked(run):
        return run["task"], columns(run, "split", "id", "reference")
    runs = {}
    for folder in folders:
        for name, run in read_run(Path(folder)).items():
            if columns(runs.get(name, run), "hypothesis") != columns(run, "hypothesis"):
                name = f"{folder}/{name}"  # but a baseline that several folders hold is shown once
            runs[name], first = run, next(iter(runs), name)
            if asked(run) != asked(runs[first]):
                raise UserError(f"{name} has other utterances or another --task than {first}")
    return runs

def p_value(differences: np.ndarray) -> float:
    """(R,) differences of paired draws -> two-sided p: how often they disagree about the sign."""
    differences = differences[np.isfinite(differences)]
    either = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (either + 1) / (len(differences) + 1)))

def differences(columns: list[str], scores: dict[str, tuple]) -> list[str]:
    """{name: what score() of eval.py returns} -> their differences, explained."""
    rows = []
    for a, b in combinations(scores, 2):
        gaps, draws = (x - y for x, y in zip(scores[a], scores[b], strict=True))
        rows.append([f"{a} - {b}", *(f"{x:+.2f} ({p_value(some):.3f})" if np.isfinite(x) else "-"
                                     for x, some in zip(gaps, draws, strict=True))])
    return [NOTES["p_values"].format(len(draws.T)), markdown(rows, ["Difference", *columns, "Avg"])]

def compare(folders: list[str], grade, score, normalizer: str, out: Path) -> None:
    """Writes table.md, best runs first. grade and score are those of eval.py."""
    runs = read_runs(folders)
    first = next(iter(runs.values()))
    columns, metric = list(by_split(first["rows"])), TASKS[first["task"]][0]
    scores = {name: score([grade(r, run["task"], normalizer) for r in run["rows"]], metric)
              for name, run in runs.items()}
    shown = [(name, run["step"], scores[name][0]) for name, run in runs.items()]
    published = metric == "wer" and columns == list(BENCHMARK)  # of the same speech
    if published:
        shown += [(f"{name} (published)", n or None, xs) for name, (n, *xs) in PUBLISHED.items()]
    shown.sort(key=lambda r: (np.isnan(r[2][-1]), r[2][-1] if metric == "wer" else -r[2][-1]))
    lines = [[name, step, *map(plain, figures)] for name, step, figures in shown]
    text = [f"{TITLES[metric]}; normaliser: {normalizer}.",
            markdown(lines, ["Run", "Steps", *columns, "Avg"])]
    if len(scores) > 1:
        text += differences(columns, {name: scores[name] for name, *_ in shown if name in scores})
    if published:
        text.append(NOTES["published"])
    write_text(out / "table.md", "\n\n".join(text) + "\n")
    print(*text, f"wrote table.md to {out}", sep="\n\n")
