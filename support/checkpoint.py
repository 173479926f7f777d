"""support/checkpoint.py -- load any checkpoint, strictly: what does not fit is an error."""
import json
from pathlib import Path
import huggingface_hub
import torch
import transformers as hf
from safetensors import SafetensorError
from tokenizers import normalizers
from model import AUDIO, ENCODER, LLM, MARKER, BorealisConfig
from model import BorealisForConditionalGeneration as Borealis
from support import cli, lora, storage

EMBEDDINGS = "llm.model.embed_tokens.weight"
END = "<|end_of_audio|>"  # ends a recording in the original's checkpoints, where ours have MARKER
ERRORS = OSError, ValueError, AttributeError, TypeError, RuntimeError, SafetensorError  # of loading
ESCAPE = "\ufdd0"  # no character: Unicode keeps it for internal use
FILES = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.jinja", "*.py"]

def find_checkpoint(where: str | Path) -> Path:
    """A run's folder, any other folder, or owner/name on the hub -> the folder with its files."""
    if Path(where).parent.exists() or str(where).count("/") != 1:
        return storage.newest_step(where)
    try:
        return Path(huggingface_hub.snapshot_download(str(where), allow_patterns=FILES))
    except Exception as e:  # it fails in many ways, and none of them is ours
        raise ValueError(f"cannot fetch the checkpoint {where} ({type(e).__name__}): go online, "
                         "set HF_TOKEN, or name a folder") from None

def read_json(path: Path) -> dict:  # {} if there is no such file. Raises ValueError
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError):
        raise ValueError(f"{path} is broken: fetch it again, or train again") from None

def training_config(where: str | Path) -> dict:  # train_config.json or {}. Raises UserError
    with cli.as_user_error("", ValueError):
        return read_json(find_checkpoint(where) / "train_config.json")

def add_audio_tokens(tokenizer, tokens: tuple[str, ...] = (AUDIO, MARKER)):
    """Append our tokens, 151669 and 151670 in Qwen3. Set our template: its, without thinking, and
    with ESCAPE in texts, which goes after control tokens are found: so none is found in a text."""
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    template = Path(__file__).with_name("chat_template.jinja")
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    steps = normalizers.Replace(ESCAPE, ""), normalizers.NFC()  # the second is Qwen3's
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([*steps])
    return tokenizer

def read_tokenizer(where: str | Path):  # as it is. AutoTokenizer's Qwen2Tokenizer forgets steps
    return hf.PreTrainedTokenizerFast.from_pretrained(where)

def load_tokenizer(where: str | Path):  # with our tokens and today's template
    return add_audio_tokens(read_tokenizer(where))

def read_config(folder: Path) -> BorealisConfig | None:
    """A checkpoint's config.json, None if there is none or it is not ours. Raises ValueError."""
    settings = read_json(folder / "config.json")
    if (kind := settings.get("model_type")) != "borealis" and kind in hf.CONFIG_MAPPING:
        raise ValueError(f"{folder} holds a {kind} model, not a Borealis")
    return BorealisConfig.from_pretrained(folder) if "encoder_config" in settings else None

def load_part(cls: type, where: str, **settings):
    """cls.from_pretrained; any key must fit, but Whisper's head. Raises ValueError or OSError."""
    kind, wanted = hf.AutoConfig.from_pretrained(where).model_type, cls.config_class.model_type
    cli.refuse(kind != wanted, f"{where} is a {kind} model, not {wanted}", ValueError)
    model, info = cls.from_pretrained(where, output_loading_info=True, **settings)
    extra = [key for key in info["unexpected_keys"] if not key.startswith("proj_out.")]
    storage.check_state_dict(where, missing_keys=info["missing_keys"], unexpected_keys=extra)
    return model

def from_parts(encoder: str, llm: str, dtype: torch.dtype | None = None, **config) -> Borealis:
    """Whisper and Qwen3, by hub name or folder, with a fresh adapter. config: more fields of it."""
    tokenizer = load_tokenizer(llm)
    whisper = load_part(hf.WhisperModel, encoder, dtype=dtype or "auto").encoder
    qwen = load_part(hf.Qwen3ForCausalLM, llm, dtype=dtype or "auto")
    known = min(len(tokenizer) - 2, qwen.config.vocab_size)
    qwen.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # from 151,936 to 151,671
    for module in (qwen.get_input_embeddings(), qwen.get_output_embeddings()):
        table = module.weight.data  # no random rows: a checkpoint need not hold what did not train
        table[known:] = table[:known].float().mean(0)
    audio, marker, pad = tokenizer.convert_tokens_to_ids([AUDIO, MARKER, "<|endoftext|>"])
    qwen.config.pad_token_id = pad  # Qwen3's own config names none
    model = Borealis(BorealisConfig(
        encoder_config=whisper.config, llm_config=qwen.config, audio_token_id=audio,
        audio_start_id=marker, audio_end_id=marker, **config), whisper, qwen)
    model.set_attn_implementation("sdpa")  # put together, the parts forget theirs
    model.tokenizer = tokenizer
    return model

def convert_original(folder: Path, tensors: dict, encoder: str, llm: str) -> tuple:
    """The original's layout: no config, its own two tokens -> (config, tokenizer)."""
    if EMBEDDINGS not in tensors:
        raise ValueError(f"{folder} is no checkpoint, ours or the original's: no {EMBEDDINGS}")
    table = tensors[EMBEDDINGS]
    source = folder if (folder / "tokenizer.json").exists() else llm
    tokenizer = read_tokenizer(source)
    posts = {AUDIO, END} & tokenizer.get_vocab().keys() == {AUDIO}  # as the post's vLLM plugin
    add_audio_tokens(tokenizer, (AUDIO, MARKER) if posts else (MARKER, END, AUDIO))
    tokens = [AUDIO, MARKER, MARKER if posts else END, "<|endoftext|>"]
    audio, start, end, pad = tokenizer.convert_tokens_to_ids(tokens)
    if max(start, end) >= len(table):
        raise ValueError(f"{folder} has only {len(table)} embeddings: is its --llm another?")
    tied = torch.equal(tensors.get("llm.lm_head.weight", table), table)
    qwen = hf.Qwen3Config.from_pretrained(llm, vocab_size=len(table), pad_token_id=pad,
                                          tie_word_embeddings=tied)
    return BorealisConfig(encoder_config=hf.WhisperConfig.from_pretrained(encoder), llm_config=qwen,
                          audio_token_id=audio, audio_start_id=start, audio_end_id=end), tokenizer

def load_checkpoint(where, encoder: str = ENCODER, llm: str = LLM, dtype=None) -> Borealis:
    """A folder or hub name -> a complete model in eval mode with its tokenizer, LoRA merged.
    encoder, llm: whose configs the original's layout takes. dtype: None leaves all as stored."""
    folder = find_checkpoint(where)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder) if config else None
    if config and config.base:
        model = load_base(folder, config, dtype)
        dtype = model.llm.dtype
        storage.restore_weights(folder, lora.prepare(model, config.trained, config.lora))
        lora.merge(model, dtype)
    else:
        tensors = storage.read_weights(folder)
        if not config:
            config, tokenizer = convert_original(folder, tensors, encoder, llm)
        dtype = dtype or tensors.get(EMBEDDINGS, next(iter(tensors.values()))).dtype
        model, info = Borealis.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True)  # check_state_dict() says better what mismatches
        storage.check_state_dict(folder, **info)
    model.tokenizer = tokenizer
    return model.eval()

def load_base(folder: Path, config: BorealisConfig, dtype: torch.dtype | None = None) -> Borealis:
    """What the checkpoint in `folder` was trained on top of, if it is still there and the same."""
    if not config.base:  # nothing: all of it is in the checkpoint
        return Borealis(config)
    base = dict(config.base)
    for key, value in base.items():  # folders are named as seen from this one: a run may move
        if value and value.startswith(".."):
            base[key] = str((folder / value).resolve())
    if not base["checkpoint"]:
        return from_parts(base["encoder"], base["llm"], dtype, adapter=config.adapter)
    place = find_checkpoint(base["checkpoint"])
    if storage.fingerprint(place) != base["fingerprint"]:
        raise ValueError(f"{place}, the base of {folder}, is gone or has changed: bring it back")
    return load_checkpoint(place, base["encoder"], base["llm"], dtype)

def load_model(where: str | Path, device, encoder: str = ENCODER, llm: str = LLM) -> Borealis:
    """Any checkpoint on its device, ready to answer, bf16 on a GPU. Raises UserError."""
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    with cli.as_user_error(f"cannot load {where}: ", *ERRORS):
        return load_checkpoint(where, encoder, llm, dtype).to(device)
