"""BN404: the statistics of the batch at hand, in a forward pass that is for inference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject

if TYPE_CHECKING:
    from bnify.auditing.live import Live, NormUse
    from bnify.auditing.onnx_file import OnnxFile
    from bnify.auditing.onnx_norm import OnnxNorm


class BatchStatisticsAtInference(Rule):
    """A norm of activations uses the statistics of the batch in eval mode, or in a file.

    What it checks:
        A live model: each batch norm in the forward pass in eval mode that takes mean and
        variance from its input (``track_running_stats=False``, ``F.batch_norm(training=True)``).
        An ONNX file: ``training_mode=1``, and norms whose mean or variance comes from a
        ReduceMean over the batch axis. Norms of weights (weight standardisation) do not count,
        nor does a batch norm on ``[1, N*C, ...]``, which is instance norm.

    Why it is bad:
        The answer to one sample depends on the samples beside it. At batch 1 a norm without
        spatial axes returns its shift alone, whatever the input.

    Example:
        ``nn.BatchNorm1d(64, track_running_stats=False)`` at batch 1 gives 0 for every input.

    How to fix it:
        Track running statistics (``track_running_stats=True``), recalibrate them on data
        (``--unsafe-fixes --data``), and run in eval mode; export from eval mode.

    Fix safety:
        Needs data: the running statistics have to be measured first.

    Source:
        Ioffe & Szegedy (2015), section 3.1: inference takes population statistics.
    """

    code = "BN404"
    name = "batch-stats-at-inference"
    severity = Severity.WARNING
    tiers = ("T1", "T0x")
    needs = needs(Need.FORWARD, Need.ONNX)
    fix = "track running statistics and recalibrate them on data"
    safety = Safety.ADVICE
    cost = "the answer to one sample depends on the others in its batch"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        if subject.onnx is not None:
            yield from self._file(subject.onnx)
        elif subject.live is not None:
            yield from self._model(subject.live)

    def _model(self, live: Live) -> Iterator[Finding]:
        seen = set()
        for use in live.uses:
            if not use.batch_statistics or use.of_weight or use.layer in seen:
                continue
            if _is_per_sample(live, use):
                continue
            seen.add(use.layer)
            channels = use.shape[1] if len(use.shape) > 1 else 1
            yield self.finding(
                use.layer,
                f"statistics of the batch in eval mode: {use.per_channel} values for each of "
                f"{channels} channels, at shape {list(use.shape)}",
                {"values_per_channel": use.per_channel, "channels": channels},
            )

    def _file(self, file: OnnxFile) -> Iterator[Finding]:
        for norm in file.norms:
            if norm.per_sample or not (norm.training or norm.computed):
                continue
            yield self.finding(
                norm.path,
                _why(norm),
                {
                    "training_mode": int(norm.training),
                    "computed": norm.computed,
                    "axes": None if norm.axes is None else list(norm.axes),
                },
            )


def _is_per_sample(live: Live, use: NormUse) -> bool:
    """Whether batch and channels were made one axis: instance norm, spelled as batch norm."""
    samples = live.call.batch if live.call is not None else None
    return use.shape[0] == 1 and samples is not None and samples > 1


def _why(norm: OnnxNorm) -> str:
    if norm.axes is not None:
        axes = ", ".join(map(str, norm.axes))
        return f"normalized with a mean over axes {axes}, the batch (axis 0) among them"
    if norm.training and not norm.computed:
        return "training_mode=1: the statistics of the batch, not the stored ones"
    return "its mean and variance are computed over the batch at every call"
