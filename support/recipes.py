"""support/recipes.py -- recipes.toml as objects; datasets, of the hub or in any form on disk."""
import sys
import tomllib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from support.cli import UserError, first_line, replace_file
from support.rows import cached

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
            chat = row[self.conversation]
            if isinstance(chat, dict):  # datasets may turn a list of dicts inside out
                chat = [dict(zip(chat, t, strict=True)) for t in zip(*chat.values(), strict=True)]
            return {"conversation": chat}
        audio, *texts = (row[column] for column in self.columns)
        if isinstance(audio, dict):
            audio = audio.get("bytes") or audio.get("path")
        keys = ["question", "answer"] if self.question else ["text"]
        return {"audio": audio} | dict(zip(keys, texts, strict=True))

POOLS = {name: [Source(**e) for e in entries] for name, entries in TABLES["pools"].items()}
MIXES = TABLES["mixes"]  # {mix: {pool: how often its turn comes}}
SPLITS = TABLES["evaluation"].pop("splits")
BENCHMARK = {split: Source(**TABLES["evaluation"], split=split) for split in SPLITS}
BIG_BENCH_AUDIO = Source(**TABLES["big_bench_audio"])
PUBLISHED = TABLES["published"]
TINY, TWIN = TABLES["tiny"], TABLES["tiny"] | TABLES["twin"]  # what tiny presets share
PRESETS = TABLES["presets"] | {name: TINY | more for name, more in TABLES["tiny_presets"].items()}
PRESETS |= {name: TWIN | more for name, more in TABLES["twin_presets"].items()}

# ---- Reading a dataset. Who reads none need not wait 0.4 s for the import of `datasets`.
def find_copy(source: Source, data_dir: str | Path) -> Path:
    """Where a dataset lies: data_dir may also be its owner's folder, or itself. Or UserError."""
    root, name = Path(data_dir), Path(source.hub).name
    places = [root / source.hub, root / name, *[root] * (root.name == name)]
    for place in filter(Path.exists, places):
        config = place / source.config
        return config if config.is_dir() else place
    raise UserError(f"--data_dir {data_dir} has no {source.hub}: put its files into {places[0]}")

def read_copy(source: Source, place: Path):  # in any of its layouts -> datasets table
    from datasets import load_dataset
    for folder in (place / source.split, place / "data", place):
        for path in sorted(folder.glob("metadata.*")):
            kind = path.suffix[1:].replace("jsonl", "json")
            table = load_dataset(kind, data_files=str(path), split="train")
            return table.map(lambda r, at=folder: {source.audio: str(at / r["file_name"])})
    if place.is_file():
        return load_dataset("parquet", data_files=str(place), split="train")
    return load_dataset(str(place), split=source.split)

def select(source: Source, table, limit: int | None):  # its columns and rows. Raises UserError
    from datasets import Audio
    only, word = source.only or ([], "")
    columns, there = [*source.columns, *only], table.column_names
    if missing := [c for c in columns if there and c not in there]:
        raise UserError(f"{source.hub} has no column {missing[0]}: it has {', '.join(there)}")
    table = table.select_columns(columns)
    features = table.features or {source.audio: Audio()}  # a stream may not know its columns
    if isinstance(features.get(source.audio), Audio):  # load_audio decodes, not torchcodec
        table = table.cast_column(source.audio, Audio(decode=False))
    if only:
        table = table.filter(lambda *row: any(word in (x or "") for x in row), input_columns=only)
    return table.take(min(x for x in (limit, source.rows, sys.maxsize) if x))

def open_source(source: Source, data_dir: str | Path | None = None, limit: int | None = None):
    """-> datasets table of select's, or UserError; with a limit the hub streams its rows, once."""
    from datasets import disable_progress_bars, load_dataset
    if not sys.stderr.isatty():
        disable_progress_bars()
    place = find_copy(source, data_dir) if data_dir else None
    try:
        hub = partial(load_dataset, source.hub, source.config or None, split=source.split)
        if limit and not place:
            place = cached(f"{Path(source.hub).name}.parquet", source, limit)
            if not place.exists():
                replace_file(place, select(source, hub(streaming=True), limit).to_parquet)
        return select(source, read_copy(source, place) if place else hub(), limit)
    except UserError:
        raise
    except Exception as e:  # it fails in many ways, some of them half-way, and none of them is ours
        what = f"{source.hub}, split {source.split}, in {place if data_dir else 'the hub'}"
        raise UserError(f"cannot reach {what} ({first_line(e.__cause__ or e)[:200]}): go online "
                        "(gated sets want HF_TOKEN), or give a copy as --data_dir") from None
