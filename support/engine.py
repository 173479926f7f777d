"""
support/engine.py -- vLLM in this process, for eval.py, serve_vllm.py and support/bench.py.

Import this before vllm: it sets the environment that vLLM reads while it is imported.
"""
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

import model
from data import Sample
from model import ENCODER, LLM, SAMPLE_RATE
from support.checkpoint import find_checkpoint, fingerprint
from support.cli import UserError, cache_dir, first_line
from support.export import export

INSTALLED = importlib.util.find_spec("vllm") is not None
TRANSCRIBE = Sample("", [b""])  # the transcription prompt of training; the sound comes beside it

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings come once a request
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for results
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
if hasattr(os, "sched_getaffinity"):  # by default it leaves a core idle
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))


def check_installed() -> None:
    if not INSTALLED:
        raise UserError("vLLM is not installed: pip install vllm==0.32.0, or, without a GPU, "
                        "make vllm, which installs it into .venv")


@contextlib.contextmanager
def loading(ckpt: str | Path):
    """What goes wrong while a checkpoint is loaded into vLLM, as a UserError of one line."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as e:
        reason = e.errors()[0]["msg"] if hasattr(e, "errors") else first_line(e)  # pydantic's
        raise UserError(f"cannot load {ckpt} into vLLM: {reason}") from None


def servable(ckpt: str | Path, encoder: str = ENCODER, llm: str = LLM) -> Path:
    """Any checkpoint -> a folder as support.export writes it: itself, or an export in the cache,
    made anew when anything that matters has changed. Raises ValueError or OSError."""
    folder = find_checkpoint(ckpt)
    if not folder.is_dir():
        raise ValueError(f"no checkpoint in {folder}: train one, or name one on the hub")
    config = folder / "config.json"
    settings = json.loads(config.read_bytes()) if config.is_file() else {}
    if {"encoder_config", "auto_map"} <= set(settings) and not settings.get("base") and (
            folder / "generation_config.json").is_file():
        return folder
    digest = hashlib.sha256(f"{fingerprint(folder)} {encoder} {llm}".encode())
    files = [p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".jinja")]
    code = [Path(model.__file__), Path(__file__).with_name("chat_template.jinja")]
    for path in [*code, *sorted(p for p in files if p.name != "results.json")]:
        digest.update(path.read_bytes())
    place = cache_dir() / f"served-{digest.hexdigest()[:16]}"
    try:
        if not place.exists():
            export(folder, place, encoder, llm)
    except (ValueError, OSError):
        if not place.exists():  # else another process was first
            raise
    return place


def careful_settings() -> dict:
    """Our defaults for vLLM. On a CPU: the dtype of training, prefill in portions that fit the
    caches, no minute of compiling, a context that fits the memory (-1)."""
    return {} if torch.cuda.is_available() else dict(
        dtype="float32", max_num_batched_tokens=512, enforce_eager=True, max_model_len=-1)


tokenizer_of = functools.lru_cache(maxsize=1)(AutoTokenizer.from_pretrained)


def prompt(tokenizer, messages: list[dict], waves: list) -> dict:
    """One request: the ids of build_ids(), but one <|AUDIO|> for each recording, which the
    MultiModalProcessor expands; and the recordings, (samples,) at 16 kHz."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    audio = {"audio": [(np.asarray(w), SAMPLE_RATE) for w in waves]} if len(waves) else {}
    return dict(prompt_token_ids=tokenizer(text, add_special_tokens=False).input_ids,
                multi_modal_data=audio)


class Offline:
    """A system as eval.py's: (samples, each one's recordings) -> [(text, tokens generated,
    cut off by max_new_tokens?)]. It batches by itself. settings: more of vllm.LLM's."""

    def __init__(self, folder: Path, max_new_tokens: int, **settings):
        import vllm
        settings = dict(limit_mm_per_prompt={"audio": 8}) | careful_settings() | settings
        self.engine = vllm.LLM(str(folder), **settings)
        self.greedy = vllm.SamplingParams(temperature=0, max_tokens=max_new_tokens)
        self.tokenizer = tokenizer_of(folder)

    def __call__(self, samples: list[Sample], waves: list) -> list[tuple[str, int, bool]]:
        prompts = [prompt(self.tokenizer, s.messages(with_answer=False), w)
                   for s, w in zip(samples, waves, strict=True)]
        answers = [output.outputs[0] for output in
                   self.engine.generate(prompts, self.greedy, use_tqdm=False)]
        texts = self.tokenizer.batch_decode(  # vLLM's own lack letters that were cut in half
            [a.token_ids for a in answers], skip_special_tokens=True)
        return [(text.strip(), len(a.token_ids), a.finish_reason == "length")
                for text, a in zip(texts, answers, strict=True)]


def offline(ckpt: str | Path, max_new_tokens: int = 256, encoder: str = ENCODER, llm: str = LLM,
            **settings) -> tuple:
    """-> (answer, config): an Offline and the model's config. Raises UserError."""
    check_installed()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a second process imports all of it again
    with loading(ckpt):
        folder = servable(ckpt, encoder, llm)
        # The class comes by name, as vLLM loads the plug-in that pyproject.toml names. vLLM's lazy
        # register_model(name, "module:Class") needs PYTHONPATH, and starts a process for 8 s.
        EntryPoint("borealis", "serve_vllm:register", "vllm.general_plugins").load()()
        answer = Offline(folder, max_new_tokens, **settings)
        return answer, answer.engine.llm_engine.model_config.hf_config
