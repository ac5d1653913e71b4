"""An audit as SARIF 2.1.0, which code hosts show at the lines of a pull request.

OASIS, Static Analysis Results Interchange Format (SARIF) Version 2.1.0.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

import bnify
from bnify.auditing.finding import AuditReport, Finding, Severity
from bnify.report.audit import summary, unchecked
from bnify.report.places import place_of

SCHEMA_URI: Final = "https://json.schemastore.org/sarif-2.1.0.json"
VERSION: Final = "2.1.0"
LEVELS: Final = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}


def sarif(report: AuditReport, *, root: Path, audited: Path | None = None) -> dict[str, Any]:
    """The log of one run.

    Args:
        report: What was found.
        root: The current folder, which URIs are relative to.
        audited: The file that was audited, for findings in classes that are not the user's.
    """
    rules = _rules()
    index = {rule["id"]: number for number, rule in enumerate(rules)}
    return {
        "$schema": SCHEMA_URI,
        "version": VERSION,
        "runs": [
            {
                "tool": {"driver": {"name": "bnify", "version": bnify.__version__, "rules": rules}},
                "invocations": [
                    {
                        "executionSuccessful": True,
                        "toolExecutionNotifications": [
                            {"level": "note", "message": {"text": text}}
                            for text in (
                                summary(report),
                                *report.notes,
                                *(f"not checked: {text}" for text in unchecked(report)),
                            )
                        ],
                    }
                ],
                "columnKind": "utf16CodeUnits",
                "results": [
                    _result(finding, report, index[finding.code], root, audited)
                    for finding in report.findings
                ],
            }
        ],
    }


def _rules() -> list[dict[str, Any]]:
    from bnify.auditing.pages import page_of
    from bnify.auditing.rules import RULES
    from bnify.report.pages import page_text

    described = []
    for rule in RULES:
        page = page_of(rule)
        described.append(
            {
                "id": rule.code,
                "name": rule.name,
                "shortDescription": {"text": page.summary},
                "fullDescription": {"text": page.sections.get("Why it is bad", page.summary)},
                "help": {
                    "text": page_text(page),
                    "markdown": page_text(page, markdown=True),
                },
                "defaultConfiguration": {
                    "enabled": rule.default,
                    "level": LEVELS[rule.severity],
                },
                "properties": {"tags": ["normalization", *rule.tiers], "fix": rule.safety.value},
            }
        )
    return described


def _result(
    finding: Finding, report: AuditReport, index: int, root: Path, audited: Path | None
) -> dict[str, Any]:
    name = finding.module or report.target or "model"
    location: dict[str, Any] = {
        "logicalLocations": [
            {
                "name": finding.module.rpartition(".")[2] or name,
                "fullyQualifiedName": name,
                "kind": "member",
            }
        ]
    }
    place = place_of(finding, report, root=root, audited=audited)
    if place is not None:
        location["physicalLocation"] = {
            "artifactLocation": {"uri": place.uri},
            "region": {"startLine": place.line},
        }
    identity = _identity(finding, report)
    return {
        "ruleId": finding.code,
        "ruleIndex": index,
        "level": LEVELS[finding.severity],
        "message": {"text": _message(finding)},
        "locations": [location],
        # The first is what GitHub compares: without it, it would hash the line, which all modules
        # of a class share.
        "partialFingerprints": {"primaryLocationLineHash": identity, "bnify/v1": identity},
        "properties": {"values": dict(finding.values), "cost": finding.cost, "fix": finding.fix},
    }


def _message(finding: Finding) -> str:
    where = f"{finding.module}: " if finding.module else ""
    fix = f". Fix: {finding.fix}" if finding.fix else ""
    return f"{where}{finding.message}{fix}"


def _identity(finding: Finding, report: AuditReport) -> str:
    text = "\0".join((finding.code, finding.module, report.digest))
    return hashlib.sha256(text.encode()).hexdigest()
