"""SARIF 2.1.0: what the standard requires of each object that is written, and what GitHub needs.

No package that is kept up offers the JSON schema; these are its required properties, enumerations
and types, from OASIS' "Static Analysis Results Interchange Format Version 2.1.0".
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from bnify.auditing.finding import AuditReport, Finding, Severity
from bnify.auditing.rules import RULES
from bnify.report.audited import render_audit


def finding(code, severity, module):
    rule = next(rule for rule in RULES if rule.code == code)
    return Finding(
        code=code,
        name=rule.name,
        severity=Severity(severity),
        module=module,
        message="γ is 0.0003",
        values={"momentum": 0.0003},
        fix="set it",
    )


@pytest.fixture
def report(tmp_path):
    inside, outside = tmp_path / "project" / "my net.py", tmp_path / "other.py"
    inside.parent.mkdir()
    for file in (inside, outside):
        file.write_text("class Net: ...\n")
    return AuditReport(
        findings=(
            finding("BN101", "error", "layer1.0.bn1"),
            finding("BN203", "warning", "layer1.0.bn1"),
            finding("BN101", "info", "head.norm"),
            finding("BN204", "info", ""),
        ),
        target="net.py:Net",
        norms=2,
        digest="abc",
        unchecked={"BN305": "batches"},
        sources={"layer1.0.bn1": (str(inside), 12), "head.norm": (str(outside), 3)},
    )


@pytest.fixture
def root(tmp_path):
    return tmp_path / "project"


def log_of(report, root, audited=None):
    return json.loads(render_audit(report, "sarif", root=root, audited=audited))


def check_message(message):
    assert isinstance(message["text"], str)
    assert message["text"]


def check_log(log):
    """Required properties of SARIF 2.1.0, object by object."""
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-2.1.0.json")
    assert isinstance(log["runs"], list)
    for run in log["runs"]:
        driver = run["tool"]["driver"]
        assert driver["name"]
        ids = [rule["id"] for rule in driver["rules"]]
        assert len(set(ids)) == len(ids)
        for rule in driver["rules"]:
            for text in (rule["shortDescription"], rule["fullDescription"], rule["help"]):
                check_message(text)
            assert rule["help"]["markdown"]
            config = rule["defaultConfiguration"]
            assert config["level"] in ("none", "note", "warning", "error")
            assert isinstance(config["enabled"], bool)
        assert run["columnKind"] in ("utf16CodeUnits", "unicodeCodePoints")
        for invocation in run["invocations"]:
            assert isinstance(invocation["executionSuccessful"], bool)
            for notification in invocation["toolExecutionNotifications"]:
                check_message(notification["message"])
        for result in run["results"]:
            check_message(result["message"])
            assert result["level"] in ("none", "note", "warning", "error")
            assert ids[result["ruleIndex"]] == result["ruleId"]
            assert all(isinstance(v, str) for v in result["partialFingerprints"].values())
            assert len(result["locations"]) == 1
            check_location(result["locations"][0])


def check_location(location):
    for logical in location["logicalLocations"]:
        assert logical["name"]
        assert logical["fullyQualifiedName"]
        assert logical["kind"] == "member"
    physical = location.get("physicalLocation")
    if physical is not None:
        uri = physical["artifactLocation"]["uri"]
        assert " " not in uri
        assert "\\" not in uri
        assert urlparse(uri).scheme in ("", "file")
        assert physical["region"]["startLine"] >= 1


def test_every_object_has_what_the_standard_requires(report, root, tmp_path):
    check_log(log_of(report, root))
    check_log(log_of(report, root, root / "weights.safetensors"))
    check_log(log_of(replace(report, findings=(), unchecked={}), root))


def test_a_result_a_module_and_a_rule_a_code(report, root):
    run = log_of(report, root)["runs"][0]
    assert [r["id"] for r in run["tool"]["driver"]["rules"]] == [rule.code for rule in RULES]
    assert [(r["ruleId"], r["level"]) for r in run["results"]] == [
        ("BN101", "error"),
        ("BN203", "warning"),
        ("BN101", "note"),
        ("BN204", "note"),
    ]
    logical = [r["locations"][0]["logicalLocations"][0] for r in run["results"]]
    names = [entry["fullyQualifiedName"] for entry in logical]
    assert names == ["layer1.0.bn1", "layer1.0.bn1", "head.norm", "net.py:Net"]
    assert run["results"][0]["properties"]["values"] == {"momentum": 0.0003}
    said = [n["message"]["text"] for n in run["invocations"][0]["toolExecutionNotifications"]]
    assert "not checked: BN305: batches" in said


def places(report, root, audited=None):
    results = log_of(report, root, audited)["runs"][0]["results"]
    found = []
    for result in results:
        physical = result["locations"][0].get("physicalLocation")
        found.append(
            physical and (physical["artifactLocation"]["uri"], physical["region"]["startLine"])
        )
    return found


def test_a_class_below_the_folder_is_a_relative_place(report, root):
    assert places(report, root)[0] == ("my%20net.py", 12)


def test_a_class_elsewhere_gives_way_to_the_audited_file(report, root, tmp_path):
    assert places(report, root, root / "a b.pt")[2:] == [("a%20b.pt", 1)] * 2
    uri, line = places(report, root)[2]
    assert (unquote(urlparse(uri).path), line) == (str(tmp_path / "other.py"), 3)
    assert places(report, root)[3] is None


def test_paths_are_those_of_the_file_system_behind_links(report, root, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(root, target_is_directory=True)
    assert places(report, link)[0] == ("my%20net.py", 12)


def test_fingerprints_tell_code_module_and_model_apart_and_nothing_else(report, root):
    def prints(report):
        results = log_of(report, root)["runs"][0]["results"]
        return [r["partialFingerprints"]["bnify/v1"] for r in results]

    first = prints(report)
    assert len(set(first)) == 4
    assert prints(report) == first
    reworded = tuple(replace(f, message="other", severity=Severity.INFO) for f in report.findings)
    assert prints(replace(report, findings=reworded, target="x", norms=9)) == first
    assert not set(prints(replace(report, digest="abd"))) & set(first)
    assert Path(__file__).name not in str(first)
