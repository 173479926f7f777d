"""support/engine.py -- vLLM in this process. Import it before vllm, for it sets its environment."""
import os
import tempfile
from importlib import metadata, util
from pathlib import Path
import numpy as np
import torch
import model
from data import TRANSCRIBE, Sample
from support import checkpoint, decoding, export
from support.cli import as_user_error, cache_dir, digest, refuse
from support.recipes import TABLES

INSTALLED = util.find_spec("vllm") is not None
os.environ.update(TABLES["vllm"] | os.environ)
if hasattr(os, "sched_getaffinity"):  # by default it leaves a core idle
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))

CACHE = cache_dir().absolute()
if os.environ.get("TORCHINDUCTOR_CACHE_DIR", "").startswith(tempfile.gettempdir()):
    del os.environ["TORCHINDUCTOR_CACHE_DIR"]  # torch has set it, when it was imported
os.environ.update({k: str(CACHE / v) for k, v in TABLES["vllm_places"].items()} | os.environ)

def keep_inside() -> tempfile.TemporaryDirectory:  # for temporary files and sockets, in our cache
    CACHE.mkdir(parents=True, exist_ok=True)
    usual = "TMPDIR" in os.environ or len(os.fsencode(CACHE)) > 60  # 107 for a socket's path
    folder = tempfile.TemporaryDirectory(prefix="tmp.", dir=None if usual else CACHE)
    os.environ["TMPDIR"] = tempfile.tempdir = folder.name
    return folder

def check_installed() -> None:
    refuse(not INSTALLED, "no vLLM: make vllm, or, for a GPU, pip install vllm==0.32.0")

def loading(ckpt: str | Path):  # "with loading(ckpt):" what goes wrong is a UserError
    return as_user_error(f"cannot load {ckpt} into vLLM: ", ValueError, OSError, RuntimeError)

def servable(ckpt: str | Path, encoder=model.ENCODER, llm=model.LLM) -> Path:
    """Any checkpoint -> itself if exported, or an up-to-date export. ValueError or OSError."""
    folder = checkpoint.find_checkpoint(ckpt)
    config = checkpoint.read_config(folder)
    template = Path(__file__).with_name("chat_template.jinja").read_bytes()
    own = folder / "chat_template.jinja"  # an exported folder's may be an old one
    if hasattr(config, "auto_map") and own.is_file() and own.read_bytes() == template:
        return folder
    code = Path(model.__file__).read_bytes(), template
    place = cache_dir() / f"served-{digest(decoding.digest_model(folder), encoder, llm, code)}"
    if not place.exists():
        export.export(folder, place, encoder, llm)
    return place

def careful_settings() -> dict:  # of vLLM; more of them on a CPU
    return TABLES["vllm_any"] | ({} if torch.cuda.is_available() else TABLES["vllm_cpu"])

def prompt(tokenizer, waves: list, sample: Sample = TRANSCRIBE) -> dict:
    """A request: waves at 16 kHz; ids with one <|AUDIO|> a wave, for our MultiModalProcessor."""
    ids = tokenizer.apply_chat_template(sample.messages(with_answer=False), return_dict=False,
                                        add_generation_prompt=True)
    audio = [(np.asarray(wave), model.SAMPLE_RATE) for wave in waves]
    return dict(prompt_token_ids=ids, multi_modal_data={"audio": audio} if audio else {})

def guarded(params, limit: int | None = None):
    """vllm.SamplingParams -> the same with model.guard()'s rules. limit: tokens, see there."""
    from vllm.sampling_params import RepetitionDetectionParams
    params = params.clone()
    if params.repetition_detection is None:
        params.repetition_detection = RepetitionDetectionParams(model.NGRAM, 1, model.REPEATS + 1)
    params.max_tokens = min(x for x in (params.max_tokens, limit and limit + 1, 1 << 30) if x)
    return params

class Offline:
    """A system as eval.py's, which batches by itself. settings: more of vllm.LLM's. UserError."""
    def __init__(self, ckpt, max_new_tokens=256, encoder=model.ENCODER, llm=model.LLM,
                 loop_guard=True, **settings):
        check_installed()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a second process imports it all again
        with loading(ckpt):
            folder = servable(ckpt, encoder, llm)
            # vLLM looks for this entry point if the project is pip-installed; here it is not.
            metadata.EntryPoint("borealis", "serve_vllm:register", "vllm.general_plugins").load()()
            import vllm
            defaults = dict(limit_mm_per_prompt={"audio": 8}) | careful_settings()
            self.engine = vllm.LLM(str(folder), **defaults | settings)
        self.tokenizer = self.engine.get_tokenizer()
        self.config = self.engine.llm_engine.model_config.hf_config
        self.greedy = vllm.SamplingParams(temperature=0, max_tokens=max_new_tokens)
        self.loop_guard = loop_guard
    def __call__(self, samples: list[Sample], waves: list) -> list[tuple[str, int, bool]]:
        prompts = [prompt(self.tokenizer, w, s) for s, w in zip(samples, waves, strict=True)]
        limits = [model.speech_limit(sum(map(len, w))) if s.question == model.ASR_PROMPT else None
                  for s, w in zip(samples, waves, strict=True)]
        params = [guarded(self.greedy, n) if self.loop_guard else self.greedy for n in limits]
        answers = []
        outputs = self.engine.generate(prompts, params, use_tqdm=False)
        for said, n in zip((out.outputs[0] for out in outputs), limits, strict=True):
            ids, ended = [*said.token_ids], said.finish_reason == "stop"
            if self.loop_guard and not ended:
                ids = model.guard(ids, n)
            text = self.tokenizer.decode(ids, skip_special_tokens=True)  # vLLM's own lacks letters
            answers.append((text.strip(), len(ids), not ended))          # that were cut in half
        return answers
