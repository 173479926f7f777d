"""support/bench.py -- speeds of random weights, as ratios to something measured in the same run."""
import gc
import tempfile
from functools import partial
from timeit import timeit
import numpy as np
import torch
from tabulate import tabulate
import train
from data import TRANSCRIBE, Dataset, Sample, embedded
from model import QWEN3_4B, SAMPLE_RATE, WHISPER_LARGE_V3
from model import BorealisForConditionalGeneration as Borealis
from support import cli, corpus, engine, export, lora, meter, optim, ranks, recipes, tasks
from support.tiny import texts_of, tiny_config, train_tokenizer

# ---- Models, clocks, tables
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = recipes.TABLES["tiny_encoder"], recipes.TABLES["tiny_llm"] | dict(vocab_size=1024)
# The encoder's shape, how the LLM differs from Qwen3-4B; seconds heard, tokens answered.
SIZES = {"tiny": (*TINY, 2, 8), "5b": (WHISPER_LARGE_V3, {}, 30, 128),
         "110m": (recipes.TABLES["whisper_tiny"], recipes.TABLES["llm_110m"], 30, 128)}
BENCHES = recipes.TABLES["benches"]

def random_model(encoder: dict, llm: dict, dtype=torch.float32) -> Borealis:
    """It never ends an answer by itself: so all are equally long, and engines do the same work."""
    tokenizer = train_tokenizer(texts_of(embedded("ru", "clean", corpus.CHUNK)))
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # of another tokenizer
    config = tiny_config(tokenizer, encoder_config=encoder, llm_config=QWEN3_4B | llm | ids)
    torch.manual_seed(0)
    with torch.device(DEVICE):  # moving 5 B would take minutes
        model = lora.cast(Borealis(config).eval(), dtype)
    model.tokenizer = tokenizer
    model.llm.get_input_embeddings().weight.data[model.ends] = 0  # tied; some logit is above 0
    return model

def take_turns(calls: list, rounds: int) -> np.ndarray:
    """Functions -> median seconds of a call of each, after a first one."""
    def once(call):
        call()
        if DEVICE == "cuda":  # it has only been given its work
            torch.cuda.synchronize()
    times = [[timeit(partial(once, call), number=1) for call in calls] for _ in range(rounds + 1)]
    return np.median(times[1:], 0)

def print_rows(rows: list[dict] | dict[str, list]) -> None:
    print(tabulate(rows, "keys", "pipe", floatfmt=",.2f", missingval="-"), end="\n\n", flush=True)

# ---- gpu, train, generate, serve
def time_answers(what: str, args):
    """-> rows: so many recordings at once. what: a size; "native", as eval.py does; or "vllm"."""
    *shapes, seconds, tokens = SIZES.get(what, SIZES[args.size])
    model, counts = random_model(*shapes, args.dtype), BENCHES[args.what]["at_once"]
    answer = tasks.native(model, tokens)
    if what == "vllm":
        engine.check_installed()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(f"{folder}/ckpt")
            model.tokenizer.save_pretrained(f"{folder}/ckpt")
            del model, answer  # vLLM collects the garbage
            export.export(f"{folder}/ckpt", f"{folder}/hf")
            answer = engine.Offline(f"{folder}/hf", tokens, max_num_seqs=counts[-1],
                                    max_model_len=2048, dtype=args.dtype)
    for n in counts:
        def ask(n=n):  # each time other sounds: vLLM does not encode twice what it has heard
            answer([TRANSCRIBE] * n, [*torch.randn(n, 1, seconds * SAMPLE_RATE) / 9])
        s, = take_turns([ask], 3 if n <= 4 else 1)
        yield dict(what=what, batch=n, samples_per_s=n / s, ms=1000 * s,
                   tokens_per_s=n * tokens / s, audio_s_per_s=n * seconds / s)

def time_training(what: str, args):
    """-> rows. what: "train" and flags of it. A step is a GPU's part of the default run's."""
    cfg = train.TrainConfig(**{flag[2:]: True for flag in what.split()[1:]})
    model = random_model(*SIZES[args.size][:2], args.dtype)
    lora.prepare(model, "lora", dict(rank=cfg.lora_rank, alpha=cfg.lora_alpha, dropout=0.0))
    net, optimizers = train.wrap(cfg, model, 1), optim.make(cfg, model)
    def step(batch):  # of train.py's loop
        train.backward(net, batch["micro"], batch["labels"], 1, model.device)
        ranks.clip_gradients([*net.parameters()], cfg.grad_clip)
        optim.update(optimizers, cfg.lr, forget=True)
    noise = np.random.default_rng(0).integers(-4096, 4096, model.config.window_samples, np.int16)
    sample = Sample("1" * 100, [noise])  # a window of sound, an answer of 100 tokens
    for micro in (1, 2, 4, 8):
        dataset = Dataset([sample], model.tokenizer, model.config, batch_size=micro)
        batch = dataset.collate([dataset[0, 0.0]] * (cfg.effective_batch // 8))
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        s, = take_turns([partial(step, batch)], 2)
        yield dict(what=what, batch=micro, samples_per_s=batch["windows"] / s,
                   **meter.speed(model, batch, s, 1, model.device))

def bench_parts(args):
    """A row at each batch size, beside one; what was measured stays if memory ends."""
    torch.set_float32_matmul_precision("high")  # as in training
    rows, ended = [], None
    try:
        for what in BENCHES[args.what]["rows"]:
            time_rows = time_training if what.startswith("train") else time_answers
            for row in time_rows(what, args):
                rows.append(row)
            gc.collect()
            torch.cuda.empty_cache()
    except (torch.cuda.OutOfMemoryError, MemoryError, cli.UserError) as e:
        ended = f"{what}: {cli.first_line(e)}"
    speeds = {(row["what"], row["batch"]): row["samples_per_s"] for row in rows}
    for row in rows:
        row["x one"] = row["samples_per_s"] / speeds[row["what"], 1]
        if one := speeds.get(("native", row["batch"])):
            row["x native"] = row["samples_per_s"] / one
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    print_rows(rows)
    print(f"Device: {device}, size {args.size}" + (f"; ended early, {ended}" if ended else ""))

def bench_soak(args):
    from support import soak_test  # its clients' libraries come with vLLM
    return soak_test.main(args, print_rows)

def main() -> int | None:
    args = cli.ArgumentParser().add_tables("bench").parse_args()
    args.size = args.size or ("5b" if args.what == "gpu" and DEVICE == "cuda" else "110m")
    args.dtype = torch.bfloat16 if DEVICE == "cuda" or args.what == "serve" else torch.float32
    return globals().get(f"bench_{args.what}", bench_parts)(args)

cli.run(main, __name__)
