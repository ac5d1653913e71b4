"""What a report on an audit says to a person: findings that are alike in one row."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from bnify.auditing.finding import AuditReport, Finding, Safety
from bnify.report.document import (
    Block,
    Code,
    Column,
    Document,
    Facts,
    Items,
    Paragraph,
    Table,
)
from bnify.report.numbers import count
from bnify.report.plans import example
from bnify.report.repeats import collapse, without_numbers
from bnify.report.verdicts import verdict_of, verification_blocks

WHOLE: Final = "(model)"
#: Letters of module paths in one row; more are abbreviated.
_LONG: Final = 40
_WORD: Final = re.compile(r"\w+(?:\.\w+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """What ``--fix`` did; the report beside it is on what is left.

    Attributes:
        result: The repaired model as a Result.
        solved: The findings that are gone.
        files: What was written, name → path.
        diff: The module tree before and after; None where it was not asked for.
    """

    result: Any
    solved: tuple[Finding, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    diff: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fix as JSON-ready data."""
        data: dict[str, Any] = self.result.to_dict()
        return {
            "solved": [finding.to_dict() for finding in self.solved],
            "plan": data.get("plan"),
            "verification": data.get("verification"),
            "files": dict(self.files),
            **({} if self.diff is None else {"diff": self.diff}),
        }


@dataclass(frozen=True, slots=True)
class Alike:
    """Findings of one rule that say the same of several modules, up to numbers.

    Attributes:
        findings: At least one, in their order.
    """

    findings: tuple[Finding, ...]

    @property
    def first(self) -> Finding:
        """The finding that stands for the others."""
        return self.findings[0]

    @property
    def where(self) -> str:
        """The module, or how many there are and where they begin."""
        if len(self.findings) == 1:
            return self.first.module or WHOLE
        rows = collapse(self.findings, lambda finding: finding.module, lambda _: None)
        shown: list[str] = []
        for label in (row.label or WHOLE for row in rows):
            if len(", ".join([*shown, label])) > _LONG:
                break
            shown.append(label)
        if not shown:
            shown, complete = [self.first.module or WHOLE], False
        else:
            complete = len(shown) == len(rows)
        return f"{len(self.findings)} layers: {', '.join(shown)}{'' if complete else ' …'}"

    @property
    def message(self) -> str:
        """What they say, or the first one where they differ in numbers."""
        return example([finding.message for finding in self.findings])


def alike(report: AuditReport) -> list[Alike]:
    """The findings in rows, the worst first."""
    modules = {*report.modules, *(finding.module for finding in report.findings)}
    groups: dict[Hashable, list[Finding]] = {}
    for finding in sorted(report.findings, key=lambda finding: finding.severity.rank):
        message = without_numbers(_without_modules(finding.message, modules))
        groups.setdefault((finding.code, finding.severity, message), []).append(finding)
    return [Alike(tuple(group)) for group in groups.values()]


def _without_modules(message: str, modules: Collection[str]) -> str:
    """The message without paths of modules, which differ from row to row.

    A path that is a number (of a Sequential) is left: it may be a number.
    """
    return _WORD.sub(
        lambda word: "*" if word[0] in modules and not word[0].isdecimal() else word[0], message
    )


def audit_document(
    report: AuditReport,
    *,
    statistics: bool = False,
    fixed: Fixed | None = None,
) -> Document:
    """The report on an audit.

    Args:
        report: What was found, and is left if it was fixed.
        statistics: Count the findings by rule instead of listing them.
        fixed: What ``--fix`` did.
    """
    blocks: list[Block] = []
    if report.findings:
        rows = alike(report)
        blocks += [_statistics(report)] if statistics else _listed(rows, report)
    if report.notes:
        blocks.append(Items("Notes", report.notes))
    if report.unchecked:
        blocks.append(Items("Not checked, and what would enable it", tuple(unchecked(report))))
    if fixed is not None:
        blocks += _fixed_blocks(fixed)
    blocks.append(Paragraph(summary(report, fixed)))
    return Document(f"bnify audit  {report.target}", tuple(blocks))


def _listed(rows: Sequence[Alike], report: AuditReport) -> list[Block]:
    remedies = _remedies(rows, fixable=report.kind == "model")
    return [_findings(rows), *([remedies] if remedies.rows else [])]


def _findings(rows: Sequence[Alike]) -> Table:
    return Table(
        "Findings",
        (
            Column("Severity", short=True),
            Column("Code", short=True),
            Column("Module", code=True),
            Column("Finding"),
        ),
        tuple(
            (
                row.first.severity.value,
                row.first.code,
                row.where,
                f"{row.first.name}: {row.message}",
            )
            for row in rows
        ),
    )


def _remedies(rows: Sequence[Alike], *, fixable: bool) -> Table:
    """Cost and fix, once a rule: of its worst finding."""
    first = {row.first.code: row.first for row in reversed(rows)}
    listed = [first[code] for code in dict.fromkeys(row.first.code for row in rows)]
    return Table(
        "What it costs, and what to do (more: bnify explain CODE)",
        (Column("Code", short=True), Column("Costs"), Column("Fix")),
        tuple((f.code, f.cost, _fix(f, fixable=fixable)) for f in listed if f.cost or f.fix),
    ).without_empty_columns()


def _fix(finding: Finding, *, fixable: bool) -> str:
    """What to do, and how to have it done where that can be: a file is not rewritten."""
    if not finding.fix or not fixable:
        return finding.fix
    how = "--fix --unsafe-fixes" if "proof" in finding.values else finding.safety.how
    return f"{finding.fix} ({how})"


def _statistics(report: AuditReport) -> Table:
    return Table(
        "Statistics",
        (
            Column("Count", numeric=True),
            Column("Code", short=True),
            Column("Severity", short=True),
            Column("Name"),
            Column("Fix"),
        ),
        tuple(
            (str(number), first.code, first.severity.value, first.name, first.safety.value)
            for first, number in statistics_of(report)
        ),
    )


def statistics_of(report: AuditReport) -> list[tuple[Finding, int]]:
    """The worst finding of each rule, and how many there are; the most frequent first."""
    found: dict[str, list[Finding]] = {}
    for finding in sorted(report.findings, key=lambda finding: finding.severity.rank):
        found.setdefault(finding.code, []).append(finding)
    pairs = [(group[0], len(group)) for group in found.values()]
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0].code))


def unchecked(report: AuditReport) -> list[str]:
    """What was not checked, by the input that would enable it."""
    codes: dict[str, list[str]] = {}
    for code, needed in report.unchecked.items():
        codes.setdefault(needed, []).append(code)
    return [f"{', '.join(listed)}: {needed}" for needed, listed in codes.items()]


def summary(report: AuditReport, fixed: Fixed | None = None) -> str:
    """One line: how many findings of each severity, in how many norms, and how it was looked at."""
    counts = [count(number, severity) for severity, number in report.counts().items() if number]
    found = ", ".join(counts) or "0 findings"
    left_out = f"; {report.ignored} ignored" if report.ignored else ""
    done = f"; {len(fixed.solved)} fixed" if fixed is not None else ""
    if not report.norms:
        return f"no batch norm found; {found}{left_out}{done}"
    tiers = f" ({', '.join(report.tiers)})" if report.tiers else ""
    safe = sum(finding.safety is Safety.SAFE for finding in report.findings)
    offered = fixed is None and report.kind == "model" and safe
    fixable = f"; {safe} fixable with --fix" if offered else ""
    return f"{found} in {count(report.norms, 'batch norm')}{tiers}{left_out}{done}{fixable}"


def _fixed_blocks(fixed: Fixed) -> list[Block]:
    edits = fixed.result.plan.edits
    blocks: list[Block] = []
    if edits:
        rows = collapse(
            edits, lambda edit: edit.layer, lambda edit: (edit.kind, without_numbers(edit.detail))
        )
        columns = (
            Column("Module", code=True),
            Column("", short=True),
            Column("Fix", short=True),
            Column("Detail"),
        )
        cells = tuple(
            (
                row.label or WHOLE,
                row.count,
                str(row.first.kind),
                example([edit.detail for edit in row.items]),
            )
            for row in rows
        )
        blocks.append(Table("Fixed", columns, cells).without_empty_columns())
    if fixed.result.verification is not None:
        blocks += verification_blocks(fixed.result.verification)
    if fixed.diff is not None:
        blocks.append(Code("Module tree", "diff", fixed.diff))
    if fixed.files:
        blocks.append(Facts("Written", tuple(fixed.files.items())))
    return [*blocks, verdict_of(fixed.result.verification)]
