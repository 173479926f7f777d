"""support/test_vllm.py -- what only vLLM does: LoRA that is not merged, and two processes."""
import base64
import json
import os
import subprocess
import sys
import peft
import pytest
import torch
from conftest import HERE, exit_of, is_one_line, needs_vllm, start, tone, train_now, wait_for

# isort: split
from conftest import wav_bytes
from support import checkpoint as ckpt
from support import export

TASK = "Расшифруй: "
QUESTION = f"{TASK}<|AUDIO|>"
WAVES = [tone(0.5 + i, i) for i in range(6)]
SPLIT = """
import json, sys, torch
import serve_vllm  # the workers run this file, too
if __name__ == "__main__":
    from vllm.lora.request import LoRARequest
    from data import Sample
    from support import engine
    hf, question, waves = sys.argv[1], sys.argv[2], torch.load(sys.argv[3])
    vllm = engine.Offline(hf, 10, tensor_parallel_size=2, enable_lora=True)
    prompts = [engine.prompt(vllm.tokenizer, [w], Sample("", [w], question, "")) for w in waves]
    for lora in None, LoRARequest("run", 1, hf + "/lora"):
        answers = vllm.engine.generate(prompts, vllm.greedy, use_tqdm=False, lora_request=lora)
        print(json.dumps([list(a.outputs[0].token_ids) for a in answers]))
"""

def tokens_of(net):
    ids = net.generate(WAVES, QUESTION, None, max_new_tokens=10)
    return [[x for x in row if x != net.config.audio_start_id] for row in ids.tolist()]

def chat(client, model, wave):
    sound = dict(data=base64.b64encode(wav_bytes(wave, subtype="FLOAT")).decode(), format="wav")
    content = [dict(type="text", text=TASK), dict(type="input_audio", input_audio=sound)]
    answer = client.chat.completions.create(
        model=model, messages=[dict(role="user", content=content)], max_tokens=10,
        extra_body=dict(return_token_ids=True))
    return answer.choices[0].token_ids

@pytest.fixture(scope="module")
def run(manifest, checkpoint, tmp_path_factory):
    """A LoRA run, exported unmerged: the folder, the tokens without its matrices and with them."""
    place = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        train_now(patch, "--preset", "ru_only", "--workers", 0, "--lora_rank", 4, "--lr", 1e-3,
                  "--effective_batch", 4, "--steps", 2, "--train_manifest", manifest,
                  "--init_from", checkpoint, "--out", place / "out")
    export.export(place / "out", place / "hf", unmerged=True)
    nets = [ckpt.load_checkpoint(place / name, dtype=torch.float32) for name in ("hf", "out")]
    without, merged = map(tokens_of, nets)
    assert without != merged
    return place / "hf", without, merged

def test_peft_loads_what_is_not_merged(run):
    hf, _, merged = run
    net = ckpt.load_checkpoint(hf, dtype=torch.float32)
    net.llm = peft.PeftModel.from_pretrained(net, hf / "lora").get_base_model().llm
    assert tokens_of(net) == merged

def test_what_has_no_lora_cannot_be_unmerged(checkpoint, tmp_path, monkeypatch, capsys):
    argv = "--ckpt", checkpoint, "--to", tmp_path / "hf", "--unmerged"
    code, _, err = exit_of(export.main, monkeypatch, capsys, *argv)
    assert is_one_line(code, err, "holds no LoRA") and not list(tmp_path.iterdir())

@needs_vllm
def test_an_unmerged_run_is_served(run, tmp_path):
    hf, without, merged = run
    server = process, *_, client = start(
        tmp_path, "--ckpt", hf, "--enable-lora", "--lora-modules", f"run={hf / 'lora'}")
    try:
        wait_for(*server)
        for model, expected in ("run", merged), ("borealis", without), ("run", merged):
            assert [chat(client, model, wave) for wave in WAVES] == expected
        for kind in "json", "verbose_json":
            file = "a.wav", wav_bytes(WAVES[1])
            texts = [client.audio.transcriptions.create(
                model=model, file=file, response_format=kind,
                extra_body=dict(max_completion_tokens=10)).text for model in ("run", "borealis")]
            assert texts[0] != texts[1], kind
    finally:
        process.terminate()
        process.wait(60)

@needs_vllm
@pytest.mark.heavy
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_two_processes_share_a_model(run, tmp_path):
    """The LLM, half of it in each, and LoRA: the same tokens."""
    hf, without, merged = run
    (tmp_path / "split.py").write_text(SPLIT)
    torch.save(WAVES, tmp_path / "waves.pt")
    one, two, *_ = sorted(os.sched_getaffinity(0))
    env = os.environ | dict(
        PYTHONPATH=str(HERE), NANOBOREALIS_CACHE=str(tmp_path), VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND=f"{one}|{two}")
    command = [sys.executable, "split.py", hf, QUESTION, "waves.pt"]
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True,
                          timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [*map(json.loads, done.stdout.splitlines()[-2:])] == [without, merged]
