"""An audit, or the page of a rule, in any format."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from bnify.auditing.finding import AuditReport
from bnify.errors import UsageError
from bnify.report.audit import Fixed, audit_document, statistics_of
from bnify.report.document import Document
from bnify.report.lines import concise, github
from bnify.report.markdown import to_markdown
from bnify.report.sarif import sarif
from bnify.report.terminal import fitted, to_terminal
from bnify.strict_json import dumps


class AuditFormat(StrEnum):
    """How an audit is written: for a person, for programs, for code hosts."""

    RICH = "rich"
    CONCISE = "concise"
    JSON = "json"
    SARIF = "sarif"
    GITHUB = "github"
    MD = "md"


def render_audit(
    report: AuditReport,
    fmt: AuditFormat | str,
    *,
    width: int | None = None,
    color: bool = False,
    encoding: str = "utf-8",
    statistics: bool = False,
    root: Path | None = None,
    audited: Path | None = None,
    environment: Mapping[str, Any] | None = None,
    fixed: Fixed | None = None,
) -> str:
    """An audit as text.

    ``rich``, ``md`` and ``concise`` have a row for findings that are alike; the others have one
    finding a module.

    Args:
        report: What was found, and is left if it was fixed.
        fmt: The format.
        width: Columns for ``rich``; None means 80.
        color: ANSI colours for ``rich``.
        encoding: Of the output; characters that it lacks are replaced.
        statistics: Count by rule instead of listing; ``json`` has both.
        root: The folder that paths are relative to; the current one when None.
        audited: The file that was audited, for ``sarif`` and ``github``.
        environment: Versions, device and seed, for ``json``.
        fixed: What ``--fix`` did.

    Raises:
        UsageError: ``statistics`` in a format that has one entry a finding.
    """
    form = AuditFormat(fmt)
    place = root or Path.cwd()
    if statistics and form in (AuditFormat.SARIF, AuditFormat.GITHUB):
        raise UsageError(
            f"{form} lists findings, and --statistics counts them",
            hint="--format rich, concise, json or md",
        )
    match form:
        case AuditFormat.JSON:
            data = report.to_dict()
            if statistics:
                data["statistics"] = {first.code: n for first, n in statistics_of(report)}
            if fixed is not None:
                data["fixed"] = fixed.to_dict()
            return dumps({**data, **({"environment": dict(environment)} if environment else {})})
        case AuditFormat.SARIF:
            return dumps(sarif(report, root=place, audited=audited))
        case AuditFormat.GITHUB:
            return fitted(github(report, root=place, audited=audited), encoding)
        case AuditFormat.CONCISE:
            return fitted(concise(report, statistics=statistics), encoding)
        case AuditFormat.RICH | AuditFormat.MD:
            document = audit_document(report, statistics=statistics, fixed=fixed)
            return _shown(document, form, width, color, encoding)


def render_page(
    document: Document,
    data: Mapping[str, Any],
    fmt: str,
    *,
    width: int | None = None,
    color: bool = False,
    encoding: str = "utf-8",
) -> str:
    """The page of a rule, or the table of all: for a person, or as data."""
    if fmt == AuditFormat.JSON:
        return dumps(data)
    return _shown(document, AuditFormat(fmt), width, color, encoding)


def _shown(
    document: Document, form: AuditFormat, width: int | None, color: bool, encoding: str
) -> str:
    if form is AuditFormat.MD:
        return to_markdown(document)
    return to_terminal(document, width=width or 80, color=color, encoding=encoding)
