"""support/launch.py -- around the loop of train.py: flags, a model to start from, processes."""
import atexit
import os
import signal
import typing
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data import RETRIES
from model import BorealisForConditionalGeneration
from support import checkpoint
from support.banks import check_source
from support.cli import ArgumentParser, UserError, check_out, first_line, pick_device
from support.recipes import PRESETS, TWIN
from support.rows import BadRows
from support.storage import fingerprint, newest_step, steps_in

# ---- Flags

def parse_config(config: type, argv: list[str]):
    """Flags over preset (with --resume: over the run's configuration) over defaults -> a `config`
    of train.py; the word none switches off what may be None. Raises UserError."""
    parser = ArgumentParser(prog="train.py", description="Fit a Borealis model.").add_flags(config)
    parser.set_defaults(**PRESETS[parser.parse_args(argv).preset])
    first = parser.parse_args(argv)  # again: some presets name their --out
    names, saved = [f.name for f in fields(config)], {}
    if first.resume:
        if not (newest_step(first.out) / "state.pt").is_file():
            raise UserError(f"nothing to resume in {first.out}: leave out --resume to start")
        saved = checkpoint.training_config(first.out) | dict(out=first.out)
        parser.set_defaults(**{name: saved[name] for name in names if name in saved})
    cfg = config(**vars(parser.parse_args(argv)))
    for f in fields(config):
        if type(None) in typing.get_args(f.type) and getattr(cfg, f.name) in ("none", ""):
            setattr(cfg, f.name, None)
    for name in names[:names.index("out")]:  # the fields behind are the machine's
        if name in saved and getattr(cfg, name) != saved[name]:
            raise UserError(f"the run's --{name} was {saved[name]!r}: to change it, start another")
    check(cfg)
    return cfg

def check(cfg) -> None:
    """What the flags' own ranges cannot tell. Raises UserError."""
    if cfg.data_dir and not Path(cfg.data_dir).is_dir():
        raise UserError(f"no folder at --data_dir {cfg.data_dir}")
    if cfg.curriculum != "none":
        check_source(cfg.noise)
        check_source(cfg.rooms)
    check_out(cfg.out)
    if steps_in(cfg.out) and not cfg.overwrite and not cfg.resume:
        raise UserError(f"{cfg.out} already holds a run: --resume, --overwrite or another --out")
    for name in ("init_from", "encoder", "llm"):  # they may lie in --data_dir, too
        where = getattr(cfg, name)
        if where and cfg.data_dir and Path(cfg.data_dir, where).is_dir():
            setattr(cfg, name, str(Path(cfg.data_dir, where)))
    if cfg.resume or not cfg.init_from:
        return
    start = Path(cfg.init_from).resolve()
    if start.is_relative_to(Path(cfg.out).resolve()):
        raise UserError(f"--init_from {cfg.init_from} lies in --out: write into another folder")
    if cfg.train == "scratch":
        raise UserError("--train scratch starts from nothing: leave out --init_from")
    if cfg.init_from == TWIN["init_from"] and not start.exists():
        raise UserError(f"no {cfg.init_from} yet: python train.py --preset tiny_pretrain makes it")

def load_start(cfg) -> BorealisForConditionalGeneration:
    """What to train on, loaded; model.config.base names it for later. Raises UserError."""
    base = dict(checkpoint=None, encoder=cfg.encoder, llm=cfg.llm)
    try:
        if cfg.resume:  # on what the run was started on, wherever its flags would point by now
            config = checkpoint.read_config(newest_step(cfg.out))
            model = checkpoint.load_base(newest_step(cfg.out), config)
            model.config.base = config.base
            return model
        if cfg.init_from:
            place = checkpoint.find_checkpoint(cfg.init_from)
            model = checkpoint.load_checkpoint(place, cfg.encoder, cfg.llm)
            base["checkpoint"] = place if Path(cfg.init_from).exists() else cfg.init_from
            base["fingerprint"] = fingerprint(place)
        else:
            model = checkpoint.from_parts(cfg.encoder, cfg.llm, adapter=cfg.adapter)
    except (OSError, ValueError, RuntimeError) as e:
        parts = f"--init_from {cfg.init_from} --encoder {cfg.encoder} --llm {cfg.llm}"
        raise UserError(f"cannot start from {parts}: {first_line(e)}") from None
    here = Path(cfg.out, "step").resolve()  # as seen from the checkpoints: so all can move
    for key, where in base.items():
        if where and Path(where).exists():
            base[key] = os.path.relpath(Path(where).resolve(), here)
    model.config.base = base
    return model

# ---- Processes

def start_process(cfg) -> tuple[int, int, torch.device]:
    """(rank, number of ranks, device) of this process, as torchrun says. Raises UserError."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, gpus = torch.device(pick_device(cfg.device)), torch.cuda.device_count()
    if cfg.effective_batch % world:
        raise UserError(f"--effective_batch {cfg.effective_batch} is no multiple of {world} ranks")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= gpus:
            raise UserError(f"{world} processes, but {gpus} GPUs: torchrun --nproc_per_node={gpus}")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:  # the others may wait for long while rank 0 reads the data
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=3))
    # A step from the loader is hundreds of pieces of shared memory: by name, not by file handle.
    torch.multiprocessing.set_sharing_strategy("file_system")
    return rank, world, device

def all_sum(numbers: dict, device: torch.device) -> dict:
    """{name: number of this rank} -> {name: sum over all ranks}."""
    sums = torch.tensor([*numbers.values()], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return dict(zip(numbers, sums.tolist(), strict=True))

def add_left_out(bad: BadRows, long: BadRows, rows: list[tuple], total: dict, seen: int) -> None:
    """Count rows left out, unusable or too long. rows: this rank's, as (reason, name, too long?).
    total: on all ranks, how many (left_out) and how often no row would do (hopeless). seen: rows
    read. Raises UserError if too many are unusable; long ones do no harm."""
    if not total["left_out"]:
        return
    everyone = [rows]
    if dist.is_initialized():
        everyone *= dist.get_world_size()
        dist.all_gather_object(everyone, rows)
    for reason, name, too_long in sum(everyone, []):
        (long if too_long else bad).add(reason, name)
    if total["hopeless"]:
        raise UserError(f"{RETRIES} rows in a row cannot be used: {bad} {long}")
    if seen >= 1000:
        bad.check(seen, "training data")

def catch_signals() -> list[int]:
    """-> a list that fills with Ctrl-C and SIGTERM as they come; a second Ctrl-C does not wait."""
    caught = []

    def remember(number, frame):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

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
