"""
data.py -- what the model learns from: samples, manifests, a spoken corpus made on the spot, and batches.

    manifest or embedded corpus -> Sample -> token ids + labels + waveform windows -> collated batch

    python data.py                      # one sample as the model sees it; writes sample.wav
    python data.py --lang en --index 3
    python data.py --manifest a.jsonl   # the same for a row of your own data

A manifest has one JSON object a line:
    {"audio": "a.wav", "text": "..."}                              transcription
    {"audio": "a.wav", "question": "...", "answer": "..."}         any question about a recording
    {"conversation": [{"role": "user", "content": "..."}, ...]}    text only
Paths are relative to the manifest's folder. wav, flac, ogg and mp3 of any rate and channel count will do.
"""
import argparse
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
MAX_BAD_SHARE = 0.05     # more unusable rows than this means that the manifest is wrong, not a few files


# -----------------------------------------------------------------------------
# Errors. What a user can mend is one line and exit code 2, in every script.

class UserError(Exception):
    """Something the user can mend; the message says how."""


class BadRow(ValueError):
    """One unusable row or recording; the message is the reason it is counted under."""


def run(main):
    """Call main(); a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        sys.exit(main())
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


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

    def report(self, total, name):
        """Say once what was left out of `total` rows; more than 5 % is an error."""
        bad = sum(self.reasons.values())
        if not bad:
            return
        reasons = ", ".join(f"{n} {r} (first: {self.first[r]})" for r, n in self.reasons.most_common())
        if bad > MAX_BAD_SHARE * total:
            raise UserError(f"{name}: {bad} of {total} rows are unusable, more than {MAX_BAD_SHARE:.0%}: {reasons}; "
                            "mend or remove them")
        print(f"{name}: left out {bad} of {total} rows: {reasons}", file=sys.stderr)


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


def load_audio(source, min_seconds=MIN_SECONDS):
    """A path, the bytes of a file, or int16 samples at 16 kHz -> 1-D float32 tensor at 16 kHz, channels averaged, peak at
    most 1. Raises BadRow with the reason."""
    if isinstance(source, np.ndarray):
        return torch.from_numpy(source.astype(np.float32) / 32768)
    if isinstance(source, str) and not os.path.isfile(source):
        raise BadRow("missing file")
    try:
        wave, rate = soundfile.read(io.BytesIO(source) if isinstance(source, bytes) else source, dtype="float32",
                                    always_2d=True)
    except (soundfile.LibsndfileError, TypeError, ValueError):
        raise BadRow("not audio") from None
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
    if wave.abs().max() < 1e-6:
        raise BadRow("silent")
    return wave


@lru_cache(maxsize=16)  # computing a kernel costs more than using it
def resampler(rate, new_rate):
    return torchaudio.transforms.Resample(rate, new_rate)


# -----------------------------------------------------------------------------
# Your own data

CONTROL = re.compile(r"<\|\w+\|>")


def read_manifest(path, bad):
    """JSONL -> (list of Samples, number of rows). What is wrong with the text of a row goes to `bad`; the audio is
    looked at later, by usable() for training, or while decoding for evaluation. Raises UserError."""
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
                samples.append(replace(parse_row(line, os.path.dirname(path)), name=name))
            except BadRow as e:
                bad.add(str(e), name)
    if not total:
        raise UserError(f"{path} is empty: a manifest has one JSON object a line")
    return samples, total


def parse_row(line, folder):
    """One line of a manifest -> Sample; raises BadRow."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError:
        raise BadRow("broken JSON") from None
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")

    def text(value):
        if not isinstance(value, str) or not value.strip():
            raise BadRow("empty text")
        if CONTROL.search(value.replace(TAG_PAIR, "").replace(AUDIO, "")):
            raise BadRow("control token in the text")
        return value.strip()

    if "conversation" in row:
        turns = row["conversation"] if isinstance(row["conversation"], list) else []
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
    if not audio or not all(isinstance(a, str) and a for a in audio):
        raise BadRow("no audio field")
    sample = Sample(text(row.get("text", row.get("answer"))), [os.path.join(folder, a) for a in audio])
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


def usable(samples, tokenizer, config, max_tokens, bad, progress=True):
    """The samples whose audio decodes and whose tokens fit into max_tokens; the others go to `bad`."""
    def problem(sample):
        try:
            ids, _, _ = encode(sample, tokenizer, config)
        except BadRow as e:
            return str(e)
        return None if len(ids) <= max_tokens else f"does not fit into {max_tokens} tokens"

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
# Batches

def encode(sample, tokenizer, config, with_answer=True, change=lambda wave, part: wave):
    """Sample -> (ids, labels, waveform windows). change(wave, number) alters each recording on its way. Raises BadRow if a
    recording cannot be used."""
    windows = [cut_windows(change(load_audio(a), part), config) for part, a in enumerate(sample.audio)]
    ids, labels = build_ids(tokenizer, config, sample.messages(with_answer), map(len, windows))
    return ids, labels, sum(windows, [])


class Dataset(torch.utils.data.Dataset):
    """Samples as (ids, labels, mel (W, M, F), samples in each window).

    augment: an Augmenter; a recording that it slows down so much that the row passes max_tokens is taken as it was.
    `keep` of the unchanged ones stay in memory, so that a small model that sees its data several times pays for each
    spectrogram once."""

    def __init__(self, samples, tokenizer, config, keep=0, augment=None, max_tokens=math.inf):
        self.samples, self.tokenizer, self.config, self.keep, self.kept = samples, tokenizer, config, keep, {}
        self.augment, self.max_tokens = augment, max_tokens

    def __len__(self):
        return len(self.samples)

    def item(self, i, **settings):
        ids, labels, windows = encode(self.samples[i], self.tokenizer, self.config, **settings)
        return ids, labels, log_mel(windows, self.config), list(map(len, windows))

    def unchanged(self, i):
        item = self.kept.get(i) or self.item(i)
        if len(self.kept) < self.keep:
            self.kept[i] = item
        return item

    def __getitem__(self, key):
        """key: an index, or (index, epoch with its fraction) as Schedule deals them."""
        i, epoch = key if isinstance(key, tuple) else (key, 0)
        if self.augment is None:
            return self.unchanged(i)
        item = None
        if self.augment.touches(epoch, i):
            item = self.item(i, change=lambda wave, part: self.augment.wave(wave, epoch, i, part))
        if item is None or len(item[0]) > self.max_tokens:
            item = self.unchanged(i)
        ids, labels, mel, lengths = item
        return ids, labels, self.augment.masked(mel, [-(-n // HOP) for n in lengths], epoch, i), lengths

    def collate(self, items):
        """List of B items -> dict of input_ids (B, L) and labels (B, L), padded on the right, and input_features
        (W, M, F): the windows of all samples in reading order, none at all for text only."""
        ids, labels, mels, lengths = zip(*items)
        L, pad = max(map(len, ids)), self.config.llm_config.pad_token_id
        return dict(input_ids=torch.tensor([r + [pad] * (L - len(r)) for r in ids]),
                    labels=torch.tensor([r + [-100] * (L - len(r)) for r in labels]),
                    input_features=torch.cat(mels), seconds=sum(map(sum, lengths)) / SAMPLE_RATE)


class Schedule(torch.utils.data.Sampler):
    """The order of training: an endless shuffled walk through n samples that depends on (seed, position) only. Deals
    batches of (index, epoch), the epoch with its fraction.

    Step s takes positions s*E ... (s+1)*E - 1, E the effective batch, dealt out over micro-steps and ranks. So
    a run can stop at any step and go on, on another number of GPUs too, and sees what it would have seen."""

    def __init__(self, n, seed, steps, effective_batch, batch_size, rank=0, world=1):
        self.n, self.seed, self.steps, self.batch_size, self.rank, self.world = n, seed, steps, batch_size, rank, world
        self.effective_batch = effective_batch
        self.order = lru_cache(maxsize=2)(lambda epoch: torch.randperm(
            n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist())

    def at(self, position):
        epoch, i = divmod(position, self.n)
        return self.order(epoch)[i], position / self.n

    def __iter__(self):
        for step in self.steps:
            first = step * self.effective_batch + self.rank * self.batch_size
            for start in range(first, (step + 1) * self.effective_batch, self.world * self.batch_size):
                yield [self.at(start + j) for j in range(self.batch_size)]


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

def main():
    parser = ArgumentParser(description="Show one sample as the model sees it.")
    parser.add_argument("--manifest", help="a JSONL file; default: the embedded corpus")
    parser.add_argument("--lang", choices=sorted(GRAMMAR), default="ru")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--wav", default="sample.wav", help="where to write the recording")
    args = parser.parse_args()
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
    batch = dataset.collate([dataset[0]])

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
