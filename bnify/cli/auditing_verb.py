"""What ``bnify audit`` does between its options and its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bnify.cli.auditing_fixes import fixed
from bnify.cli.auditing_options import Asked, Repairing
from bnify.cli.auditing_target import Target
from bnify.cli.session import Session
from bnify.cli.source import InputOptions, ModelOptions
from bnify.errors import UsageError

if TYPE_CHECKING:
    from bnify.auditing.baseline import Baseline
    from bnify.auditing.finding import AuditReport
    from bnify.report.audit import Fixed


def perform(
    asked: Asked,
    model: ModelOptions,
    inputs: InputOptions,
    repairing: Repairing,
    session: Session,
) -> int:
    """Audit, filter, fix where asked for, and report; the exit code."""
    with session.work():
        from bnify.auditing.engine import chosen
        from bnify.auditing.ignores import leave_modules

        if asked.statistics and session.fmt in ("sarif", "github"):
            raise UsageError(
                f"--format {session.fmt} lists findings, and --statistics counts them",
                hint="--format rich, concise, json or md",
            )
        codes = [rule.code for rule in chosen(*asked.rules.values())]
        target = Target.of(asked, model, inputs, repairing, session)
        with session.step("auditing"):
            found = target.audit(target.model)
        report = _against_baseline(leave_modules(found, asked.ignores), asked, codes, session)
        done = None
        if repairing.fix:
            report, done = fixed(target, found, report, repairing, session)
    _emit(report, target, asked, session, done)
    return report.exit_code(asked.fail_on)


def _emit(
    report: AuditReport,
    target: Target,
    asked: Asked,
    session: Session,
    done: Fixed | None,
) -> None:
    from bnify.environment import environment
    from bnify.report.audit import summary, unchecked
    from bnify.report.audited import render_audit

    made = environment(device="cpu", seed=target.options.seed) if session.fmt == "json" else None
    text = render_audit(
        report,
        session.fmt,
        width=session.streams.width(),
        color=session.color,
        encoding=session.streams.encoding,
        statistics=asked.statistics,
        audited=target.file,
        environment=made,
        fixed=done,
    )
    session.streams.emit(text)
    if session.fmt == "concise":
        made_of = () if done is None else done.result.plan.notes
        not_checked = (f"not checked: {text}" for text in unchecked(report))
        for note in (*report.notes, *made_of, *not_checked):
            session.note(note)
        session.note(summary(report, done))


def _against_baseline(
    report: AuditReport, asked: Asked, codes: Sequence[str], session: Session
) -> AuditReport:
    from bnify.auditing.baseline import Baseline

    if asked.baseline is None:
        return report
    if asked.write_baseline:
        known = Baseline.of(report)
        _write_baseline(known, asked.baseline)
        session.note(f"wrote {len(known.entries)} known findings to {asked.baseline}")
    else:
        known = Baseline.read(asked.baseline)
    return known.leave(report, codes)


def _write_baseline(known: Baseline, path: Path) -> None:
    """Write the file; a file that is no baseline is not replaced.

    Raises:
        PlanError: What is there is none.
    """
    from bnify.atomic import write_text, written_file
    from bnify.auditing.baseline import Baseline
    from bnify.strict_json import dumps

    if path.exists():
        Baseline.read(path)
    with written_file(path, force=True) as folder:
        write_text(folder / path.name, dumps(known.to_dict()))
