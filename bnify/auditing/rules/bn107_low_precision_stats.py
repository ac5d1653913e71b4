"""BN107: running statistics in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.rules.bn104_stats_underconverged import plain
from bnify.auditing.state import NormState
from bnify.auditing.subject import Subject

#: Below this momentum a bfloat16 average stops where an eighth of the value is still missing.
LEAST_MOMENTUM: Final = 2.0**-6
#: float16 ends at 65504: above this one batch of twice the variance is infinite.
MOST_VARIANCE: Final = 3e4


class LowPrecisionStatistics(Rule):
    """Running statistics are kept in 16 bits or fewer.

    What it checks:
        The dtype of running mean and variance: float16, bfloat16 and float8 are a warning. It is
        an error where they cannot work: bfloat16 with a momentum below 1/64, or float16 with a
        variance above 30000. Look-alikes with constant statistics (FrozenBatchNorm2d) lose no
        updates: an info.

    Why it is bad:
        The average is updated by momentum × difference. bfloat16 has 8 bits: with momentum m an
        update is lost in rounding once the average is within 1/(512·m) of the batch's value, 2 %
        at 0.1 and 25 % at 1/128, and the average stays there. float16 is infinite above 65504
        and loses variances below 6e-8.

    Example:
        ``model.bfloat16()`` before training, or a checkpoint converted as a whole.

    How to fix it:
        Keep the norms in float32: ``norm.float()`` after the cast, or let autocast choose. The
        convolutions may stay in half precision.

    Fix safety:
        Safe: the same values in float32. PyTorch's batch norm takes half-precision input with
        float32 statistics. One that is written out need not, and is left to a person.

    Source:
        Micikevicius et al. (2018), "Mixed precision training": statistics stay in float32.
    """

    code = "BN107"
    name = "low-precision-stats"
    severity = Severity.ERROR
    tiers = ("T0", "T3")
    needs = needs(Need.STATISTICS)
    fix = "keep the norm in float32: .float()"
    safety = Safety.SAFE
    cost = "updates are lost in rounding"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        for norm in subject.norms:
            if not norm.dtype.startswith(("float16", "bfloat16", "float8")):
                continue
            largest = float(np.max(norm.var))
            values = {"dtype": norm.dtype, "momentum": norm.momentum, "largest_variance": largest}
            if norm.frozen:
                yield self.finding(
                    norm.path,
                    f"its constant statistics are {norm.dtype}, float32 is expected",
                    values,
                    severity=Severity.INFO,
                    safety=Safety.ADVICE,
                    cost="a rounded mean and variance",
                )
                continue
            wrong = _beyond(norm, largest)
            yield self.finding(
                norm.path,
                f"running statistics are {norm.dtype}{wrong}, float32 is expected",
                values,
                severity=Severity.ERROR if wrong else Severity.WARNING,
                safety=None if _is_torchs(subject, norm.path) else Safety.ADVICE,
            )


def _is_torchs(subject: Subject, path: str) -> bool:
    """Whether it is a module of torch's, which takes half precision with float32 statistics.

    One that is written out would give float32 to a layer that expects half precision.
    """
    if subject.live is None:
        return True  # nothing is known of it, and a file is not rewritten
    from torch.nn.modules.batchnorm import _NormBase

    return isinstance(subject.live.modules.get(path), _NormBase)


def _beyond(norm: NormState, largest: float) -> str:
    """What cannot work in this dtype; empty where it can."""
    momentum = norm.momentum
    if norm.dtype == "bfloat16" and momentum is not None and 0 < momentum < LEAST_MOMENTUM:
        return f" with momentum {plain(momentum)} (at least {plain(LEAST_MOMENTUM)} is needed)"
    if norm.dtype == "float16" and largest > MOST_VARIANCE:
        return f" with a variance of {largest:.0f} (limit {MOST_VARIANCE:.0f})"
    return ""
