"""BN305: the model says something else in eval mode than with its norms in train mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.proved import with_proof
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.rules.bn306_stats_drift import drifted, sees_raw_input
from bnify.auditing.subject import Subject
from bnify.auditing.verdict import at_fault, mode_gap

if TYPE_CHECKING:
    from bnify.auditing.measured import Measured


_NOISE = "with recalibrated statistics half of the difference stays: the noise of the batches"


class TrainEvalGap(Rule):
    """Eval mode is worse than the same model with its norms alone in train mode.

    What it checks:
        Both modes on the same 8 or more batches of 32 or more samples, dropout off in both. With
        labels: accuracy in eval mode is more than 2 points below (an error: more than 10, or
        predictions agree in less than 0.90). Without labels: predictions agree in less than 0.98
        (an error: less than 0.90; an info if recalibrated statistics leave half of the difference:
        that is the noise of the batches). With fewer data, with outputs that are no classes, and
        where both modes are near chance, nothing is judged, and the report says so.

    Why it is bad:
        The weights fit the statistics of the batches, and the running statistics are others. The
        training loss looks well; what is deployed is not what was trained.

    Example:
        Running statistics lost in a conversion: 0.40 in eval mode, 0.98 in train mode.

    How to fix it:
        Recalibrate the statistics on training data, and remove the cause that the finding names:
        lost or frozen statistics, momentum, other preprocessing.

    Fix safety:
        Needs data. It is proved on a copy: the finding has accuracy (or agreement) before and
        after.

    Source:
        Ioffe & Szegedy (2015), section 3.1; Wu & Johnson (2021), "Rethinking 'Batch' in
        BatchNorm".
    """

    code = "BN305"
    name = "train-eval-gap"
    severity = Severity.WARNING
    tiers = ("T2",)
    needs = needs(Need.DATA)
    fix = "recalibrate the statistics on data"
    safety = Safety.DATA
    cost = "what is deployed is not what was trained"

    def unmet(self, subject: Subject) -> str:
        """More batches, or outputs that can be compared."""
        measured = subject.measured
        if measured is None or not measured.norms:
            return ""
        if measured.why_not:
            return f"a model with scores of classes as output: {measured.why_not}"
        return measured.too_few

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding for the model, which names the cause."""
        measured = subject.measured
        severity = None if measured is None else mode_gap(measured)
        if measured is None or severity is None or not measured.norms:
            return
        noise = severity is Severity.INFO
        cause = _NOISE if noise else _cause(subject, measured)
        values: dict[str, Any] = {
            "accuracy": measured.accuracy,
            "train_accuracy": measured.train_accuracy,
            "agreement": measured.agreement,
            "batches": len(measured.sizes),
            "samples": measured.samples,
            "cause": cause,
        }
        message = _message(measured) + (f"; {cause}" if cause else "")
        yield with_proof(self.finding("", message, values, severity=severity), subject)


def _message(measured: Measured) -> str:
    if measured.accuracy is not None and measured.train_accuracy is not None:
        points = 100 * (measured.train_accuracy - measured.accuracy)
        return (
            f"accuracy {measured.accuracy:.3f} in eval mode, {measured.train_accuracy:.3f} with "
            f"norms in train mode: {points:.1f} points apart (threshold 2)"
        )
    return (
        f"eval mode and norms in train mode predict the same in {measured.agreement:.3f} of the "
        "cases (threshold 0.98)"
    )


def _cause(subject: Subject, measured: Measured) -> str:
    """What is wrong with the statistics, as far as vectors and data say."""
    norms = [norm for norm in subject.norms if norm.path in measured.norms]
    for words, found in at_fault(norms):
        return f"{words} in {found[0].path or 'the norm'}" + (
            f" and {len(found) - 1} more" if len(found) > 1 else ""
        )
    drift = list(drifted(measured))
    if not drift:
        return ""
    path, divergence = drift[0]
    first = f"from {path or 'the norm'} on the statistics are of other data (KL {divergence:.2f})"
    if subject.live is not None and sees_raw_input(subject.live, path):
        return f"{first}, and its input is the raw input: check preprocessing and domain"
    return first
