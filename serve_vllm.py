"""serve_vllm.py -- the last chapter: our model in vLLM, with its paged attention and batching.

    python serve_vllm.py --ckpt out/           # an OpenAI server on 127.0.0.1:8000
    python serve_vllm.py --ckpt out/ --transcribe a.wav folder/ --format srt --out_dir texts/
    arecord -t raw -f S16_LE -r 16000 | python serve_vllm.py --live    # asks a running server

vLLM does not know our model. Four classes tell it what it must know:
    ProcessingInfo            how many recordings a prompt may hold, how many tokens one can take
    DummyInputsBuilder        the largest prompt, on which vLLM measures the memory it needs
    MultiModalProcessor       a recording -> mel windows, and the tokens that stand for it
    ForConditionalGeneration  the network: our encoder and adapter, and vLLM's own Qwen3

70 s are three windows of one chat prompt; for a transcript, pieces cut at pauses, each a prompt."""
import math
import os
import sys
from itertools import chain
import model
from model import AUDIO, SAMPLE_RATE
from support import engine, transcripts  # before vllm, which reads what engine sets
from support.cli import FLAGS, ArgumentParser, UserError, check_port, run

if __name__ == "__main__" and not engine.INSTALLED:  # one line of error, not vLLM's ImportError
    run(engine.check_installed)

import numpy as np
import torch
from transformers import BatchFeature
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from vllm import ModelRegistry
from vllm.config.speech_to_text import SpeechToTextConfig
from vllm.model_executor.models import interfaces, module_mapping, utils
from vllm.multimodal import MULTIMODAL_REGISTRY, inputs, parse, processing
from support import realtime
from support.uploads import GUARD, LIMIT

# ---- The four classes. How many tokens a recording takes is said twice: the most, for which memory
# is set aside, in get_mm_max_tokens_per_item(); what each one takes, in _get_prompt_updates().
class BorealisProcessingInfo(processing.BaseProcessingInfo):
    """Any number of recordings (--limit-mm-per-prompt caps them), mono at 16 kHz."""
    def get_data_parser(self):
        return parse.MultiModalDataParser(target_sr=SAMPLE_RATE, target_channels=1)
    def get_supported_mm_limits(self):
        return {"audio": None}
    def get_mm_max_tokens_per_item(self, seq_len, mm_counts=None):
        """N for each window of the longest recording that fits the context, and two markers."""
        config = self.get_hf_config()
        windows = math.ceil(float(os.environ[LIMIT]) * SAMPLE_RATE / config.window_samples)
        fit = (seq_len - 2) // config.tokens_per_window
        return {"audio": max(1, min(windows, fit)) * config.tokens_per_window + 2}

class BorealisDummyInputsBuilder(processing.BaseDummyInputsBuilder):
    """The largest prompt: recordings of silence, each as long as it may be."""
    def get_dummy_text(self, mm_counts):
        return AUDIO * mm_counts.get("audio", 0)
    def get_dummy_mm_data(self, seq_len, mm_counts, mm_options):
        config = self.info.get_hf_config()
        tokens = self.info.get_mm_max_tokens_per_item(seq_len)["audio"]
        return {"audio": self._get_dummy_audios(
            length=tokens // config.tokens_per_window * config.window_samples,
            num_audios=mm_counts.get("audio", 0), overrides=mm_options.get("audio"))}

class BorealisMultiModalProcessor(processing.BaseMultiModalProcessor):
    """Recordings -> mels; <|AUDIO|> -> marker, slots, marker, like build_ids() in training."""
    def _call_hf_processor(self, hf_data, hf_kwargs):
        """Waves -> mels, and windows of each. ValueError: a 400; NaN would spoil other requests."""
        config = self.info.get_hf_config()
        waves = [model.check_wave(np.asarray(w, dtype=np.float32)) for w in hf_data["audio"]]
        cut = [model.cut_windows(wave, config) for wave in waves]
        mels = model.log_mel(list(chain(*cut)), config)  # (W, M, F)
        return BatchFeature(dict(input_features=mels, num_windows=torch.tensor([*map(len, cut)])))
    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):  # rows of which recording
        counts = hf_inputs.get("num_windows", torch.zeros(0, dtype=torch.long))  # none: only text
        return {"input_features": inputs.MultiModalFieldConfig.flat_from_sizes("audio", counts),
                "num_windows": inputs.MultiModalFieldConfig.batched("audio", keep_on_cpu=True)}
    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        """select_token_id: only the slots take embeddings of sound, the markers stay text."""
        config = self.info.get_hf_config()
        counts = out_mm_kwargs.get_data().get("num_windows")
        def slots(i):  # of recording i
            n = config.tokens_per_window * int(counts[i])
            ids = [config.audio_start_id, *[config.audio_token_id] * n, config.audio_end_id]
            return processing.PromptUpdateDetails.select_token_id(ids, config.audio_token_id)
        return [processing.PromptReplacement("audio", [config.audio_token_id], slots)]
    def apply(self, inputs, *args, **kwargs):  # ids may come with a wrong number of placeholders
        placed = inputs.prompt.count(self.info.get_hf_config().audio_token_id)
        given = inputs.mm_data_items.get_all_counts().get("audio", 0)
        if placed != given:
            raise ValueError(f"the prompt has {placed} {AUDIO} for {given} recordings")
        return super().apply(inputs, *args, **kwargs)

@MULTIMODAL_REGISTRY.register_processor(BorealisMultiModalProcessor, info=BorealisProcessingInfo,
                                        dummy_inputs=BorealisDummyInputsBuilder)
class BorealisForConditionalGeneration(torch.nn.Module, interfaces.SupportsMultiModal,
                                       interfaces.SupportsLoRA, interfaces.SupportsTranscription):
    """encoder.*, adapter.*, llm.* as in our checkpoints; llm is vLLM's Qwen3."""
    supported_languages = {"ru": "Russian", "en": "English"}
    @classmethod
    def get_placeholder_str(cls, modality, i):
        return AUDIO
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        config.encoder_config._attn_implementation = "sdpa"
        with self._mark_tower_model(vllm_config, "audio"):
            self.encoder = WhisperEncoder(config.encoder_config)  # vLLM's: docs/NEGATIVE.md
            self.adapter = model.Adapter(config)
        with self._mark_language_model(vllm_config):
            self.llm = utils.init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=config.llm_config,
                prefix=utils.maybe_prefix(prefix, "llm"), architectures=["Qwen3ForCausalLM"])
        # In the original's layout <|AUDIO|> has no row in the table.
        self.configure_mm_token_handling(config.llm_config.vocab_size, [config.audio_token_id])
    def embed_multimodal(self, input_features, num_windows, **_):
        """(W, M, F) -> for each recording (its windows x N, D), which vLLM puts into its slots."""
        mels = input_features.to(self.adapter.w_in.weight)                      # its dtype, device
        x = self.encoder(mels).last_hidden_state                                # (W, T, E)
        x = self.adapter(model.downsample(x, self.config.downsample_factor))    # (W, N, D)
        return [part.flatten(0, 1) for part in x.split(num_windows.tolist())]
    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **_):
        return self.llm.model(input_ids, positions, intermediate_tensors, inputs_embeds)
    def compute_logits(self, hidden_states):
        return self.llm.compute_logits(hidden_states)
    def load_weights(self, weights):
        return utils.AutoWeightsLoader(self).load_weights(weights)
    def get_mm_mapping(self):  # LoRA is for the LLM
        return module_mapping.MultiModelKeys.from_string_field("llm", "adapter", "encoder")
    # ---- for /v1/audio/transcriptions, which is in support/uploads.py
    @classmethod
    def get_speech_to_text_config(cls, model_config, task_type):
        return SpeechToTextConfig()
    @classmethod
    def get_generation_prompt(cls, stt_params):
        raise ValueError("this model does not translate: ask /v1/audio/transcriptions")

def register() -> None:  # also the entry point of pyproject.toml
    ModelRegistry.register_model("BorealisForConditionalGeneration",
                                 BorealisForConditionalGeneration)

register()  # here, not in main(): the processes that vLLM starts run this file under another name

# ---- Commands
def serve(args, vllm_flags: list[str]) -> None:
    """vLLM's own server; of a flag given twice the last counts: our defaults, then the user's."""
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    FlexibleArgumentParser.error = ArgumentParser.error  # one line, not three hundred of usage
    named = "--model" in [f.split("=")[0] for f in vllm_flags]
    if named or (vllm_flags and not vllm_flags[0].startswith("-")):
        raise UserError("the model to serve is named by --ckpt")
    check_port(args.host, args.port)
    folder = engine.servable(args.ckpt, args.encoder, args.llm)
    os.environ.update({f"BOREALIS_{k.upper()}": str(getattr(args, k)) for k in FLAGS["doors"]})
    os.environ.setdefault("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", str(math.ceil(args.max_request_mb)))
    defaults = engine.TABLES["vllm_server"] | engine.careful_settings()
    defaults |= dict(model=folder, host=args.host, port=args.port)
    ours = [f"--{k}" if v is True else f"--{k}={v}" for k, v in defaults.items()]
    sys.argv = ["serve_vllm.py", *ours, *vllm_flags, "--middleware=support.doors.Doors"]
    print(f"loading {folder}; then http://{args.host}:{args.port}/v1", file=sys.stderr)
    with engine.keep_inside():
        entry.main()

def main() -> int | None:
    parser = ArgumentParser(description="Our model in vLLM. Any other flag is for vLLM's server.")
    args, vllm_flags = parser.add_tables("model", "transcribe", "serve", "doors").parse_known_args()
    if args.transcribe and args.live or args.context and not args.transcribe:
        raise UserError("--transcribe has --context and not --live; requests have hotwords")
    os.environ[LIMIT] = str(args.max_audio_seconds or 600)  # which vLLM's processes inherit
    os.environ[GUARD] = str(int(args.loop_guard))
    if not args.transcribe and not args.live:
        with engine.loading(args.ckpt):
            return serve(args, vllm_flags)
    if vllm_flags:
        raise UserError(f"unknown flag {vllm_flags[0]}; vLLM's own flags are for the server")
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # file names may be bytes
    if args.live:
        return realtime.follow(args.server)
    planned = transcripts.plan(args)  # wrong ones show before vLLM has loaded the model
    vllm = engine.Offline(args.ckpt, args.max_new_tokens, args.encoder, args.llm, args.loop_guard)
    return transcripts.transcribe(vllm, vllm.config.window_samples, 64, args, planned)

run(main, __name__)
