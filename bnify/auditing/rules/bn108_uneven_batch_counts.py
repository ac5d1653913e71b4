"""BN108: norms that have seen far more or far fewer batches than the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from bnify.auditing.finding import Finding, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject

MANY: Final = 1.5
FEW: Final = 0.5


class UnevenBatchCounts(Rule):
    """A norm has seen far more, or far fewer, batches than the model's other norms.

    What it checks:
        ``num_batches_tracked`` of each norm against the median of the model: at least 1.5 times,
        or at most half of it. Counters of 0 are left out: a ported checkpoint has them.

    Why it is bad:
        It need not be. Twice the count is a norm that runs twice a step: its statistics mix two
        inputs (BN206). Half the count is a norm that was frozen, skipped or added later, so that
        its statistics are of other data than its neighbours'.

    Example:
        A shared head that runs on five feature maps: five times the batches of the backbone.

    How to fix it:
        Find out whether it was meant. If not: one norm for each call, or train all of them.

    Fix safety:
        By hand.

    Source:
        PyTorch documentation of ``torch.nn.BatchNorm2d``: the counter goes up by one a forward.
    """

    code = "BN108"
    name = "uneven-batch-counts"
    severity = Severity.INFO
    tiers = ("T0",)
    needs = needs(Need.STATISTICS)
    fix = "find out whether it runs twice a step, or was frozen or skipped"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        for norms in subject.parts:
            counted = [(norm, norm.batches) for norm in norms if norm.batches and norm.batches > 0]
            median = float(np.median([n for _, n in counted])) if counted else 0.0
            for norm, batches in counted:
                if MANY * median > batches > FEW * median:
                    continue
                limit = f"{MANY} ×" if batches > median else f"{FEW} ×"
                yield self.finding(
                    norm.path,
                    f"{batches} batches, {batches / median:.3g} × the median {median:.0f} "
                    f"(limit {limit})",
                    {"batches": batches, "median": median},
                )
