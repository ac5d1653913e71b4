"""What an audit says: findings, and what was not looked at. Plain data, without torch or numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from bnify.errors import PlanError, UsageError

if TYPE_CHECKING:
    from bnify.result import Result


class Severity(StrEnum):
    """How bad a finding is; the first is the worst."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"

    @property
    def rank(self) -> int:
        """0 for the worst."""
        return list(Severity).index(self)

    def reaches(self, other: Severity) -> bool:
        """Whether it is as bad as the other, or worse."""
        return self.rank <= other.rank


class Safety(StrEnum):
    """What a fix may do.

    ``SAFE`` keeps the function of the model (and repairs training, where that was broken).
    ``UNSAFE`` changes it. ``DATA`` changes it by what is measured on data, and is proved on a copy
    before it is offered. ``ADVICE`` is for a person to do.
    """

    SAFE = "safe"
    UNSAFE = "unsafe"
    DATA = "data"
    ADVICE = "advice"

    @property
    def how(self) -> str:
        """How such a fix is asked for on the command line."""
        return _HOW[self]


_HOW: Final = {
    Safety.SAFE: "safe: --fix",
    Safety.UNSAFE: "changes the function: --fix --unsafe-fixes",
    Safety.DATA: "needs data: --fix --unsafe-fixes --data LOADER",
    Safety.ADVICE: "by hand",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault of one norm (or of one layer, or of the whole model).

    Attributes:
        code: ``"BN102"``.
        name: ``"stats-never-updated"``.
        severity: How bad it is here; a rule may have several.
        module: Module path of the norm or layer, name of an ONNX node; ``""`` for the model.
        message: What was measured and against which threshold, in one line.
        values: The numbers of the message, JSON-ready.
        cost: What it costs, in one line.
        fix: What to do, in one line.
        safety: What that fix may do.
    """

    code: str
    name: str
    severity: Severity
    module: str
    message: str
    values: Mapping[str, Any] = field(default_factory=dict)
    cost: str = ""
    fix: str = ""
    safety: Safety = Safety.ADVICE

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON-ready data."""
        return {
            "code": self.code,
            "name": self.name,
            "severity": self.severity.value,
            "module": self.module,
            "message": self.message,
            "values": dict(self.values),
            "cost": self.cost,
            "fix": self.fix,
            "safety": self.safety.value,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What an audit found.

    Attributes:
        findings: One per module, in the order of the rules.
        unchecked: What was not checked: code → what input would enable it.
        target: What was audited, as the user named it.
        kind: ``"checkpoint"``, ``"onnx"`` or ``"model"``.
        tiers: The tiers that were run: ``("T0", "T1")``.
        norms: How many batch norms (and tracked instance norms) there are.
        others: How many layer, group, rms and untracked instance norms there are.
        notes: What was assumed, and what a reader should know.
        digest: Fingerprint of what was audited (names, shapes and dtypes), for baselines.
        ignored: How many findings were left out on the user's word (per-module ignores, baseline).
        sources: Where each module's class is defined: path → ``(file, line)``, for SARIF.
        modules: Path of every module that is known.
    """

    findings: tuple[Finding, ...]
    unchecked: Mapping[str, str] = field(default_factory=dict)
    target: str = ""
    kind: str = "model"
    tiers: tuple[str, ...] = ()
    norms: int = 0
    others: int = 0
    notes: tuple[str, ...] = ()
    digest: str = ""
    ignored: int = 0
    sources: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    modules: tuple[str, ...] = field(default=(), repr=False)
    _fixer: Callable[[AuditReport, bool], Result] | None = field(
        default=None, repr=False, compare=False
    )

    def exit_code(self, fail_on: str = "error") -> int:
        """1 if there is a finding as bad as ``fail_on`` or worse, else 0.

        Raises:
            UsageError: ``fail_on`` is no severity.
        """
        try:
            limit = Severity(fail_on)
        except ValueError:
            raise UsageError(
                f"fail_on={fail_on!r} is no severity", hint="error, warning or info"
            ) from None
        return int(any(finding.severity.reaches(limit) for finding in self.findings))

    def counts(self) -> dict[str, int]:
        """Number of findings of each severity, the worst first."""
        return {
            severity.value: sum(f.severity is severity for f in self.findings)
            for severity in Severity
        }

    def fix(self, unsafe: bool = False) -> Result:
        """A repaired copy of the model; the model that was audited stays as it is.

        Args:
            unsafe: Also make the changes that change the function. Those that need data are made
                where the audit had data, and proved on a copy.

        Raises:
            PlanError: What was audited is no model, or there is nothing to fix.
        """
        if self._fixer is None:
            raise PlanError(
                f"{self.target or 'what was audited'} is no model: a {self.kind} is not rewritten",
                hint="audit the model: bnify audit SPEC --weights FILE --fix",
            )
        return self._fixer(self, unsafe)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return {
            "schema": SCHEMA,
            "verb": "audit",
            "target": self.target,
            "kind": self.kind,
            "tiers": list(self.tiers),
            "norms": self.norms,
            "others": self.others,
            "findings": [finding.to_dict() for finding in self.findings],
            "counts": self.counts(),
            "ignored": self.ignored,
            "unchecked": dict(self.unchecked),
            "notes": list(self.notes),
            "fingerprint": self.digest,
        }


SCHEMA: Final = 1
