"""BN208: a batch norm right behind another one."""

from __future__ import annotations

from collections.abc import Iterator

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject


class DoubleNormalization(Rule):
    """A batch norm reads another batch norm, with nothing but shapes in between.

    What it checks:
        Whether the result of a batch norm goes into another one and nowhere else, directly or
        through operators that only arrange elements. In a branch that is merged later (RepGhost)
        others read it too.

    Why it is bad:
        The second undoes the scale and shift of the first, whose parameters train towards
        nothing; both cost memory and time.

    Example:
        A block that ends in a norm, in front of a block that starts with one.

    How to fix it:
        Remove one of them. In a trained model in eval mode the first folds into the second.

    Fix safety:
        Safe in eval mode, where both are affine maps by channel.

    Source:
        Two maps y = s·x + t by channel compose to one; see docs/folding.md.
    """

    code = "BN208"
    name = "double-normalization"
    severity = Severity.WARNING
    tiers = ("T1",)
    needs = needs(Need.FORWARD)
    fix = "remove one; in eval mode the first folds into what stands before it or behind it"
    safety = Safety.SAFE
    cost = "the first norm's scale and shift are undone"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding for each first norm of a pair."""
        for first, second in pairs(subject):
            training = subject.live is not None and subject.live.model.training
            yield self.finding(
                first,
                f"{second} normalizes its result again",
                {"second": second},
                safety=Safety.ADVICE if training else None,  # no fold keeps train mode
            )


def pairs(subject: Subject) -> Iterator[tuple[str, str]]:
    """Norms whose result a norm reads, and nothing else."""
    from bnify import ops
    from bnify.auditing.flow import ARRANGING

    live = subject.live
    if live is None or live.draft is None:
        return
    behind = {use.source.steps[0]: use for use in live.uses if use.of_batch}
    seen: set[str] = set()
    for use in behind.values():
        value = use.source.result
        while len(readers := live.draft.readers(value)) == 1:
            second = behind.get(readers[0])
            if second is not None and second.layer != use.layer and use.layer not in seen:
                seen.add(use.layer)
                yield use.layer, second.layer
            if second is not None or ops.name_of(readers[0]) not in ARRANGING:
                break
            value = readers[0]
