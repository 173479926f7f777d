"""
support/checkpoint.py -- load any checkpoint: ours or the original's, whole or on top of another.

All loading is strict, and what fails is a ValueError or OSError of one line. support/storage.py
reads and writes the files.
"""
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, WhisperConfig, WhisperModel
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

from model import AUDIO, ENCODER, END, LLM, MARKER, BorealisConfig, add_audio_tokens
from model import BorealisForConditionalGeneration as Borealis
from support import lora, storage
from support.cli import UserError, first_line
from support.storage import check_state_dict, fingerprint, newest_step, read_weights

EMBEDDINGS = "llm.model.embed_tokens.weight"


def find_checkpoint(where: str | Path) -> Path:
    """A run's folder, any other folder, or owner/name on the hub -> the folder with its files."""
    folder = Path(where)
    hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(where)) and not folder.parent.exists()
    if folder.exists() or not hub_name:
        return newest_step(folder)
    from huggingface_hub import snapshot_download
    files = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(str(where), allow_patterns=files))
    except Exception as e:  # it fails in many ways, and none of them is ours
        raise ValueError(f"cannot fetch the checkpoint {where} from the hub ({type(e).__name__}): "
                         "go online (a gated one wants HF_TOKEN), or name a local folder") from None


def read_config(folder: Path) -> BorealisConfig | None:
    """None if it is not a folder of ours."""
    path = folder / "config.json"
    try:
        settings = dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError):
        raise ValueError(f"{path} is broken: train again or fetch it again") from None
    if (kind := settings.get("model_type")) != BorealisConfig.model_type and kind in CONFIG_MAPPING:
        raise ValueError(f"{folder} holds a {kind} model, not a Borealis")
    return BorealisConfig.from_pretrained(folder) if "encoder_config" in settings else None


def load_part(cls: type, where: str, **settings):
    """cls.from_pretrained, refusing any other kind of model and any key that does not fit."""
    kind = AutoConfig.from_pretrained(where).model_type
    if kind != cls.config_class.model_type:
        raise ValueError(f"{where} is a {kind} model, not {cls.config_class.model_type}")
    try:
        model, info = cls.from_pretrained(where, output_loading_info=True, **settings)
    except SafetensorError as e:
        raise ValueError(f"the weights in {where} are broken: {e}") from None
    # proj_out is Whisper's own output head, which WhisperModel does not have.
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith("proj_out.")]
    check_state_dict(where, missing=info["missing_keys"], unexpected=unexpected)
    return model


def from_parts(encoder: str, llm: str, dtype: torch.dtype | None = None, **config) -> Borealis:
    """Whisper and Qwen3 by hub name or folder (any size of each), a fresh adapter between them.
    dtype: None leaves every part as it is stored. config: more fields of BorealisConfig."""
    dtype = "auto" if dtype is None else dtype
    tokenizer = add_audio_tokens(AutoTokenizer.from_pretrained(llm))
    whisper = load_part(WhisperModel, encoder, dtype=dtype).encoder
    qwen = load_part(Qwen3ForCausalLM, llm, dtype=dtype)
    known = min(len(tokenizer) - 2, qwen.config.vocab_size)
    qwen.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # from 151,936 to 151,671
    for module in (qwen.get_input_embeddings(), qwen.get_output_embeddings()):
        with torch.no_grad():  # no random rows: a checkpoint need not hold what was not trained
            mean = module.weight[:known].float().mean(0)
            module.weight[known:] = mean.to(module.weight.dtype)
    audio, marker, pad = tokenizer.convert_tokens_to_ids([AUDIO, MARKER, "<|endoftext|>"])
    qwen.config.pad_token_id = pad  # Qwen3's own config names none
    model = Borealis(BorealisConfig(
        encoder_config=whisper.config, llm_config=qwen.config, audio_token_id=audio,
        audio_start_id=marker, audio_end_id=marker, **config), whisper, qwen)
    model.set_attn_implementation("sdpa")  # put together, the parts forget theirs
    model.tokenizer = tokenizer
    return model


def convert_original(folder: Path, encoder: str, llm: str) -> tuple:
    """A checkpoint in the original's layout (encoder.*, adapter.*, llm.*, no config of ours, its
    own pair of tokens) -> (config, tensors, tokenizer)."""
    tensors = read_weights(folder)
    if EMBEDDINGS not in tensors:
        raise ValueError(f"{folder} is neither our checkpoint nor the original's: it has no "
                         f"{EMBEDDINGS}")
    table = tensors[EMBEDDINGS]
    own = (folder / "tokenizer.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder if own else llm)
    known = tokenizer.get_vocab()
    posts = AUDIO in known and END not in known  # the pair of the post's vLLM plugin
    add_audio_tokens(tokenizer, original=not posts)
    audio, start, end = tokenizer.convert_tokens_to_ids([AUDIO, MARKER, MARKER if posts else END])
    if max(start, end) >= len(table):
        raise ValueError(f"{folder} has {len(table)} embedding rows, its tokens {MARKER} and {END} "
                         f"would be rows {start} and {end}: is its --llm another?")
    qwen = Qwen3Config.from_pretrained(llm)
    qwen.vocab_size = len(table)
    qwen.pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    head = tensors.pop("llm.lm_head.weight", table) if qwen.tie_word_embeddings else table
    if not torch.equal(head, table):
        raise ValueError(f"{folder}: llm.lm_head.weight differs from the embeddings, which {llm} "
                         "ties together")
    config = BorealisConfig(encoder_config=WhisperConfig.from_pretrained(encoder), llm_config=qwen,
                            audio_token_id=audio, audio_start_id=start, audio_end_id=end)
    return config, tensors, tokenizer


def load_checkpoint(where: str | Path, encoder: str = ENCODER, llm: str = LLM,
                    dtype: torch.dtype | None = None) -> Borealis:
    """Any checkpoint -> a complete model in eval mode with its tokenizer, LoRA merged.

    where: a folder of train.py or of export, one in the original's layout, or a hub name.
    encoder, llm: where the original's layout takes its configs and tokenizer from.
    dtype: None leaves weights as they are stored."""
    folder = find_checkpoint(where)
    config = read_config(folder)
    if config is None:
        config, tensors, tokenizer = convert_original(folder, encoder, llm)
    else:
        tensors = read_weights(folder)
        tokenizer = add_audio_tokens(AutoTokenizer.from_pretrained(folder))  # has them already
    if config.base is None:
        dtype = dtype or tensors.get(EMBEDDINGS, next(iter(tensors.values()))).dtype
        model, info = Borealis.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True)  # check_state_dict() says it better
        check_state_dict(folder, missing=info["missing_keys"], unexpected=info["unexpected_keys"],
                         mismatched=info["mismatched_keys"])
    else:
        model = load_base(folder, config, dtype)
        dtype = model.llm.dtype
        storage.load_stored(lora.prepare(model, config.trained, config.lora), tensors, folder)
        lora.merge(model, dtype)
    rows = config.llm_config.vocab_size
    known = len(tokenizer) - (config.audio_token_id >= rows)
    if known > rows:
        raise ValueError(f"the tokenizer in {folder} has {known} tokens, the model {rows}: they "
                         "are not from the same run")
    model.tokenizer = tokenizer
    return model.eval()


def load_base(folder: Path, config: BorealisConfig, dtype: torch.dtype | None = None) -> Borealis:
    """What the checkpoint in `folder` was trained on top of, if it is still there and the same."""
    base = dict(config.base)
    for key, value in base.items():  # folders are named as seen from this one: a run may move
        if value and (folder / value).exists():
            base[key] = str((folder / value).resolve())
        elif value and value.startswith(".."):
            raise ValueError(f"{folder} was trained on top of {folder / value}, which is gone: "
                             "bring it back")
    if not base["checkpoint"]:
        return from_parts(base["encoder"], base["llm"], dtype, adapter=config.adapter)
    place = find_checkpoint(base["checkpoint"])
    if fingerprint(place) != base["fingerprint"]:
        raise ValueError(f"{folder} was trained on top of {place}, which has changed since: bring "
                         "the old one back")
    return load_checkpoint(place, base["encoder"], base["llm"], dtype)


def load_model(where: str | Path, device: torch.device | str, encoder: str = ENCODER,
               llm: str = LLM) -> Borealis:
    """Any checkpoint on its device, ready to answer, bf16 on a GPU. Raises UserError."""
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    try:
        return load_checkpoint(where, encoder, llm, dtype).to(device)
    except (OSError, ValueError, AttributeError, TypeError, RuntimeError, SafetensorError) as e:
        raise UserError(f"cannot load {where}: {first_line(e)}") from None


def training_config(where: str | Path) -> dict:
    """A checkpoint's train_config.json, {} if there is none. Raises UserError."""
    try:
        path = find_checkpoint(where) / "train_config.json"
    except ValueError as e:
        raise UserError(str(e)) from None
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        raise UserError(f"{path} is broken: bring it back, or remove it and name what to evaluate "
                        "with --manifest") from None


# Until all callers use support.storage and the functions of support.lora themselves.
steps_in, prune, save_step, restore = (
    storage.steps_in, storage.prune, storage.save_step, storage.restore)
for method in (lora.prepare, lora.merge, lora.cast, lora.stored):
    setattr(Borealis, method.__name__, method)
