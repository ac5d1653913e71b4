"""``bnify audit --fix``: repair a copy, audit that again, and write it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bnify.cli.auditing_options import Repairing
from bnify.cli.auditing_target import Target
from bnify.cli.rewriting import tree_difference
from bnify.cli.session import Session
from bnify.errors import NothingToFix

if TYPE_CHECKING:
    from bnify.auditing.finding import AuditReport
    from bnify.report.audit import Fixed
    from bnify.result import Result


def fixed(
    target: Target, found: AuditReport, report: AuditReport, repairing: Repairing, session: Session
) -> tuple[AuditReport, Fixed | None]:
    """What is left after the fixes, and what they were; None where there was nothing to fix.

    Args:
        target: What was audited.
        found: Everything that was found.
        report: What is left of it after ignores and baseline: this is fixed, nothing else.
        repairing: What was asked for.
        session: Where to say what is being done.

    Raises:
        PlanError: There is no recorded forward pass to measure the fixes on.
        VerificationError: A fix changes the function.
    """
    from bnify.report.audit import Fixed

    try:
        with session.step("fixing"):
            result = report.fix(unsafe=repairing.unsafe)
    except NothingToFix as error:
        session.note(error.message)
        return report, None
    if target.source is not None:
        result.source = target.source.source
    with session.step("auditing again"):
        again = target.audit(result.model, repaired=True)
    # By code and module: a fix may change the fingerprint, by which a baseline knows its findings.
    left_out = _keys(found) - _keys(report)
    left = tuple(f for f in again.findings if (f.code, f.module) not in left_out)
    remaining = {(finding.code, finding.module) for finding in left}
    solved = tuple(f for f in report.findings if (f.code, f.module) not in remaining)
    # What was measured before is past; what ignores and baseline had to say holds. The notes of the
    # fixes are in their verification.
    asked = (note for note in report.notes if note not in found.notes)
    notes = tuple(dict.fromkeys((*again.notes, *asked)))
    after = replace(again, findings=left, ignored=report.ignored, notes=notes)
    with session.step("writing"):
        files = _written(target, result, repairing)
    diff = tree_difference(result) if repairing.diff else None
    return after, Fixed(result=result, solved=solved, files=files, diff=diff)


def _written(target: Target, result: Result, repairing: Repairing) -> dict[str, str]:
    from bnify.saved import write

    if repairing.keeping.place is None:
        return {}
    further: dict[str, Any] = {} if repairing.k is None else {"k": repairing.k}
    saved = write(
        result,
        repairing.keeping.place,
        onnx=repairing.keeping.onnx,
        force=repairing.keeping.force,
        call=result.call,
        seed=target.options.seed,
        opset=repairing.opset,
        data=target.data,
        batches=target.inputs.batches,
        **further,
    )
    return saved.files


def _keys(report: AuditReport) -> set[tuple[str, str]]:
    return {(finding.code, finding.module) for finding in report.findings}
