"""
serve_vllm.py -- Borealis in vLLM: paged attention and continuous batching for Qwen3, our encoder and adapter in front.

    python serve_vllm.py --ckpt out/                      # an OpenAI-compatible server on 127.0.0.1:8000; any flag of vLLM's too
    python serve_vllm.py --ckpt out/ --max_audio_seconds 60 --limit-mm-per-prompt '{"audio": 4}'
    python serve_vllm.py --ckpt out/ --transcribe a.wav b.mp3 folder/ > texts.jsonl        # no server: all at once
    arecord -t raw -f S16_LE -r 16000 | python serve_vllm.py --ckpt out/ --live -          # words as they are said; or --live a.wav

vLLM knows no Borealis, so four classes tell it: how much sound a prompt may hold (ProcessingInfo), what the worst prompt looks like
(DummyInputsBuilder), how sound becomes mels and placeholders (MultiModalProcessor), and the network, in which the LLM is vLLM's
own Qwen3. They are registered below, at the top level of this file: vLLM starts processes that run it again under another name.

Letters as in model.py: W windows, N audio tokens a window, D width of the LLM.
"""
import contextlib
import importlib.util
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

# Before vLLM is imported. On a CPU it would leave cores unused, and reserve memory for far more than one laptop's requests.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of its own doings, once a request
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for results
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
os.environ.setdefault("VLLM_MEDIA_CONNECTOR", "borealis")  # see Recordings
MAX_AUDIO_SECONDS = "BOREALIS_MAX_AUDIO_SECONDS"  # of one recording; --max_audio_seconds. The environment reaches all processes
os.environ.setdefault("VLLM_MAX_AUDIO_DECODE_DURATION_S", os.environ.setdefault(MAX_AUDIO_SECONDS, "600"))

if __name__ == "__main__" and not importlib.util.find_spec("vllm"):
    print("error: vLLM is not installed: pip install vllm==0.32.0, or, without a GPU, make vllm", file=sys.stderr)
    sys.exit(2)

import numpy as np
import soundfile
import torch
import torch.nn as nn
from fastapi import Form, Request
from fastapi.responses import PlainTextResponse
from tqdm import tqdm
from transformers import AutoTokenizer, BatchFeature
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from vllm.config.speech_to_text import SpeechToTextConfig
from vllm.inputs import TokensPrompt
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP, SupportsTranscription
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media.audio import AudioMediaIO
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo, PromptReplacement, \
    PromptUpdateDetails

from data import MIN_SECONDS, ArgumentParser, BadRow, Sample, UserError, cache_dir, load_audio, run
from model import AUDIO, SAMPLE_RATE, Adapter, cut_at_pauses, check_wave, cut_windows, downsample, export, \
    find_checkpoint, fingerprint, log_mel


# -----------------------------------------------------------------------------
# What clients send. One decoder and one resampler for training, evaluation and serving; and every fault of a recording is a
# ValueError, which vLLM answers with a 400 instead of a 500.
FETCH_SECONDS = 30  # of waiting for a host
TRANSCRIBE = Sample("", [b""])  # the one transcription prompt; the sound comes beside it


def check_seconds(seconds):
    limit = float(os.environ[MAX_AUDIO_SECONDS])
    if seconds < MIN_SECONDS:
        raise ValueError(f"the recording has {seconds:.3f} s: at least {MIN_SECONDS} s are needed")
    if seconds > limit:
        raise ValueError(f"the recording has {seconds:.1f} s, this server takes {limit:g} s at most (--max_audio_seconds): cut it")


def decode(data):
    """The bytes of a file -> (float32 samples, 16000)."""
    try:
        check_seconds(soundfile.info(io.BytesIO(data)).duration)  # before it is decoded
        return load_audio(data, silence=True).numpy(), SAMPLE_RATE
    except (BadRow, soundfile.LibsndfileError) as e:
        raise ValueError(f"the recording cannot be used: {e if isinstance(e, BadRow) else 'not audio'}; send wav, flac, ogg or "
                         "mp3") from None


class Recording(AudioMediaIO):
    def load_bytes(self, data):
        self._validate_encoded_size(len(data))
        return decode(data)


@MEDIA_CONNECTOR_REGISTRY.register("borealis")
class Recordings(MediaConnector):
    """data: URLs; and http, from the hosts of --allowed-media-domains only."""

    def fetch_audio(self, audio_url):
        with refusing():
            return self.load_from_url(audio_url, Recording(), fetch_timeout=FETCH_SECONDS)

    async def fetch_audio_async(self, audio_url):
        with refusing():
            return await self.load_from_url_async(audio_url, Recording(), fetch_timeout=FETCH_SECONDS)


@contextlib.contextmanager
def refusing():
    try:
        yield
    except ValueError:
        raise
    except Exception as e:  # unreachable, file://, ...
        raise ValueError(f"cannot take the recording: {type(e).__name__}: {e}") from None


# -----------------------------------------------------------------------------
# The four classes

class BorealisProcessingInfo(BaseProcessingInfo):
    """What the model takes: any number of recordings (vLLM's --limit-mm-per-prompt caps them), mono at 16 kHz."""

    def get_data_parser(self):
        return MultiModalDataParser(target_sr=SAMPLE_RATE, target_channels=1)

    def get_supported_mm_limits(self):
        return {"audio": None}

    def get_mm_max_tokens_per_item(self, seq_len, mm_counts=None):
        config = self.get_hf_config()
        windows = math.ceil(float(os.environ[MAX_AUDIO_SECONDS]) * SAMPLE_RATE / config.window_samples)
        return {"audio": config.tokens_per_window * max(1, min(windows, (seq_len - 2) // config.tokens_per_window)) + 2}


class BorealisDummyInputsBuilder(BaseDummyInputsBuilder):
    """The prompt that vLLM measures its memory with: recordings of silence, as long as they may be."""

    def get_dummy_text(self, mm_counts):
        return AUDIO * mm_counts.get("audio", 0)

    def get_dummy_mm_data(self, seq_len, mm_counts, mm_options):
        config, tokens = self.info.get_hf_config(), self.info.get_mm_max_tokens_per_item(seq_len)["audio"]
        longest = tokens // config.tokens_per_window * config.window_samples
        return {"audio": self._get_dummy_audios(length=min(longest, int(float(os.environ[MAX_AUDIO_SECONDS]) * SAMPLE_RATE)),
                                                num_audios=mm_counts.get("audio", 0), overrides=mm_options.get("audio"))}


class BorealisMultiModalProcessor(BaseMultiModalProcessor):
    """Recordings -> mel windows, and each <|AUDIO|> -> marker, N x windows slots, marker, as build_ids() does in training."""

    def _get_hf_mm_text(self, mm_counts):
        return None

    def _call_hf_processor(self, hf_data, hf_kwargs):
        """A ValueError here is a 400 for the client; a NaN let through would spoil the requests beside it."""
        config, pieces, counts = self.info.get_hf_config(), [], []
        for wave in hf_data["audio"]:
            wave = check_wave(torch.as_tensor(np.asarray(wave, dtype=np.float32)))
            check_seconds(len(wave) / SAMPLE_RATE)
            windows = cut_windows(wave, config)
            pieces += windows
            counts.append(len(windows))
        return BatchFeature({"input_features": log_mel(pieces, config), "num_windows": torch.tensor(counts)})

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        sizes = hf_inputs.get("num_windows", torch.empty(0, dtype=torch.long))
        return {"input_features": MultiModalFieldConfig.flat_from_sizes("audio", sizes),
                "num_windows": MultiModalFieldConfig.batched("audio", keep_on_cpu=True)}

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        config, counts = self.info.get_hf_config(), out_mm_kwargs.get_data().get("num_windows")

        def slots(i):
            n = config.tokens_per_window * int(counts[i])
            return PromptUpdateDetails.select_token_id(
                [config.audio_start_id, *[config.audio_token_id] * n, config.audio_end_id], embed_token_id=config.audio_token_id)
        return [PromptReplacement(modality="audio", target=[config.audio_token_id], replacement=slots)]

    def apply(self, inputs, *args, **kwargs):
        prompt, audio = inputs.prompt, self.info.get_hf_config().audio_token_id
        if not isinstance(prompt, str):
            placed, given = list(prompt).count(audio), inputs.mm_data_items.get_all_counts().get("audio", 0)
            if placed != given:
                raise ValueError(f"the prompt has {placed} {AUDIO} placeholders for {given} recordings: one each")
        return super().apply(inputs, *args, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(BorealisMultiModalProcessor, info=BorealisProcessingInfo,
                                        dummy_inputs=BorealisDummyInputsBuilder)
class BorealisForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP, SupportsTranscription):
    """encoder.*, adapter.*, llm.*, named as in our checkpoints; llm is vLLM's Qwen3."""
    supported_languages = {"ru": "Russian", "en": "English"}

    @classmethod
    def get_placeholder_str(cls, modality, i):
        return AUDIO

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        config.encoder_config._attn_implementation = "sdpa"
        with self._mark_tower_model(vllm_config, "audio"):
            self.encoder, self.adapter = WhisperEncoder(config.encoder_config), Adapter(config)
        with self._mark_language_model(vllm_config):
            self.llm = init_vllm_registered_model(vllm_config=vllm_config, hf_config=config.llm_config,
                                                  prefix=maybe_prefix(prefix, "llm"), architectures=["Qwen3ForCausalLM"])
        # In the original's layout <|AUDIO|> has no row in the table.
        self.configure_mm_token_handling(config.llm_config.vocab_size, [config.audio_token_id])
        self.make_empty_intermediate_tensors = self.llm.make_empty_intermediate_tensors

    def embed_multimodal(self, input_features=None, num_windows=None, **_):
        """(W, M, F) mels of all recordings -> one (windows x N, D) a recording."""
        if input_features is None:
            return []
        mels = torch.cat(list(input_features)) if isinstance(input_features, (list, tuple)) else input_features
        weight = self.adapter.w_in.weight
        x = self.encoder(mels.to(weight)).last_hidden_state                # (W, T, E)
        x = self.adapter(downsample(x, self.config.downsample_factor))     # (W, N, D)
        return [part.flatten(0, 1) for part in x.split(torch.as_tensor(num_windows).flatten().tolist())]

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **_):
        return self.llm.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states):
        return self.llm.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]):
        return AutoWeightsLoader(self).load_weights(weights)

    # ---- /v1/audio/transcriptions

    @classmethod
    def get_speech_to_text_config(cls, model_config, task_type):
        """vLLM cuts longer files into windows at quiet places, and joins the texts."""
        return SpeechToTextConfig(sample_rate=SAMPLE_RATE, max_audio_clip_s=model_config.hf_config.window_samples // SAMPLE_RATE)

    @classmethod
    def get_generation_prompt(cls, stt_params):
        """The one transcription prompt, whatever the language: it is what was trained."""
        tokenizer = AutoTokenizer.from_pretrained(stt_params.model_config.tokenizer)
        return prompt(tokenizer, TRANSCRIBE.messages(with_answer=False), [stt_params.audio])

    @classmethod
    def post_process_output(cls, text):
        return text.strip()


def prompt(tokenizer, messages, waves):
    """What build_ids() makes, before <|AUDIO|> is expanded: that is the MultiModalProcessor's part."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return TokensPrompt(prompt_token_ids=tokenizer(text, add_special_tokens=False).input_ids,
                        multi_modal_data={"audio": [(np.asarray(w), SAMPLE_RATE) for w in waves]} if len(waves) else {})


def register():
    """Also the entry point vllm.general_plugins, see pyproject.toml."""
    if "BorealisForConditionalGeneration" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("BorealisForConditionalGeneration", BorealisForConditionalGeneration)


register()


# -----------------------------------------------------------------------------
# Without a server

def offline(ckpt, max_new_tokens=256, dtype=None, **settings):
    """vLLM in this process -> (answer, config): answer(samples, waves) -> [(text, tokens generated, cut by the limit?)], as
    eval.py's systems. It decodes as many at once as it is given. Raises ValueError."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a process of its own would import all this again, and talk over a socket
    from vllm import LLM, SamplingParams
    folder = servable(ckpt)
    dtype = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    if not torch.cuda.is_available():  # small portions stay in the caches: first tokens come a sixth sooner than with 4096
        settings = dict(max_num_batched_tokens=512, enforce_eager=True) | settings
    llm = LLM(str(folder), dtype=dtype, limit_mm_per_prompt={"audio": 8}, **settings)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    greedy = SamplingParams(temperature=0, max_tokens=max_new_tokens)

    def answer(samples, waves):
        prompts = [prompt(tokenizer, s.messages(with_answer=False), w) for s, w in zip(samples, waves)]
        answers = [out.outputs[0] for out in llm.generate(prompts, greedy, use_tqdm=False)]
        return [(a.text.strip(), len(a.token_ids), a.finish_reason == "length") for a in answers]
    answer.llm, answer.tokenizer = llm, tokenizer
    return answer, llm.llm_engine.model_config.hf_config


AUDIO_FILES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


def transcribe(answer, places, batch=64):
    """Files, and folders of files -> a line of JSON each on standard output: {"audio", "text"} or {"audio", "error"}. -> exit code."""
    files = [f for place in map(Path, places) for f in (
        sorted(p for p in place.rglob("*") if p.suffix.lower() in AUDIO_FILES) if place.is_dir() else [place])]
    if not files:
        raise UserError(f"no recordings in {' '.join(places)}: give {', '.join(AUDIO_FILES)} files, or folders of them")
    failed = 0
    with tqdm(total=len(files), unit=" recordings") as bar:
        for start in range(0, len(files), batch):
            rows, waves = [dict(audio=str(f)) for f in files[start:start + batch]], {}
            for i, row in enumerate(rows):
                try:
                    waves[i] = torch.from_numpy(decode(Path(row["audio"]).read_bytes())[0])
                except (OSError, ValueError) as e:
                    row["error"] = e.strerror or str(e) if isinstance(e, OSError) else str(e)
            for i, (text, *_) in zip(waves, answer([TRANSCRIBE] * len(waves), [[w] for w in waves.values()]) if waves else []):
                rows[i]["text"] = text
            for row in rows:
                print(json.dumps(row, ensure_ascii=False), flush=True)
            failed += len(rows) - len(waves)
            bar.update(len(rows))
    return int(failed == len(files))


# -----------------------------------------------------------------------------
# Live. The buffer is decoded anew every half second; what two passes in a row agree on is said (local agreement, as in Liu et
# al. 2020, arXiv:2005.11185, and whisper_streaming). A pause ends the buffer, and a buffer full of speech is cut at its quietest.

STEP = PAUSE = SAMPLE_RATE // 2


def pieces_of(source):
    """A file at the speed it was recorded, or "-": raw 16-bit mono PCM at 16 kHz -> float32 arrays of half a second."""
    if source == "-":
        while data := sys.stdin.buffer.read(2 * STEP):
            yield np.frombuffer(data[:len(data) // 2 * 2], dtype="<i2").astype(np.float32) / 32768
        return
    wave, began = decode(Path(source).read_bytes())[0], time.monotonic()
    for start in range(0, len(wave), STEP):
        time.sleep(max(0, began + (start + STEP) / SAMPLE_RATE - time.monotonic()))
        yield wave[start:start + STEP]


def from_speech_on(wave, loudest):
    """The part from 0.1 s before the first 50 ms that are not quiet: within 30 dB of the loudest half second so far."""
    frame = SAMPLE_RATE // 20
    power = np.square(wave[:len(wave) // frame * frame]).reshape(-1, frame).mean(1)
    loud = np.flatnonzero(power > max(1e-6, loudest / 1000))
    return wave[max(0, loud[0] - 2) * frame:] if len(loud) else wave[:0]


def live(answer, source, longest):
    """Print words when they are certain, a line a phrase; nothing printed is taken back."""
    heard, before, said, loudest = np.zeros(0, np.float32), [], 0, 0.0

    def words_of(wave):
        return answer([TRANSCRIBE], [[torch.from_numpy(wave)]])[0][0].split()

    def say(words, end):
        nonlocal said
        print("".join(f"{w} " for w in words[said:]), end=end, flush=True)
        said = 0 if end else max(said, len(words))

    for piece in pieces_of(source):
        if not np.isfinite(piece).all():
            raise UserError(f"{source} holds NaN or Inf")
        heard, loudest = np.concatenate([heard, piece]), max(loudest, float(np.mean(np.square(piece))))
        heard = from_speech_on(heard, loudest)
        if len(heard) >= longest:
            first = cut_at_pauses(torch.from_numpy(heard), longest - 1)[0].numpy()
            say(words_of(first), "\n")
            heard, before = heard[len(first):], []
        elif len(heard) > PAUSE and not len(from_speech_on(heard[-PAUSE:], loudest)):
            say(words_of(heard), "\n")
            heard, before = heard[:0], []
        elif len(heard) >= STEP:
            words = words_of(heard)
            agreed = next((i for i, (a, b) in enumerate(zip(words, before)) if a != b), min(len(words), len(before)))
            say(words[:agreed], "")
            before = words
    if len(heard) >= MIN_SECONDS * SAMPLE_RATE:
        say(words_of(heard), "\n")


# -----------------------------------------------------------------------------
# Commands

def servable(ckpt):
    """Any checkpoint -> a complete folder in its own layout, exported into the cache if it is not one. Raises ValueError."""
    folder = find_checkpoint(ckpt)
    config = folder / "config.json"
    settings = json.loads(config.read_text()) if config.is_file() else {}
    if settings.get("auto_map") and not settings.get("base") and (folder / "generation_config.json").is_file():
        return folder
    place = cache_dir() / f"served-{fingerprint(folder)}"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        export(ckpt, place)
    return place


def serve(folder, rest):
    """The OpenAI server of vLLM, with careful defaults."""
    from vllm.entrypoints.launchers.api_server.entry import main
    from vllm.entrypoints.speech_to_text.base import serving
    from vllm.entrypoints.speech_to_text.transcription import api_router
    serving.load_audio = lambda file, **_: decode(file.read() if hasattr(file, "read") else Path(file).read_bytes())
    answer = api_router.create_transcriptions
    api_router.router.routes.clear()

    @api_router.router.post("/v1/audio/transcriptions")
    async def transcription(raw_request: Request, request: Annotated[api_router.TranscriptionRequest, Form()]):
        """vLLM's own, and response_format=text is text: vLLM 0.32 answers JSON."""
        response = await answer(raw_request=raw_request, request=request)
        if request.response_format == "text" and not request.stream and response.status_code == 200:
            return PlainTextResponse(json.loads(response.body)["text"] + "\n")
        return response

    given = {flag.split("=")[0].replace("_", "-") for flag in rest if flag.startswith("--")}
    defaults = {
        "--host": "127.0.0.1", "--served-model-name": "borealis", "--limit-mm-per-prompt": '{"audio": 1}',
        "--allowed-media-domains": "data-urls-only.invalid"}  # nothing is fetched for a client unless its host is named
    sys.argv = ["serve_vllm.py", "--model", str(folder), *rest]
    if not torch.cuda.is_available():
        defaults |= {"--max-num-batched-tokens": "512", "--enforce-eager": None}  # as in offline(); compiling takes a minute
    for flag, value in defaults.items():
        if flag not in given:
            sys.argv += [flag] if value is None else [flag, value]
    main()


def main():
    parser = ArgumentParser(prog="serve_vllm.py", allow_abbrev=False, description=__doc__.split("\n")[1])
    parser.add_argument("--ckpt", default="out", help="a run, an exported folder, an original checkpoint, or a hub name")
    parser.add_argument("--max_audio_seconds", type=float, default=600, help="longest recording that is taken")
    parser.add_argument("--transcribe", nargs="+", metavar="FILE", help="recordings or folders of them; JSON lines, no server")
    parser.add_argument("--live", metavar="FILE", help="a recording as if it came in now, or - for raw PCM on standard input")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="for --transcribe and --live")
    args, rest = parser.parse_known_args()
    if rest and (args.transcribe or args.live):
        raise UserError(f"unknown flag {rest[0]}; vLLM's own flags are for the server")
    if args.live and args.live != "-" and not Path(args.live).is_file():
        raise UserError(f"no file at {args.live}")
    os.environ[MAX_AUDIO_SECONDS] = os.environ["VLLM_MAX_AUDIO_DECODE_DURATION_S"] = f"{args.max_audio_seconds:g}"
    try:
        if not (args.transcribe or args.live):
            return serve(servable(args.ckpt), rest)
        answer, config = offline(args.ckpt, args.max_new_tokens)
    except (ValueError, OSError) as e:
        raise UserError(f"cannot serve {args.ckpt}: {str(e).splitlines()[0]}") from None
    if args.transcribe:
        return transcribe(answer, args.transcribe)
    try:
        live(answer, args.live, max(config.window_samples, 10 * SAMPLE_RATE))
    except ValueError as e:
        raise UserError(f"{args.live}: {e}") from None


if __name__ == "__main__":
    run(main)
