"""BN106: channels that the norm multiplies by almost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.state import NormState
from bnify.auditing.subject import Subject

#: What share of the median weight is as good as none.
SHARE: Final = 1e-3


class DeadChannels(Rule):
    """The norm multiplies a channel by almost nothing: it carries its shift and no signal.

    What it checks:
        Channels of trained norms whose abs(weight) is at most 0.001 of the layer's median. A
        layer of which no channel is above 0.001 of the model's median is a warning: its whole
        branch is a constant. In an untrained network zero weights are design (the last norm of a
        residual branch starts at 0) and nothing is said.

    Why it is bad:
        Such channels are computed and thrown away: time and memory without an effect. A whole
        layer of them is a branch that training has cut off.

    Example:
        ``layer1.0.bn2`` of a network trained with weight decay on its norms: 9 of 64 weights
        below 1e-6.

    How to fix it:
        Prune the channels. For a whole layer, look for a learning rate of 0, a frozen parameter,
        or weight decay that drove it there.

    Fix safety:
        Unsafe: pruning changes shapes.

    Source:
        Liu et al. (2017), "Learning efficient convolutional networks through network slimming".
    """

    code = "BN106"
    name = "dead-channels"
    severity = Severity.WARNING
    tiers = ("T0", "T0x")
    needs = needs(Need.STATISTICS)
    fix = "prune the channels"
    safety = Safety.ADVICE
    cost = "computed and thrown away"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        for norms in subject.parts:
            scaled = [n for n in norms if not n.fresh and n.weight is not None and n.finite]
            usual = float(np.median([np.median(n.gamma) for n in scaled])) if scaled else 0.0
            for norm in scaled:
                yield from self._of_one(norm, usual)

    def _of_one(self, norm: NormState, usual: float) -> Iterator[Finding]:
        largest, median = float(norm.gamma.max()), float(np.median(norm.gamma))
        values = {"channels": norm.channels, "median": median, "share": SHARE}
        if largest <= SHARE * usual or largest == 0:
            yield self.finding(
                norm.path,
                f"all {norm.channels} channels are dead: abs(weight) is at most {largest:.3g} "
                f"(limit {SHARE:g} × the model's median {usual:.3g})",
                values | {"dead": norm.channels, "largest": largest, "model_median": usual},
                fix="find out what drove the weight to 0: weight decay, a frozen parameter",
                safety=Safety.ADVICE,
                cost="the branch behind it is a constant",
            )
            return
        dead = norm.gamma <= SHARE * median
        count = int(dead.sum())
        if count:
            yield self.finding(
                norm.path,
                f"{count} of {norm.channels} channels are dead: abs(weight) is at most "
                f"{SHARE:g} × the median {median:.3g}",
                values | {"dead": count, "indices": np.flatnonzero(dead).tolist()},
                severity=Severity.INFO,
            )
