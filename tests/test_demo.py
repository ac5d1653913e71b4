"""The demo checks what it shows."""

from __future__ import annotations

import sys

import demo
import pytest


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    def call() -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["demo.py", "--epochs", "1", "--out", str(tmp_path)])
        return demo.main(), capsys.readouterr().out

    return call


def test_the_demo_runs_and_says_how_long_it_took(run):
    code, said = run()
    assert code == 0, said
    assert "seconds in all" in said
    assert "with norms:" in said


@pytest.mark.parametrize(("name", "wrong"), [("EDITS", ["fc1", "fc2", "fc3"]), ("SKIPS", [])])
def test_another_plan_than_the_expected_one_is_1(run, monkeypatch, name, wrong):
    monkeypatch.setattr(demo, name, wrong)
    code, said = run()
    assert code == 1
    assert "expected norms on" in said
    assert "Train both" not in said
