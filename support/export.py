"""support/export.py -- a checkpoint as a model folder that needs nothing of this project."""
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
import torch
import transformers
from safetensors.torch import save_file
import model as code
from support import checkpoint, cli, lora, processing, recipes, storage

def export(where, to, encoder=code.ENCODER, llm=code.LLM, layout="remote", unmerged=False):
    """Write the folder `to`, whole or not at all -> the model. Raises ValueError or OSError."""
    place = Path(to).absolute()
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise ValueError(f"{to} exists already: name a new folder with --to")
    model = checkpoint.load_checkpoint(where, encoder, llm)
    source = checkpoint.find_checkpoint(where)
    lora.cast(model, model.llm.dtype)
    config, ends, table = model.config, model.ends, recipes.TABLES["export"]
    seconds = config.window_samples // code.SAMPLE_RATE
    config.auto_map, config.custom_pipelines = dict(table["auto_map"]), table["pipelines"]
    extractor = code.feature_extractor(config.encoder_config.num_mel_bins, chunk_length=seconds)
    facts = {key: value for key, value in config.to_dict().items() if key in table["facts"]}
    processor = processing.BorealisProcessor(extractor, model.tokenizer, facts=facts)
    processor.auto_map = {"AutoProcessor": table["auto_map"]["AutoProcessor"]}
    # By hand: transformers writes no temperature beside do_sample=False, vLLM samples without one.
    greedy = dict(do_sample=False, eos_token_id=ends, pad_token_id=ends[-1])
    greedy |= dict(temperature=0.0) if layout == "remote" else dict(max_new_tokens=256)
    if layout == "voxtral" and config.audio_token_id >= config.llm_config.vocab_size:
        greedy["suppress_tokens"] = [config.audio_token_id]  # its row is empty: nobody shall say it
    place.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=place.parent) as folder:
        fresh = Path(folder, "fresh")
        if unmerged:
            take_out_lora(model, source, layout, fresh / "lora")
        written = model if layout == "remote" else to_voxtral(model)
        written.save_pretrained(fresh, max_shard_size="5GB")
        processor.save_pretrained(fresh)
        extractor.save_pretrained(fresh)
        (fresh / "generation_config.json").write_text(json.dumps(greedy, indent=2))
        for file in (code.__file__, *source.glob("train_config.json")):  # eval.py reads the latter
            shutil.copy(file, fresh)
        travels = Path(processing.__file__).read_text("utf-8").replace("from model", "from .model")
        travels = travels.replace("\nimport model\n", "\nfrom . import model\n")
        (fresh / "processing.py").write_text(travels, "utf-8")
        (fresh / "README.md").write_text(model_card(model, to, layout), "utf-8")
        fresh.replace(place)
    return model

def to_voxtral(model) -> transformers.VoxtralForConditionalGeneration:
    """The same weights in transformers' own class, for a simple adapter. Raises ValueError."""
    config, listens, table = model.config, model.config.encoder_config, recipes.TABLES["voxtral"]
    k = listens.encoder_ffn_dim / listens.d_model  # of a Whisper 4; it has no setting for it
    odd = config.downsample_factor != k or listens.max_source_positions % k
    if odd or config.adapter != "simple":
        takes = f"a simple adapter and whole {k:g} frames a token"
        raise ValueError(f"--layout voxtral takes {takes}: use --layout remote")
    state = {}
    for part, prefix in table["parts"].items():
        state |= model.get_submodule(part).state_dict(prefix=prefix)
    rows = max(config.llm_config.vocab_size, config.audio_token_id + 1)
    for key in ("model.language_model.embed_tokens.weight", "lm_head.weight"):  # here, never tied
        state[key] = torch.nn.functional.pad(state[key], (0, 0, 0, rows - len(state[key])))
    llm = config.llm_config.to_dict() | dict(vocab_size=rows, tie_word_embeddings=False)
    with torch.device("meta"):  # no second copy
        twin = transformers.VoxtralForConditionalGeneration(transformers.VoxtralConfig(
            audio_config={key: getattr(listens, key) for key in table["encoder"]}, text_config=llm,
            audio_token_id=config.audio_token_id))
    twin.load_state_dict(state, assign=True)
    return twin

def model_card(model, to, layout: str) -> str:  # model_card.md, filled in
    template = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    title = Path(to).name if Path(to).is_absolute() else Path(to)
    return template.replace("{usage}", recipes.TABLES["export"]["usage"][layout]).format(
        title=title, model=model, seconds=model.config.window_samples / code.SAMPLE_RATE,
        parameters=model.num_parameters())

def take_out_lora(model, source: Path, layout: str, to: Path) -> None:
    """The LLM of a merged run gets its base's linears back, `to` the matrices, as peft has them."""
    import peft
    config = checkpoint.read_config(source)
    if not config or config.trained != "lora" or layout == "voxtral":
        raise ValueError(f"--unmerged: for LoRA, --layout remote; leave it out for {source}")
    matrices = {k: v for k, v in storage.read_weights(source).items() if ".lora_" in k}
    base = checkpoint.load_base(source, config)
    for name in {k.split(".lora_")[0] for k in matrices}:
        model.get_submodule(name).weight.data = base.get_submodule(name).weight.data
    peft.LoraConfig(r=config.lora["rank"], lora_alpha=config.lora["alpha"],
                    target_modules=r"llm\..*_proj").save_pretrained(to)  # not the encoder's
    tensors = {f"base_model.model.{k.replace('.default', '')}": v for k, v in matrices.items()}
    save_file(tensors, to / "adapter_model.safetensors")

def main() -> None:
    args = cli.ArgumentParser().add_tables("model", "export").parse_args()
    with cli.as_user_error("", *checkpoint.ERRORS):
        model = export(args.ckpt, args.to, args.encoder, args.llm, args.layout, args.unmerged)
    print(f"{args.to} holds {model.num_parameters():,} parameters in {model.dtype}")

cli.run(main, __name__)
