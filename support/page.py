"""support/page.py -- talk to the model in a browser. Labels, layout and looks are in page.toml."""
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path
from matplotlib.figure import Figure
from transformers import TextIteratorStreamer
from data import TASK_SYSTEM, TRANSCRIBE, Sample
from model import HOP, SAMPLE_RATE, cut_windows, log_mel
from support import checkpoint, cli, corpus, pauses, rows, transcripts

TABLES = tomllib.loads(Path(__file__).with_name("page.toml").read_text(encoding="utf-8"))

def load(cfg):  # -> config; stream(wave, sample), which yields the text so far, tokens at the end
    net = checkpoint.load_model(cfg.ckpt, cli.pick_device("auto"), cfg.encoder, cfg.llm)
    threads = ThreadPoolExecutor()
    def stream(wave, sample):
        texts = TextIteratorStreamer(net.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = threads.submit(net.chat, [sample.messages(False)], [[wave]], streamer=texts)
        ids.add_done_callback(lambda _: texts.end())  # after an error, too: here somebody waits
        yield from ((text, 0) for text in accumulate(texts))
        yield net.decode(ids.result()[0]), ids.result().shape[1]  # a loop has been cut
    return net.config, stream

def find_examples(cfg) -> dict:  # label -> what gr.Audio takes. Raises UserError
    if cfg.examples:
        return {path.name: str(path) for path, _ in transcripts.find_recordings([cfg.examples])}
    lang = checkpoint.training_config(cfg.ckpt).get("lang", "ru")[:2]
    said = {split: corpus.embedded_rows(lang, split, 1)[0] for split in corpus.EVAL_SPLITS}
    return {f"{k}: {row['text']}": (SAMPLE_RATE, row["audio"]) for k, row in said.items()}

def spectrogram(windows: list, config) -> Figure:  # as the encoder takes them, over seconds
    axis, end = Figure(**TABLES["figure"]).subplots(), 0
    for wave, mel in zip(windows, log_mel(windows, config), strict=True):
        start, end = end, end + len(wave) / SAMPLE_RATE
        axis.imshow(mel[:, :len(wave) // HOP], extent=(start, end, 0, 1), **TABLES["mel"])
        axis.axvline(start or -1, color="white", linestyle="--")  # not at 0
    axis.set(xlim=(0, end), yticks=[])
    return axis.figure

def reply(cfg, config, stream, same, path, question=None):  # yields what three boxes show
    said, tokens, begun, words = "", 0, time.perf_counter(), TABLES[cfg.lang]
    try:
        wave = rows.load_audio(path or "", max_seconds=cfg.max_audio_seconds)
        windows = pieces = pauses.cut_at_pauses(wave, config.window_samples)
        sample, seconds = TRANSCRIBE, len(wave) / SAMPLE_RATE
        if question is not None:
            sample = Sample("", [b""], rows.check_text(question, recordings=1), TASK_SYSTEM)
            windows, pieces = cut_windows(wave, config), [wave]
        yield "", "", spectrogram(windows, config)
        for piece in pieces:
            for text, n in stream(piece, sample):
                now, tokens = pauses.without_thoughts(said + text), tokens + n
                took = time.perf_counter() - begun
                numbers = seconds, len(windows), took, tokens, took / seconds
                yield now, words["figures"].format(*numbers), same
            said = now + " "
    except Exception as e:  # of many kinds: of the file, the GPU
        matching = (text for start, text in words["problems"] if str(e).startswith(start))
        yield next(matching).replace("REASON", cli.first_line(e)), "", None

def main():
    cfg = cli.ArgumentParser().add_tables("model", "page").parse_args()
    cli.check_port("127.0.0.1", cfg.port)
    examples = find_examples(cfg)
    with cli.as_user_error(TABLES["install"], ImportError):
        import gradio as gr
        event = partial(reply, cfg, *load(cfg), gr.skip())
    with gr.Blocks(analytics_enabled=False, delete_cache=(600, 3600)) as page:
        _, sound, said, question, answer, *shown = [
            getattr(gr, box.pop("kind"))(**box) for box in TABLES[cfg.lang]["boxes"]]
        gr.Examples([[e] for e in examples.values()], sound, example_labels=[*examples])
        sound.change(event, sound, [said, *shown])
        question.submit(event, [sound, question], [answer, *shown])
    page.queue(**TABLES["queue"]).launch(server_port=cfg.port, share=cfg.share, **TABLES["launch"])

cli.run(main, __name__)
