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
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

if __name__ == "__main__" and not importlib.util.find_spec("vllm"):
    print("error: vLLM is not installed: pip install vllm==0.32.0, or, without a GPU, make vllm, which brings it into .venv", file=sys.stderr)
    sys.exit(2)

# Before vLLM is imported. On a CPU it would leave cores unused, and reserve memory for far more than one laptop's requests.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of its own doings, once a request
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for results
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
if hasattr(os, "sched_getaffinity"):
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
os.environ.setdefault("VLLM_MEDIA_CONNECTOR", "borealis")  # see Recordings
os.environ.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")  # an allowed host could name any other
MAX_AUDIO_SECONDS = "BOREALIS_MAX_AUDIO_SECONDS"  # of one recording; --max_audio_seconds. The environment reaches all processes
os.environ.setdefault(MAX_AUDIO_SECONDS, "600")

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
from vllm.entrypoints.speech_to_text.base import serving
from vllm.entrypoints.speech_to_text.transcription import api_router
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
from model import AUDIO, ENCODER, LLM, SAMPLE_RATE, Adapter, cut_at_pauses, check_wave, cut_windows, downsample, export, \
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
        info = soundfile.info(io.BytesIO(data))  # before it is decoded
        if info.frames * info.channels > 96_000 * max(600, float(os.environ[MAX_AUDIO_SECONDS])):  # 48 kHz stereo
            raise ValueError(f"the recording is too large, or does not say how long it is ({info.channels} channels at {info.samplerate} Hz): "
                             "send it as a whole file, mono at 16 kHz")
        check_seconds(info.duration)
        return load_audio(data, silence=True).numpy(), SAMPLE_RATE
    except (BadRow, soundfile.LibsndfileError) as e:
        raise ValueError(f"the recording cannot be used: {e if isinstance(e, BadRow) else 'not audio'}; send wav, flac, ogg or "
                         "mp3") from None


class Recording(AudioMediaIO):
    def load_bytes(self, data):
        self._validate_encoded_size(len(data))
        return decode(data)

    def load_file(self, path):
        return decode(path.read_bytes())


@MEDIA_CONNECTOR_REGISTRY.register("borealis")
class Recordings(MediaConnector):
    """data: URLs; and http, from the hosts of --allowed-media-domains only: where none is named, vLLM would ask any."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.allowed_media_domains = self.allowed_media_domains or ["data-urls-only.invalid"]

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


def upload(file, **_):
    """For /v1/audio/transcriptions, which has a decoder of its own."""
    return decode(file.read() if hasattr(file, "read") else Path(file).read_bytes())


serving.load_audio = upload
api_router.router.routes.clear()


@api_router.router.post("/v1/audio/transcriptions")
async def transcriptions(raw_request: Request, request: Annotated[api_router.TranscriptionRequest, Form()]):
    """vLLM's own, and response_format=text is text: vLLM 0.32 answers JSON."""
    response = await api_router.create_transcriptions(raw_request=raw_request, request=request)
    if response and request.response_format == "text" and not request.stream and response.status_code == 200:  # none: the client left
        return PlainTextResponse(json.loads(response.body)["text"] + "\n", background=response.background)
    return response


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
    def validate_language(cls, language):
        if language not in (None, *cls.supported_languages):
            raise ValueError(f"the language {language!r} is not one of {', '.join(cls.supported_languages)}")
        return language

    @classmethod
    def get_generation_prompt(cls, stt_params):
        """The one transcription prompt, whatever the language: it is what was trained."""
        if stt_params.task_type != "transcribe":
            raise ValueError("this model does not translate: ask /v1/audio/transcriptions")
        return prompt(tokenizer_of(stt_params.model_config.tokenizer), TRANSCRIBE.messages(with_answer=False), [stt_params.audio])

    @classmethod
    def post_process_output(cls, text):
        return text.strip()


@functools.lru_cache(maxsize=1)  # a long recording asks once a window
def tokenizer_of(folder):
    return AutoTokenizer.from_pretrained(folder)


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

def careful_settings():
    """Beside vLLM's own. On a CPU: the dtype of training; small portions, which stay in the caches (first tokens come a sixth
    sooner than with 4096); no minute of compiling; and a context that fits the memory (-1)."""
    return {} if torch.cuda.is_available() else dict(dtype="float32", max_num_batched_tokens=512, enforce_eager=True, max_model_len=-1)


def offline(ckpt, max_new_tokens=256, encoder=ENCODER, llm=LLM, **settings):
    """vLLM in this process -> (answer, config): answer(samples, waves) -> [(text, tokens generated, cut by the limit?)], as
    eval.py's systems. It decodes as many at once as it is given. encoder, llm: as load_checkpoint(). Raises ValueError."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a process of its own would import all this again, and talk over a socket
    from vllm import LLM as Engine, SamplingParams
    folder = servable(ckpt, encoder, llm)
    engine = Engine(str(folder), limit_mm_per_prompt={"audio": 8}, **careful_settings() | settings)
    greedy = SamplingParams(temperature=0, max_tokens=max_new_tokens)

    def answer(samples, waves):
        prompts = [prompt(tokenizer_of(folder), s.messages(with_answer=False), w) for s, w in zip(samples, waves)]
        answers = [out.outputs[0] for out in engine.generate(prompts, greedy, use_tqdm=False)]
        texts = tokenizer_of(folder).batch_decode([a.token_ids for a in answers], skip_special_tokens=True)  # vLLM's leave out half letters
        return [(text.strip(), len(a.token_ids), a.finish_reason == "length") for text, a in zip(texts, answers)]
    answer.engine, answer.tokenizer = engine, tokenizer_of(folder)
    return answer, engine.llm_engine.model_config.hf_config


AUDIO_FILES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


def recordings_in(places):
    """Files, and folders of files -> files. Raises UserError."""
    if gone := [place for place in places if not Path(place).exists()]:
        raise UserError(f"no file or folder at {gone[0]}")
    files = [f for place in map(Path, places) for f in (
        sorted(p for p in place.rglob("*") if p.suffix.lower() in AUDIO_FILES) if place.is_dir() else [place])]
    if not files:
        raise UserError(f"no recordings in {' '.join(places)}: give {', '.join(AUDIO_FILES)} files, or folders of them")
    return files


def transcribe(answer, files, batch=64):
    """A line of JSON a file on standard output: {"audio", "text"}, with "cut" where --max_new_tokens was not enough, or
    {"audio", "error"}. -> exit code: 1 if none could be heard."""
    failed = 0
    with tqdm(total=len(files), unit=" recordings") as bar:
        for start in range(0, len(files), batch):
            rows, waves = [dict(audio=str(f)) for f in files[start:start + batch]], {}
            for i, row in enumerate(rows):
                try:
                    waves[i] = torch.from_numpy(decode(Path(row["audio"]).read_bytes())[0])
                except (OSError, ValueError) as e:
                    row["error"] = e.strerror or str(e) if isinstance(e, OSError) else str(e)
            for i, (text, _, cut) in zip(waves, answer([TRANSCRIBE] * len(waves), [[w] for w in waves.values()])):
                rows[i] |= dict(text=text, cut=True) if cut else dict(text=text)
            for row in rows:
                print(json.dumps(row, ensure_ascii=False), flush=True)
            failed += len(rows) - len(waves)
            bar.update(len(rows))
    return int(failed == len(files))


# -----------------------------------------------------------------------------
# Live. The phrase so far is decoded anew every half second; what two passes in a row agree on is said (local agreement, as in
# Liu et al. 2020, arXiv:2005.11185, and whisper_streaming). A pause ends a phrase, and one that fills the buffer is cut at its
# quietest place.

FRAME = SAMPLE_RATE // 40                 # samples; what is loud and what is quiet is told by 25 ms
STEP = PAUSE = 20                         # frames: half a second
LEAD, UNSURE, MEMORY = 3, 40, 800         # frames kept before a phrase; while there is none; that loud and quiet are told from


def standard_input(n):
    """n bytes, fewer at the end. Not through sys.stdin, whose lock a thread that still waits would keep from Python's exit."""
    data = b""
    while len(data) < n and (more := os.read(0, n - len(data))):
        data += more
    return data


def pieces_of(source):
    """A file at the speed it was recorded, or "-": raw 16-bit mono PCM at 16 kHz -> float32 arrays of half a second."""
    if source == "-":
        while len(data := standard_input(2 * STEP * FRAME)) > 1:
            yield np.frombuffer(data[:len(data) // 2 * 2], dtype="<i2").astype(np.float32) / 32768
        return
    wave, began = decode(Path(source).read_bytes())[0], time.monotonic()
    for start in range(0, len(wave), STEP * FRAME):
        time.sleep(max(0, began + (start + STEP * FRAME) / SAMPLE_RATE - time.monotonic()))
        yield wave[start:start + STEP * FRAME]


def arriving(pieces):
    """Each piece, and whether more has come meanwhile: a thread listens on while the last is being decoded. Ctrl-C, how a
    microphone ends, ends the listening only: what has come is still decoded, unless there is a second one."""
    waiting = queue.SimpleQueue()  # a signal may interrupt its put() and put

    def listen():
        try:
            for piece in pieces:
                waiting.put(piece)
            waiting.put(None)
        except Exception as e:  # raised again below, where it is seen
            waiting.put(ValueError(e.strerror or str(e)) if isinstance(e, OSError) else e)

    def stop(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        waiting.put(None)
    before = signal.signal(signal.SIGINT, stop)
    threading.Thread(target=listen, daemon=True).start()
    try:
        while (piece := waiting.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece, not waiting.empty()
    finally:
        signal.signal(signal.SIGINT, before)


def loudness(wave):
    """dB of full scale, one a frame."""
    return 10 * np.log10(np.square(wave[:len(wave) // FRAME * FRAME]).reshape(-1, FRAME).mean(1) + 1e-10)


def loud_from(levels):
    """The dB that tell voice from background: a third of the way from the quietest to the loudest of late, at least 9 dB."""
    quiet, loud = np.maximum(np.percentile(levels, (2, 95)), -70)
    return quiet + max(9, (loud - quiet) / 3)


def live(answer, pieces, longest):
    """Print words when they are certain, a line a phrase; nothing printed is taken back. Raises ValueError."""
    phrase, begun, before, said, levels = np.zeros(0, np.float32), False, [], 0, deque(maxlen=MEMORY)

    def words():
        return answer([TRANSCRIBE], [[torch.from_numpy(phrase)]])[0][0].split()

    def say(words, end=""):
        nonlocal said
        print("".join(f"{w} " for w in words[said:]), end=end if said or words else "", flush=True)
        said = max(said, len(words))

    def finish(n):
        """The first n samples are a phrase; what follows may become the next."""
        nonlocal phrase, begun, before, said
        phrase, rest = phrase[:n], phrase[n:]
        say(words(), "\n")
        phrase, begun, before, said = rest, False, [], 0

    def advance():
        """Leave out what comes before a phrase, and end what is over."""
        nonlocal phrase, begun
        loud = np.flatnonzero(loudness(phrase) > loud_from(levels))
        if not begun:
            begun, start = len(loud) > 0, max(0, loud[0] - LEAD if len(loud) else len(phrase) // FRAME - UNSURE)
            phrase, loud = phrase[start * FRAME:], loud - start
        if not begun:
            return False
        pauses = np.flatnonzero(np.diff(loud, append=len(phrase) // FRAME) > PAUSE)
        if len(pauses) or not len(loud):  # what was loud is quiet beside what followed
            finish((loud[pauses[0]] + 1 + PAUSE // 2) * FRAME if len(pauses) else len(phrase))
        elif len(phrase) >= longest:
            finish(len(cut_at_pauses(torch.from_numpy(phrase), longest - 1)[0]))
        return not begun

    for piece, more in arriving(pieces):
        phrase = np.concatenate([phrase, piece])
        levels.extend(loudness(piece))
        while len(levels) and advance():
            pass
        if begun and not more and len(phrase) >= MIN_SECONDS * SAMPLE_RATE:
            heard = words()
            say(heard[:next((i for i, (a, b) in enumerate(zip(heard, before)) if a != b), min(len(heard), len(before)))])
            before = heard
    if begun and len(phrase) >= MIN_SECONDS * SAMPLE_RATE:
        finish(len(phrase))


# -----------------------------------------------------------------------------
# Commands

def servable(ckpt, encoder=ENCODER, llm=LLM):
    """Any checkpoint -> a complete folder in its own layout, exported into the cache if it is not one. Raises ValueError."""
    folder = find_checkpoint(ckpt)
    settings = json.loads((folder / "config.json").read_bytes()) if (folder / "config.json").is_file() else {}
    if not folder.is_dir():
        raise ValueError(f"no checkpoint in {folder}: train one, or name a hub checkpoint as owner/name")
    if not isinstance(settings, dict):
        raise ValueError(f"{folder}: its config.json is broken")
    if settings.get("auto_map") and "encoder_config" in settings and not settings.get("base") and (folder / "generation_config.json").is_file():
        return folder
    made_of = [fingerprint(folder), "" if "encoder_config" in settings else f"{encoder} {llm}", Path(__file__).with_name("model.py").read_text()]
    digest = hashlib.sha256(" ".join(made_of).encode())
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".jinja") and p.name != "results.json"):
        digest.update(path.read_bytes())
    place = cache_dir() / f"served-{digest.hexdigest()[:16]}"
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not place.exists():
            export(folder, place, encoder, llm)
    except (ValueError, OSError):
        if not place.exists():  # else another process was first
            raise
    return place


def serve(folder, host, port, rest):
    """The OpenAI server of vLLM, with careful defaults; what is given overrides them."""
    from vllm.entrypoints.launchers.api_server.entry import main
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    FlexibleArgumentParser.error = ArgumentParser.error  # one line, not three hundred of usage
    defaults = {"host": host, "port": port, "served-model-name": "borealis", "limit-mm-per-prompt": '{"audio": 1}'} | careful_settings()
    given = {flag.split("=")[0].split(".")[0].replace("_", "-").replace("--no-", "--") for flag in rest}
    if rest and not rest[0].startswith("-") or "--model" in given:
        raise UserError("the model to serve is named by --ckpt")
    sys.argv = ["serve_vllm.py", "--model", str(folder), *rest]
    for name, value in defaults.items():
        if (flag := f"--{name.replace('_', '-')}") not in given:
            sys.argv += [flag] if value is True else [flag, str(value)]
    print(f"loading {folder}; then http://{host}:{port}/v1", file=sys.stderr)
    main()


def main():
    parser = ArgumentParser(prog="serve_vllm.py", allow_abbrev=False, description=__doc__.split("\n")[1],
                            epilog="Any other flag is for vLLM's server, which has some three hundred.")
    parser.add_argument("--ckpt", default="out", help="a run, an exported folder, an original checkpoint, or a hub name")
    parser.add_argument("--encoder", default=ENCODER, help="what a checkpoint in the original's layout was made of")
    parser.add_argument("--llm", default=LLM)
    parser.add_argument("--max_audio_seconds", type=float, default=600, help="longest recording that is taken")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--transcribe", nargs="+", metavar="FILE", help="recordings or folders of them; JSON lines, no server")
    parser.add_argument("--live", metavar="FILE", help="a recording as if it came in now, or - for raw PCM on standard input")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="a window, for --transcribe and --live")
    args, rest = parser.parse_known_args()
    if args.transcribe and args.live:
        raise UserError("--transcribe or --live, not both")
    if rest and (args.transcribe or args.live):
        raise UserError(f"unknown flag {rest[0]}; vLLM's own flags are for the server")
    if args.live and args.live != "-" and not Path(args.live).is_file():
        raise UserError(f"no file at {args.live}")
    if not MIN_SECONDS <= args.max_audio_seconds < 1e6:
        raise UserError(f"--max_audio_seconds must lie between {MIN_SECONDS} and a million")
    if args.max_new_tokens < 1:
        raise UserError("--max_new_tokens must be at least 1")
    limit = max(args.max_audio_seconds, 60) if args.live else args.max_audio_seconds  # a live phrase may be half a minute
    os.environ[MAX_AUDIO_SECONDS] = f"{limit:g}"
    if args.live or args.transcribe:  # whatever the locale, and for file names that are not UTF-8
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    files = recordings_in(args.transcribe) if args.transcribe else []
    try:
        if not (args.transcribe or args.live):
            return serve(servable(args.ckpt, args.encoder, args.llm), args.host, args.port, rest)
        answer, config = offline(args.ckpt, args.max_new_tokens, args.encoder, args.llm)
    except (ValueError, OSError, RuntimeError) as e:
        reason = (e.errors()[0]["msg"] if hasattr(e, "errors") else str(e).strip() or type(e).__name__).splitlines()[0]  # pydantic says much
        raise UserError(f"cannot serve {args.ckpt}: {reason}") from None
    if args.transcribe:
        from eval import in_pieces
        return transcribe(in_pieces(answer, config.window_samples, 64), files)
    try:
        live(answer, pieces_of(args.live), max(config.window_samples, 10 * SAMPLE_RATE))
    except ValueError as e:
        raise UserError(f"{args.live}: {e}") from None


if __name__ == "__main__":
    run(main)
