"""Command lines that cannot be right: exit code 2, one clear line, JSON where it was asked for."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no verb was given"),
        (["inset"], "no such command 'inset'"),
        (["insert"], "missing argument 'SPEC'"),
        (["insert", "net.py:Net", "--nrom", "batch"], "no such option"),
        (["insert", "net.py:Net", "--norm", "bath"], "'bath' is not one of 'batch'"),
        (["insert", "net.py:Net", "--batches", "many"], "--batches many is not a whole number"),
        (["insert", "net.py:Net", "--format", "yaml"], "'yaml' is not one of"),
        (["insert", "net.py:Net"], "no example inputs"),
        (["insert", "net.py:Net", "--input", "2,4:float33"], "unknown dtype 'float33'"),
        (["insert", "net.py:Net", "--input", "2,x"], "--input 2,x"),
        (["insert", "net.py"], "not which network in it"),
        (["insert", "nothing"], "nothing on disk has that name"),
        (["insert", "net.py:Net", "--input", "2,4", "--device", "gpu"], "unknown device 'gpu'"),
        (["insert", "net.py:Net", "--weights-key", "ema"], "--weights, which is missing"),
        (["insert", "net.py:Net", "--allow-download"], "nothing to load"),
        (["insert", "net.py:Net", "-o", "o", "--no-verify"], "unverified and is not written"),
        (["insert", "net.py:Net", "--plan", "p", "--drop-bias"], "--drop-bias shapes a plan"),
        (["insert", "net.py:Net", "--input", "2,4", "--input-file", "x.npz"], "both give"),
        (["export", "net.py:Net"], "missing option '--output'"),
        (["export", "net.py:Net", "-o", "model.bin"], "is no .onnx file"),
        (["verify", "net.py:Net"], "missing argument 'B'"),
        (["verify", "net.py:Net", "m.onnx", "--candidate-weights", "w.pt"], "weights inside"),
    ],
)
def test_wrong_command_lines(cli, words, message):
    ran = cli(*words)
    assert ran.code == 2, ran
    assert ran.stdout == ""
    error = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0].lower() or message in error[0]
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("form", [["--format", "json"], ["--format=json"]])
@pytest.mark.parametrize("words", [["insert", "x.py:Net", "--norm", "q"], ["verify"], ["wrong"]])
def test_errors_are_json_when_json_was_asked_for(cli, words, form):
    ran = cli(*words, *form)
    assert ran.code == 2
    assert ran.stderr == ""
    data = json.loads(ran.stdout)
    assert data["schema"] == 1
    assert data["verb"] == (words[0] if words[0] != "wrong" else None)
    assert data["error"]["kind"] == "UsageError"
    assert data["error"]["hint"]


def test_existing_output_is_refused_before_the_model_is_loaded(cli, user):
    (user / "out").mkdir()
    ran = cli("insert", "net.py:Net", "--input", "2,4", "-o", "out")
    assert ran.code == 2
    assert "out exists already" in ran.stderr
    assert "--force" in ran.stderr
    assert "user:" not in ran.stderr
    (user / "m.onnx").write_text("")
    assert cli("export", "net.py:Net", "--input", "2,4", "-o", "m.onnx").code == 2


@pytest.mark.parametrize(
    "words",
    [
        ("--norm", "layer", "--init", "preserve"),
        ("--groups", "4"),
        ("--norm", "batch-noaffine", "--zero-gamma"),
        ("--norm", "group", "--drop-bias"),
        ("--drop-bias", "--position", "after-act"),
        ("--eps", "-1"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_options_that_contradict_each_other_are_2_before_the_model_is_loaded(cli, words, dry):
    ran = cli("insert", "net.py:Net", "--input", "2,4", *words, *dry)
    assert ran.code == 2, ran
    assert "error: " in ran.stderr
    assert "user:" not in ran.stderr
    assert cli("insert", "missing.py:Net", *words, *dry).code == 2


def test_debug_shows_where(cli):
    assert "Traceback" not in cli("insert", "net.py:Nett", "--input", "2,4").stderr
    assert "Traceback" in cli("insert", "net.py:Nett", "--input", "2,4", "--debug").stderr


def test_a_bug_of_ours_is_70_and_asks_to_report_it(cli, monkeypatch):
    import bnify.doctor

    def broken() -> dict:
        raise ZeroDivisionError("by design")

    monkeypatch.setattr(bnify.doctor, "examine", broken)
    ran = cli("doctor")
    assert ran.code == 70
    assert "bug in bnify: ZeroDivisionError: by design" in ran.stderr
    assert "please report" in ran.stderr
    assert "--debug" in ran.stderr
    assert "Traceback" not in ran.stderr
    data = json.loads(cli("doctor", "--format", "json").stdout)
    assert data["error"]["kind"] == "InternalError"


def test_interrupted_is_130(cli, monkeypatch):
    import bnify.doctor

    def interrupted() -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr(bnify.doctor, "examine", interrupted)
    ran = cli("doctor")
    assert ran.code == 130
    assert ran.stdout == ""
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        (("--eps", "x"), "--eps x is not a number", "a number; see bnify insert --help"),
        (("--data", "obj.py:lod"), "it defines loader (list), fails (function)", "obj.py:loader?"),
        (("--data", "obj.py:fails"), "RuntimeError: disk", "correct obj.py:5"),
        (("--weights", "c.npz"), "a zip file, but no checkpoint", "a .safetensors file"),
        (("--weights", "w.pt", "--weights-key", "x"), "nothing under 'x'", "one of ema, model"),
    ],
)
def test_errors_name_the_next_step(cli, user, words, said, hint):
    import numpy as np
    import torch
    from torch import nn

    (user / "obj.py").write_text(
        "from torch import nn, randn\nnet = nn.Sequential(nn.Linear(4, 4))\n"
        "loader = [randn(3, 4)]\ndef fails():\n    raise RuntimeError('disk')\n"
    )
    np.savez(user / "c.npz", a=np.ones(3))
    state = nn.Sequential(nn.Linear(4, 4)).state_dict()
    torch.save({"ema": state, "model": {k: v + 1 for k, v in state.items()}}, "w.pt")
    ran = cli("insert", "obj.py:net", "--input", "3,4", *words)
    assert ran.code in (2, 3), ran
    error, tried = ran.stderr.strip().splitlines()[-2:]
    assert said in error
    assert tried.startswith("  try: ")
    assert hint in tried
    bare = cli("insert", "obj.py", "--input", "3,4").stderr
    assert "it defines net, fails" in bare


@pytest.mark.parametrize("text", ["def f(:\n", "raise ValueError('boo')\n"])
def test_code_that_fails_at_import_says_what_to_correct(cli, user, text):
    (user / "bad.py").write_text(text)
    ran = cli("insert", "bad.py:Net", "--input", "3,4")
    assert ran.code == 3
    assert "  try: correct bad.py:1" in ran.stderr
