"""support/recipes.py -- recipes.toml as objects; datasets, of the hub or copies of them."""
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from support.cli import UserError, cached, first_line, refuse, replace_file

TEXT = Path(__file__).with_name("recipes.toml").read_text(encoding="utf-8")
TABLES = tomllib.loads(TEXT)

class Source(SimpleNamespace):
    """A split of a dataset on the hub, and which of its columns holds what: see recipes.toml."""
    __hash__ = object.__hash__  # a key of functools.cache
    def __init__(self, **given):
        answer = {"answer": "answer"} if "question" in given else {}
        super().__init__(**TABLES["source"] | answer | given)
    @property
    def columns(self) -> list[str]:
        asked = [self.question] if self.question else []
        return [self.conversation] if self.conversation else [self.audio, *asked, self.answer]
    def manifest_row(self, row: dict) -> dict:  # -> in the format of a manifest, see data.py
        if self.conversation:
            return {"conversation": row[self.conversation]}
        audio = row[self.audio]["bytes"] or row[self.audio]["path"]
        if self.question:
            return dict(audio=audio, question=row[self.question], answer=row[self.answer])
        return dict(audio=audio, text=row[self.answer])

POOLS = {name: [Source(**e) for e in entries] for name, entries in TABLES["pools"].items()}
MIXES = TABLES["mixes"]  # {mix: {pool: how often its turn comes}}
SPLITS = TABLES["evaluation"].pop("splits")
BENCHMARK = {split: Source(**TABLES["evaluation"], split=split) for split in SPLITS}
BIG_BENCH_AUDIO = Source(**TABLES["big_bench_audio"])
PUBLISHED = TABLES["published"]
TINY, TWIN = TABLES["tiny"], TABLES["tiny"] | TABLES["twin"]  # what tiny presets share
PRESETS = TABLES["presets"] | {name: TINY | more for name, more in TABLES["tiny_presets"].items()}
PRESETS |= {name: TWIN | more for name, more in TABLES["twin_presets"].items()}
PRESETS = {name: TABLES["all_presets"] | more for name, more in PRESETS.items()}

# ---- Reading a dataset. Who reads none need not wait 0.4 s for the import of `datasets`.
def read_copy(source: Source, data_dir: str | Path):  # -> datasets table
    from datasets import load_dataset, load_from_disk
    root, name = Path(data_dir), Path(source.hub).name  # its owner's folder, or itself, will do
    places = [root / source.hub, root / name] + [root] * (root.name == name)
    place = next(filter(Path.is_dir, places), None)
    refuse(not place, f"no folder {places[0]}", FileNotFoundError)
    place = place / source.config if (place / source.config).is_dir() else place
    for folder in (place / source.split, place / "data", place):
        for path in folder.glob("metadata.*"):  # beside audio files, as in BigBenchAudio
            kind = path.suffix[1:].replace("jsonl", "json")
            table = load_dataset(kind, data_files=str(path), split="train")
            return table.map(lambda row, at=folder: {source.audio: str(at / row["file_name"])})
    if (place / "dataset_dict.json").exists():
        return load_from_disk(place)[source.split]
    return load_dataset(str(place), split=source.split)

def select(source: Source, table, limit: int | None):  # its columns and rows
    from datasets import Audio
    only, word = source.only or ([], "")
    columns, there = [*source.columns, *only], table.column_names
    if missing := [c for c in columns if there and c not in there]:
        raise ValueError(f"no column {missing[0]}: it has {', '.join(there)}")
    table = table.select_columns(columns)
    if source.audio in columns:  # load_audio decodes, not torchcodec
        table = table.cast_column(source.audio, Audio(decode=False))
    if only:
        table = table.filter(lambda *row: any(word in (x or "") for x in row), input_columns=only)
    return table.take(min(x for x in (limit, source.rows, sys.maxsize) if x))

def open_source(source: Source, data_dir: str | Path | None = None, limit: int | None = None):
    """-> datasets table of select's, or UserError; with a limit the hub streams its rows, once."""
    from datasets import Dataset, disable_progress_bars, load_dataset
    if not sys.stderr.isatty():
        disable_progress_bars()
    hub = source.hub, source.config or None
    try:
        if data_dir:
            table = read_copy(source, data_dir)
        elif limit:
            kept = cached(f"{Path(source.hub).name}.parquet", source, limit)
            if not kept.exists():
                table = load_dataset(*hub, split=source.split, streaming=True)
                replace_file(kept, select(source, table, limit).to_parquet)
            table = Dataset.from_parquet(str(kept))
        else:
            table = load_dataset(*hub, split=source.split)
        return select(source, table, limit)
    except Exception as e:  # it fails in many ways, some of them half-way, and none of them is ours
        what = f"{source.hub}, split {source.split}, in {data_dir or 'the hub'}"
        raise UserError(f"cannot read {what} ({first_line(e.__cause__ or e)[:200]}): go online "
                        "(gated sets want HF_TOKEN), or give a copy as --data_dir") from None
