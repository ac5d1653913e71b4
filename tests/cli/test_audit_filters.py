"""``bnify audit``: which rules run, what is ignored, what is known, and what counts."""

from __future__ import annotations

import json

import pytest

INPUT = ("--input", "2,3,8,8")


GOOD = ("audit", "normed.py:Net", "--weights", "good.safetensors", *INPUT)


def found(ran):
    """``{("BN201", "conv"), ...}`` of a run with ``--format json``."""
    data = json.loads(ran.stdout)
    return {(f["code"], f["module"]) for f in data["findings"]}


def audit(cli, *words):
    ran = cli(*words, "--format", "json")
    return ran, found(ran)


# -- which rules, and what counts ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "codes"),
    [
        (("--select", "BN203"), {"BN203"}),
        (("--select", "BN1,BN203"), {"BN203"}),
        (("--select", "BN1", "--select", "redundant-bias"), {"BN201"}),
        (("--ignore", "BN203"), {"BN201"}),
        (("--ignore", "BN2"), set()),
        (("--select", "ALL", "--ignore", "BN3,BN1,BN4"), {"BN201", "BN203"}),
        (("--select", "BN101", "--extend-select", "bn203"), {"BN203"}),
    ],
)
def test_rules_are_chosen_by_prefix_and_name(cli, net, words, codes):
    assert {code for code, _ in audit(cli, *GOOD, *words)[1]} == codes


def test_a_word_that_fits_no_rule_is_a_usage_error_before_anything_is_loaded(cli, net):
    for option in ("--select", "--ignore", "--extend-select"):
        ran = cli(*GOOD, option, "BN999")
        assert ran.code == 2
        assert "'BN999' fits no rule" in ran.stderr
        assert "user: building" not in ran.stderr


@pytest.mark.parametrize(
    ("select", "limit", "code"),
    [
        ("BN203", None, 1),
        ("BN201", None, 0),
        ("BN201", "warning", 0),
        ("BN201", "info", 1),
        ("BN101", "info", 0),
    ],
)
def test_fail_on(cli, net, select, limit, code):
    words = () if limit is None else ("--fail-on", limit)
    assert cli(*GOOD, "--select", select, *words).code == code


def test_the_file_sets_defaults_and_flags_win(cli, net, user):
    (user / "pyproject.toml").write_text(
        '[tool.bnify.audit]\nselect = ["BN201"]\nfail-on = "info"\n'
        '[tool.bnify.audit.per-module-ignores]\n"head.*" = ["BN2"]\n"co*" = ["BN203"]\n'
    )
    ran, findings = audit(cli, *GOOD)
    assert findings == {("BN201", "conv")}
    assert ran.code == 1
    assert cli(*GOOD, "--fail-on", "error").code == 0
    assert audit(cli, *GOOD, "--select", "BN203")[1] == {("BN203", "bn")}


def test_rules_are_ignored_by_module_and_misspelt_globs_are_noted(cli, net, user):
    (user / "pyproject.toml").write_text(
        '[tool.bnify.audit.per-module-ignores]\n"con*" = ["BN2"]\n"backbone.*" = ["BN301"]\n'
    )
    ran, findings = audit(cli, *GOOD)
    assert findings == {("BN203", "bn")}
    data = json.loads(ran.stdout)
    assert data["ignored"] == 1
    notes = " ".join(data["notes"])
    assert "'backbone.*' fits no module" in notes
    assert "'con*'" not in notes
    (user / "pyproject.toml").write_text('[tool.bnify.audit.per-module-ignores]\na = ["XX"]\n')
    assert cli(*GOOD).code == 2


def test_statistics(cli, net):
    ran = cli(*GOOD, "--statistics", "--format", "concise")
    assert ran.stdout.splitlines() == [
        "1\tBN201\tinfo\tredundant-bias",
        "1\tBN203\terror\tmomentum-out-of-range",
    ]
    ran = cli(*GOOD, "--statistics", "--format", "sarif")
    assert ran.code == 2
    assert "user: building" not in ran.stderr


# -- the baseline --------------------------------------------------------------------------------


def test_a_baseline_hides_what_is_known_and_reports_what_is_gone(cli, net, user):
    known = ("--baseline", "known.json")
    ran = cli(*GOOD, *known, "--write-baseline")
    assert ran.code == 0
    assert "wrote 2 known findings" in ran.stderr
    ran, findings = audit(cli, *GOOD, *known, "--fail-on", "info")
    assert (ran.code, findings) == (0, set())
    assert json.loads(ran.stdout)["ignored"] == 2
    better = ("--arg", "momentum=0.1")
    ran = cli(*GOOD, *better, *known)
    assert "1 stale (found no more): BN203 bn" in " ".join(ran.stdout.split())
    assert "stale" not in cli(*GOOD, *better, *known, "--ignore", "BN203").stdout
    assert "stale" not in cli(*GOOD[:4], *known, "--select", "BN201").stdout, "nobody looked"


def test_a_baseline_is_of_one_model(cli, net, user):
    known = ("--baseline", "known.json")
    assert cli(*GOOD, *known, "--write-baseline").code == 0
    data = json.loads((user / "known.json").read_text())
    for entry in data["baseline"]:
        entry["fingerprint"] = "0" * 64
    (user / "known.json").write_text(json.dumps(data))
    ran = cli(*GOOD, *known)
    assert ran.code == 1
    assert "2 stale (of another model" in " ".join(ran.stdout.split())


@pytest.mark.parametrize("content", [None, "{", "[]", '{"schema": 9, "baseline": []}', '{"a": 1}'])
def test_what_is_no_baseline(cli, net, user, content):
    if content is not None:
        (user / "known.json").write_text(content)
    ran = cli(*GOOD, "--baseline", "known.json")
    assert ran.code == 3
    assert "known.json" in ran.stderr
    if content is not None:
        ran = cli(*GOOD, "--baseline", "known.json", "--write-baseline")
        assert ran.code == 3
        assert (user / "known.json").read_text() == content, "another file was overwritten"


def test_write_baseline_needs_a_place(cli, net):
    ran = cli(*GOOD, "--write-baseline")
    assert ran.code == 2
    assert "--baseline FILE" in ran.stderr
