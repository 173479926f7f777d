"""support/decoding.py -- utterances answered in batches, on all ranks; stopped, it goes on."""
import atexit
import contextlib
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from tqdm import tqdm
from model import SAMPLE_RATE
from support import checkpoint, cli, pauses, storage
from support.rows import BadRow, load_audio

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
ROW = dict(settings="", split="", row=0, id="", reference="", hypothesis="", failed=None,
           seconds=0.0, took=0.0, tokens=0, cut=False)  # a line of hypotheses.jsonl

def join_ranks(device: str) -> torch.device:  # this rank's; the ranks are connected, for texts only
    device = torch.device(cli.pick_device(device))
    if WORLD > 1:
        dist.init_process_group("gloo", timeout=timedelta(hours=3))
        atexit.register(dist.destroy_process_group)  # or gloo's threads may abort the exit
    gpu = int(os.environ.get("LOCAL_RANK", 0)) % max(1, torch.cuda.device_count())
    return torch.device("cuda", gpu) if device.type == "cuda" else device

def first_rank_first(call: Callable, *args):
    """call(*args) on rank 0, which fetches or makes what the other ranks find then, in silence."""
    if RANK > 0:
        dist.barrier()
    with contextlib.redirect_stderr(io.StringIO() if RANK > 0 else sys.stderr):
        result = call(*args)
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    return result

def stamp(audio: str | bytes) -> tuple | str:  # a file by name, size, time; sound by what it is
    if not isinstance(audio, str):
        return hashlib.sha256(audio).hexdigest()
    return audio, os.path.isfile(audio) and (os.path.getsize(audio), os.path.getmtime(audio))

def digest_model(where: str) -> str:  # a local one by its files, one on the hub by its name
    if not Path(where).exists():
        return where
    folder = checkpoint.find_checkpoint(where)
    files = [p for p in sorted(folder.glob("*.json")) if p.name != "results.json"]
    return cli.digest(storage.fingerprint(folder), [(p.name, p.read_bytes()) for p in files])

@dataclass
class System:
    """Who answers: answer(samples, their waves) -> [(text, tokens generated, cut by the limit?)]"""
    name: str
    answer: Callable
    facts: tuple        # what its answers depend on, besides the samples
    settings: str = ""  # digest of both
    def read(self, folder: Path, reuse: bool) -> dict:  # {(split, number): row} without what failed
        answers = {}
        for path in sorted(folder.glob("hypotheses*.jsonl" if reuse else "*.part.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line
                    row = json.loads(line)
                    if row["settings"] == self.settings and not row["failed"]:
                        answers[row["split"], row["row"]] = {name: row[name] for name in ROW}
        return answers
    def ask(self, batch: list[tuple]) -> list[dict]:
        """[(row, sample, waves)] -> the rows, filled in; where all together raise, one by one."""
        rows, samples, waves = zip(*batch, strict=True)
        began = time.perf_counter()
        try:
            answers = self.answer(samples, waves)
        except Exception as e:
            reason = ("" if isinstance(e, BadRow) else f"{type(e).__name__}: ") + cli.first_line(e)
            if len(batch) == 1:
                return [rows[0] | dict(failed=reason)]
            tqdm.write(f"{self.name}: a batch fails, so one by one: {reason}", sys.stderr)
            return [row for item in batch for row in self.ask([item])]
        took = round((time.perf_counter() - began) / len(rows), 5)
        return [row | dict(hypothesis=pauses.without_thoughts(text), tokens=n, cut=cut, took=took)
                for row, (text, n, cut) in zip(rows, answers, strict=True)]
    def ask_all(self, jobs: list[tuple]) -> Iterator[dict]:  # a batch -> its rows
        batch = []
        for (split, i), sample in jobs:
            row = ROW | dict(settings=self.settings, split=split, row=i, id=sample.name,
                             reference=sample.answer)
            silence = not any(c.isalnum() for c in sample.answer)  # no error where nobody speaks
            try:
                waves = [load_audio(a, silence=silence, max_seconds=3600) for a in sample.audio]
                row["seconds"] = round(sum(map(len, waves)) / SAMPLE_RATE, 3)
                batch.append((row, sample, waves))
            except BadRow as e:
                yield row | dict(failed=str(e))
        if batch:
            yield from self.ask(batch)
    def decode(self, jobs: list[tuple], folder: Path, batch_size: int, reuse: bool) -> dict:
        """[((split, number), sample)] -> {(split, number): row}, the same on all ranks."""
        # They share out batches: what is in one depends neither on their number nor on a stop.
        done = self.read(folder, reuse)
        if RANK == 0 and (n := sum(key in done for key, _ in jobs)):
            print(f"{self.name}: {n} of {len(jobs)} utterances answered before", file=sys.stderr)
        jobs = sorted(jobs, key=lambda job: -len(job[1].answer))  # alike, so as not to wait
        batches = [jobs[i:i + batch_size] for i in range(0, len(jobs), batch_size)][RANK::WORLD]
        batches = [batch for batch in batches if any(key not in done for key, _ in batch)]
        bar = tqdm(total=sum(map(len, batches)), desc=self.name, unit=" rows", disable=RANK > 0)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"hypotheses.{self.settings}.{RANK}.part.jsonl"
        with bar, open(part, "a", buffering=1, encoding="utf-8") as file:  # 1: line by line
            for batch in batches:
                for row in self.ask_all(batch):
                    done[row["split"], row["row"]] = row
                    file.write(f"\n{json.dumps(row, ensure_ascii=False)}\n")
                bar.update(len(batch))
        everyone = [done] * WORLD
        if WORLD > 1:
            dist.all_gather_object(everyone, done)
        return {key: row for answers in everyone for key, row in answers.items()}
