"""
train.py -- fit a Borealis model: one flat loop for a laptop, one GPU, or eight under torchrun.

    torchrun --nproc_per_node=8 train.py                       # the post's best run: LoRA + adapter, 90 % audio, 10 % text
    torchrun --nproc_per_node=8 train.py --preset pretrain     # any other of its runs; --data_dir for a machine offline
    python train.py --preset tiny                              # from nothing, on speech made here; minutes on a CPU
    python train.py --preset tiny_ru_only                      # the post's runs on a laptop; first --preset tiny_pretrain
    python train.py --preset tiny --train_manifest my.jsonl    # from your own recordings, with any preset
    python train.py --resume --out out                         # go on where a run stopped

Every field of TrainConfig is a flag. A run writes into --out: metrics.jsonl, loss.png, and checkpoints step-0000500, ... with
config.json, model.safetensors (what was trained; config.json names the rest), the tokenizer, train_config.json and
state.pt (what --resume reads besides).
"""
import atexit
import contextlib
import difflib
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, Optional

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from augment import CURRICULUM, Augmenter, check_source, open_banks
from data import GRAMMAR, MIXES, POOLS, RETRIES, ArgumentParser, BadRows, Chain, Dataset, Rows, Schedule, UserError, check_out, \
    picture, pick_device, read_manifest, replace_file, run, texts_of, tiny_pool, train_tokenizer, usable
from model import ENCODER, LLM, BorealisConfig, BorealisForConditionalGeneration, count, find_checkpoint, fingerprint, \
    init_from_scratch, load_base, load_checkpoint, newest_step, read_weights, tiny_config

# -----------------------------------------------------------------------------
# Configuration: the defaults are the full-size run, a preset changes some, flags change any

@dataclass
class TrainConfig:
    preset: str = HfArg(default="ru_text_10pct", help="one of the post's runs; tiny, or tiny_ and its name, on a laptop")
    out: str = HfArg(default="out", aliases="--out_dir", help="folder of the run")
    resume: bool = HfArg(default=False, help="go on from the newest checkpoint in --out, with its configuration")
    overwrite: bool = HfArg(default=False, help="start anew although --out holds a run")
    # data
    mix: Optional[str] = HfArg(default="ru_text_10pct", help="which pools, in which shares: python data.py --mixes")
    data_dir: Optional[str] = HfArg(default=None, help="folder with copies of what the hub has, at owner/name: datasets, and models")
    max_rows: Optional[int] = HfArg(default=None, help="of each dataset; then the hub streams them: for a first trial")
    train_manifest: Optional[str] = HfArg(default=None, help="JSONL with your own data (see data.py) instead of a mix")
    strict: bool = HfArg(default=False, help="stop at the first unusable row instead of counting it")
    embedded: bool = HfArg(default=False, help="the mix's pools from the embedded corpus instead of the hub")
    lang: str = HfArg(default="ru", help="of the embedded corpus, for transcription only: ru, en, or ru,en")
    utterances: int = HfArg(default=12000, help="how many the embedded corpus speaks for a pool")
    curriculum: str = HfArg(default="none", help="epochs at which the stages clean, light, intense and heavy of augment.py "
                            "start, like 0,1,3,4, the original's; fractions allowed; none: audio as it is")
    noise: str = HfArg(default="made", help="for the curriculum: made, hub (Vikhrmodels/Audio_Noise_Dataset), or a folder")
    rooms: str = HfArg(default="made", help="impulse responses for the curriculum: made, hub, or a folder")
    max_tokens: int = HfArg(default=2048, help="rows longer than this, audio included, are left out and counted")
    max_windows: int = HfArg(default=4, help="so are recordings of more windows (30 s each at full size)")
    # model
    encoder: str = HfArg(default=ENCODER, help="any Whisper, hub name or path")
    llm: str = HfArg(default=LLM, help="any Qwen3, hub name or path")
    init_from: Optional[str] = HfArg(default="AlexWortega/Borealis5b_90k", help="checkpoint to start from: a run's or the "
                                     "original's, hub name or path; none: --encoder and --llm with a new adapter")
    adapter: Literal["simple", "deep"] = HfArg(default="simple", help="of a new one: 19.7 M or 78.6 M at full size")
    train: Literal["adapter", "lora", "full", "scratch"] = HfArg(
        default="lora", help="adapter only; adapter and LoRA; adapter and LLM; scratch: a tiny model, all of it. The encoder "
        "of a pretrained model is always frozen")
    # The post says "~500M, LoRA + adapter". On all linears LoRA has 2,064,384 weights a rank: 256 gives 528.5 M, and no
    # other power of two comes near. On the attention alone it would take rank 680.
    lora_rank: int = HfArg(default=256, help="of the matrices beside every linear of the LLM")
    lora_alpha: float = HfArg(default=512, help="they are scaled by alpha / rank")
    lora_dropout: float = HfArg(default=0.0, help="on their input; the mixes are seen about once, so none is needed")
    # optimisation
    steps: int = HfArg(default=1624, help="optimizer steps")
    effective_batch: int = HfArg(default=128, help="samples a step = 8 GPUs x batch 1 x accumulation 16")
    batch_size: int = HfArg(default=1, help="samples a GPU takes at once; accumulation follows from it")
    lr: float = HfArg(default=1e-5, help="peak learning rate")
    min_lr: float = HfArg(default=0.0, help="the cosine ends here, as a share of --lr")
    warmup: float = HfArg(default=0.03, help="share of the steps with a rising learning rate")
    weight_decay: float = HfArg(default=0.01, help="on matrices only")
    beta2: float = HfArg(default=0.98, help="AdamW")
    grad_clip: float = HfArg(default=1.0, help="gradient norm is cut to this; 0: never")
    seed: int = HfArg(default=0, help="of data order, initial weights and dropout")
    # machine
    device: str = HfArg(default="auto", help="cpu, cuda, or auto")
    workers: int = HfArg(default=4, help="processes a GPU that decode audio")
    grad_checkpoint: bool = HfArg(default=False, help="keep only the input of each LLM layer: a third more compute, little memory")
    compile: bool = HfArg(default=False, help="torch.compile each layer")
    save_every: int = HfArg(default=500, help="steps between checkpoints")
    keep: int = HfArg(default=3, help="checkpoints to keep, the newest; 0: all")
    log: Literal["none", "wandb", "tensorboard"] = HfArg(default="none", help="where numbers go besides metrics.jsonl")


# The steps are the post's; where it says nothing (warm-up, alpha, dropout) the values are ours.
PRESETS = {
    "ru_text_10pct": {},
    "pretrain": dict(mix="pretrain", init_from=None, train="adapter", lr=1e-4, steps=703),  # ~90k samples
    "ru_only": dict(mix="ru_only", steps=1000),
    "en_only": dict(mix="en_only", steps=1172),
    "mixed_large": dict(mix="mixed_large", steps=1000),
    "ru_text_25pct": dict(mix="ru_text_25pct", steps=1000),
    "it_fresh": dict(mix="it_fresh", init_from=None, lr=1e-4, steps=2400),
    "long_audio": dict(mix="long_audio", steps=1000, max_windows=12, max_tokens=6144, grad_checkpoint=True),
}
TINY = dict(embedded=True, train="scratch", encoder="", llm="", init_from=None, steps=2700, effective_batch=16, batch_size=16,
            lr=1.2e-3, min_lr=0.02, warmup=0.06, workers=0)
TWIN = TINY | dict(train="lora", init_from="out_tiny_pretrain", lora_rank=32, lora_alpha=64, steps=1000, lr=2e-3)
PRESETS |= {f"tiny_{name}": (TINY if base.get("init_from", True) is None else TWIN)
            | dict(mix=base.get("mix", name), steps=TWIN["steps"], out=f"out_tiny_{name}") for name, base in PRESETS.items()}
PRESETS["tiny"] = TINY | dict(mix=None)  # Russian transcription
PRESETS["tiny_pretrain"] |= dict(lang="ru,en", steps=TINY["steps"])
PRESETS["tiny_long_audio"] |= dict(max_windows=8)
KEEP = 20_000  # spectrograms of the tiny presets held in memory, 64 KB each
MACHINE_ONLY = {"out", "resume", "overwrite", "strict", "batch_size", "device", "workers", "grad_checkpoint", "compile",
                "save_every", "keep", "log", "data_dir"}  # free on --resume


class ConfigParser(HfArgumentParser):
    error = ArgumentParser.error


def parse_config(argv):
    """Flags over preset (or, with --resume, over the saved configuration) over defaults. Raises UserError."""
    parser = ConfigParser(TrainConfig, prog="train.py", allow_abbrev=False, description=__doc__.split("\n")[1])
    first, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0].lstrip("-"), [f.name for f in fields(TrainConfig)], 1)
        raise UserError(f"unknown flag {unknown[0]}" + (f", did you mean --{close[0]}?" if close else "")
                        + "; python train.py --help lists all")
    if first.preset not in PRESETS:
        raise UserError(f"unknown preset {first.preset!r}: choose from {', '.join(PRESETS)}")
    base = PRESETS[first.preset]
    parser.set_defaults(**base)
    first, _ = parser.parse_known_args(argv)  # some presets name their --out
    if first.resume:
        if not (newest := newest_step(first.out) / "state.pt").is_file():
            raise UserError(f"nothing to resume in {first.out}: it holds no step-* with a state.pt; leave out --resume to start")
        saved = json.loads(newest.with_name("train_config.json").read_text())
        base = {k: v for k, v in saved.items() if k in {f.name for f in fields(TrainConfig)}}
        base.update(resume=True, out=first.out, overwrite=False)
    parser.set_defaults(**base)
    (cfg,) = parser.parse_args_into_dataclasses(argv)
    for name in ("init_from", "mix", "data_dir", "train_manifest"):
        if getattr(cfg, name) in ("none", ""):
            setattr(cfg, name, None)
    for name in ("init_from", "encoder", "llm"):  # what the run would fetch from the hub may lie in --data_dir, too
        if cfg.data_dir and getattr(cfg, name) and not first.resume and (local := Path(cfg.data_dir, getattr(cfg, name))).is_dir():
            setattr(cfg, name, str(local))
    if first.resume:
        changed = [k for k, v in asdict(cfg).items() if k not in MACHINE_ONLY and base.get(k, v) != v]
        if changed:
            raise UserError(f"--resume goes on with the run's own configuration, but --{changed[0]} was "
                            f"{base[changed[0]]!r}; start a new run with another --out to change it")
    elif list(Path(cfg.out).glob("step-*")) and not cfg.overwrite:
        raise UserError(f"{cfg.out} already holds a run: --resume goes on with it, --out DIR starts beside it, "
                        "--overwrite replaces it")
    check_out(cfg.out)
    for name in ("steps", "effective_batch", "batch_size", "utterances", "save_every", "max_tokens", "max_windows", "max_rows",
                 "lora_rank"):
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(cfg, name)}")
    if not cfg.lr > 0:
        raise UserError(f"--lr must be positive, got {cfg.lr}")
    for names, most in (("workers keep grad_clip weight_decay", math.inf), ("lora_dropout beta2 min_lr warmup", 1)):
        for name in names.split():
            if not 0 <= getattr(cfg, name) <= most or (name in ("lora_dropout", "beta2") and getattr(cfg, name) == 1):
                raise UserError(f"--{name} must be at least 0" + (" and below 1" if most == 1 else "") + f", got {getattr(cfg, name)}")
    if wrong := [lang for lang in cfg.lang.split(",") if lang not in GRAMMAR]:
        raise UserError(f"--lang {wrong[0]}: the embedded corpus speaks {', '.join(GRAMMAR)}")
    if cfg.mix and cfg.mix not in MIXES:
        raise UserError(f"--mix {cfg.mix}: choose from {', '.join(MIXES)}")
    if cfg.data_dir and not Path(cfg.data_dir).is_dir():
        raise UserError(f"no folder at --data_dir {cfg.data_dir}")
    if cfg.init_from and Path(cfg.init_from).resolve().is_relative_to(Path(cfg.out).resolve()) and not cfg.resume:
        raise UserError(f"--init_from {cfg.init_from} lies in --out {cfg.out}: write into another folder")
    if cfg.train == "scratch" and cfg.init_from:
        raise UserError("--train scratch starts from nothing: leave out --init_from")
    if cfg.preset.startswith("tiny_") and cfg.init_from == TWIN["init_from"] and not Path(cfg.init_from).exists():
        raise UserError(f"preset {cfg.preset} starts from {cfg.init_from}: make it first, with python train.py --preset "
                        "tiny_pretrain")
    stages(cfg)
    return cfg


# -----------------------------------------------------------------------------
# Data and model

def load_pools(cfg, bad):
    """-> ([pools of samples], [their shares], rows in all): a manifest's, the mix's, or plain embedded transcription."""
    if cfg.train_manifest:
        samples, total = read_manifest(cfg.train_manifest, bad)
        if not samples:
            bad.report(total, cfg.train_manifest)
        return [samples], [1], total
    shares = MIXES[cfg.mix] if cfg.mix else {"pretrain": 1}
    if cfg.embedded:
        pools = [tiny_pool(name, cfg.utterances, cfg.seed, cfg.lang.split(",")) for name in shares]
    else:
        pools = [Chain([Rows(source, cfg.data_dir, cfg.max_rows) for source in POOLS[name]]) for name in shares]
    if empty := [name for name, pool in zip(shares, pools) if not len(pool)]:
        raise UserError(f"the pool {empty[0]} is empty: its datasets have no rows of the kind asked for")
    return pools, list(shares.values()), sum(map(len, pools))


def stages(cfg):
    """--curriculum -> list of stages, empty for none. Raises UserError."""
    if cfg.curriculum == "none":
        return []
    try:
        starts = [float(s) for s in cfg.curriculum.split(",")]
    except ValueError:
        starts = []
    if len(starts) != len(CURRICULUM) or starts[0] != 0 or starts != sorted(starts) or not math.isfinite(sum(starts)):
        raise UserError(f"--curriculum {cfg.curriculum}: give {len(CURRICULUM)} ascending epochs, the first 0, such as "
                        "0,1,3,4, or none")
    for source in (cfg.noise, cfg.rooms):
        check_source(source)
    return [replace(stage, start_epoch=start) for stage, start in zip(CURRICULUM, starts)]


def make_augmenter(cfg):
    chosen = stages(cfg)
    return Augmenter(chosen, *open_banks(cfg.noise, cfg.rooms), cfg.seed) if chosen else None


def build(cfg, samples, device):
    """-> (model, tokenizer): random and tiny; or on a checkpoint, or on pretrained parts. Raises UserError."""
    torch.manual_seed(cfg.seed)
    if cfg.train == "scratch":
        texts, size = texts_of(samples), 1024
        if cfg.mix:  # the runs that start from this one will ask questions, in two languages
            texts += texts_of(s for name in ("ru_audio", "en_audio", "text") for s in tiny_pool(name, 1000, cfg.seed))
            size *= 2
        tokenizer = train_tokenizer(texts, size)
        model = init_from_scratch(BorealisForConditionalGeneration(tiny_config(tokenizer, adapter=cfg.adapter)))
        model.tokenizer = tokenizer
        return model.to(device), tokenizer
    try:
        if cfg.resume:  # on what it was started on, wherever the names of its first day point by now
            config = BorealisConfig.from_pretrained(newest_step(cfg.out))
            model, base = load_base(newest_step(cfg.out), config), config.base
        elif cfg.init_from:
            place = find_checkpoint(cfg.init_from)
            model = load_checkpoint(place, cfg.encoder, cfg.llm)
            base = dict(checkpoint=place if Path(cfg.init_from).exists() else cfg.init_from, fingerprint=fingerprint(place),
                        encoder=cfg.encoder, llm=cfg.llm)
        else:
            model = BorealisForConditionalGeneration.from_parts(cfg.encoder, cfg.llm, adapter=cfg.adapter)
            base = dict(checkpoint=None, encoder=cfg.encoder, llm=cfg.llm)
    except (OSError, ValueError, RuntimeError) as e:
        parts = cfg.init_from or f"{cfg.encoder} and {cfg.llm}"
        raise UserError(f"cannot start from {parts}: {str(e).splitlines()[0]}. Give hub names or local folders with --encoder, "
                        "--llm and --init_from, or try --preset tiny") from None
    # What never changes needs no fp32 master copy; prepare gives one to the rest.
    model.cast(torch.bfloat16 if device.type == "cuda" else torch.float32)
    lora = dict(rank=cfg.lora_rank, alpha=cfg.lora_alpha, dropout=cfg.lora_dropout) if cfg.train == "lora" else None
    model.prepare(cfg.train, lora)
    # Folders are named as seen from the checkpoints, which lie one below --out; hub names stay what they are.
    step = (Path(cfg.out) / "step").resolve()
    model.config.base = base if cfg.resume else {
        k: os.path.relpath(Path(v).resolve(), step) if v and Path(v).exists() else v for k, v in base.items()}
    return model.to(device), model.tokenizer


def learning_rate(cfg, step):
    """Linear warm-up, then a cosine from lr to min_lr * lr; step counts from 0."""
    warmup = max(1, round(cfg.warmup * cfg.steps))
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, cfg.steps - warmup)
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


# -----------------------------------------------------------------------------
# What a run leaves behind. Everything is written under another name first: a kill leaves the old file or the new.

def save(cfg, model, tokenizer, optimizer, step):
    """out/step-0000500, complete or not there at all; then the oldest beyond --keep goes."""
    out = Path(cfg.out)
    for left in out.glob(".*-step"):  # of a kill
        shutil.rmtree(left)
    fresh = out / ".new-step"
    model.config.save_pretrained(fresh)
    save_file({k: v.detach().contiguous() for k, v in model.stored().items()}, fresh / "model.safetensors",
              metadata={"format": "pt"})
    tokenizer.save_pretrained(fresh)
    (fresh / "train_config.json").write_text(json.dumps(asdict(cfg) | {"step": step}, indent=1, ensure_ascii=False))
    torch.save(dict(step=step, optimizer=optimizer.state_dict()), fresh / "state.pt")
    os.replace(fresh, out / f"step-{step:07d}")
    if cfg.keep:
        remove(sorted(out.glob("step-*"))[:-cfg.keep])


def remove(checkpoints):
    for old in checkpoints:
        fresh = old.with_name(".old-step")  # half deleted, it must not look like one
        shutil.rmtree(fresh, ignore_errors=True)
        os.replace(old, fresh)
        shutil.rmtree(fresh)


def restore(cfg, model, optimizer, device):
    """The newest checkpoint in --out, into model and optimizer -> the step to go on with. Raises UserError."""
    folder = newest_step(cfg.out)
    state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
    try:
        model.load_stored(read_weights(folder), folder)
    except ValueError as e:
        raise UserError(str(e).splitlines()[0]) from None
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def read_metrics(path, until):
    """metrics.jsonl up to a step, so that a resumed run does not list steps twice. A kill may have cut its last line."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [r for r in rows if r["step"] <= until]


class Log:
    """Where a step's numbers go: metrics.jsonl always, wandb or tensorboard if asked; nowhere on ranks other than 0."""

    def __init__(self, cfg, chief, start):
        path = Path(cfg.out) / "metrics.jsonl"
        self.rows = read_metrics(path, start)
        self.file, self.track, self.finish = None, lambda row: None, lambda: None
        if not chief:
            return
        replace_file(path, lambda tmp: Path(tmp).write_text("".join(json.dumps(r) + "\n" for r in self.rows)))
        self.file = open(path, "a", buffering=1)
        try:
            if cfg.log == "wandb":
                import wandb
                run = wandb.init(project="nanoborealis", group=Path(cfg.out).resolve().name, dir=cfg.out, config=asdict(cfg))
                self.track, self.finish = lambda row: run.log(row, step=row["step"]), run.finish
            elif cfg.log == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter
                writer = SummaryWriter(cfg.out, purge_step=start)
                self.track, self.finish = lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in row.items()], writer.close
        except ImportError:
            raise UserError(f"--log {cfg.log} needs a package: pip install {cfg.log}") from None
        except Exception as e:  # not logged in, no network, ...
            raise UserError(f"--log {cfg.log}: {str(e).splitlines()[0]}") from None

    def write(self, row):
        self.rows.append(row)
        if self.file:
            self.file.write(json.dumps({k: v if k in ("step", "loss") else float(f"{v:.6g}") for k, v in row.items()}) + "\n")
        self.track(row)


# Dense bf16 FLOP/s of one device, from the makers' data sheets.
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
        "L40": 181e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "B200": 2250e12}


def peak_flops(device):
    """FLOP/s the device could do at best, None where that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK.items() if part in name), None)


def step_flops(model, tokens, squares, windows, labels):
    """FLOPs that a step needs: 2 a weight and token forward, 2 more where a gradient has to pass through, 2 more where the
    weight itself learns. What padding or gradient checkpointing add is not needed. squares: sum of squared row lengths."""
    c, E, D = model.config, model.config.encoder_config, model.config.llm_config
    T = E.max_source_positions
    def linears(module, backward):
        return sum(m.weight.numel() * (2 + backward + 2 * m.weight.requires_grad)
                   for m in module.modules() if isinstance(m, torch.nn.Linear))
    hears = 2 * ("encoder" not in c.frozen)  # does the encoder learn?
    conv1, conv2 = 3 * E.d_model * E.num_mel_bins * 2 * T, 3 * E.d_model * E.d_model * T
    encoder = ((2 + hears) * conv1 + (2 + 2 * hears) * conv2 + T * linears(model.encoder, hears)
               + (4 + 4 * hears) * T * T * E.d_model * E.encoder_layers)
    attention = 2 * squares * D.num_attention_heads * D.head_dim * D.num_hidden_layers  # causal: half of each square, QK and AV
    head = labels * D.vocab_size * D.hidden_size * (4 + 2 * model.llm.lm_head.weight.requires_grad)
    # Behind a frozen encoder, no gradient has to pass through the adapter's first matrix.
    adapter = c.tokens_per_window * (linears(model.adapter, 2) - (2 - hears) * model.adapter.w_in.weight.numel())
    return windows * (encoder + adapter) + tokens * linears(model.llm.model, 2) + 3 * attention + head


def plot_loss(rows, path):
    steps, loss = [r["step"] for r in rows], [r["loss"] for r in rows]
    smooth, level = [], loss[0]
    for x in loss:
        level += 0.05 * (x - level)
        smooth.append(level)
    with picture(path, figsize=(7, 4)) as (_, axis):
        axis.plot(steps, loss, color="#c6d3e6", linewidth=0.8, label="each step")
        axis.plot(steps, smooth, color="#1f4e9c", label="moving average")
        axis.set(xlabel="step", ylabel="loss (nats a label token)", yscale="log", title="Training loss")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)


# -----------------------------------------------------------------------------
# The loop

def main():
    cfg = parse_config(sys.argv[1:])
    # A loader's worker hands over 128 micro-batches at once, each in a few files of shared memory: the usual 1024 are too few.
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(files, 65536 if most == resource.RLIM_INFINITY else min(most, 65536)), most))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = pick_device(cfg.device) == "cuda"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        if device.index >= torch.cuda.device_count():
            raise UserError(f"{world} processes, but {torch.cuda.device_count()} GPUs: torchrun --nproc_per_node="
                            f"{torch.cuda.device_count()}")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if cfg.effective_batch % world:
        raise UserError(f"--effective_batch {cfg.effective_batch} cannot be shared by {world} processes")
    accumulation = math.ceil(cfg.effective_batch / world / cfg.batch_size)  # the last micro-batch may be smaller
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=3))  # rank 0 may read for long
    chief = rank == 0

    # Rank 0 looks at the data first (fetches it, speaks the corpus, checks every recording of a manifest), the others take
    # over what it left.
    bad = BadRows(cfg.strict)
    if chief:
        pools, shares, total = load_pools(cfg, bad)
        augment = make_augmenter(cfg)
    if world > 1:
        dist.barrier()
    if not chief:
        pools, shares, _ = load_pools(cfg, bad)
        augment = make_augmenter(cfg)
    model, tokenizer = build(cfg, pools[0], device)
    limits = dict(max_tokens=cfg.max_tokens, max_windows=cfg.max_windows)
    if cfg.train_manifest:
        verdict = [None]
        if chief:
            verdict = [{s.name for s in usable(pools[0], Dataset(pools[0], tokenizer, model.config, **limits), bad)}]
            bad.report(total, cfg.train_manifest)
        if world > 1:
            dist.broadcast_object_list(verdict)
        pools = [[s for s in pools[0] if s.name in verdict[0]]]
        bad = BadRows(cfg.strict)
    long = BadRows()

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [dict(params=[p for p in trained if p.dim() >= 2], weight_decay=cfg.weight_decay),
         dict(params=[p for p in trained if p.dim() < 2], weight_decay=0.0)],
        lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    start = restore(cfg, model, optimizer, device) if cfg.resume else 0
    if cfg.grad_checkpoint:
        model.llm.gradient_checkpointing_enable(dict(use_reentrant=False))
    model.train()
    if cfg.compile:
        for layer in [*model.encoder.layers, *model.llm.model.layers]:
            layer.compile(dynamic=True)  # layer by layer: they share one graph, and rows have many lengths
    # gradient_as_bucket_view saves a copy of the gradients, as long as they are zeroed and not dropped; the encoder's frozen
    # buffers need no broadcast.
    net = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False) if world > 1 else model
    autocast = torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext()
    samples = Chain(pools)
    dataset = Dataset(samples, tokenizer, model.config, KEEP if cfg.train == "scratch" else 0, augment, **limits,
                      batch_size=cfg.batch_size)
    steps = iter(torch.utils.data.DataLoader(
        dataset, collate_fn=dataset.collate, num_workers=cfg.workers, pin_memory=cuda, worker_init_fn=quiet_worker,
        batch_sampler=Schedule([*map(len, pools)], shares, cfg.seed, range(start, cfg.steps), cfg.effective_batch, rank, world)))
    if cfg.workers:  # they ignore SIGTERM, see quiet_worker: end them before Python's own exit would wait for them
        atexit.register(steps._shutdown_workers)
    out = Path(cfg.out)
    if chief:
        out.mkdir(parents=True, exist_ok=True)
        print(json.dumps(asdict(cfg), ensure_ascii=False))
        print(f"{len(samples)} samples; {count(model):,} parameters, {count(model, trained_only=True):,} trained; "
              f"{world} process(es) on {device.type}, batch {cfg.batch_size} x accumulation {accumulation}", flush=True)
    log, peak = Log(cfg, chief, start), peak_flops(device)
    if chief and cfg.overwrite:
        remove(out.glob("step-*"))
    stop, stopping = catch_signals(), False
    # A file or pipe gets a line every ten seconds, a terminal a live bar.
    bar = tqdm(total=cfg.steps, initial=start, desc="training", unit="step", disable=not chief,
               mininterval=0.1 if sys.stderr.isatty() else 10)

    stage = None
    for step in range(start, cfg.steps):
        began = time.perf_counter()
        epoch = step * cfg.effective_batch / len(samples)
        if augment and chief and stage != augment.stage(epoch):
            stage = augment.stage(epoch)
            bar.write(f"epoch {epoch:.2f}, step {step + 1}: stage {stage.name}, {stage.config.touched:.0%} of the clips are "
                      "changed", file=sys.stderr)
        # Dropout's randomness is a function of (seed, step, rank): resuming needs no generator state.
        torch.manual_seed((cfg.seed * 1_000_003 + step) * 1009 + rank)
        lr = learning_rate(cfg, step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The loss is a mean over the label tokens of the whole effective batch, on all ranks. A mean of per-micro-batch
        # means would weigh a token by the company it keeps. So fetch first, count, then compute.
        share = next(steps)
        micro, left_out = share["micro"], share["left_out"]
        sums = torch.tensor([sum((b["labels"] != -100).sum().item() for b in micro), share["tokens"], share["squares"],
                             share["windows"], share["seconds"], len(left_out), share["hopeless"], bool(stop)],
                            dtype=torch.float64, device=device)
        if world > 1:
            dist.all_reduce(sums)
        labels, tokens, squares, windows, seconds, n_left_out, hopeless, stopping = sums.tolist()
        if n_left_out:
            tell(bad, long, left_out, hopeless, (step + 1 - start) * cfg.effective_batch, world)

        loss = torch.zeros((), dtype=torch.float64, device=device)
        for i, batch in enumerate(micro):
            if world > 1:  # gradients travel once a step: on the last micro-step, all that accumulated before goes too
                net.require_backward_grad_sync = i == accumulation - 1
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            with autocast:
                part = net(**batch, num_items_in_batch=labels / world).loss  # / world: DDP averages over the ranks
            part.backward()
            loss += part.detach().double() / world
        if world > 1:
            dist.all_reduce(loss)
        norm = torch.nn.utils.clip_grad_norm_(trained, cfg.grad_clip or math.inf)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            bar.close()
            kept = f"the checkpoint of the last save stays in {cfg.out}" if list(out.glob("step-*")) else \
                "no checkpoint had been written yet"
            if chief:
                print(f"error: loss {loss.item():g}, gradient norm {norm.item():g} at step {step + 1}: training has "
                      f"diverged; {kept}. Try a lower --lr than {cfg.lr:g}.", file=sys.stderr)
            return 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=world == 1)

        took = time.perf_counter() - began
        row = dict(step=step + 1, loss=loss.item(), lr=lr, grad_norm=norm.item(), ms=took * 1e3,
                   tokens_per_s=tokens / took, audio_s_per_s=seconds / took)
        if cuda:
            row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if peak:
            row["mfu"] = step_flops(model, tokens, squares, windows, labels) / took / world / peak
        log.write(row)
        bar.set_postfix_str(f"loss {row['loss']:.4f}, lr {lr:.1e}, |grad| {row['grad_norm']:.2f}, {row['tokens_per_s']:,.0f} "
                            f"tokens/s, {row['audio_s_per_s']:.0f} audio-s/s" + (f", {row['memory_gb']:.1f} GB" if cuda else "")
                            + (f", MFU {row['mfu']:.0%}" if peak else ""), refresh=False)
        bar.update()
        last = step + 1 == cfg.steps or bool(stopping)
        if chief and (last or (step + 1) % cfg.save_every == 0):
            save(cfg, model, tokenizer, optimizer, step + 1)
            plot_loss(log.rows, out / "loss.png")
        if stopping:
            break

    bar.close()
    log.finish()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    for rows in (long, bad) if chief else ():
        if rows.reasons:
            print(f"left out, and replaced by the next rows: {rows}", file=sys.stderr)
    if stopping and chief:
        print(f"stopped at step {step + 1}, saved; go on with: python train.py --resume --out {cfg.out}")
    elif chief:
        print(f"done: {cfg.out} holds the model; next: python eval.py --ckpt {cfg.out}")
    return 130 if stopping and signal.SIGINT in stop else 0


def tell(bad, long, left_out, hopeless, seen, world):
    """Count the rows that all ranks left out in this step. Too many unusable ones, or no end of them, stop the run; rows
    beyond the limits of length do no harm. Raises UserError, on all ranks."""
    everyone = [left_out]
    if world > 1:
        dist.all_gather_object(everyone := [None] * world, left_out)
    for reason, where, too_long in sum(everyone, []):
        (long if too_long else bad).add(reason, where)
    if hopeless:
        raise UserError(f"{RETRIES} rows in a row cannot be used: " + ", ".join(str(r) for r in (bad, long) if r.reasons))
    if seen >= 1000:
        bad.check(seen, "training data")


def catch_signals():
    """Ctrl-C and SIGTERM let the current step end and save; a second Ctrl-C does not wait. -> list of those caught."""
    caught = []

    def remember(number, frame):
        if number == signal.SIGINT and caught:
            raise KeyboardInterrupt
        caught.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, remember)
    return caught


def quiet_worker(_):
    """Terminals send Ctrl-C, torchrun and queues SIGTERM, to the loader's processes too; only the loop may answer."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def train():
    """main(), with a word on what to do where the GPU is too small."""
    try:
        return main()
    except torch.cuda.OutOfMemoryError as e:
        raise UserError(f"the GPU's memory is full: try --grad_checkpoint, a smaller --batch_size, or --max_tokens ({e})") from None


if __name__ == "__main__":
    run(train)
