"""support/compare.py -- runs in the post's table, and which differences are real."""
import json
from itertools import combinations
from pathlib import Path
import numpy as np
from support.cli import UserError, as_user_error, write_text
from support.recipes import BENCHMARK, PUBLISHED
from support.report import NOTES, by_split, markdown, plain
from support.tasks import TASKS, TITLES

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

def compare(folders: list[str], grade, score, normalizer: str, out: Path):
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
