"""What a rule is: one class, one file, an entry in :data:`bnify.auditing.rules.RULES`.

The docstring of a rule is its page for ``bnify explain``: a first line, then the sections
``What it checks``, ``Why it is bad``, ``Example``, ``How to fix it``, ``Fix safety`` and
``Source``, each a line of its own that ends with a colon.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any, ClassVar

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.subject import Subject


class Need(StrEnum):
    """What a rule needs; the value says which input brings it."""

    STATISTICS = "a checkpoint, an ONNX file or a model with running statistics"
    CHECKPOINT = "a checkpoint of the model (--weights, or the file itself)"
    MODULES = "the model's code (a SPEC)"
    FORWARD = "example inputs (--input), so that one forward pass can be recorded"
    EVAL = "the model in eval mode, with example inputs (--eval --input)"
    TRAIN = "the model in train mode"
    OPTIMIZER = "the optimizer (bnify.audit(model, optimizer=...))"
    LOADER = "the training loader (bnify.audit(model, loader=...))"
    WORLD = "a run under torchrun with several processes"
    DATA = "batches of data (--data)"
    REFERENCE = "the model that was averaged, beside the average (--reference)"
    PRECISION = "the precision of the deployment (--target int8 or --target fp16)"
    ONNX = "an ONNX file"
    LOOP = "a training loop (with bnify.watch(model, optimizer=...))"


class Rule(ABC):
    """One thing that can be wrong.

    Attributes:
        code: ``"BN102"``.
        name: Completes "allow ...": ``"stats-never-updated"``.
        severity: The worst it can find.
        tiers: Where it runs: ``("T0", "T0x")``; a live model runs T0 rules too.
        needs: It runs if one of these groups of needs is met in full.
        fix: What to do, in one line.
        safety: What that may do.
        default: Whether it runs unless selected.
        cost: What the fault costs, in one line.
    """

    code: ClassVar[str]
    name: ClassVar[str]
    severity: ClassVar[Severity]
    tiers: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[frozenset[Need], ...]]
    fix: ClassVar[str] = ""
    safety: ClassVar[Safety] = Safety.ADVICE
    default: ClassVar[bool] = True
    cost: ClassVar[str] = ""

    @abstractmethod
    def check(self, subject: Subject) -> Iterator[Finding]:
        """The findings, in the order of execution or of the file."""

    def unmet(self, subject: Subject) -> str:  # noqa: ARG002 - for rules that need more
        """What is missing of an input that is there; empty if nothing is.

        Such a rule is reported as not checked, instead of being run.
        """
        return ""

    def finding(
        self,
        module: str,
        message: str,
        values: Mapping[str, Any] | None = None,
        *,
        severity: Severity | None = None,
        fix: str | None = None,
        safety: Safety | None = None,
        cost: str | None = None,
    ) -> Finding:
        """A finding of this rule."""
        return Finding(
            code=self.code,
            name=self.name,
            severity=severity or self.severity,
            module=module,
            message=message,
            values=values or {},
            cost=self.cost if cost is None else cost,
            fix=self.fix if fix is None else fix,
            safety=safety or self.safety,
        )


def needs(*groups: tuple[Need, ...] | Need) -> tuple[frozenset[Need], ...]:
    """Alternatives, each a need or several together."""
    return tuple(frozenset([g] if isinstance(g, Need) else g) for g in groups)
