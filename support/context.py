"""support/context.py -- words that may be said, told beforehand: how training learns to use them.
Of a share of the transcripts the system prompt gets model.with_context()'s sentence: with some of
their rare words among others, or in one of three others alone, so that it is never the answer."""
import re
from collections import Counter
from dataclasses import replace
from random import Random
from data import HubSamples, Sample
from model import ASR_PROMPT, ASR_SYSTEM, with_context
from support import corpus, recipes, rows

TEXTS, RARE, MOST = recipes.TABLES["told"].values()

def parse(words: str) -> list[str]:  # separated by commas, of --context or a client. ValueError
    return [word for word in map(str.strip, rows.check_text(words, empty=True).split(",")) if word]

def tell(sample: Sample, words: list[str]) -> Sample:
    return replace(sample, system=with_context(sample.system, words))

def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_][\w-]*", text)

def texts_of(part) -> list[str]:  # of a pool's transcripts
    step = max(1, len(part) // TEXTS)
    if not isinstance(part, HubSamples):
        some = (part[i] for i in range(0, len(part), step))
        return [s.answer for s in some if s.question == ASR_PROMPT]
    if part.source.question or part.source.conversation:
        return []
    return part.table.select_columns(part.source.answer)[::step][part.source.answer]

class Context:
    """context(sample, epoch, i): the sample, in `share` of cases with a list of words."""
    def __init__(self, pools, share: float, seed: int):
        self.share, self.seed = share, seed
        parts = [part for pool in pools for part in getattr(pool, "datasets", [pool])]
        texts = [text for part in parts for text in texts_of(part) if isinstance(text, str)]
        self.counts = Counter(word for text in texts for word in words_of(text))
        self.limit = max(1, RARE * self.counts.total())
        self.rare = sorted(filter(self.is_rare, self.counts))
    def is_rare(self, word: str) -> bool:
        return len(word) > 2 and self.counts[word] <= self.limit
    def __call__(self, sample: Sample, epoch: float, i: int) -> Sample:
        rng = Random(f"{self.seed} {int(epoch)} {i}")
        asked = sample.system, sample.question
        if rng.random() >= self.share or asked != (ASR_SYSTEM, ASR_PROMPT):
            return sample
        own = sorted(set(filter(self.is_rare, words_of(sample.answer))))
        helps = own and rng.random() < 2 / 3
        told = rng.sample(own, rng.randint(1, len(own))) if helps else []
        n = max(not helps, int((MOST + 1) * rng.random() ** 3))  # mostly few: easier to learn from
        others = rng.sample(self.rare, min(len(self.rare), n))
        told += [word for word in others if word not in own]
        rng.shuffle(told)
        return tell(sample, told) if told else sample

def told(lang: str, split: str, samples: list[Sample], seed: int) -> list[Sample]:
    """Ten of the held-out names, told beforehand: "names_context" with those that are said."""
    names, rng, new = corpus.NAMES[lang]["held_out"], Random(seed), []
    for s in samples:
        own = [name for name in names if name in s.answer.split()]
        words = rng.sample([name for name in names if name not in own], 10)
        if split == "names_context":
            words = own + words[len(own):]
        rng.shuffle(words)
        new.append(replace(tell(s, words), name=f"{s.name}/{split}"))
    return new
