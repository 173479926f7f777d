"""
support/launch.py -- what train.py needs around its loop: flags, a model to start from, processes.
"""
import atexit
import os
import signal
import sys
import typing
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data import RETRIES
from model import BorealisConfig, BorealisForConditionalGeneration
from support import checkpoint
from support.banks import check_source
from support.cli import ArgumentParser, UserError, check_out, first_line, pick_device
from support.recipes import PRESETS, TWIN
from support.rows import BadRows


def parse_config(config: type, argv: list[str]):
    """Flags over preset (with --resume: over the run's configuration) over defaults -> a `config`
    of train.py. Raises UserError."""
    parser = ArgumentParser(prog="train.py", description="Fit a Borealis model.").add_flags(config)
    parser.set_defaults(**PRESETS[parser.parse_args(argv).preset])
    cfg = parse(parser, config, argv)  # again: some presets name their --out
    if cfg.resume:
        if not (checkpoint.newest_step(cfg.out) / "state.pt").is_file():
            raise UserError(f"nothing to resume in {cfg.out}: leave out --resume to start")
        names = [f.name for f in fields(config)]
        saved, given = checkpoint.training_config(cfg.out), ("out", "resume", "overwrite")
        saved = {name: saved[name] for name in names if name in saved and name not in given}
        parser.set_defaults(**saved)
        cfg = parse(parser, config, argv)
        for name in names[:names.index("out")]:  # the fields behind are the machine's
            if name in saved and getattr(cfg, name) != saved[name]:
                raise UserError(f"--resume goes on with the run's own configuration, but --{name} "
                                f"was {saved[name]!r}; to change it, start with another --out")
    elif cfg.data_dir:  # what comes from the hub may lie there
        for name in ("init_from", "encoder", "llm"):
            local = Path(cfg.data_dir, getattr(cfg, name) or "")
            if getattr(cfg, name) and local.is_dir():
                setattr(cfg, name, str(local))
    check(cfg)
    return cfg


def parse(parser: ArgumentParser, config: type, argv: list[str]):
    """Flags -> a `config`. The word none switches off what may be None."""
    values = vars(parser.parse_args(argv))
    for f in fields(config):
        if type(None) in typing.get_args(f.type) and values[f.name] in ("none", ""):
            values[f.name] = None
    return config(**values)


def check(cfg) -> None:
    """What the flags' own ranges cannot tell. Raises UserError."""
    out, start = Path(cfg.out).resolve(), Path(cfg.init_from or "nowhere").resolve()
    if checkpoint.steps_in(out) and not (cfg.resume or cfg.overwrite):
        raise UserError(f"{cfg.out} already holds a run: --resume goes on with it, --overwrite "
                        "replaces it, --out DIR starts another")
    if cfg.init_from and start.is_relative_to(out) and not cfg.resume:
        raise UserError(f"--init_from {cfg.init_from} lies in --out: write into another folder")
    if cfg.data_dir and not Path(cfg.data_dir).is_dir():
        raise UserError(f"no folder at --data_dir {cfg.data_dir}")
    if cfg.train == "scratch" and cfg.init_from:
        raise UserError("--train scratch starts from nothing: leave out --init_from")
    if cfg.preset.startswith("tiny_") and cfg.init_from == TWIN["init_from"] and not start.exists():
        raise UserError(f"preset {cfg.preset} starts from {cfg.init_from}: make it first, with "
                        "python train.py --preset tiny_pretrain")
    if cfg.curriculum != "none":
        check_source(cfg.noise)
        check_source(cfg.rooms)
    check_out(cfg.out)


def load_start(cfg) -> BorealisForConditionalGeneration:
    """What to train on, loaded; model.config.base names it for later. Raises UserError."""
    base = dict(checkpoint=None, encoder=cfg.encoder, llm=cfg.llm)
    try:
        if cfg.resume:  # on what the run was started on, wherever its flags would point by now
            step = checkpoint.newest_step(cfg.out)
            config = BorealisConfig.from_pretrained(step)
            model = checkpoint.load_base(step, config)
            model.config.base = config.base
            return model
        if cfg.init_from:
            place = checkpoint.find_checkpoint(cfg.init_from)
            model = checkpoint.load_checkpoint(place, cfg.encoder, cfg.llm)
            base["checkpoint"] = place if Path(cfg.init_from).exists() else cfg.init_from
        else:
            model = checkpoint.from_parts(cfg.encoder, cfg.llm, adapter=cfg.adapter)
    except (OSError, ValueError, RuntimeError) as e:
        parts = cfg.init_from or f"{cfg.encoder} and {cfg.llm}"
        raise UserError(f"cannot start from {parts}: {first_line(e)}. Give hub names or folders "
                        "with --encoder, --llm and --init_from, or try --preset tiny") from None
    # Folders are named as seen from the checkpoints, which lie one below --out: all can move.
    here = Path(cfg.out, "step").resolve()
    base = {k: os.path.relpath(Path(v).resolve(), here) if v and Path(v).exists() else v
            for k, v in base.items()}
    if cfg.init_from:
        base["fingerprint"] = checkpoint.fingerprint(place)
    model.config.base = base
    return model


def start_process(cfg) -> tuple[int, int, torch.device]:
    """(rank, number of ranks, device) of this process, as torchrun says. Raises UserError."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, gpus = torch.device("cpu"), torch.cuda.device_count()
    if cfg.effective_batch % world:
        raise UserError(f"--effective_batch {cfg.effective_batch} cannot be shared by {world} "
                        "processes: give a multiple")
    if pick_device(cfg.device) == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= gpus:
            raise UserError(f"{world} processes, but {gpus} GPUs: torchrun --nproc_per_node={gpus}")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:  # the others may wait for long while rank 0 reads the data
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=3))
    # A loader's worker hands over whole steps, each in hundreds of pieces of shared memory. By
    # name, they take no file handles, of which a process has 1024.
    torch.multiprocessing.set_sharing_strategy("file_system")
    return rank, world, device


def all_sum(numbers: dict, device: torch.device) -> dict:
    """{name: number of this rank} -> {name: sum over all ranks}."""
    sums = torch.tensor([*numbers.values()], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return dict(zip(numbers, sums.tolist(), strict=True))


class LeftOut:
    """Counts the rows left out on all ranks. Too many unusable ones stop the run; those that are
    only too long do no harm."""

    def __init__(self, strict: bool):
        self.bad, self.long = BadRows(strict), BadRows()

    def add(self, rows: list[tuple], total: dict, seen: int) -> None:
        """rows: this rank's, as (reason, name, is it too long?). total: their number on all ranks
        (left_out), and how often no usable row came up (hopeless). seen: rows read until now.
        Raises UserError, on all ranks."""
        if not total["left_out"]:
            return
        everyone = [rows]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, rows)
        for reason, name, too_long in sum(everyone, []):
            (self.long if too_long else self.bad).add(reason, name)
        if total["hopeless"]:
            raise UserError(f"{RETRIES} rows in a row cannot be used: {self.bad} {self.long}")
        if seen >= 1000:
            self.bad.check(seen, "training data")

    def report(self) -> None:
        for rows in (self.bad, self.long):
            if rows.reasons:
                print(f"left out, and replaced by the next rows: {rows}", file=sys.stderr)


def catch_signals() -> list[int]:
    """-> a list that fills with Ctrl-C and SIGTERM as they come; a second Ctrl-C does not wait."""
    caught = []

    def remember(number, frame):
        if number == signal.SIGINT and caught:
            raise KeyboardInterrupt
        caught.append(number)

    signal.signal(signal.SIGINT, remember)
    signal.signal(signal.SIGTERM, remember)
    return caught


def load(dataset, schedule, workers: int, pin_memory: bool):
    """-> what dataset.collate makes of each entry of the schedule, in turn."""
    batches = iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=schedule, collate_fn=dataset.collate, num_workers=workers,
        pin_memory=pin_memory, worker_init_fn=quiet_worker))
    if workers:  # they ignore SIGTERM: end them before Python's own exit would wait for them
        atexit.register(batches._shutdown_workers)
    return batches


def quiet_worker(_: int) -> None:
    """Terminals send Ctrl-C, and queues SIGTERM, to all processes; only the loop may answer."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
