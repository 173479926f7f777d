"""
data.py -- what the model learns from: samples, manifests, a spoken corpus made on the spot, and batches.

    manifest or embedded corpus -> Sample -> token ids + labels + waveform windows -> collated batch

    python data.py                      # one sample as the model sees it; writes sample.wav
    python data.py --lang en --index 3
    python data.py --manifest a.jsonl   # the same for a row of your own data
    python data.py --mixes              # which datasets the presets of train.py draw from, and how much

A manifest has one JSON object a line:
    {"audio": "a.wav", "text": "..."}                              transcription
    {"audio": "a.wav", "question": "...", "answer": "..."}         any question about a recording
    {"conversation": [{"role": "user", "content": "..."}, ...]}    text only
Paths are relative to the manifest's folder. wav, flac, ogg and mp3 of any rate and channel count will do.
"""
import argparse
import contextlib
import ctypes
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Optional

import numpy as np
import soundfile
import torch
import torchaudio
import transformers
from tqdm import tqdm

from model import ASR_PROMPT, ASR_SYSTEM, AUDIO, HOP, SAMPLE_RATE, TAG_PAIR, add_audio_tokens, build_ids, check_wave, \
    cut_windows, log_mel, place_audio, tiny_config

transformers.utils.logging.disable_progress_bar()  # a bar for writing one file is noise

INSTRUCT_SYSTEM = "You are a helpful voice assistant. Listen to the audio and respond appropriately."
TEXT_SYSTEM = "You are a helpful assistant."
MIN_SECONDS = 0.1        # shorter recordings hold no word
RETRIES = 50             # unusable rows in a row before giving up; twenty times as many that are only too long
MAX_BAD_SHARE = 0.05     # more unusable rows than this means that the manifest is wrong, not a few files


# -----------------------------------------------------------------------------
# Errors. What a user can mend is one line and exit code 2, in every script.

class UserError(Exception):
    """Something the user can mend; the message says how."""


class BadRow(ValueError):
    """One unusable row or recording; the message is the reason it is counted under."""
    where = ""


class TooLong(BadRow):
    """A good row beyond --max_tokens or --max_windows."""


def run(main):
    """Call main(); a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130, a closed pipe 1."""
    try:
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of our output has had enough, as in "| head"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        raise  # some other pipe


class ArgumentParser(argparse.ArgumentParser):
    """A wrong flag is one line too, not a page of usage."""

    def error(self, message):
        print(f"error: {message}; see python {self.prog} --help", file=sys.stderr)
        sys.exit(2)


class BadRows:
    """Counts what cannot be used, by reason. Nothing is dropped without showing up here."""

    def __init__(self, strict=False):
        self.strict, self.reasons, self.first = strict, Counter(), {}

    def add(self, reason, where):
        if self.strict:
            raise UserError(f"{where}: {reason} (--strict stops at the first bad row)")
        self.reasons[reason] += 1
        self.first.setdefault(reason, where)

    def check(self, total, name):
        """More than 5 % of `total` rows is an error."""
        bad = sum(self.reasons.values())
        if bad > MAX_BAD_SHARE * total:
            raise UserError(f"{name}: {bad} of {total} rows are unusable, more than {MAX_BAD_SHARE:.0%}: {self}; "
                            "mend or remove them")

    def report(self, total, name):
        """Say once what was left out of `total` rows; more than 5 % is an error."""
        self.check(total, name)
        if self.reasons:
            print(f"{name}: left out {sum(self.reasons.values())} of {total} rows: {self}", file=sys.stderr)

    def __str__(self):
        return ", ".join(f"{n} {r} (first: {self.first[r]})" for r, n in self.reasons.most_common())


def pick_device(name):
    """"cpu", "cuda" or "auto" -> "cpu" or "cuda"; raises UserError."""
    if name not in ("cpu", "cuda", "auto"):
        raise UserError(f"--device {name}: choose cpu, cuda or auto")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but no GPU is visible: use --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def check_out(folder):
    """A folder to write into may be new, but nothing in its path may be a file, or closed to us. Raises UserError."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{place} is a file: results need a folder")
    if not os.access(place, os.W_OK):
        raise UserError(f"{place} is not writable: name another folder for the results")


def replace_file(path, write):
    """write(temporary name), then rename: whoever looks finds the old file or the new one, never half of one."""
    tmp = f"{path}.{os.getpid()}.tmp"  # two processes may be at it
    write(tmp)
    os.replace(tmp, path)


@contextlib.contextmanager
def picture(path, *shape, **settings):
    """with picture("a.png", rows, columns, figsize=(7, 4)) as (figure, axes): ... draws and writes it, without a screen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(*shape, layout="constrained", **settings)
    yield figure, axes
    replace_file(path, lambda tmp: figure.savefig(tmp, dpi=120, format="png"))
    plt.close(figure)


# -----------------------------------------------------------------------------
# The sample

@dataclass
class Sample:
    """A question about zero or more recordings, and its answer."""
    answer: str
    audio: list = field(default_factory=list)    # of what load_audio takes; empty for text only
    question: str = ASR_PROMPT
    system: str = ASR_SYSTEM
    history: list = field(default_factory=list)  # earlier turns of a text-only conversation
    name: str = ""                               # "file.jsonl:12" or "ru-eval/3/m7", for reports

    def messages(self, with_answer=True):
        system = [{"role": "system", "content": self.system}] if self.system else []
        user = {"role": "user", "content": place_audio(self.question, len(self.audio))}
        answer = [{"role": "assistant", "content": self.answer}] if with_answer else []
        return [*system, *self.history, user, *answer]


def load_audio(source, min_seconds=MIN_SECONDS, silence=False):
    """A path, the bytes of a file, or int16 samples at 16 kHz -> 1-D float32 tensor at 16 kHz, channels averaged, peak at
    most 1. Raises BadRow with the reason; digital silence is one, unless it is wanted."""
    if isinstance(source, np.ndarray):
        return torch.from_numpy(source.astype(np.float32) / 32768)
    if isinstance(source, str) and not os.path.isfile(source):
        raise BadRow("missing file")
    try:
        wave, rate = soundfile.read(io.BytesIO(source) if isinstance(source, bytes) else source, dtype="float32",
                                    always_2d=True)
    except (soundfile.LibsndfileError, TypeError, ValueError):
        raise BadRow("not audio") from None
    if not 1000 <= rate <= 1_000_000:
        raise BadRow(f"a sample rate of {rate} Hz")
    wave = torch.from_numpy(wave.mean(axis=1))
    if len(wave) < max(1, min_seconds * rate):
        raise BadRow(f"shorter than {min_seconds} s")
    if rate != SAMPLE_RATE:
        # The sinc kernel grows with the reduced ratio (977 MiB for 15999 -> 16000 Hz). Every usual rate is exact
        # below 1000; for the odd ones a ratio wrong by less than one in a million is not heard.
        ratio = Fraction(SAMPLE_RATE, rate).limit_denominator(1000)
        wave = resampler(ratio.denominator, ratio.numerator)(wave)
    try:
        wave = check_wave(wave)
    except ValueError as e:
        raise BadRow(str(e)) from None
    if wave.abs().max() < 1e-6 and not silence:
        raise BadRow("silent")
    return wave


@lru_cache(maxsize=16)  # computing a kernel costs more than using it
def resampler(rate, new_rate):
    return torchaudio.transforms.Resample(rate, new_rate)


# -----------------------------------------------------------------------------
# Your own data

CONTROL = re.compile(r"<\|\w+\|>")


def read_manifest(path, bad, evaluation=False):
    """JSONL -> (list of Samples, number of rows). What is wrong with the text of a row goes to `bad`; the audio is
    looked at later, by usable() for training, or while decoding for evaluation. Raises UserError. evaluation: see parse_row."""
    if not os.path.isfile(path):
        raise UserError(f"no manifest at {path}: give a JSONL file, one object a line")
    samples, total = [], 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            total += 1
            name = f"{os.path.basename(path)}:{number}"
            try:
                samples.append(replace(parse_line(line, os.path.dirname(path), evaluation), name=name))
            except BadRow as e:
                bad.add(str(e), name)
    if not total:
        raise UserError(f"{path} is empty: a manifest has one JSON object a line")
    return samples, total


def parse_line(line, folder, evaluation=False):
    """One line of a manifest -> Sample; raises BadRow."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError:
        raise BadRow("broken JSON") from None
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")
    return parse_row(row, folder, evaluation)


def parse_row(row, folder="", evaluation=False):
    """{"audio", "text"}, {"audio", "question", "answer"} or {"conversation"} -> Sample; raises BadRow. The audio is a path,
    below `folder` if relative, the bytes of a file, or a list of these. evaluation: nothing is left out that has a reference; a
    missing recording is load_audio's to refuse, and the text "" says that nobody speaks."""
    def text(value):
        if not isinstance(value, str) or not value.strip():
            raise BadRow("empty text")
        if not value.isprintable() and re.search("[\ud800-\udfff]", value):
            raise BadRow("broken text")  # half a character, which no file can hold
        if CONTROL.search(value.replace(TAG_PAIR, "").replace(AUDIO, "")):
            raise BadRow("control token in the text")
        return value.strip()

    if "conversation" in row:
        turns = row["conversation"]
        if isinstance(turns, dict):  # datasets may turn a list of dicts inside out
            turns = [dict(zip(turns, turn)) for turn in zip(*turns.values())]
        turns = turns if isinstance(turns, list) else []
        turns = [{"role": t["role"], "content": text(t.get("content"))} for t in turns
                 if isinstance(t, dict) and t.get("role") in ("system", "user", "assistant")]
        system = TEXT_SYSTEM if not turns or turns[0]["role"] != "system" else turns.pop(0)["content"]
        if [t["role"] for t in turns[-2:]] != ["user", "assistant"]:
            raise BadRow("conversation does not end with a question and its answer")
        if any(AUDIO in t["content"] or TAG_PAIR in t["content"] for t in turns):
            raise BadRow("audio placeholder in a text-only conversation")
        return Sample(turns[-1]["content"], [], turns[-2]["content"], system, turns[:-2])

    audio = row.get("audio")
    audio = audio if isinstance(audio, list) else [audio]
    if not audio or not all(isinstance(a, (str, bytes)) and a for a in audio):
        if not evaluation:
            raise BadRow("no audio field")
        audio = [b""]
    nothing = evaluation and isinstance(row.get("text"), str) and not row["text"].strip()
    sample = Sample("" if nothing else text(row.get("text", row.get("answer"))),
                    [os.path.join(folder, a) if isinstance(a, str) else a for a in audio])
    if AUDIO in sample.answer or TAG_PAIR in sample.answer:
        raise BadRow("control token in the text")
    if "text" not in row:
        sample.question, sample.system = text(row.get("question")), INSTRUCT_SYSTEM
    if "system" in row:
        sample.system = text(row["system"])
    if len(audio) > 1 and sample.question == ASR_PROMPT:
        raise BadRow("several recordings need a question")
    try:
        place_audio(sample.question, len(audio))
    except ValueError:
        raise BadRow("placeholders and recordings differ in number") from None
    return sample


def usable(samples, dataset, bad, progress=True):
    """The samples whose audio decodes and whose length is within the limits of `dataset`; the others go to `bad`."""
    def problem(sample):
        try:
            dataset.encode(sample)
        except BadRow as e:
            return str(e)

    kept = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # soundfile decodes outside the GIL
        problems = pool.map(problem, samples)
        for sample, reason in zip(samples, tqdm(problems, "checking audio", len(samples), disable=not progress)):
            if reason is None:
                kept.append(sample)
            else:
                bad.add(reason, sample.name)
    return kept


# -----------------------------------------------------------------------------
# The post's data. What a row of each dataset means, which datasets make a pool, which pools make a mix.

@dataclass(frozen=True)
class Source:
    """A split of a dataset on the hub, and which column holds what.

    Without a question column every row gets `prompt`, the one transcription prompt. (The original asks "Transcribe the
    audio." of some sets and "Что слышно на аудио?" of ToneBooks, and evaluates with none of these.)
    only: (columns, word): rows where one of these columns contains the word. rows: then so many, from the start.
    evaluation: see parse_row."""
    hub: str
    split: str = "train"
    config: Optional[str] = None
    audio: str = "audio"
    question: str = ""
    answer: str = "text"
    conversation: str = ""  # a text-only set has this column alone
    prompt: str = ASR_PROMPT
    only: tuple = ()
    rows: Optional[int] = None
    evaluation: bool = False

    @property
    def columns(self):
        return [c for c in ((self.conversation,) if self.conversation else (self.audio, self.question, self.answer)) if c]

    def sample(self, row):
        """A row of the dataset -> Sample; raises BadRow."""
        if self.conversation:
            return parse_row({"conversation": row[self.conversation]})
        audio = row[self.audio]
        if isinstance(audio, dict):
            audio = audio.get("bytes") or audio.get("path")
        row = {"audio": audio, "question": row.get(self.question), "answer": row[self.answer]}
        if not self.question:
            row = {"audio": row["audio"], "text": row["answer"]}
        sample = parse_row(row, evaluation=self.evaluation)
        return sample if self.question else replace(sample, question=self.prompt)


QA = dict(question="question", answer="answer")
POOLS = {
    "ru_audio": (   # Russian audiobooks and instructions about them
        Source("Vikhrmodels/Speech-Instructions", **QA, rows=70_000),  # said to be Russian; its prompts look English
        Source("Vikhrmodels/ToneBooks", rows=90_000),
        Source("Vikhrmodels/AudioBooksInstructGemini2.5", **QA)),
    "en_audio": tuple(  # English recordings, speech and other sounds, and what is heard on them
        Source("Vikhrmodels/Speech-Describe", f"500k_part{part}_{kind}", **QA)
        for kind in ("speech", "nonspeech") for part in (1, 2)),
    "text": (
        Source("Vikhrmodels/GrandMaster-PRO-MAX", conversation="conversation", only=(("prompt_lang", "answer_lang"), "ru"),
               rows=100_000),),
    "it_fresh": (   # plain transcription, 16 kHz
        Source("Vikhrmodels/ToneBooksPlus", rows=100_000),
        Source("Vikhrmodels/ToneSpeak", rows=100_000),
        Source("Vikhrmodels/ToneRuLS", rows=100_000),       # has about half as many
        Source("Vikhrmodels/ToneRuDevices", rows=50_000)),
    "long_audio": (  # minutes of fiction, and instructions about it. The post writes "AlexWortega/longaudio"
        Source("AlexWortega/long_audio_it_full", question="instruction", answer="response"),
        Source("Vikhrmodels/Ficbook-Audio-Instruct-10K", **QA)),
    "pretrain": (   # Russian transcription, whole
        *(Source(f"Vikhrmodels/{name}") for name in (
            "ToneBooksPlus", "ToneSpeak", "ToneRuLS", "ToneRuDevices", "ToneWebinars", "ToneRuDevicesAudiobooks",
            "ReadyFormatDF2")),
        *(Source("Vikhrmodels/ToneGolosOpus", config=c) for c in ("Crowd", "Farfield")),
        Source("Vikhrmodels/ToneSlavic", answer="sentence", only=(("locale",), "ru")),
        Source("bond005/podlodka_speech", answer="transcription")),
}
MIXES = {  # pool -> how often its turn comes; inside a pool every row is as likely as any other
    "pretrain": {"pretrain": 1},
    "ru_only": {"ru_audio": 1},
    "en_only": {"en_audio": 1},
    "mixed_large": {"ru_audio": 0.5, "en_audio": 0.5},
    "ru_text_10pct": {"ru_audio": 0.9, "text": 0.1},
    "ru_text_25pct": {"ru_audio": 0.75, "text": 0.25},
    "it_fresh": {"it_fresh": 0.78, "text": 0.22},             # 350k and 100k
    "long_audio": {"ru_audio": 0.6, "text": 0.1, "long_audio": 0.3},
}
# For evaluation: the post's six splits (of Tone_Speak there are 700 rows), and spoken riddles of four kinds, in English.
BENCHMARK = {split: Source("Vikhrmodels/RuASRBenchmark", split, rows=1000, evaluation=True) for split in (
    "Russian_LibriSpeech", "Common_Voice_Corpus_22.0", "Tone_Webinars", "Tone_Books", "Tone_Speak", "Sova_RuDevices")}
BIG_BENCH_AUDIO = Source("ArtificialAnalysis/big_bench_audio", question="category", answer="official_answer", evaluation=True)


def unreadable(source, place, e):
    e = e.__cause__ or e  # datasets says only that something failed
    reason = f"{type(e).__name__}: {e}".splitlines()[0][:200]
    if place:
        return UserError(f"cannot read {source.hub}, split {source.split}, from {place}: {reason}")
    return UserError(f"cannot reach {source.hub}, split {source.split}, on the hub ({reason}). Two ways out: go online (gated sets "
                     "want HF_TOKEN), or copy the dataset and name the folder with --data_dir")


def load_table(source, data_dir=None, streaming=False):
    """The rows of a Source as a datasets table, audio undecoded: from the hub, or from data_dir/owner/name, which holds the
    same parquet files, or what save_to_disk wrote, or audio files and a metadata.csv or .jsonl. Raises UserError."""
    from datasets import Audio, disable_progress_bars, load_dataset, load_from_disk
    if not sys.stderr.isatty():
        disable_progress_bars()
    if data_dir:
        owner, name = source.hub.split("/")
        place = next((p for p in (Path(data_dir, owner, name), Path(data_dir, name), Path(data_dir, f"{owner}__{name}"),
                                  Path(data_dir, owner, f"{name}.parquet"), Path(data_dir, f"{name}.parquet")) if p.exists()), None)
        if place is None and (Path(data_dir).name == name or source.split != "train" and
                              [*Path(data_dir).glob(f"{source.split}-*.parquet"), *Path(data_dir, "data").glob(f"{source.split}-*.parquet")]):
            place = Path(data_dir)  # it is the dataset itself
        if place is None:
            raise UserError(f"--data_dir {data_dir} has no {source.hub}: put the dataset's files into "
                            f"{Path(data_dir, owner, name)}")
        if source.config and (place / source.config).is_dir():
            place = place / source.config
    try:
        if not data_dir:
            table = load_dataset(source.hub, source.config, split=source.split, streaming=streaming)
        elif place.is_file():
            table = load_dataset("parquet", data_files={source.split: str(place)}, split=source.split)
        elif lists := [p for folder in (place / source.split, place / "data", place) for p in sorted(folder.glob("metadata.*"))]:
            kind = {".csv": "csv", ".jsonl": "json", ".parquet": "parquet"}[lists[0].suffix]
            table = load_dataset(kind, data_files={source.split: str(lists[0])}, split=source.split)
            table = table.map(lambda name: {source.audio: str(lists[0].parent / name)}, input_columns="file_name")
        elif (place / "dataset_dict.json").exists() or (place / "state.json").exists():  # of save_to_disk
            table = load_from_disk(place)
            table = table[source.split] if isinstance(table, dict) else table
        else:
            table = load_dataset(str(place), split=source.split)
    except Exception as e:  # they fail in many ways, and none of them is ours
        raise unreadable(source, data_dir and place, e) from None
    columns = source.columns + list(source.only[0] if source.only else [])
    if missing := [c for c in columns if table.column_names and c not in table.column_names]:
        raise UserError(f"{source.hub}, split {source.split}, has no column {missing[0]}: it has {', '.join(table.column_names)}")
    table = table.select_columns(columns)
    # Decoding is load_audio's: datasets would call torchcodec.
    encoded = isinstance((table.features or {source.audio: Audio()}).get(source.audio), Audio)
    return table.cast_column(source.audio, Audio(decode=False)) if encoded else table


def open_source(source, data_dir=None, limit=None):
    """The rows of a Source that count. With a limit, the hub streams that many instead of sending everything."""
    table = load_table(source, data_dir, streaming=bool(limit))
    limit = min(x for x in (limit, source.rows, sys.maxsize) if x)
    if source.only:
        columns, word = source.only
        table = table.filter(lambda *values: any(word in (v or "") for v in values), input_columns=list(columns))
    if not hasattr(table, "__len__"):
        from datasets import Dataset as Table
        try:
            return Table.from_list(list(table.take(limit)))
        except Exception as e:  # the network may fail half-way
            raise unreadable(source, None, e) from None
    return table.select(range(min(limit, len(table))))


class Rows:
    """A Source's table as Samples, read when they are asked for."""

    def __init__(self, source, data_dir=None, limit=None):
        self.source, self.table = source, open_source(source, data_dir, limit)

    def __len__(self):
        return len(self.table)

    def __getitem__(self, i):
        name = f"{self.source.hub}/{self.source.split}:{i}"
        try:
            return replace(self.source.sample(self.table[i]), name=name)
        except BadRow as e:
            e.where = name
            raise


class Chain:
    """Sequences of samples as one sequence: sources make a pool, pools make a mix."""

    def __init__(self, parts):
        self.parts, self.starts = parts, np.cumsum([0, *map(len, parts)])

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, i):
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.parts[part][int(i - self.starts[part])]


# -----------------------------------------------------------------------------
# Batches

def encode(sample, tokenizer, config, with_answer=True, change=lambda wave, part: wave):
    """Sample -> (ids, labels, waveform windows). change(wave, number) alters each recording on its way. Raises BadRow if a
    recording cannot be used."""
    windows = [cut_windows(change(load_audio(a), part), config) for part, a in enumerate(sample.audio)]
    ids, labels = build_ids(tokenizer, config, sample.messages(with_answer), map(len, windows))
    return ids, labels, sum(windows, [])


class Dataset(torch.utils.data.Dataset):
    """Samples as they go into a batch: token ids, labels, mel (W, M, F), and how many samples each window holds.

    samples: anything with a length and an index. A row that turns out to be unusable is left out: the next one that is
    usable takes its place, and travels with the reasons. A recording that `augment` slows down so much that the row
    passes max_tokens is taken as it was. `keep` of the unchanged ones stay in memory, so that a small model that sees its
    data several times pays for each spectrogram once."""

    def __init__(self, samples, tokenizer, config, keep=0, augment=None, max_tokens=math.inf, max_windows=math.inf,
                 batch_size=1):
        self.samples, self.tokenizer, self.config, self.keep, self.kept = samples, tokenizer, config, keep, {}
        self.augment, self.max_tokens, self.max_windows, self.batch_size = augment, max_tokens, max_windows, batch_size

    def __len__(self):
        return len(self.samples)

    def encode(self, sample, **settings):
        """As the function encode; raises TooLong beyond the limits. Nothing is truncated: half an answer teaches to stop."""
        ids, labels, windows = encode(sample, self.tokenizer, self.config, **settings)
        if len(windows) > self.max_windows:
            raise TooLong(f"longer than {self.max_windows} windows")
        if len(ids) > self.max_tokens:
            raise TooLong(f"does not fit into {self.max_tokens} tokens")
        return ids, labels, windows

    def item(self, i, **settings):
        sample = self.samples[i]
        try:
            ids, labels, windows = self.encode(sample, **settings)
        except BadRow as e:
            e.where = sample.name
            raise
        return ids, labels, log_mel(windows, self.config), list(map(len, windows))

    def unchanged(self, i):
        item = self.kept.get(i) or self.item(i)
        if len(self.kept) < self.keep:
            self.kept[i] = item
        return item

    def changed(self, i, epoch):
        item = None
        if self.augment.touches(epoch, i):
            with contextlib.suppress(TooLong):
                item = self.item(i, change=lambda wave, part: self.augment.wave(wave, epoch, i, part))
        ids, labels, mel, lengths = item or self.unchanged(i)
        return ids, labels, self.augment.masked(mel, [-(-n // HOP) for n in lengths], epoch, i), lengths

    def __getitem__(self, key):
        """(index, epoch with its fraction), as Schedule deals them -> (item, [(reason, row, is it too long?) left out before
        it]); the item is None if too many in a row are."""
        (i, epoch), left_out = key, []
        while sum(1 if not too_long else 0.05 for *_, too_long in left_out) < RETRIES:
            try:
                return (self.unchanged(i) if self.augment is None else self.changed(i, epoch)), left_out
            except BadRow as e:
                left_out.append((str(e), e.where, isinstance(e, TooLong)))
            i = (i + 1) % len(self)
        return None, left_out

    def collate(self, dealt):
        """One rank's share of a step -> dict(micro=[micro-batches], left_out, seconds of audio, tokens, windows, squares).

        Longest first, so that a micro-batch holds neighbours in length and little padding. The gradient is a sum over all of
        them: the order changes nothing else."""
        items = [item for item, _ in dealt if item]
        if len(items) > self.batch_size:
            items.sort(key=lambda item: -len(item[0]))
        return dict(micro=[self.pad(items[i:i + self.batch_size]) for i in range(0, len(items), self.batch_size)],
                    left_out=[reason for _, reasons in dealt for reason in reasons], hopeless=len(dealt) - len(items),
                    seconds=sum(sum(lengths) for *_, lengths in items) / SAMPLE_RATE, windows=sum(len(x[3]) for x in items),
                    tokens=sum(len(ids) for ids, *_ in items), squares=sum(len(ids) ** 2 for ids, *_ in items))

    def pad(self, items):
        """List of B items -> dict of input_ids (B, L) and labels (B, L), padded on the right, and input_features
        (W, M, F): the windows of all samples in reading order, none at all for text only."""
        ids, labels, mels, _ = zip(*items)
        L, pad = max(map(len, ids)), self.config.llm_config.pad_token_id
        return dict(input_ids=torch.tensor([r + [pad] * (L - len(r)) for r in ids]),
                    labels=torch.tensor([r + [-100] * (L - len(r)) for r in labels]), input_features=torch.cat(mels))


class Schedule(torch.utils.data.Sampler):
    """The order of training: an endless walk through pools of samples, each shuffled anew every time it is through, that
    depends on (seed, position) only. Deals, for each step, this rank's share of it: a list of (index, epoch), the epoch
    with its fraction.

    sizes: samples in each pool, whose indices follow one another. shares: how often each pool's turn comes, exact in every
    1000 positions. Step s takes positions s*E ... (s+1)*E - 1, E the effective batch, dealt out over the ranks. So a run
    can stop at any step and go on, on another number of GPUs too, and sees what it would have seen, without reading again
    what it has."""

    BLOCK = 1000

    def __init__(self, sizes, shares, seed, steps, effective_batch, rank=0, world=1):
        self.sizes, self.seed, self.steps, self.rank, self.world = sizes, seed, steps, rank, world
        self.effective_batch, self.starts, self.total = effective_batch, np.cumsum([0, *sizes]), sum(sizes)
        exact = np.array(shares) / sum(shares) * self.BLOCK
        self.counts = np.floor(exact).astype(int)  # turns of each pool in a block, by largest remainder
        self.counts[np.argsort(self.counts - exact, kind="stable")[:self.BLOCK - self.counts.sum()]] += 1
        self.turns = lru_cache(maxsize=2)(lambda block: np.random.default_rng([seed % 2 ** 32, block]).permutation(
            np.repeat(np.arange(len(sizes)), self.counts)))
        self.order = lru_cache(maxsize=2 * len(sizes))(lambda pool, epoch: torch.randperm(
            sizes[pool], generator=torch.Generator().manual_seed((seed + 7919 * pool) * 1_000_003 + epoch)).tolist())

    def at(self, position):
        block, i = divmod(position, self.BLOCK)
        pool = self.turns(block)[i]
        earlier = block * self.counts[pool] + np.count_nonzero(self.turns(block)[:i] == pool)
        epoch, i = divmod(int(earlier), self.sizes[pool])
        return int(self.starts[pool]) + self.order(int(pool), epoch)[i], position / self.total

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        for step in self.steps:
            positions = range(step * self.effective_batch, (step + 1) * self.effective_batch)
            yield [self.at(p) for p in positions[self.rank::self.world]]


# -----------------------------------------------------------------------------
# The embedded corpus, 1: two small languages. {name} draws an alternative from the line of that name.

GRAMMAR = {"ru": """
sentence: сейчас {hour} часов {minutes} минут | {man} купил {count} {goods} | {woman} купила {count} {goods} |
    {day} в {city} {weather} | {woman} живёт в {city} {day} | {switch} {device} {room} |
    {adj_m} {noun_m} {does} {place} | {adj_f} {noun_f} {does} {place} | напомни мне {day} {todo} |
    позвони {whom} в {hour} часов | мы едем {to} на {vehicle} | мой номер {digit} {digit} {digit} |
    {weekday} {ordinal} {month} | {man} говорит по-русски {day} | {whom} нужно {todo};
hour: пять | шесть | семь | восемь | девять | десять;
minutes: десять | пятнадцать | {tens} | {tens} пять | {tens} восемь; tens: двадцать | тридцать | сорок | пятьдесят;
count: пять | шесть | семь | восемь | девять | десять | двадцать | сорок | сто;
digit: ноль | один | два | три | четыре | пять | шесть | семь | восемь | девять;
goods: яблок | книг | билетов | огурцов | конфет | цветов;
man: иван | пётр | сергей | андрей | николай; woman: анна | мария | ольга | татьяна | светлана;
city: москве | казани | самаре | омске | сочи; day: сегодня | завтра | утром | вечером | ночью | днём;
weather: идёт дождь | идёт снег | тепло | холодно | пасмурно;
switch: включи | выключи | проверь; device: свет | телевизор | радио | чайник | музыку;
room: на кухне | в спальне | в гостиной | на балконе;
adj_m: старый | молодой | большой | белый | весёлый; noun_m: кот | мальчик | медведь | учитель | врач;
adj_f: старая | молодая | большая | белая | весёлая;
noun_f: кошка | собака | девочка | птица | лошадь; does: спит | сидит | лежит | гуляет | играет;
place: под столом | на окне | у двери | в саду | за домом | в парке;
todo: купить {food} | полить цветы | забрать посылку | сделать уроки;
food: хлеб | молоко | сахар | чай | кофе; whom: маме | папе | брату | сестре | другу;
to: в лес | на дачу | в театр | на работу | в деревню; vehicle: поезде | автобусе | машине | метро;
weekday: понедельник | вторник | среда | четверг | пятница | суббота | воскресенье;
ordinal: первое | второе | третье | пятое | десятое;
month: января | февраля | марта | апреля | мая | июня | августа | сентября | октября | декабря
""", "en": """
sentence: it is {hour} {minutes} now | {name} bought {count} {goods} | {day} in {city} {weather} |
    {name} lives in {city} {day} | turn {switch} the {device} in the {room} | the {adj} {noun} {does} {place} |
    remind me to {todo} {day} | call {whom} at {hour} {minutes} | my number is {digit} {digit} {digit} |
    we are going {to} by {vehicle} | today is {weekday} the {ordinal} of {month} | {name} speaks english {day} |
    {whom} needs to {todo};
hour: five | six | seven | eight | nine | ten; minutes: ten | fifteen | {tens} | {tens} five | {tens} eight;
tens: twenty | thirty | forty | fifty; count: five | six | seven | eight | nine | ten | twenty | forty;
digit: zero | one | two | three | four | five | six | seven | eight | nine;
goods: apples | books | tickets | candies | lemons | cups | flowers | eggs;
name: john | peter | george | andrew | anna | mary | olivia | helen | david | susan;
city: london | paris | boston | chicago | dublin | madrid;
day: today | tomorrow | this morning | this evening | tonight;
weather: it is raining | it is snowing | it is warm | it is cold | it is windy | there is a storm | there is fog;
switch: on | off | down; device: light | television | radio | kettle | computer | music;
room: kitchen | bedroom | hall | garage | office | bathroom;
adj: old | young | big | white | black | happy | small | quiet;
noun: cat | dog | boy | girl | bear | horse | teacher | doctor | bird | rabbit;
does: sleeps | sits | lies | walks | plays | sings;
place: under the table | at the window | near the door | in the garden | behind the house | by the river | in the park;
todo: buy {food} | water the flowers | pick up the parcel | do the homework | take out the trash | cook dinner;
food: bread | milk | cheese | sugar | tea | coffee; whom: mother | father | my brother | my sister | my friend;
to: to the forest | to the theater | to work | to the sea | to the village | to the airport;
vehicle: train | bus | car | metro | taxi;
weekday: monday | tuesday | wednesday | thursday | friday | saturday | sunday;
ordinal: first | second | third | fifth | sixth | eighth | tenth;
month: january | february | march | april | may | june | july | august | september | october | november | december
"""}
GRAMMAR = {lang: {name.strip(): [" ".join(a.split()) for a in alternatives.split("|")]
                  for name, alternatives in (entry.split(":") for entry in text.split(";"))}
           for lang, text in GRAMMAR.items()}


def sentence(lang, rng):
    """One sentence of the grammar, drawn with random.Random rng."""
    text = "{sentence}"
    while "{" in text:  # expand the leftmost name until none is left
        text = re.sub(r"\{(\w+)\}", lambda m: rng.choice(GRAMMAR[lang][m[1]]), text, count=1)
    return text


@lru_cache
def vocabulary(lang):
    """All words of a grammar, sorted."""
    return sorted({w for lines in GRAMMAR[lang].values() for line in lines for w in re.sub(r"\{\w+\}", "", line).split()})


def dictation(lang, rng):
    """One to four words in any order. Much of the training set is made of these: a sentence can be half guessed from its
    beginning, a list of words has to be listened to."""
    return " ".join(rng.choices(vocabulary(lang), k=rng.randint(1, 4)))


# -----------------------------------------------------------------------------
# The embedded corpus, 2: who speaks it. espeak-ng's voice variants; the evaluation voices are never trained on.
# Left out, as no people: whispers, robots, Klatt voices, loud echoes, broken stress, formants
# 1 to 3 outside 80..140 % of the plain voice.

TRAIN_VOICES = (
    "m1 m2 m3 m5 m6 m8 f1 f3 f5 Alex Andrea Annie Denis Diogo Gene Gene2 Henrique Hugo Mario Storm anika "
    "aunty ed grandma grandpa ian iven john max michel paul pedro quincy rob robert sandro shelby steph").split()
EVAL_VOICES = "m4 m7 f2 f4 Mike Nguyen belinda linda miguel victor".split()
EVAL_UTTERANCES = 250    # in each held-out split
EVAL_SPLITS = "clean voices books speak".split()  # augment.py makes webinars and devices out of clean
TRAIN_MANNERS = 0.7, 0.15, 0.15  # shares of the training set spoken like clean, books and speak
SENTENCE_SHARE = 0.7     # of the training set; the rest is dictation
CHUNK = 250              # utterances synthesised by one process; fixed, so that bytes do not depend on the machine


class Espeak:
    """espeak-ng through ctypes, from the PyPI package espeakng-loader."""

    def __init__(self, seed):
        import espeakng_loader
        self.lib, self.pcm = ctypes.CDLL(espeakng_loader.get_library_path()), []
        self.callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int,
                                         ctypes.c_void_p)(self.receive)
        synchronous = 2
        self.rate = self.lib.espeak_Initialize(synchronous, 0, espeakng_loader.get_data_path().encode(), 0)
        assert self.rate > 0, f"espeak_Initialize failed with {self.rate}"
        self.lib.espeak_SetSynthCallback(self.callback)
        self.lib.espeak_ng_SetRandSeed(ctypes.c_long(seed))

    def receive(self, samples, n, events):
        if samples and n > 0:
            self.pcm.append(np.ctypeslib.as_array(samples, (n,)).copy())
        return 0

    def say(self, text, voice, words_per_minute, pitch):
        """-> int16 samples at self.rate (22,050 Hz)."""
        RATE, PITCH, UTF8 = 1, 3, 1
        self.pcm.clear()
        status = self.lib.espeak_SetVoiceByName(voice.encode())
        assert status == 0, f"espeak-ng has no voice {voice!r}"
        self.lib.espeak_SetParameter(RATE, words_per_minute, 0)
        self.lib.espeak_SetParameter(PITCH, pitch, 0)
        raw = text.encode() + b"\0"
        status = self.lib.espeak_Synth(raw, len(raw), 0, 1, 0, UTF8, None, None)
        assert status == 0 and self.pcm, f"espeak-ng said nothing for {text!r} as {voice}"
        return np.concatenate(self.pcm)


def held_out(text):
    """Is this sentence one for evaluation only? One in six is, whoever draws it. (Drawing an evaluation set first and
    banning its sentences from training would use up whole patterns that have few sentences.)"""
    return zlib.crc32(text.encode()) % 6 == 0


def script(lang, split, rng, done):
    """What is said next in a split -> a list of parts with pauses between them. Evaluation says held-out sentences only,
    and none twice: `done` is the set of those said."""
    def fresh():
        draw = sentence if split != "train" or rng.random() < SENTENCE_SHARE else dictation
        while held_out(text := draw(lang, rng)) != (split != "train") or (split != "train" and text in done):
            pass
        done.add(text)
        return text
    manner = rng.choices(["clean", "books", "speak"], TRAIN_MANNERS)[0] if split == "train" else split
    if manner == "books":  # reads on: longer than a window
        return [fresh(), fresh()]
    words = fresh().split()
    if manner == "speak" and len(words) > 1:  # stops, and says a word again
        i = rng.randrange(1, len(words))
        return [" ".join(words[:i]), " ".join(words[i - 1:])]
    return [" ".join(words)]


def synthesise(job):
    """Speak chunk number k of a split and write it to `path`. Runs in a process of its own: espeak-ng keeps state
    from one utterance to the next, so equal bytes need an equal history."""
    lang, split, k, seed, path = job
    torch.set_num_threads(1)
    rng, texts, voices, waves, done = random.Random(f"{seed} {lang} {split} {k}"), [], [], [], set()
    espeak = Espeak(rng.randrange(1 << 30))
    resample = resampler(espeak.rate, SAMPLE_RATE)
    for i in range(CHUNK):
        voice = rng.choice(TRAIN_VOICES) if split == "train" else EVAL_VOICES[i % len(EVAL_VOICES)]
        parts, pieces = script(lang, split, rng, done), []
        speed, pitch = ((150, 260), (15, 85)) if split == "voices" else ((190, 230), (40, 60))
        speed, pitch = rng.randint(*speed), rng.randint(*pitch)
        for part in parts:  # the pause in front of each; the first is 0 to 0.1 s
            silence = torch.zeros(rng.randrange(*(3000, 8000) if pieces else (0, SAMPLE_RATE // 10)))
            level = 10 ** (rng.uniform(-9, 0) / 20) if len(parts) > 1 else 1
            pieces += [silence, level * resample(load_audio(espeak.say(part, f"{lang}+{voice}", speed, pitch)))]
        texts.append(" ".join(parts)), voices.append(voice)
        waves.append((torch.cat(pieces).clamp(-1, 1) * 32767).round().to(torch.int16).numpy())
    def write(tmp):
        with open(tmp, "wb") as f:  # given a name, savez would append .npz to it
            np.savez(f, pcm=np.concatenate(waves), ends=np.cumsum([len(w) for w in waves]), texts=texts, voices=voices)
    replace_file(path, write)


def cache_dir():
    return Path(os.environ.get("NANOBOREALIS_CACHE", Path(__file__).parent / ".cache"))


def embedded(lang, split, n, seed=0):
    """The first n Samples of the embedded corpus ("train" or one of EVAL_SPLITS), spoken now if they are not in the cache.
    Equal seeds give equal bytes."""
    # A new recipe is a new folder. The last number stands for what script() and synthesise() do.
    recipe = json.dumps([GRAMMAR[lang], TRAIN_VOICES, EVAL_VOICES, SENTENCE_SHARE, TRAIN_MANNERS, CHUNK, 2])
    folder = cache_dir() / f"{lang}-{seed}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{split}-{k:03d}.npz" for k in range(-(-n // CHUNK))]
    jobs = [(lang, split, k, seed, str(p)) for k, p in enumerate(paths) if not p.exists()]
    if jobs:
        with multiprocessing.get_context("fork").Pool(min(os.cpu_count(), len(jobs)), maxtasksperchild=1) as pool:
            list(tqdm(pool.imap_unordered(synthesise, jobs), f"speaking {lang} {split}", len(jobs), unit_scale=CHUNK,
                      unit=" utterances"))
    samples = []
    for k, path in enumerate(paths):
        with np.load(path) as chunk:  # allow_pickle stays False
            clips = np.split(chunk["pcm"], chunk["ends"][:-1])
            for i, (clip, text, voice) in enumerate(zip(clips, chunk["texts"], chunk["voices"])):
                samples.append(Sample(str(text), [clip], name=f"{lang}-{split}/{k * CHUNK + i}/{voice}"))
    return samples[:n]


# -----------------------------------------------------------------------------
# The embedded corpus, 3: the pools again, small enough for a laptop

QUESTIONS = {"ru": ("Какое слово первое?", "Какое слово последнее?", "Сколько слов?"),
             "en": ("Which word is the first?", "Which word is the last?", "How many words?")}


def task(lang, text, rng):
    """A question about a text, and its answer."""
    k, words = rng.randrange(3), text.split()
    return QUESTIONS[lang][k], (words[0], words[-1], str(len(words)))[k]


def tiny_pool(name, n, seed, languages=("ru",)):
    """The counterpart of a pool in POOLS: n Samples of the embedded corpus, or texts of its grammar."""
    rng = random.Random(f"{seed} {name}")
    if name == "pretrain":
        return [s for lang in languages for s in embedded(lang, "train", -(-n // len(languages)), seed)]
    lang, samples = "en" if name == "en_audio" else "ru", []
    if name == "text":
        while len(samples) < n:
            if not held_out(text := sentence(lang, rng)):
                question, answer = task(lang, text, rng) if rng.random() < 0.7 else ("Повтори.", text)
                samples.append(Sample(answer, [], f"{question}\n{text}", TEXT_SYSTEM, name=f"text/{len(samples)}"))
        return samples
    speech = embedded(lang, "train", n, seed)
    if name == "long_audio":  # up to twelve utterances in a row
        while speech:
            group, speech = speech[:(k := rng.randint(2, 12))], speech[k:]
            samples.append(Sample(" ".join(s.answer for s in group), [np.concatenate([s.audio[0] for s in group])],
                                  name=f"long/{len(samples)}"))
        return samples
    for s in speech:
        if name != "it_fresh" and rng.random() < 0.25:  # it_fresh is transcription only
            question, answer = task(lang, s.answer, rng)
            s = replace(s, question=question, answer=answer, system=INSTRUCT_SYSTEM)
        samples.append(s)
    return samples


# -----------------------------------------------------------------------------
# A small tokenizer for the tiny preset: byte-level BPE like Qwen3's, with the same special tokens and template

QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")


def train_tokenizer(texts, vocab_size=1024):
    """BPE over `texts` -> a transformers tokenizer. Any text can be encoded: what was never seen falls to bytes."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    bpe.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])  # not special, as in Qwen3
    return add_audio_tokens(PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False))


def texts_of(samples):
    """Everything a tokenizer should know, prompts and role names as often as the model will read them."""
    return [f"{m['role']}\n{m['content'].replace(AUDIO, '')}\n\n" for s in samples for m in s.messages()]


# -----------------------------------------------------------------------------

def show_mixes():
    for mix, shares in MIXES.items():
        print(f"{mix}: " + ", ".join(f"{share:.0%} {pool}" for pool, share in shares.items()))
    for pool, sources in POOLS.items():
        print(f"\n{pool}")
        for s in sources:
            print(f"  {s.hub}{f' ({s.config})' if s.config else ''}, {s.split}: {', '.join(s.columns)}"
                  + (f"; {' or '.join(s.only[0])} has {s.only[1]}" if s.only else "") + (f"; {s.rows:,} rows" if s.rows else ""))


def main():
    parser = ArgumentParser(description="Show one sample as the model sees it.")
    parser.add_argument("--manifest", help="a JSONL file; default: the embedded corpus")
    parser.add_argument("--lang", choices=sorted(GRAMMAR), default="ru")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--wav", default="sample.wav", help="where to write the recording")
    parser.add_argument("--mixes", action="store_true", help="show the mixes and their datasets instead")
    args = parser.parse_args()
    if args.mixes:
        return show_mixes()
    if args.manifest:
        bad = BadRows()
        samples, total = read_manifest(args.manifest, bad)
        bad.report(total, args.manifest)
    else:
        samples = embedded(args.lang, "train", CHUNK)
    if not 0 <= args.index < len(samples):
        raise UserError(f"--index {args.index}: there are {len(samples)} samples, 0 to {len(samples) - 1}")
    sample = samples[args.index]
    tokenizer = train_tokenizer(texts_of(samples))
    config = tiny_config(tokenizer)
    try:
        ids, labels, windows = encode(sample, tokenizer, config)
    except BadRow as e:
        raise UserError(f"{sample.name}: {e}") from None
    dataset = Dataset([sample], tokenizer, config)
    batch = dataset.pad([dataset.item(0)])

    print(f"{sample.name}: {sum(map(len, windows)) / SAMPLE_RATE:.2f} s, {len(windows)} window(s) of "
          f"{config.window_samples / SAMPLE_RATE:g} s")
    for key in ("input_features", "input_ids", "labels"):
        print(f"{key:14s} {tuple(batch[key].shape)}")
    print("tokens (* has a label):")
    for (token, label), run_ in groupby(zip(ids, labels)):  # equal neighbours on one line
        n = len(list(run_))
        print(f"  {' ' if label == -100 else '*'} {token:6d}  {tokenizer.decode([token])!r}{f' x {n}' if n > 1 else ''}")
    print("the labels say:", repr(tokenizer.decode([t for t in labels if t != -100])))
    if windows:
        soundfile.write(args.wav, torch.cat(windows).numpy(), SAMPLE_RATE)
        print(f"wrote {args.wav}")


if __name__ == "__main__":
    run(main)
