"""BN102: running statistics that are still 0 and 1, in a model that was trained."""

from __future__ import annotations

from collections.abc import Iterator

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.proved import with_proof
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.rules.bn210_unused_bn import UnusedNorm
from bnify.auditing.state import NormState
from bnify.auditing.subject import Subject


class StatisticsNeverUpdated(Rule):
    """Running statistics are exactly 0 and 1, as initialised, in a model that was trained.

    What it checks:
        Whether a norm's running mean is 0 and its running variance 1 in every channel, while
        another norm of the model has been updated, or its own scale or shift have moved. Values
        decide, not ``num_batches_tracked``: that is 0 in many good checkpoints. A model in which
        all norms are as initialised gives one note, "untrained". With example inputs, one that
        never runs and whose scale and shift are as initialised is BN210's to tell. Look-alikes
        with constant statistics (FrozenBatchNorm2d) may have 0 and 1 on purpose. A network that
        draws its scales and shifts at random (RepVGG in timm) looks the same before training as
        one that lost its statistics after it: that is reported.

    Why it is bad:
        In eval mode such a norm divides by 1 instead of by the deviation of its input, and every
        layer behind it gets numbers that it never saw. Nothing fails; the accuracy is that of
        another network.

    Example:
        The statistics were not in the state dict and the loader was told ``strict=False``; or
        each training step ran the norm in eval mode; or an averaged model copied the parameters
        and left the buffers.

    How to fix it:
        Load the checkpoint that has the statistics, or recalibrate them on data:
        ``--unsafe-fixes --data``.

    Fix safety:
        Needs data; the new statistics are proved on a copy first.

    Source:
        PyTorch documentation of ``torch.nn.BatchNorm2d``: buffers start at 0 and 1.
    """

    code = "BN102"
    name = "stats-never-updated"
    severity = Severity.ERROR
    tiers = ("T0", "T0x")
    needs = needs(Need.STATISTICS)
    fix = "recalibrate the statistics on data"
    safety = Safety.DATA
    cost = "eval mode computes another function than training did"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm, or one for an untrained model."""
        unused = {finding.module for finding in UnusedNorm().check(subject)}
        for norms in subject.parts:
            judged = (n for n in norms if not n.frozen and (n.moved or n.path not in unused))
            for finding in self._of_one(tuple(judged)):
                data = finding.safety is Safety.DATA
                yield with_proof(finding, subject) if data else finding

    def _of_one(self, norms: tuple[NormState, ...]) -> Iterator[Finding]:
        fresh = [norm for norm in norms if norm.fresh]
        # By the variance: dropping a redundant bias moves the mean of a norm that never ran.
        updated = sum(not bool((norm.var == 1).all()) for norm in norms)
        moved = sum(norm.moved for norm in fresh)
        if fresh and not updated and not moved:
            count = f"all {len(fresh)} norms are" if len(fresh) > 1 else "the only norm is"
            where = f" of {fresh[0].part}" if fresh[0].part else ""
            yield self.finding(
                "",
                f"untrained: {count} as initialised{where}, mean 0 and variance 1",
                {"fresh": len(fresh), "updated": 0},
                severity=Severity.INFO,
                fix="",
                safety=Safety.ADVICE,
                cost="",
            )
            return
        for norm in fresh:
            if not updated and not norm.moved:
                continue  # untrained, as far as its own vectors say
            why = (
                "its weight or bias have moved"
                if norm.moved
                else f"{updated} of {len(norms)} norms are updated"
            )
            yield self.finding(
                norm.path,
                f"running mean 0 and variance 1 in all {norm.channels} channels, while {why}",
                {"channels": norm.channels, "updated": updated, "moved": norm.moved},
            )
