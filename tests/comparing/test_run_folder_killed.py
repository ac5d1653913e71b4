"""What a run folder holds is whole, whatever befalls the writer: a kill, a full disk, a rival."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from comparing.tinyjob import train, trials

from bnify.atomic import OutputError
from bnify.comparing.run_folder import RunFolder
from bnify.comparing.trial import Outcome

PATHS = os.pathsep.join(str(path) for path in sys.path if path)


def _open(path, question, *, resume=False, force=False):
    return RunFolder.opened(path, question, resume=resume, force=force)


def _outcome(seed, **more):
    return Outcome(trial=trials(seed + 1)[seed], steps=(0, 5), train=(0.1, 0.2), **more)


def _listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


WRITER = """
import sys, time
from pathlib import Path
from comparing.tinyjob import train, trials
from bnify.comparing.run_folder import RunFolder
path, resume = Path(sys.argv[1]), sys.argv[2] == "resume"
train(trials(1)[0])  # torch is slow the first time
with RunFolder.opened(path, {"q": 1}, resume=resume, force=False) as folder:
    print("open", flush=True)
    for trial in trials(400):
        if trial not in folder.outcomes():
            folder.keep(train(trial))
    if len(sys.argv) > 3:
        time.sleep(60)
print("done")
"""


def _writer(path, child_env, *words):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, path, *words],
        env={**child_env, "PYTHONPATH": PATHS},
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )


def test_a_killed_writer_leaves_whole_outcomes_only(tmp_path, child_env):
    run, chance = tmp_path / "run", random.Random(0)
    counts = []
    for kill in range(10):
        words = ("resume" if kill else "new",)
        with _writer(run, child_env, *words) as writer:
            assert writer.stdout.readline() == "open\n"
            time.sleep(chance.uniform(0, 0.3))
            writer.send_signal(signal.SIGKILL)
        with _open(run, {"q": 1}, resume=True) as folder:
            assert folder.notes == []
            kept = folder.outcomes()
        counts.append(len(kept))
        assert not list(run.rglob("*.tmp"))
        for trial in chance.sample(list(kept), min(4, len(kept))):
            assert repr(kept[trial]) == repr(train(trial))
    assert counts == sorted(counts)
    assert 0 < counts[-1] < 400, "no writer was killed at work"


@pytest.mark.parametrize("step", range(1, 18))
def test_a_writer_killed_at_any_call_leaves_a_folder_that_goes_on(step, tmp_path, run_python):
    dying = f"""
import os, pathlib, signal
count = 0
def tick():
    global count
    count += 1
    if count == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
def dying(function):
    def call(*args, **kwargs):
        tick()
        return function(*args, **kwargs)
    return call
class Half:
    def __init__(self, stream):
        self.stream = stream
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.stream.close()
    def __getattr__(self, name):
        return getattr(self.stream, name)
    def write(self, text):
        self.stream.write(text[: len(text) // 2])
        self.stream.flush()
        tick()
        self.stream.write(text[len(text) // 2 :])
real = pathlib.Path.open
def opened(self, mode="r", *args, **kwargs):
    stream = real(self, mode, *args, **kwargs)
    return Half(stream) if mode == "wb" else stream
pathlib.Path.open = opened
from bnify.comparing.run_folder import RunFolder
from bnify.comparing.trial import Outcome, Trial
os.fsync, pathlib.Path.replace = dying(os.fsync), dying(pathlib.Path.replace)
with RunFolder.opened(pathlib.Path("run"), {{"q": 1}}, resume=False, force=False) as folder:
    folder.write("pilot", {{"p": 1}})
    for seed in range(2):
        trial = Trial(norm="batch", lr=0.1, batch_size=8, steps=12, seed=seed)
        folder.keep(Outcome(trial=trial, test=1.0))
"""
    ran = run_python("-c", dying, cwd=tmp_path)
    assert ran.code == -signal.SIGKILL, ran.stderr
    run = tmp_path / "run"
    began = (run / "run.json").exists()
    with _open(run, {"q": 1}, resume=began) as folder:
        assert folder.notes == []
        assert all(outcome.test == 1.0 for outcome in folder.outcomes().values())
        folder.write("pilot", {"p": 1})
        folder.keep(_outcome(2))
    assert not list(run.rglob("*.tmp"))


def test_a_second_process_is_kept_out_until_the_first_is_gone(tmp_path, child_env):
    run = tmp_path / "run"
    with _writer(run, child_env, "new", "stay") as writer:
        assert writer.stdout.readline() == "open\n"
        for more in ({"resume": True}, {"force": True}, {}):
            with pytest.raises(OutputError, match="another process"), _open(run, {"q": 1}, **more):
                pytest.fail("it opened")
        assert json.loads((run / "run.json").read_text()) == {"q": 1}
        writer.kill()
    with _open(run, {"q": 1}, resume=True):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    import resource

    large = replace(_outcome(1), train=(0.125,) * 10_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with _open(tmp_path / "run", {"q": 1}) as folder:
        folder.keep(_outcome(0))
        before = _listing(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(OutputError, match="file too large") as caught:
                folder.keep(large)
            with pytest.raises(OutputError, match="cannot write"):
                folder.write("pilot", {"long": "x" * 10_000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "--resume" in caught.value.hint
        assert _listing(tmp_path) == before
        assert set(folder.outcomes()) == {_outcome(0).trial}
        folder.keep(large)
        folder.write("pilot", {"long": "x" * 10_000})


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_place_is_an_error_in_words(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="cannot write"), _open(tmp_path / "run", {"q": 1}):
            pytest.fail("it opened")
    finally:
        tmp_path.chmod(0o700)


def test_a_place_below_a_file_is_an_error_in_words(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match="not a directory"),
        _open(tmp_path / "file" / "run", {"q": 1}),
    ):
        pytest.fail("it opened")


def test_user_code_that_changes_the_working_directory_moves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with _open(Path("run"), {"q": 1}) as folder:
        monkeypatch.chdir(tmp_path / "elsewhere")
        folder.keep(_outcome(0))
        folder.write("pilot", {})
    assert _listing(tmp_path / "elsewhere") == []
    assert len(_listing(tmp_path / "run")) == 4
