"""BN211: a norm over a single element."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from bnify.auditing.finding import Finding, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject

if TYPE_CHECKING:
    from bnify.auditing.live import NormUse


class NormOverOneElement(Rule):
    """A group, instance or layer norm has one element for each statistic: its output is constant.

    What it checks:
        How many elements each mean and variance of a group, instance or layer norm is taken of,
        on the example.

    Why it is bad:
        The mean of one element is the element itself. What is left is 0 times the scale, plus the
        shift: whatever comes in, the same goes out, and no gradient comes back.

    Example:
        ``nn.GroupNorm(64, 64)`` behind global pooling; ``nn.InstanceNorm2d`` on 1×1 pixels.

    How to fix it:
        Fewer groups, or a layer norm over all channels.

    Fix safety:
        It changes the function, which is a constant so far.

    Source:
        Wu & He (2018), "Group Normalization", equation 1 with a set of one element.
    """

    code = "BN211"
    name = "norm-over-one-element"
    severity = Severity.ERROR
    tiers = ("T1",)
    needs = needs(Need.FORWARD)
    fix = "fewer groups, or a layer norm over all channels"
    cost = "the output does not depend on the input"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        if subject.live is None:
            return
        seen: set[str] = set()
        for use in subject.live.uses:
            if use.of_weight or use.layer in seen or elements(use) != 1:
                continue
            seen.add(use.layer)
            yield self.finding(
                use.layer,
                f"{use.kind} norm of {list(use.shape)}: 1 element a statistic",
                {"kind": use.kind, "shape": list(use.shape)},
            )


def elements(use: NormUse) -> int | None:
    """Elements a statistic of a group, instance or layer norm; None for other norms."""
    shape, given = use.shape, use.given
    if use.kind == "layer":
        return int(prod(given["normalized_shape"]))
    if use.kind == "group":
        groups = given.get("num_groups", given.get("group"))
        return prod(shape[1:]) // groups if isinstance(groups, int) and groups else None
    if use.kind == "instance" and given.get("use_input_stats", True):
        return prod(shape[2:])
    return None
