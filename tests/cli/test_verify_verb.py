"""``bnify verify A B``: models, folders and files against each other."""

from __future__ import annotations

import json

import torch

INPUT = ("--input", "8,4")


def _weights(name: str, fault: float = 0.0) -> None:
    import runpy

    torch.manual_seed(1)
    state = runpy.run_path("net.py")["Quiet"]().state_dict()
    state["fc1.weight"][0] *= 1.0 + fault
    torch.save(state, name)


def test_equal_models_pass_and_a_planted_fault_fails(cli):
    _weights("a.pt")
    _weights("b.pt")
    _weights("c.pt", fault=2e-5)
    words = ("verify", "net.py:Quiet", "net.py:Quiet", *INPUT, "--weights", "a.pt")
    ran = cli(*words, "--candidate-weights", "b.pt")
    assert ran.code == 0, ran
    assert "PASS" in ran.stdout
    ran = cli(*words, "--candidate-weights", "c.pt")
    assert ran.code == 1, ran
    assert "FAIL" in ran.stdout
    assert ran.stderr == ""
    data = json.loads(cli(*words, "--candidate-weights", "c.pt", "--format", "json").stdout)
    assert data["verb"] == "verify"
    assert data["verification"]["passed"] is False
    assert data["verification"]["outputs"][0]["budget_ratio"] > 10
    # What passes is the tolerance's word, and the file's where there is no flag.
    assert cli(*words, "--candidate-weights", "c.pt", "--k", "3000").code == 0


def test_the_files_k_holds_and_the_flag_wins(cli, user):
    _weights("a.pt")
    _weights("c.pt", fault=2e-5)
    (user / "pyproject.toml").write_text("[tool.bnify]\nk = 3000\n")
    words = ("verify", "net.py:Quiet", "net.py:Quiet", *INPUT, "--weights", "a.pt",
             "--candidate-weights", "c.pt")  # fmt: skip
    assert cli(*words).code == 0
    assert cli(*words, "--k", "10").code == 1


def test_weights_belong_to_a_and_folders_bring_their_inputs(cli, user):
    _weights("a.pt")
    made = cli("insert", "net.py:Quiet", "--input", "8,4", "--weights", "a.pt", "-o", "out",
               "--no-onnx")  # fmt: skip
    assert made.code == 0, made
    ran = cli("verify", "net.py:Quiet", "out", "--weights", "a.pt", "--k", "100")
    assert ran.code == 0, ran
    torch.manual_seed(2)
    ran = cli("verify", "net.py:Quiet", "out", "--seed", "3")
    assert ran.code == 1, "other weights"


def test_the_onnx_file_of_a_folder(cli, user):
    made = cli("insert", "net.py:Quiet", "--input", "8,4", "-o", "out")
    assert made.code == 0, made
    assert cli("verify", "out", "out/model.onnx").code == 0
    assert cli("verify", "net.py:Normed", "out/model.onnx", "--input", "4,3,8,8").code in (1, 3)
    assert cli("verify", "out", "missing.onnx").code == 3


def test_the_files_own_inputs_are_drawn_and_said(cli, user):
    assert cli("export", "net.py:Quiet", *INPUT, "-o", "a.onnx").code == 0
    ran = cli("verify", "net.py:Quiet", "a.onnx")
    assert ran.code == 0, ran
    assert "note: inputs drawn from what a.onnx declares: --input x=2,4:float32" in ran.stderr
    assert cli("verify", "a.onnx", "a.onnx").code == 0
    assert cli("verify", "a.onnx", "a.onnx", "--input", "3,4", "--format", "json").stderr == ""
