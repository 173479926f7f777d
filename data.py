"""data.py -- what the model learns from: samples, their tokens and labels, batches, their order.

    manifest, dataset or embedded corpus -> Sample -> token ids, labels, windows of sound -> batch

    python data.py                      # one sample as the model sees it; writes sample.wav
    python data.py --manifest my.jsonl  # the same for a row of your own data
    python data.py --mixes              # which datasets the presets of train.py draw from

A manifest has one JSON object a line; paths in it are relative to its folder.
    {"audio": "a.wav", "text": "..."}                              transcription
    {"audio": "a.wav", "question": "...", "answer": "..."}         any question about a recording
    {"conversation": [{"role": "user", "content": "..."}, ...]}    text only
A row that cannot be used (a broken file, an empty text) is a BadRow: beyond 5 % end the run."""
import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import groupby
import numpy as np
import soundfile
import torch
import model
from model import SAMPLE_RATE
from support import cli, corpus, recipes, rows, tiny
from support.rows import BadRow, BadRows, TooLong, load_audio

TASK_SYSTEM, TEXT_SYSTEM = recipes.TABLES["system"].values()
RETRIES = 1000  # unusable rows in a row before training gives up
BLOCK = 1000  # places in the order of training in which each pool has exactly its share

@dataclass
class Sample:  # a question about any number of recordings, and its answer
    answer: str
    audio: list = field(default_factory=list)    # of what load_audio takes; empty for text only
    question: str = model.ASR_PROMPT
    system: str = model.ASR_SYSTEM
    history: list = field(default_factory=list)  # earlier turns of a text-only conversation
    name: str = ""                               # "my.jsonl:12" or "ru-clean/3/m7", for reports
    def messages(self, with_answer: bool = True) -> list[dict]:
        """The sample as a chat, with one <|AUDIO|> in the question for each recording."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        user = {"role": "user", "content": model.place_audio(self.question, len(self.audio))}
        answer = [{"role": "assistant", "content": self.answer}] if with_answer else []
        return [*system, *self.history, user, *answer]

def read_manifest(path: str, bad: BadRows, evaluation: bool = False) -> tuple[list[Sample], int]:
    """JSONL -> (samples, number of rows). Raises UserError if there is no file, or no row in it."""
    samples, (folder, file) = [], os.path.split(path)
    with cli.as_user_error(f"no manifest at {path}: ", OSError), open(path, "rb") as f:
        lines = [(f"{file}:{i}", line) for i, line in enumerate(f, 1) if line.strip()]
    cli.refuse(not lines, f"{path} is empty: a manifest has one JSON object a line")
    for name, line in lines:
        try:
            samples.append(replace(parse_row(json.loads(line), folder, evaluation), name=name))
        except (ValueError, RecursionError) as e:
            bad.add(str(e) if isinstance(e, BadRow) else "broken JSON", name)
    return samples, len(lines)

def parse_row(row: dict, folder: str = "", evaluation: bool = False) -> Sample:
    """A manifest's row -> Sample, or BadRow. Audio: paths below `folder`, files' bytes, int16 at 16
    kHz. evaluation: keep rows without audio (they fail), and with the text "" (nobody speaks)."""
    cli.refuse(not isinstance(row, dict), "not a JSON object", BadRow)
    name = row.get("name", "")
    if "conversation" in row:
        turns = [t for t in model.as_list(row["conversation"])
                 if isinstance(t, dict) and t.get("role") in ("system", "user", "assistant")]
        turns = [dict(role=t["role"], content=rows.check_text(
            t.get("content"), recordings=0 if t["role"] == "user" else None)) for t in turns]
        if [t["role"] for t in turns[-2:]] != ["user", "assistant"]:
            raise BadRow("conversation does not end with a question and its answer")
        system = turns.pop(0)["content"] if turns[0]["role"] == "system" else TEXT_SYSTEM
        *history, question, answer = turns
        return Sample(answer["content"], [], question["content"], system, history, name)
    audio = model.as_list(row.get("audio"))
    given = audio and all(isinstance(a, (str, bytes, np.ndarray)) and len(a) for a in audio)
    cli.refuse(not given and not evaluation, "no audio field", BadRow)
    audio = [os.path.join(folder, a) if isinstance(a, str) else a for a in audio if given] or [b""]
    asr = "text" in row
    answer = rows.check_text(row.get("text" if asr else "answer"), empty=asr and evaluation)
    question = model.ASR_PROMPT if asr else row.get("question")
    question = rows.check_text(question, recordings=len(audio))
    system = rows.check_text(row.get("system", model.ASR_SYSTEM if asr else TASK_SYSTEM))
    return Sample(answer, audio, question, system, name=name)

# ---- A pool: any sequence of samples. Pools are mixed for training (support/recipes.py)
class HubSamples:
    """A dataset of the hub as a pool; a row is read when asked for, and named if it is a BadRow."""
    def __init__(self, source: recipes.Source, data_dir=None, limit: int | None = None):
        self.source, self.table = source, recipes.open_source(source, data_dir, limit)
    def __len__(self):
        return len(self.table)
    def __getitem__(self, i: int) -> Sample:
        name = f"{self.source.hub}/{self.source.split}:{i}"
        row = self.source.manifest_row(self.table[i]) | {"name": name}
        try:
            return parse_row(row, evaluation=self.source.evaluation)
        except BadRow as e:
            e.where = name
            raise

TRANSCRIBE = Sample("", [b""])  # the transcription prompt; answer and sound come from elsewhere
Chain = torch.utils.data.ConcatDataset  # Chain([a, b]): first a, then b

def digest(pool) -> str:
    """Hash of a pool's texts and of the names of its recordings: is it still the same data?"""
    total = hashlib.sha256()
    for part in getattr(pool, "datasets", [pool]):
        if isinstance(part, HubSamples):
            columns = [c for c in part.source.columns if c != part.source.audio]
            texts = part.table.select_columns(columns).iter(1000)
        else:
            texts = ((s.messages(), [os.path.basename(a) for a in s.audio if isinstance(a, str)])
                     for s in part)
        for some in texts:
            total.update(repr(some).encode())
    return total.hexdigest()[:16]

def embedded(lang: str, split: str, n: int, seed: int = 0) -> list[Sample]:  # espeak-ng speaks
    return [parse_row(row) for row in corpus.embedded_rows(lang, split, n, seed)]

def tiny_pool(name: str, n: int, seed: int, languages=("ru",)) -> list[Sample]:  # for POOLS[name]
    return [parse_row(row) for row in tiny.tiny_pool_rows(name, n, seed, languages)]

# ---- From samples to batches
def encode(sample, tokenizer, config, change=None, load=load_audio, max_windows=torch.inf,
           max_tokens=torch.inf, **limits):
    """-> ids; labels: the same where the assistant speaks, <|im_end|> included, else -100; windows
    of sound. change(wave, its number) augments. BadRow, TooLong: cut short, it teaches to stop."""
    waves = [load(a, **limits) for a in sample.audio]
    if change:
        waves = [change(wave, number) for number, wave in enumerate(waves)]
    windows = [model.cut_windows(wave, config) for wave in waves]
    ids, labels = model.build_ids(tokenizer, config, sample.messages(), map(len, windows))
    windows = sum(windows, [])
    cli.refuse(len(windows) > max_windows, f"longer than {max_windows} windows", TooLong)
    cli.refuse(len(ids) > max_tokens, f"does not fit into {max_tokens} tokens", TooLong)
    return ids, labels, windows

class Dataset(torch.utils.data.Dataset):
    """Key (index, epoch) -> (ids, labels, windows of sound, key), of it or the next usable one."""
    def __init__(self, samples, tokenizer, config, augment=None, batch_size=1, context=None,
                 **limits):
        self.samples, self.config, self.context = samples, config, context
        self.augment, self.batch_size = augment, batch_size
        self.encode = partial(encode, tokenizer=tokenizer, config=config, **limits)
    def item(self, i: int, epoch: float = 0.0) -> tuple:  # recordings change if it is their turn
        plain, change = self.samples[i], None
        sample = self.context(plain, epoch, i) if self.context else plain
        if self.augment and self.augment.touches(epoch, i):
            change = partial(self.augment.wave, epoch, i)
        if change or sample is not plain:
            with contextlib.suppress(TooLong):  # slowed down too far: then it stays as it was
                return *self.encode(sample, change=change), (i, epoch)
        return *self.encode(plain), (i, epoch)
    def __getitem__(self, key: tuple[int, float]):
        """Key -> (item, or None after RETRIES bad rows; [(reason, row, too long?) left out])."""
        (i, epoch), left_out = key, []
        while len(left_out) < RETRIES:
            try:
                return self.item(i, epoch), left_out
            except BadRow as e:
                left_out.append((str(e), e.where or self.samples[i].name, isinstance(e, TooLong)))
            i = (i + 1) % len(self.samples)
        return None, left_out
    def collate(self, dealt: list) -> dict:
        """One rank's part of a step -> micro-batches of neighbours in length, and counts of it."""
        items, size = [item for item, _ in dealt if item], self.batch_size
        if len(items) > size:
            items.sort(key=lambda item: -len(item[0]))
        tokens = [len(ids) for ids, *_ in items]
        windows = [len(window) for _, _, windows, _ in items for window in windows]
        micro = [self.pad(items[i:i + size]) for i in range(0, len(items), size)]
        return dict(micro=micro, labels=sum(len(part["label_positions"]) for part in micro),
                    left_out=[row for _, left_out in dealt for row in left_out],
                    hopeless=len(dealt) - len(items), seconds=sum(windows) / SAMPLE_RATE,
                    windows=len(windows), tokens=sum(tokens), squares=sum(n * n for n in tokens))
    def pad(self, items: list) -> dict[str, torch.Tensor]:
        """B items -> input_ids (B, L) and labels (B, L), padded on the right, and input_features
        (W, M, F), all windows in reading order. Labels are found here: a GPU would wait for it."""
        ids, labels, windows, keys = zip(*items, strict=True)
        mels = model.log_mel(sum(windows, []), self.config)  # of all at once: far faster
        if self.augment:
            split = mels.split([*map(len, windows)])
            mels = torch.cat([self.augment.masked(*some, *key)
                              for *some, key in zip(split, windows, keys, strict=True)])
        L, pad = max(map(len, ids)), self.config.llm_config.pad_token_id or 0
        labels = torch.tensor([row + [-100] * (L - len(row)) for row in labels])
        return dict(input_ids=torch.tensor([row + [pad] * (L - len(row)) for row in ids]),
                    labels=labels, label_positions=model.find_labels(labels), input_features=mels)

# ---- The order depends on (seed, position) alone, for resumed runs and any number of GPUs
@lru_cache(maxsize=2)
def turns_of(block: int, seed: int, counts: tuple) -> np.ndarray:  # pool k's turn counts[k] times
    rng = np.random.default_rng([seed % 2 ** 32, block])
    return rng.permutation(np.repeat(np.arange(len(counts)), counts))

@lru_cache(maxsize=16)
def shuffled(size: int, seed: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()

class Schedule(torch.utils.data.Sampler):
    """Per step in `steps`, this rank's part of a batch: a list of (index, epoch with its fraction).
    sizes: of the pools, each shuffled anew for each pass. shares: how often a pool's turn comes."""
    def __init__(self, sizes, shares, seed, steps, effective_batch, rank=0, world=1):
        self.sizes, self.seed, self.steps, self.rank, self.world = sizes, seed, steps, rank, world
        self.effective_batch, self.starts = effective_batch, np.cumsum([0, *sizes]).tolist()
        exact = np.array(shares) / sum(shares) * BLOCK
        counts = np.floor(exact).astype(int)  # what is left goes to the largest remainders
        counts[np.argsort(counts - exact, kind="stable")[:BLOCK - counts.sum()]] += 1
        self.counts = tuple(counts.tolist())
    def at(self, position: int) -> tuple[int, float]:
        """Of A (3 samples) and B, in turns AABAAB: position 4 is A's 4th turn: its next pass."""
        block, i = divmod(position, BLOCK)
        turns = turns_of(block, self.seed, self.counts)
        pool = int(turns[i])
        earlier = block * self.counts[pool] + int(np.count_nonzero(turns[:i] == pool))
        passes, i = divmod(earlier, self.sizes[pool])
        order = shuffled(self.sizes[pool], (self.seed + 7919 * pool) * 1_000_003 + passes)
        return self.starts[pool] + order[i], position / self.starts[-1]
    def __iter__(self):
        for step in self.steps:
            positions = range(step * self.effective_batch, (step + 1) * self.effective_batch)
            yield [self.at(p) for p in positions[self.rank::self.world]]

def print_tokens(tokenizer, ids: list[int], labels: list[int]) -> None:  # as the model sees them
    print("tokens (* has a label):")
    for (token, label), run in groupby(zip(ids, labels, strict=True)):
        n, mark = len(list(run)), " " if label == -100 else "*"
        print(f"  {mark} {token:6d}  {tokenizer.decode([token])!r}" + (f" x {n}" if n > 1 else ""))
    print("the labels say:", repr(tokenizer.decode([t for t in labels if t != -100])))

def main():
    args = cli.ArgumentParser().add_tables("data").parse_args()
    if args.mixes:
        return print(recipes.TEXT.split("[all_presets]")[0])
    if args.manifest:
        bad = BadRows()
        samples, total = read_manifest(args.manifest, bad)
        bad.report(total, args.manifest)
    else:
        samples = embedded("ru", "train", corpus.CHUNK)
    if args.index >= len(samples):
        raise cli.UserError(f"--index {args.index}: there are {len(samples)} samples, from 0 on")
    sample, tokenizer = samples[args.index], tiny.train_tokenizer(tiny.texts_of(samples))
    dataset = Dataset([sample], tokenizer, tiny.tiny_config(tokenizer))
    with cli.as_user_error(f"{sample.name}: ", BadRow):
        ids, labels, windows, _ = item = dataset.item(0)
    print(f"{sample.name}: {sum(map(len, windows)) / SAMPLE_RATE:.2f} s, {len(windows)} window(s)")
    for key, value in dataset.pad([item]).items():
        print(f"{key:14s} {tuple(value.shape)}")
    print_tokens(tokenizer, ids, labels)
    if windows:
        soundfile.write(args.wav, torch.cat(windows).numpy(), SAMPLE_RATE)
        print(f"wrote {args.wav}")

cli.run(main, __name__)
