"""
support/decoding.py -- have every utterance answered: in batches, on all ranks, whatever recording
or generation fails, and going on where an earlier attempt stopped. Until hypotheses.jsonl is there,
answers lie in hypotheses.SETTINGS.RANK.part.jsonl. SETTINGS is a digest of all that they depend on;
below it a row is known by its split and number.
"""
import contextlib
import hashlib
import io
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import BadRow, load_audio
from model import SAMPLE_RATE
from support.checkpoint import find_checkpoint
from support.cli import pick_device
from support.pauses import without_thoughts
from support.tasks import estimate_snr

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
BLOCK = 4  # batches
ROW = dict(settings="", split="", row=0, id="", reference="", hypothesis="", failed=None,
           seconds=0.0, took=0.0, tokens=0, cut=False, snr=None)  # a line of hypotheses.jsonl


def join_ranks(device: str) -> torch.device:
    """"cpu", "cuda" or "auto" -> this rank's device; the ranks are connected, for texts only."""
    device = torch.device(pick_device(device))
    if WORLD > 1:
        dist.init_process_group("gloo", timeout=timedelta(hours=3))
    gpu = int(os.environ.get("LOCAL_RANK", 0)) % max(1, torch.cuda.device_count())
    return torch.device("cuda", gpu) if device.type == "cuda" else device


def first_rank_first(call: Callable):
    """call() on rank 0, which fetches or makes what the others find then, without a word."""
    if RANK > 0:
        dist.barrier()
    with contextlib.redirect_stderr(io.StringIO() if RANK > 0 else sys.stderr):
        result = call()
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    return result


# -----------------------------------------------------------------------------
# What answers depend on

def digest(*facts) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def stamp(audio: str | bytes) -> tuple:
    """A file by its name, size and time; sound in memory by what it is."""
    if not isinstance(audio, str):
        return len(audio), zlib.crc32(audio)
    state = os.stat(audio) if os.path.isfile(audio) else None
    return audio, state and (state.st_size, state.st_mtime_ns)


def digest_samples(splits: dict[str, list]) -> str:
    return digest([(split, s.name, s.messages(), [stamp(a) for a in s.audio])
                   for split, samples in splits.items() for s in samples])


def digest_model(where: str) -> str:
    """A local model by its files; one on the hub by its name."""
    if not Path(where).exists():
        return where
    files = [p for p in sorted(find_checkpoint(where).iterdir()) if p.name != "results.json"]
    return digest([stamp(str(p)) for p in files if p.suffix in (".json", ".safetensors", ".bin")])


# -----------------------------------------------------------------------------
# Decoding

@dataclass
class System:
    """Who answers: answer(samples, their waves) -> [(text, tokens generated, cut by the limit?)]"""
    name: str
    answer: Callable
    facts: tuple        # what its answers depend on, besides the samples
    settings: str = ""  # digest of both

    def parts(self, folder: Path) -> list[Path]:
        return sorted(folder.glob(f"hypotheses.{self.settings}.*.part.jsonl"))

    def read(self, paths: list[Path]) -> dict[tuple, dict]:
        """{(split, number): row}, but what failed is tried again. A kill may leave half a line."""
        answers = {}
        for path in paths:
            for line in path.read_bytes().split(b"\n") if path.exists() else ():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    row = json.loads(line)
                    if row["settings"] == self.settings and not row["failed"]:
                        answers[row["split"], row["row"]] = {name: row[name] for name in ROW}
        return answers

    def load(self, block: list[tuple]) -> list[tuple]:
        """[((split, number), sample)] -> [(row, sample, waves)], longest first: memory shows early.
        A recording that cannot be read makes a failed row."""
        queue = []
        for (split, number), sample in block:
            row = ROW | dict(settings=self.settings, split=split, row=number, id=sample.name,
                             reference=sample.answer)
            silence = not any(c.isalnum() for c in sample.answer)  # no error where nobody speaks
            waves = []
            try:
                waves = [load_audio(a, silence=silence) for a in sample.audio]
            except BadRow as e:
                row["failed"] = str(e)
            row["seconds"] = round(sum(map(len, waves)) / SAMPLE_RATE, 3)
            row["snr"] = round(min(map(estimate_snr, waves)), 1) if waves else None
            queue.append((row, sample, waves))
        return sorted(queue, key=lambda item: -item[0]["seconds"])

    def ask(self, batch: list[tuple]) -> list[dict]:
        """[(row, sample, waves)] -> the rows, filled in. A batch that raises is asked again one by
        one; an utterance that raises alone keeps an empty hypothesis, and stays in the score."""
        rows, samples, waves = zip(*batch, strict=True)
        began = time.perf_counter()
        try:
            answers = self.answer(samples, waves)
        except Exception:
            answers = []
            for sample, wave in zip(samples, waves, strict=True):
                try:
                    answers += self.answer([sample], [wave])
                except Exception as e:
                    answers.append(e)
        took = round((time.perf_counter() - began) / len(rows), 5)
        for row, x in zip(rows, answers, strict=True):
            row["took"] = took
            if isinstance(x, Exception):
                reason = str(x) if isinstance(x, BadRow) else f"{type(x).__name__}: {x}"
                row["failed"] = reason.splitlines()[0]
            else:
                text, row["tokens"], row["cut"] = x
                row["hypothesis"] = without_thoughts(text)
        return rows

    def ask_block(self, block: list[tuple], done: dict, batch_size: int) -> Iterator[list[dict]]:
        """The rows of a block, batch by batch; batches that are done are left out."""
        queue = self.load(block)
        yield [row for row, *_ in queue if row["failed"]]
        queue = [item for item in queue if not item[0]["failed"]]
        for i in range(0, len(queue), batch_size):
            batch = queue[i:i + batch_size]
            if not all((row["split"], row["row"]) in done for row, *_ in batch):
                yield self.ask(batch)

    def decode(self, jobs: list[tuple], folder: Path, batch_size: int, reuse: bool) -> dict:
        """[((split, number), sample)] -> {(split, number): row}, the same on all ranks.

        Batches are made within blocks of the whole list, and the blocks dealt out over the ranks:
        what shares a batch depends neither on their number nor on where an attempt stopped."""
        done = self.read(self.parts(folder) + [folder / "hypotheses.jsonl"] * reuse)
        if RANK == 0 and (again := sum(key in done for key, _ in jobs)):
            print(f"{self.name}: {again} of {len(jobs)} utterances were answered before",
                  file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"hypotheses.{self.settings}.{RANK}.part.jsonl"
        blocks = [jobs[i:i + BLOCK * batch_size] for i in range(0, len(jobs), BLOCK * batch_size)]
        blocks = blocks[RANK::WORLD]
        bar = tqdm(total=sum(map(len, blocks)), desc=self.name, unit=" utterances",
                   mininterval=0.1 if sys.stderr.isatty() else 10, disable=RANK > 0)
        try:
            for block in blocks:
                if not all(key in done for key, _ in block):
                    for rows in self.ask_block(block, done, batch_size):
                        done.update({(row["split"], row["row"]): row for row in rows})
                        with open(part, "a", encoding="utf-8") as f:
                            f.writelines(f"\n{json.dumps(r, ensure_ascii=False)}\n" for r in rows)
                bar.update(len(block))
        except KeyboardInterrupt:
            if RANK == 0:
                print(f"\nstopped; {len(done)} answers are kept in {folder}, the same command goes "
                      "on with them", file=sys.stderr)
            raise
        finally:
            bar.close()
        everyone = [done] * WORLD
        if WORLD > 1:
            dist.all_gather_object(everyone, done)
        return {key: row for answers in everyone for key, row in answers.items()}
