"""
eval.py -- measure a checkpoint: transcribe held-out speech greedily and compare with what was said.

    python eval.py --ckpt out/                        # what it was made for: the held-out voices, for the tiny preset
    python eval.py --ckpt out/ --manifest my.jsonl    # your own recordings (data.py describes the format)
    python eval.py --ckpt out/ --audio a.wav          # one recording, no score
    python eval.py --ckpt out/ --audio a.wav --prompt "О чём говорится в этом аудио?"
    python eval.py --compare out_a/ out_b/ --out out  # the results of several runs as one table and one heat map

Writes into the checkpoint's folder, or --out: results.json, hypotheses.jsonl (raw and normalised texts) and wer.png.
"""
import json
import sys
import time
import unicodedata
from dataclasses import replace
from pathlib import Path

import jiwer
import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from augment import HARD, augment, open_banks
from data import BENCHMARK, EVAL_SPLITS, EVAL_UTTERANCES, ArgumentParser, BadRow, BadRows, Rows, Sample, UserError, check_out, \
    embedded, load_audio, pick_device, read_manifest, replace_file, run
from model import ASR_PROMPT, ENCODER, LLM, SAMPLE_RATE, find_checkpoint, load_checkpoint, place_audio

# -----------------------------------------------------------------------------
# The one text normaliser

STRESS = "\u0301"  # the accent of за́мок, a reading aid


def normalise(text):
    """What WER compares: NFC, lower case, ё -> е, hyphens and dashes -> space, other punctuation and symbols out.

    й stays й, decomposed or not (NFC joins it before anything is removed). Hyphens become spaces, so кто-то and
    "кто то" score alike, as two words; the post's normaliser glued them into one. Digits stay digits."""
    text = unicodedata.normalize("NFC", text).lower().replace("ё", "е").replace(STRESS, "")
    kept = []
    for c in text:
        kind = unicodedata.category(c)
        kept.append(" " if kind == "Pd" else "" if kind[0] in "PS" else c)
    return " ".join("".join(kept).split())


def score(references, hypotheses):
    """Normalised texts -> corpus WER and CER in percent (all edits over all reference words or characters), with
    substitutions, deletions, insertions and reference words. By jiwer."""
    words, chars = jiwer.process_words(references, hypotheses), jiwer.process_characters(references, hypotheses)
    total = words.hits + words.substitutions + words.deletions
    edits = words.substitutions + words.deletions + words.insertions
    return dict(wer=round(100 * edits / max(1, total), 2),
                cer=round(100 * (chars.substitutions + chars.deletions + chars.insertions)
                          / max(1, chars.hits + chars.substitutions + chars.deletions), 2),
                **{"sub": words.substitutions, "del": words.deletions, "ins": words.insertions, "words": total})


# -----------------------------------------------------------------------------
# Model and data

def load_model(folder, device, encoder=ENCODER, llm=LLM):
    """Any checkpoint, ready to answer; a UserError says what is missing or does not fit."""
    try:
        return load_checkpoint(folder, encoder, llm, torch.bfloat16 if device.type == "cuda" else torch.float32).to(device)
    except (OSError, ValueError, AttributeError, TypeError, RuntimeError, SafetensorError) as e:
        raise UserError(f"cannot load {folder}: {str(e).strip().splitlines()[0]}") from None


def training_config(where):
    path = find_checkpoint(where) / "train_config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def embedded_splits(lang, seed, n=EVAL_UTTERANCES):
    """The post's ladder of difficulty, made here -> {split: n samples}. Voices and sentences were never trained on; webinars
    and devices are the clean split again, with noises and rooms never trained on."""
    splits = {name: embedded(lang, name, n, seed) for name in EVAL_SPLITS}
    banks = open_banks(voices="clean")
    for k, (name, config) in enumerate(HARD.items()):
        splits[name] = []
        for i, s in enumerate(splits["clean"]):
            x = augment(load_audio(s.audio[0]).numpy(), config, np.random.default_rng([seed % 2 ** 32, k, i]), *banks)
            splits[name].append(replace(s, audio=[(x * 32767).round().astype(np.int16)], name=f"{s.name}/{name}"))
    return splits


def benchmark(source, args):
    """The samples of one split of the post's benchmark, from the hub or --data_dir."""
    rows, bad, samples = Rows(source, args.data_dir, args.limit), BadRows(args.strict), []
    for i in range(len(rows)):
        try:
            samples.append(rows[i])
        except BadRow as e:
            bad.add(str(e), e.where)
    bad.report(len(rows), source.split)
    return samples


def load_splits(args):
    """-> {split: samples}: the manifest that was given, or the embedded held-out sets of the training languages, or the post's
    six benchmarks."""
    if args.manifest:
        bad = BadRows(args.strict)
        samples, total = read_manifest(args.manifest, bad)
        bad.report(total, args.manifest)
        return {Path(args.manifest).stem: samples}
    trained_on = training_config(args.ckpt)
    if trained_on.get("train_manifest"):
        raise UserError(f"{args.ckpt} was trained on a manifest: name your recordings with --manifest FILE")
    if not trained_on.get("embedded"):
        return {name: benchmark(source, args) for name, source in BENCHMARK.items()}
    first, *others = (args.lang or trained_on["lang"]).split(",")
    n = min(args.limit or EVAL_UTTERANCES, EVAL_UTTERANCES)  # what is cut off anyway need not be made
    return embedded_splits(first, trained_on["seed"], n) | {
        f"{name}_{lang}": samples for lang in others
        for name, samples in embedded_splits(lang, trained_on["seed"], n).items()}


# -----------------------------------------------------------------------------
# Decoding

def transcribe(model, samples, batch_size, max_new_tokens, name):
    """Samples -> (hypotheses, {index: reason} of those that failed, seconds of audio, seconds it took).

    An utterance that cannot be decoded, or whose generation raises, counts as an empty hypothesis: it stays in the
    score, and it is named. A batch that raises is tried again one by one, so that one bad row harms no other."""
    waves, failed, began = {}, {}, time.perf_counter()
    for i, sample in enumerate(samples):
        try:
            waves[i] = [load_audio(a) for a in sample.audio]
        except BadRow as e:
            failed[i] = str(e)
    length = {i: sum(map(len, w)) for i, w in waves.items()}
    hypotheses, queue = [""] * len(samples), sorted(waves, key=lambda i: -length[i])  # longest first: memory shows early

    def answer(batch):
        ids = model.chat([samples[i].messages(with_answer=False) for i in batch], [waves[i] for i in batch],
                         max_new_tokens=max_new_tokens)
        for i, text in zip(batch, model.decode(ids)):
            hypotheses[i] = text

    with tqdm(total=len(queue), desc=name, unit=" utterances", mininterval=0.1 if sys.stderr.isatty() else 10) as bar:
        for start in range(0, len(queue), batch_size):
            batch = queue[start:start + batch_size]
            try:
                answer(batch)
            except Exception:
                for i in batch:
                    try:
                        answer([i])
                    except Exception as e:
                        failed[i] = f"{type(e).__name__}: {e}".splitlines()[0]
            bar.update(len(batch))
    return hypotheses, failed, sum(length.values()) / SAMPLE_RATE, time.perf_counter() - began


def answer_one(model, path, prompt, max_new_tokens):
    """The answer to a prompt about one file."""
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt is empty: ask something, or leave it out to transcribe")
    try:
        wave = load_audio(path)
        question = place_audio(prompt or ASR_PROMPT, 1)
    except BadRow as e:
        raise UserError(f"{path}: {e}; give a wav, flac, ogg or mp3 file with sound in it") from None
    except ValueError as e:
        raise UserError(str(e)) from None
    windows = -(-len(wave) // model.config.window_samples)
    print(f"{path}: {len(wave) / SAMPLE_RATE:.2f} s, {windows} window(s), "
          f"{windows * model.config.tokens_per_window} audio tokens", file=sys.stderr)
    messages = Sample("", [path], question).messages(with_answer=False)
    print(model.decode(model.chat([messages], [[wave]], max_new_tokens=max_new_tokens)[0]))


# -----------------------------------------------------------------------------
# Report

def table(run_name, splits, average):
    """The results as a markdown table; with several splits, their WER once more in the shape of the post's table."""
    lines = ["| split | WER % | CER % | sub | del | ins | words | samples | failed | x real time |",
             "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    lines += [f"| {name} | {r['wer']:.2f} | {r['cer']:.2f} | {r['sub']} | {r['del']} | {r['ins']} | {r['words']} | "
              f"{r['samples']} | {r['failed']} | {r['rtfx']:.1f} |" for name, r in splits.items()]
    if len(splits) > 1:
        wers = " | ".join(f"{x:.2f}" for x in [*(r["wer"] for r in splits.values()), average])
        lines += ["", f"| WER % | {' | '.join(splits)} | average |", "|---" + "|--:" * (len(splits) + 1) + "|",
                  f"| {run_name} | {wers} |"]
    return "\n".join(lines)


def transcripts(rows, n=6):
    """A few lines to read: the first utterances, and the first wrong ones."""
    wrong = [r for r in rows if r["reference_normalised"] != r["hypothesis_normalised"]]
    shown = [r for r in rows if r not in wrong][:n - min(n // 2, len(wrong))] + wrong[:n // 2]
    return "\n".join(f"  {'✗' if r in wrong else '✓'} {r['id']}\n      said   {r['reference']}\n"
                     f"      heard  {r['hypothesis'] or '(nothing)'}" for r in shown)


def plot_wer(run_name, splits, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(max(3.5, 1.5 * len(splits)), 4), layout="constrained")
    bars = axis.bar(list(splits), [r["wer"] for r in splits.values()], width=0.5, color="#1f4e9c")
    axis.bar_label(bars, [f"{r['wer']:.2f}" for r in splits.values()], padding=3)
    axis.set(ylabel="word error rate, %", title=run_name, xlim=(-0.6, len(splits) - 0.4))
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    replace_file(path, lambda tmp: figure.savefig(tmp, dpi=120, format="png"))
    plt.close(figure)


def compare(folders, out):
    """Several runs' results.json as the post's table, best first, and as a heat map: table.md and heatmap.png in `out`."""
    runs = {}
    for folder in folders:
        try:
            result = json.loads((Path(folder) / "results.json").read_text())
            runs[Path(folder).resolve().name.removeprefix("out_")] = (
                result.get("step"), {name: r["wer"] for name, r in result["splits"].items()}, result["avg_wer"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"no results.json of eval.py in {folder}: run python eval.py --ckpt {folder}") from None
    runs = dict(sorted(runs.items(), key=lambda item: item[1][2]))
    columns = list(next(iter(runs.values()))[1])
    if other := [name for name, (_, wers, _) in runs.items() if list(wers) != columns]:
        raise UserError(f"{other[0]} was evaluated on other splits: only results on the same ones compare")
    lines = [f"| Run | Steps | {' | '.join(columns)} | Avg |", "|---" + "|--:" * (len(columns) + 2) + "|"]
    lines += [f"| {name} | {step or ''} | {' | '.join(f'{w:.2f}' for w in wers.values())} | {average:.2f} |"
              for name, (step, wers, average) in runs.items()]
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "table.md", lambda tmp: Path(tmp).write_text("\n".join(lines) + "\n"))
    plot_heatmap(list(runs), columns, [list(wers.values()) for _, wers, _ in runs.values()], out / "heatmap.png")
    print("\n".join(lines) + f"\n\nWER, %. Wrote table.md and heatmap.png to {out}")


def plot_heatmap(rows, columns, wers, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(1.3 * len(columns) + 2.5, 0.5 * len(rows) + 1.4), layout="constrained")
    shade = np.log(np.clip(wers, 0.5, 100))  # 1 against 2 is as much as 50 against 100, and beyond 100 all is lost
    axis.imshow(shade, cmap="RdYlGn_r", aspect="auto", vmin=np.log(0.5), vmax=np.log(100))
    for i, row in enumerate(wers):
        for j, wer in enumerate(row):
            axis.text(j, i, f"{wer:.2f}", ha="center", va="center", color="white" if wer > 35 else "black")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("word error rate, %")
    replace_file(path, lambda tmp: figure.savefig(tmp, dpi=120, format="png"))
    plt.close(figure)


def main():
    parser = ArgumentParser(prog="eval.py", allow_abbrev=False, description="Measure a checkpoint, or ask it about one file.")
    parser.add_argument("--ckpt", default="out", help="folder that train.py wrote")
    parser.add_argument("--encoder", default=ENCODER, help="what a checkpoint in the original's layout was made of")
    parser.add_argument("--llm", default=LLM, help="the same")
    parser.add_argument("--manifest", help="JSONL with recordings and references; default: what the checkpoint is for")
    parser.add_argument("--lang", choices=("ru", "en", "ru,en"), help="of the embedded splits; default: as trained")
    parser.add_argument("--data_dir", help="folder with a copy of Vikhrmodels/RuASRBenchmark, instead of the hub")
    parser.add_argument("--audio", help="answer for this file instead of measuring")
    parser.add_argument("--prompt", help="the question for --audio; default: transcribe")
    parser.add_argument("--compare", nargs="+", metavar="DIR", help="evaluated runs to put into one table instead")
    parser.add_argument("--out", help="where results go; default: the checkpoint's folder")
    parser.add_argument("--limit", type=int, help="at most so many utterances a split")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--strict", action="store_true", help="stop at the first unusable row of the manifest")
    args = parser.parse_args()
    for name in ("batch_size", "max_new_tokens", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.prompt is not None and not args.audio:
        raise UserError("--prompt asks about one file: name it with --audio")
    if args.audio and args.manifest:
        raise UserError("--audio answers for one file, --manifest measures many: give one of the two")
    if args.audio and not Path(args.audio).is_file():
        raise UserError(f"no file at {args.audio}")
    out = Path(args.out or (args.ckpt if Path(args.ckpt).is_dir() and not args.compare else "out"))
    check_out(out)
    if args.compare:
        return compare(args.compare, out)
    device = torch.device(pick_device(args.device))
    splits = load_splits(args) if args.manifest else {}  # a wrong row is found sooner than a model is loaded
    model = load_model(args.ckpt, device, args.encoder, args.llm)
    if args.audio:
        return answer_one(model, args.audio, args.prompt, args.max_new_tokens)
    splits = splits or load_splits(args)

    results, rows = {}, []
    for split, samples in splits.items():
        samples = samples[:args.limit]
        hypotheses, failed, seconds, took = transcribe(model, samples, args.batch_size, args.max_new_tokens, split)
        new = [dict(split=split, id=s.name, reference=s.answer, hypothesis=h, reference_normalised=normalise(s.answer),
                    hypothesis_normalised=normalise(h), failed=failed.get(i))
               for i, (s, h) in enumerate(zip(samples, hypotheses))]
        results[split] = dict(**score([r["reference_normalised"] for r in new], [r["hypothesis_normalised"] for r in new]),
                              samples=len(samples), failed=len(failed), rtfx=round(seconds / took, 1))
        rows += new
    average = round(sum(r["wer"] for r in results.values()) / len(results), 2)
    trained_as = training_config(args.ckpt)
    run_name = trained_as.get("preset", Path(args.ckpt).resolve().name)

    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "hypotheses.jsonl", lambda tmp: Path(tmp).write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)))
    replace_file(out / "results.json", lambda tmp: Path(tmp).write_text(
        json.dumps(dict(run=run_name, step=trained_as.get("step"), splits=results, avg_wer=average), indent=1)))
    plot_wer(run_name, results, out / "wer.png")
    print(f"\n{table(run_name, results, average)}\n\n{transcripts(rows)}\n\nwrote results.json, hypotheses.jsonl, wer.png to {out}")
    broken = [r for r in rows if r["failed"]]
    if broken:
        print(f"warning: {len(broken)} of {len(rows)} utterances failed and count as empty: "
              + "; ".join(f"{r['id']}: {r['failed']}" for r in broken[:5]) + ("; ..." if len(broken) > 5 else ""),
              file=sys.stderr)
    return 1 if len(broken) == len(rows) else 0


if __name__ == "__main__":
    run(main)
