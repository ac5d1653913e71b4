"""BN104: running statistics that still hold a good part of their initial 0 and 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.proved import with_proof
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject

#: The share of the initial values that may be left.
LEFT: Final = 0.05


class StatisticsUnderconverged(Rule):
    """The running statistics have seen so few batches that their initial values still count.

    What it checks:
        After n batches with momentum m the initial mean 0 and variance 1 have the weight
        (1 - m)^n in the running average. It should be at most 5 %: 29 batches at the usual 0.1.
        A counter of 0 says nothing (old and ported checkpoints), and ``momentum=None`` is a true
        average that has no initial part.

    Why it is bad:
        Eval mode normalizes with statistics that are partly those of no data. The error is a
        bias: more evaluation data does not average it out.

    Example:
        Fine-tuning for 200 steps with ``momentum=0.001``: 82 % of the variance is the initial 1.

    How to fix it:
        Recalibrate the statistics on data (``--unsafe-fixes --data``). Or train longer, or with a
        larger momentum.

    Fix safety:
        Needs data; the new statistics are proved on a copy first.

    Source:
        The running average running = (1 - m)·running + m·batch, solved for n equal batches.
    """

    code = "BN104"
    name = "stats-underconverged"
    severity = Severity.WARNING
    tiers = ("T0", "T1")
    needs = needs(Need.STATISTICS)
    fix = "recalibrate the statistics on data"
    safety = Safety.DATA
    cost = "eval mode normalizes with statistics that are partly those of no data"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm; a momentum of 0 is BN203's to tell."""
        for norm in subject.norms:
            momentum, batches = norm.momentum, norm.batches
            if norm.frozen or batches is None or batches <= 0:
                continue
            if momentum is None or not 0 < momentum < 1:
                continue
            left = (1 - momentum) ** batches
            if left > LEFT:
                assumed = " (assumed)" if subject.kind == "checkpoint" else ""
                found = self.finding(
                    norm.path,
                    f"after {batches} batches with momentum {plain(momentum)}{assumed}, "
                    f"{100 * left:.0f} % of the initial 0 and 1 is left "
                    f"(limit {100 * LEFT:.0f} %)",
                    {"batches": batches, "momentum": momentum, "left": left, "limit": LEFT},
                )
                yield with_proof(found, subject)


def plain(value: float) -> str:
    """A number in plain decimals: ``0.0003``, never an exponent."""
    return f"{value:.12f}".rstrip("0").rstrip(".")
