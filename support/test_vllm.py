"""support/test_vllm.py -- what only vLLM does: LoRA that is not merged, two processes."""
import base64
import json
import peft
import torch
from conftest import exit_of, needs_vllm, start, tone, train_now, wait_for, wav_bytes
from support import checkpoint as ckpt
from support import export

TASK = "Расшифруй: "
WAVES = [tone(0.5 + i, i) for i in range(6)]

def tokens_of(net, waves=WAVES):
    ids = net.generate(waves, f"{TASK}<|AUDIO|>", None, max_new_tokens=10)
    return [row[:row.index(net.ends[1])] if net.ends[1] in row else row for row in ids.tolist()]

def chat(client, model, wave):
    sound = dict(data=base64.b64encode(wav_bytes(wave, subtype="FLOAT")).decode(), format="wav")
    content = [dict(type="text", text=TASK), dict(type="input_audio", input_audio=sound)]
    answer = client.chat.completions.create(
        model=model, messages=[dict(role="user", content=content)], max_tokens=10,
        extra_body=dict(return_token_ids=True))
    return answer.choices[0].token_ids

@needs_vllm
def test_an_unmerged_run_is_served(manifest, original, parts, tmp_path, monkeypatch, capsys):
    """By its name, the tokens of the merged run; by the server's, those without the matrices."""
    train_now(monkeypatch, "--preset", "ru_only", "--workers", 0, "--lora_rank", 4, "--lr", 0.02,
              "--effective_batch", 4, "--steps", 6, "--train_manifest", manifest, "--init_from",
              original, "--encoder", parts["encoder"], "--llm", parts["plain"],
              "--out", tmp_path / "out")
    flags = "--ckpt", tmp_path / "out", "--to", tmp_path / "hf", "--unmerged"
    code, out, _ = exit_of(export.main, monkeypatch, capsys, *flags)
    assert code == 0 and "hf/lora" in out
    merged = ckpt.load_checkpoint(tmp_path / "out", dtype=torch.float32)
    base = ckpt.load_checkpoint(tmp_path / "hf", dtype=torch.float32)
    expected = dict(run=tokens_of(merged), borealis=tokens_of(base))
    server = process, *_, client = start(
        tmp_path, "--ckpt", tmp_path / "hf", "--enable-lora", "--lora-modules",
        json.dumps(dict(name="run", path=str(tmp_path / "hf" / "lora"))))
    try:
        wait_for(*server)
        said = {name: [chat(client, name, wave) for wave in WAVES] for name in expected}
    finally:
        process.terminate()
        process.wait(60)
    assert said == expected and said["run"] != said["borealis"]
    base.llm = peft.PeftModel.from_pretrained(base, tmp_path / "hf" / "lora").get_base_model().llm
    assert tokens_of(base) == expected["run"]
