"""support/storage.py -- a run's folder: checkpoints, written beside training; strict reading."""
import fcntl
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from transformers.modeling_utils import load_state_dict
from support import cli, lora, recipes

def steps_in(out: str | Path) -> list[Path]:
    """A run's, oldest first: real folders, named step- and 7 digits; all else is the user's."""
    steps = sorted(Path(out).glob("step-" + 7 * "[0-9]"))
    return [path for path in steps if path.is_dir() and not path.is_symlink()]

def newest_step(folder: str | Path) -> Path:  # of a run; any other folder: itself
    steps = [] if (Path(folder) / "config.json").exists() else steps_in(folder)
    return steps[-1] if steps else Path(folder)

# ---- Writing
class Saver:
    """Writes checkpoints in a thread while training goes on; one process a folder, or UserError."""
    thread = ThreadPoolExecutor(1)
    def __init__(self, out: Path, keep: int, rank: int):
        self.out, self.keep, self.rank = out, keep, rank
        self.pending = self.thread.submit(int)
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
            with cli.as_user_error(f"another process is writing into {out}: wait until it ends, or "
                               "choose another --out: ", OSError):
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until we end
    def clear(self) -> None:  # of what an earlier run and its evaluation left, and nothing else
        prune(steps_in(self.out))
        for name in recipes.TABLES["run"]["results"]:
            (self.out / name).unlink(missing_ok=True)
    def copy(self, x: torch.Tensor) -> torch.Tensor | None:  # all ranks gather what is sharded
        x = x.full_tensor() if isinstance(x, DTensor) else x.detach()
        return x.to("cpu", copy=True).contiguous() if self.rank == 0 else None
    def save(self, model: torch.nn.Module, optimizers, config: dict, step: int) -> None:
        """On all ranks. Raises OSError if the last one was not written."""
        self.wait()
        state = lora.stored(model), [optimizer.state_dict() for optimizer in optimizers]
        tensors, moments = tree_map_only(torch.Tensor, self.copy, state)
        if self.rank == 0:
            state = dict(step=step, optimizer=moments)
            self.pending = self.thread.submit(self.write, model, tensors, state, config)
    def wait(self) -> None:
        if error := self.pending.exception():  # torch, safetensors, tokenizers have own kinds
            shutil.rmtree(self.out / ".new-step", ignore_errors=True)  # it takes room
            raise OSError(f"cannot write to {self.out}: {cli.first_line(error)}")
    def close(self) -> None:
        self.wait()
        if self.rank == 0:
            os.remove(self.out / ".lock")
            os.close(self.lock)
    def write(self, model, tensors: dict, state: dict, config: dict) -> None:
        """out/step-0000500, whole or not there at all; of the old ones the newest `keep` stay."""
        fresh = self.out / ".new-step"
        shutil.rmtree(fresh, ignore_errors=True)  # of a kill
        model.config.save_pretrained(fresh)
        save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
        model.tokenizer.save_pretrained(fresh)
        text = json.dumps(config | {"step": state["step"]}, indent=1, ensure_ascii=False)
        (fresh / "train_config.json").write_text(text)
        torch.save(state, fresh / "state.pt")
        for path in fresh.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # else a power cut may leave empty files behind
        os.replace(fresh, self.out / f"step-{state['step']:07d}")
        if self.keep:
            prune(steps_in(self.out)[:-self.keep])

def explained(e: Exception, out: str | Path) -> Exception:
    """What ends a run -> an OSError that says what is left, if the machine did it; else itself."""
    if isinstance(e, torch.OutOfMemoryError):
        return cli.UserError(f"use --grad_checkpoint or a lower --batch_size: {cli.first_line(e)}")
    lost = "DataLoader worker (pid", "gloo"  # torch's words when a loader or another rank is gone
    if isinstance(e, RuntimeError) and any(words in str(e) for words in lost):
        e = ChildProcessError("a process of the run was killed: too little memory?")
    if isinstance(e, BrokenPipeError) or not isinstance(e, OSError):
        return e
    Saver.thread.submit(int).result()  # what is being written is written first
    last = ["none", *steps_in(out)][-1]
    return OSError(f"{cli.first_line(e)}; last checkpoint: {last}. Fix that, then --resume if any")

def prune(folders: list[Path]) -> None:  # half deleted, none looks like a checkpoint
    for old in folders:
        doomed = old.with_name(".old-step")
        shutil.rmtree(doomed, ignore_errors=True)
        shutil.rmtree(old.replace(doomed))

# ---- Reading
@torch.no_grad()
def restore_weights(folder: str | Path, model: torch.nn.Module) -> None:
    """A checkpoint's tensors (a run's: the newest), into a model prepared as it was. ValueError."""
    tensors, mine = read_weights(newest_step(folder)), lora.stored(model)
    both = mine.keys() & tensors.keys()
    resized = [name for name in both if mine[name].shape != tensors[name].shape]
    check_state_dict(folder, missing_keys=mine.keys() - both, mismatched_keys=resized,
                     unexpected_keys=tensors.keys() - both)
    for name, p in mine.items():
        p.copy_(tensors[name])

def restore(out: str | Path, optimizers: list) -> int:
    """The newest checkpoint's state, mapped, into optimizers that may be sharded -> its step."""
    saved = torch.load(newest_step(out) / "state.pt", "cpu", weights_only=True, mmap=True)
    for optimizer, state in zip(optimizers, saved["optimizer"], strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, moments in state["state"].items():
            for name, x in moments.items():
                if isinstance(p := params[i], DTensor) and x.dim():
                    moments[name] = distribute_tensor(x, p.device_mesh, p.placements)
        optimizer.load_state_dict(state)
    return saved["step"]

def fingerprint(folder: Path) -> str:
    """Short hash of a folder's weight files, from their names, sizes and some of their bytes."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as f:
            for i in range(64):
                f.seek(size * i // 64)
                digest.update(f.read(4096))
    return digest.hexdigest()[:16]

def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors or else .bin files. Raises ValueError."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"no checkpoint in {folder}: train one with train.py --preset tiny")
    tensors = {}
    for file in files:
        try:
            tensors |= load_state_dict(file)
        except Exception as e:  # pickle's and safetensors' own kinds
            raise ValueError(f"{file} is no file of plain tensors ({type(e).__name__})") from None
    return tensors

def check_state_dict(where: str | Path, **kinds) -> None:
    """ValueError if there are any. kinds: missing_keys, ..., as in transformers' loading info."""
    for kind, keys in kinds.items():
        if keys:
            some = f"{len(keys)} {kind.replace('_', ' ')} {', '.join(map(str, sorted(keys)[:3]))}"
            raise ValueError(f"the weights in {where} do not fit: {some}")
