"""train.py -- fit a Borealis model: one flat loop for a laptop, one GPU, or eight under torchrun.
A run writes metrics.jsonl and checkpoints (step-0000500, ...) into --out.

    torchrun --nproc_per_node=8 --shutdown_timeout 600 train.py  # the post's best: LoRA + adapter
    python train.py --preset tiny                            # from nothing; minutes on a CPU
    python train.py --preset tiny --train_manifest my.jsonl  # on your own recordings
    python train.py --resume --out out                       # go on where a run stopped"""
import math
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
import torch
from data import Chain, Dataset, HubSamples, Schedule, digest, read_manifest, tiny_pool
from support import cli, decoding, launch, lora, meter, optim, ranks, recipes, storage, tiny
from support.banks import TRAINED, Silence, open_banks, without_babble
from support.context import Context
from support.rows import BadRows, usable

# ---- Configuration: [train] of support/flags.toml is the full-size run, presets change some of it:
# LoRA of rank 256 and the adapter, AdamW at 1e-5 with warm-up and a cosine, 1624 steps of 128 rows
# (8 GPUs x batch 1 x accumulation 16) of at most 2048 tokens each. `train.py --help` shows all.
class TrainConfig(SimpleNamespace):
    def __init__(self, **given):
        assert given.keys() <= cli.FLAGS["train"].keys(), f"no such settings in {[*given]}"
        super().__init__(**{k: f.get("default") for k, f in cli.FLAGS["train"].items()} | given)

# ---- Data and model
def load_pools(cfg, bad):  # -> (banks, {name: pool of samples}, their shares). Raises UserError
    wanted = cfg.silence or cfg.curriculum != "none"
    banks = open_banks(cfg.noise, cfg.rooms, data_dir=cfg.data_dir) if wanted else None
    mix = {"manifest": 1} if cfg.train_manifest else recipes.MIXES[cfg.mix or "pretrain"]
    pools, shares, hub = {}, [*mix.values()], (cfg.data_dir, cfg.max_rows)
    for name in mix:
        if cfg.train_manifest:
            pools[name], _ = read_manifest(cfg.train_manifest, bad)
        elif cfg.embedded:
            pools[name] = tiny_pool(name, cfg.utterances, cfg.seed, cfg.lang.split(","))
        elif name not in recipes.POOLS:
            raise cli.UserError(f"--mix {cfg.mix} has no datasets, it is spoken: add --embedded")
        else:
            pools[name] = Chain([HubSamples(s, *hub) for s in recipes.POOLS[name]])
    if cfg.silence:
        n = min(1000, math.ceil(cfg.silence * cfg.steps * cfg.effective_batch))
        noises = without_babble(banks[0]) if cfg.noise == "made" else banks[0]
        pools["silence"] = Silence(TRAINED, noises, n, 6 if cfg.embedded else 30, cfg.seed)
        shares.append(cfg.silence / (1 - cfg.silence) * sum(shares))
    return banks, pools, shares

def build(cfg, device):
    """-> a model from a checkpoint, or pretrained parts, in which --train says what will learn."""
    torch.manual_seed(cfg.seed)
    model = launch.load_start(cfg)
    if cfg.train != "scratch":  # lora.prepare freezes what does not train, makes the rest fp32
        lora.cast(model, torch.bfloat16 if device.type == "cuda" else torch.float32)
        size = dict(rank=cfg.lora_rank, alpha=cfg.lora_alpha, dropout=cfg.lora_dropout)
        lora.prepare(model, cfg.train, size if cfg.train == "lora" else None)
    if cfg.resume:
        with cli.as_user_error("", ValueError):
            storage.restore_weights(cfg.out, model)
    return model

def build_tiny(cfg, samples):  # -> a random model; its tokenizer knows the words of later runs, too
    more = ["ru_audio", "en_audio", "text"] if cfg.mix else []
    texts = Chain([samples, *(tiny_pool(pool, 1000, cfg.seed) for pool in more)])
    torch.manual_seed(cfg.seed)
    return tiny.scratch_model(texts, 2048 if more else 1024, layers=cfg.layers, adapter=cfg.adapter)

def load_data_and_model(cfg, rank, world, device):
    """-> (model, dataset, {pool: (samples, digest)}, [their shares]). Raises UserError."""
    bad = BadRows(cfg.strict)  # the model first, before hours of data, which rank 0 fetches:
    model = None if cfg.train == "scratch" and not cfg.resume else build(cfg, device)
    banks, pools, shares = decoding.first_rank_first(load_pools, cfg, bad)
    model = model or build_tiny(cfg, next(iter(pools.values())))
    settings = dict(tokenizer=model.tokenizer, config=model.config, max_tokens=cfg.max_tokens,
                    max_windows=cfg.max_windows, max_seconds=cfg.max_seconds)
    if cfg.train_manifest:  # small enough to look at every recording beforehand
        rows = Dataset(pools["manifest"], **settings)
        pools["manifest"] = decoding.first_rank_first(usable, rows.samples, rows, bad)
        if rank == 0:
            bad.report(len(pools["manifest"]) + bad.reasons.total(), cfg.train_manifest)
    # On resume the data must be what it was: rank 0 looks.
    data = {name: (len(pool), digest(pool) if rank == 0 else "") for name, pool in pools.items()}
    batch_size, samples = ranks.pick_batch(cfg, model, device, world), Chain(pools.values())
    augment = launch.make_augmenter(cfg, banks, len(samples))
    context = Context(pools.values(), cfg.context, cfg.seed) if cfg.context else None
    dataset = Dataset(samples, augment=augment, context=context, batch_size=batch_size, **settings)
    if rank == 0:
        launch.check_data(cfg, data)
        print(f"{len(samples)} samples; {meter.count(model):,} parameters, "
              f"{meter.count(model, True):,} trained; {world} process(es) on {device.type}, batch "
              f"{batch_size} x accumulation {math.ceil(cfg.effective_batch / world / batch_size)}",
              flush=True)
    return model.to(device), dataset, data, shares

# ---- The loop
def learning_rate(cfg, step):  # linear warm-up, then a cosine from lr to min_lr * lr; step from 0
    warmup = max(1, round(cfg.warmup * cfg.steps))
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, cfg.steps - warmup)
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))

def wrap(cfg, model, world):  # -> what computes the loss: under DDP, if there are more processes
    if cfg.grad_checkpoint:
        model.llm.gradient_checkpointing_enable(dict(use_reentrant=False))
    model.train()  # what is frozen stays in eval mode, see model.py
    if cfg.compile:
        for layer in [*model.encoder.layers, *model.llm.model.layers]:
            layer.compile(dynamic=True)  # all share one graph, and rows have many lengths
    if cfg.ctc:
        model = optim.WithCTC(model)
    if world == 1:
        return model
    if cfg.shard:
        return ranks.shard(model)
    # Gradients are views of DDP's buckets, which saves a copy: zero them, do not set them to None.
    return torch.nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True, broadcast_buffers=False)

def backward(net, micro_batches, num_labels, world, device, bf16=False):
    """Add up gradients -> the loss of the step on all ranks: the mean over all num_labels label
    tokens. A mean of the micro-batches' means would weigh a token among 10 a hundred times as much
    as one among 1000. So sum, divide by all, and times `world`: DDP takes the mean of the ranks."""
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for i, inputs in enumerate(micro_batches, 1):
        # DDP synchronises gradients once a step: the last backward sends what all have added up.
        net.require_backward_grad_sync = i == len(micro_batches)  # DDP reads this
        inputs = {k: v.to(device, non_blocking=True) for k, v in inputs.items()}
        inputs["attention_mask"] = {"full_attention": None}  # else transformers looks for one
        with optim.autocast(device.type, bf16):
            part = net(**inputs, num_items_in_batch=num_labels / world).loss
        part.backward()
        loss += part.detach().double() / world  # undone in the loss that is reported
    return ranks.all_sum(dict(loss=loss.item()), device)["loss"]

def train(cfg: TrainConfig) -> int:
    """The run, from data to the last checkpoint -> exit code: 1 diverged, 130 stopped by Ctrl-C."""
    rank, world, device = ranks.start_process(cfg)
    out = Path(cfg.out)
    model, dataset, data, shares = load_data_and_model(cfg, rank, world, device)
    net = wrap(cfg, model, world)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = optim.make(cfg, model)
    # Data order, augmentation, dropout (of each rank) follow from seed and step: no RNG to restore.
    start = storage.restore(out, optimizers) if cfg.resume else 0
    schedule = Schedule([size for size, _ in data.values()], shares, cfg.seed,
                        range(start, cfg.steps), cfg.effective_batch, rank, world)
    batches = ranks.load(dataset, schedule, cfg.workers, pin_memory=device.type == "cuda")
    saver = storage.Saver(out, cfg.keep, rank)
    if rank == 0 and cfg.overwrite and not cfg.resume:
        saver.clear()
    log = meter.Log(cfg, start) if rank == 0 else meter.Silent()
    bad, too_long = BadRows(cfg.strict), BadRows()  # left out; too many bad ones end the run
    signals, stopped, diverged = ranks.catch_signals(), False, False

    for step in range(start, cfg.steps):
        began = time.perf_counter()
        torch.manual_seed((cfg.seed * 1_000_003 + step) * 1009 + rank)  # of dropout
        lr = learning_rate(cfg, step)
        model.ctc = cfg.ctc * (1 - step / cfg.steps)
        batch = next(batches)  # this rank's micro-batches, rows left out, counts of tokens and more
        micro_batches, rows = batch.pop("micro"), batch.pop("left_out")
        total = ranks.all_sum(batch | dict(left_out=len(rows), stop=len(signals)), device)
        ranks.add_left_out(bad, too_long, rows, total, (step + 1 - start) * cfg.effective_batch)
        loss = backward(net, micro_batches, total["labels"], world, device, cfg.bf16)
        norm = ranks.clip_gradients(trained, cfg.grad_clip or math.inf)
        diverged = not math.isfinite(loss + norm)
        if diverged:
            break
        optim.update(optimizers, lr, forget=world == 1 or cfg.shard)  # see wrap
        log.write(dict(step=step + 1, loss=loss, lr=lr, grad_norm=norm,
                       **meter.speed(model, total, time.perf_counter() - began, world, device)))
        if saver.pending.done():
            saver.wait()  # else a full disk would show at the next save only
        stopped = total["stop"] > 0
        if stopped or step + 1 == cfg.steps or (step + 1) % cfg.save_every == 0:
            saver.save(model, optimizers, vars(cfg) | dict(data=data), step + 1)
        if stopped:
            break

    saver.close()
    log.close()
    del net  # DDP must not be the last to hold the process group: its destructor can deadlock
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    for left_out in filter(None, [str(bad), str(too_long)]):
        log.note(f"left out, and replaced by the next rows: {left_out}")
    if diverged:
        last = ["none", *storage.steps_in(out)][-1]
        log.note(f"error: training has diverged: loss {loss:g}, gradient norm {norm:g} at step "
                 f"{step + 1}; last checkpoint: {last}. Try a lower --lr")
        return 1
    if rank == 0:
        print(f"stopped at step {step + 1}, saved; go on with: python train.py --resume --out {out}"
              if stopped else f"done: {out} holds the model; next: python eval.py --ckpt {out}")
    return 130 if stopped and signal.SIGINT in signals else 0

def main() -> int:
    cfg = launch.parse_config(TrainConfig, sys.argv[1:])
    try:
        return train(cfg)
    except (OSError, RuntimeError) as e:
        raise storage.explained(e, cfg.out) from None

cli.run(main, __name__)
