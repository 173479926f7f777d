"""
model.py -- the whole network: a Whisper encoder listens, Qwen3 answers, an MLP adapter stands between.

    waveform -> log-mel windows -> encoder (frozen) -> 4x concat downsample -> adapter -> spliced into
    the prompt's <|AUDIO|> slots -> Qwen3 -> text

    python model.py                               # parameter counts at full size, on the meta device, no download
    python model.py export --ckpt out/ --to hf/   # an ordinary model folder: LoRA merged, this file as its remote code
    python model.py export --ckpt out/ --to hf/ --push user/name                  # and up to the hub

This file imports nothing of the project, so that it can travel inside a checkpoint as remote code.
data.py feeds it, train.py fits it, eval.py measures it.

Letters in shape comments (full size in brackets): B batch, L sequence length, W windows in the batch,
M mel bins [128], F mel frames [3000], T encoder frames [1500], N audio tokens a window [375],
E encoder width [1280], D LLM width [2560], V vocabulary [151671].
"""
import argparse
import functools
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import (CONFIG_MAPPING, AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel, Qwen3Config,
                          Qwen3ForCausalLM, WhisperConfig, WhisperFeatureExtractor, WhisperModel)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils.logging import disable_progress_bar

# -----------------------------------------------------------------------------
# Constants. 16 kHz -> hop 160 (10 ms a mel frame) -> conv stride 2 (20 ms an encoder frame) -> 4x (80 ms a token)

SAMPLE_RATE = 16_000
HOP = 160            # samples between two mel frames
CONV_STRIDE = 2      # the second convolution of Whisper's encoder halves the frame rate

AUDIO = "<|AUDIO|>"              # one placeholder per recording in a prompt, N per window inside the model
MARKER = "<|start_of_audio|>"    # stands on both sides of the audio tokens, as in the post's vLLM plugin
END = "<|end_of_audio|>"         # ends the recording in checkpoints of the original's layout, which have no <|AUDIO|>
TAG_PAIR = MARKER + END          # how the post's snippet writes a placeholder

# The pretraining prompt of the original run. One prompt for all transcription rows, in training and evaluation:
# a prompt that was never trained costs more WER than most ablations of the post differ by.
ASR_SYSTEM = "Вы полезный помощник по автоматическому распознаванию речи. Точно транскрибируйте аудио в текст."
ASR_PROMPT = f"Транскрибируйте это аудио: {AUDIO}"

# Qwen3's format with thinking switched off in *every* assistant turn, so that each turn of a training text begins
# with exactly the prompt that generation will see. Content may be a list of parts, as chat APIs send it.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type != 'text' %}{{- '<|AUDIO|>' }}
            {%- elif '<|AUDIO|>' in part.text %}
                {{- raise_exception('a text part must not hold <|AUDIO|>: send the recording as a part of its own') }}
            {%- else %}{{- part.text }}{%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{%- endif %}"""

# The two pretrained parts, and their shapes from their published configs, so that sizes can be proved offline.
ENCODER, LLM = "openai/whisper-large-v3", "Qwen/Qwen3-4B"
WHISPER_LARGE_V3 = dict(
    d_model=1280, encoder_layers=32, decoder_layers=32, encoder_attention_heads=20, decoder_attention_heads=20,
    encoder_ffn_dim=5120, decoder_ffn_dim=5120, num_mel_bins=128, max_source_positions=1500, vocab_size=51866)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # of a Qwen3 layer
QWEN3_4B = dict(
    hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    intermediate_size=9728, vocab_size=151671,  # 151669 of Qwen3's tokenizer + our two
    rope_theta=1_000_000, max_position_embeddings=40960, tie_word_embeddings=True,
    bos_token_id=151643, eos_token_id=151645, pad_token_id=151643)


class BorealisConfig(PretrainedConfig):
    """Two sub-configs and what joins them; without arguments, the full-size Borealis-5B.

    adapter: "simple" (19.7 M at full size) or "deep" (78.6 M). frozen: names of the parts that never train.

    A checkpoint that holds only what was trained says so here. trained: "adapter", "lora" or "full", see prepare(); lora:
    its rank, alpha and dropout; base: where all else comes from, see load_checkpoint(). None in a complete checkpoint.
    """
    model_type = "borealis"
    sub_configs = {"encoder_config": WhisperConfig, "llm_config": Qwen3Config}

    def __init__(self, encoder_config=None, llm_config=None, adapter="simple", downsample_factor=4,
                 adapter_layers=3, adapter_expansion=1.5, adapter_dropout=0.1, frozen=("encoder",),
                 audio_token_id=151669, audio_start_id=151670, audio_end_id=151670, trained=None, lora=None, base=None,
                 **kwargs):
        def build(cls, given, default):
            return given if isinstance(given, cls) else cls(**(default if given is None else given))
        self.encoder_config = build(WhisperConfig, encoder_config, WHISPER_LARGE_V3)
        self.llm_config = build(Qwen3Config, llm_config, QWEN3_4B)
        self.adapter = adapter
        self.downsample_factor = downsample_factor
        self.adapter_layers, self.adapter_expansion, self.adapter_dropout = (
            adapter_layers, adapter_expansion, adapter_dropout)
        self.frozen = list(frozen)
        self.audio_token_id, self.audio_start_id, self.audio_end_id = audio_token_id, audio_start_id, audio_end_id
        self.trained, self.lora, self.base = trained, lora, base
        super().__init__(**kwargs)
        self.tie_word_embeddings = self.llm_config.tie_word_embeddings

    def get_text_config(self, *args, **kwargs):
        return self.llm_config

    @property
    def window_samples(self):  # 1500 * 2 * 160 = 480,000 samples = 30 s
        return self.encoder_config.max_source_positions * CONV_STRIDE * HOP

    @property
    def new_tokens(self):
        """The tokens we added that have a row in the embedding table. In the original's layout <|AUDIO|> has none."""
        ids = {self.audio_token_id, self.audio_start_id, self.audio_end_id}
        return sorted(i for i in ids if i < self.llm_config.vocab_size)

    @property
    def tokens_per_window(self):  # ceil(1500 / 4) = 375
        return math.ceil(self.encoder_config.max_source_positions / self.downsample_factor)


def tiny_config(tokenizer, **changes):
    """The same classes at about 1 M parameters: 2 s windows (T=100, N=25), width 128, 1 + 2 layers. It trains from
    scratch, so nothing is frozen. head_dim 32 is the smallest that vLLM's CPU attention takes."""
    ids = tokenizer.convert_tokens_to_ids
    encoder = dict(d_model=128, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                   decoder_attention_heads=4, encoder_ffn_dim=512, decoder_ffn_dim=512, num_mel_bins=80,
                   max_source_positions=100, vocab_size=8, pad_token_id=0, bos_token_id=0, eos_token_id=0,
                   decoder_start_token_id=0, init_std=0.08)
    llm = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
               intermediate_size=512, vocab_size=len(tokenizer), max_position_embeddings=4096,
               rope_theta=10_000, initializer_range=0.08, tie_word_embeddings=True, bos_token_id=None,
               eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>"))
    return BorealisConfig(**{**dict(encoder_config=encoder, llm_config=llm, frozen=(), audio_token_id=ids(AUDIO),
                                    audio_start_id=ids(MARKER), audio_end_id=ids(MARKER)), **changes})


@torch.no_grad()
def init_from_scratch(model):
    """Initial weights for a tiny model that learns to hear from nothing; a pretrained encoder needs none of this.

    Plain random weights leave the sound faint: even at std 0.08 the second convolution starts at a level of 0.59, where
    training takes it to 1.91, and the adapter at 0.19 instead of 1.86. Most of a short run would go into raising
    levels. And random attention has no notion of nearness, while equal query and key projections make each frame
    look at frames like itself, in position and sound (after Trockman and Kolter 2023, arXiv:2305.09828).
    README.md, "What did not work", has the figures."""
    model.encoder.conv1.weight *= 2.5
    model.encoder.conv2.weight *= 2
    model.adapter.w_in.weight *= 1.5
    model.adapter.w_out.weight *= 4
    for layer in model.encoder.layers:
        layer.self_attn.q_proj.weight *= 2
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model


# -----------------------------------------------------------------------------
# From text and waveforms to what the network takes: one prompt builder, one window cutter, for everybody

def add_audio_tokens(tokenizer, original=False):
    """Append our two tokens (ids 151669 and 151670 on Qwen3) and set the chat template; returns the tokenizer.

    original: the original's start and end (151669 and 151670), then <|AUDIO|>, which only marks slots and needs no row."""
    # Not additional_special_tokens=[...]: that would replace the tokenizer's own list instead of extending it.
    from tokenizers import AddedToken
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False)
                          for t in ((MARKER, END, AUDIO) if original else (AUDIO, MARKER))], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def place_audio(prompt, recordings):
    """The user's text with exactly one <|AUDIO|> per recording; raises ValueError if the counts disagree."""
    prompt = prompt.replace(TAG_PAIR, AUDIO)
    if AUDIO not in prompt:  # nobody said where: in front of the question, each recording on its own line
        prompt = "\n".join([AUDIO] * recordings + [prompt])
    if prompt.count(AUDIO) != recordings:
        raise ValueError(f"the prompt has {prompt.count(AUDIO)} {AUDIO} placeholders for {recordings} recordings")
    return prompt


def build_ids(tokenizer, config, messages, windows=()):
    """The one prompt builder: chat messages -> (ids, labels), two lists of equal length.

    messages: [{"role": "system" | "user" | "assistant", "content": str}, ...]. If the last one is the user's, the
    ids end where generation starts. windows: windows in each recording, in the order of the placeholders.
    Labels are -100 except on each assistant turn's text and its end token. An answer is tokenised on its own, so
    that the generation prompt is a prefix of the training text in tokens, not only in characters.
    """
    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    messages = [{**m, "content": m["content"].strip()} if m["role"] == "assistant" else m for m in messages]
    stops = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if messages[-1]["role"] != "assistant":
        stops.append(len(messages))
    ids, labels, done = [], [], ""
    for i in stops:  # at every assistant turn: the prompt up to it (no labels), then what it says (labels)
        prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, tokenize=False)
        assert prompt.startswith(done), f"the chat template rewrites history: {done!r} does not begin {prompt!r}"
        new = encode(prompt[len(done):])
        ids, labels = ids + new, labels + [-100] * len(new)
        if i < len(messages):
            new = encode(messages[i]["content"]) + [tokenizer.convert_tokens_to_ids("<|im_end|>")]
            ids, labels = ids + new, labels + new
            done = prompt + messages[i]["content"] + "<|im_end|>"

    out_ids, out_labels, counts = [], [], iter(windows)
    for token, label in zip(ids, labels):  # <|AUDIO|> -> marker, N x windows slots, marker
        if token == config.audio_token_id:
            n = config.tokens_per_window * next(counts)
            span = [config.audio_start_id, *[config.audio_token_id] * n, config.audio_end_id]
        else:
            span = [token]
        out_ids += span
        out_labels += [label] if len(span) == 1 else [-100] * len(span)
    return out_ids, out_labels


def check_wave(wave):
    """A 1-D float32 tensor from whatever holds one recording at 16 kHz; ValueError says what is wrong with it.

    The one rule of level, for training, evaluation and serving: a recording that passes 1 is turned down as a whole until
    it does not, and no other is touched. Nothing is ever clipped, and how loud somebody speaks stays audible."""
    wave = torch.as_tensor(wave)
    if wave.dim() != 1 or not wave.is_floating_point():
        raise ValueError(f"audio must be a 1-D float array at 16 kHz, got {wave.dtype} of shape {tuple(wave.shape)}")
    if wave.numel() == 0:
        raise ValueError("audio is empty")
    if not torch.isfinite(wave).all():
        raise ValueError("audio holds NaN or Inf")
    peak = wave.abs().max()
    if peak > 100:  # beyond any float recording; squared, it would overflow the mel and poison the batch
        raise ValueError(f"audio reaches {peak:.3g}: scale it to [-1, 1]")
    return (wave.float() / peak.float().clamp(min=1)).cpu()


def cut_windows(wave, config):
    """(samples,) -> list of <= 30 s pieces; exactly 30 s is one window, 30 s and one sample are two."""
    return list(wave.split(config.window_samples))


def cut_at_pauses(wave, longest):
    """(samples,) -> list of pieces of at most `longest` samples, cut at the quietest 0.2 s of each piece's second half."""
    pieces, span = [], SAMPLE_RATE // 5
    while len(wave) > longest:
        end = min(longest, len(wave) - SAMPLE_RATE // 2)  # leave no sliver, in which a model would invent words
        power = wave[min(longest // 2, end - span):end].unfold(0, span, HOP).square().mean(1)
        cut = end - span // 2 - HOP * int(power.flip(0).argmin())  # of equally quiet places the last
        pieces.append(wave[:cut])
        wave = wave[cut:]
    return [*pieces, wave]


@functools.lru_cache
def feature_extractor(mel_bins, seconds):
    return WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=seconds)


def log_mel(pieces, config):
    """List of W waveforms, each at most a window -> (W, M, F) log-mel, padded as Whisper expects."""
    M, frames = config.encoder_config.num_mel_bins, config.window_samples // HOP
    if not pieces:
        return torch.zeros(0, M, frames)
    assert config.window_samples % SAMPLE_RATE == 0, "WhisperFeatureExtractor wants whole seconds"
    mel = feature_extractor(M, config.window_samples // SAMPLE_RATE)(
        [p.numpy() for p in pieces], sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    assert mel.shape[1:] == (M, frames), f"mel is {tuple(mel.shape)}, the encoder wants (W, {M}, {frames})"
    return mel


# -----------------------------------------------------------------------------
# The two modules that are ours

def downsample(x, k):
    """Lay k neighbouring frames side by side: (W, T, E) -> (W, ceil(T/k), k*E), zero-padded at the end.

    Not a convolution and not an average: a view. Nothing is lost, the adapter decides what to keep."""
    W, T, E = x.shape
    x = F.pad(x, (0, 0, 0, -T % k))                    # (W, T', E), T' a multiple of k
    return x.reshape(W, x.shape[1] // k, k * E)        # (1500, 1280) -> (375, 5120)


class Adapter(nn.Module):
    """Downsampled audio frames (..., k*E) -> LLM embeddings (..., D), no biases.

    simple: Linear(5120, 2560) -> GELU -> Linear(2560, 2560), 19,660,800 weights.
    deep:   three residual blocks of LayerNorm -> 2560 -> 3840 -> 2560 between the two projections,
            78,643,200 weights and four LayerNorms.
    """

    def __init__(self, config):
        super().__init__()
        d_in, D = config.encoder_config.d_model * config.downsample_factor, config.llm_config.hidden_size
        assert config.adapter in ("simple", "deep"), f"adapter is {config.adapter!r}: choose simple or deep"
        self.deep = config.adapter == "deep"
        self.w_in = nn.Linear(d_in, D, bias=False)
        self.w_out = nn.Linear(D, D, bias=False)
        if self.deep:
            inner = int(D * config.adapter_expansion)
            self.blocks = nn.ModuleList(nn.Sequential(
                nn.LayerNorm(D), nn.Linear(D, inner, bias=False), nn.GELU(), nn.Dropout(config.adapter_dropout),
                nn.Linear(inner, D, bias=False), nn.Dropout(config.adapter_dropout),
            ) for _ in range(config.adapter_layers))
            self.norm = nn.LayerNorm(D)

    def forward(self, x):
        x = self.w_in(x)                               # (..., k*E) -> (..., D)
        if not self.deep:
            return self.w_out(F.gelu(x))
        for block in self.blocks:
            x = x + block(x)
        return self.w_out(self.norm(x))


# -----------------------------------------------------------------------------
# The model

class BorealisForConditionalGeneration(PreTrainedModel):
    """encoder.* (Whisper), adapter.* (ours), llm.* (Qwen3). Build it from a config (random weights), from_parts
    (two pretrained models) or from_pretrained (a checkpoint of train.py)."""
    config_class = BorealisConfig
    _supports_sdpa = True
    _no_split_modules = ["WhisperEncoderLayer", "Qwen3DecoderLayer"]

    def __init__(self, config, encoder=None, llm=None):
        super().__init__(config)
        self.encoder = WhisperEncoder(config.encoder_config) if encoder is None else encoder
        self.adapter = Adapter(config)
        self.llm = Qwen3ForCausalLM(config.llm_config) if llm is None else llm
        self.new_rows = None
        self._tokenizer = None
        self.post_init()
        self.freeze(*config.frozen)

    def _init_weights(self, module):
        if isinstance(module, Adapter):  # the other parts come with their own initialisers
            for m in module.modules():
                if isinstance(m, nn.Linear):
                    nn.init.xavier_uniform_(m.weight)

    @classmethod
    def from_parts(cls, encoder, llm, dtype=None, **config):
        """Whisper and Qwen3 by hub name or local path (any size of each), a fresh adapter between them.

        dtype: None leaves every part as it is stored."""
        dtype = "auto" if dtype is None else dtype
        tokenizer = add_audio_tokens(AutoTokenizer.from_pretrained(llm))
        whisper = part_of(WhisperModel, encoder, dtype=dtype).encoder
        qwen = part_of(Qwen3ForCausalLM, llm, dtype=dtype)
        known = min(len(tokenizer) - 2, qwen.config.vocab_size)
        qwen.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # shrinks Qwen3's padded 151,936 rows to 151,671
        for module in (qwen.get_input_embeddings(), qwen.get_output_embeddings()):
            with torch.no_grad():  # the same rows every time, so that a checkpoint need not hold what it did not train
                module.weight[known:] = module.weight[:known].float().mean(0).to(module.weight.dtype)
        ids = tokenizer.convert_tokens_to_ids
        model = cls(BorealisConfig(encoder_config=whisper.config, llm_config=qwen.config, audio_token_id=ids(AUDIO),
                                   audio_start_id=ids(MARKER), audio_end_id=ids(MARKER), **config), whisper, qwen)
        model.set_attn_implementation("sdpa")  # the parts forget theirs when they are put together, and would run eager
        model.tokenizer = tokenizer
        return model

    @classmethod
    def from_pretrained(cls, *args, device=None, **settings):
        """As everywhere in transformers; device is the post's."""
        model = super().from_pretrained(*args, **settings)
        return model if device is None else model.to(device)

    @property
    def tokenizer(self):
        if self._tokenizer is None:  # it lies beside the weights
            self._tokenizer = AutoTokenizer.from_pretrained(self.config._name_or_path)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer):
        self._tokenizer = tokenizer

    # ---- what trains. Frozen hard: no gradient, no graph, and eval mode survives model.train()

    def freeze(self, *parts):
        self.config.frozen = list(parts)
        for part in parts:
            getattr(self, part).requires_grad_(False)
        return self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        for part in self.config.frozen:
            # Layers in eval mode would skip gradient checkpointing; a Qwen3 without dropout computes the same in both.
            getattr(self, part).train(mode and part == "llm" and self.llm.is_gradient_checkpointing)
        return self

    def prepare(self, trained, lora=None):
        """Freeze all but what is to train, and give that fp32. adapter: only that. lora: the adapter, low-rank matrices beside
        every linear of the LLM (peft), and the embedding rows of our new tokens. full: adapter and LLM."""
        self.config.trained, self.config.lora = trained, lora
        self.freeze("encoder", *(["llm"] if trained == "adapter" else []))
        if trained == "lora":
            peft = importlib.import_module("peft")  # not by import: transformers would want it of all who load this file from the hub
            peft.inject_adapter_in_model(peft.LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"],
                                               target_modules=LINEARS), self.llm)
            for module in self.llm.modules():  # autocast casts; peft's own cast to fp32 would keep two more copies of each input
                if hasattr(module, "cast_input_dtype_enabled"):
                    module.cast_input_dtype_enabled = False
            # Not peft's trainable_token_indices: it copies the whole table (776 MB) for every forward, twice.
            self.new_rows = nn.Parameter(self.llm.get_input_embeddings().weight[self.config.new_tokens].detach())
        for p in self.stored().values():
            p.data = p.data.float()
        return self

    @torch.no_grad()
    def merge(self, dtype):
        """Undo prepare: what was learned goes into the weights themselves, each rounded to dtype once."""
        if self.config.trained == "lora":
            layer = importlib.import_module("peft.tuners.lora").LoraLayer
            for name, module in [m for m in self.llm.named_modules() if isinstance(m[1], layer)]:
                base, delta = module.get_base_layer(), module.get_delta_weight("default")
                base.weight.copy_(base.weight.float() + delta.float())
                self.llm.set_submodule(name, base)
            table = self.llm.get_input_embeddings().weight
            table[self.config.new_tokens] = self.new_rows.to(table.dtype)
            self.new_rows = None
            del self.llm.peft_config
        self.config.trained = self.config.lora = self.config.base = None
        return self.cast(dtype).requires_grad_(True).freeze("encoder")

    def cast(self, dtype):
        """Weights to dtype. Not .to(dtype): that rounds the rotary frequencies too, and far positions go astray by radians."""
        for p in self.parameters():
            p.data = p.data.to(dtype)
        return self

    def stored(self):
        """{name: tensor} of what a checkpoint holds: what trains, or all of it if the model has no base."""
        if self.config.trained:
            return {name: p for name, p in self.named_parameters() if p.requires_grad}
        tied = {"llm.lm_head.weight"} if self.config.tie_word_embeddings else set()
        return {name: p for name, p in self.state_dict().items() if name not in tied}

    @torch.no_grad()
    def load_stored(self, tensors, where):
        """Copy a checkpoint's tensors into stored(), strictly. Raises ValueError."""
        mine = self.stored()
        complain(where, missing=mine.keys() - tensors.keys(), unexpected=tensors.keys() - mine.keys(),
                 mismatched=[k for k in mine.keys() & tensors.keys() if mine[k].shape != tensors[k].shape])
        for name, p in mine.items():
            p.copy_(tensors[name])

    # ---- forward

    def encode_audio(self, input_features):
        """(W, M, F) log-mel -> (W, N, D) embeddings; W is 0 for a text-only batch."""
        frozen, shape = "encoder" in self.config.frozen, self.config.encoder_config
        x = input_features.to(self.encoder.conv1.weight)                  # device and dtype of the weights
        if len(x) == 0:
            # Adding to nothing is nothing, but it keeps the encoder's weights in the graph: DDP waits for a gradient
            # from every trained parameter, and a text-only batch must send its zeros.
            x = x.new_zeros(0, shape.max_source_positions, shape.d_model)
            x = x + sum(p.sum() for p in self.encoder.parameters() if p.requires_grad)
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                x = self.encoder(x).last_hidden_state                     # (W, T, E)  [W, 1500, 1280]
        x = downsample(x, self.config.downsample_factor)                  # (W, N, kE) [W, 375, 5120]
        return self.adapter(x.to(self.adapter.w_in.weight.dtype))         # (W, N, D)  [W, 375, 2560]

    def embed(self, input_ids, input_features):
        """The one splice: token embeddings (B, L, D), with the audio slots filled in reading order."""
        slots = input_ids == self.config.audio_token_id                   # (B, L); the table may have no row for it
        embeds = self.llm.get_input_embeddings()(input_ids.masked_fill(slots, 0))  # (B, L, D)
        if self.new_rows is not None:
            for token, row in zip(self.config.new_tokens, self.new_rows):
                embeds = torch.where((input_ids == token).unsqueeze(-1), row.to(embeds.dtype), embeds)
        if input_features is None:
            return embeds
        audio = self.encode_audio(input_features)                         # (W, N, D)
        assert slots.sum() == audio.shape[0] * audio.shape[1], \
            f"{slots.sum()} audio slots in the prompts for {audio.shape[0]} windows of {audio.shape[1]} tokens"
        return embeds.masked_scatter(slots.unsqueeze(-1), audio.to(embeds.dtype))

    def logits(self, hidden):
        """(..., D) -> (..., V)."""
        logits = self.llm.lm_head(hidden)
        if self.new_rows is not None and self.llm.config.tie_word_embeddings:  # input rows are output rows
            logits[..., self.config.new_tokens] = F.linear(hidden, self.new_rows).to(logits.dtype)
        return logits

    def forward(self, input_ids, input_features=None, attention_mask=None, labels=None, num_items_in_batch=None,
                **kwargs):
        """Logits everywhere; or, with labels, the summed cross-entropy over num_items_in_batch (default: this
        batch's label tokens) and logits (labels, V) at the label positions only: a 30 s clip would otherwise pay for
        ~400 x 151,671 logits that nobody reads.

        Training pads on the right and passes no attention_mask: under causal attention no real token sees what
        comes after it, and the mask-free path is the fast one."""
        hidden = self.llm.model(inputs_embeds=self.embed(input_ids, input_features), attention_mask=attention_mask,
                                use_cache=False, **kwargs).last_hidden_state  # (B, L, D)
        if labels is None:
            return CausalLMOutputWithPast(logits=self.logits(hidden))
        targets = labels[:, 1:]                                           # position t predicts token t+1
        keep = targets != -100                                            # (B, L-1)
        logits = self.logits(hidden[:, :-1][keep])                         # (labels, V)
        loss = F.cross_entropy(logits.float(), targets[keep], reduction="sum")
        return CausalLMOutputWithPast(loss=loss / (keep.sum() if num_items_in_batch is None else num_items_in_batch),
                                      logits=logits)

    # ---- generation

    @property
    def ends(self):
        """Ids that end an answer."""
        return self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])

    def generate(self, audio=None, user_prompt=ASR_PROMPT, system_prompt=ASR_SYSTEM, **settings):
        """Answer about recordings; returns the new token ids only, (B, <= max_new_tokens), padded at the end.

        audio: 1-D float array or tensor at 16 kHz, [-1, 1]; or a list of them, one a prompt (a prompt with several
        <|AUDIO|> takes as many); or a list of lists; or None for text only. user_prompt: a string for all or a list.
        settings: see chat. Raises ValueError on unusable audio or prompts."""
        groups, prompts = pair_up(audio, user_prompt)
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return self.chat([[*system, {"role": "user", "content": place_audio(p, len(g))}]
                          for g, p in zip(groups, prompts)], groups, **settings)

    @torch.no_grad()
    def chat(self, conversations, recordings, max_new_tokens=256, do_sample=False, **sampling):
        """B lists of messages that end with the user's, and B lists of recordings for their <|AUDIO|> slots -> new ids.

        Greedy unless do_sample; then temperature, top_p, ... go to transformers. Batched = single, to the token, in
        float32: rows are padded on the left, and no padding is attended to."""
        rows, pieces = [], []
        for messages, waves in zip(conversations, recordings):
            windows = [cut_windows(check_wave(w), self.config) for w in waves]
            rows.append(build_ids(self.tokenizer, self.config, messages, map(len, windows))[0])
            pieces += sum(windows, [])
        pad, L = self.config.llm_config.pad_token_id, max(map(len, rows))
        ids = torch.tensor([[pad] * (L - len(r)) + r for r in rows], device=self.device)
        mask = torch.tensor([[0] * (L - len(r)) + [1] * len(r) for r in rows], device=self.device)
        settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=do_sample, pad_token_id=pad,
                                    eos_token_id=self.ends, **sampling)
        embeds = self.embed(ids, log_mel(pieces, self.config) if pieces else None)
        return self.llm.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=settings)

    def decode(self, ids):
        """1-D ids -> str; 2-D -> list of str. Special tokens and padding are dropped."""
        if torch.as_tensor(ids).dim() == 2:
            return [self.decode(row) for row in ids]
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def pair_up(audio, user_prompt):
    """audio and user_prompt as generate takes them -> (list of lists of recordings, list of prompts)."""
    shared = isinstance(user_prompt, str)
    if audio is None:
        groups = [[]] * (1 if shared else len(user_prompt))
    elif not isinstance(audio, (list, tuple)):
        groups = [[audio]]
    elif any(isinstance(a, (list, tuple)) or a is None for a in audio):
        groups = [list(a) if isinstance(a, (list, tuple)) else [] if a is None else [a] for a in audio]
    else:  # flat: as many a sample as the prompt has placeholders
        k = max(1, user_prompt.replace(TAG_PAIR, AUDIO).count(AUDIO)) if shared else 1
        groups = [list(audio[i:i + k]) for i in range(0, len(audio), k)]
    prompts = [user_prompt] * len(groups) if shared else list(user_prompt)
    if not groups or len(groups) != len(prompts):
        raise ValueError(f"{len(groups)} samples for {len(prompts)} prompts: give one prompt, or one a sample")
    return groups, prompts


AutoConfig.register(BorealisConfig.model_type, BorealisConfig, exist_ok=True)  # so that AutoTokenizer knows a checkpoint


# -----------------------------------------------------------------------------
# Checkpoints. Complete ones load by themselves; a run's hold what was trained and name the rest. All loading is strict, and
# nothing is unpickled that could execute.

def complain(where, **kinds):
    """Raise a ValueError that names the keys, if there are any."""
    for kind, keys in kinds.items():
        if keys := sorted(str(k[0] if isinstance(k, tuple) else k) for k in keys):
            raise ValueError(f"the weights in {where} do not fit: {kind} keys {', '.join(keys[:3])}"
                             + (f" and {len(keys) - 3} more" if len(keys) > 3 else ""))


def part_of(cls, where, **settings):
    """cls.from_pretrained, refusing any other kind of model and any key that does not fit."""
    kind = AutoConfig.from_pretrained(where).model_type
    if kind != cls.config_class.model_type:
        raise ValueError(f"{where} is a {kind} model, not {cls.config_class.model_type}")
    try:
        model, info = cls.from_pretrained(where, output_loading_info=True, **settings)
    except SafetensorError as e:
        raise ValueError(f"the weights in {where} are broken: {e}") from None
    head = "proj_out."  # Whisper's own output head, which WhisperModel does not have
    complain(where, missing=info["missing_keys"], unexpected=[k for k in info["unexpected_keys"] if not k.startswith(head)])
    return model


def newest_step(folder):
    """A run's folder -> its newest step-*; any other folder -> itself."""
    steps = [p for p in Path(folder).glob("step-*") if p.name[5:].isdigit()]
    return max(steps, key=lambda p: int(p.name[5:])) if steps and not (Path(folder) / "config.json").exists() else Path(folder)


def find_checkpoint(where):
    """A run's folder, any other folder, or owner/name on the hub -> the folder with its files. Raises ValueError."""
    folder = Path(where)
    if not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(where)) and not folder.parent.exists():
        from huggingface_hub import snapshot_download
        try:
            return Path(snapshot_download(str(where), allow_patterns=["*.json", "*.safetensors", "*.bin", "*.txt", "*.jinja", "*.py"]))
        except Exception as e:  # it fails in many ways, and none of them is ours
            raise ValueError(f"cannot fetch the checkpoint {where} from the hub ({type(e).__name__}): go online (a gated one "
                             "wants HF_TOKEN), or name a local folder") from None
    return newest_step(folder)


def fingerprint(folder):
    """Short hash of a folder's weight files, from their names, sizes and some of their bytes."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".bin")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as f:
            for i in range(64):
                f.seek(size * i // 64)
                digest.update(f.read(4096))
    return digest.hexdigest()[:16]


def read_weights(folder):
    """All tensors of a folder, safetensors or .bin, in one file or in shards."""
    from safetensors.torch import load_file
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"no checkpoint in {folder}: it holds neither model.safetensors nor pytorch_model.bin; train one with "
                         "python train.py --preset tiny")
    tensors = {}
    for file in files:
        try:
            tensors |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True, mmap=True)
        except Exception as e:  # pickle's and safetensors' own kinds
            raise ValueError(f"{file} is not a file of plain tensors ({type(e).__name__}); it was not loaded") from None
    return tensors


def load_checkpoint(where, encoder=ENCODER, llm=LLM, dtype=None):
    """Any checkpoint -> a complete model with its tokenizer, LoRA merged. Raises ValueError or OSError, in one line.

    where: a folder of train.py or of export, or one in the original's layout (encoder.*, adapter.*, llm.*), or a hub name.
    encoder, llm: names or folders that the original's layout takes its configs and tokenizer from. dtype: None leaves
    weights as they are stored."""
    folder = find_checkpoint(where)
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text()) if path.is_file() else {}
        kind = settings.get("model_type", BorealisConfig.model_type)
    except (ValueError, AttributeError):
        raise ValueError(f"cannot load {folder}: its config.json is broken; train again or fetch it again") from None
    if kind != BorealisConfig.model_type and kind in CONFIG_MAPPING:
        raise ValueError(f"{folder} holds a {kind} model, no Borealis")
    if "encoder_config" not in settings:
        return load_original(folder, encoder, llm, dtype)
    config, tokenizer = BorealisConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if config.base is None:
        model = assemble(config, read_weights(folder), dtype, folder)
    else:
        model = load_base(folder, config, dtype)
        dtype = model.llm.dtype
        model.prepare(config.trained, config.lora).load_stored(read_weights(folder), folder)
        model.merge(dtype)
    known = len(tokenizer) - (config.audio_token_id >= config.llm_config.vocab_size)
    if known > config.llm_config.vocab_size:
        raise ValueError(f"the tokenizer in {folder} has {known} tokens, the model {config.llm_config.vocab_size}: they are "
                         "not from the same run")
    model.tokenizer = tokenizer
    return model.eval()


def load_base(folder, config, dtype=None):
    """What the checkpoint in `folder` was trained on top of. Raises ValueError if that is gone, or another by now."""
    # Local folders are named as seen from this one, so that a run and its base can move together.
    base = {k: str((folder / v).resolve()) if v and (folder / v).exists() else v for k, v in config.base.items()}
    if gone := [v for v in base.values() if v and v.startswith("..")]:
        raise ValueError(f"{folder} was trained on top of {folder / gone[0]}, which is gone: bring it back")
    if not base["checkpoint"]:
        return BorealisForConditionalGeneration.from_parts(base["encoder"], base["llm"], dtype, adapter=config.adapter)
    place = find_checkpoint(base["checkpoint"])
    if fingerprint(place) != base["fingerprint"]:
        raise ValueError(f"{folder} was trained on top of {place}, which has changed since: bring the old one back")
    return load_checkpoint(place, base["encoder"], base["llm"], dtype)


def assemble(config, tensors, dtype, where):
    """Config and tensors -> model, strictly."""
    stored_as = tensors.get("llm.model.embed_tokens.weight", next(iter(tensors.values()))).dtype
    model, info = BorealisForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype or stored_as,
        output_loading_info=True, ignore_mismatched_sizes=True)  # mismatches are refused here, with a better message
    complain(where, **{k.removesuffix("_keys"): info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")})
    return model


def load_original(folder, encoder, llm, dtype):
    """A checkpoint in the original's layout: no config of ours, its own pair of tokens."""
    tensors = read_weights(folder)
    table, head = tensors.get("llm.model.embed_tokens.weight"), tensors.pop("llm.lm_head.weight", None)
    if table is None:
        raise ValueError(f"{folder} is no checkpoint of ours nor of the original: it has no llm.model.embed_tokens.weight")
    tokenizer = AutoTokenizer.from_pretrained(folder if (folder / "tokenizer.json").exists() else llm)
    posts = AUDIO in tokenizer.get_vocab() and END not in tokenizer.get_vocab()  # the pair of the post's vLLM plugin
    ids = add_audio_tokens(tokenizer, original=not posts).convert_tokens_to_ids
    pair = [ids(MARKER), ids(MARKER if posts else END)]
    if max(pair) >= len(table):
        raise ValueError(f"{folder} has {len(table)} embedding rows, its tokens {MARKER} and {END} would be rows {pair}: "
                         "is its --llm another?")
    qwen = Qwen3Config.from_pretrained(llm)
    qwen.vocab_size = len(table)
    if qwen.tie_word_embeddings and head is not None and not torch.equal(head, table):
        raise ValueError(f"{folder}: llm.lm_head.weight differs from the embeddings, which {llm} ties together")
    if not qwen.tie_word_embeddings and head is not None:
        tensors["llm.lm_head.weight"] = head
    config = BorealisConfig(encoder_config=WhisperConfig.from_pretrained(encoder), llm_config=qwen, audio_token_id=ids(AUDIO),
                            audio_start_id=pair[0], audio_end_id=pair[1])
    model = assemble(config, tensors, dtype, folder)
    model.tokenizer = tokenizer
    return model.eval()


def export(where, to, encoder=ENCODER, llm=LLM, title=None):
    """Write a checkpoint as a complete folder that AutoModel.from_pretrained and vLLM load without this project; nothing is
    left half-written. title: what the model card calls it, the folder's name unless given. Raises ValueError."""
    if os.path.exists(to) and (not os.path.isdir(to) or os.listdir(to)):
        raise ValueError(f"{to} exists already: name a new folder with --to")
    model = load_checkpoint(where, encoder, llm)
    model.cast(model.llm.dtype)
    config, fresh = model.config, Path(f"{Path(to)}.{os.getpid()}.tmp")
    config.architectures, name = [type(model).__name__], Path(__file__).stem
    config.auto_map = {"AutoConfig": f"{name}.BorealisConfig", "AutoModel": f"{name}.{config.architectures[0]}"}
    try:
        write_folder(model, find_checkpoint(where), fresh, title or Path(to).name)
        os.replace(fresh, to)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return model


def write_folder(model, source, fresh, title):
    """The files of export()."""
    config = model.config
    model.save_pretrained(fresh, max_shard_size="5GB")
    model.tokenizer.chat_template = CHAT_TEMPLATE  # of today, which takes a server's lists of parts
    model.tokenizer.save_pretrained(fresh)
    feature_extractor(config.encoder_config.num_mel_bins, config.window_samples // SAMPLE_RATE).save_pretrained(fresh)
    # By hand: transformers refuses to write a temperature beside do_sample=False, but vLLM samples at 1 unless told not to.
    (fresh / "generation_config.json").write_text(json.dumps(dict(
        do_sample=False, temperature=0.0, eos_token_id=model.ends, pad_token_id=config.llm_config.pad_token_id), indent=2))
    shutil.copy(__file__, fresh)
    if (source / "train_config.json").is_file():  # eval.py reads there what it was made for
        shutil.copy(source / "train_config.json", fresh)
    (fresh / "README.md").write_text(model_card(model, source, title))


def model_card(model, source, name):
    """What the folder says about itself on the hub: figures, training, how to use it."""
    def read(path):
        return json.loads(path.read_text()) if path.is_file() else {}
    training = read(source / "train_config.json")
    results = read(source / "results.json") or read(source.parent / "results.json")  # of eval.py, beside the steps of a run
    rows = {results.get("run"): results} | results.get("others", {}) if results.get("task", "asr") == "asr" and results else {}
    table = [f"| WER % | {' | '.join(results['splits'])} | average |", "|---" + "|--:" * (len(results["splits"]) + 1) + "|"] if rows else [
        "Not evaluated yet."]
    table += [f"| {run} | {' | '.join(str(s['wer']) for s in r['splits'].values())} | {r['avg_wer']} |" for run, r in rows.items()]
    if rows:
        table += ["", f"Normaliser: {results.get('normalizer', 'default')}; 95 % intervals and more in the run's results.json."]
    machine = "out data_dir train_manifest device workers save_every keep log".split()  # nobody else's business
    settings = "\n".join(f"| {k} | {Path(v).name if isinstance(v, str) and (os.path.isabs(v) or os.path.exists(v)) else v} |"
                         for k, v in training.items() if v not in (None, "", False) and k not in machine)
    c = model.config
    return f"""---
language: [ru, en]
library_name: transformers
pipeline_tag: audio-text-to-text
tags: [audio, speech, automatic-speech-recognition]
---
# {name}

An audio language model: a Whisper encoder ({c.encoder_config.encoder_layers} layers), every {c.downsample_factor} of its frames side by
side, a {c.adapter} adapter, and Qwen3 ({c.llm_config.num_hidden_layers} layers). {count(model):,} parameters, {model.dtype}. A window is
{c.window_samples / SAMPLE_RATE:g} s of sound and takes {c.tokens_per_window} tokens; longer recordings take several.

```python
import soundfile, torch
from transformers import AutoModel

model = AutoModel.from_pretrained("{name}", trust_remote_code=True, device="cuda" if torch.cuda.is_available() else "cpu")
wave, rate = soundfile.read("audio.wav", dtype="float32")  # mono, 16 kHz
output = model.generate(audio=wave, user_prompt="О чём говорится в этом аудио? {TAG_PAIR}",
                        system_prompt="Ты полезный голосовой ассистент.", max_new_tokens=256)
print(model.decode(output[0]))
```

Without a prompt, `model.generate(audio=wave)` transcribes.

## Results

{chr(10).join(table)}

## Training

{f"| setting | value |{chr(10)}|---|---|{chr(10)}{settings}" if settings else "Not recorded."}
"""


def push(folder, name):
    """Upload a folder as user/name. Raises ValueError."""
    from huggingface_hub import HfApi
    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        return api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as e:  # it fails in many ways, and none of them is ours
        raise ValueError(f"{folder} is written, but not pushed to {name} ({type(e).__name__}): go online, set HF_TOKEN to a token that "
                         f"may write there, and run hf upload {name} {folder}") from None


# -----------------------------------------------------------------------------

def count(module, trained_only=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)


def main():
    parser = argparse.ArgumentParser(description="Sizes at full size; or export a checkpoint as a complete folder.")
    commands = parser.add_subparsers(dest="command")
    command = commands.add_parser("export")
    command.add_argument("--ckpt", default="out", help="a run's folder, or a step of it")
    command.add_argument("--to", required=True, help="new folder")
    command.add_argument("--push", metavar="USER/NAME", help="also upload it to the hub")
    command.add_argument("--encoder", default=ENCODER, help="what a checkpoint in the original's layout was made of")
    command.add_argument("--llm", default=LLM)
    args = parser.parse_args()
    if args.command == "export":
        disable_progress_bar()
        try:
            model = export(args.ckpt, args.to, args.encoder, args.llm, args.push)
            link = push(args.to, args.push) if args.push else None
        except (ValueError, OSError) as e:
            print(f"error: {str(e).splitlines()[0]}", file=sys.stderr)
            return 2
        print(f"{args.to} holds {count(model):,} parameters in {model.dtype}, LoRA merged")
        if args.push:
            print(f"pushed: {link}")
        return 0
    for adapter in ("simple", "deep"):
        with torch.device("meta"):  # shapes without memory
            model = BorealisForConditionalGeneration(BorealisConfig(adapter=adapter))
        sizes = ", ".join(f"{n} {count(m):,}" for n, m in model.named_children())
        print(f"adapter={adapter}: {sizes}, total {count(model):,}")
        for kind in ("adapter", "lora", "full"):
            with torch.device("meta"):
                model = BorealisForConditionalGeneration(BorealisConfig(adapter=adapter)).prepare(
                    kind, dict(rank=256, alpha=512, dropout=0))
            print(f"  --train {kind}: {count(model, trained_only=True):,} trained")


if __name__ == "__main__":
    sys.exit(main())
