"""support/ranks.py -- a run's processes: devices, batch size, sharding, sums, signals, workers."""
import atexit
import os
import signal
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from data import RETRIES
from support.cli import UserError, pick_device
from support.meter import memory
from support.rows import BadRows

def start_process(cfg) -> tuple[int, int, torch.device]:
    """(rank, number of ranks, device) of this process, as torchrun says. Raises UserError."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpu, gpus = pick_device(cfg.device) == "cuda", torch.cuda.device_count()
    if cfg.effective_batch % world:
        raise UserError(f"--effective_batch {cfg.effective_batch} is no multiple of {world} ranks")
    device = torch.device("cpu")
    if gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= gpus:
            raise UserError(f"{world} processes, but {gpus} GPUs: torchrun --nproc_per_node={gpus}")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:  # the others may wait for long while rank 0 reads the data
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=3))
    # A step from the loader is hundreds of pieces of shared memory: by name, not by file handle.
    torch.multiprocessing.set_sharing_strategy("file_system")
    return rank, world, device

def pick_batch(cfg, model, device: torch.device, world: int) -> int:
    """--batch_size; by default as many rows of --max_tokens as fit the GPU, see meter.memory()."""
    if cfg.batch_size or device.type != "cuda":
        return cfg.batch_size or 1
    room, ranks = 0.85 * torch.cuda.get_device_properties(device).total_memory, cfg.shard * world
    for rows in (16, 8, 4, 2):
        need = memory(model, *[rows * cfg.max_tokens] * 2, cfg.grad_checkpoint, max(1, ranks))
        if cfg.effective_batch // world % rows == 0 and sum(need.values()) < room:
            return rows
    return 1

def shard(model: torch.nn.Module) -> torch.nn.Module:
    """FSDP2: each rank keeps a part of weights, gradients, moments; it gathers layers in turn."""
    gpu = model.device.type == "cuda"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if gpu else MixedPrecisionPolicy()
    for part in (*model.llm.model.layers, model.adapter):
        fully_shard(part, mp_policy=policy)
    frozen = {p for p in model.encoder.parameters() if not p.requires_grad}
    return fully_shard(model, mp_policy=policy, ignored_params=frozen)

def clip_gradients(parameters: list, limit: float) -> float:
    """Scale all gradients so that their norm is at most `limit` -> the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

def all_sum(numbers: dict, device: torch.device) -> dict:
    """{name: number of this rank} -> {name: sum over all ranks}."""
    sums = torch.tensor([*numbers.values()], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return dict(zip(numbers, sums.tolist(), strict=True))

def add_left_out(bad: BadRows, long: BadRows, rows: list[tuple], total: dict, seen: int) -> None:
    """Count a step's rows left out; rows: this rank's, as (reason, name, too long?). total: sums of
    collate()'s counts. seen: rows read so far. UserError if too many are unusable, not too long."""
    if not total["left_out"]:
        return
    everyone = [rows] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(everyone) > 1:
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

def quiet_worker(_: int) -> None:  # Ctrl-C and SIGTERM go to all processes: the loop answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
