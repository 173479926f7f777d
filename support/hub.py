"""
support/hub.py -- rows of the post's datasets, from the Hugging Face hub or from a copy on disk.

A copy (--data_dir) holds owner/name with what the hub has there (parquet files), or what
datasets' save_to_disk wrote, or audio files beside a metadata.csv or .jsonl.
"""
import sys
from pathlib import Path

from support.cli import UserError, first_line
from support.recipes import Source


def unreadable(source: Source, place: Path | None, e: Exception) -> UserError:
    e = e.__cause__ or e  # datasets says only that something failed
    reason = f"{type(e).__name__}: {first_line(e)}"[:200]
    if place:
        return UserError(f"cannot read {source.hub}, split {source.split}, from {place}: {reason}")
    return UserError(
        f"cannot reach {source.hub}, split {source.split}, on the hub ({reason}). Two ways out: go "
        "online (gated sets want HF_TOKEN), or copy the dataset and name the folder with "
        "--data_dir")


def find_copy(source: Source, data_dir: str | Path) -> Path:
    """Where a dataset lies in data_dir, which may be its owner's folder, too, or the dataset
    itself. Raises UserError."""
    root, (owner, name) = Path(data_dir), source.hub.split("/")
    places = [root / owner / name, root / name, root / f"{owner}__{name}",
              root / owner / f"{name}.parquet", root / f"{name}.parquet"]
    shards = [*root.glob(f"{source.split}-*.parquet"), *root.glob(f"data/{source.split}-*.parquet")]
    if root.name == name or (shards and source.split != "train"):
        places.append(root)
    place = next((p for p in places if p.exists()), None)
    if place is None:
        raise UserError(f"--data_dir {data_dir} has no {source.hub}: put the dataset's files into "
                        f"{root / owner / name}")
    config = place / (source.config or "")
    return config if config.is_dir() else place


def read_copy(source: Source, place: Path):
    """A dataset on disk, in any of its layouts -> datasets table."""
    from datasets import load_dataset, load_from_disk

    def read(kind, path):
        return load_dataset(kind, data_files={source.split: str(path)}, split=source.split)

    if place.is_file():
        return read("parquet", place)
    for folder in (place / source.split, place / "data", place):
        for path in sorted(folder.glob("metadata.*")):
            kind = {".csv": "csv", ".jsonl": "json", ".parquet": "parquet"}[path.suffix]
            return read(kind, path).map(lambda name, folder=folder: {
                source.audio: str(folder / name)}, input_columns="file_name")
    if (place / "dataset_dict.json").exists() or (place / "state.json").exists():
        table = load_from_disk(place)
        return table[source.split] if isinstance(table, dict) else table
    return load_dataset(str(place), split=source.split)


def load_table(source: Source, data_dir: str | Path | None = None, streaming: bool = False):
    """The rows of a Source as a datasets table, audio undecoded. Raises UserError."""
    from datasets import Audio, disable_progress_bars, load_dataset
    if not sys.stderr.isatty():
        disable_progress_bars()
    place = find_copy(source, data_dir) if data_dir else None
    try:
        table = read_copy(source, place) if place else load_dataset(
            source.hub, source.config, split=source.split, streaming=streaming)
    except Exception as e:  # it fails in many ways, and none of them is ours
        raise unreadable(source, place, e) from None
    columns, there = [*source.columns, *(source.only[0] if source.only else [])], table.column_names
    if missing := [c for c in columns if there and c not in there]:
        raise UserError(f"{source.hub}, split {source.split}, has no column {missing[0]}: it has "
                        f"{', '.join(there)}")
    table = table.select_columns(columns)
    # Decoding is load_audio's: datasets would call torchcodec. A stream may not know its columns.
    features = table.features or {source.audio: Audio()}
    if isinstance(features.get(source.audio), Audio):
        table = table.cast_column(source.audio, Audio(decode=False))
    return table


def open_source(source: Source, data_dir: str | Path | None = None, limit: int | None = None):
    """The rows of a Source that count, as load_table gives them. With a limit, the hub streams
    that many instead of sending everything. Raises UserError."""
    from datasets import Dataset
    table = load_table(source, data_dir, streaming=bool(limit))
    limit = min(x for x in (limit, source.rows, sys.maxsize) if x)
    if source.only:
        columns, word = source.only
        table = table.filter(lambda *values: any(word in (v or "") for v in values),
                             input_columns=list(columns))
    if hasattr(table, "__len__"):
        return table.select(range(min(limit, len(table))))
    try:
        return Dataset.from_list(list(table.take(limit)))
    except Exception as e:  # the network may fail half-way
        raise unreadable(source, None, e) from None
