"""support/test_notebook.py -- borealis.ipynb as it is stored, and as it runs.

    python -m support.test_notebook    # run it, a minute of training, and store what it shows"""
import ast
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
import nbformat
import numpy as np
import pytest
import soundfile
from nbclient import NotebookClient
import data
from conftest import HERE, rows_in
from support.checkpoint import load_model

NOTEBOOK = HERE / "borealis.ipynb"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
COLAB = "import sys\nimport google.colab"  # a stand-in, which PYTHONPATH finds
EVAL_JS = """
import json
import pathlib
def eval_js(script):
    assert "getUserMedia" in script
    return json.loads(pathlib.Path(r"{}").read_text())
"""

def execute(notebook, cwd: Path = HERE, **env) -> None:
    """Run all cells in a kernel of their own, started in `cwd`; outputs go into the notebook."""
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", record_timing=False,
                            coalesce_streams=True, resources={"metadata": {"path": str(cwd)}})
    client.execute(env={**os.environ, "MPLBACKEND": "", **{k: str(v) for k, v in env.items()}})

def read():
    return nbformat.read(NOTEBOOK, as_version=4)

def cell_of(notebook, name: str):
    return next(cell for cell in notebook.cells if cell.id == name)

def printed(cell) -> str:
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")

def kinds(cell) -> list[str]:  # of what it shows beside text
    return [kind for out in cell.outputs for kind in out.get("data", ()) if kind != "text/plain"]

def store() -> None:
    notebook = read()
    execute(notebook)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    nbformat.write(notebook, NOTEBOOK)

@pytest.fixture
def notebook():
    return read()

def test_the_notebook_is_short_and_plain(notebook):
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 1_000_000 and 18 <= len(notebook.cells) <= 24
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    for cell in notebook.cells:
        assert not cell.metadata and len(cell.source.splitlines()) <= 20
        assert all(len(line) <= 100 for line in cell.source.splitlines()), cell.id
    for chapter in ("model", "data", "augment", "evaluation", "train.py"):
        assert any(f"{chapter}." in source or f"{chapter} " in source for source in code), chapter
    assert "OWNER" in code[0] and notebook.metadata == {
        "kernelspec": KERNEL, "language_info": {"name": "python"}}

def test_it_is_stored_as_it_ran(notebook):
    """All cells once, in order, without an error; nothing names the machine."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    for cell in code:
        assert cell.outputs, f"{cell.id} shows nothing: python -m support.test_notebook"
        assert all(out.output_type != "error" and out.get("name") != "stderr"
                   for out in cell.outputs), cell.id
        text = re.sub(r"base64,[\w+/=]+", "", json.dumps(
            [{**out, "data": {k: v for k, v in out.get("data", {}).items() if k != "image/png"}}
             for out in cell.outputs]))
        assert not re.search(r"/(tmp|root|work|home|usr|Users|content)\b", text), cell.id
    shown = {cell.id: kinds(cell) for cell in code}
    assert all("text/html" in shown[name] for name in ("hear", "augment", "noisy"))
    assert all("image/png" in shown[name] for name in ("mel", "augment", "watch", "attention"))
    assert "--steps 600 " in printed(cell_of(notebook, "train"))

def test_what_it_shows_is_what_it_says(notebook):
    shapes = printed(cell_of(notebook, "shapes"))
    assert "(1, 25, 128)" in shapes and "(1, 375, 2560)" in shapes
    tokens = printed(cell_of(notebook, "tokens"))
    assert "'<|AUDIO|>' x 25\n" in tokens and tokens.rstrip().endswith("<|im_end|>'")
    clean, noisy = (float(re.search(r"WER (\S+) %", printed(cell_of(notebook, name)))[1])
                    for name in ("transcribe", "noisy"))
    assert clean < 40 < 60 < noisy

def listing() -> dict:  # what lies in the checkout, without caches
    files = (path for path in HERE.rglob("*") if path.is_file())
    return {path: path.stat().st_mtime_ns for path in files
            if not re.search(r"/(\.|__pycache__|out)", str(path.relative_to(HERE.parent)))}

@pytest.mark.heavy
def test_it_runs(notebook, tmp_path):
    """With three steps, as on Colab: the browser's microphone; and once more with a file."""
    sample = data.embedded("ru", "voices", 1)[0]
    wave = data.load_audio(sample.audio[0]).numpy()
    soundfile.write(tmp_path / "me.wav", wave, 16000, subtype="FLOAT")
    (tmp_path / "me.json").write_text(json.dumps(wave.tolist()))
    colab = tmp_path / "fake" / "google" / "colab"
    colab.mkdir(parents=True)
    (colab / "__init__.py").touch()
    (colab / "output.py").write_text(EVAL_JS.format(tmp_path / "me.json"))
    own = copy.deepcopy(cell_of(notebook, "voice"))
    own.source = own.source.replace("VOICE = None", f"VOICE = {str(tmp_path / 'me.wav')!r}")
    own.id = "file"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(COLAB, id="colab"))
    notebook.cells.insert(notebook.cells.index(cell_of(notebook, "attention")), own)
    before, out = listing(), tmp_path / "out"
    execute(notebook, NANOBOREALIS_STEPS=3, NANOBOREALIS_OUT=out, PYTHONPATH=tmp_path / "fake",
            IPYTHONDIR=tmp_path / "ipython")
    assert len(rows_in(out)) == 3 and listing() == before
    assert "WER" in printed(cell_of(notebook, "noisy"))
    assert "image/png" in kinds(cell_of(notebook, "attention"))
    net = load_model(out, "cpu")
    heard = net.decode(net.generate(data.load_audio(str(tmp_path / "me.wav")))[0])
    assert printed(cell_of(notebook, "voice")).strip() == heard
    assert printed(cell_of(notebook, "file")).strip() == heard

def a_start(notebook, *cells):
    """The first cells, and no more."""
    notebook.cells = [*cells, *notebook.cells[:2]]
    return notebook

@pytest.mark.heavy
def test_it_fetches_the_project_on_colab(notebook, tmp_path):
    """From a repository, here a copy: all that it needs is there then, and installed."""
    repo, files = tmp_path / "repo", [*HERE.glob("*.py"), HERE / "requirements.txt"]
    shutil.copytree(HERE / "support", repo / "support", ignore=shutil.ignore_patterns("__pyc*"))
    for path in files:
        shutil.copy(path, repo)
    git = ["git", "-C", repo, "-c", "user.name=x", "-c", "user.email=x"]
    for argv in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *argv], check=True)
    (tmp_path / "fake/google/colab").mkdir(parents=True)
    (tmp_path / "fake/google/colab/__init__.py").touch()
    (tmp_path / "fake/pip").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{tmp_path}/asked"\n')
    (tmp_path / "fake/pip").chmod(0o755)
    start = a_start(notebook, nbformat.v4.new_code_cell(COLAB, id="colab"))
    start.cells[-1].source = re.sub('"https://.*?"', repr(f"file://{repo}"), start.cells[-1].source)
    start.cells.append(nbformat.v4.new_code_cell("print(model.__file__)", id="place"))
    (tmp_path / "content").mkdir()
    execute(start, cwd=tmp_path / "content", PYTHONPATH=tmp_path / "fake",
            PATH=f"{tmp_path / 'fake'}:{os.environ['PATH']}", IPYTHONDIR=tmp_path / "ipython")
    place = printed(start.cells[-1]).strip()
    assert Path(place).resolve() == (tmp_path / "content/nanoborealis/model.py").resolve()
    asked = (tmp_path / "asked").read_text().split()
    pins = re.findall(r"^\S+==\S+", (HERE / "requirements.txt").read_text(), re.M)
    left = {pin for pin in pins if re.match("torch|matplotlib", pin)}
    assert asked == ["install", "-q", *[pin for pin in pins if pin not in left]] and len(left) == 3

def test_elsewhere_it_says_what_is_missing(notebook, tmp_path):
    start = a_start(notebook)
    with pytest.raises(Exception, match="named 'augment'. Open this in"):
        execute(start, cwd=tmp_path, PYTHONPATH="", IPYTHONDIR=tmp_path / "ipython")

@pytest.mark.heavy
def test_the_browser_records(notebook):
    """RECORD, in Chromium with a microphone that beeps: three seconds at 16 kHz."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no Chromium here")
    source = cell_of(notebook, "voice").source
    script = next(node.value.value for node in ast.parse(source).body
                  if isinstance(node, ast.Assign) and node.targets[0].id == "RECORD")
    flags = ["--no-sandbox", "--use-fake-ui-for-media-stream",
             "--use-fake-device-for-media-stream"]
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page()
        page.route("**/*", lambda route: route.fulfill(body="", content_type="text/html"))
        page.goto("https://notebook.test/")  # microphones want a secure place
        wave = np.array(page.evaluate(script))
        browser.close()
    assert 2.5 < len(wave) / 16000 < 3.5 and 0.01 < abs(wave).max() <= 1.01

if __name__ == "__main__":
    sys.exit(store())
