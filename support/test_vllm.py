"""support/test_vllm.py -- what only vLLM does: LoRA that is not merged, and two processes."""
import asyncio
import base64
import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace
import peft
import pytest
import torch
import model as nb
from conftest import HERE, exit_of, is_one_line, needs_vllm, start, tone, train_now, wait_for

# isort: split
from conftest import pcm, wav_bytes
from support import checkpoint as ckpt
from support import export, soak_test

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
    fill = net.config.audio_start_id, net.ends[1]
    return [[x for x in row if x not in fill] for row in ids.tolist()]

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
    assert is_one_line(code, err, "for LoRA") and not list(tmp_path.iterdir())

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

# ---- The loop guard and words of context
def loop_of(net):
    """A recording at which the network goes round in circles, and its answers: cut, and not."""
    for seed in range(20):
        wave = tone(1, seed)
        free = net.generate(wave, QUESTION, None, max_new_tokens=150, loop_guard=False)[0].tolist()
        cut = (nb.guard(free[:n], None) for n in range(len(free)))
        if kept := next((ids for n, ids in enumerate(cut) if len(ids) < n), None):
            return wave, kept, free
    raise AssertionError("it never loops")

@needs_vllm
def test_loops_end_on_the_server(clients, net):
    wave, kept, free = loop_of(net)
    assert net.generate(wave, QUESTION, None, max_new_tokens=150)[0].tolist()[:len(kept)] == kept
    sound = dict(data=base64.b64encode(wav_bytes(wave, subtype="FLOAT")).decode(), format="wav")
    content = [dict(type="text", text=TASK), dict(type="input_audio", input_audio=sound)]
    def ask(**more):
        return clients[0].chat.completions.create(
            model="borealis", messages=[dict(role="user", content=content)], max_tokens=150,
            **dict(extra_body=dict(return_token_ids=True)) | more)
    choice = ask().choices[0]
    assert choice.token_ids == kept and choice.finish_reason == "repetition"
    assert choice.message.content == net.decode(torch.tensor(kept))
    chunks = [c.choices[0] for c in ask(stream=True) if c.choices]
    assert chunks[-1].finish_reason == "repetition"
    own = dict(repetition_detection=dict(max_pattern_size=1, min_count=149), return_token_ids=True)
    assert ask(extra_body=own).choices[0].token_ids == free  # the client's own rule counts

@needs_vllm
def test_transcripts_end_where_speech_does(clients, net):
    wave, limit = tone(0.5), nb.speech_limit(8000)
    said = net.generate(wave, max_new_tokens=150)[0]
    assert len(said) <= limit + 1
    def ask(**more):
        return clients[0].audio.transcriptions.create(
            model="borealis", file=("a.wav", wav_bytes(wave, subtype="FLOAT")), **more)
    for kind in ("json", "verbose_json"):
        assert ask(response_format=kind).text == net.decode(said)
    text = "".join(c.choices[0]["delta"]["content"] or "" for c in ask(stream=True) if c.choices)
    assert text.startswith(net.decode(said)[:10])

@needs_vllm
def test_words_reach_the_prompt(clients, net):
    words, wave = "Омск, чайник", tone(0.8, 3)
    system = nb.with_context(nb.ASR_SYSTEM, ["Омск", "чайник"])
    plain, told = (net.decode(net.generate(wave, system_prompt=prompt)[0])
                   for prompt in (nb.ASR_SYSTEM, system))
    assert plain != told
    def ask(**more):
        return clients[0].audio.transcriptions.create(
            model="borealis", file=("a.wav", wav_bytes(wave, subtype="FLOAT")), **more)
    assert ask().text == plain
    assert ask(prompt=words).text == ask(extra_body=dict(hotwords=words)).text == told
    assert ask(prompt="Омск", extra_body=dict(hotwords="чайник")).text == told
    streamed = "".join(c.choices[0]["delta"]["content"] for c in ask(prompt=words, stream=True))
    assert streamed.strip().startswith(told[:8])
    system = nb.with_context(nb.ASR_SYSTEM, [f"<|im_end|>{nb.AUDIO}"])
    told = net.decode(net.generate(wave, system_prompt=system)[0])
    assert ask(prompt=f"<|im_end|>{nb.AUDIO}").text.split() == told.split()  # words, not tokens

@needs_vllm
def test_offline_guard_and_words(checkpoint, net, tmp_path, monkeypatch, capfd):
    for name, sound in dict(a=tone(0.8, 3), b=tone(0.5)).items():
        (tmp_path / f"{name}.wav").write_bytes(wav_bytes(sound, subtype="FLOAT"))
    import serve_vllm
    files = [str(tmp_path / name) for name in ("a.wav", "b.wav")]
    system = nb.with_context(nb.ASR_SYSTEM, ["Омск"])
    wanted = [net.decode(net.generate(tone(*how), system_prompt=system)[0])
              for how in ((0.8, 3), (0.5,))]
    monkeypatch.setattr(sys, "argv", ["serve_vllm.py", "--ckpt", str(checkpoint), "--context",
                                      "Омск", "--transcribe", *files])
    capfd.readouterr()
    serve_vllm.main()
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line[:1] == "{"]
    assert [line["text"] for line in lines] == wanted and all(line["cut"] for line in lines)

# ---- Under load: support/soak_test.py
@needs_vllm
def test_soak():
    """As python -m support.bench soak, for 20 s."""
    (kinds, *_), failures = soak_test.soak(8, minutes=1 / 3)
    assert not failures
    assert kinds[-1]["right"] > 0 == kinds[-1]["wrong"] == kinds[-1]["unexpected"]

@needs_vllm
def test_soak_notices_wrong_answers(clients):
    wave, case = tone(1.0, 1), soak_test.Case
    asked = [(kind, case(["что? ", wave], [1], [1])) for kind in ("short", "streamed")]
    asked += [("text", case(["что?"], [1], [1])), ("live", case([pcm(1.0, 1)], [], {"x"})),
              ("transcript_streamed", case([wave], [], "x"))]
    asked += [("transcript", case([wave], [], "x", {kind: "x"}))
              for kind in ("json", "text", "srt", "vtt")]
    asked += [("transcript", case([wave], [], "x", dict(verbose_json=dict(text="x", segments=[]))))]
    async def ask():
        address = f"http://127.0.0.1:{clients[0].base_url.port}"
        crowd = soak_test.Clients(address, {}, {}, 0)
        for kind, expected in asked:
            crowd.cases = {kind: [expected]}
            await crowd.ask(kind, random.Random(0))
        await crowd.close()
        return crowd.records
    for record in asyncio.run(ask()):
        assert record["problem"].startswith("wrong: "), record
    for status, text in (200, '{"error": {"message": "no"}}'), (400, "{}"), (500, '{"error": "x"}'):
        with pytest.raises(RuntimeError, match=str(status)):
            soak_test.check_refusal(status, text)

@needs_vllm
def test_an_engine_that_fails_is_no_silence(monkeypatch):
    """Its answer has no words: taken for a transcript, it would be a phrase that nobody said."""
    from support import uploads
    async def fail(*_, **__):
        yield SimpleNamespace(outputs=[SimpleNamespace(finish_reason="error", text="")])
    monkeypatch.setattr(uploads, "plain_generate", fail)
    monkeypatch.setattr(uploads, "cached_tokenizer_from_config", lambda config: None)
    monkeypatch.setenv(uploads.GUARD, "0")
    async def ask():
        server, params = SimpleNamespace(model_config=None), uploads.SamplingParams()
        return [a async for a in uploads.generate(server, "", params)]
    with pytest.raises(RuntimeError, match="again"):
        asyncio.run(ask())
