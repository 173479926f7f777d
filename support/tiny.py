"""support/tiny.py -- pools, tokenizer, configuration, initial weights: small enough for a CPU."""
import random
from itertools import islice
import numpy as np
import torch
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from model import AUDIO, MARKER, BorealisConfig, BorealisForConditionalGeneration
from support.checkpoint import add_audio_tokens
from support.corpus import QUESTIONS, embedded_rows, held_out, named, sentence
from support.recipes import TABLES

def task(lang: str, text: str, rng: random.Random) -> dict:  # question, answer
    k, words = rng.randrange(3), text.split()
    return {"question": QUESTIONS[lang][k], "answer": (words[0], words[-1], str(len(words)))[k]}

def read_row(pool: str, lang: str, rng: random.Random) -> dict:  # of text that is not heard
    if pool == "repeat":  # names, to copy
        text = " ".join(named(lang, "named", rng).split()[-1] for _ in range(rng.randint(1, 6)))
    else:
        while held_out(text := sentence("ru", rng)):
            pass
    asked = {"question": "Повтори.", "answer": text}
    if pool == "text" and rng.random() < 0.7:
        asked = task("ru", text, rng)
    return {"conversation": [{"role": "user", "content": f"{asked['question']}\n{text}"},
                             {"role": "assistant", "content": asked["answer"]}]}

def tiny_pool_rows(name: str, n: int, seed: int, languages=("ru",)) -> list[dict]:
    """The tiny counterpart of a pool, from n utterances or texts. languages: of "pretrain"."""
    rng = random.Random(f"{seed} {name}")
    if name in ("text", "repeat"):
        return [read_row(name, languages[0], rng) | {"name": f"{name}/{i}"} for i in range(n)]
    if name != "pretrain":
        languages = ["en" if name == "en_audio" else "ru"]
    each = -(-n // len(languages))
    split = "named" if name == "names" else "train"
    rows = [row for lang in languages for row in embedded_rows(lang, split, each, seed)]
    if name in ("pretrain", "it_fresh", "names"):
        return rows
    if name == "long_audio":  # up to twelve utterances in a row as one recording
        long, rest = [], iter(rows)
        while group := list(islice(rest, rng.randint(2, 12))):
            long.append({"audio": np.concatenate([r["audio"] for r in group]),
                         "text": " ".join(r["text"] for r in group), "name": f"long/{len(long)}"})
        return long
    return [{"audio": row["audio"], "name": row["name"], **task(*languages, row["text"], rng)}
            if rng.random() < 0.25 else row for row in rows]

def texts_of(samples) -> list[str]:  # with prompts and roles as often as the model reads them
    return [f"{m['role']}\n{m['content'].replace(AUDIO, '')}\n\n"
            for s in samples for m in s.messages()]

def train_tokenizer(texts, vocab_size: int = 1024):
    """BPE over `texts`, split as Qwen3 splits -> a tokenizer with our two tokens and template."""
    bpe = Qwen2Tokenizer().backend_tokenizer
    bpe.model = models.BPE()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    bpe.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, **TABLES["tiny_tokenizer"])
    return add_audio_tokens(fast)

def tiny_config(tokenizer, layers: int = 2, **changes) -> BorealisConfig:
    """About 1 M parameters, none frozen: windows of 2 s (T=100, N=25), width 128, 1 + 2 layers."""
    audio, marker = tokenizer.convert_tokens_to_ids([AUDIO, MARKER])
    llm = TABLES["tiny_llm"] | dict(vocab_size=len(tokenizer), num_hidden_layers=layers,
                                    eos_token_id=tokenizer.eos_token_id,
                                    pad_token_id=tokenizer.pad_token_id)
    own = dict(encoder_config=dict(TABLES["tiny_encoder"]), llm_config=llm, frozen=(),
               audio_token_id=audio, audio_start_id=marker, audio_end_id=marker)
    return BorealisConfig(**own | changes)

@torch.no_grad()
def scratch_model(samples, vocab_size: int, **changes) -> BorealisForConditionalGeneration:
    """A tiny model, its tokenizer trained on the samples."""
    tokenizer = train_tokenizer(texts_of(samples), vocab_size)
    model = BorealisForConditionalGeneration(tiny_config(tokenizer, **changes))
    model.tokenizer = tokenizer
    for name, scale in TABLES["tiny_scales"].items():
        model.get_submodule(name).weight *= scale
    for layer in model.encoder.layers:  # equal queries and keys: frames find their like
        layer.self_attn.q_proj.weight *= 2
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)  # arXiv:2305.09828
    return model
