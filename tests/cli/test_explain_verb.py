"""``bnify explain``: the pages of rules, offline."""

from __future__ import annotations

import json

import pytest

from bnify.auditing.pages import SECTIONS
from bnify.auditing.rules import RULES


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_every_rule_has_a_page_in_every_form(cli, rule):
    ran = cli("explain", rule.code)
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[0] == f"{rule.code} {rule.name}"
    for heading in SECTIONS:
        assert f"\n{heading}\n" in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) <= 100
    assert cli("explain", rule.name).stdout == ran.stdout
    md = cli("explain", rule.code.lower(), "--format", "md").stdout
    assert md.startswith(f"# {rule.code} {rule.name}\n")
    data = json.loads(cli("explain", rule.code, "--format", "json").stdout)
    assert (data["schema"], data["verb"]) == (1, "explain")
    assert data["rule"]["code"] == rule.code
    assert list(data["rule"]["sections"]) == list(SECTIONS)


def test_all_of_them_in_one_table(cli):
    text = cli("explain", "--all").stdout
    for rule in RULES:
        assert rule.code in text
        assert rule.name in text
    data = json.loads(cli("explain", "--all", "--format", "json").stdout)
    assert [rule["code"] for rule in data["rules"]] == [rule.code for rule in RULES]
    assert "| BN101 | nonfinite-stats | error |" in cli("explain", "--all", "--format", "md").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("BN10",), "BN101 nonfinite-stats"),
        (("nonfinite-stat",), "BN101 nonfinite-stats"),
        (("zzz",), "bnify explain --all"),
        ((), "give one rule, or --all"),
        (("BN101", "--all"), "give one rule, or --all"),
    ],
)
def test_what_is_no_rule(cli, words, said):
    ran = cli("explain", *words)
    assert ran.code == 2
    assert ran.stdout == ""
    assert said in ran.stderr
    ran = cli("explain", *words, "--format", "json")
    assert json.loads(ran.stdout)["error"]["kind"] == "UsageError"


def test_nothing_but_numpy_is_imported(run_python):
    code = (
        "import sys; from bnify.cli.run import run\n"
        "run(['explain', 'BN101'], restore=True)\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    assert run_python("-c", code).stdout.splitlines()[-1] == "[]"


def test_an_ascii_terminal(run_cli):
    ran = run_cli("explain", "BN104", env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"})
    assert ran.code == 0
    assert ran.stdout.isascii()
