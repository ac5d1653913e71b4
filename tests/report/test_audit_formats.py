"""An audit in each format: rows for people, one finding a module for programs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bnify.auditing.finding import AuditReport, Finding, Safety, Severity
from bnify.auditing.rules import RULES
from bnify.errors import UsageError
from bnify.report import render
from bnify.report.audit import alike, summary
from bnify.report.audited import AuditFormat, render_audit
from bnify.report.terminal import fitted

ROOT = Path(__file__).resolve()


def finding(code="BN101", severity="error", module="bn", message="a is 1 of 64", **more):
    name = next(rule.name for rule in RULES if rule.code == code)
    return Finding(
        code=code,
        name=name,
        severity=Severity(severity),
        module=module,
        message=message,
        **{"cost": "outputs are NaN", "fix": "reload", "safety": Safety.DATA, **more},
    )


RESNET = [
    f"layer{stage}.{block}.bn{i}" for stage in range(1, 5) for block in range(6) for i in (1, 2)
]
REPORT = AuditReport(
    findings=(
        finding("BN201", "info", "features.0", "64 channels", safety=Safety.SAFE),
        *(finding(module=path) for path in RESNET),
        finding("BN203", "warning", "", "γ × 5 %: →, x"),
    ),
    unchecked={"BN305": "batches (--data)", "BN306": "batches (--data)", "BN302": "torchrun"},
    target="net.py:Net",
    tiers=("T0", "T1"),
    norms=53,
    notes=("eps was assumed",),
    digest="f00",
    sources={"features.0": (str(ROOT), 7), "layer1.0.bn1": ("/elsewhere/a.py", 3)},
)


def rows_of(*findings, modules=()):
    return alike(AuditReport(findings=tuple(findings), modules=tuple(modules)))


def lines(text):
    return text.splitlines()


# -- for people ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 120])
def test_rich_has_rows_costs_what_was_not_checked_and_a_summary_as_its_end(width):
    text = render_audit(REPORT, "rich", width=width)
    assert max(map(len, lines(text))) <= width
    flat = " ".join(re.sub(r"[─\s]+", " ", text).split())
    assert "48 layers:" in flat
    assert "layer1.0.bn2" not in flat, "repeats collapse"
    assert flat.count("outputs are NaN") == 3, "once a rule"
    assert "BN305, BN306: batches (--data)" in flat
    assert "eps was assumed" in flat
    end = "48 errors, 1 warning, 1 info in 53 batch norms (T0, T1); 1 fixable with --fix"
    assert flat.endswith(end)


def test_the_worst_come_first_and_are_told_by_words():
    text = render_audit(REPORT, "rich", width=120)
    assert text.index("error ") < text.index("warning ") < text.index("info ")
    colored = render_audit(REPORT, "rich", width=120, color=True)
    assert "\x1b[1;31merror" in colored
    assert "\x1b" not in text


def test_rows_are_exact_or_say_that_they_are_not():
    rows = rows_of(*(finding(module=f"layer{s}.{b}.bn1") for s in (1, 2) for b in (0, 1, 2)))
    assert [row.where for row in rows] == ["6 layers: layer1-2.0-2.bn1"]
    rows = rows_of(*(finding(module=f"features.{n}") for n in range(0, 60, 3)))
    assert [row.where for row in rows] == ["20 layers: features.0 …"]
    rows = rows_of(finding(module="a.bn"), finding(module="b.norm"), finding(module=""))
    assert [row.where for row in rows] == ["3 layers: a.bn, b.norm, (model)"]


def test_messages_that_differ_in_numbers_are_one_row_and_those_in_words_are_not():
    messages = ["a is 1 of 64", "a is 3 of 8", "b is 3 of 8"]
    rows = rows_of(*(finding(module=f"bn{i}", message=m) for i, m in enumerate(messages)))
    assert [row.message for row in rows] == ["for example a is 1 of 64", "b is 3 of 8"]
    mixed = rows_of(finding(severity="info"), finding(severity="error", module="bn2"))
    assert [row.first.severity for row in mixed] == ["error", "info"]


def test_messages_that_differ_in_names_of_modules_are_one_row():
    named = [finding(module=f"{n}.bn", message=f"{n}.conv feeds {n}.bn.") for n in ("a", "b")]
    assert len(rows_of(*named, modules=["a.conv", "b.conv"])) == 1
    assert len(rows_of(*named)) == 2, "what is no module is a word"


@pytest.mark.parametrize("form", ["rich", "md"])
def test_without_a_batch_norm_the_summary_says_exactly_that(form):
    empty = AuditReport(findings=(), target="bert", tiers=("T0", "T1"))
    text = render_audit(empty, form)
    assert lines(text)[-1] == "no batch norm found; 0 findings"
    assert "What it costs" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"findings": ()}, "0 findings in 53 batch norms (T0, T1)"),
        ({"findings": (), "norms": 1, "tiers": ("T0x",)}, "0 findings in 1 batch norm (T0x)"),
        ({"findings": (), "ignored": 2}, "0 findings in 53 batch norms (T0, T1); 2 ignored"),
        ({"findings": (finding(),), "norms": 0}, "no batch norm found; 1 error"),
        ({"kind": "checkpoint"}, "48 errors, 1 warning, 1 info in 53 batch norms (T0, T1)"),
    ],
)
def test_summary(changes, words):
    assert summary(replace(REPORT, **changes)) == words


def test_md_is_one_table_row_a_row():
    text = render_audit(REPORT, "md")
    assert "| error | BN101 | `48 layers: layer1-4.0-5.bn1-2` |" in text
    assert r"γ × 5 %: →, x" in text


def test_concise_is_one_line_a_row():
    assert lines(render_audit(REPORT, "concise")) == [
        "net.py:Net: 48 layers: layer1-4.0-5.bn1-2: BN101 a is 1 of 64",
        "net.py:Net: (model): BN203 γ × 5 %: →, x",
        "net.py:Net: features.0: BN201 64 channels",
    ]
    assert render_audit(replace(REPORT, findings=()), "concise") == ""


@pytest.mark.parametrize("form", ["rich", "concise", "github"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_the_encoding_lacks_is_replaced(form, encoding):
    text = render_audit(REPORT, form, encoding=encoding)
    text.encode(encoding)
    assert ("γ" in text) == (encoding == "utf-8")
    if encoding == "ascii":
        assert "gamma x 5" in " ".join(text.split())


def test_control_characters_of_a_file_never_reach_a_terminal():
    evil = replace(REPORT, findings=(finding(module="a\x1b[31m\nb", message="c\rd\x07"),))
    for form in ("rich", "md", "concise", "github"):
        text = render_audit(evil, form)
        assert not set(text) & set("\x1b\r\x07"), form
    assert len(lines(render_audit(evil, "concise"))) == 1
    assert fitted("a\x1bb", "utf-8") == "a�b"


# -- statistics ----------------------------------------------------------------------------------


def test_statistics_count_by_rule_the_most_frequent_first():
    found = lines(render_audit(REPORT, "concise", statistics=True))
    assert [line.split("\t")[:2] for line in found] == [
        ["48", "BN101"],
        ["1", "BN201"],
        ["1", "BN203"],
    ]
    data = json.loads(render_audit(REPORT, "json", statistics=True))
    assert data["statistics"] == {"BN101": 48, "BN201": 1, "BN203": 1}
    assert len(data["findings"]) == 50
    text = render_audit(REPORT, "rich", statistics=True)
    assert "layer" not in text
    assert re.search(r"48 +BN101 +error +nonfinite-stats +data", text)


@pytest.mark.parametrize("form", ["sarif", "github"])
def test_formats_with_an_entry_a_finding_do_not_count(form):
    with pytest.raises(UsageError, match="--statistics"):
        render_audit(REPORT, form, statistics=True)


# -- for programs --------------------------------------------------------------------------------


def test_json_has_one_finding_a_module():
    data = json.loads(render_audit(REPORT, "json", environment={"seed": 0}))
    assert data == {**REPORT.to_dict(), "environment": {"seed": 0}}
    assert (data["schema"], data["verb"]) == (1, "audit")
    assert [f["module"] for f in data["findings"]] == ["features.0", *RESNET, ""]


def test_numbers_that_json_lacks_are_texts():
    nan = replace(REPORT, findings=(finding(values={"x": float("nan"), "y": float("inf")}),))
    for form in ("json", "sarif"):
        text = render_audit(nan, form)
        assert "NaN" not in re.sub(r"are NaN|NaN (in|or)", "", text) or form == "sarif"
        json.loads(text, parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("form", AuditFormat)
def test_there_is_one_door(form):
    assert render(REPORT, form) == render_audit(REPORT, form)


def test_github_is_a_command_a_finding_and_a_notice_at_the_end():
    text = render_audit(REPORT, "github", root=ROOT.parent, audited=ROOT.parent / "a, b:c.pt")
    found = lines(text)
    assert len(found) == 51
    assert found[0].startswith(f"::notice file={ROOT.name},line=7,title=BN201 redundant-bias::")
    place = "file=a%2C b%3Ac.pt,line=1"
    assert found[1] == (
        f"::error {place},title=BN101 nonfinite-stats::layer1.0.bn1: a is 1 of 64; fix: reload"
    )
    assert found[49].startswith(f"::warning {place},title=")
    assert found[49].endswith("::(model): γ × 5 %25: →, x; fix: reload")
    assert found[50].startswith("::notice title=bnify audit net.py%3ANet::48 errors")
    assert "%0Anot checked: BN305, BN306: batches (--data)" in found[50]


def test_github_without_any_file_has_none():
    bare = replace(REPORT, sources={})
    assert "file=" not in render_audit(bare, "github", root=ROOT.parent)
