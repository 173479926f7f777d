"""model.py -- Borealis, an open audio LLM: a Whisper encoder listens, Qwen3 answers, an MLP adapter
stands between. "The post" is its authors' article, "the original" their code and checkpoints.

    waveform -> log-mel windows -> encoder (frozen) -> 4x concat -> adapter -> embeddings in the
    prompt's <|AUDIO|> slots -> Qwen3 -> text
    python model.py    # parameter counts at full size: no download, no memory

Letters for shapes [full size]: B batch, L sequence length, W windows in the batch, M mel bins
[128], F mel frames [3000], T encoder frames [1500], k frames in an audio token [4], N audio
tokens in a window [375], E encoder width [1280], D LLM width [2560], V vocabulary [151671].
No import from the project: this file travels inside exported checkpoints as remote code."""
from functools import cache, cached_property
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers as hf
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder

# 16 kHz -> hop 160: 10 ms a mel frame -> stride 2: 20 ms an encoder frame -> 4x: 80 ms a token
SAMPLE_RATE, HOP, CONV_STRIDE = 16_000, 160, 2
AUDIO = "<|AUDIO|>"  # one for each recording in a prompt, N for each of its windows in the ids
MARKER = "<|start_of_audio|>"  # on both sides of a recording, as in the post's vLLM plugin
TAG_PAIR = MARKER + "<|end_of_audio|>"  # how the post's snippet writes a placeholder
# The original's pretraining prompt, for all transcription: an untrained one costs much WER.
ASR_SYSTEM = ("Вы полезный помощник по автоматическому "
              "распознаванию речи. "
              "Точно транскрибируйте аудио в текст.")
ASR_PROMPT = f"Транскрибируйте это аудио: {AUDIO}"
CONTEXT = " Возможные слова: "  # words follow, see with_context()
ENCODER, LLM = "openai/whisper-large-v3", "Qwen/Qwen3-4B"  # and their published shapes
WHISPER_LARGE_V3 = dict(d_model=1280, encoder_layers=32, encoder_attention_heads=20,
                        encoder_ffn_dim=5120, num_mel_bins=128, max_source_positions=1500)
QWEN3_4B = dict(hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, head_dim=128,
                num_key_value_heads=8, intermediate_size=9728, tie_word_embeddings=True,
                max_position_embeddings=40960, rope_theta=1_000_000, bos_token_id=151643,
                eos_token_id=151645, vocab_size=151671)  # with our two tokens

class BorealisConfig(hf.PretrainedConfig):  # which makes a dataclass of it
    """Two sub-configs and what joins them; without arguments, the full-size Borealis-5B."""
    model_type = "borealis"
    sub_configs = {"encoder_config": hf.WhisperConfig, "llm_config": hf.Qwen3Config}
    attribute_map = {"text_config": "llm_config"}  # the name that transformers and vLLM look for
    encoder_config: hf.WhisperConfig | dict | None = None
    llm_config: hf.Qwen3Config | dict | None = None
    downsample_factor: int = 4  # k
    adapter: str = "simple"  # or "deep", which has the next three
    adapter_layers: int = 3
    adapter_expansion: float = 1.5
    adapter_dropout: float = 0.1
    audio_token_id: int = 151669  # AUDIO
    audio_start_id: int = 151670  # MARKER
    audio_end_id: int = 151670  # MARKER again; another token in the original's checkpoints
    frozen: list | tuple = ("encoder",)  # parts that do not train
    trained: str | None = None  # "adapter", "lora" or "full", if a checkpoint holds only that
    lora: dict | None = None  # its rank, alpha and dropout
    base: dict | None = None  # where everything else comes from, see support/checkpoint.py
    def __post_init__(self, **kwargs):
        if not isinstance(self.encoder_config, hf.WhisperConfig):
            self.encoder_config = hf.WhisperConfig(**(self.encoder_config or WHISPER_LARGE_V3))
        if not isinstance(self.llm_config, hf.Qwen3Config):
            self.llm_config = hf.Qwen3Config(**(self.llm_config or QWEN3_4B))
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.llm_config.tie_word_embeddings
    @property
    def window_samples(self) -> int:  # 1500 * 2 * 160 = 480,000 samples = 30 s
        return self.encoder_config.max_source_positions * CONV_STRIDE * HOP
    @property
    def tokens_per_window(self) -> int:  # N = ceil(1500 / 4) = 375
        return -(-self.encoder_config.max_source_positions // self.downsample_factor)

# ---- from text and waveforms to what the network takes: one prompt builder, one window cutter
def place_audio(prompt: str, recordings: int) -> str:
    """The user's text with one AUDIO for each recording. Raises ValueError if it has others."""
    prompt = prompt.replace(TAG_PAIR, AUDIO)
    if AUDIO not in prompt:  # nobody said where: in front, each recording on its own line
        prompt = "\n".join([AUDIO] * recordings + [prompt])
    if (n := prompt.count(AUDIO)) != recordings:
        raise ValueError(f"the prompt has {n} {AUDIO} placeholders for {recordings} recordings")
    return prompt

def with_context(system: str, words: list[str]) -> str:  # which may be said, as training tells it
    return system + CONTEXT + ", ".join(words) + "." if words else system

def group_recordings(audio, prompts: list[str]) -> list[list]:
    """A list of recordings for each answer. A wave (1-D, float, 16 kHz) -> [[wave]]. [a, b] ->
    [[a], [b]]; for one prompt with two AUDIO, [[a, b]]. [[a, b], None] -> [[a, b], []]."""
    groups = [[] for _ in prompts] if audio is None else [as_list(item) for item in as_list(audio)]
    each = "".join(prompts).replace(TAG_PAIR, AUDIO).count(AUDIO)
    if len(prompts) != 1 or not groups or each <= len(groups[0]):
        return groups
    return [sum(groups[i:i + each], []) for i in range(0, len(groups), each)]  # of a flat list

def as_list(x) -> list:  # None -> []
    return list(x) if isinstance(x, (list, tuple)) else [] if x is None else [x]

def build_ids(tokenizer, config, messages: list[dict], counts=()) -> tuple[list[int], list[int]]:
    """Chat messages, and the number of windows of each recording -> ids and labels. Labels are -100
    except on the template's {% generation %} blocks: what the assistant says, and <|im_end|>."""
    asks = messages[-1]["role"] != "assistant"  # then the ids end where the answer will start
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=asks, return_dict=True,
                                         return_assistant_tokens_mask=True)
    ids, labels, pieces = [], [], fill_slots(chat["input_ids"], config, counts)
    for piece, said in zip(pieces, chat["assistant_masks"], strict=True):
        ids += piece
        labels += piece if said else [-100] * len(piece)
    end = None if asks else -1  # the template ends with a line break, after the last <|im_end|>
    return ids[:end], labels[:end]

def fill_slots(ids: list[int], config, counts):
    """Yields each id as a list, but AUDIO as marker, N slots for each of its windows, marker."""
    counts, audio = iter(counts), config.audio_token_id  # read once: slow
    for token in ids:
        n = config.tokens_per_window * next(counts) if token == audio else 0
        yield [config.audio_start_id, *[audio] * n, config.audio_end_id] if n else [token]

def find_labels(labels: torch.Tensor) -> torch.Tensor:
    """(B, L) -> where in the flat (B * L,) the next token has a label: there are logits needed."""
    return (F.pad(labels[:, 1:], (0, 1), value=-100) != -100).flatten().nonzero().flatten()

def speech_limit(samples: int) -> int:  # tokens of a transcript; the densest has 16 a second
    return 16 + 16 * samples // SAMPLE_RATE

NGRAM, REPEATS = 8, 10  # 8 tokens or fewer that come more than 10 times in a row: a loop
def guard(ids: list[int], limit: int | None) -> list[int]:
    """An answer's ids -> of a loop at their end only its first n-gram, and at most limit."""
    repeats = 2 if limit and len(ids) > limit else REPEATS  # beyond the limit, thrice will do
    ids = ids[:limit]
    for n in range(1, NGRAM + 1):
        if len(ids) > n * repeats and ids[-n * repeats:] == ids[-n * (repeats + 1):-n]:
            while ids[-2 * n:-n] == ids[-n:]:
                ids = ids[:-n]
    return ids

def check_wave(wave) -> torch.Tensor:
    """One recording at 16 kHz -> (samples,) float32 in [-1, 1], or ValueError. One that passes 1
    is scaled down as a whole: nothing is clipped, and how loud somebody speaks stays audible."""
    wave = torch.as_tensor(wave).detach()
    if wave.dim() != 1 or not wave.is_floating_point() or not len(wave):
        raise ValueError(f"audio must be 1-D, float, not empty; it is {wave.dtype} {[*wave.shape]}")
    peak = wave.abs().max().float()
    if not peak.isfinite():
        raise ValueError("audio holds NaN or Inf")
    if peak > 100:  # is no float recording; squared, it would overflow the mel
        raise ValueError(f"audio reaches {peak:.3g}: scale it to [-1, 1]")
    return (wave.float() / peak.clamp(min=1)).cpu()

def cut_windows(wave: torch.Tensor, config: BorealisConfig) -> list[torch.Tensor]:
    """(samples,) -> windows of at most 30 s: 70 s are three, each of 375 tokens, see log_mel()."""
    return list(wave.split(config.window_samples))

feature_extractor = cache(hf.WhisperFeatureExtractor)  # its filters take a while to make

def log_mel(windows: list[torch.Tensor], config: BorealisConfig) -> torch.Tensor:
    """W waveforms of at most a window each -> (W, M, F), padded with silence to whole windows."""
    bins, seconds = config.encoder_config.num_mel_bins, config.window_samples // SAMPLE_RATE
    if not windows:
        return torch.zeros(0, bins, config.window_samples // HOP)
    extract, waves = feature_extractor(bins, chunk_length=seconds), [w.numpy() for w in windows]
    return extract(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features

# ---- the network
def downsample(x: torch.Tensor, k: int) -> torch.Tensor:
    """k neighbouring frames side by side, (W, T, E) -> (W, N, k*E), zero-padded to a multiple of k.
    A view, no convolution or average: nothing is lost, the adapter decides what to keep."""
    W, T, E = x.shape
    x = F.pad(x, (0, 0, 0, -T % k))  # (W, N*k, E)
    return x.reshape(W, x.shape[1] // k, k * E)  # (W, N, k*E)  [1500, 1280] -> [375, 5120]

class Adapter(nn.Module):
    """(..., k*E) -> (..., D), no biases. simple: Linear(5120, 2560), GELU, Linear(2560, 2560),
    19.7 M weights. deep, 78.6 M: no GELU, but residual blocks 2560 -> 3840 -> 2560, LayerNorm."""
    def __init__(self, config: BorealisConfig):
        super().__init__()
        kE = config.downsample_factor * config.encoder_config.d_model
        D, p = config.llm_config.hidden_size, config.adapter_dropout
        deep = dict(simple=False, deep=True)[config.adapter]
        self.w_in = nn.Linear(kE, D, bias=False)
        self.w_out = nn.Linear(D, D, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(D), nn.Linear(D, wide, bias=False), nn.GELU(),
                          nn.Dropout(p), nn.Linear(wide, D, bias=False), nn.Dropout(p))
            for wide in [int(D * config.adapter_expansion)] * config.adapter_layers * deep)
        self.norm = nn.LayerNorm(D) if deep else nn.GELU()  # no norm in the simple one
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.w_in(x)  # (..., k*E) -> (..., D)
        for block in self.blocks:
            x = x + block(x)
        return self.w_out(self.norm(x))

class BorealisForConditionalGeneration(hf.PreTrainedModel):
    """encoder.* (Whisper), adapter.* (ours), llm.* (Qwen3); support/checkpoint.py loads weights."""
    config_class = BorealisConfig
    _supports_sdpa = True
    def __init__(self, config: BorealisConfig, encoder=None, llm=None):
        super().__init__(config)
        self.encoder = WhisperEncoder(config.encoder_config) if encoder is None else encoder
        self.adapter = Adapter(config)
        self.llm = hf.Qwen3ForCausalLM(config.llm_config) if llm is None else llm
        self.post_init()
        self.freeze(*config.frozen)
    def _init_weights(self, module):  # the other parts come with their own initialisers
        if isinstance(module, Adapter):
            for weight in module.parameters():
                if weight.dim() == 2:  # not a norm's
                    nn.init.xavier_uniform_(weight)
    @classmethod
    def from_pretrained(cls, *args, device=None, **settings) -> hf.PreTrainedModel:
        model = super().from_pretrained(*args, **settings)
        return model if device is None else model.to(device)  # the post's snippet wants it there
    @classmethod
    def can_generate(cls) -> bool:  # by code of transformers; generation_config.json is for vLLM
        return False
    @cached_property
    def tokenizer(self):  # the one beside the weights, unless another was set
        return hf.AutoTokenizer.from_pretrained(self.config._name_or_path)
    def freeze(self, *parts: str) -> nn.Module:
        """No gradients for these parts, and no dropout in the encoder. --train: support/lora.py"""
        self.config.frozen = list(parts)
        for part in parts:
            getattr(self, part).requires_grad_(False)
        return self.train(self.training)
    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.encoder.train(mode and "encoder" not in self.config.frozen)  # Qwen3 has no dropout
        return self
    def encode_audio(self, input_features: torch.Tensor) -> torch.Tensor:
        """(W, M, F) log-mel -> (W, N, D) embeddings."""
        x, config = input_features.to(self.encoder.conv1.weight), self.config.encoder_config
        if len(x):
            x = self.encoder(x).last_hidden_state  # (W, T, E)  [W, 1500, 1280]
        else:  # text only: DDP still expects a gradient for each trained weight, so give it zeros
            zero = sum(p.sum() for p in self.encoder.parameters() if p.requires_grad)
            x = x.new_zeros(0, config.max_source_positions, config.d_model) + zero
        x = downsample(x, self.config.downsample_factor)  # (W, N, k*E)  [W, 375, 5120]
        return self.adapter(x.to(self.adapter.w_in.weight.dtype))  # (W, N, D)  [W, 375, 2560]
    def embed(self, input_ids: torch.Tensor, input_features: torch.Tensor | None) -> torch.Tensor:
        """The one splice: (B, L) ids -> (B, L, D), with audio in its slots, in reading order."""
        slots = input_ids == self.config.audio_token_id  # (B, L)
        # AUDIO may have no row: (B, L, D), with another token's in its slots
        embeds = self.llm.get_input_embeddings()(input_ids.masked_fill(slots, 0))
        if input_features is None:
            return embeds
        audio = self.encode_audio(input_features).flatten(0, 1)  # (W*N, D)
        assert slots.is_cuda or slots.sum() == len(audio), f"{slots.sum()} slots for {len(audio)}"
        return embeds.masked_scatter(slots.unsqueeze(-1), audio.to(embeds.dtype))
    def forward(self, input_ids, input_features=None, attention_mask=None, labels=None,
                label_positions=None, num_items_in_batch=None, **kwargs) -> CausalLMOutputWithPast:
        """(B, L) ids -> logits (B, L, V); with labels, the loss, and logits (number of labels, V).
        Padding on the right needs no mask: under causal attention no token sees it."""
        hidden = self.llm.model(
            inputs_embeds=self.embed(input_ids, input_features), attention_mask=attention_mask,
            use_cache=False, **kwargs).last_hidden_state  # (B, L, D)
        if labels is None:
            return CausalLMOutputWithPast(logits=self.llm.lm_head(hidden))
        # n positions have a label; of a 30 s clip, 400 have none.
        label_positions = find_labels(labels) if label_positions is None else label_positions
        logits = self.llm.lm_head(hidden.flatten(0, 1)[label_positions])  # (n, V)
        targets = labels.flatten()[label_positions + 1]  # (n,) position t predicts token t+1
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        # Divided by the labels of the whole effective batch: see backward() in train.py.
        return CausalLMOutputWithPast(loss / (num_items_in_batch or len(logits)), logits)
    def generate(self, audio=None, user_prompt=ASR_PROMPT, system_prompt=ASR_SYSTEM, **settings):
        """Answers -> new ids (B, <= max_new_tokens), padded at the end. Raises ValueError. audio:
        see group_recordings(). user_prompt: one for all, or a list. settings: see answer(); what
        our processor makes may be among them: then, as others do it, ids of prompt and answer."""
        if "input_ids" in settings:
            ids, new = settings["input_ids"], self.answer(**settings)  # maybe several each
            return torch.cat([ids.repeat_interleave(len(new) // len(ids), 0), new], dim=1)
        prompts = as_list(user_prompt)
        groups = group_recordings(audio, prompts)
        if len(prompts) == 1:
            prompts *= len(groups)
        if not groups or len(groups) != len(prompts):
            raise ValueError(f"{len(groups)} recordings, {len(prompts)} prompts: give 1 or as many")
        system = [dict(role="system", content=system_prompt)] if system_prompt else []
        chats = [[*system, dict(role="user", content=place_audio(prompt, len(waves)))]
                 for prompt, waves in zip(prompts, groups, strict=True)]
        return self.chat(chats, groups, **settings)
    def chat(self, conversations, recordings, **settings):
        """B lists of messages, B lists of recordings for their AUDIO -> new ids, see answer()."""
        rows, pieces, limits = [], [], []
        for messages, waves in zip(conversations, recordings, strict=True):
            windows = [cut_windows(check_wave(wave), self.config) for wave in waves]
            ids, _ = build_ids(self.tokenizer, self.config, messages, map(len, windows))
            rows.append(torch.tensor(ids, device=self.device))
            pieces += sum(windows, [])
            asr = messages[-1]["content"] == ASR_PROMPT
            limits.append(speech_limit(sum(map(len, waves))) if asr else None)
        # Padded on the left and masked, so that each row gets the tokens it would get alone.
        ids = pad_sequence(rows, True, self.ends[1], "left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side="left")
        return self.answer(ids, log_mel(pieces, self.config), mask, limits=limits, **settings)
    @torch.no_grad()
    def answer(self, input_ids, input_features=None, attention_mask=None, max_new_tokens=256,
               do_sample=False, streamer=None, loop_guard=True, limits=(None,), **sampling):
        """(B, L) ids and (W, M, F) mels -> new ids. Greedy unless do_sample; then temperature, ...
        go to transformers, as a streamer. What guard() cuts, with limits (B,), ends with MARKER."""
        ends = self.ends
        def guarded(ids):  # -> how long each row is, how much is kept; each of B may have several
            for i, row in enumerate(ids.tolist()):
                said = row[:min((row.index(x) for x in ends if x in row), default=len(row))]
                yield len(said), len(guard(said, limits[i * len(limits) // len(ids)]))
        def cut(ids, *_, **__):  # which rows loop, or are too long?
            return torch.tensor([kept < n for n, kept in guarded(ids)], device=ids.device)
        embeds = self.embed(input_ids, input_features)  # (B, L, D)
        own = dict(do_sample=do_sample, eos_token_id=ends, pad_token_id=ends[1]) | sampling
        settings = hf.GenerationConfig(max_new_tokens=max_new_tokens, **own)
        new = self.llm.generate(None, settings, streamer=streamer, inputs_embeds=embeds,
                                attention_mask=attention_mask,
                                stopping_criteria=[cut] if loop_guard else [])
        for row, (n, kept) in zip(new, guarded(new) if loop_guard else (), strict=loop_guard):
            row[kept if kept < n else len(row):] = self.config.audio_start_id
        return new
    @property
    def ends(self) -> list[int]:  # tokens that end an answer; the second is Qwen3's padding, too
        return self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    def decode(self, ids) -> str | list[str]:  # 1-D ids -> a text, 2-D -> a list of texts
        texts = self.tokenizer.decode(ids, skip_special_tokens=True)
        return texts.strip() if isinstance(texts, str) else [text.strip() for text in texts]

hf.AutoConfig.register(BorealisConfig.model_type, BorealisConfig, exist_ok=True)

if __name__ == "__main__":
    for adapter in ("simple", "deep"):
        with torch.device("meta"):  # shapes without memory
            model = BorealisForConditionalGeneration(BorealisConfig(adapter=adapter))
        for name, part in [*model.named_children(), ("total", model)]:
            print(f"adapter={adapter}: {name} {sum(p.numel() for p in part.parameters()):,}")
