"""
support/bench.py -- speeds of random weights, as ratios to something measured in the same run.

    python -m support.bench augment   # seconds of audio a second on a core, beside audiomentations
    python -m support.bench train     # a training step, beside transformers' Trainer
    python -m support.bench generate  # answers in batches, beside one by one
    python -m support.bench serve --random_size 110m   # vLLM, beside our own generation
    python -m support.bench memory    # what full size needs, computed: memory and hours
"""
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from functools import cache, partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import transformers as hf
from numpy.random import SFC64, Generator
from tabulate import tabulate
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import train
from augment import HEAVY, AugmentConfig, augment, examples
from data import Dataset, embedded, read_manifest
from model import QWEN3_4B, SAMPLE_RATE, WHISPER_LARGE_V3, BorealisConfig, count
from model import BorealisForConditionalGeneration as Borealis
from support import banks, checkpoint, cli, corpus, engine, export, launch, lora, meter, sound, tiny
from support.rows import BadRows, load_audio

# ---- Models, clocks, tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WHISPER_TINY = WHISPER_LARGE_V3 | dict(
    d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536, num_mel_bins=80)
SIZES = {  # the encoder's shape, how the LLM differs from Qwen3-4B; answers and their tokens
    "tiny": (None, {}, 64, 8),
    "110m": (WHISPER_TINY, dict(
        hidden_size=768, num_hidden_layers=16, num_attention_heads=12, num_key_value_heads=4,
        head_dim=64, intermediate_size=2048, vocab_size=1024), 8, 128),
    "5b": (WHISPER_LARGE_V3, {}, 8, 128)}

def random_model(encoder: dict | None, llm: dict, dtype=torch.float32) -> Borealis:
    """Without an encoder's shape, the tiny model."""
    tokenizer = tiny.train_tokenizer(tiny.texts_of(embedded("ru", "clean", corpus.CHUNK)))
    config = tiny.tiny_config(tokenizer)
    if encoder:
        names = "bos_token_id", "eos_token_id", "pad_token_id"
        llm = QWEN3_4B | llm | {name: getattr(config.llm_config, name) for name in names}
        config = tiny.tiny_config(tokenizer, encoder_config=encoder, llm_config=llm)
    torch.manual_seed(0)
    with torch.device(DEVICE):  # moving 5 B would take minutes
        model = lora.cast(Borealis(config).eval(), dtype)
    model.tokenizer = tokenizer
    return model

def save(model: Borealis, folder: str) -> None:
    model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)

@cache
def speech() -> np.ndarray:
    """Some minutes of the embedded corpus, float32 at 16 kHz."""
    spoken = embedded("ru", "train", corpus.CHUNK)
    return load_audio(np.concatenate([s.audio[0] for s in spoken])).numpy()

def take_turns(calls: dict, rounds: int) -> dict:
    """{key: function} -> {key: median seconds of a call}, after a first one of each."""
    times = {key: [] for key in calls}
    for _, (key, call) in itertools.product(range(rounds + 1), calls.items()):
        began = time.perf_counter()
        call()
        times[key].append(time.perf_counter() - began)
    print(times, file=sys.stderr)
    return {key: statistics.median(t[1:]) for key, t in times.items()}

def print_table(formats: dict[str, str], rows: list) -> None:
    """formats: {heading: how to write a number below it}. The first column is text."""
    print(tabulate(rows, [*formats], "pipe", floatfmt=[*formats.values()]), flush=True)

# ---- augment

CLIP = 10 * SAMPLE_RATE

def theirs(c: AugmentConfig, folder: str, plain_speed: bool):
    """The same chain of audiomentations; Opus, which it lacks, is ours, resampling soxr's. Speed is
    a time stretch; plain_speed: soxr's rate change. A second noise or room comes on average."""
    import audiomentations as A
    import soxr
    rng = np.random.default_rng(0)
    def change_rate(x, rate):
        return soxr.resample(x, rate * rng.uniform(*c.speed[1:]), rate)
    def trip(x, rate, low, high):
        other = round(rng.uniform(low, high))
        return soxr.resample(soxr.resample(x, rate, other), other, rate)
    def band(low, low2, high, high2, p=1.0):
        low, high = (low + low2) / 2, (high + high2) / 2
        centre, width = (low + high) / 2, 2 * (high - low) / (high + low)
        return A.BandPassFilter(centre, centre, width, width, p=p)
    def mp3(x, rate):
        if c.codec_rate == rate:
            return lame(x, rate)
        coded = lame(soxr.resample(x, rate, c.codec_rate), c.codec_rate)
        return soxr.resample(coded, c.codec_rate, rate)
    def opus(x, rate):
        return sound.codec(x, np.mean(c.codec[1:]), "opus", c.codec_rate)
    top = 160 if c.codec_rate == SAMPLE_RATE else 64  # MP3's kbit/s
    lame = A.Mp3Compression(*(min(round(kbps), top) for kbps in c.codec[1:]), p=1)
    speed = (A.Lambda(change_rate, p=c.speed[0]) if plain_speed else
             A.TimeStretch(*c.speed[1:], leave_length_unchanged=False, p=c.speed[0]))
    phone = A.Lambda(trip, p=1, low=c.telephony[1], high=c.telephony[2])
    return A.Compose([
        A.PitchShift(*c.pitch[1:], p=c.pitch[0]), speed,
        A.Compose([A.AddBackgroundNoise(f"{folder}/noises", *c.noise[1:], p=p)
                   for p in (1, c.more_noise[0] * np.mean(c.more_noise[1:]))], p=c.noise[0]),
        A.Compose([A.ApplyImpulseResponse(f"{folder}/rooms", p=p)
                   for p in (1, c.more_room[0] * np.mean(c.more_room[1:]))], p=c.room[0]),
        A.SevenBandParametricEQ(*c.eq[1:3], p=c.eq[0]),
        band(*c.band_pass[1:], p=c.band_pass[0]),
        A.Gain(*c.gain[1:], p=c.gain[0]),
        A.AddGaussianNoise(*c.gaussian[1:], p=c.gaussian[0]),
        A.ClippingDistortion(0, 5, p=c.clipping[0]),
        A.Lambda(trip, p=c.resample[0], low=c.resample[1], high=c.resample[2]),
        A.Compose([phone, band(*c.telephony[3:])], p=c.telephony[0]),
        A.Lambda(mp3, p=c.codec[0] * (1 - c.opus)),
        A.Lambda(opus, p=c.codec[0] * c.opus)], p=c.touched)

def compare(name: str, config: AugmentConfig, folder: str, bank: tuple, plain=False) -> list:
    """A row of the table: seconds of audio a second, ours and theirs."""
    chain, seeds = theirs(config, folder, plain), itertools.count()
    clips = speech()[:len(speech()) // CLIP * CLIP].reshape(-1, CLIP)
    def our_side():
        for clip in clips:
            rng = Generator(SFC64([0, next(seeds)]))
            if rng.random() < config.touched:
                augment(clip, config, rng, *bank)
    def their_side():
        for clip in clips:
            chain(clip, SAMPLE_RATE)
    took = take_turns({name: our_side, "theirs": their_side}, rounds=24 if "stage" in name else 2)
    a, b = (clips.size / SAMPLE_RATE / seconds for seconds in took.values())
    return [name, a, b, a / b]

def bench_augment(args):
    import audiomentations
    import fast_mp3_augment  # noqa: F401, audiomentations' quickest MP3
    warnings.filterwarnings("ignore")  # audiomentations' remarks about its own defaults
    if hasattr(os, "sched_setaffinity"):  # not on a Mac
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    bank = banks.open_banks()
    with tempfile.TemporaryDirectory() as folder:
        for name, waves in zip(("noises", "rooms"), bank, strict=True):
            os.mkdir(f"{folder}/{name}")
            for i, wave in enumerate(waves):
                soundfile.write(f"{folder}/{name}/{i}.wav", wave, SAMPLE_RATE)
        table = [compare(name, config, folder, bank) for name, config in examples().items()
                 if not name.startswith(("before", "mask", "stage_clean", "split"))]
        table.append(compare("stage_heavy, plain speed on both sides", HEAVY, folder, bank, True))
    print(f"audiomentations {audiomentations.__version__}, one core, clips of 10 s\n")
    print_table({"effect or stage": "", "x real time": ",.0f", "audiomentations": ",.0f",
                 "ratio": ".1f"}, table)

# ---- train: transformers' Trainer, saving after saving, and train.py

ACCUMULATION, STEPS = 2, 3  # the first step is not counted
MAX_TEXT = 1024             # the original pads every text to this
LORA = dict(rank=64, alpha=128, dropout=0.0)
LLM = dict(hidden_size=1024, num_hidden_layers=4, num_attention_heads=16, intermediate_size=3072)
RUNGS = ("Trainer, the original's way", f"+ no padding to {MAX_TEXT}",
         "+ logits at label positions only")

def make_run(folder: str) -> None:
    """A checkpoint (shapes: Whisper-tiny, Qwen3-0.6B's first 4 layers); some 15 s a row."""
    save(random_model(WHISPER_TINY, LLM), f"{folder}/ckpt")
    spoken, rows = embedded("ru", "train", corpus.CHUNK), []
    for i in range(ACCUMULATION * STEPS):
        group = spoken[10 * i:10 * i + 10]
        pcm = np.concatenate([s.audio[0] for s in group])
        soundfile.write(f"{folder}/{i}.wav", pcm, SAMPLE_RATE)
        rows.append({"audio": f"{i}.wav", "text": " ".join(s.answer for s in group)})
    cli.write_text(f"{folder}/own.jsonl", "\n".join(map(json.dumps, rows)))

class AllLogits(hf.Trainer):
    """The loss as the original computes it, from logits at every position."""
    def compute_loss(self, model, inputs, **kwargs):
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

def trainer_loop(folder: str, rung: int) -> tuple[float, float, float]:
    """The Trainer with the first `rung` savings -> seconds and tokens of a step, peak GiB."""
    model = checkpoint.load_checkpoint(f"{folder}/ckpt")
    lora.prepare(model, "lora", LORA)
    samples, _ = read_manifest(f"{folder}/own.jsonl", BadRows())
    dataset = Dataset(samples, model.tokenizer, model.config)
    def collate(indices):
        batch = dataset.pad([dataset.item(i) for i in indices])
        if rung < 1:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            length = MAX_TEXT + model.config.tokens_per_window * len(batch["input_features"])
            more = length - batch["input_ids"].shape[1]
            for name, value in dict(input_ids=0, labels=-100, attention_mask=0).items():
                batch[name] = F.pad(batch[name], (0, more), value=value)
        return batch
    stamps = []
    register_optimizer_step_post_hook(lambda *_: stamps.append(time.perf_counter()))
    settings = hf.TrainingArguments(
        f"{folder}/trainer", per_device_train_batch_size=1, max_steps=STEPS, report_to=[],
        use_cpu=True, gradient_accumulation_steps=ACCUMULATION, save_strategy="no",
        logging_strategy="no", remove_unused_columns=False, disable_tqdm=True)
    rows = range(len(samples))
    loop = (AllLogits if rung < 2 else hf.Trainer)(model, settings, collate, rows)
    loop.model_accepts_loss_kwargs = False
    loop.train()
    tokens = sum(len(dataset.item(i)[0]) for i in rows) / STEPS
    return statistics.median(np.diff(stamps)), tokens, peak_memory()

def our_loop(folder: str) -> tuple[float, float, float]:
    """train.py itself -> the same."""
    flags = dict(init_from=f"{folder}/ckpt", train_manifest=f"{folder}/own.jsonl", steps=STEPS,
                 effective_batch=ACCUMULATION, workers=0, lora_rank=LORA["rank"],
                 lora_alpha=LORA["alpha"], device="cpu", out=f"{folder}/out")
    argv = [f"--{name}={value}" for name, value in flags.items()]
    train.train(launch.parse_config(train.TrainConfig, argv))
    steps = meter.read_metrics(Path(folder, "out", "metrics.jsonl"), STEPS)
    tokens = sum(row["tokens_per_s"] * row["ms"] / 1e3 for row in steps) / STEPS
    return statistics.median(row["ms"] / 1e3 for row in steps[1:]), tokens, peak_memory()

def peak_memory() -> float:
    """Highest resident memory of this process, GiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20

def bench_train(args):
    print(f"{torch.get_num_threads()} cores, float32, batch 1 x accumulation {ACCUMULATION}, some "
          f"15 s a row, LoRA rank {LORA['rank']}, vocabulary {QWEN3_4B['vocab_size']:,}\n")
    with tempfile.TemporaryDirectory() as folder:
        make_run(folder)
        loops = {name: partial(trainer_loop, folder, i) for i, name in enumerate(RUNGS)}
        loops["train.py"] = partial(our_loop, folder)
        # Each in a process of its own: its peak memory is the loop's. It prints to standard error.
        with multiprocessing.get_context("spawn").Pool(1, os.dup2, (2, 1), 1) as pool:
            results = {name: pool.apply(loop) for name, loop in loops.items()}
    slowest, _, most = results[RUNGS[0]]
    print_table({"loop": "", "samples/s": ".2f", "tokens/s": ".0f", "peak memory, GiB": ".2f",
                 "speed x": ".1f", "memory x": ".2f"},
                [[name, ACCUMULATION / seconds, tokens / seconds, peak, slowest / seconds,
                  peak / most] for name, (seconds, tokens, peak) in results.items()])

# ---- generate, serve: all answers of a table are equally long, so that all do the same work

QUESTION = engine.TRANSCRIBE.messages(with_answer=False)
BATCHES, ROUNDS = (1, 2, 4, 8, 16), 3

def answer_all(model: Borealis, batch: int, waves: list, tokens: int) -> None:
    """So many recordings at once, so many tokens for each."""
    for i in range(0, len(waves), batch):
        group = [[wave] for wave in waves[i:i + batch]]
        model.chat([QUESTION] * len(group), group, tokens, min_new_tokens=tokens).cpu()

def bench_generate(args):
    dtype, table = torch.float32 if DEVICE == "cpu" else torch.bfloat16, []
    print(f"{torch.get_num_threads()} cores, {dtype}, median of {ROUNDS} rounds\n")
    for size, (*shapes, n, tokens) in SIZES.items():
        if size == "5b" and DEVICE == "cpu":
            continue
        model = random_model(*shapes, dtype)
        waves = [load_audio(s.audio[0]) for s in embedded("ru", "clean", n)]
        batches = [b for b in BATCHES if b <= n]
        took = take_turns({(b, length): partial(answer_all, model, b, waves, length)
                           for b, length in itertools.product(batches, (1, tokens))}, ROUNDS)
        audio = sum(map(len, waves)) / SAMPLE_RATE
        one_by_one = took[1, tokens] - took[1, 1]
        for batch in batches:
            whole, decoding = took[batch, tokens], took[batch, tokens] - took[batch, 1]
            table.append([f"{size}, {count(model) / 1e6:.0f} M", batch, audio / whole,
                          n * tokens / whole, took[1, tokens] / whole,
                          n * (tokens - 1) / decoding, one_by_one / decoding])
    print_table({"model": "", "batch": "", "x real time": ".1f", "tokens/s": ",.0f",
                 "speed x": ".1f", "decoding alone, tokens/s": ",.0f", "its speed x": ".1f"}, table)

COUNTS = 1, 4, 16, 32             # requests at once
SECONDS, NEW_TOKENS = 30, 128     # of a request: the post's setting

def time_requests(answer) -> dict:
    """answer(recordings, tokens) -> {(n, tokens): seconds}, for one token each and for all."""
    rng, wave, longest, took = np.random.default_rng(0), speech(), SECONDS * SAMPLE_RATE, {}
    def ask(n, tokens):  # never the same sound again: vLLM does not encode twice what it has heard
        starts = rng.integers(len(wave) - longest, size=n)
        answer([torch.from_numpy(wave[i:i + longest]) for i in starts], tokens)
    for n in COUNTS:
        took |= take_turns({(n, tokens): partial(ask, n, tokens) for tokens in (1, NEW_TOKENS)},
                           rounds=ROUNDS if n <= 4 else 1)
    return took

def time_vllm(folder: str, dtype: str) -> dict:
    from vllm import SamplingParams
    llm = engine.Offline(folder, max_model_len=2048, max_num_seqs=COUNTS[-1], dtype=dtype)
    def answer(waves, tokens):
        prompts = [engine.prompt(llm.tokenizer, engine.TRANSCRIBE, [wave]) for wave in waves]
        settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        llm.engine.generate(prompts, settings, use_tqdm=False)
    return time_requests(answer)

def bench_serve(args):
    """Both in the same dtype; "auto" is bfloat16 where the machine computes in it."""
    engine.check_installed()
    dtype, took, table = args.dtype, {}, []
    if dtype == "auto":
        cpu = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
        dtype = "bfloat16" if DEVICE == "cuda" or "bf16" in cpu else "float32"
    model = random_model(*SIZES[args.random_size][:2], getattr(torch, dtype))
    print(f"{args.random_size}: {count(model) / 1e6:.0f} M, {dtype}, {DEVICE}, "
          f"{torch.get_num_threads()} cores; {SECONDS} s and {NEW_TOKENS} tokens a request\n")
    took["native"] = time_requests(partial(answer_all, model, COUNTS[-1]))
    with tempfile.TemporaryDirectory() as folder:
        save(model, f"{folder}/ckpt")
        export.export(f"{folder}/ckpt", f"{folder}/hf")
        del model  # make room
        torch.cuda.empty_cache()
        took["vllm"] = time_vllm(f"{folder}/hf", dtype)
    for n, name in itertools.product(COUNTS, took):
        whole = took[name][n, NEW_TOKENS]
        table.append([n, name, n * NEW_TOKENS / whole, took[name][n, 1], whole / n / SECONDS,
                      took["native"][n, NEW_TOKENS] / whole])
    print_table({"requests": "", "engine": "", "tokens/s": ".1f", "all first tokens after, s":
                 ".2f", "RTF": ".4f", "beside native x": ".2f"}, table)
    best = min(took["native"][n, NEW_TOKENS] / n for n in COUNTS)  # seconds a request
    vllm = took["vllm"][COUNTS[-1], NEW_TOKENS] / COUNTS[-1]
    print(f"\nvLLM at {COUNTS[-1]} requests beside the best native batch: {best / vllm:.2f} x")

# ---- memory: on the meta device and on paper, but for one layer's activations

AUDIO, TEXT = 377, 512  # tokens: 30 s of audio, and text, all of it labels
FULL_LORA = dict(rank=256, alpha=512, dropout=0.0)
GPU, MFU = "H100", 0.3  # assumed

def kept_for_backward(layers: int) -> int:
    """Bytes autograd keeps, besides weights, of so many full-size layers with LoRA on a CPU."""
    small = dict(num_hidden_layers=layers, vocab_size=1, pad_token_id=0)
    llm = lora.cast(hf.Qwen3Model(hf.Qwen3Config(**QWEN3_4B | small)), torch.bfloat16)
    lora.add_matrices(llm, **FULL_LORA)
    trained = [p for p in llm.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    weights, kept = {p.untyped_storage().data_ptr() for p in llm.parameters()}, {}
    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from reuse
        return x
    x = torch.randn(1, AUDIO + TEXT, QWEN3_4B["hidden_size"], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), \
            torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        llm(inputs_embeds=x, use_cache=False)
    # autocast's bf16 copies of the trained matrices are kept as well; the table has them already
    copies = sum(2 * p.numel() for p in trained)
    return sum(storage.nbytes() for storage in kept.values()) - copies

def full_size(kind: str, adapter: str = "simple") -> Borealis:
    with torch.device("meta"):
        return lora.prepare(Borealis(BorealisConfig(adapter=adapter)), kind, FULL_LORA)

def memory_of(kind: str, layer: int) -> list:
    """A row of the table, for a kind of --train. layer: bytes kept of one layer."""
    model, layers = full_size(kind.split()[0]), QWEN3_4B["num_hidden_layers"]
    trained = count(model, trained_only=True)
    frozen, kept = count(model) - trained, layers * layer
    if "checkpoint" in kind:  # the bf16 input of each layer, and all of one layer at a time
        kept = layers * 2 * (AUDIO + TEXT) * QWEN3_4B["hidden_size"] + layer
    logits = TEXT * QWEN3_4B["vocab_size"] * (2 + 4 + 4 + 2)  # bf16, fp32, and gradients of both
    parts = [4 * trained + 2 * frozen, 4 * trained, 8 * trained, 2 * trained, kept, logits]
    return [kind, *(x / 1e9 for x in [*parts, sum(parts)])]

def bench_memory(args):
    print(f"Full size, bf16, fp32 masters, batch 1: {AUDIO} tokens of audio, {TEXT} labels; GB\n")
    kinds = "adapter", "lora", "lora --grad_checkpoint", "full --grad_checkpoint"
    layer = kept_for_backward(2) - kept_for_backward(1)
    names = "weights", "gradients", "AdamW", "bf16 copies", "activations", "logits", "total"
    print_table({"--train": ""} | dict.fromkeys(names, ".2f"),
                [memory_of(kind, layer) for kind in kinds])
    for adapter, kind in itertools.product(("simple", "deep"), ("adapter", "lora", "full")):
        trained = count(full_size(kind, adapter), trained_only=True)
        print(f"--adapter {adapter} --train {kind}: {trained:,} trained")
    n, tokens, labels = 128, AUDIO + 160, 100  # a step's rows, 90 % with audio, as assumed
    flops = meter.step_flops(full_size("lora"), n * tokens, n * tokens**2, 0.9 * n, n * labels)
    hours = 1000 * flops / (8 * meter.PEAK[GPU] * MFU) / 3600
    print(f"\n{flops / 1e15:.2f} PFLOP a step of {n} rows of {tokens} tokens: 1000 steps take "
          f"{hours:.2f} hours on 8 {GPU} at an assumed MFU of {MFU:.0%}, {8 * hours:.1f} GPU hours")

BENCHES = {"augment": bench_augment, "train": bench_train, "generate": bench_generate,
           "serve": bench_serve, "memory": bench_memory}

def main() -> None:
    parser = cli.ArgumentParser(prog="python -m support.bench", description="Measure speeds.")
    parser.add_argument("what", choices=BENCHES)
    dtypes = "auto", "bfloat16", "float32"
    parser.add_argument("--random_size", choices=SIZES, default="110m", help="for serve")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="for serve")
    args = parser.parse_args()
    try:
        BENCHES[args.what](args)
    except ModuleNotFoundError as e:
        raise cli.UserError(f"{e.name} is missing: see support/requirements-bench.txt") from None

if __name__ == "__main__":
    cli.run(main)
