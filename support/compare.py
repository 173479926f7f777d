"""
support/compare.py -- several evaluated runs as the post's table and heat map, and which of their
differences are more than chance.
"""
import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np

from support.cli import UserError, picture, write_text
from support.recipes import BENCHMARK
from support.report import by_split, markdown, plain
from support.tasks import TASKS, TITLES

PUBLISHED = {  # the post's tables, WER % on RuASRBenchmark: steps, six splits, average
    "Whisper-v3": (None, (11.68, 12.23, 7.77, 11.95, 2.68, 19.87), 11.03),
    "ru_text_10pct": (1624, (6.42, 15.79, 60.69, 11.36, 1.99, 18.75), 19.17),
    "ru_only": (1000, (6.54, 13.64, 61.32, 10.06, 1.94, 22.43), 19.32),
    "en_only": (1172, (6.89, 27.92, 59.76, 8.56, 2.09, 20.03), 20.88),
    "mixed_large": (1000, (6.65, 26.69, 62.09, 11.69, 1.75, 23.82), 22.11),
    "ru_text_25pct": (1000, (6.35, 35.02, None, None, None, None), 24.02),  # nor has the post more
    "IT_fresh (no pretrain)": (2400, (14.85, 181.09, 100.67, 44.83, 24.83, 42.81), 68.18)}  # odd
HOW = "published by the post, decoded by sampling and normalised its way, see --normalizer post."
P_VALUES = (
    "Differences and, in brackets, their p-value by a paired bootstrap over utterances, {} draws. "
    "Below 0.05 a difference on these utterances is unlikely to be chance; of twenty pairs that do "
    "not differ, one will look so. Another seed of training is another source of chance, which no "
    "such test sees.")


def read_run(folder: Path) -> dict[str, dict]:
    """{name: {"step", "task", "rows"}} of the systems that were evaluated into a folder."""
    runs = {}
    try:
        result = json.loads((folder / "results.json").read_text())
        for line in (folder / "hypotheses.jsonl").read_text().strip().split("\n"):
            row = json.loads(line)
            main = row.get("run", result["run"]) == result["run"]
            name = folder.resolve().name.removeprefix("out_") if main else row["run"]
            run = runs.setdefault(name, dict(step=result["step"] if main else None, rows=[],
                                             task=result.get("task", "asr")))
            run["rows"].append({k: row[k] for k in ("split", "id", "reference", "hypothesis")})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        runs = {}
    if not runs:
        raise UserError(f"no results of eval.py in {folder}: run python eval.py --ckpt {folder}")
    return runs


def read_runs(folders: list[str]) -> dict[str, dict]:
    """read_run() of all. Raises UserError if they were not evaluated on the same utterances."""
    def texts(run, kind):
        return run["task"], [(r["split"], r["id"], r[kind]) for r in run["rows"]]

    runs = {}
    for folder in folders:
        for name, run in read_run(Path(folder)).items():
            if name in runs and texts(runs[name], "hypothesis") != texts(run, "hypothesis"):
                name = f"{folder}/{name}"  # but a baseline that several folders hold is shown once
            runs[name] = run
    first, *others = runs
    for name in others:
        if texts(runs[name], "reference") != texts(runs[first], "reference"):
            raise UserError(f"{name} was evaluated on other utterances or another --task than "
                            f"{first}: only results on the same ones compare")
    return runs


def p_value(differences: np.ndarray) -> float:
    """(R,) paired differences of the bootstrap -> two-sided p: how often the draws disagree about
    which of the two is better."""
    differences = differences[np.isfinite(differences)]
    either = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (either + 1) / (len(differences) + 1)))


def published(columns: list[str]) -> dict[str, list[float]]:
    """The post's figures for some of its splits, and their average."""
    rows = {}
    for name, (_, figures, average) in PUBLISHED.items():
        figures = dict(zip(BENCHMARK, np.array(figures, float), strict=True))  # None becomes nan
        row = [figures[c] for c in columns]
        rows[f"{name} (published)"] = [*row, average if len(row) == 6 else np.mean(row)]
    return rows


def compare(folders: list[str], grade: Callable, score: Callable, normalizer: str,
            out: Path) -> None:
    """Writes and prints table.md, best runs first, and heatmap.png; where the speech is the same,
    with the post's. grade and score are those of eval.py."""
    runs = read_runs(folders)
    first, scores = next(iter(runs.values())), {}
    columns, metric = list(by_split(first["rows"])), TASKS[first["task"]][0]
    for name, run in runs.items():
        rows = [grade(r, run["task"], normalizer) for r in run["rows"]]
        scores[name] = score(rows, metric)
    steps = {name: run["step"] for name, run in runs.items()}
    steps |= {f"{name} (published)": step for name, (step, *_) in PUBLISHED.items()}
    same = metric == "wer" and set(columns) <= set(BENCHMARK)
    theirs = published(columns if same else list(BENCHMARK))
    figures = {name: values for name, (values, _) in scores.items()} | (theirs if same else {})
    sign = 1 if metric == "wer" else -1
    figures = dict(sorted(figures.items(), key=lambda item: (np.isnan(item[1][-1]),
                                                             sign * item[1][-1])))

    def table(columns, figures):
        rows = [[name, steps[name], *map(plain, values)] for name, values in figures.items()]
        return markdown(["Run", "Steps", *columns, "Avg"], rows)
    text = [f"{TITLES[metric]}, %, normaliser: {normalizer}."
            + (f" Published rows: {HOW}" if same else ""), table(columns, figures)]
    lines = []
    for a, b in combinations([name for name in figures if name in scores], 2):
        gaps, draws = (x - y for x, y in zip(scores[a], scores[b], strict=True))
        cells = zip(gaps, map(p_value, draws), strict=True)
        cells = ["-" if np.isnan(x) else f"{x:+.2f} ({p:.3f})" for x, p in cells]
        lines.append([f"{a} - {b}", *cells])
    if lines:
        text += [P_VALUES.format(draws.shape[1]), markdown(["Difference", *columns, "Avg"], lines)]
    if metric == "wer" and not same:
        text += [f"On RuASRBenchmark, which is other speech than the above: WER, %, {HOW}",
                 table(BENCHMARK, theirs)]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.md", "\n\n".join(text) + "\n")
    plot_heatmap(figures, [*columns, "Avg"], metric, out / "heatmap.png")
    print("\n\n".join(text) + f"\n\nwrote table.md and heatmap.png to {out}")


def plot_heatmap(figures: dict, columns: list[str], metric: str, path: Path) -> None:
    """Green is good. WER is shaded by its logarithm: 1 against 2 as 50 against 100, its worst."""
    values = np.array(list(figures.values()), float)  # (runs, columns)
    wer = metric == "wer"
    low, high = (np.log(0.5), np.log(100)) if wer else (-100, 0)
    shade = np.log(np.clip(values, 0.5, 100)) if wer else -values
    size = (1.3 * len(columns) + 0.1 * max(map(len, figures)) + 0.5, 0.5 * len(figures) + 1.4)
    with picture(path, figsize=size) as (_, axis):
        shown = np.ma.masked_invalid(shade)
        axis.imshow(shown, cmap="RdYlGn_r", aspect="auto", vmin=low, vmax=high)
        for (i, j), value in np.ndenumerate(values):
            color = "white" if (shade[i, j] - low) / (high - low) > 0.83 else "black"
            axis.text(j, i, plain(value), ha="center", va="center", color=color)
        axis.axvline(len(columns) - 1.5, color="white", linewidth=4)
        axis.set_xticks(range(len(columns)), [c.replace("_", "\n", 1) for c in columns])
        axis.set_yticks(range(len(figures)), figures)
        axis.tick_params(length=0, labeltop=True, labelbottom=False)
        axis.spines[:].set_visible(False)
        axis.set_xlabel(f"{TITLES[metric]}, %")
