"""Rules that the user ignores for some modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from bnify.auditing.engine import chosen
from bnify.auditing.finding import AuditReport


def leave_modules(report: AuditReport, ignores: Mapping[str, Sequence[str]]) -> AuditReport:
    """The report without what is ignored for some modules.

    Args:
        report: What was found.
        ignores: Glob of module paths → codes, prefixes or names of rules. A glob that fits no
            module becomes a note: it is probably misspelt.

    Raises:
        UsageError: A word fits no rule.
    """
    codes = {glob: {rule.code for rule in chosen(words)} for glob, words in ignores.items()}
    kept = tuple(
        finding
        for finding in report.findings
        if not any(
            finding.code in codes[glob] and fnmatchcase(finding.module, glob) for glob in codes
        )
    )
    known = {*report.modules, *(finding.module for finding in report.findings)}
    notes = tuple(
        f"per-module-ignores: {glob!r} fits no module of {report.target}"
        for glob in codes
        if not any(fnmatchcase(path, glob) for path in known)
    )
    return replace(
        report,
        findings=kept,
        ignored=report.ignored + len(report.findings) - len(kept),
        notes=report.notes + notes,
    )
