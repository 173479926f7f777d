"""support/storage.py -- a run's folder: out/step-0000500, ..., each a checkpoint: model.safetensors
has what trained (all, if it stands on no base), state.pt the optimizer, train_config.json the
flags. Reading is strict, and unpickles nothing that could execute."""
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support import lora
from support.cli import UserError, first_line

def steps_in(out: str | Path) -> list[Path]:
    """The step-* folders of a run, oldest first."""
    steps = [p for p in Path(out).glob("step-*") if p.name[5:].isdigit()]
    return sorted(steps, key=lambda p: int(p.name[5:]))

def newest_step(folder: str | Path) -> Path:
    """A run's folder -> its newest step; any other folder -> itself."""
    steps = [] if (Path(folder) / "config.json").exists() else steps_in(folder)
    return steps[-1] if steps else Path(folder)

def save_step(out: Path, model: torch.nn.Module, optimizer, config: dict, step: int, keep: int):
    """out/step-0000500, whole or not there at all; then all but the newest `keep` go (0: none)."""
    for leftover in out.glob(".*-step"):  # of a kill
        shutil.rmtree(leftover)
    fresh = out / ".new-step"
    model.config.save_pretrained(fresh)
    tensors = {name: p.detach().contiguous() for name, p in lora.stored(model).items()}
    save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
    model.tokenizer.save_pretrained(fresh)
    text = json.dumps(config | {"step": step}, indent=1, ensure_ascii=False)
    (fresh / "train_config.json").write_text(text)
    torch.save(dict(step=step, optimizer=optimizer.state_dict()), fresh / "state.pt")
    os.replace(fresh, out / f"step-{step:07d}")
    if keep:
        prune(steps_in(out)[:-keep])

def prune(folders: list[Path]) -> None:
    """Delete checkpoints; half deleted, none looks like one."""
    for old in folders:
        doomed = old.with_name(".old-step")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(old, doomed)
        shutil.rmtree(doomed)

def restore(out: str | Path, model: torch.nn.Module, optimizer, device: torch.device | str) -> int:
    """A run's newest checkpoint, into model and optimizer -> the step to go on with."""
    folder = newest_step(out)
    state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
    try:
        load_stored(model, read_weights(folder), folder)
    except ValueError as e:
        raise UserError(first_line(e)) from None
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]

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
    """All tensors of a folder, safetensors or .bin, one file or shards. Raises ValueError."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"no checkpoint in {folder}: train one with train.py --preset tiny")
    tensors = {}
    for file in files:
        try:
            tensors |= load_file(file) if file.suffix == ".safetensors" else torch.load(
                file, weights_only=True, mmap=True)
        except Exception as e:  # pickle's and safetensors' own kinds
            raise ValueError(f"{file} is no file of plain tensors ({type(e).__name__})") from None
    return tensors

@torch.no_grad()
def load_stored(model: torch.nn.Module, tensors: dict, where: Path) -> None:
    """Copy a checkpoint's tensors into lora.stored(model), strictly. Raises ValueError."""
    mine = lora.stored(model)
    both = mine.keys() & tensors.keys()
    resized = [name for name in both if mine[name].shape != tensors[name].shape]
    check_state_dict(where, missing_keys=mine.keys() - both,
                     unexpected_keys=tensors.keys() - both, mismatched_keys=resized)
    for name, p in mine.items():
        p.copy_(tensors[name])

def check_state_dict(where: str | Path, **kinds) -> None:
    """ValueError if there are any. kinds: missing_keys, ..., as in transformers' loading info."""
    for kind, keys in kinds.items():
        names = sorted(key[0] if isinstance(key, tuple) else key for key in keys)
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise ValueError(f"the weights in {where} do not fit: {kind.replace('_', ' ')} {some}")
