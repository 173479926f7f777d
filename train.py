"""
train.py -- fit a Borealis model: one flat loop for a laptop, one GPU, or eight under torchrun.

    python train.py --preset tiny                              # from nothing, on speech made here; minutes on a CPU
    python train.py --preset tiny --train_manifest my.jsonl    # the same from your own recordings
    torchrun --nproc_per_node=8 train.py --train_manifest my.jsonl      # full size: Whisper-large-v3 + Qwen3-4B
    python train.py --resume --out out                         # go on where a run stopped

Every field of TrainConfig is a flag. A run writes into --out: config.json, model.safetensors and the tokenizer (what
eval.py and transformers read), train_config.json, state.pt (what --resume reads), metrics.jsonl and loss.png.
"""
import contextlib
import difflib
import json
import math
import os
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
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser
from transformers.hf_argparser import HfArg

from augment import CURRICULUM, Augmenter, check_source, open_banks
from data import GRAMMAR, ArgumentParser, BadRows, Dataset, Schedule, UserError, check_out, embedded, \
    pick_device, read_manifest, replace_file, run, texts_of, train_tokenizer, usable
from model import BorealisForConditionalGeneration, add_audio_tokens, count, init_from_scratch, tiny_config

# -----------------------------------------------------------------------------
# Configuration: the defaults are the full-size run, a preset changes some, flags change any

@dataclass
class TrainConfig:
    preset: str = HfArg(default="borealis", help="borealis (full size) or tiny")
    out: str = HfArg(default="out", aliases="--out_dir", help="folder of the run")
    resume: bool = HfArg(default=False, help="go on from the checkpoint in --out, with its configuration")
    overwrite: bool = HfArg(default=False, help="start anew although --out holds a run")
    # data
    train_manifest: Optional[str] = HfArg(default=None, help="JSONL with your own data (see data.py)")
    strict: bool = HfArg(default=False, help="stop at the first unusable row instead of counting it")
    lang: str = HfArg(default="ru", help="language of the embedded corpus: ru, en, or ru,en")
    utterances: int = HfArg(default=12000, help="how many the embedded corpus speaks, over all languages")
    curriculum: str = HfArg(default="none", help="epochs at which the stages clean, light, intense and heavy of augment.py "
                            "start, like 0,1,3,4, the original's; fractions allowed; none: audio as it is")
    noise: str = HfArg(default="made", help="for the curriculum: made, hub (Vikhrmodels/Audio_Noise_Dataset), or a folder")
    rooms: str = HfArg(default="made", help="impulse responses for the curriculum: made, hub, or a folder")
    max_tokens: int = HfArg(default=2048, help="rows longer than this, audio included, are left out and counted")
    # model
    encoder: str = HfArg(default="openai/whisper-large-v3", help="any Whisper, hub name or path")
    llm: str = HfArg(default="Qwen/Qwen3-4B", help="any Qwen3, hub name or path")
    adapter: Literal["simple", "deep"] = HfArg(default="simple", help="19.7 M or 78.6 M parameters at full size")
    train: Literal["adapter", "full", "scratch"] = HfArg(
        default="adapter", help="adapter: encoder and LLM frozen; full: encoder frozen; scratch: a tiny model, all of it")
    # optimisation: the post's pretraining numbers
    steps: int = HfArg(default=1000, help="optimizer steps")
    effective_batch: int = HfArg(default=128, help="samples a step = 8 GPUs x batch 1 x accumulation 16")
    batch_size: int = HfArg(default=1, help="samples a GPU takes at once; accumulation follows from it")
    lr: float = HfArg(default=1e-4, help="peak learning rate")
    min_lr: float = HfArg(default=0.0, help="the cosine ends here, as a share of --lr")
    warmup: float = HfArg(default=0.03, help="share of the steps with a rising learning rate")
    weight_decay: float = HfArg(default=0.01, help="on matrices only")
    beta2: float = HfArg(default=0.98, help="AdamW")
    grad_clip: float = HfArg(default=1.0, help="gradient norm is cut to this; 0: never")
    seed: int = HfArg(default=0, help="of data order, initial weights and dropout")
    # machine
    device: str = HfArg(default="auto", help="cpu, cuda, or auto")
    workers: int = HfArg(default=4, help="processes a GPU that decode audio")
    save_every: int = HfArg(default=500, help="steps between checkpoints")


PRESETS = {
    "borealis": {},  # stage one of the post: transcription, only the adapter learns
    "tiny": dict(train="scratch", encoder="", llm="", steps=2700, effective_batch=16, batch_size=16, lr=1.2e-3,
                 min_lr=0.02, warmup=0.06, workers=0, save_every=500),
}
KEEP = 20_000  # spectrograms of the tiny preset held in memory, 64 KB each
MACHINE_ONLY = {"out", "resume", "overwrite", "strict", "batch_size", "device", "workers", "save_every"}  # free on --resume


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
    saved = Path(first.out) / "train_config.json"
    if first.resume:
        if not (Path(first.out) / "state.pt").is_file() or not saved.is_file():
            raise UserError(f"nothing to resume in {first.out}: it holds no state.pt; leave out --resume to start")
        base = {k: v for k, v in json.loads(saved.read_text()).items() if k in {f.name for f in fields(TrainConfig)}}
        base.update(resume=True, out=first.out, overwrite=False)
    else:
        base = PRESETS[first.preset]
    parser.set_defaults(**base)
    (cfg,) = parser.parse_args_into_dataclasses(argv)
    if first.resume:
        changed = [k for k, v in asdict(cfg).items() if k not in MACHINE_ONLY and base.get(k, v) != v]
        if changed:
            raise UserError(f"--resume goes on with the run's own configuration, but --{changed[0]} was "
                            f"{base[changed[0]]!r}; start a new run with another --out to change it")
    elif (Path(cfg.out) / "state.pt").exists() and not cfg.overwrite:
        raise UserError(f"{cfg.out} already holds a run: --resume goes on with it, --out DIR starts beside it, "
                        "--overwrite replaces it")
    check_out(cfg.out)
    for name in ("steps", "effective_batch", "batch_size", "utterances", "save_every", "max_tokens"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(cfg, name)}")
    if not cfg.lr > 0:
        raise UserError(f"--lr must be positive, got {cfg.lr}")
    if wrong := [lang for lang in cfg.lang.split(",") if lang not in GRAMMAR]:
        raise UserError(f"--lang {wrong[0]}: the embedded corpus speaks {', '.join(GRAMMAR)}")
    stages(cfg)
    if cfg.train != "scratch" and not cfg.train_manifest:
        raise UserError(f"preset {cfg.preset} has no data of its own: give it --train_manifest FILE (see data.py), "
                        "or use --preset tiny")
    return cfg


# -----------------------------------------------------------------------------
# Data and model

def load_samples(cfg):
    """The embedded corpus, or the rows of a manifest whose text is usable -> (samples, BadRows, number of rows)."""
    bad = BadRows(cfg.strict)
    if cfg.train_manifest:
        samples, total = read_manifest(cfg.train_manifest, bad)
        if not samples:
            bad.report(total, cfg.train_manifest)
        return samples, bad, total
    languages = cfg.lang.split(",")
    share = -(-cfg.utterances // len(languages))
    samples = [s for lang in languages for s in embedded(lang, "train", share, cfg.seed)]
    return samples, bad, len(samples)


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
    """-> (model, tokenizer): random and tiny, or from pretrained parts."""
    torch.manual_seed(cfg.seed)
    if cfg.train == "scratch":
        tokenizer = train_tokenizer(texts_of(samples))
        model = init_from_scratch(BorealisForConditionalGeneration(tiny_config(tokenizer, adapter=cfg.adapter)))
        model.tokenizer = tokenizer
        return model.to(device), tokenizer
    try:
        tokenizer = add_audio_tokens(AutoTokenizer.from_pretrained(cfg.llm))
        model = BorealisForConditionalGeneration.from_parts(cfg.encoder, cfg.llm, tokenizer, adapter=cfg.adapter)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot load {cfg.encoder} and {cfg.llm}: {str(e).splitlines()[0]}; give hub names, or "
                        "local folders with --encoder and --llm") from None
    model.freeze("encoder", *(["llm"] if cfg.train == "adapter" else []))
    for part in model.config.frozen:  # what never changes needs no fp32 master copy
        getattr(model, part).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    return model.to(device), tokenizer


def learning_rate(cfg, step):
    """Linear warm-up, then a cosine from lr to min_lr * lr; step counts from 0."""
    warmup = max(1, round(cfg.warmup * cfg.steps))
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, cfg.steps - warmup)
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


# -----------------------------------------------------------------------------
# What a run leaves behind. Everything is written under another name first: a kill leaves the old file or the new.

def trained_weights(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save(cfg, model, tokenizer, optimizer, step):
    out, fresh = Path(cfg.out), Path(cfg.out) / ".saving"
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)                       # config.json, model.safetensors
    tokenizer.save_pretrained(fresh)
    (fresh / "train_config.json").write_text(json.dumps(asdict(cfg) | {"step": step}, indent=1, ensure_ascii=False))
    for file in fresh.iterdir():
        os.replace(file, out / file.name)
    fresh.rmdir()
    # The weights once more, in state.pt: a kill between two renames must not pair new weights with an old optimizer.
    replace_file(out / "state.pt", lambda tmp: torch.save(
        dict(step=step, trained=trained_weights(model), optimizer=optimizer.state_dict()), tmp))


def restore(cfg, model, optimizer, device):
    """Load state.pt into model and optimizer -> the step to go on with."""
    state = torch.load(Path(cfg.out) / "state.pt", map_location=device, weights_only=True)
    trained = trained_weights(model)
    if {k: v.shape for k, v in trained.items()} != {k: v.shape for k, v in state["trained"].items()}:
        raise UserError(f"the checkpoint in {cfg.out} holds another model than its train_config.json describes")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(state["trained"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def read_metrics(path, until):
    """metrics.jsonl up to a step, so that a resumed run does not list steps twice."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [r for r in rows if r["step"] <= until]


def plot_loss(rows, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    steps, loss = [r["step"] for r in rows], [r["loss"] for r in rows]
    smooth, level = [], loss[0]
    for x in loss:
        level += 0.05 * (x - level)
        smooth.append(level)
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(steps, loss, color="#c6d3e6", linewidth=0.8, label="each step")
    axis.plot(steps, smooth, color="#1f4e9c", label="moving average")
    axis.set(xlabel="step", ylabel="loss (nats a label token)", yscale="log", title="Training loss")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    replace_file(path, lambda tmp: figure.savefig(tmp, dpi=120, format="png"))
    plt.close(figure)


# -----------------------------------------------------------------------------
# The loop

def main():
    cfg = parse_config(sys.argv[1:])
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = pick_device(cfg.device) == "cuda"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if cfg.effective_batch % (cfg.batch_size * world):
        raise UserError(f"--effective_batch {cfg.effective_batch} is no multiple of --batch_size {cfg.batch_size} x "
                        f"{world} processes")
    accumulation = cfg.effective_batch // (cfg.batch_size * world)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=3))  # rank 0 may read for long
    chief = rank == 0

    # Rank 0 looks at the data first (speaks the corpus, checks every recording), the others take over its verdict.
    if chief:
        samples, bad, total = load_samples(cfg)
        augment = make_augmenter(cfg)
    if world > 1:
        dist.barrier()
    if not chief:
        samples, _, _ = load_samples(cfg)
        augment = make_augmenter(cfg)
    model, tokenizer = build(cfg, samples, device)
    if cfg.train_manifest:
        verdict = [None]
        if chief:
            verdict = [{s.name for s in usable(samples, tokenizer, model.config, cfg.max_tokens, bad)}]
            bad.report(total, cfg.train_manifest)
        if world > 1:
            dist.broadcast_object_list(verdict)
        samples = [s for s in samples if s.name in verdict[0]]

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [dict(params=[p for p in trained if p.dim() >= 2], weight_decay=cfg.weight_decay),
         dict(params=[p for p in trained if p.dim() < 2], weight_decay=0.0)],
        lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    start = restore(cfg, model, optimizer, device) if cfg.resume else 0
    model.train()
    # gradient_as_bucket_view saves a copy of the gradients; the encoder's frozen buffers need no broadcast.
    net = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False) if world > 1 else model
    autocast = torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext()
    dataset = Dataset(samples, tokenizer, model.config, KEEP if cfg.train == "scratch" else 0, augment, cfg.max_tokens)
    batches = iter(torch.utils.data.DataLoader(
        dataset, collate_fn=dataset.collate, num_workers=cfg.workers, pin_memory=cuda, worker_init_fn=quiet_worker,
        batch_sampler=Schedule(len(samples), cfg.seed, range(start, cfg.steps), cfg.effective_batch, cfg.batch_size,
                               rank, world)))
    out = Path(cfg.out)
    if chief:
        out.mkdir(parents=True, exist_ok=True)
        print(json.dumps(asdict(cfg), ensure_ascii=False))
        print(f"{len(samples)} samples; {count(model):,} parameters, {count(model, trained_only=True):,} trained; "
              f"{world} process(es) on {device.type}, batch {cfg.batch_size} x accumulation {accumulation}", flush=True)
    rows = read_metrics(out / "metrics.jsonl", start)
    log = None
    if chief:
        replace_file(out / "metrics.jsonl", lambda tmp: Path(tmp).write_text("".join(json.dumps(r) + "\n" for r in rows)))
        log = open(out / "metrics.jsonl", "a", buffering=1)
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
        micro = [next(batches) for _ in range(accumulation)]
        seconds = sum(b.pop("seconds") for b in micro)
        sums = torch.tensor([sum((b["labels"] != -100).sum().item() for b in micro),
                             sum(b["input_ids"].numel() for b in micro), seconds, float(bool(stop))],
                            dtype=torch.float64, device=device)
        if world > 1:
            dist.all_reduce(sums)
        labels, tokens, seconds, stopping = sums.tolist()

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
            kept = f"the checkpoint of the last save stays in {cfg.out}" if (out / "state.pt").exists() else \
                "no checkpoint had been written yet"
            if chief:
                print(f"error: loss {loss.item():g}, gradient norm {norm.item():g} at step {step + 1}: training has "
                      f"diverged; {kept}. Try a lower --lr than {cfg.lr:g}.", file=sys.stderr)
            return 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        took = time.perf_counter() - began
        row = dict(step=step + 1, loss=loss.item(), lr=lr, grad_norm=norm.item(), ms=took * 1e3,
                   tokens_per_s=tokens / took, audio_s_per_s=seconds / took)
        rows.append(row)
        if chief:
            log.write(json.dumps({k: v if k in ("step", "loss") else float(f"{v:.6g}") for k, v in row.items()}) + "\n")
            bar.set_postfix_str(f"loss {row['loss']:.4f}, lr {lr:.1e}, {row['tokens_per_s']:,.0f} tokens/s, "
                                f"{row['audio_s_per_s']:.0f} audio-s/s", refresh=False)
            bar.update()
        last = step + 1 == cfg.steps or bool(stopping)
        if chief and (last or (step + 1) % cfg.save_every == 0):
            save(cfg, model, tokenizer, optimizer, step + 1)
            plot_loss(rows, out / "loss.png")
        if stopping:
            break

    bar.close()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if stopping and chief:
        print(f"stopped at step {rows[-1]['step']}, saved; go on with: python train.py --resume --out {cfg.out}")
    elif chief:
        print(f"done: {cfg.out} holds the model; next: python eval.py --ckpt {cfg.out}")
    return 130 if stopping and signal.SIGINT in stop else 0


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
    """A terminal sends Ctrl-C to the loader's processes too; only the loop may answer it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


if __name__ == "__main__":
    run(main)
