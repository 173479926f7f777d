"""support/test_rehearsal.py -- the default command as it is, from training to serving, on stand-ins
that are as published in all but size: what a first run on eight GPUs would meet, without one."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
import pytest
import soundfile
import torch
import transformers as hf
import model as nb
from conftest import HERE, SHARED, Fork, fork_ranks, losses, needs_vllm, newest, rows_in

# isort: split
from conftest import train_now, write_original, write_qwen, write_whisper
from support import checkpoint as ckpt
from support import engine, recipes, storage
from support.pauses import without_thoughts
from support.rows import load_audio
from train import TrainConfig

QWEN_FILES = SHARED / "qwen3_tokenizer"  # the published ones, or else a small tokenizer's
STEPS, SAID = 4, 12  # SAID: tokens, as a random model does not end by itself
# A port that is free, as other tests may run beside this one: else torchrun's own settings.
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0"]
ELSEWHERE = """
import importlib.util, sys
assert not any(importlib.util.find_spec(name) for name in ("support", "data", "train"))
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained("hf", trust_remote_code=True)
waves = torch.load("waves.pt", weights_only=True)
print(model.dtype, model.generate(waves, max_new_tokens=int(sys.argv[1])).tolist())
"""

def output(process, code: int = 0) -> str:
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == code, stderr[-3000:]
    assert "Traceback" not in stderr or code, stderr[-3000:]
    return stdout

def answers(folder, jobs) -> list[str]:
    """In fp32, as eval.py and vLLM on a CPU."""
    net = ckpt.load_model(folder, "cpu")
    said = net.decode(net.generate(jobs["waves"], max_new_tokens=SAID))
    return [without_thoughts(text) for text in said]

@pytest.fixture(scope="module")
def place(tmp_path_factory, hub, corpus, plain_tokenizer):
    """D/owner/name is as the hub has it; 0.wav, 1.wav, 2.wav."""
    place = tmp_path_factory.mktemp("rehearsal")
    D, real = shutil.copytree(hub, place / "D"), QWEN_FILES.is_dir()
    write_whisper(D / nb.ENCODER, corpus, known=4)
    tokenizer = hf.AutoTokenizer.from_pretrained(QWEN_FILES) if real else plain_tokenizer
    write_qwen(D / nb.LLM, tokenizer)
    for path in QWEN_FILES.glob("*"):
        shutil.copyfile(path, D / nb.LLM / path.name)
    write_original(D / TrainConfig().init_from, D / nb.ENCODER, D / nb.LLM)
    for i, sample in enumerate(corpus[:3]):
        soundfile.write(place / f"{i}.wav", sample.audio[0], 16000)
    return place

@pytest.fixture(scope="module")
def start(place):
    """start(*argv): python ARGV in the project's folder, in a session of its own."""
    started, cache = [], str(place / "cache")
    env = os.environ | dict(NANOBOREALIS_CACHE=cache, HF_MODULES_CACHE=cache, PYTHONPATH="",
                            VLLM_CPU_KVCACHE_SPACE="1")
    def start(*argv, cwd: Path = HERE) -> subprocess.Popen:
        started.append(subprocess.Popen(
            [sys.executable, *map(str, argv)], cwd=cwd, env=env, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return started[-1]
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

@pytest.fixture(scope="module")
def stopped(place, start):
    """Training until a scheduler wants the machine back -> (what it said, rows, checkpoint)."""
    out = place / "out"
    run = start(*TORCHRUN, "train.py", "--data_dir", place / "D", "--steps", STEPS,
                "--batch_size", 2, "--out", out)
    while not rows_in(out):
        assert run.poll() is None, run.stderr.read()[-3000:]
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)  # to torchrun, which tells its processes
    return output(run, code=1), len(rows_in(out)), newest(out).name  # 1: torchrun's own

@pytest.fixture(scope="module")
def jobs(place, start, stopped):
    """The run goes on to its end and is exported. -> what is then done with it, all at once."""
    out, waves = place / "out", [load_audio(str(place / f"{i}.wav")) for i in range(3)]
    def fork(script, *argv):
        name = Path(script).stem
        return Fork(script, *argv, out=place / f"{name}.out", err=place / f"{name}.err", **cache)
    cache = dict(NANOBOREALIS_CACHE=str(place / "cache"))
    fork_ranks(2, "--resume", "--out", out, **cache)
    output(fork("support/export.py", "--ckpt", out, "--to", place / "hf"))
    torch.save(waves, place / "waves.pt")
    evaluate = ["eval.py", "--ckpt", out, "--data_dir", place / "D", "--baseline",
                place / "D" / nb.ENCODER, "--max_new_tokens", SAID]
    transcribe = [HERE / "serve_vllm.py", "--ckpt", "hf", "--max_new_tokens", SAID,
                  "--transcribe", "0.wav", "1.wav", "2.wav"]
    return dict(waves=waves, evaluate=fork(*evaluate),
                elsewhere=start("-c", ELSEWHERE, SAID, cwd=place),
                vllm=start(*transcribe, cwd=place) if engine.INSTALLED else None)

def test_a_run_is_stopped_and_goes_on(place, stopped, jobs, tmp_path, monkeypatch):
    """Two processes, SIGTERM, two again: the losses of one process that nobody stopped."""
    rows, (printed, steps, name) = rows_in(place / "out"), stopped
    assert "2 process(es) on cpu, batch 2 x accumulation 32\n" in printed
    assert f"stopped at step {steps}, saved; go on with: " in printed
    assert 0 < steps < STEPS and name == f"step-{steps:07d}"
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
    final = newest(place / "out")
    saved = json.loads((final / "train_config.json").read_text())
    assert saved == saved | dict(preset="ru_text_10pct", mix="ru_text_10pct", lr=1e-5, step=STEPS,
                                 effective_batch=128, batch_size=2, lora_rank=256)
    weights = storage.read_weights(final)
    assert weights["new_rows"].shape == (2, 64)
    assert len([k for k in weights if "lora_A" in k]) == 2 * 7  # 2 layers of 7 linears
    assert {k for k in weights if "lora_" not in k} == {
        "adapter.w_in.weight", "adapter.w_out.weight", "new_rows"}
    assert all(v.dtype == torch.float32 for v in weights.values())
    _, whole = train_now(monkeypatch, "--data_dir", place / "D", "--steps", STEPS, "--workers", 0,
                         "--batch_size", 2, "--out", tmp_path)
    assert abs(losses(whole) - losses(rows)).max() < 1e-5

def test_the_benchmark_beside_whisper(place, jobs):
    printed, out = output(jobs["evaluate"]), place / "out"
    results = json.loads((out / "results.json").read_text())
    whisper = results["others"]["whisper-large-v3"]
    assert results["splits"].keys() == whisper["splits"].keys() == recipes.BENCHMARK.keys()
    assert whisper["avg_wer"] == 0 and "| whisper-large-v3 |" in printed  # it knows them by heart
    rows = [json.loads(line) for line in (out / "hypotheses.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 6 * 3 and not any(row["failed"] for row in rows)
    said = answers(out, jobs)
    assert len(set(said)) > 1 and all(said)
    assert [row["hypothesis"] for row in rows[:18]] == said * 6

def test_the_export_elsewhere(place, jobs):
    """In plain transformers, without this project: the tokens of the run, in its own dtype."""
    net = ckpt.load_checkpoint(place / "out")
    ids = net.generate(jobs["waves"], max_new_tokens=SAID)
    assert output(jobs["elsewhere"]).strip() == f"torch.bfloat16 {ids.tolist()}"
    settings = json.loads((place / "hf" / "generation_config.json").read_text())
    assert settings["pad_token_id"] == net.ends[1] == net.config.llm_config.pad_token_id

@needs_vllm
def test_the_export_in_vllm(place, jobs):
    rows = map(json.loads, output(jobs["vllm"]).splitlines())
    assert [row["text"] for row in rows] == answers(place / "hf", jobs)
