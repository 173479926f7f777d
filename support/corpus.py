"""support/corpus.py -- sentences of a small grammar by espeak-ng; equal seeds give equal bytes."""
import hashlib
import json
import multiprocessing
import random
import re
import zlib
from ctypes import CDLL, CFUNCTYPE, POINTER, c_int, c_long, c_short, c_void_p
from functools import lru_cache
from pathlib import Path
import numpy as np
import torch
from tqdm import tqdm
from model import SAMPLE_RATE
from support import cli, processing, recipes, rows

DATA = json.loads(Path(__file__).with_name("grammar.json").read_text(encoding="utf-8"))
GRAMMAR = DATA["grammar"]  # of each language: name -> alternatives, in which {name} draws another
NAMES = DATA["names"]  # the same of sentences with names; those of evaluation are held_out
QUESTIONS = DATA["questions"]  # about a text: its first word, its last word, how many there are
TRAIN_VOICES, EVAL_VOICES = DATA["voices"]["train"], DATA["voices"]["eval"]  # none is in both
EVAL_SPLITS, MORE_SPLITS, TRAIN_MANNERS = map(tuple, recipes.TABLES["spoken"].values())
EVAL_UTTERANCES = 250  # in each held-out split
SENTENCE_SHARE = 0.7   # of the training set; the rest is words that cannot be guessed
CHUNK = 250  # utterances spoken by one process; fixed, so that bytes do not depend on the machine

def sentence(lang: str, rng: random.Random, more=()) -> str:  # more: rules beside the grammar's
    text, rules = "{sentence}", GRAMMAR[lang] | dict(more)
    while "{" in text:  # expand the leftmost name until none is left
        text = re.sub(r"\{(\w+)\}", lambda m: rng.choice(rules[m[1]]), text, count=1)
    return text

def named(lang: str, split: str, rng: random.Random) -> str:
    """With names: new ones each time, or, for evaluation, those that training never says."""
    rules, own = NAMES[lang], set(NAMES[lang]["held_out"])
    if split == "names":
        return sentence(lang, rng, rules | dict(name=rules["held_out"]))
    while own & set((text := sentence(lang, rng, rules)).split()):
        pass
    return text

@lru_cache
def vocabulary(lang: str) -> list[str]:  # all words of a grammar, sorted
    lines = " ".join(" ".join(alternatives) for alternatives in GRAMMAR[lang].values())
    return sorted(set(re.sub(r"\{\w+\}", "", lines).split()))

def held_out(text: str) -> bool:  # for evaluation only: one text in six, whoever draws it
    return zlib.crc32(text.encode()) % 6 == 0

def fresh(lang: str, split: str, rng: random.Random, said: set) -> str:
    """A text of a split. Evaluation says held-out sentences only, and none twice."""
    training = split in ("train", "named")
    if split in ("named", "names"):
        return named(lang, split, rng)
    guessable = not training or rng.random() < SENTENCE_SHARE
    while True:
        words = [] if guessable else rng.choices(vocabulary(lang), k=rng.randint(1, 4))
        text = " ".join(words) or sentence(lang, rng)
        if held_out(text) != training and (training or text not in said):
            said.add(text)
            return text

def script(lang: str, split: str, rng: random.Random, said: set) -> list[str]:  # parts of a clip
    manner = rng.choices(*TRAIN_MANNERS)[0] if split == "train" else split
    text = fresh(lang, split, rng, said)
    words = text.split()
    if manner == "books":  # reads on: longer than a window
        return [text, fresh(lang, split, rng, said)]
    if manner == "speak" and len(words) > 1:  # stops, and says a word again
        i = rng.randrange(1, len(words))
        return [" ".join(words[:i]), " ".join(words[i - 1:])]
    return [text]

def espeak(seed: int) -> tuple:
    """espeakng-loader's -> (rate: 22,050 Hz; say: text, voice, words a minute, pitch -> int16)."""
    import espeakng_loader
    RATE, PITCH, UTF8, SYNCHRONOUS = 1, 3, 1, 2
    lib, pcm = CDLL(espeakng_loader.get_library_path()), []
    rate = lib.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
    lib.espeak_ng_SetRandSeed(c_long(seed))
    @CFUNCTYPE(c_int, POINTER(c_short), c_int, c_void_p)
    def receive(samples, n, events):
        if samples and n > 0:
            pcm.append(np.ctypeslib.as_array(samples, (n,)).copy())
        return 0
    def say(text, voice, words_per_minute, pitch):
        pcm.clear()
        raw = text.encode() + b"\0"
        lib.espeak_SetSynthCallback(receive)
        lib.espeak_SetVoiceByName(voice.encode())
        lib.espeak_SetParameter(RATE, words_per_minute, 0)
        lib.espeak_SetParameter(PITCH, pitch, 0)
        lib.espeak_Synth(raw, len(raw), 0, 1, 0, UTF8, None, None)
        return np.concatenate(pcm)
    return rate, say

def synthesise(job: tuple) -> None:
    """(lang, split, k, seed, path): speak chunk k, in a new process, for espeak-ng keeps state."""
    lang, split, k, seed, path = job
    torch.set_num_threads(1)
    rng, said = random.Random(f"{seed} {lang} {split} {k}"), set()
    rate, say = espeak(rng.randrange(1 << 30))
    speeds, pitches = ((150, 260), (15, 85)) if split == "voices" else ((190, 230), (40, 60))
    spoken = []
    for i in range(CHUNK):
        training = split in ("train", "named")
        voice = rng.choice(TRAIN_VOICES) if training else EVAL_VOICES[i % len(EVAL_VOICES)]
        parts, pieces = script(lang, split, rng, said), []
        speed, pitch = rng.randint(*speeds), rng.randint(*pitches)
        for part in parts:
            pause = rng.randrange(3000, 8000) if pieces else rng.randrange(SAMPLE_RATE // 10)
            level = 10 ** (rng.uniform(-9, 0) / 20) if len(parts) > 1 else 1
            wave = rows.load_audio(say(part, f"{lang}+{voice}", speed, pitch))
            pieces += [torch.zeros(pause), level * processing.resampler(rate, SAMPLE_RATE)(wave)]
        clip = torch.cat(pieces).clamp(-1, 1) * 32767
        spoken.append((clip.round().to(torch.int16).numpy(), " ".join(parts), voice))
    clips, texts, voices = zip(*spoken, strict=True)
    sound = dict(pcm=np.concatenate(clips), ends=np.cumsum([len(clip) for clip in clips]))
    cli.replace_file(path, lambda tmp: np.savez(tmp, **sound, texts=texts, voices=voices))

def embedded_rows(lang: str, split: str, n: int, seed: int = 0) -> list[dict]:
    """The first n rows of "train" or of one of EVAL_SPLITS, spoken now or read from the cache."""
    recipe = [GRAMMAR[lang], TRAIN_VOICES, EVAL_VOICES, SENTENCE_SHARE, TRAIN_MANNERS[1], CHUNK, 2]
    recipe += [NAMES[lang]] if split in ("named", "names") else []
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]  # 2: of synthesise
    folder = cli.cache_dir() / f"{lang}-{seed}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{split}-{k:03d}.npz" for k in range(-(-n // CHUNK))]
    jobs = [(lang, split, k, seed, str(p)) for k, p in enumerate(paths) if not p.exists()]
    if jobs:
        fresh = multiprocessing.get_context("forkserver")  # a fork of us might inherit a lock
        fresh.set_forkserver_preload(["__main__", __name__])
        with fresh.Pool(maxtasksperchild=1) as pool:
            list(tqdm(pool.imap_unordered(synthesise, jobs), f"speaking {lang} {split}", len(jobs),
                      unit_scale=CHUNK, unit=" utterances"))
            pool.close()  # or the end of the block would kill its processes, which may not listen
            pool.join()
    spoken = []
    for path in paths:
        chunk = dict(np.load(path))  # allow_pickle stays False
        clips = np.split(chunk["pcm"], chunk["ends"][:-1])
        for clip, text, voice in zip(clips, chunk["texts"], chunk["voices"], strict=True):
            name = f"{lang}-{split}/{len(spoken)}/{voice}"
            spoken.append({"audio": clip, "text": str(text), "name": name})
    return spoken[:n]
