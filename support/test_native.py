"""Exported folders as users of transformers load them: both layouts, processor and pipeline."""
import importlib.metadata as metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
import pytest
import soundfile
import torch
import model as nb
from conftest import tone, train_now
from support import checkpoint as ckpt
from support import export, processing, rows

N = 10  # new tokens, too few for a loop: transformers alone does not end them
FAR = """
import json, sys
sys.path.append(sys.argv[1])
import torch
from transformers import AutoFeatureExtractor, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer
from transformers import pipeline
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
                try:
                    required(needed.lower().replace("_", "-"), found)
                except metadata.PackageNotFoundError:
                    pass  # for another platform
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
    assert not {"model", "data", "soundfile", "torchaudio", "peft", "accelerate"} & {*answer["seen"]}
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
