"""
support/export.py -- a checkpoint as a complete model folder: LoRA merged, model.py as remote code,
so that AutoModel.from_pretrained and vLLM load it without this project.

    python -m support.export --ckpt out/ --to hf/ [--push user/name]
"""
import json
import os
import shutil
from pathlib import Path

import transformers
from tabulate import tabulate
from transformers.utils.logging import disable_progress_bar

import model as code
from model import ENCODER, LLM, SAMPLE_RATE
from support import lora
from support.checkpoint import find_checkpoint, load_checkpoint, training_config
from support.cli import ArgumentParser, UserError, first_line, run

PRIVATE = {"out", "data_dir", "train_manifest", "device", "workers", "save_every", "keep", "log"}


def export(where: str | Path, to: str | Path, encoder: str = ENCODER, llm: str = LLM,
           title: str | None = None) -> code.BorealisForConditionalGeneration:
    """Write the folder `to`, whole or not at all -> the model. title: its name in the model card,
    the folder's unless given. Raises ValueError or OSError."""
    if os.path.exists(to) and (not os.path.isdir(to) or os.listdir(to)):
        raise ValueError(f"{to} exists already: name a new folder with --to")
    model, source = load_checkpoint(where, encoder, llm), find_checkpoint(where)
    fresh = Path(f"{Path(to)}.{os.getpid()}.tmp")
    try:
        write_folder(lora.cast(model, model.llm.dtype), fresh)
        if (source / "train_config.json").is_file():  # eval.py reads there what it was made for
            shutil.copy(source / "train_config.json", fresh)
        card = model_card(model, source, title or Path(to).name)
        (fresh / "README.md").write_text(card, encoding="utf-8")
        os.replace(fresh, to)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return model


def write_folder(model, folder: Path) -> None:
    config, name, ends = model.config, type(model).__name__, model.ends
    config.architectures = [name]
    config.auto_map = {"AutoConfig": "model.BorealisConfig", "AutoModel": f"model.{name}"}
    model.save_pretrained(folder, max_shard_size="5GB")
    model.tokenizer.save_pretrained(folder)
    code.feature_extractor(
        feature_size=config.encoder_config.num_mel_bins,
        chunk_length=config.window_samples // SAMPLE_RATE).save_pretrained(folder)
    # By hand: transformers writes no temperature beside do_sample=False, vLLM samples without one.
    greedy = dict(do_sample=False, temperature=0.0, eos_token_id=ends, pad_token_id=ends[-1])
    (folder / "generation_config.json").write_text(json.dumps(greedy, indent=2))
    shutil.copy(code.__file__, folder)


def model_card(model, source: Path, title: str) -> str:
    """model_card.md filled in: sizes, results.json of eval.py, train_config.json."""
    def table(rows, header):
        return tabulate(rows, header, "pipe", disable_numparse=True)

    scores = "Not evaluated yet."
    files = [p / "results.json" for p in (source.parent, source) if (p / "results.json").is_file()]
    results = json.loads(files[-1].read_text()) if files else {"task": None}
    if results.get("task", "asr") == "asr":
        runs = {results["run"]: results} | results.get("others", {})
        rows = [[run, *(split["wer"] for split in r["splits"].values()), r["avg_wer"]]
                for run, r in runs.items()]
        scores = (f"{table(rows, ['WER %', *results['splits'], 'average'])}\n\nNormaliser: "
                  f"{results['normalizer']}; 95 % intervals and more in the run's results.json.")
    settings = [(key, os.path.basename(value) if os.path.isabs(str(value)) else value)
                for key, value in training_config(source).items()
                if key not in PRIVATE and value not in (None, "", False)]
    template = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    return template.format(
        title=title, model=model, config=model.config, parameters=code.count(model), scores=scores,
        seconds=model.config.window_samples / SAMPLE_RATE, transformers=transformers.__version__,
        training=table(settings, ["setting", "value"]) if settings else "Not recorded.")


def push(folder: str | Path, name: str):
    """Upload a folder as user/name -> its address. Raises ValueError."""
    from huggingface_hub import HfApi
    try:
        HfApi().create_repo(name, exist_ok=True)
        return HfApi().upload_folder(repo_id=name, folder_path=folder)
    except Exception as e:  # it fails in many ways, and none of them is ours
        raise ValueError(f"{folder} is written, but not pushed to {name} ({type(e).__name__}): go "
                         "online, set HF_TOKEN to a token that may write there, and run "
                         f"hf upload {name} {folder}") from None


def main() -> None:
    parser = ArgumentParser(prog="python -m support.export", description="Write a model folder.")
    parser.add_argument("--ckpt", default="out", help="a run's folder, or a step of it")
    parser.add_argument("--to", required=True, help="new folder")
    parser.add_argument("--push", metavar="USER/NAME", help="also upload it to the hub")
    parser.add_argument("--encoder", default=ENCODER, help="for a checkpoint of the original")
    parser.add_argument("--llm", default=LLM, help="likewise")
    args = parser.parse_args()
    disable_progress_bar()
    try:
        model = export(args.ckpt, args.to, args.encoder, args.llm, args.push)
        print(f"{args.to} holds {code.count(model):,} parameters in {model.dtype}, LoRA merged")
        if args.push:
            print(f"pushed: {push(args.to, args.push)}")
    except (ValueError, OSError) as e:
        raise UserError(first_line(e)) from None


if __name__ == "__main__":
    run(main)
