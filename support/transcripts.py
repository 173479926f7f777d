"""support/transcripts.py -- what serve_vllm.py --transcribe does, without vLLM."""
import json
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from tqdm import tqdm
from data import TRANSCRIBE
from support import checkpoint, cli, context, pauses, rows, tasks

def find_recordings(places: list[str]) -> list[tuple[Path, Path]]:
    """Files, in folders too, and what each is called in --out_dir, without an ending. UserError."""
    found = {}
    for place in map(Path, places):
        cli.refuse(not place.exists(), f"no file or folder at {place}")
        files, folder = rows.find_audio(place), place if place.is_dir() else place.parent
        found |= {file: file.relative_to(folder) for file in files}
    cli.refuse(not found, f"no {', '.join(rows.FILES)} files in {' '.join(places)}")
    stems = Counter(name.with_suffix("") for name in found.values())  # beside a.wav: a.mp3.srt
    return [(p, n if stems[n.with_suffix("")] > 1 else n.with_suffix("")) for p, n in found.items()]

def plan(cfg) -> list[tuple[Path, dict]]:
    """[(recording, {format: its file in --out_dir})] of --transcribe, or UserError."""
    cli.refuse(cfg.format and not cfg.out_dir, "--format is of files: name a folder with --out_dir")
    formats = (cfg.format or "txt").split(",") if cfg.out_dir else []
    if unknown := set(formats) - set(pauses.FORMATS):
        raise cli.UserError(f"--format {unknown.pop()}: choose from {','.join(pauses.FORMATS)}")
    if cfg.out_dir:
        cli.check_out(cfg.out_dir)
    with cli.as_user_error("--context: ", ValueError):
        cfg.context = context.parse(cfg.context)
    return [(file, {kind: Path(cfg.out_dir, f"{name}.{kind}") for kind in formats})
            for file, name in find_recordings(cfg.transcribe)]

def is_done(file: Path, paths: dict) -> bool:  # are all there, and newer than the recording?
    since = file.stat().st_mtime
    return bool(paths) and all(p.exists() and p.stat().st_mtime >= since for p in paths.values())

def deliver(row: dict, paths: dict, segments=(), seconds: float = 0.0) -> None:
    """Print the row as JSON, or write the files."""
    if not paths:
        return print(json.dumps(row, ensure_ascii=False), flush=True)
    if problem := row.get("error") or row["cut"] and "cut off: see --max_new_tokens, --loop_guard":
        tqdm.write(f"{row['audio']}: {problem}", sys.stderr)
    for kind, path in paths.items() if "text" in row else ():
        cli.write_text(path, pauses.FORMATS[kind](segments, seconds))

def transcribe(answer, window: int, batch_size: int, cfg, planned: list) -> None:
    """What plan() found, in pieces of <= `window` samples, by a system as eval.py's. UserError."""
    todo, errors = [job for job in planned if not is_done(*job)], []
    asked, most = context.tell(TRANSCRIBE, cfg.context), cfg.max_audio_seconds or rows.MAX_SECONDS
    def pieces():  # of one recording after the other
        for file, paths in todo:
            try:
                wave = rows.load_audio(str(file), silence=True, max_seconds=most)
            except (ValueError, OSError) as e:
                errors.append(f"{cli.first_line(e)}: {file}")
                deliver(dict(audio=str(file), error=cli.first_line(e)), paths)
                bar.update()
                continue
            cut = pauses.cut_at_pauses(wave, window)
            bar.total += len(cut) - 1  # a recording counted as one so far
            for piece in cut:
                yield asked, [piece], (str(file), paths)
                bar.update()
    with tqdm(total=len(planned), initial=len(planned) - len(todo), unit=" windows") as bar:
        answers = pauses.in_batches(answer, pieces(), batch_size)
        for (name, paths), heard in groupby(answers, key=lambda pair: pair[0][2]):
            jobs, said = zip(*heard, strict=True)
            texts, _, cuts = zip(*said, strict=True)
            segments, seconds = pauses.timed([piece for _, (piece,), _ in jobs], texts)
            text = " ".join(pauses.spoken(segments))
            deliver(dict(audio=name, text=text, cut=any(cuts)), paths, segments, seconds)
    cli.refuse(len(errors) == len(planned), f"no recording is usable: {errors[:1]}")

def main() -> None:
    cfg = cli.ArgumentParser().add_tables("model", "transcribe", "native").parse_args()
    cli.refuse(not cfg.transcribe, "name recordings, or folders: --transcribe a.mp3 folder/")
    planned = plan(cfg)  # wrong flags show before the model is loaded
    model = checkpoint.load_model(cfg.ckpt, cli.pick_device(cfg.device), cfg.encoder, cfg.llm)
    answer = tasks.native(model, cfg.max_new_tokens, cfg.loop_guard)
    transcribe(answer, model.config.window_samples, cfg.batch_size, cfg, planned)

cli.run(main, __name__)
