"""support/page.py -- talk to the model in a browser, on this machine: "make page", or

    python -m support.page --ckpt out/                      # the model answers in this process
    python -m support.page --server http://127.0.0.1:8000   # a running serve_vllm.py answers

Recordings are cut at pauses, texts appear as they are decoded. Labels and looks: page.toml."""
import base64
import html
import io
import socket
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import soundfile
from matplotlib.figure import Figure
from transformers import TextIteratorStreamer

from data import TASK_SYSTEM, Sample
from model import ASR_SYSTEM, AUDIO, HOP, SAMPLE_RATE, BorealisConfig, cut_windows, log_mel
from support import checkpoint, corpus, rows
from support.cli import ArgumentParser, UserError, as_user_error, first_line, flag, pick_device, run
from support.pauses import cut_at_pauses, without_thoughts

TABLES = tomllib.loads(Path(__file__).with_name("page.toml").read_text(encoding="utf-8"))

@dataclass
class PageConfig:
    ckpt: str = flag("out", "folder that train.py wrote, or any other checkpoint")
    server: str | None = flag(None, "instead: address of a running serve_vllm.py")
    examples: str | None = flag(None, "folder of recordings to click; default: embedded corpus")
    lang: str = flag("en", "language of the page", choices=("en", "ru"))
    max_audio_seconds: float = flag(600.0, "longest recording accepted", rows.MIN_SECONDS, 1e6)
    max_new_tokens: int = flag(256, "for an answer, and for each window of a transcript", low=1)
    at_once: int = flag(1, "requests answered at once, while 16 more may wait", low=1)
    port: int = flag(7860, "port of the page, on 127.0.0.1", low=1, high=65535)
    share: bool = flag(False, "also a public link, through Gradio's servers")

# ---- Who answers -> (config, stream); stream(wave, sample) yields pieces of text, tokens in them
def load(cfg):
    net, threads = checkpoint.load_model(cfg.ckpt, pick_device("auto")), ThreadPoolExecutor()
    def stream(wave, sample):
        pieces = TextIteratorStreamer(net.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = threads.submit(net.chat, [sample.messages(with_answer=False)], [[wave]],
                             max_new_tokens=cfg.max_new_tokens, streamer=pieces)
        ids.add_done_callback(lambda _: pieces.end())  # also if it fails: below, somebody waits
        for piece in pieces:
            yield piece, 0
        yield "", ids.result().shape[1]
    return net.config, stream

def connect(cfg):
    import openai
    with as_user_error(f"no serve_vllm.py answers at {cfg.server}: ", Exception):  # in many ways
        client = openai.OpenAI(base_url=cfg.server.rstrip("/") + "/v1", api_key="none")
        served = client.models.list().data[0]  # root: its folder, which may be on this machine
        config = checkpoint.read_config(Path(served.root)) or BorealisConfig()
    def stream(wave, sample):
        soundfile.write(wav := io.BytesIO(), wave.numpy(), SAMPLE_RATE, format="WAV")
        settings = dict(model=served.id, stream=True)
        if sample.system == ASR_SYSTEM:
            more = dict(max_completion_tokens=cfg.max_new_tokens, stream_include_usage=True)
            chunks = client.audio.transcriptions.create(
                file=("a.wav", wav.getvalue()), extra_body=more, **settings)
        else:
            (system, user), sound = sample.messages(False), base64.b64encode(wav.getvalue())
            text = dict(type="text", text=user["content"].removeprefix(AUDIO))
            sound = dict(type="input_audio", input_audio=dict(data=sound.decode(), format="wav"))
            chunks = client.chat.completions.create(
                messages=[system, dict(role="user", content=[sound, text])],
                max_tokens=cfg.max_new_tokens, stream_options=dict(include_usage=True), **settings)
        for chunk in map(openai.BaseModel.model_dump, chunks):
            text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            yield text, (chunk.get("usage") or {}).get("completion_tokens", 0)
    return config, stream

# ---- What is on the page
def find_examples(cfg) -> dict:  # label -> what gr.Audio takes. Raises UserError
    if cfg.examples:
        files = [p for p in sorted(Path(cfg.examples).glob("*"))
                 if p.suffix[1:].upper() in soundfile.available_formats()]
        if not files:
            raise UserError(f"--examples {cfg.examples}: no folder with .wav, .flac, ... files")
        return {path.stem: str(path) for path in files}
    trained_on = dict(embedded=True) if cfg.server else checkpoint.training_config(cfg.ckpt)
    lang, seed = trained_on.get("lang", "ru").split(",")[0], trained_on.get("seed", 0)
    splits = corpus.EVAL_SPLITS if trained_on.get("embedded") else []
    said = {split: corpus.embedded_rows(lang, split, 1, seed)[0] for split in splits}
    return {f"{s}: {row['text']}": (SAMPLE_RATE, row["audio"]) for s, row in said.items()}

def spectrogram(windows: list, config) -> Figure:  # as the encoder takes them, over seconds
    figure, end = Figure((10, 2), dpi=130, layout="constrained", facecolor="none"), 0
    axis = figure.subplots()
    for wave, mel in zip(windows, log_mel(windows, config), strict=True):
        start, end = end, end + len(wave) / SAMPLE_RATE
        axis.imshow(mel[:, :len(wave) // HOP], extent=(start, end, 0, 1), **TABLES["mel"])
        axis.axvline(end, color="white", linestyle="--")
    axis.set(xlim=(0, end), yticks=[])
    axis.tick_params(colors="gray")
    return figure

def build(gr, cfg, config, stream) -> None:  # within gr.Blocks
    texts, examples = TABLES[cfg.lang], find_examples(cfg)
    def reply(path, question=None):
        """-> the text so far, figures (or what went wrong), the spectrogram; again and again."""
        begun, parts, tokens = time.perf_counter(), [], 0
        try:
            wave = rows.load_audio(path or "", max_seconds=cfg.max_audio_seconds)
            sample, asked = Sample("", [b""]), cut_at_pauses(wave, config.window_samples)
            windows = asked
            if question is not None:
                sample = Sample("", [b""], rows.check_text(question), TASK_SYSTEM)
                windows, asked = cut_windows(wave, config), [wave]
            yield "", "", spectrogram(windows, config)
            for piece in asked:
                parts.append("")
                for text, n in stream(piece, sample):
                    parts[-1], tokens = parts[-1] + text, tokens + n
                    seconds, took = len(wave) / SAMPLE_RATE, time.perf_counter() - begun
                    yield (" ".join(filter(None, map(without_thoughts, parts))),
                           texts["figures"].format(seconds, len(windows), took, tokens,
                                                   took / seconds), gr.skip())
        except Exception as e:  # of many kinds: the recording, the server, the GPU's memory
            message = html.escape(first_line(e))
            problem = next(text for start, text in texts["problems"].items()
                           if message.startswith(start))
            yield "", f"<div class=problem>{problem}</div>", None
    gr.HTML(**texts["title"])
    with gr.Row():
        with gr.Column():
            sound = gr.Audio(type="filepath", sources=["microphone", "upload"], **texts["sound"])
            if examples:
                gr.Examples([[e] for e in examples.values()], sound, example_labels=[*examples],
                            **texts["examples"])
        with gr.Column():
            said, question = gr.Textbox(**texts["said"]), gr.Textbox(**texts["question"])
            answer = gr.Textbox(**texts["answer"])
    figures, picture = gr.HTML(), gr.Plot(**texts["picture"])
    limits = dict(concurrency_id="model", concurrency_limit=cfg.at_once)
    sound.change(reply, sound, [said, figures, picture], **limits)
    question.submit(reply, [sound, question], [answer, figures, picture], **limits)

def main():
    parser = ArgumentParser(prog="python -m support.page", description="The model in a browser.")
    cfg = PageConfig(**vars(parser.add_flags(PageConfig).parse_args()))
    with as_user_error('"make page", or pip install -r support/requirements-page.txt: ',
                       ImportError):
        import gradio as gr
        import openai as _
    with as_user_error(f"--port {cfg.port}: ", OSError):
        socket.create_server(("127.0.0.1", cfg.port)).close()
    config, stream = connect(cfg) if cfg.server else load(cfg)
    with gr.Blocks(title="Borealis", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        build(gr, cfg, config, stream)
    page.queue(max_size=16).launch(server_port=cfg.port, share=cfg.share, **TABLES["launch"])

if __name__ == "__main__":
    run(main)
