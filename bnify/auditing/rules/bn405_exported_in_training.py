"""BN405: a file that was exported from train mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject

if TYPE_CHECKING:
    from bnify.auditing.onnx_norm import OnnxNorm


class ExportedInTraining(Rule):
    """An ONNX file holds what belongs to training: norms in training mode, live dropout.

    What it checks:
        Each BatchNormalization with ``training_mode=1`` (below opset 7: ``is_test=0``) or with
        more than one result (the updated statistics), and each Dropout that is switched on. A
        norm that has no stored statistics is left to BN404: it has no other mode.

    Why it is bad:
        The file normalizes with the batch at hand, or drops values at random: its answers change
        with the batch, or from call to call. Runtimes without training operators refuse it.

    Example:
        ``torch.onnx.export(model, x, f, training=TrainingMode.TRAINING)``, left from a debugging
        session, or ``model.eval()`` forgotten before an export.

    How to fix it:
        Call ``model.eval()`` and export again; ``bnify export`` refuses norms in train mode.

    Fix safety:
        Advice: the file is not rewritten.

    Source:
        ONNX operator specification, BatchNormalization-15 and Dropout-13: ``training_mode``.
    """

    code = "BN405"
    name = "exported-in-training"
    severity = Severity.ERROR
    tiers = ("T0x",)
    needs = needs(Need.ONNX)
    fix = "model.eval(), then export again"
    safety = Safety.ADVICE
    cost = "answers change with the batch, or from call to call"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm or dropout."""
        if subject.onnx is None:
            return
        for norm in subject.onnx.norms:
            if norm.kind == "batch" and not norm.computed and (norm.training or norm.results > 1):
                yield self.finding(
                    norm.path,
                    _why(norm),
                    {"training_mode": int(norm.training), "results": norm.results},
                )
        for path, ratio in subject.onnx.live_dropout:
            yield self.finding(
                path,
                f"dropout is switched on: {ratio:.0%} of its values are dropped at every call",
                {"ratio": ratio, "training_mode": 1},
            )


def _why(norm: OnnxNorm) -> str:
    parts = []
    if norm.training:
        parts.append("is in training mode")
    if norm.results > 1:
        parts.append(f"declares {norm.results} results, where inference has 1")
    return f"BatchNormalization {' and '.join(parts)}"
