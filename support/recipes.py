"""
support/recipes.py -- the post's runs as plain tables: its datasets, the pools they make, the mixes
of pools, the presets that train on a mix; and the tiny twin of each, for a laptop.

    python data.py --mixes    # all of it in print
"""
from dataclasses import dataclass

from support.tiny import tiny_config as tiny_config  # TEMPORARY


@dataclass(frozen=True)
class Source:
    """A split of a dataset on the hub, and which of its columns holds what.

    Without a question column a row is a transcription, asked with the one prompt in model.py. (The
    original asks in other words of some sets, and evaluates with none of these.)"""
    hub: str
    split: str = "train"
    config: str | None = None
    audio: str = "audio"
    question: str = ""
    answer: str = "text"
    conversation: str = ""     # a text-only set has this column alone
    only: tuple = ()           # (columns, word): rows where one of these columns contains the word
    rows: int | None = None    # then so many, from the start
    evaluation: bool = False   # nothing is left out that has a reference, see data.parse_row

    @property
    def columns(self) -> list[str]:
        if self.conversation:
            return [self.conversation]
        return [name for name in (self.audio, self.question, self.answer) if name]

    def manifest_row(self, row: dict) -> dict:
        """A row of the dataset -> the same in the format of a manifest (data.py describes it)."""
        if self.conversation:
            turns = row[self.conversation]
            if isinstance(turns, dict):  # datasets may turn a list of dicts inside out
                turns = [dict(zip(turns, turn, strict=True))
                         for turn in zip(*turns.values(), strict=True)]
            return {"conversation": turns}
        audio = row[self.audio]
        if isinstance(audio, dict):
            audio = audio.get("bytes") or audio.get("path")
        if not self.question:
            return {"audio": audio, "text": row[self.answer]}
        return {"audio": audio, "question": row[self.question], "answer": row[self.answer]}


# -----------------------------------------------------------------------------
# Datasets make pools; inside a pool every row is as likely as any other.

def vikhr(name: str, *args, **columns) -> Source:
    return Source(f"Vikhrmodels/{name}", *args, **columns)


QA = dict(question="question", answer="answer")
POOLS = {
    "ru_audio": (   # Russian audiobooks and instructions about them
        vikhr("Speech-Instructions", **QA, rows=70_000),  # said to be Russian, but looks English
        vikhr("ToneBooks", rows=90_000),
        vikhr("AudioBooksInstructGemini2.5", **QA)),
    "en_audio": tuple(  # English recordings, speech and other sounds, and what is heard in them
        vikhr("Speech-Describe", f"500k_{part}", **QA)
        for part in ("part1_speech", "part2_speech", "part1_nonspeech", "part2_nonspeech")),
    "text": (
        vikhr("GrandMaster-PRO-MAX", conversation="conversation",
              only=(("prompt_lang", "answer_lang"), "ru"), rows=100_000),),
    "it_fresh": (   # plain transcription, 16 kHz
        vikhr("ToneBooksPlus", rows=100_000),
        vikhr("ToneSpeak", rows=100_000),
        vikhr("ToneRuLS", rows=100_000),  # has about half as many
        vikhr("ToneRuDevices", rows=50_000)),
    "long_audio": (  # minutes of fiction, and instructions about it
        Source("AlexWortega/long_audio_it_full", question="instruction", answer="response"),
        vikhr("Ficbook-Audio-Instruct-10K", **QA)),
    "pretrain": (   # Russian transcription, whole
        *(vikhr(name) for name in (
            "ToneBooksPlus", "ToneSpeak", "ToneRuLS", "ToneRuDevices", "ToneWebinars",
            "ToneRuDevicesAudiobooks", "ReadyFormatDF2")),
        vikhr("ToneGolosOpus", config="Crowd"),
        vikhr("ToneGolosOpus", config="Farfield"),
        vikhr("ToneSlavic", answer="sentence", only=(("locale",), "ru")),
        Source("bond005/podlodka_speech", answer="transcription")),
}
MIXES = {  # pool -> how often its turn comes
    "pretrain": {"pretrain": 1},
    "ru_only": {"ru_audio": 1},
    "en_only": {"en_audio": 1},
    "mixed_large": {"ru_audio": 0.5, "en_audio": 0.5},
    "ru_text_10pct": {"ru_audio": 0.9, "text": 0.1},
    "ru_text_25pct": {"ru_audio": 0.75, "text": 0.25},
    "it_fresh": {"it_fresh": 0.78, "text": 0.22},             # 350k and 100k
    "long_audio": {"ru_audio": 0.6, "text": 0.1, "long_audio": 0.3},
}
# For evaluation: the post's six splits (of Tone_Speak there are 700 rows), and spoken riddles of
# four kinds, in English. For the curriculum: noises (split Musan) and rooms (split Echo).
BENCHMARK = {
    split: vikhr("RuASRBenchmark", split, rows=1000, evaluation=True)
    for split in ("Russian_LibriSpeech", "Common_Voice_Corpus_22.0", "Tone_Webinars", "Tone_Books",
                  "Tone_Speak", "Sova_RuDevices")}
BIG_BENCH_AUDIO = Source("ArtificialAnalysis/big_bench_audio", question="category",
                         answer="official_answer", evaluation=True)
NOISE_DATASET = "Vikhrmodels/Audio_Noise_Dataset"


def describe_mixes() -> str:
    """The mixes, and what their pools are made of, to print."""
    lines = []
    for mix, shares in MIXES.items():
        parts = [f"{share:.0%} {pool}" for pool, share in shares.items()]
        lines.append(f"{mix}: {', '.join(parts)}")
    for pool, sources in POOLS.items():
        lines += ["", pool]
        for s in sources:
            config = f" ({s.config})" if s.config else ""
            only = f"; {' or '.join(s.only[0])} has {s.only[1]}" if s.only else ""
            rows = f"; {s.rows:,} rows" if s.rows else ""
            lines.append(f"  {s.hub}{config}, {s.split}: {', '.join(s.columns)}{only}{rows}")
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# Presets of train.py: what differs from its defaults, which are the first one. The steps are the
# post's; where it says nothing (warm-up, alpha, dropout) the values are ours.

PRESETS = {
    "ru_text_10pct": {},
    "pretrain": dict(mix="pretrain", init_from=None, train="adapter", lr=1e-4, steps=703),  # 90k
    "ru_only": dict(mix="ru_only", steps=1000),
    "en_only": dict(mix="en_only", steps=1172),
    "mixed_large": dict(mix="mixed_large", steps=1000),
    "ru_text_25pct": dict(mix="ru_text_25pct", steps=1000),
    "it_fresh": dict(mix="it_fresh", init_from=None, lr=1e-4, steps=2400),
    "long_audio": dict(mix="long_audio", steps=1000, max_windows=12, max_tokens=6144,
                       grad_checkpoint=True),
}
TINY = dict(embedded=True, train="scratch", encoder="", llm="", init_from=None, steps=2700,
            effective_batch=16, batch_size=16, lr=1.2e-3, min_lr=0.02, warmup=0.06, workers=0)
TWIN = TINY | dict(train="lora", init_from="out_tiny_pretrain", lora_rank=32, lora_alpha=64,
                   steps=1000, lr=2e-3)
KEEP = 20_000  # spectrograms of the tiny presets held in memory, 64 KB each


def tiny_twin(name: str) -> dict:
    """The preset on the embedded corpus: from nothing where the original starts from no
    checkpoint of Borealis, else with LoRA on the tiny pretraining run."""
    base = PRESETS[name]
    start = TINY if base.get("init_from", True) is None else TWIN
    return start | dict(mix=base.get("mix", name), steps=1000, out=f"out_tiny_{name}")


PRESETS |= {f"tiny_{name}": tiny_twin(name) for name in PRESETS}
PRESETS["tiny"] = TINY | dict(mix=None)  # Russian transcription
PRESETS["tiny_pretrain"] |= dict(lang="ru,en", steps=TINY["steps"])
PRESETS["tiny_long_audio"] |= dict(max_windows=8)
