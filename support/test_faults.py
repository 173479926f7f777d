"""support/test_faults.py -- what nights bring: a run ends in one line and goes on to the same bits.

Faults are real: limits and mounts of the kernel, signals, files changed under a run's feet. Most
runs are in this process, for they start at once; what must end by itself runs in one of its own."""
import contextlib
import itertools
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
import numpy as np
import pytest
import torch
import tqdm
from torch.utils._pytree import tree_flatten
import eval as evaluation
import train
from conftest import HERE, Fork, exit_of, free_port, is_one_line, newest, rows_in, tone, wav_bytes

# isort: split
from conftest import write_manifest
from support import checkpoint as ckpt
from support import cli, export, meter, storage

FAST = ["--preset", "tiny", "--workers", "0", "--curriculum", "none", "--silence", "0",
        "--effective_batch", "4", "--steps", "6", "--save_every", "2"]
FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja", "train_config.json", "state.pt"]
PAGE = os.sysconf("SC_PAGE_SIZE")

def state_of(out) -> list:  # weights, optimizer state, metrics without speeds: to the bit
    saved = torch.load(newest(out) / "state.pt", weights_only=True)
    leaves, shape = tree_flatten([storage.read_weights(newest(out)), saved])
    rows = [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in rows_in(out)]
    return [x.numpy().tobytes() if isinstance(x, torch.Tensor) else x for x in leaves] + [
        str(shape), rows]

def check(out, ended: tuple, *says: str, last: str = "none", code: int = 1) -> None:
    """One line that says so and what to do; the last checkpoint loads; nothing looks like one."""
    exit_code, _, err = ended
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert exit_code == code and len(lines) == 1 and "Traceback" not in err, ended
    assert all(word in lines[0] for word in (*says, f"last checkpoint: {last}", "--resume")), lines
    assert [str(path) for path in storage.steps_in(out)][-1:] == [last][:last != "none"]
    assert last == "none" or ckpt.load_model(out, "cpu")

# ---- Runs: in this process, or in one of their own that starts at once
@pytest.fixture
def run(manifest, monkeypatch, capsys):
    """run(out, *flags, resume=False) -> (exit code, stdout, stderr)"""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    def run(out, *flags, resume=False):
        start = ["--resume"] if resume else [*FAST, "--train_manifest", manifest]
        try:
            return exit_of(train.main, monkeypatch, capsys, *start, *flags, "--out", out)
        finally:
            for bar in [*tqdm.tqdm._instances]:  # as the end of the process would
                bar.close()
    return run

@pytest.fixture(scope="module")
def whole(manifest, tmp_path_factory):
    """A run that nothing disturbs -> its folder."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)
        argv = [*FAST, "--train_manifest", manifest, "--out", out]
        patch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        assert train.main() == 0
    return out

@pytest.fixture
def after_step(monkeypatch):
    """after_step(n, act): once, behind the n-th row of metrics.jsonl, in the run's own process."""
    write, acts = meter.Log.write, {}
    def written(self, row):
        write(self, row)
        acts.pop(row["step"], int)()
    monkeypatch.setattr(meter.Log, "write", written)
    return acts.__setitem__

class Run(Fork):
    """train.py in a process of its own, none of whose files grows beyond `most` bytes."""
    def __init__(self, *argv, most: int = resource.RLIM_INFINITY, **env):
        self.most, (file, said) = most, tempfile.mkstemp()
        os.close(file)
        super().__init__("train.py", *argv, out=Path(said), **{k: str(v) for k, v in env.items()})
    def run(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.most, resource.RLIM_INFINITY))
        super().run()
    def outcome(self, seconds: float = 120) -> tuple:  # (exit code, "", what it said)
        self.join(seconds)
        ended = self.exitcode
        self.kill()
        said = self.out.read_text()
        self.out.unlink()
        return ended, "", said

def ranks(*argv, **more) -> list[Run]:  # two, without torchrun, whose agent would end what hangs
    port = free_port()
    return [Run(*argv, **more, RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port) for rank in (0, 1)]

def wait_for(condition, alive=lambda: True) -> None:
    for _ in range(60_000):
        if condition():
            return
        assert alive()
        time.sleep(0.002)
    pytest.fail("waited in vain")

def saved(out) -> bool:  # is there a checkpoint, and none being written?
    return bool(storage.steps_in(out)) and not (out / ".new-step").exists()

# ---- The disk
@contextlib.contextmanager
def files_end_at(size: int):
    """No file grows beyond so many bytes: this process's and its children's writes fail then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

def lengths(out) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in newest(out).iterdir()}

@pytest.mark.parametrize("file, below", [
    ("metrics.jsonl", None), ("config.json", None), ("model.safetensors", "config.json"),
    ("state.pt", "model.safetensors"), ("the last byte", "")])
def test_disk_full_at_any_byte_of_a_file(whole, run, after_step, tmp_path, file, below):
    sizes = lengths(whole) | {"metrics.jsonl": (whole / "metrics.jsonl").stat().st_size // 6}
    rng = np.random.default_rng(len(file))
    if below == "":
        full = sizes["state.pt"] - 1
    else:
        full = int(rng.integers(sizes.get(below, 700 if file == "config.json" else 0), sizes[file]))
    with files_end_at(full):
        check(tmp_path / "first", run(tmp_path / "first"))
    assert not (tmp_path / "first" / ".new-step").exists() or file == "metrics.jsonl"
    out, last = tmp_path / "later", tmp_path / "later" / "step-0000002"
    def fill():
        wait_for(lambda: saved(out))
        more = (out / "metrics.jsonl").stat().st_size if file == "metrics.jsonl" else 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (full + more, resource.RLIM_INFINITY))
    after_step(3, fill)
    with files_end_at(resource.RLIM_INFINITY):
        check(out, run(out), last=str(last))
    assert run(out, resume=True)[0] == 0 and state_of(out) == state_of(whole)
    assert run(tmp_path / "first")[0] == 0 and state_of(tmp_path / "first") == state_of(whole)

@pytest.fixture
def disk(tmp_path):
    """A disk of 64 MiB -> its folder, a function that leaves so many pages of it free."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", place]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a disk here")
    def leave(pages: int):
        free = os.statvfs(place)
        with open(place / "filler", "ab") as file:
            file.write(bytes((free.f_bavail * free.f_frsize // PAGE - pages) * PAGE))
    yield place, leave
    subprocess.run(["umount", "--lazy", place], check=True)  # a lock is open until we end

@pytest.mark.parametrize("file", FILES)
def test_disk_full_in_each_file_of_a_save(whole, run, after_step, disk, file):
    (place, leave), sizes = disk, lengths(whole)
    out, pages = place / "out", {name: math.ceil(sizes[name] / PAGE) for name in FILES}
    before = sum(pages[name] for name in FILES[:FILES.index(file)])
    free = before + int(np.random.default_rng(0).integers(pages[file]))
    def fill():
        wait_for(lambda: saved(out))
        leave(free)
    after_step(3, fill)
    check(out, run(out), "cannot write to", last=str(out / "step-0000002"))
    assert not (out / ".new-step").exists()
    (place / "filler").unlink()
    assert run(out, resume=True)[0] == 0 and state_of(out) == state_of(whole)

def test_disk_full_from_the_start(run, disk):
    place, leave = disk
    leave(0)
    check(place / "out", run(place / "out"), "No space left on device")

def test_disk_full_on_rank_0_ends_rank_1(manifest, tmp_path):
    flags = [*FAST, "--train_manifest", manifest, "--batch_size", 2, "--out", tmp_path / "out"]
    ended = [rank.outcome() for rank in ranks(*flags, most=1_000_000)]
    check(tmp_path / "out", ended[0], "cannot write to")
    assert ended[1][0] == 1 and "Traceback" not in ended[1][2], ended[1]
    for rank in ranks(*flags):
        assert (ended := rank.outcome())[0] == 0, ended

def shell(*command) -> None:  # skips the test if it cannot be done here
    done = shutil.which(command[0]) and subprocess.run(command, capture_output=True)
    if not done or done.returncode:
        pytest.skip(f"no right to {command}")

def immutable(out, undo):
    undo.callback(subprocess.run, ["chattr", "-i", out, out / "metrics.jsonl"])
    shell("chattr", "+i", out, out / "metrics.jsonl")

def on_a_read_only_disk(out, undo):
    shell("mount", "--bind", out, out)
    undo.callback(subprocess.run, ["umount", "--lazy", out])
    shell("mount", "-o", "remount,bind,ro", out)

def of_another_user(out, undo):
    paths = {out: 0o555, out / "metrics.jsonl": 0o444} | dict.fromkeys([*out.parents][:3], 0o711)
    for path, mode in paths.items():
        undo.callback(path.chmod, path.stat().st_mode)
        path.chmod(mode)
    if os.geteuid() == 0:
        undo.callback(os.seteuid, 0)
        os.seteuid(65534)

def removed(out, undo):
    moved = out.with_name("moved")
    out.rename(moved)
    undo.callback(moved.rename, out)

def a_file(out, undo):
    removed(out, undo)
    out.touch()
    undo.callback(out.unlink)

@pytest.mark.parametrize("become", [immutable, on_a_read_only_disk, of_another_user, removed,
                                    a_file])
def test_out_is_no_longer_writable(whole, run, after_step, tmp_path, become):
    out = tmp_path / "out"
    with contextlib.ExitStack() as undo:
        def lose():
            wait_for(lambda: saved(out))
            become(out, undo)
        after_step(3, lose)
        ended = run(out)
        if gone := (tmp_path / "moved").exists():
            check(out, ended)
    if not gone:
        check(out, ended, last=str(out / "step-0000002"))
    assert run(out, resume=True)[0] == 0 and state_of(out) == state_of(whole)

# ---- Processes that are killed
def children(pid: int) -> dict[str, int]:
    """-> {environment: pid} of a process's own, which may end meanwhile."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"\nPPid:\t{pid}\n" in (place / "status").read_text():
                found[f"{(place / 'environ').read_text()} {place.name}"] = int(place.name)
    return found

def finish(runs: list[Run]) -> None:
    for one in runs:
        assert (ended := one.outcome())[0] == 0, ended

def test_sigkill_of_one_of_two_ranks(manifest, tmp_path):
    """Under torchrun, and without its agent, which would end what hangs."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = [*FAST, "--train_manifest", manifest, "--batch_size", 2, "--steps", 40]
    finish(ranks(*flags, "--out", whole))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2,
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", HERE / "train.py"]
    with subprocess.Popen([*map(str, [*command, *flags, "--out", out])],
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as agent:
        wait_for(lambda: storage.steps_in(out), lambda: agent.poll() is None)
        (victim,) = [pid for env, pid in children(agent.pid).items() if "\0RANK=1\0" in env]
        os.kill(victim, signal.SIGKILL)
        _, err = agent.communicate(timeout=60)
    err = err.split("Traceback")[0]  # of torchrun, which lists who ended how
    check(out, (agent.returncode, "", err), "was killed", last=str(newest(out)))
    first, second = ranks("--resume", "--out", out)
    before = newest(out)
    wait_for(lambda: newest(out) != before, first.is_alive)
    first.kill()
    check(out, second.outcome(60), "was killed", last=str(newest(out)))
    assert first.outcome()[0] == -signal.SIGKILL and newest(out).name < "step-0000040"
    finish(ranks("--resume", "--out", out))
    assert state_of(out) == state_of(whole)

def test_sigkill_of_a_loader_process(manifest, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = [*FAST, "--train_manifest", manifest, "--steps", 40]
    finish([Run(*flags, "--out", whole)])
    one = Run(*flags, "--workers", 2, "--out", out)
    wait_for(lambda: storage.steps_in(out), one.is_alive)
    loaders = children(one.pid)
    os.kill(max(loaders.values()), signal.SIGKILL)
    check(out, one.outcome(60), "was killed", last=str(newest(out)))
    assert len(loaders) >= 2 and newest(out).name < "step-0000040"
    finish([Run("--resume", "--out", out)])
    assert state_of(out) == state_of(whole)

@pytest.fixture
def stand_ins(manifest, original, parts):
    return ["--preset", "ru_only", "--workers", 0, "--lora_rank", 4, "--lr", 1e-3, "--keep", 2,
            "--effective_batch", 8, "--train_manifest", manifest, "--init_from", original,
            "--encoder", parts["encoder"], "--llm", parts["plain"], "--steps", 120,
            "--batch_size", 8, "--save_every", 1, "--optimizer", "muon", "--silence", 0,
            "--curriculum", "none"]

def half_done(out) -> bool:  # is a checkpoint being written, or an old one deleted?
    return (out / ".new-step").exists() or (out / ".old-step").exists()

def kill_in_a_save(process, out, delay) -> None:
    """SIGKILL at a moment when what is on the disk is half a checkpoint: stop, look, kill."""
    while True:
        wait_for(lambda: half_done(out), process.is_alive)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGSTOP)
        wait_for(lambda: ") T " in Path(f"/proc/{process.pid}/stat").read_text())
        if half_done(out):
            return process.kill()
        os.kill(process.pid, signal.SIGCONT)
        delay /= 2  # this machine saves faster

def test_twenty_kills_in_saves_and_six_elsewhere(stand_ins, tmp_path):
    """SIGKILL while a run reads, computes, saves or deletes: in the end, the same bits."""
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", np.random.default_rng(0)
    def step():
        return max((int(path.name[5:]) for path in storage.steps_in(killed)), default=0)
    def start():
        return Run(*(["--resume"] if step() else stand_ins), "--out", killed)
    finish([Run(*stand_ins, "--out", whole)])
    began, one, halves = time.perf_counter(), start(), 0
    wait_for(step, one.is_alive)
    first = time.perf_counter() - began  # seconds to the first checkpoint
    for moment in rng.permutation(["save"] * 20 + ["start"] * 3 + ["any"] * 3):
        if moment == "start":
            time.sleep(first * rng.uniform(0.1, 0.6))
            one.kill()
        else:
            wanted = step() + rng.integers(1, 3)
            wait_for(lambda wanted=wanted: step() >= wanted, one.is_alive)
            if moment == "save":
                kill_in_a_save(one, killed, rng.uniform(0, 0.02))
            else:
                time.sleep(rng.uniform(0, 0.1))
                one.kill()
        assert one.outcome()[0] == -signal.SIGKILL
        halves += half_done(killed)
        one = start()
    assert halves >= 20 and 20 < step() < 120
    finish([one])
    assert state_of(killed) == state_of(whole)

# ---- Data that changes under a run, and a clock that is set back
@pytest.fixture
def own(corpus, tmp_path):
    """A manifest of 20 rows whose recordings a test may spoil -> (path, its recordings)."""
    files = [tmp_path / f"{i}.wav" for i in range(20)]
    for file, s in zip(files, corpus, strict=False):
        file.write_bytes(wav_bytes(s.audio[0]))
    rows = [{"audio": f.name, "text": s.answer} for f, s in zip(files, corpus, strict=False)]
    return write_manifest(tmp_path / "own.jsonl", rows), files

@pytest.mark.parametrize("fault, reason", [
    ("nan", "audio holds NaN or Inf"), ("gone", "missing file"), ("half", "not audio")])
def test_recordings_spoilt_between_epochs(run, own, after_step, tmp_path, fault, reason):
    """They are counted, and the next rows take their place; the loss stays a number."""
    path, files = own
    def spoil():
        for file in files[::4]:
            if fault == "nan":
                wave = tone(1)
                wave[8000:8003] = torch.nan
                file.write_bytes(wav_bytes(wave, subtype="FLOAT"))
            elif fault == "gone":
                file.unlink()
            else:
                file.write_bytes(file.read_bytes()[:30])
    after_step(5, spoil)
    code, _, err = run(tmp_path / "out", "--train_manifest", path, "--steps", 10)
    rows = rows_in(tmp_path / "out")
    assert code == 0 and len(rows) == 10 and all(math.isfinite(r["loss"]) for r in rows), err
    assert f"left out, and replaced by the next rows: 5 {reason} (first: own.jsonl:" in err, err

def test_too_many_recordings_vanish(run, own, after_step, tmp_path):
    path, files = own
    after_step(3, lambda: [file.unlink() for file in files])
    code, _, err = run(tmp_path / "out", "--train_manifest", path)
    assert is_one_line(code, err, "1000 rows in a row cannot be used: 4000 missing file"), err
    assert newest(tmp_path / "out").name == "step-0000002"

def test_the_files_of_a_dataset_vanish(run, hub, after_step, tmp_path):
    """A copy of the hub's, between its epochs: what is open stays so; --resume wants it back."""
    copy, still, out = tmp_path / "hub", tmp_path / "still", tmp_path / "out"
    shutil.copytree(hub, copy)
    flags = ["--train_manifest", "none", "--mix", "ru_only", "--no-embedded", "--data_dir", copy]
    flags += ["--steps", 12]  # of 4 rows, and there are 36
    assert run(still, *flags)[0] == 0
    gone = []
    def vanish():
        gone.append(shutil.move(copy, tmp_path / "moved"))
        shutil.rmtree(gone[0])
    after_step(4, vanish)
    assert run(out, *flags)[0] == 0 and gone and state_of(out) == state_of(still)
    code, _, err = run(out, resume=True)
    assert is_one_line(code, err, f"no folder at {copy}"), err

def test_too_little_memory_and_a_bug_stay_what_they_were(run, tmp_path, monkeypatch):
    def fail(*_):
        raise errors.pop()
    errors = [RuntimeError("shapes differ"), torch.OutOfMemoryError("CUDA out of memory")]
    monkeypatch.setattr(train, "backward", fail)
    code, _, err = run(tmp_path / "a")
    assert is_one_line(code, err, "use --grad_checkpoint or a lower --batch_size: CUDA out"), err
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.run(train.main)
    caught = RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nshapes differ")
    for bug in caught, ValueError("no number in igloo"), KeyError("gloo"):
        assert storage.explained(bug, tmp_path) is bug

def test_the_clock_is_set_back(whole, run, manifest, tmp_path, monkeypatch, capsys):
    """An hour at each look, and files older than what they were made from: all goes on."""
    now, out = itertools.count(time.time(), -3600), tmp_path / "out"
    for place in ("time.time", "tqdm.std.time"):
        monkeypatch.setattr(place, lambda: next(now))
    def age():
        for i, path in enumerate(sorted(out.rglob("*"))):
            os.utime(path, (10**6 - i, 10**6 - i))  # seconds
    def ask(*more):
        argv = ["--ckpt", out, "--manifest", manifest, "--limit", 4, "--max_new_tokens", 3, *more]
        return exit_of(evaluation.main, monkeypatch, capsys, *argv)
    assert run(out)[0] == 0
    storage.prune(storage.steps_in(out)[1:])
    age()
    assert run(out, resume=True)[0] == 0 and state_of(out) == state_of(whole)
    assert all(row["ms"] > 0 and row["tokens_per_s"] > 0 for row in rows_in(out))
    age()
    assert ask()[0] == 0
    age()
    assert "4 of 4 utterances answered before" in ask("--reuse")[2]

def test_disk_full_in_eval_and_export(checkpoint, manifest, tmp_path, monkeypatch, capsys):
    """One line, exit code 1; what was answered stays, and the same command goes on."""
    argv = ["--ckpt", checkpoint, "--manifest", manifest, "--max_new_tokens", 4, "--out"]
    def limited(most, main, *argv):
        with files_end_at(most):
            code, _, err = exit_of(main, monkeypatch, capsys, *argv)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in err, err
        return code, lines[0]
    code, line = limited(2000, evaluation.main, *argv, tmp_path / "out")
    assert code == 1 and "File too large" in line and not (tmp_path / "out/results.json").exists()
    code, _, err = exit_of(evaluation.main, monkeypatch, capsys, *argv, tmp_path / "out")
    assert code == 0 and "answered before" in err
    code, line = limited(100_000, export.main, "--ckpt", checkpoint, "--to", tmp_path / "hf")
    assert code == 2 and sorted(p.name for p in tmp_path.iterdir()) == ["out"], line
