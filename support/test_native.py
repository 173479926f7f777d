"""Exported folders as users of transformers load them: both layouts, processor and pipeline."""
import base64
import contextlib
import http.server
import importlib.metadata as metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import soundfile
import torch
import transformers as hf
import model as nb
from conftest import A, exit_of, is_one_line, tone, train_now
from support import checkpoint as ckpt
from support import export, pauses, processing, rows, tiny
from support.processing import BorealisProcessor, load_audio

N = 10  # new tokens, too few for a loop: transformers alone does not end them
FAR = """
import json, sys
sys.path.append(sys.argv[1])
import torch
from transformers import AutoFeatureExtractor, AutoModelForMultimodalLM, AutoProcessor
from transformers import AutoTokenizer, pipeline
out = {}
for name in ("tiny", "lora", "original"):
    for layout in ("voxtral", "remote"):
        folder, remote = f"{name}-{layout}", layout == "remote"
        model = AutoModelForMultimodalLM.from_pretrained(
            folder, **dict(trust_remote_code=True) if remote else {})
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        def answers(inputs):
            ids = model.generate(**inputs, max_new_tokens=10)
            return ids[:, inputs["input_ids"].shape[1]:].tolist()
        def ask(chats):
            return answers(processor.apply_chat_template(chats, tokenize=True, return_dict=True,
                                                         return_tensors="pt"))
        said = [answers(processor.apply_transcription_request(audio, language="ru"))
                for audio in ("short.wav", "long.wav", ["short.wav", "long.wav"])]
        chats = json.load(open("chats.json"))
        out[folder] = [type(model).__module__, said, [*map(ask, chats)], ask(chats)]
        if remote:
            transcribe = pipeline("automatic-speech-recognition", folder, trust_remote_code=True)
            out[folder] += [transcribe("long.wav", max_new_tokens=10)["text"]]
            continue
        # Without any code of the folder: slots written by hand.
        tokenizer = AutoTokenizer.from_pretrained(folder)
        extractor = AutoFeatureExtractor.from_pretrained(folder)
        mel = extractor(torch.load("short.pt"), sampling_rate=16000, return_tensors="pt")
        ids = processor.apply_transcription_request("short.wav")["input_ids"]
        slots = ids[0].tolist().count(model.config.audio_token_id)
        text = tokenizer.apply_chat_template(json.load(open("asr.json")), tokenize=False,
                                             add_generation_prompt=True)
        start, end = json.load(open(f"{folder}/markers.json"))
        inputs = tokenizer(text.replace("<|AUDIO|>", start + "<|AUDIO|>" * slots + end),
                           return_tensors="pt")
        out[folder] += [answers(inputs | dict(input_features=mel.input_features))]
print(json.dumps(dict(out=out, seen=sorted(sys.modules))))
"""

def required(name: str, found: dict) -> dict:  # a package and all it needs -> their distributions
    if name not in found:
        found[name] = metadata.distribution(name)
        for line in found[name].requires or []:
            if "extra ==" not in line:
                needed = re.match(r"[\w.-]+", line)[0]
                with contextlib.suppress(metadata.PackageNotFoundError):  # for another platform
                    required(needed.lower().replace("_", "-"), found)
    return found

@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with nothing but torch, transformers, and what these need."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for name in ("torch", "transformers"):
        required(name, found)
    assert not {"soundfile", "torchaudio", "peft", "librosa", "datasets"} & found.keys()
    for package in found.values():
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(package.locate_file(top)).resolve())
    return folder

@pytest.fixture(scope="module")
def short():
    return tone(1.5, 1)

@pytest.fixture(scope="module")
def place(tmp_path_factory, checkpoint, original, parts, manifest, short):
    """Three checkpoints, exported in both layouts, and recordings -> the folder."""
    place, origin = tmp_path_factory.mktemp("far"), (parts["encoder"], parts["plain"])
    with pytest.MonkeyPatch.context() as patch:
        train_now(patch, "--preset", "ru_only", "--workers", 0, "--lora_rank", 4, "--lr", 0.01,
                  "--effective_batch", 4, "--steps", 2, "--train_manifest", manifest,
                  "--init_from", original, "--encoder", origin[0], "--llm", origin[1],
                  "--out", place / "lora")
    for name, source in dict(tiny=checkpoint, lora=place / "lora", original=original).items():
        for layout in ("remote", "voxtral"):
            net = export.export(source, place / f"{name}-{layout}", *origin, layout=layout)
            markers = [net.config.audio_start_id, net.config.audio_end_id]
            (place / f"{name}-{layout}" / "markers.json").write_text(
                json.dumps(net.tokenizer.convert_ids_to_tokens(markers)))
    for name, wave in dict(short=short, long=long_one(short)).items():
        soundfile.write(place / f"{name}.wav", wave, 16000, "PCM_16")
    torch.save(rows.load_audio(str(place / "short.wav")).numpy().tolist(), place / "short.pt")
    return place

def long_one(short):  # of three windows
    return torch.cat([short, torch.zeros(8000), tone(2.3, 2), torch.zeros(6000), tone(0.6, 3)])

def audio(file: str, key: str = "path") -> dict:
    return {"type": "audio", key: file}

def text(words: str) -> dict:
    return {"type": "text", "text": words}

CHATS = [
    [{"role": "user", "content": [audio("short.wav"), text("Что слышно?"), audio("long.wav")]}],
    [{"role": "system", "content": "Отвечай кратко."}, {"role": "user", "content": "Сколько?"},
     {"role": "assistant", "content": [text("Два.")]}, {"role": "user", "content": [text("Да?")]}],
    [{"role": "system", "content": [text("Отвечай.")]},
     {"role": "user", "content": [text("О чём это? "), audio("short.wav", "audio")]}]]
ASR = [dict(role="system", content=nb.ASR_SYSTEM), dict(role="user", content=nb.ASR_PROMPT)]

def waves_of(chat, place) -> list:
    waves = []
    for message in chat:
        parts = message["content"] if isinstance(message["content"], list) else []
        for part in parts:
            waves += [rows.load_audio(str(place / part[k])) for k in ("path", "audio") if k in part]
    return waves

def expected(net, place):  # what native code says
    def ids(chats):
        return net.chat(chats, [waves_of(chat, place) for chat in chats], max_new_tokens=N).tolist()
    a, b = (rows.load_audio(str(place / f"{name}.wav")) for name in ("short", "long"))
    said = [net.generate(wave, max_new_tokens=N).tolist() for wave in (a, b, [a, b])]
    return [said, [ids([chat]) for chat in CHATS], ids(CHATS)]

def test_tokens_far_from_the_project(place, alone, checkpoint, original, parts):
    """With nothing but torch and transformers, offline: transformers' class without our code, and
    ours from the folder, give the tokens of the project, three checkpoints through."""
    (place / "chats.json").write_text(json.dumps(CHATS))
    (place / "asr.json").write_text(json.dumps(ASR))
    env = dict(HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(place / "modules"), HOME=str(place),
               OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2"))
    done = subprocess.run([sys.executable, "-I", "-S", "-c", FAR, alone], cwd=place, env=env,
                          text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert not {"model", "data", "soundfile", "torchaudio", "peft"} & {*answer["seen"]}
    sources = dict(tiny=checkpoint, lora=place / "lora", original=original)
    varied = set()
    for name, source in sources.items():
        net = ckpt.load_checkpoint(source, parts["encoder"], parts["plain"])
        wanted = expected(net, place)
        varied |= {str(row) for row in wanted[0] + wanted[1]}
        module, *voxtral, bare = answer["out"][f"{name}-voxtral"]
        assert module == "transformers.models.voxtral.modeling_voxtral"
        assert voxtral == wanted and bare == wanted[0][0]
        module, *remote, whole = answer["out"][f"{name}-remote"]
        assert module.startswith("transformers_modules.") and remote == wanted
        pieces = processing.cut_at_pauses(rows.load_audio(str(place / "long.wav")), 32000)
        said = [net.decode(net.generate(piece, max_new_tokens=N)[0]) for piece in pieces]
        assert whole == " ".join(filter(None, said))
    assert len(varied) > 10  # what is heard decides what is said

@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):  # where transformers copies code of folders to
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        yield

@pytest.fixture(scope="module")
def remote(place):  # what users load -> model, processor
    folder = place / "tiny-remote"
    return (hf.AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True),
            hf.AutoProcessor.from_pretrained(folder, trust_remote_code=True))

def test_pipeline(place, net, short):
    """Long files, batches, generators, times, and all that a recording may be."""
    speak = hf.pipeline("automatic-speech-recognition", model=str(place / "tiny-remote"),
                        trust_remote_code=True, max_new_tokens=N)
    def said(wave):
        return net.decode(net.generate(wave, max_new_tokens=N)[0])
    long = load_audio(place / "long.wav")
    pieces = pauses.cut_at_pauses(long, 32000)
    texts, name = [said(piece) for piece in pieces], str(place / "long.wav")
    assert len(pieces) == 3 and len(set(texts)) == 3
    whole = {"text": " ".join(filter(None, texts))}
    timed = speak(name, return_timestamps=True)
    assert timed == speak(name, return_timestamps="segment")
    starts = np.cumsum([0, *map(len, pieces[:-1])]) / 16000
    for chunk, start, piece, text in zip(timed.pop("chunks"), starts, pieces, texts, strict=True):
        first, *_, last = processing.word_times(piece, f"{text} !", start)
        assert chunk == dict(timestamp=(first[0], last[1]), text=text)
    assert timed == whole
    brief = load_audio(place / "short.wav")
    both = [{"text": said(brief)}, whole]
    files = [str(place / "short.wav"), name]
    for batch_size in (1, 2, 16):
        assert speak(files, batch_size=batch_size) == both
        assert [*speak((f for f in files), batch_size=batch_size)] == both
    samples, data = brief.numpy(), (place / "short.wav").read_bytes()
    url = "data:audio/wav;base64," + base64.b64encode(data).decode()
    for source in (data, samples, brief, url, {"raw": samples, "sampling_rate": 16000},
                   {"array": samples, "sampling_rate": 16000, "path": "gone.wav"},
                   {"bytes": data, "path": None}, {"path": files[0]},
                   {"array": np.stack([samples, samples]), "sampling_rate": 16000},
                   {"array": np.stack([samples, samples], 1), "sampling_rate": 16000},
                   (samples * 32768).astype(np.int16)):
        assert speak(source) == both[0]
    assert speak([np.ones(1, np.float32), samples])[1] == both[0]  # of no whole frame
    one = speak(files[0], generate_kwargs=dict(max_new_tokens=1, language="ru"))
    assert one == {"text": net.decode(net.generate(brief, max_new_tokens=1)[0])} != both[0]
    with pytest.raises(ValueError, match="only segments have times"):
        speak(name, return_timestamps="word")
    with pytest.raises(ValueError, match="language 'de'"):
        speak(name, generate_kwargs=dict(language="de"))

@pytest.mark.parametrize("rate", [8000, 44100, 15999])
def test_other_rates(rate, tmp_path, monkeypatch):
    """Resampled as training does it, and without torchaudio and soundfile almost the same."""
    t = torch.arange(rate) / rate
    wave = 0.5 * torch.sin(2 * torch.pi * 300 * t) * torch.hann_window(rate, periodic=False)
    stereo = torch.stack([wave, torch.zeros(rate)])
    soundfile.write(tmp_path / "a.wav", stereo.T.numpy(), rate, "PCM_16")
    native = rows.load_audio(str(tmp_path / "a.wav"))
    assert torch.equal(load_audio(tmp_path / "a.wav"), native)
    given = load_audio({"array": stereo.numpy(), "sampling_rate": rate})
    assert torch.allclose(given, native, atol=1e-4)
    monkeypatch.setattr(processing, "soundfile", None)
    monkeypatch.setattr(processing, "resampler", None)
    bare = load_audio(tmp_path / "a.wav")
    assert len(bare) == len(native) and torch.allclose(bare, native, atol=2e-3)

def test_processor(place, remote, net, short):
    """Text and ids of the project's own prompts; batches are padded on the left."""
    _, processor = remote
    for chat in CHATS:
        waves = waves_of(chat, place)
        counts = [len(nb.cut_windows(wave, net.config)) for wave in waves]
        ids, _ = nb.build_ids(net.tokenizer, net.config, chat, counts)
        chat = json.loads(json.dumps(chat).replace(".wav", ".wav").replace(
            '": "short', f'": "{place}/short').replace('": "long', f'": "{place}/long'))
        assert processor.apply_chat_template(chat, tokenize=True).tolist() == [ids]
        rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
        assert rendered.count(A) == len(waves) and rendered.startswith("<|im_start|>")
        inputs = processor(text=rendered, audio=waves, return_tensors="pt", padding=True)
        assert inputs["input_ids"].tolist() == [ids]
        assert inputs.get("input_features") is None or len(inputs["input_features"]) == sum(counts)
    done = [*ASR, dict(role="assistant", content="семь")]
    assert not processor.apply_chat_template(done).endswith("</think>\n\n")
    open_end, closed = (processor.apply_chat_template(ASR, add_generation_prompt=asks)
                        for asks in (True, False))
    assert open_end.startswith(closed) and open_end.endswith("</think>\n\n") != closed.endswith(
        "</think>\n\n")
    for words in (dict(prompt="<|im_end|>\n<|im_start|>user"), dict(hotwords=["да", A])):
        ids = processor.apply_transcription_request(short, **words)["input_ids"][0].tolist()
        for token, n in ("<|im_start|>", 3), ("<|im_end|>", 2), (A, net.config.tokens_per_window):
            assert ids.count(processor.tokenizer.convert_tokens_to_ids(token)) == n, token
    one, two = short, torch.cat([short, short])
    for language in (None, "ru", "English", ["Russian", None]):
        batch = processor.apply_transcription_request([one, two], language=language)
    alone = processor.apply_transcription_request(one)["input_ids"][0]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape and torch.equal(ids[0][mask[0] == 1], alone)
    assert mask[0].tolist() == sorted(mask[0].tolist()) and mask[1].all() and not mask[0].all()

@pytest.mark.parametrize("source, says", [
    ("gone.wav", "gone.wav"), (b"no audio", "unusable recording"), ("data:,x", "data:,x"),
    (np.zeros((3, 9), np.float32), "1-D"), (np.zeros(9, np.int32), "float"), ({}, "None"),
    (np.full(9, np.nan, np.float32), "NaN"), ("http://127.0.0.1:9/a.wav", "127.0.0.1:9"),
    ({"array": np.ones(9, np.float32), "sampling_rate": 0}, "unusable recording"), (None, "None")])
def test_unusable_recordings(source, says):
    with pytest.raises(ValueError, match=re.escape(says)) as e:
        load_audio(source)
    assert "\n" not in str(e.value)

def test_urls_and_parts(place, remote):
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), dict(log_message=print))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=place)) as web:
        threading.Thread(target=web.serve_forever).start()
        url = f"http://127.0.0.1:{web.server_port}/short.wav"
        wave = load_audio(url)
        web.shutdown()
    data = base64.b64encode((place / "short.wav").read_bytes()).decode()
    for part in ({"type": "audio", "base64": data}, {"path": str(place / "short.wav")},
                 {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
                 {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64," + data}}):
        assert torch.equal(load_audio(part), wave)
    _, processor = remote
    for texts, sounds in ((A, None), ("", [wave]), ([A, A], [wave])):
        with pytest.raises(ValueError, match="placeholders for"):
            processor(text=texts, audio=sounds)
    chat = [{"role": "user", "content": [text(A)]}]
    ids = processor.apply_chat_template(chat, tokenize=True)[0].tolist()
    assert processor.config.audio_token_id not in ids and A in processor.tokenizer.decode(ids)

def test_generate_as_others_do(remote, net, short):
    """Several answers to each of two recordings; a transcript is as long as speech can be."""
    model, processor = remote
    asked = processor.apply_transcription_request([short, torch.cat([short, short])])
    ids = model.generate(**asked, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert len(ids) == 4 and torch.equal(
        ids[:, :asked["input_ids"].shape[1]], asked["input_ids"].repeat_interleave(2, 0))
    assert torch.equal(model.generate(**asked, max_new_tokens=3, pad_token_id=model.ends[1]),
                       model.generate(**asked, max_new_tokens=3))

def test_the_pipeline_knows_how_long_speech_is(place, short, monkeypatch):
    waves, heard = [short, torch.cat([short, short])], []
    speak = hf.pipeline("automatic-speech-recognition", model=str(place / "tiny-remote"),
                        trust_remote_code=True, max_new_tokens=3)
    answer = speak.model.answer
    monkeypatch.setattr(speak.model, "answer", lambda *args, limits=(None,), **settings: (
        heard.extend(limits), answer(*args, limits=limits, **settings))[1])
    for batch_size in (1, 2):
        heard.clear()
        speak(waves, batch_size=batch_size)
        pieces = [piece for wave in waves for piece in pauses.cut_at_pauses(wave, 32000)]
        assert heard == [nb.speech_limit(len(piece)) for piece in pieces] and len(heard) == 3

def test_round_trips(place, remote, short, tmp_path):
    """Saved and loaded again, model, processor and pipeline answer as before."""
    net, processor = remote
    inputs = processor.apply_transcription_request(short)
    said = net.generate(**inputs, max_new_tokens=N).tolist()
    assert said[0][:len(inputs["input_ids"][0])] == inputs["input_ids"][0].tolist()
    first, second = tmp_path / "first", tmp_path / "second"
    net.save_pretrained(first)
    processor.save_pretrained(first)
    assert {"model.py", "processing.py"} <= {path.name for path in first.iterdir()}
    shutil.move(first, second)
    twin = hf.AutoModelForMultimodalLM.from_pretrained(second, trust_remote_code=True)
    again = hf.AutoProcessor.from_pretrained(second, trust_remote_code=True)
    asked = again.apply_transcription_request(short)
    assert twin.generate(**asked, max_new_tokens=N).tolist() == said
    speak = hf.pipeline(model=str(second), trust_remote_code=True, max_new_tokens=N)
    assert speak(short)["text"] == net.decode(net.generate(short, max_new_tokens=N)[0])
    ours = BorealisProcessor.from_pretrained(place / "tiny-remote")  # in the project
    ours.save_pretrained(tmp_path / "ours")
    for copy in (ours, BorealisProcessor.from_pretrained(tmp_path / "ours")):
        made = copy.apply_transcription_request(short)
        assert all(torch.equal(made[key], inputs[key]) for key in inputs)
    for name in ("tiny", "original"):
        folder = place / f"{name}-voxtral"
        voxtral = hf.AutoModelForMultimodalLM.from_pretrained(folder)
        voxtral.save_pretrained(tmp_path / name)
        asked = hf.AutoProcessor.from_pretrained(
            folder, trust_remote_code=True).apply_transcription_request(short)
        twin = hf.AutoModelForMultimodalLM.from_pretrained(tmp_path / name)
        assert twin.config.to_dict() == voxtral.config.to_dict() | dict(
            _name_or_path=str(tmp_path / name))
        answers = [m.generate(**asked, max_new_tokens=N).tolist() for m in (voxtral, twin)]
        assert answers[0] == answers[1] and len(answers[0][0]) > len(asked["input_ids"][0])

def test_an_audio_token_without_a_row_is_never_said(place, original, parts, short):
    """In the original's layout: its row is empty, and would win where all other logits are < 0."""
    net = hf.AutoModelForMultimodalLM.from_pretrained(place / "original-voxtral")
    audio, table = net.config.audio_token_id, net.get_input_embeddings().weight
    assert audio == len(table) - 1 and not table[audio].any()
    assert net.generation_config.suppress_tokens == [audio]
    processor = hf.AutoProcessor.from_pretrained(place / "original-voxtral", trust_remote_code=True)
    inputs = processor.apply_transcription_request(short)
    with torch.no_grad():
        net.lm_head.weight[audio] = 1e3 * net(**inputs).logits.new_ones(table.shape[1])
        net.lm_head.weight[audio] *= torch.sign(net.model(**inputs).last_hidden_state[0, -1])
        assert net(**inputs).logits[0, -1].argmax() == audio
    new = net.generate(**inputs, max_new_tokens=N)[:, inputs["input_ids"].shape[1]:]
    assert audio not in new

def test_what_has_no_place_in_voxtral(tokenizer, place, tmp_path, monkeypatch, capsys):
    for key, value, says in (("adapter", "deep", "a simple adapter"),
                             ("downsample_factor", 5, "4 frames")):
        config = tiny.tiny_config(tokenizer)
        setattr(config, key, value)
        folder = tmp_path / says.replace(" ", "")
        nb.BorealisForConditionalGeneration(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        code, _, err = exit_of(export.main, monkeypatch, capsys, "--ckpt", folder, "--to",
                               tmp_path / "to", "--layout", "voxtral")
        assert is_one_line(code, err, says) and not (tmp_path / "to").exists()
    with pytest.raises(ValueError, match="holds a voxtral model, not a Borealis"):
        ckpt.load_checkpoint(place / "tiny-voxtral")
