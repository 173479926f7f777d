"""
support/tiny.py -- all of it small enough for a laptop: the pools of recipes.POOLS from the embedded
corpus; a tokenizer, a configuration and initial weights that learn them in minutes on a CPU.
"""
import random
from itertools import groupby

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import PreTrainedTokenizerFast

from model import AUDIO, MARKER, BorealisConfig, add_audio_tokens
from support.corpus import QUESTIONS, embedded_rows, held_out, sentence


def task(lang: str, text: str, rng: random.Random) -> dict:
    """A question about a text, and its answer."""
    k, words = rng.randrange(3), text.split()
    answers = words[0], words[-1], str(len(words))
    return {"question": QUESTIONS[lang][k], "answer": answers[k]}


def text_row(rng: random.Random, name: str) -> dict:
    """A task about a sentence that is read, not heard."""
    while held_out(text := sentence("ru", rng)):
        pass
    asked = {"question": "Повтори.", "answer": text}
    if rng.random() < 0.7:
        asked = task("ru", text, rng)
    turns = [{"role": "user", "content": f"{asked['question']}\n{text}"},
             {"role": "assistant", "content": asked["answer"]}]
    return {"conversation": turns, "name": name}


def long_row(group: list[dict], name: str) -> dict:
    """Several utterances as one recording."""
    return {"audio": np.concatenate([row["audio"] for row in group]),
            "text": " ".join(row["text"] for row in group), "name": name}


def tiny_pool_rows(name: str, n: int, seed: int, languages=("ru",)) -> list[dict]:
    """The tiny counterpart of a pool, from n utterances or texts. languages: of "pretrain"."""
    rng = random.Random(f"{seed} {name}")
    if name == "text":
        return [text_row(rng, f"text/{i}") for i in range(n)]
    if name == "pretrain":
        each = -(-n // len(languages))
        return [row for lang in languages for row in embedded_rows(lang, "train", each, seed)]
    lang = "en" if name == "en_audio" else "ru"
    rows = embedded_rows(lang, "train", n, seed)
    if name == "it_fresh":
        return rows
    if name == "long_audio":  # up to twelve utterances in a row
        groups = []
        while rows:
            k = rng.randint(2, 12)
            groups.append(long_row(rows[:k], f"long/{len(groups)}"))
            rows = rows[k:]
        return groups
    return [{"audio": row["audio"], "name": row["name"], **task(lang, row["text"], rng)}
            if rng.random() < 0.25 else row for row in rows]


# -----------------------------------------------------------------------------
# The tiny model

QWEN_SPLIT = (  # how Qwen3's tokenizer splits a text before BPE
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def texts_of(samples) -> list[str]:
    """What a tokenizer trains on: prompts and roles as often as the model will read them."""
    return [f"{m['role']}\n{m['content'].replace(AUDIO, '')}\n\n"
            for s in samples for m in s.messages()]


def train_tokenizer(texts, vocab_size: int = 1024):
    """BPE over `texts` -> a transformers tokenizer with our two tokens and the chat template. Any
    text can be encoded: what was never seen falls to bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = Sequence([
        Split(Regex(QWEN_SPLIT), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=ByteLevel.alphabet(), show_progress=False))
    special, plain = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<think>", "</think>")
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    bpe.add_tokens([AddedToken(token, normalized=False) for token in plain])
    return add_audio_tokens(PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False))


def print_tokens(tokenizer, ids: list[int], labels: list[int]) -> None:
    """A sample as the model sees it, equal tokens on one line."""
    print("tokens (* has a label):")
    for (token, label), run in groupby(zip(ids, labels, strict=True)):
        n, mark = len(list(run)), " " if label == -100 else "*"
        print(f"  {mark} {token:6d}  {tokenizer.decode([token])!r}" + (f" x {n}" if n > 1 else ""))
    print("the labels say:", repr(tokenizer.decode([t for t in labels if t != -100])))


def tiny_config(tokenizer, **changes) -> BorealisConfig:
    """The same classes at about 1 M parameters: windows of 2 s (T=100, N=25), width 128, 1 + 2
    layers. It trains from scratch, so nothing is frozen. changes: fields of BorealisConfig."""
    ids = tokenizer.convert_tokens_to_ids
    encoder = dict(
        d_model=128, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=512, decoder_ffn_dim=512, num_mel_bins=80,
        max_source_positions=100, vocab_size=8, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        decoder_start_token_id=0, init_std=0.08)
    llm = dict(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's CPU attention takes
        intermediate_size=512, vocab_size=len(tokenizer), max_position_embeddings=4096,
        rope_theta=10_000, initializer_range=0.08, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>"))
    settings = dict(encoder_config=encoder, llm_config=llm, frozen=(), audio_token_id=ids(AUDIO),
                    audio_start_id=ids(MARKER), audio_end_id=ids(MARKER))
    return BorealisConfig(**settings | changes)


@torch.no_grad()
def init_from_scratch(model: torch.nn.Module) -> torch.nn.Module:
    """Initial weights for a tiny model that learns to hear from nothing; returns the model. A
    pretrained encoder needs none of this.

    Plain random weights leave the sound faint, and most of a short run would go into raising
    levels. And random attention has no notion of nearness, while equal query and key projections
    make each frame look at frames like itself, in position and sound (after Trockman and Kolter
    2023, arXiv:2305.09828). docs/NEGATIVE.md has the figures."""
    model.encoder.conv1.weight *= 2.5
    model.encoder.conv2.weight *= 2
    model.adapter.w_in.weight *= 1.5
    model.adapter.w_out.weight *= 4
    for layer in model.encoder.layers:
        layer.self_attn.q_proj.weight *= 2
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model
