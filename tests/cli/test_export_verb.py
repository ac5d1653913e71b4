"""``bnify export``, and the ONNX file of a saved folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import bnify

NET = "net.py:Quiet"
INPUT = ("--input", "8,4")


def _run(path, x: torch.Tensor) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def test_a_folder_has_a_verified_onnx_file_that_takes_any_batch(cli, user):
    ran = cli("insert", NET, "--input", "32,4", "-o", "out")
    assert ran.code == 0, ran
    assert {p.name for p in (user / "out").iterdir()} == {
        "model.safetensors",
        "bnify.json",
        "model.onnx",
        "report.json",
    }
    assert "ONNX file against the model" in ran.stdout
    assert "user: running" not in ran.stdout
    model = bnify.load("out")
    for batch in (1, 7):
        x = torch.randn(batch, 4)
        got = _run(user / "out" / "model.onnx", x)
        assert np.allclose(got, model(x).detach().numpy(), atol=1e-5)
    report = json.loads((user / "out" / "report.json").read_text())
    assert report["export"]["verification"]["passed"] is True
    assert report["files"]["onnx"] == "model.onnx"
    assert report["environment"]["hashes"]["onnx"]
    assert str(user) not in (user / "out" / "model.onnx").read_bytes().decode("latin-1")


def test_export_of_a_spec_and_of_a_folder(cli, user):
    ran = cli("export", NET, *INPUT, "-o", "model.onnx", "--format", "json")
    assert ran.code == 0, ran
    data = json.loads(ran.stdout)
    assert data["verb"] == "export"
    assert data["files"]["onnx"].endswith("model.onnx")
    assert data["verification"]["passed"] is True
    assert (user / "model.onnx").is_file()
    assert cli("export", NET, *INPUT, "-o", "model.onnx").code == 2
    assert cli("export", NET, *INPUT, "-o", "model.onnx", "--force").code == 0
    assert cli("insert", NET, *INPUT, "-o", "out", "--no-onnx").code == 0
    ran = cli("export", "out", "-o", "folder.onnx", "--static-batch", "--no-optimize")
    assert ran.code == 0, ran
    assert "PASS" in ran.stdout
    assert "opset" in ran.stdout
    words = ("--no-dynamic-batch", "--optimize", "--force", "--format", "json")
    ran = cli("export", "out", "-o", "folder.onnx", *words)
    assert ran.code == 0, ran
    checks = {c["name"]: c for c in json.loads(ran.stdout)["verification"]["checks"]}
    assert checks["batch size 1, 5"]["detail"] == "the file is fixed at batch 8"


def test_an_opset_that_cannot_be_had_is_an_error_and_writes_nothing(cli, user):
    ran = cli("export", NET, *INPUT, "-o", "model.onnx", "--opset", "5")
    assert ran.code in (2, 3), ran
    assert "opset" in ran.stderr
    assert not list(user.glob("*.onnx*"))


def _inputs(ran) -> list[str]:
    assert ran.code == 0, ran
    data = json.loads(ran.stdout)
    return data.get("export", data)["verification"]["inputs"]


def test_data_and_seed_reach_the_inputs_that_files_are_checked_on(cli):
    wanted = ["data 0", "data 1", "batch 1", "batch 5"]
    given = ("--data", "net.py:loader", "--batches", "2", "--format", "json")
    assert _inputs(cli("export", NET, "-o", "model.onnx", *given)) == wanted
    assert _inputs(cli("verify", NET, "model.onnx", *given)) == wanted
    assert _inputs(cli("insert", NET, "-o", "out", *given)) == wanted
    seed = ("--seed", "7", *INPUT, "--format", "json", "--force")
    for words in (("export", NET, "-o", "model.onnx"), ("insert", NET, "-o", "out")):
        drawn = _inputs(cli(*words, *seed))
        assert "normal (seed 8)" in drawn
        assert "normal x10 (seed 9)" in drawn
    assert "normal (seed 8)" in _inputs(cli("verify", NET, "model.onnx", *seed[:-1]))


UNEXPORTABLE = '''
import torch
from torch import nn


class Net(nn.Sequential):
    """Recordable, but no exporter can follow numpy."""

    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        y = super().forward(x)
        return y * float(torch.special.bessel_y0(x.detach().abs() + 1).sum().item() != 0)
'''


def test_a_failed_export_writes_nothing_and_names_no_onnx(cli, user):
    (user / "hard.py").write_text(UNEXPORTABLE)
    words = ("insert", "hard.py:Net", "--input", "32,4", "-o", "out")
    ran = cli(*words)
    assert ran.code == 3, ran
    assert "--no-onnx" in ran.stderr
    assert not list(user.glob("*out*"))
    assert "\x1b" not in ran.stderr
    assert cli(*words, "--no-onnx").code == 0


@pytest.fixture
def wrong_file(monkeypatch):
    """The exporter sees a model whose first weight is off by 1 %."""
    import copy

    from bnify.exporting import checked

    real = checked.exported

    def faulty(model, *args, **kwargs):
        other = copy.deepcopy(model)
        with torch.no_grad():
            next(other.parameters())[0] *= 1.01
        return real(other, *args, **kwargs)

    monkeypatch.setattr(checked, "exported", faulty)


@pytest.mark.usefixtures("wrong_file")
def test_a_file_that_computes_something_else_is_1_and_is_not_written(cli, user):
    ran = cli("insert", NET, "--input", "32,4", "-o", "out")
    assert ran.code == 1, ran
    assert "--no-onnx" in ran.stderr
    assert "FAIL" in ran.stdout
    assert not list(user.glob("*out*"))
    assert cli("export", NET, *INPUT, "-o", "model.onnx").code == 1
    assert not list(user.glob("*.onnx*"))
    ran = cli("export", NET, *INPUT, "-o", "model.onnx", "--keep-failed", "--format", "json")
    assert ran.code == 1
    data = json.loads(ran.stdout)
    assert data["error"]["kind"] == "VerificationError"
    assert data["verification"]["passed"] is False
    assert [path.name for path in user.glob("*.onnx*")] == ["model.failed.onnx"]


def test_an_opset_that_cannot_be_is_2(cli, user):
    ran = cli("export", NET, *INPUT, "-o", "m.onnx", "--opset", "11")
    assert ran.code == 2, ran
    assert "opset 11 cannot be written: torch's exporter makes 18 and up" in ran.stderr
    assert not (user / "m.onnx").exists()
