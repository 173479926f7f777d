"""support/systems.py -- who answers in an evaluation: our checkpoint, a Whisper, or both."""
import sys
from pathlib import Path

import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from model import ENCODER, SAMPLE_RATE
from support.checkpoint import load_model, load_part
from support.cli import UserError, as_user_error
from support.decoding import RANK, System, digest, digest_model, stamp
from support.pauses import in_pieces

def with_lengths(texts: list[str], ids: torch.Tensor, ends: list[int]) -> list[tuple]:
    """Answers, their ids (B, L) -> [(text, tokens up to its end token; cut, as none came?)]"""
    answers = []
    for text, row in zip(texts, ids.tolist(), strict=True):
        n = next((i for i, token in enumerate(row, 1) if token in ends), None)
        answers.append((text.strip(), n or len(row), n is None))
    return answers

def open_baseline(cfg, ours: str, lang: str | None, device: torch.device) -> list[System]:
    """What --baseline or --fallback asks for: transformers' Whisper, greedy, its language forced.
    ours: a name it must not have; lang: of training. Raises UserError."""
    if not (cfg.baseline or cfg.fallback):
        return []
    where, language = cfg.baseline or ENCODER, (cfg.lang or lang or "ru").split(",")[0]
    with as_user_error(f"cannot load --baseline {where}: ", Exception):  # it fails in many ways
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = load_part(WhisperForConditionalGeneration, where, dtype=dtype).to(device).eval()
        processor = WhisperProcessor.from_pretrained(where)
    settings, vocabulary = model.generation_config, processor.tokenizer.get_vocab()
    forced = f"<|{language}|>"
    if forced not in vocabulary or getattr(settings, "is_multilingual", None) is False:
        raise UserError(f"--baseline {where} lacks {forced}: name a multilingual Whisper")
    lacking = dict(is_multilingual=True, lang_to_id={forced: vocabulary[forced]},  # in old files
                   task_to_id={"transcribe": vocabulary.get("<|transcribe|>")},
                   no_timestamps_token_id=vocabulary.get("<|notimestamps|>"))
    vars(settings).update({k: v for k, v in lacking.items() if getattr(settings, k, None) is None})
    ends = [model.config.eos_token_id, settings.eos_token_id, settings.pad_token_id]
    most = min(cfg.max_new_tokens, model.config.max_target_positions - 4)  # 4: of its prompt
    def answer(samples, waves):
        mel = processor.feature_extractor([w.numpy() for w, in waves], sampling_rate=SAMPLE_RATE,
                                          return_tensors="pt").input_features
        ids = model.generate(mel.to(device, model.dtype), language=forced, task="transcribe",
                             max_new_tokens=most, do_sample=False, num_beams=1).cpu()
        texts = processor.batch_decode(ids, skip_special_tokens=True)
        answers = with_lengths(texts, ids, ends)  # transformers strips a batch's last end token
        return [(text, n, endless and n >= most) for text, n, endless in answers]
    answer = in_pieces(answer, processor.feature_extractor.n_samples, cfg.batch_size)
    name = Path(where).name + (" (baseline)" if Path(where).name == ours else "")
    return [System(name, answer, (digest_model(where), language, cfg.max_new_tokens, device.type))]

def open_ours(cfg, native, name: str, device: torch.device) -> System:
    """The checkpoint. native: (model, max_new_tokens) -> answer(), our own. Raises UserError."""
    if cfg.engine == "vllm":
        from support.engine import Offline
        answer = model = Offline(cfg.ckpt, cfg.max_new_tokens, cfg.encoder, cfg.llm)
    else:
        model = load_model(cfg.ckpt, device, cfg.encoder, cfg.llm)
        answer = native(model, cfg.max_new_tokens)
    if cfg.chunk == "vad":
        answer = in_pieces(answer, model.config.window_samples, cfg.batch_size)
    return System(name, answer, (digest_model(cfg.ckpt), cfg.encoder, cfg.llm, cfg.task,
                                 cfg.max_new_tokens, cfg.chunk, cfg.engine, device.type))

def answer_all(cfg, systems: list[System], splits: dict, out: Path) -> dict[str, list]:
    """{split: samples} -> {system: rows}; with --fallback also of the two together."""
    data = digest([(split, s.name, s.messages(), [stamp(a) for a in s.audio])
                   for split, own in splits.items() for s in own])  # all, so that --reuse may limit
    for system in systems:
        system.settings = digest(system.facts, data)
    jobs = [((split, i), s) for split, own in splits.items() for i, s in enumerate(own[:cfg.limit])]
    ours, how = systems[0].name, (out, cfg.batch_size, cfg.reuse)
    answers = {ours: systems[0].decode(jobs, *how)}
    for other in systems[1:]:
        snr = {key: answers[ours][key]["snr"] for key, _ in jobs}
        noisy = {key for key, x in snr.items() if x is not None and x < cfg.fallback_snr}
        theirs = other.decode([j for j in jobs if cfg.baseline or j[0] in noisy], *how)
        if cfg.baseline:
            answers[other.name] = theirs
        if cfg.fallback:
            mixed = answers[ours] | {key: theirs[key] for key in noisy}
            answers[f"{ours}, noisy ones by {other.name}"] = mixed
            if RANK == 0:
                print(f"{other.name} answers for {len(noisy)} of {len(jobs)} utterances, "
                      f"whose SNR is estimated below {cfg.fallback_snr:g} dB", file=sys.stderr)
    return {name: [own[key] for key, _ in jobs] for name, own in answers.items()}
