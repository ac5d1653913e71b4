"""What can be wrong with a model, its weights, its inputs and its output, as a user meets it."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

INPUT = ("--input", "32,4")


def _state(name: str) -> dict[str, torch.Tensor]:
    import runpy

    return runpy.run_path("net.py")[name]().state_dict()


def _one_line(ran, code: int) -> str:
    """The error: one line and perhaps a hint, no traceback, nothing on stdout."""
    assert ran.code == code, ran
    assert ran.stdout == ""
    assert "Traceback" not in ran.stderr
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ran.stderr
    return errors[0]


def _write(name: str, text: str) -> None:
    Path(name).write_text(text)


@pytest.mark.parametrize(
    ("files", "spec", "inputs", "fragments"),
    [
        ({}, "missing.py:Net", INPUT, ["missing.py", "No such file"]),
        ({}, "net.py:Nett", INPUT, ["has no 'Nett'", "Net (nn.Module)", "Raises"]),
        ({"s.py": "def broken(:\n"}, "s.py:Net", INPUT, ["syntax error", "s.py:1"]),
        (
            {"e.py": "import os\n\nboom = 1 / 0\n"},
            "e.py:Net",
            INPUT,
            ["ZeroDivisionError", "e.py:3"],
        ),
        ({"x.py": "import sys\nsys.exit(0)\n"}, "x.py:Net", INPUT, ["SystemExit", "x.py:2"]),
        ({}, "net.py:Net", ("--input", "2,5"), ["mat1 and mat2", "net.py:"]),
        ({}, "net.py:Raises", INPUT, ["ValueError", "no such luck", "net.py:"]),
        ({}, "nowhere:resnet18", INPUT, ["no module 'nowhere'"]),
        ({}, "timm:no_such_model", (), ["no_such_model"]),
        ({}, "net.py:loader", INPUT, ["not an nn.Module"]),
    ],
)
def test_models_that_cannot_be_had_or_run(user, run_cli, files, spec, inputs, fragments):
    for name, text in files.items():
        _write(name, text)
    ran = run_cli("insert", spec, *inputs, cwd=user)
    error = _one_line(ran, 3)
    for fragment in fragments:
        assert fragment in error


def test_an_unknown_registry_is_a_wrong_command_line(user, run_cli):
    ran = run_cli("insert", "keras.io:resnet18/v2", *INPUT, cwd=user)
    assert "no SPEC" in _one_line(ran, 2)
    assert "torchvision" in ran.stderr


class Payload:
    """Unpickling it creates a file."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch pwned",)


def test_a_refused_pickle_lists_what_it_wants_and_does_not_run(user, run_cli):
    torch.save({"state_dict": _state("Quiet"), "x": Payload()}, "evil.pt")
    Path("raw.pt").write_bytes(pickle.dumps(Payload()))
    ran = run_cli("insert", "net.py:Quiet", *INPUT, "--weights", "evil.pt", cwd=user)
    assert "system" in _one_line(ran, 3)
    assert "--trust-global" in ran.stderr
    assert "--unsafe-pickle" in ran.stderr
    _one_line(run_cli("insert", "net.py:Quiet", *INPUT, "--weights", "raw.pt", cwd=user), 3)
    assert not (user / "pwned").exists()


def test_no_configuration_can_lower_the_guard(user, run_cli):
    torch.save({"state_dict": _state("Quiet"), "x": Payload()}, "evil.pt")
    words = ("insert", "net.py:Quiet", *INPUT, "--weights", "evil.pt")
    env = {"BNIFY_UNSAFE_PICKLE": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    assert run_cli(*words, cwd=user, env=env).code == 3
    _write("pyproject.toml", "[tool.bnify]\nunsafe-pickle = true\n")
    assert run_cli(*words, cwd=user).code == 2
    assert not (user / "pwned").exists()


@pytest.mark.parametrize(
    ("name", "size", "break_state", "fragments"),
    [
        ("Quiet", "32,4", lambda s: s.update({"fc1.weight": torch.randn(9, 4)}), ["fc1.weight"]),
        ("Quiet", "32,4", lambda s: s.update({"extra": torch.randn(2)}), ["extra"]),
        (
            "Normed",
            "4,3,8,8",
            lambda s: [s.pop(k) for k in ("bn.running_mean", "bn.running_var")],
            ["bn.running_mean", "2 missing"],
        ),
        (
            "Quiet",
            "32,4",
            lambda s: s["fc1.weight"].__setitem__((0, 0), float("nan")),
            ["not finite", "fc1.weight (1 of 32)"],
        ),
        (
            "Normed",
            "4,3,8,8",
            lambda s: s["bn.running_var"].fill_(float("inf")),
            ["not finite", "bn.running_var"],
        ),
    ],
)
def test_checkpoints_that_do_not_fit(user, run_cli, name, size, break_state, fragments):
    state = _state(name)
    break_state(state)
    torch.save(state, "w.pt")
    ran = run_cli("insert", f"net.py:{name}", "--input", size, "--weights", "w.pt", cwd=user)
    error = _one_line(ran, 3)
    for fragment in fragments:
        assert fragment in error


def test_weights_of_the_model_itself_that_are_not_finite(user, run_cli):
    _write("bad.py", "from torch import nn\nnet = nn.Linear(4, 2)\nnet.weight.data[0] = 1e999\n")
    ran = run_cli("insert", "bad.py:net", *INPUT, cwd=user)
    assert "weight holds 4 non-finite values" in _one_line(ran, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_cuda_that_is_not_there_is_never_the_cpu(user, run_cli):
    ran = run_cli("insert", "net.py:Quiet", *INPUT, "--device", "cuda", cwd=user)
    assert "CUDA" in _one_line(ran, 3)
    ran = run_cli("insert", "net.py:Quiet", *INPUT, "--device=cuda", "--format=json", cwd=user)
    assert ran.code == 3
    assert json.loads(ran.stdout)["error"]["kind"] == "DeviceError"


def test_outputs_that_cannot_be_written(user, run_cli):
    words = ("insert", "net.py:Quiet", *INPUT, "--no-onnx", "-o")
    (user / "there").mkdir()
    assert "exists already" in _one_line(run_cli(*words, "there", cwd=user), 2)
    assert "is not a folder" in _one_line(run_cli(*words, "net.py/out", cwd=user), 3)
    assert "cannot write" in _one_line(run_cli(*words, "/proc/out", cwd=user), 3)


# As root permissions mean nothing: the right to overrule them is given up first.
WITHOUT_OVERRULE = """
import ctypes, os, sys
from bnify.cli import main
if os.getuid() == 0:
    libc = ctypes.CDLL(None)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    data[0] &= ~0b110
    data[1] &= ~0b110
    assert libc.capset(header, data) == 0
main(sys.argv[1:])
"""


def test_a_read_only_output(user, run_python):
    (user / "ro").mkdir(mode=0o555)
    words = ("insert", "net.py:Quiet", *INPUT, "--no-onnx", "-o", "ro/out")
    ran = run_python("-c", WITHOUT_OVERRULE, *words, cwd=user)
    error = _one_line(ran, 3)
    assert "cannot write ro/out" in error
    assert "read-only" in error


FULL_DISK = """
import resource, sys
from bnify.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))
main(sys.argv[1:])
"""


def test_a_full_disk_while_writing(user, run_python):
    words = ("insert", "net.py:Quiet", *INPUT, "--no-onnx", "-o", "out")
    assert "cannot write" in _one_line(run_python("-c", FULL_DISK, *words, cwd=user), 3)
    assert not list(user.glob("*out*"))


def test_killed_while_working_leaves_nothing_and_the_next_run_succeeds(user, child_env, run_cli):
    words = ("insert", "net.py:Quiet", *INPUT, "--no-onnx", "-o", "out")
    child = subprocess.Popen(
        [sys.executable, "-m", "bnify", *words], env=child_env, cwd=user,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    # As soon as the temporary folder is there, in the middle of the writing.
    deadline = time.monotonic() + 60
    while child.poll() is None and not list(user.glob(".out.*")) and time.monotonic() < deadline:
        time.sleep(0.0005)
    child.kill()
    child.wait()
    if (user / "out").exists():
        assert len(list((user / "out").iterdir())) == 3
        words = (*words, "--force")
    assert run_cli(*words, cwd=user).code == 0
    assert [p.name for p in user.iterdir() if "out" in p.name] == ["out"]
