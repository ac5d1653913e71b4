"""An audit as lines: for ``grep`` and editors (concise), and as workflow commands (github)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bnify.auditing.finding import AuditReport, Severity
from bnify.report.audit import WHOLE, alike, statistics_of, summary, unchecked
from bnify.report.places import place_of

_COMMANDS: Final = {
    Severity.ERROR: "error",
    Severity.WARNING: "warning",
    Severity.INFO: "notice",
}


def concise(report: AuditReport, *, statistics: bool = False) -> str:
    """A line a row: ``net.py:Net: layer1.0.bn1: BN101 running_var is not finite in ...``."""
    if statistics:
        lines = [
            f"{number}\t{first.code}\t{first.severity}\t{first.name}"
            for first, number in statistics_of(report)
        ]
    else:
        lines = [
            f"{report.target}: {row.where}: {row.first.code} {row.message}" for row in alike(report)
        ]
    return "".join(f"{_one_line(line)}\n" for line in lines)


def _one_line(text: str) -> str:
    """The text as one line, whatever a name in a file has in it."""
    return " ".join(text.splitlines())


def github(report: AuditReport, *, root: Path, audited: Path | None = None) -> str:
    """A workflow command a finding, and a notice with the summary and what was not checked."""
    lines = list(_commands(report, root, audited))
    closing = "\n".join([summary(report), *(f"not checked: {t}" for t in unchecked(report))])
    lines.append(f"::notice title={_property(f'bnify audit {report.target}')}::{_data(closing)}")
    return "".join(f"{line}\n" for line in lines)


def _commands(report: AuditReport, root: Path, audited: Path | None) -> Iterator[str]:
    for finding in report.findings:
        properties = {"title": f"{finding.code} {finding.name}"}
        place = place_of(finding, report, root=root, audited=audited)
        if place is not None:
            properties = {"file": place.path, "line": str(place.line), **properties}
        listed = ",".join(f"{name}={_property(value)}" for name, value in properties.items())
        fix = f"; fix: {finding.fix}" if finding.fix else ""
        message = f"{finding.module or WHOLE}: {finding.message}{fix}"
        yield f"::{_COMMANDS[finding.severity]} {listed}::{_data(message)}"


def _data(text: str) -> str:
    """A command's message: GitHub's runner undoes these escapes, and reads a line as its end."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """A command's property, which a colon or a comma would end."""
    return _data(text).replace(":", "%3A").replace(",", "%2C")
