"""support/transcripts.py -- recordings -> texts and subtitles, by our model without vLLM:
    python -m support.transcripts --ckpt out/ --transcribe a.m4a dir/ --format srt --out_dir texts/
The same flags of serve_vllm.py do it in vLLM. What a window is too short for is cut at pauses."""
import json
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
import soundfile
from tqdm import tqdm
from data import TRANSCRIBE
from model import SAMPLE_RATE
from support import checkpoint, cli, pauses, processing, rows, tasks
from support.cli import UserError, check_out, first_line, write_text

FILES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".mp4", ".webm")

# ---- Files
def find_recordings(places: list[str]) -> list[tuple[Path, Path]]:
    """Files, in folders too, and what each is called in --out_dir, without an ending. UserError."""
    found = {}
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"no file or folder at {place}")
        inside = sorted(p for p in place.rglob("*") if p.suffix.lower() in FILES)
        found |= {p: p.relative_to(place) for p in inside} if place.is_dir() else {
            place: Path(place.name)}
    if not found:
        raise UserError(f"no {', '.join(FILES)} files in {' '.join(places)}")
    stems = Counter(name.with_suffix("") for name in found.values())  # beside a.wav: a.mp3.srt
    return [(p, name if stems[name.with_suffix("")] > 1 else name.with_suffix(""))
            for p, name in found.items()]

def plan(cfg) -> list[tuple[Path, dict]]:
    """[(recording, {format: its file in --out_dir})] of --transcribe, or UserError."""
    if cfg.format and not cfg.out_dir:
        raise UserError("--format is of files: name a folder for them with --out_dir")
    formats = (cfg.format or "txt").split(",") if cfg.out_dir else []
    if unknown := set(formats) - set(pauses.FORMATS):
        raise UserError(f"--format {unknown.pop()}: choose from {','.join(pauses.FORMATS)}")
    found = find_recordings(cfg.transcribe)
    if cfg.out_dir:
        check_out(cfg.out_dir)
    return [(file, {kind: Path(cfg.out_dir, f"{name}.{kind}") for kind in formats})
            for file, name in found]

def is_done(file: Path, paths: dict) -> bool:  # are all there, and newer than the recording?
    since = file.stat().st_mtime
    return bool(paths) and all(p.exists() and p.stat().st_mtime >= since for p in paths.values())

def deliver(row: dict, paths: dict, segments: list, duration: float) -> None:
    """Print the row as JSON, or write the files."""
    if not paths:
        return print(json.dumps(row, ensure_ascii=False), flush=True)
    if problem := row.get("error") or row["cut"] and "cut off: try more --max_new_tokens":
        tqdm.write(f"{row['audio']}: {problem}", sys.stderr)
    for kind, path in paths.items() if "text" in row else ():
        write_text(path, pauses.FORMATS[kind](segments, duration))

def length(file: Path) -> float:  # in seconds, as far as its header tells
    with suppress(RuntimeError, OSError):
        return min(soundfile.info(str(file)).duration, rows.MAX_SECONDS)
    return 0.0

def transcribe(answer, window: int, batch_size: int, cfg, planned: list) -> None:
    """The texts of what plan() found, in pieces of <= `window` samples, so many at once, by a
    system as eval.py's. Raises UserError if none is usable."""
    failed = []
    todo = [(file, paths) for file, paths in planned if not is_done(file, paths)]
    if len(todo) < len(planned):
        print(f"{len(planned) - len(todo)} of {len(planned)} are done already", file=sys.stderr)
    def pieces():  # of one recording after the other, and whether it is the last
        for file, paths in todo:
            try:
                most = cfg.max_audio_seconds or rows.MAX_SECONDS
                wave = rows.load_audio(str(file), silence=True, max_seconds=most)
            except (ValueError, OSError) as e:
                failed.append((dict(audio=str(file), error=first_line(e)), paths))
                continue
            *cut, last = pauses.cut_at_pauses(wave, window)
            yield from ((TRANSCRIBE, [piece], None) for piece in cut)
            yield TRANSCRIBE, [last], (str(file), paths)
    segments, at, any_cut = [], 0.0, False
    with tqdm(total=sum(length(file) for file, _ in todo), unit=" s", unit_scale=True) as bar:
        for (_, [piece], end), (text, _, cut) in pauses.in_batches(answer, pieces(), batch_size):
            segments.append(processing.word_times(piece, pauses.without_thoughts(text), at))
            seconds, any_cut = len(piece) / SAMPLE_RATE, any_cut or cut
            bar.total, at = max(bar.total, bar.n + seconds), at + seconds
            bar.update(seconds)
            if end:
                segments = [words for words in segments if words]
                text = " ".join(pauses.spoken(segments))
                deliver(dict(audio=end[0], text=text, cut=any_cut), end[1], segments, at)
                segments, at, any_cut = [], 0.0, False
    for row, paths in failed:
        deliver(row, paths, [], 0)
    if len(failed) == len(planned):
        raise UserError(f"no recording is usable: {failed[0][0]['error']}: {failed[0][0]['audio']}")

def main() -> None:
    parser = cli.ArgumentParser(prog="python -m support.transcripts")
    cfg = parser.add_tables("model", "transcribe", "native").parse_args()
    if not cfg.transcribe:
        raise UserError("name recordings, or folders of them: --transcribe a.mp3 folder/")
    planned = plan(cfg)  # wrong flags show before the model is loaded
    model = checkpoint.load_model(cfg.ckpt, cli.pick_device(cfg.device), cfg.encoder, cfg.llm)
    answer = tasks.native(model, cfg.max_new_tokens)
    transcribe(answer, model.config.window_samples, cfg.batch_size, cfg, planned)

cli.run(main, __name__)
