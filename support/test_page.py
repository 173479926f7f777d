"""support/test_page.py -- the page in a real browser, whose microphone plays a file."""
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace
import pytest
import soundfile
import torch
import data
from conftest import HERE, Fork, exit_of, free_port, is_one_line, tone, wav_bytes
from support import corpus
from support import page as support_page
from support.pauses import cut_at_pauses, without_thoughts
from support.rows import load_audio

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LACKING = [name for name in ("gradio", "playwright") if not find_spec(name)]
LACKING += [] if CHROMIUM else ["chromium"]
in_browser = pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
PROBLEMS = support_page.TABLES["ru"]["problems"]

def sentence(why: str) -> str:
    return next(text for start, text in PROBLEMS if why.startswith(start)).replace("REASON", why)

SENTENCES = [sentence(why) for why in (
    "missing file", "not audio", "silent", "longer than 20 s", "empty text", "placeholders")]

@contextlib.contextmanager
def page_at(folder, *flags):
    """A page in a process of its own -> its address."""
    port = free_port()
    env = dict(os.environ, TMPDIR=str(folder), PYTHONUNBUFFERED="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "support.page", "--port", str(port), *map(str, flags)]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, cwd=HERE, env=env, stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)

@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """What is spoken, and files that cannot be used."""
    folder = tmp_path_factory.mktemp("recordings")
    both = torch.cat([tone(1.5, 3), torch.zeros(4800), tone(1.5, 4)])
    files = dict(short=wav_bytes(tone(1.2, 1)), long=wav_bytes(both), silent=wav_bytes(0 * both),
                 broken=b"RIFF this is no recording" * 9, endless=wav_bytes(tone(21)))
    for name, content in files.items():
        (folder / f"{name}.wav").write_bytes(content)
    soundfile.write(folder / "spoken.wav", data.embedded("ru", "clean", 1)[0].audio[0], 16000)
    return folder

@pytest.fixture(scope="module")
def browser(recordings):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        flags = [*FLAGS, f"--use-file-for-fake-audio-capture={recordings / 'spoken.wav'}"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()

@pytest.fixture(scope="module")
def address(tmp_path_factory, checkpoint):
    with page_at(tmp_path_factory.mktemp("page"), "--ckpt", checkpoint, "--max_audio_seconds", 20,
                 "--lang", "ru") as address:
        yield address

@pytest.fixture
def tab(browser):
    """A tab that notes what it asks of other machines, and errors of its scripts."""
    tab = browser.new_page(viewport=dict(width=1280, height=900))
    tab.set_default_timeout(60_000)
    tab.elsewhere, tab.wrong = [], []
    own = re.compile(r"(http://127\.0\.0\.1|blob:|data:)")
    tab.on("request", lambda r: own.match(r.url) or tab.elsewhere.append(r.url))
    tab.on("pageerror", lambda e: tab.wrong.append(str(e)))
    yield tab
    tab.close()

def upload(tab, path):
    """Opens the page anew and gives it a file."""
    tab.reload()
    tab.locator(".source-selection button").first.click()
    tab.locator("input[type=file]").set_input_files(path)

def wait_for(tab, name: str, text: str, tokens: str | None = None) -> list[str]:
    """Waits until a box shows the text (spaces aside) and all has been counted, which is after the
    last word of the last piece -> the figures."""
    for _ in range(300):
        shown = tab.locator(f".{name} textarea").first.input_value()
        figures = tab.locator(".figures b").all_inner_texts()
        counted = figures and figures[3] == (tokens or figures[3]) != "0" or text in SENTENCES
        if shown.split() == text.split() and counted:
            return figures
        time.sleep(0.2)
    raise AssertionError(f"{shown!r} is not {text!r}, or {figures} are not of {tokens} tokens")

def ask(tab, question: str):
    tab.locator(".question textarea, .question input").first.fill(question)
    tab.locator(".question button").click()

def joined(net, waves, **settings) -> tuple[str, str]:
    """generate's words for all waves, without <think>, and how many tokens they took."""
    ids = [net.generate(wave, **settings)[0] for wave in waves]
    return " ".join(without_thoughts(net.decode(i)) for i in ids), str(sum(map(len, ids)))

QUESTION = dict(user_prompt="что слышно?", system_prompt=data.TASK_SYSTEM)

def pieces_of(net, wave) -> list:
    return cut_at_pauses(wave, net.config.window_samples)

def check(tab, path, net):
    """Uploads a recording, then asks about it. The words are generate's (the first time, of pieces
    cut at pauses), and so are the tokens; there is a picture."""
    wave = load_audio(str(path))
    pieces = pieces_of(net, wave)
    words, tokens = joined(net, pieces)
    upload(tab, path)
    figures = wait_for(tab, "said", words, tokens)
    assert figures[:2] == [f"{len(wave) / 16000:.1f} с", str(len(pieces))] and float(figures[4]) > 0
    assert tab.locator(".picture img").evaluate("image => image.naturalWidth") > 500
    ask(tab, "что слышно?")
    words, tokens = joined(net, [wave], **QUESTION)
    wait_for(tab, "answer", words, tokens)

@in_browser
@pytest.mark.heavy
def test_words_of_a_file_and_a_question(tab, address, net, recordings):
    tab.goto(address)
    for name in ("short", "long"):
        check(tab, recordings / f"{name}.wav", net)
    assert tab.elsewhere == [] == tab.wrong

@in_browser
@pytest.mark.heavy
def test_words_of_the_microphone_and_of_an_example(tab, address, net):
    tab.goto(address)
    tab.get_by_role("button", name="Record").first.click()
    time.sleep(2.5)
    tab.locator(".stop-button").first.click()
    tab.locator(".picture img").wait_for()
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Download").first.click()
    wave = load_audio(str(download.value.path()))  # as the browser recorded it: the file it was fed
    assert len(wave) > 32000 and wave.square().mean() > 1e-4
    wait_for(tab, "said", joined(net, pieces_of(net, wave))[0])
    tab.reload()
    for i, split in enumerate(corpus.EVAL_SPLITS):
        sample = data.embedded("ru", split, 1)[0]
        button = tab.locator(".gallery-item").nth(i)
        assert button.inner_text().strip() == f"{split}: {sample.answer}"
    wave = load_audio(sample.audio[0])
    button.click()
    wait_for(tab, "said", joined(net, pieces_of(net, wave))[0])
    assert tab.elsewhere == [] == tab.wrong

@in_browser
@pytest.mark.heavy
def test_problems_are_sentences(tab, address, recordings):
    tab.goto(address)
    tab.locator(".question").wait_for()
    ask(tab, "что?")
    wait_for(tab, "answer", sentence("missing file"))
    for name, why in dict(broken="not audio", silent="silent", endless="longer than 20 s").items():
        upload(tab, recordings / f"{name}.wav")
        wait_for(tab, "said", sentence(why))
    upload(tab, recordings / "short.wav")
    tab.locator(".picture img").wait_for()
    for question, why in (" ", "empty text"), ("<|AUDIO|> <|AUDIO|>?", "placeholders"):
        ask(tab, question)
        wait_for(tab, "answer", sentence(why))

def test_words_appear_while_others_are_decoded(checkpoint, net, recordings):
    cfg = SimpleNamespace(ckpt=checkpoint, encoder=None, llm=None, lang="ru", max_audio_seconds=20)
    path = recordings / "long.wav"
    shown = list(support_page.reply(cfg, *support_page.load(cfg), "same", path))
    texts = [text.strip() for text, *_ in shown]
    assert len(set(texts)) > 20
    for before, after in zip(texts, texts[1:], strict=False):  # but repeats
        assert after.startswith(before) or before.startswith(after)
    assert texts[-1].split() == joined(net, pieces_of(net, load_audio(str(path))))[0].split()

def test_both_languages_say_the_same_things():
    """The same boxes in the same order, and a sentence for the same problems."""
    en, ru = support_page.TABLES["en"], support_page.TABLES["ru"]
    assert [start for start, _ in en["problems"]] == [start for start, _ in ru["problems"]]
    assert [box.keys() for box in en["boxes"]] == [box.keys() for box in ru["boxes"]]

@pytest.mark.parametrize(("argv", "says"), [
    ("--port 99999", "between 1 and 65535"), ("--lang de", "invalid choice"),
    ("--examples nowhere", "nowhere"), ("--examples empty", "files in empty"),
    ("--ckpt nowhere", "nowhere"), ("--ckpt nowhere --examples good", "nowhere"),
    ("--port TAKEN", "in use"), ("--exampls x", "unrecognized arguments: --exampls x")])
def test_wrong_flags(monkeypatch, capsys, tmp_path, argv, says):
    pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "good" / "a.wav").write_bytes(wav_bytes(tone(1)))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = str(taken.getsockname()[1])
        flags = ["--port", free_port(), *argv.replace("TAKEN", busy).split()]  # the last counts
        code, _, err = exit_of(support_page.main, monkeypatch, capsys, *flags)
    assert is_one_line(code, err, says)

def test_without_its_packages(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav_bytes(tone(1)))
    code = ("import sys; sys.modules['gradio'] = None\n"
            "from support import cli, page; cli.run(page.main)")
    flags = ["--port", free_port(), "--examples", tmp_path]
    (tmp_path / "script.py").write_text(code)
    run = Fork(tmp_path / "script.py", *flags, out=tmp_path / "said")
    assert is_one_line(run.wait(120), run.communicate()[1], '"make page"')
