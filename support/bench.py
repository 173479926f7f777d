"""
support/bench.py -- speeds, each as a ratio to something else measured in the same run.

    python -m support.bench augment   # seconds of audio a second on a core, beside audiomentations
    python -m support.bench train     # a training step, beside transformers' Trainer
    python -m support.bench generate  # answers in batches, beside one by one
    python -m support.bench serve --random_size 110m   # vLLM, beside answers in batches
    python -m support.bench memory    # what full size needs, computed: memory and hours

Models have random weights. augment needs: pip install -r support/requirements-bench.txt
"""
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import transformers as hf
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from augment import augment, examples
from data import Dataset, Sample, embedded, texts_of
from model import QWEN3_4B, SAMPLE_RATE, WHISPER_LARGE_V3, BorealisConfig, count
from model import BorealisForConditionalGeneration as Borealis
from support import banks, cli, corpus, engine, export, meter, recipes, rows

WHISPER_TINY = WHISPER_LARGE_V3 | dict(
    d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536,
    decoder_layers=1, decoder_attention_heads=6, num_mel_bins=80)
SIZES = {  # Whisper's shape, Qwen3's differences from 4B, seconds of a request, tokens of an answer
    "tiny": (None, {}, 2, 8),
    "110m": (WHISPER_TINY, dict(
        hidden_size=768, num_hidden_layers=16, num_attention_heads=12, num_key_value_heads=4,
        head_dim=64, intermediate_size=2048, vocab_size=1024), 30, 128),
    "5b": (WHISPER_LARGE_V3, {}, 30, 128)}


@cache
def speech() -> np.ndarray:
    """Six minutes of the embedded corpus, float32 at 16 kHz."""
    spoken = embedded("ru", "train", corpus.CHUNK)
    return rows.load_audio(np.concatenate([s.audio[0] for s in spoken])).numpy()


def random_model(encoder: dict | None, llm: dict, dtype=torch.float32) -> Borealis:
    """Without an encoder's shape, the tiny model."""
    tokenizer = corpus.train_tokenizer(texts_of(embedded("ru", "clean", corpus.CHUNK)))
    config = recipes.tiny_config(tokenizer)
    if encoder:
        ends = {k: getattr(config.llm_config, k) for k in (
            "bos_token_id", "eos_token_id", "pad_token_id")}
        config = recipes.tiny_config(tokenizer, encoder_config=encoder,
                                     llm_config=QWEN3_4B | llm | ends)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # moving 5 B takes minutes
        model = Borealis(config).eval()
    torch.set_default_dtype(torch.float32)
    model.tokenizer = tokenizer
    return model


def take_turns(calls: dict, rounds: int) -> dict:
    """{name: function} -> {name: median seconds of a call}, after a first one of each."""
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def print_table(head: list[str], body: list) -> None:
    """A Markdown table."""
    for cells in (head, ["---", *["--:"] * (len(head) - 1)], *body):
        print("|", " | ".join(map(str, cells)), "|", flush=True)


# -----------------------------------------------------------------------------
# augment. Both sides get one noise, one room, and MP3 at 16 kHz. audiomentations has no resampling
# there and back, and its speed change keeps the pitch: soxr stands in for these two.

def theirs(c, folder: str):
    """The chain of an AugmentConfig, built with audiomentations."""
    import audiomentations as A
    import soxr

    def change_rate(x, rate, low, high):
        return soxr.resample(x, rate * random.uniform(low, high), rate)

    def trip(x, rate, low, high):
        other = random.randint(round(low), round(high))
        return soxr.resample(soxr.resample(x, rate, other), other, rate)

    phone = A.Lambda(trip, p=1, low=c.telephony[1], high=c.telephony[2])
    return A.Compose([
        A.PitchShift(*c.pitch[1:], p=c.pitch[0]),
        A.Lambda(change_rate, p=c.speed[0], low=c.speed[1], high=c.speed[2]),
        A.AddBackgroundNoise(f"{folder}/noises", *c.noise[1:], p=c.noise[0]),
        A.ApplyImpulseResponse(f"{folder}/rooms", p=c.room[0]),
        A.SevenBandParametricEQ(*c.eq[1:3], p=c.eq[0]),
        A.BandPassFilter(p=c.band_pass[0]),
        A.Gain(*c.gain[1:], p=c.gain[0]),
        A.AddGaussianNoise(*c.gaussian[1:], p=c.gaussian[0]),
        A.ClippingDistortion(0, 5, p=c.clipping[0]),
        A.Lambda(trip, p=c.resample[0], low=c.resample[1], high=c.resample[2]),
        A.Compose([phone, A.BandPassFilter(p=1)], p=c.telephony[0]),
        A.Mp3Compression(*c.codec[1:], p=c.codec[0])], p=c.touched)


def compare(name: str, config, folder: str, bank: tuple) -> list:
    """A row of the table: seconds of audio a second, ours and theirs."""
    chain, rng = theirs(config, folder), np.random.default_rng(0)
    clips = speech()[:30 * 10 * SAMPLE_RATE].reshape(30, -1)

    def ours():
        for clip in clips:
            if rng.random() < config.touched:
                augment(clip, config, rng, *bank)

    def other():
        for clip in clips:
            chain(clip, SAMPLE_RATE)

    took = take_turns({"ours": ours, "theirs": other}, rounds=24 if "stage" in name else 2)
    a, b = 300 / took["ours"], 300 / took["theirs"]
    print(f"{name}: {a / b:.1f}", file=sys.stderr)
    return [name, f"{a:,.0f}", f"{b:,.0f}", f"{a / b:.1f}"]


def bench_augment(args):
    warnings.filterwarnings("ignore")  # audiomentations' remarks about its own defaults
    torch.set_num_threads(1)
    bank, one, table = banks.open_banks(), (0, 1, 1), []
    with tempfile.TemporaryDirectory() as folder:
        for name, waves in zip(("noises", "rooms"), bank, strict=True):
            os.mkdir(f"{folder}/{name}")
            for i, wave in enumerate(waves):
                soundfile.write(f"{folder}/{name}/{i}.wav", wave, SAMPLE_RATE)
        for name, config in examples().items():
            if not name.startswith(("before", "mask", "opus", "stage_clean", "split")):
                config = replace(config, opus=0, codec_rate=SAMPLE_RATE, more_noise=one,
                                 more_room=one)
                table.append(compare(name, config, folder, bank))
    print("One core, 30 clips of 10 s\n")
    print_table(["effect or stage", "x real time", "audiomentations", "ratio"], table)


# -----------------------------------------------------------------------------
# train

ACCUMULATION, STEPS = 2, 3
LORA = dict(rank=64, alpha=128, dropout=0.0)
LLM = dict(hidden_size=1024, num_hidden_layers=4, num_attention_heads=16, intermediate_size=3072)
RUNGS = ("the original's way", "+ no graph through the frozen encoder",
         "+ no padding to 1024 tokens", "+ logits at label rows only: train.py's way")


class AllLogits(hf.Trainer):
    """The loss as the original computes it, from logits at every position."""

    def compute_loss(self, model, inputs, **kwargs):
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def trainer_loop(rung: int) -> tuple[float, float]:
    """transformers' Trainer with the first `rung` savings -> seconds a step, and this process's
    peak memory, GiB."""
    model = random_model(WHISPER_TINY, LLM).prepare("lora", LORA)
    if rung < 1:
        model.config.frozen = []  # requires_grad stays off
    spoken = embedded("ru", "train", corpus.CHUNK)
    groups = [spoken[i:i + 10] for i in range(0, 10 * ACCUMULATION * STEPS, 10)]
    dataset = Dataset([Sample(" ".join(s.answer for s in group),
                              [np.concatenate([s.audio[0] for s in group])])
                       for group in groups], model.tokenizer, model.config)

    def collate(items):
        batch = dataset.pad(items)
        if rung < 2:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            length = 1024 + model.config.tokens_per_window * len(items[0][3])
            more = length - batch["input_ids"].shape[1]
            for name, value in dict(input_ids=0, labels=-100, attention_mask=0).items():
                batch[name] = F.pad(batch[name], (0, more), value=value)
        return batch

    stamps = []
    register_optimizer_step_post_hook(lambda *_: stamps.append(time.perf_counter()))
    with tempfile.TemporaryDirectory() as folder:
        settings = hf.TrainingArguments(
            folder, per_device_train_batch_size=1, max_steps=STEPS, report_to=[], use_cpu=True,
            gradient_accumulation_steps=ACCUMULATION, save_strategy="no", logging_strategy="no",
            remove_unused_columns=False, disable_tqdm=True)
        loop = (AllLogits if rung < 3 else hf.Trainer)(
            model, settings, collate, [dataset.item(i) for i in range(len(groups))])
        loop.model_accepts_loss_kwargs = False
        loop.train()
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    return statistics.median(np.diff(stamps)), int(peak.split()[1]) / 2**20


def bench_train(args):
    print(f"{torch.get_num_threads()} cores, float32, batch 1 x accumulation {ACCUMULATION}, some "
          f"15 s a row, LoRA rank {LORA['rank']}, the full vocabulary\n")
    results = []
    for rung in range(len(RUNGS)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # for a peak of its own
            results.append(pool.apply(trainer_loop, [rung]))
    print_table(["Trainer", "samples/s", "peak memory, GiB", "speed", "memory"],
                [[name, f"{ACCUMULATION / seconds:.2f}", f"{peak:.2f}",
                  f"{results[0][0] / seconds:.1f} x", f"{peak / results[0][1]:.2f} x"]
                 for name, (seconds, peak) in zip(RUNGS, results, strict=True)])


# -----------------------------------------------------------------------------
# generate, serve

COUNTS = 1, 4, 16, 32  # requests at once


def time_answers(size: str, answer) -> dict:
    """answer(recordings, tokens) -> {(n, tokens): seconds}, for one token each and for all. All
    answers are equally long, so that every count does the same work a request."""
    *_, seconds, tokens = SIZES[size]
    rng = np.random.default_rng(0)

    def ask(n, length):  # never the same sound again: vLLM does not encode twice what it has heard
        starts = rng.integers(len(speech()), size=n)
        answer([[torch.from_numpy(np.roll(speech(), start)[:seconds * SAMPLE_RATE])]
                for start in starts], length)

    jobs = [(n, length) for n in COUNTS for length in (1, tokens)]
    return take_turns({job: partial(ask, *job) for job in jobs}, rounds=1)


def time_vllm(size: str, dtype: str, folder: str, question: list) -> dict:
    from vllm import SamplingParams
    llm, _ = engine.offline(folder, max_model_len=2048, max_num_seqs=COUNTS[-1], dtype=dtype)

    def answer(waves, tokens):
        prompts = [engine.prompt(llm.tokenizer, question, wave) for wave in waves]
        settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        llm.engine.generate(prompts, settings, use_tqdm=False)

    return time_answers(size, answer)


def bench_answers(args):
    """All in the same dtype; "auto" is bfloat16 where the machine computes in it."""
    if args.what == "serve":
        engine.check_installed()
    *shapes, seconds, tokens = SIZES[args.random_size]
    dtype, question = args.dtype, engine.TRANSCRIBE.messages(with_answer=False)
    if dtype == "auto":
        cpu = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
        dtype = "bfloat16" if torch.cuda.is_available() or "bf16" in cpu else "float32"
    model = random_model(*shapes, getattr(torch, dtype))
    print(f"{count(model) / 1e6:.0f} M, {dtype}, {model.device}, {torch.get_num_threads()} cores\n")

    def native(waves, tokens):
        model.chat([question] * len(waves), waves, tokens, min_new_tokens=tokens).cpu()

    took = {"native": time_answers(args.random_size, native)}
    if args.what == "serve":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(f"{folder}/ckpt")
            model.tokenizer.save_pretrained(f"{folder}/ckpt")
            export.export(f"{folder}/ckpt", f"{folder}/hf")
            del model  # make room
            torch.cuda.empty_cache()
            took["vLLM"] = time_vllm(args.random_size, dtype, f"{folder}/hf", question)
    table = []
    for name, times in took.items():
        for n in COUNTS:
            first, whole = times[n, 1], times[n, tokens]
            table.append([
                f"{name}, {n}", f"{n * seconds / whole:.1f}", f"{n * tokens / whole:,.0f}",
                f"{first:.2f}", f"{n * (tokens - 1) / (whole - first):,.0f}",
                f"{n * times[1, tokens] / whole:.1f} x",
                f"{took['native'][n, tokens] / whole:.2f} x"])
    print_table(["requests at once", "x real time", "tokens/s", "first tokens after, s",
                 "decoding alone, tokens/s", "beside one by one", "beside native"], table)


# -----------------------------------------------------------------------------
# memory: on the meta device and on paper

AUDIO, TEXT = 377, 512  # tokens: 30 s of audio, and text, all of it labels
LAYER = 168_744         # bytes a token that autograd keeps of one layer with LoRA, by measurement
GPU, MFU = "H100", 0.3  # assumed


def full_size(kind: str) -> Borealis:
    with torch.device("meta"):
        lora = dict(rank=256, alpha=512, dropout=0.0)
        return Borealis(BorealisConfig()).prepare(kind.split()[0], lora)


def memory_of(kind: str) -> list:
    """A row of the table, for one kind of --train."""
    model, layers = full_size(kind), QWEN3_4B["num_hidden_layers"]
    trained = count(model, trained_only=True)
    frozen, kept = count(model) - trained, layers * LAYER
    if "checkpoint" in kind:  # the bf16 input of each layer, and all of one layer at a time
        kept = layers * 2 * QWEN3_4B["hidden_size"] + LAYER
    logits = TEXT * QWEN3_4B["vocab_size"] * (2 + 4 + 4 + 2)  # bf16, fp32, and gradients of both
    parts = [4 * trained + 2 * frozen, 4 * trained, 8 * trained, 2 * trained,
             (AUDIO + TEXT) * kept, logits]
    return [kind, *(f"{x / 1e9:.2f}" for x in [*parts, sum(parts)])]


def bench_memory(args):
    kinds = "adapter", "lora", "lora --grad_checkpoint", "full --grad_checkpoint"
    print(f"Full size, bf16 with fp32 masters, batch 1: {AUDIO} tokens of audio and {TEXT} of "
          "text, all with labels; GB (1e9 bytes)\n")
    print_table(["--train", "weights", "gradients", "AdamW", "bf16 copies", "activations",
                 "logits", "total"], map(memory_of, kinds))
    n, tokens, labels = 128, AUDIO + 160, 100  # a step's rows, 90 % with audio, as assumed
    flops = meter.step_flops(full_size("lora"), n * tokens, n * tokens**2, 0.9 * n, n * labels)
    hours = 1000 * flops / (8 * meter.PEAK[GPU] * MFU) / 3600
    print(f"\n{flops / 1e15:.2f} PFLOP a step of {n} rows of {tokens} tokens: 1000 steps take "
          f"{hours:.2f} hours on 8 {GPU} at an assumed MFU of {MFU:.0%}, {8 * hours:.1f} GPU hours")


BENCHES = {"augment": bench_augment, "train": bench_train, "generate": bench_answers,
           "serve": bench_answers, "memory": bench_memory}


def main() -> None:
    parser = cli.ArgumentParser(prog="python -m support.bench",
                                description="Speeds, as ratios measured in one run.")
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("--random_size", choices=SIZES, default="110m", help="of the model")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    args = parser.parse_args()
    try:
        BENCHES[args.what](args)
    except ModuleNotFoundError as e:
        raise cli.UserError(f"{e.name} is not installed: make bench, or pip install -r "
                            "support/requirements-bench.txt") from None


if __name__ == "__main__":
    cli.run(main)
