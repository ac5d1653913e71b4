"""BN105: channels of vanishing variance that the norm magnifies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject

#: How many times the median gain of the layer is too much.
TIMES: Final = 10.0


class VanishingVariance(Rule):
    """A channel is constant on all data, and its norm magnifies whatever is not.

    What it checks:
        Channels whose running variance is below eps: dead inputs, mostly. Where the gain
        abs(weight) / sqrt(variance + eps) is above 10 times the median of the layer it is a
        warning; such channels whose weight has shrunk along with them are only counted.

    Why it is bad:
        The channel says nothing on the data it was trained on. On other data, in another
        precision or with another kernel the smallest difference comes out up to 1/sqrt(eps) = 316
        times as large. It also ruins the range of folded weights for quantization.

    Example:
        ``layer4.1.bn2`` has variance 1e-9 and weight 0.9 in channel 17: a gain of 285, where the
        median is 1.4.

    How to fix it:
        Set the weight of the channel to 0 and let its shift stand; the channel is constant anyway.

    Fix safety:
        Unsafe: equal on the data it was trained on, not on other data.

    Source:
        Ioffe & Szegedy (2015), algorithm 1: eps is there for this case.
    """

    code = "BN105"
    name = "vanishing-variance"
    severity = Severity.WARNING
    tiers = ("T0", "T0x")
    needs = needs(Need.STATISTICS)
    fix = "set the weight of the channel to 0"
    safety = Safety.UNSAFE
    cost = "the smallest difference in its input is magnified"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm: a warning where a channel is magnified, else the count."""
        for norm in subject.trained:
            if not norm.finite:
                continue  # BN101 tells
            vanished = norm.var < norm.eps
            if not vanished.any():
                continue
            median = float(np.median(norm.gain))
            magnified = vanished & (norm.gain > TIMES * median)
            count, loud = int(vanished.sum()), int(magnified.sum())
            values = {
                "vanishing": count,
                "magnified": loud,
                "channels": norm.channels,
                "eps": norm.eps,
                "median_gain": median,
                "indices": np.flatnonzero(magnified if loud else vanished).tolist(),
            }
            if loud:
                worst, bare = float(norm.gain[magnified].max()), norm.weight is None
                yield self.finding(
                    norm.path,
                    f"variance below eps = {norm.eps:g} and a gain of up to {worst:.3g} in "
                    f"{loud} of {norm.channels} channels (limit {TIMES:.0f} × the median "
                    f"{median:.3g})",
                    values | {"gain": worst},
                    fix="prune the channel: there is no weight to set to 0" if bare else None,
                    safety=Safety.ADVICE if bare else None,
                )
            else:
                yield self.finding(
                    norm.path,
                    f"variance below eps = {norm.eps:g} in {count} of {norm.channels} channels, "
                    f"none with a gain above {TIMES:.0f} × the median {median:.3g}",
                    values,
                    severity=Severity.INFO,
                    fix="",
                    safety=Safety.ADVICE,
                    cost="",
                )
