"""BN307: an averaged model whose running statistics were left behind."""

from __future__ import annotations

from collections.abc import Iterator

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject


class AverageWithoutStatistics(Rule):
    """An averaged model (EMA, SWA) has moved parameters and statistics as initialised.

    What it checks:
        A model against the one that it is an average of: its parameters have moved, its running
        statistics are at their start, mean 0 and variance 1, and those of the other model are
        not. An average that has not begun, parameters included, is no fault. In a training loop
        statistics are compared with those of the last look: they stand still while the parameters
        of the average and the statistics of the model move.

    Why it is bad:
        Parameters are averaged, buffers are forgotten: ``model.parameters()`` has no running
        statistics in it. Evaluation of the average, which is what is deployed, then runs with
        the statistics of no data, while the model in training looks fine.

    Example:
        ``for e, p in zip(ema.parameters(), model.parameters()): e.lerp_(p, 0.001)``.

    How to fix it:
        Copy the buffers in each update (``AveragedModel(use_buffers=True)`` averages them), or
        recalibrate before use: ``torch.optim.swa_utils.update_bn``, or ``--unsafe-fixes --data``.
        Where that is done at the end anyway: ``bnify.watch(..., ignore=["BN307"])``.

    Fix safety:
        Needs data, or the other model; the average's parameters stay as they are.

    Source:
        Izmailov et al. (2018), "Averaging weights leads to wider optima", section 3.2.
    """

    code = "BN307"
    name = "ema-buffers-stale"
    severity = Severity.ERROR
    tiers = ("T0", "T3")
    needs = needs(Need.REFERENCE)
    fix = "copy the buffers along with the parameters, or recalibrate"
    safety = Safety.DATA
    cost = "the averaged model evaluates with the statistics of no data"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm of the average."""
        reference, observed = subject.reference or {}, subject.observed
        pairs = [(n, reference[n.path]) for n in subject.norms if n.path in reference]
        with_parameters = any(n.weight is not None or n.bias is not None for n, _ in pairs)
        moved = (
            any(n.moved for n, _ in pairs)
            if with_parameters and observed is None
            else subject.reference_moved
        )
        if not moved:
            return
        for norm, other in pairs:
            batches = f", of {other.batches} batches" if other.batches else ""
            values = {"channels": norm.channels, "reference_batches": other.batches}
            if norm.fresh and not other.fresh:
                yield self.finding(
                    norm.path,
                    f"running mean 0 and variance 1 in all {norm.channels} channels, while the "
                    f"model that was averaged has others{batches}",
                    values,
                )
            elif observed is not None and norm.path in observed.still:
                yield self.finding(
                    norm.path,
                    f"running mean and variance stand still in all {norm.channels} channels, while "
                    f"parameters move, and the statistics of the model that is averaged{batches}",
                    values,
                )
