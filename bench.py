"""
bench.py -- speeds, each as a ratio to something else measured in the same run.

    python bench.py augment    # seconds of audio a second on one core, beside the same chains built with audiomentations
    python bench.py train      # a training step, beside transformers' Trainer the way the original uses it
    python bench.py generate   # transcribing in batches, beside one by one
    python bench.py serve --random_size 110m   # native generation beside vLLM; tiny, 110m or 5b, no weights needed
    python bench.py memory     # what full size needs, computed: memory by part, and the cost of 1000 steps

Both sides of a comparison run on the same machine in one go. augment needs packages that nothing else does:
pip install -r requirements-bench.txt
"""
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import soundfile
import torch

from augment import CURRICULUM, augment, codec, effects, open_banks
from data import CHUNK, ArgumentParser, Dataset, UserError, embedded, load_audio, run, texts_of, train_tokenizer
from model import QWEN3_4B, SAMPLE_RATE, WHISPER_LARGE_V3, BorealisConfig, BorealisForConditionalGeneration, count, tiny_config

SECONDS = 10  # of a clip


def take_turns(contestants, clips, rounds):
    """{name: function(clip, number of the call)} -> {name: seconds of audio a second}, each over all clips, all rounds."""
    spent = dict.fromkeys(contestants, 0.0)
    for function in contestants.values():  # first calls build plans and load libraries
        function(clips[0], 0)
    for r in range(rounds):
        for name, function in contestants.items():
            began = time.perf_counter()
            for i, clip in enumerate(clips):
                function(clip, r * len(clips) + i)
            spent[name] += time.perf_counter() - began
    return {name: rounds * sum(map(len, clips)) / SAMPLE_RATE / s for name, s in spent.items()}


# -----------------------------------------------------------------------------
# augment

def theirs(config, noises, rooms, plain_speed=False):
    """The chain of augment.py for this config, built with audiomentations. It has no Opus and no resampling there and back:
    these are soundfile's and soxr's here. Its speed is a time stretch, which keeps the pitch; plain_speed exchanges it for
    soxr's rate change."""
    import audiomentations as A
    import soxr

    def there_and_back(effect, p):
        def trip(x, sample_rate):
            rate = random.randint(round(effect[1]), round(effect[2]))
            return soxr.resample(soxr.resample(x, sample_rate, rate), rate, sample_rate)
        return A.Lambda(trip, p=p)

    def band(effect, p):
        low, high = np.mean(effect[1:3]), np.mean(effect[3:5])
        centre, width = (low + high) / 2, 2 * (high - low) / (high + low)
        return A.BandPassFilter(centre, centre, width, width, p=p)

    def codec_at(rate, kbps, p):
        mp3 = A.Mp3Compression(*(min(round(k), 160 if rate >= 16000 else 64) for k in kbps), p=1)
        def coded(x, sample_rate):
            y = mp3(x if rate == sample_rate else soxr.resample(x, sample_rate, rate), rate)
            return y if rate == sample_rate else soxr.resample(y, rate, sample_rate)
        return A.Lambda(coded, p=p)

    c, (more_noise, more_room) = config, (np.mean(e[1:]) * e[0] for e in (config.more_noise, config.more_room))
    noise = [A.AddBackgroundNoise(noises, *c.noise[1:], p=p) for p in (1, *split(more_noise))]
    room = [A.ApplyImpulseResponse(rooms, p=p) for p in (1, *split(more_room))]
    return A.Compose([
        A.PitchShift(*c.pitch[1:], p=c.pitch[0]),
        A.Lambda(lambda x, rate: soxr.resample(x, rate * random.uniform(*c.speed[1:]), rate), p=c.speed[0]) if plain_speed
        else A.TimeStretch(*c.speed[1:], leave_length_unchanged=False, p=c.speed[0]),
        A.Compose(noise, p=c.noise[0]), A.Compose(room, p=c.room[0]),
        A.SevenBandParametricEQ(*c.eq[1:3], p=c.eq[0]), band(c.band_pass, c.band_pass[0]), A.Gain(*c.gain[1:], p=c.gain[0]),
        A.AddGaussianNoise(*c.gaussian[1:], p=c.gaussian[0]), A.ClippingDistortion(0, 5, p=c.clipping[0]),
        there_and_back(c.resample, c.resample[0]),
        A.Compose([there_and_back(c.telephony, 1), band(c.telephony[2:], 1)], p=c.telephony[0]),
        codec_at(c.codec_rate, c.codec[1:], c.codec[0] * (1 - c.opus)),
        A.Lambda(lambda x, sample_rate: codec(x, np.mean(c.codec[1:]), "opus", c.codec_rate), p=c.codec[0] * c.opus),
    ], p=c.touched)


def split(expected):
    """An expected number of extra sources as probabilities: 0.9 -> [0.9], 1.5 -> [1, 0.5]."""
    return [min(1, expected - i) for i in range(int(np.ceil(expected)))]


def bench_augment():
    try:
        import audiomentations
        import fast_mp3_augment  # noqa: F401 -- audiomentations' quickest MP3
    except ImportError as e:
        raise UserError(f"{e.name} is not installed: pip install -r requirements-bench.txt, or make bench") from None
    warnings.filterwarnings("ignore")  # audiomentations' remarks about its own defaults
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    speech = np.concatenate([s.audio[0] for s in embedded("ru", "train", CHUNK)]).astype(np.float32) / 32768
    clips = list(speech[:len(speech) // (SECONDS * SAMPLE_RATE) * SECONDS * SAMPLE_RATE].reshape(-1, SECONDS * SAMPLE_RATE))
    banks = noises, rooms = open_banks()
    configs = {name: (config, 2, False) for name, config in effects().items() if name != "mask"} | {  # rounds, plain_speed
        f"stage {s.name}": (s.config, 24, False) for s in CURRICULUM if s.config.touched} | {
        "stage heavy, plain speed on both sides": (CURRICULUM[-1].config, 24, True)}
    print(f"audiomentations {audiomentations.__version__}, one core, {len(clips)} clips of {SECONDS} s of speech\n\n"
          "| effect or stage | x real time | audiomentations | ratio |\n|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for name, bank in (("noises", noises), ("rooms", rooms)):
            os.mkdir(f"{folder}/{name}")
            for i, clip in enumerate(bank):
                soundfile.write(f"{folder}/{name}/{i}.wav", clip, SAMPLE_RATE)
        for name, (config, rounds, plain_speed) in configs.items():
            chain = theirs(config, f"{folder}/noises", f"{folder}/rooms", plain_speed)

            def ours(clip, number, config=config):
                rng = np.random.Generator(np.random.SFC64([0, number]))
                return augment(clip, config, rng, *banks) if rng.random() < config.touched else clip

            speed = take_turns({"ours": ours, "theirs": lambda clip, _, chain=chain: chain(clip, SAMPLE_RATE)}, clips, rounds)
            print(f"| {name} | {speed['ours']:,.0f} | {speed['theirs']:,.0f} | {speed['ours'] / speed['theirs']:.1f} |",
                  flush=True)


# -----------------------------------------------------------------------------
# train

MAX_TEXT = 1024  # the original pads every text to this, and adds 375 a window
MID = dict(encoder=dict(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536, decoder_layers=1,
                        decoder_attention_heads=6, decoder_ffn_dim=64, num_mel_bins=80, max_source_positions=1500,
                        vocab_size=8, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0),
           llm=QWEN3_4B | dict(hidden_size=1024, num_hidden_layers=4, num_attention_heads=16, intermediate_size=3072))
ACCUMULATION, STEPS = 2, 3  # the first step is not counted
LORA = dict(rank=64, alpha=128, dropout=0.0)


def mid_parts(folder):
    """Random weights of Whisper-tiny's shape and of Qwen3-0.6B's with 4 layers instead of 28, and a manifest of speech of
    some 15 s a row, on disk as a user has them."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, WhisperConfig, WhisperModel
    torch.manual_seed(0)
    speech, rng, rows = embedded("ru", "train", CHUNK), random.Random(0), []
    tokenizer = train_tokenizer(texts_of(speech))
    ids = tokenizer.convert_tokens_to_ids
    # The real vocabulary's size needs as many tokens: what the small tokenizer lacks is filled up.
    tokenizer.add_tokens([f"<filler{i}>" for i in range(MID["llm"]["vocab_size"] - len(tokenizer))])
    WhisperModel(WhisperConfig(**MID["encoder"])).save_pretrained(folder / "whisper")
    Qwen3ForCausalLM(Qwen3Config(**MID["llm"] | dict(eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>"),
                                                     bos_token_id=None))).save_pretrained(folder / "qwen")
    tokenizer.save_pretrained(folder / "qwen")
    for i in range(ACCUMULATION * STEPS):
        group = rng.sample(speech, 10)  # of like length, so that it does not matter who gets which row when
        soundfile.write(folder / f"{i}.wav", np.concatenate([s.audio[0] for s in group]), SAMPLE_RATE)
        rows.append(dict(audio=f"{i}.wav", text=" ".join(s.answer for s in group)))
    (folder / "own.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def peak_memory():
    """Highest resident memory of this process, GiB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def our_loop(folder):
    """train.py itself -> seconds of each step, peak memory, tokens a sample."""
    import train
    sys.argv = ["train.py", "--preset", "ru_only", "--init_from", "none", "--encoder", f"{folder}/whisper", "--llm", f"{folder}/qwen",
                "--train_manifest", f"{folder}/own.jsonl", "--steps", str(STEPS), "--effective_batch", str(ACCUMULATION), "--workers",
                "0", "--lora_rank", str(LORA["rank"]), "--lora_alpha", str(LORA["alpha"]), "--device", "cpu", "--out", f"{folder}/out"]
    train.main()
    rows = [json.loads(line) for line in Path(folder, "out", "metrics.jsonl").read_text().splitlines()]
    return [r["ms"] / 1e3 for r in rows], peak_memory(), sum(r["ms"] / 1e3 * r["tokens_per_s"] for r in rows) / STEPS / ACCUMULATION


def trainer_loop(folder, pad, all_logits, encoder):
    """The same through transformers' Trainer. pad: text to MAX_TEXT, with a mask. all_logits: at every position. encoder:
    "no_grad" (ours), "frozen" (requires_grad off, no more), or "left out" (of the optimizer only)."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from data import BadRows, read_manifest

    class Original(BorealisForConditionalGeneration):
        def forward(self, input_ids, input_features, labels, attention_mask=None, num_items_in_batch=None):
            if not all_logits:
                return super().forward(input_ids, input_features, attention_mask, labels)
            logits = super().forward(input_ids, input_features, attention_mask).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
            return dict(loss=loss, logits=logits)

    model = Original.from_parts(f"{folder}/whisper", f"{folder}/qwen", torch.float32).prepare("lora", LORA)
    model.encoder.requires_grad_(encoder == "left out")
    if encoder != "no_grad":
        model.config.frozen = []
    samples, _ = read_manifest(f"{folder}/own.jsonl", BadRows())
    dataset = Dataset(samples, model.tokenizer, model.config)

    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return len(samples)

        def __getitem__(self, i):
            return dataset.item(i)

    def collate(items):
        batch = dataset.pad(items)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"]) if pad else None
        more = MAX_TEXT + model.config.tokens_per_window * len(items[0][3]) - batch["input_ids"].shape[1]
        if pad:
            fill = dict(input_ids=model.config.llm_config.pad_token_id, labels=-100, attention_mask=0)
            batch |= {k: torch.nn.functional.pad(batch[k], (0, more), value=v) for k, v in fill.items()}
        return batch

    class Clock(TrainerCallback):
        times = []

        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            self.times.append(time.perf_counter() - self.began)

    settings = TrainingArguments(output_dir=f"{folder}/trainer", per_device_train_batch_size=1, gradient_accumulation_steps=ACCUMULATION,
                                 max_steps=STEPS, learning_rate=1e-5, report_to=[], save_strategy="no", logging_strategy="no",
                                 use_cpu=True, remove_unused_columns=False, disable_tqdm=True)
    trainer = Trainer(model, settings, train_dataset=Items(), data_collator=collate, callbacks=[Clock()])
    trainer.model_accepts_loss_kwargs = False
    if encoder == "left out":
        trainer.optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if p.requires_grad and "encoder" not in n], lr=1e-5)
    trainer.train()
    return Clock.times, peak_memory(), statistics.mean(len(dataset.item(i)[0]) for i in range(len(samples)))


def alone(function, *args):
    """Call function(*args) in a process of its own, whose peak memory is then that of the call."""
    with multiprocessing.get_context("spawn").Pool(1, mute) as pool:
        return pool.apply(function, args)


def mute():
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def bench_train():
    rungs = {  # each row is the one above and one saving more
        "Trainer, encoder only left out of the optimizer": (trainer_loop, True, True, "left out"),
        "Trainer, the original's way: encoder frozen": (trainer_loop, True, True, "frozen"),
        "+ no graph through the encoder (no_grad)": (trainer_loop, True, True, "no_grad"),
        f"+ no padding to {MAX_TEXT}": (trainer_loop, False, True, "no_grad"),
        "+ logits at label rows only": (trainer_loop, False, False, "no_grad"),
        "train.py": (our_loop,)}
    print(f"{torch.get_num_threads()} cores, float32, batch 1 x accumulation {ACCUMULATION}, clips of some 15 s, LoRA rank {LORA['rank']}, "
          f"vocabulary {MID['llm']['vocab_size']:,}\n\n| loop | samples/s | tokens/s | peak memory, GiB | speed | memory |\n|---|--:|--:|--:|--:|--:|")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        mid_parts(Path(folder))
        for name, (function, *args) in rungs.items():
            print(name, file=sys.stderr)
            times, memory, tokens = alone(function, folder, *args)
            results[name] = ACCUMULATION / statistics.median(times[1:]), tokens, memory
    speed, _, memory = results["Trainer, the original's way: encoder frozen"]
    for name, (s, tokens, m) in results.items():
        print(f"| {name} | {s:.2f} | {s * tokens:.0f} | {m:.2f} | {s / speed:.1f} x | {m / memory:.2f} x |")


# -----------------------------------------------------------------------------
# generate

SIZES = {  # encoder, LLM, new tokens an utterance, utterances
    "tiny": (None, None, 8, 64),  # the tiny preset; a sentence of its corpus is some 6 tokens
    "110m": (MID["encoder"],  # Whisper-tiny's: at full size, too, the LLM has most of the weights
             dict(QWEN3_4B, hidden_size=768, num_hidden_layers=16, num_attention_heads=12, num_key_value_heads=4, head_dim=64,
                  intermediate_size=2048), 128, 8),
    "5b": (WHISPER_LARGE_V3, QWEN3_4B, 128, 8)}


def random_model(size, texts, dtype=torch.float32):
    """A model with random weights and a tokenizer of its own: speed needs no more."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(texts)
    config = tiny_config(tokenizer)
    encoder, llm, *_ = SIZES[size]
    if encoder:
        ends = {k: getattr(config.llm_config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        ends["vocab_size"] = llm["vocab_size"] if size == "5b" else len(tokenizer)
        config = tiny_config(tokenizer, encoder_config=encoder, llm_config=llm | ends)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # made where it will run: on the way there 5 B would take minutes
        model = BorealisForConditionalGeneration(config).eval()
    torch.set_default_dtype(before)
    model.tokenizer = tokenizer
    return model


def bench_generate():
    """Every answer is made as long as the next, so that all batch sizes do the same work. What comes before the first token
    (mel, encoder, prompt) is bound by arithmetic and gains little from a batch; decoding is bound by reading the weights."""
    samples, dtype = embedded("ru", "clean", CHUNK), torch.bfloat16 if torch.cuda.is_available() else torch.float32
    print(f"{torch.get_num_threads()} cores, {dtype}, random weights, median of 3 rounds\n\n"
          "| model | batch | x real time | tokens/s | speed | decoding alone, tokens/s | speed |\n|---|--:|--:|--:|--:|--:|--:|")
    for size, (*_, tokens, utterances) in SIZES.items():
        if size == "5b" and not torch.cuda.is_available():
            continue
        model, spoken = random_model(size, texts_of(samples), dtype), samples[:utterances]
        waves = [[load_audio(s.audio[0])] for s in spoken]
        messages = [s.messages(with_answer=False) for s in spoken]

        def answer_all(batch, n):
            began = time.perf_counter()
            for i in range(0, utterances, batch):
                model.chat(messages[i:i + batch], waves[i:i + batch], max_new_tokens=n, min_new_tokens=n)
            return time.perf_counter() - began

        took = {(batch, n): [] for batch in (1, 2, 4, 8, 16) if batch <= utterances for n in (1, tokens)}
        answer_all(8, 2)
        for _ in range(3):
            for which in took:
                took[which].append(answer_all(*which))
        took, audio = {which: statistics.median(times) for which, times in took.items()}, sum(len(w) for w, in waves) / SAMPLE_RATE
        decoding = {batch: took[batch, tokens] - took[batch, 1] for batch, _ in took}
        for batch, seconds in decoding.items():
            t = took[batch, tokens]
            print(f"| {size}, {count(model) / 1e6:.0f} M | {batch} | {audio / t:.1f} | {utterances * tokens / t:,.0f} | "
                  f"{took[1, tokens] / t:.1f} x | {utterances * (tokens - 1) / seconds:,.0f} | {decoding[1] / seconds:.1f} x |", flush=True)


# -----------------------------------------------------------------------------
# serve

NEW_TOKENS = 128  # of an answer, and 30 s of sound in each request: the post's setting


def requests(n, seed):
    """n recordings of 30 s of speech, all different, and never the same again: what vLLM has heard it does not encode twice."""
    speech = np.concatenate([s.audio[0] for s in embedded("ru", "train", CHUNK)])
    rng = np.random.default_rng([seed, n])
    return [[torch.from_numpy(np.roll(speech, int(k))[:30 * SAMPLE_RATE].astype(np.float32) / 32768)]
            for k in rng.integers(len(speech), size=n)]


def bench_serve(size, dtype):
    """Both sides in the same dtype. "auto" is the post's bfloat16 where the machine computes in it, else float32."""
    try:
        import serve_vllm
        from vllm import SamplingParams
    except ImportError as e:
        raise UserError(f"vLLM is not installed ({e}): pip install vllm==0.32.0, or make vllm on a machine without a GPU") from None
    from model import export
    counts, question, results = (1, 4, 16, 32), serve_vllm.TRANSCRIBE.messages(with_answer=False), {}
    if dtype == "auto":
        flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
        dtype = "bfloat16" if torch.cuda.is_available() or "bf16" in flags else "float32"
    model = random_model(size, texts_of(embedded("ru", "clean", CHUNK)), getattr(torch, dtype))
    print(f"{size}: {count(model) / 1e6:.0f} M, {model.dtype}, {model.device.type}, {torch.get_num_threads()} cores; 30 s of sound and "
          f"{NEW_TOKENS} tokens a request", file=sys.stderr)

    def native(n, tokens, seed):
        waves = requests(n, seed)
        began = time.perf_counter()
        model.chat([question] * n, waves, max_new_tokens=tokens, min_new_tokens=tokens).cpu()
        return time.perf_counter() - began

    def measure(name, run_):
        run_(1, 2, 0)
        for n in counts:
            rounds = 3 if n <= 4 else 1
            results[name, n] = [statistics.median(run_(n, tokens, 1000 * tokens + r) for r in range(1, rounds + 1)) for tokens in (1, NEW_TOKENS)]
            print(name, n, results[name, n], file=sys.stderr)

    measure("native", native)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/ckpt"), model.tokenizer.save_pretrained(f"{folder}/ckpt")
        export(f"{folder}/ckpt", f"{folder}/hf")
        model = None  # make room
        torch.cuda.empty_cache()
        answer, _ = serve_vllm.offline(f"{folder}/hf", max_model_len=2048, max_num_seqs=max(counts), dtype=dtype)

        def vllm(n, tokens, seed):
            prompts = [serve_vllm.prompt(answer.tokenizer, question, w) for w in requests(n, seed)]
            began = time.perf_counter()
            answer.engine.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
            return time.perf_counter() - began
        measure("vllm", vllm)
    print("\n| requests | engine | tokens/s | all first tokens after, s | RTF | vLLM / native |\n|--:|---|--:|--:|--:|--:|")
    for n in counts:
        for name in ("native", "vllm"):
            first, whole = results[name, n]
            print(f"| {n} | {name} | {n * NEW_TOKENS / whole:.1f} | {first:.2f} | {whole / n / 30:.4f} | "
                  + (f"{results['native', n][1] / whole:.2f} x |" if name == "vllm" else "|"))
    best = max(n * NEW_TOKENS / results["native", n][1] for n in counts)
    print(f"\nvLLM at {counts[-1]} requests beside the best native batch: {counts[-1] * NEW_TOKENS / results['vllm', counts[-1]][1] / best:.2f} x")


# -----------------------------------------------------------------------------
# memory

TEXT = 512               # tokens beside 30 s of audio; at worst all of them have labels
MFU = 0.3                # assumed
GPU = "H100"


def kept_for_backward(model, inputs):
    """Bytes that autograd keeps between the forward and the backward pass of model(inputs), weights not among them."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from being used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        out = model(inputs_embeds=inputs, use_cache=False)
    del out
    return sum(storage.nbytes() for storage in kept.values())


def layer_activations(length):
    """kept_for_backward of one full-size Qwen3 layer with LoRA, measured on the CPU with the dtypes of a GPU run."""
    from transformers import Qwen3Config
    def run(layers):
        config = BorealisConfig(encoder_config=dict(d_model=8, encoder_layers=0, num_mel_bins=8, max_source_positions=2),
                                llm_config=Qwen3Config(**QWEN3_4B | dict(num_hidden_layers=layers, vocab_size=8, pad_token_id=0, bos_token_id=0,
                                                                     eos_token_id=0)),
                                audio_token_id=1, audio_start_id=2, audio_end_id=2)
        model = BorealisForConditionalGeneration(config).cast(torch.bfloat16).prepare("lora", FULL_LORA)
        # autocast's bf16 copies of the trained matrices are kept as well; they are counted as weights, once
        copies = sum(2 * p.numel() for k, p in model.stored().items() if "lora" in k)
        return kept_for_backward(model.llm.model, torch.randn(1, length, QWEN3_4B["hidden_size"], requires_grad=True)) - copies
    return run(2) - run(1)


FULL_LORA = dict(rank=256, alpha=512, dropout=0.0)


def bench_memory():
    """The table of the README: on the meta device and on paper, except one layer's activations, which are measured."""
    from train import PEAK, step_flops
    length = 377 + TEXT
    layers, D, V = (QWEN3_4B[k] for k in ("num_hidden_layers", "hidden_size", "vocab_size"))
    one_layer, boundary = layer_activations(length), 2 * length * D
    print(f"Full size, bf16 with fp32 masters, batch 1: 30 s of audio (377 tokens) and {TEXT} of text, all with labels; GB (1e9 "
          f"bytes)\n\n| --train | weights | gradients | AdamW | bf16 copies | activations | logits | total |\n|---|{'--:|' * 7}")
    for kind in ("adapter", "lora", "lora --grad_checkpoint", "full --grad_checkpoint"):
        with torch.device("meta"):
            model = BorealisForConditionalGeneration(BorealisConfig()).prepare(kind.split()[0], FULL_LORA)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        acts = layers * boundary + one_layer if "checkpoint" in kind else layers * one_layer
        # logits: bf16, fp32, and the gradients of both
        parts = [4 * trained + 2 * frozen, 4 * trained, 8 * trained, 2 * trained, acts, TEXT * V * (2 + 4 + 4 + 2)]
        print(f"| {kind} | {' | '.join(f'{x / 1e9:.2f}' for x in [*parts, sum(parts)])} |")
    with torch.device("meta"):
        model = BorealisForConditionalGeneration(BorealisConfig()).prepare("lora", FULL_LORA)
    tokens, labels = 377 + 160, 100  # an audio row of the mixes, as assumed: its prompt and an answer
    flops = step_flops(model, 128 * tokens, 128 * tokens**2, 0.9 * 128, 128 * labels)
    hours = 1000 * flops / (8 * PEAK[GPU] * MFU) / 3600
    print(f"\n{flops / 1e15:.2f} PFLOP a step of 128 rows of {tokens} tokens: 1000 steps take {hours:.2f} hours on 8 {GPU} at an assumed "
          f"MFU of {MFU:.0%}, {8 * hours:.1f} GPU hours")


BENCHES = {"augment": bench_augment, "train": bench_train, "generate": bench_generate, "serve": bench_serve, "memory": bench_memory}


def main():
    parser = ArgumentParser(prog="bench.py", allow_abbrev=False, description="Speeds, as ratios measured in one run.")
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("--random_size", choices=SIZES, default="110m", help="for serve")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="for serve")
    args = parser.parse_args()
    BENCHES[args.what](*[args.random_size, args.dtype] if args.what == "serve" else [])


if __name__ == "__main__":
    run(main)
