"""Findings that were there before: a baseline, and what has become of its entries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from bnify.auditing.finding import AuditReport, Finding
from bnify.errors import PlanError

SCHEMA: Final = 1


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """A finding that is known: which rule, which module, of which model."""

    code: str
    module: str
    fingerprint: str

    @classmethod
    def of(cls, finding: Finding, report: AuditReport) -> Self:
        """The entry of a finding."""
        return cls(finding.code, finding.module, report.digest)


@dataclass(frozen=True, slots=True)
class Baseline:
    """Findings that were accepted when the file was written.

    Attributes:
        entries: One a finding.
    """

    entries: tuple[Entry, ...] = ()

    @classmethod
    def of(cls, report: AuditReport) -> Self:
        """All findings of a report."""
        return cls(tuple(sorted({Entry.of(finding, report) for finding in report.findings})))

    @classmethod
    def read(cls, path: Path) -> Self:
        """The baseline in a file.

        Raises:
            PlanError: It cannot be read, or is no baseline.
        """
        hint = f"write one: bnify audit SPEC --baseline {path} --write-baseline"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            reason = (error.strerror or "it cannot be read").lower()
            raise PlanError(f"--baseline {path}: {reason}", hint=hint) from error
        except ValueError as error:
            raise PlanError(f"--baseline {path} is not JSON: {error}", hint=hint) from error
        try:
            if data["schema"] != SCHEMA:
                raise PlanError(
                    f"--baseline {path} has schema {data['schema']!r}, this bnify reads {SCHEMA}",
                    hint=hint,
                )
            return cls(tuple(_entry(item) for item in data["baseline"]))
        except (LookupError, TypeError, ValueError) as error:
            raise PlanError(f"--baseline {path} is no baseline of bnify", hint=hint) from error

    def to_dict(self) -> dict[str, Any]:
        """The file's content."""
        entries = [
            {"code": entry.code, "module": entry.module, "fingerprint": entry.fingerprint}
            for entry in self.entries
        ]
        return {"schema": SCHEMA, "baseline": entries}

    def leave(self, report: AuditReport, checked: Iterable[str]) -> AuditReport:
        """The report without the known findings; entries that nothing fits become a note.

        Args:
            report: What was found.
            checked: Codes of the rules that were chosen. An entry of another rule, or of one that
                could not be checked, is not stale: nobody looked.
        """
        known = set(self.entries)
        kept = tuple(f for f in report.findings if Entry.of(f, report) not in known)
        seen = {Entry.of(finding, report) for finding in report.findings}
        looked = set(checked) - set(report.unchecked)
        stale = [e for e in self.entries if e.code in looked and e not in seen]
        return replace(
            report,
            findings=kept,
            ignored=report.ignored + len(report.findings) - len(kept),
            notes=(*report.notes, *_stale(stale, report.digest)),
        )


def _entry(item: Mapping[str, Any]) -> Entry:
    entry = Entry(item["code"], item["module"], item["fingerprint"])
    if not all(isinstance(text, str) for text in (entry.code, entry.module, entry.fingerprint)):
        raise TypeError("an entry is three texts")
    return entry


def _stale(stale: Sequence[Entry], digest: str) -> list[str]:
    """What a person should know of entries that fit nothing."""
    notes = []
    gone = [entry for entry in stale if entry.fingerprint == digest]
    other = len(stale) - len(gone)
    if gone:
        listed = ", ".join(f"{entry.code} {entry.module or '(model)'}" for entry in gone[:3])
        more = f", … {len(gone) - 3} more" if len(gone) > 3 else ""
        notes.append(
            f"baseline: {len(gone)} stale (found no more): {listed}{more}; "
            "--write-baseline drops them"
        )
    if other:
        notes.append(
            f"baseline: {other} stale (of another model, or of this one before its tensors "
            "changed); --write-baseline drops them"
        )
    return notes
