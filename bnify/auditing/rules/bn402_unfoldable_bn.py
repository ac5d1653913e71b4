"""BN402: a norm that cannot be folded, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject

if TYPE_CHECKING:
    from bnify.auditing.live import Live


class UnfoldableNorm(Rule):
    """A batch norm stays when the model is folded; this rule says why. Off unless selected.

    What it checks:
        Every batch norm (look-alikes and tracked instance norms too) that ``bnify fold`` leaves
        alone, with the reason that it gives. Where ``merge=True`` would fold it into a branch
        beside it (RepVGG, MobileOne), it says that.

    Why it is bad:
        It is no fault: the norm costs a pass over its activation in eval mode.

    Example:
        The norm on the identity branch of a RepVGG block has no layer of its own; with
        ``bnify fold --merge`` all branches become one convolution.

    How to fix it:
        Read the reason: some go away with an option of ``bnify fold`` (``--merge``,
        ``--partial``, ``--untie``, ``--emit graph``), others are the architecture's.

    Fix safety:
        Advice: nothing is changed.

    Source:
        Ding et al. (2021), RepVGG, section 3.3: branches become one convolution.
    """

    code = "BN402"
    name = "unfoldable-bn"
    severity = Severity.INFO
    tiers = ("T1",)
    needs = needs(Need.EVAL)
    fix = "see the reason; some go with an option of bnify fold"
    safety = Safety.ADVICE
    default = False
    cost = "a pass over the activation in eval mode"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        live = subject.live
        if live is None or live.folded is None:
            return
        norms = {use.layer for use in live.uses if use.of_batch}
        left = [skip for skip in live.folded.skips if skip.layer in norms]
        merged = _merged(live) if left else frozenset()
        for skip in left:
            merges = skip.layer in merged
            detail = f": {skip.detail}" if skip.detail else ""
            more = "; merging the branches folds it" if merges else ""
            yield self.finding(
                skip.layer,
                f"{skip.reason.sentence}{detail}{more}",
                {"reason": skip.reason.value, "detail": skip.detail, "merge": merges},
                fix="bnify fold --merge" if merges else None,
            )


def _merged(live: Live) -> frozenset[str]:
    """The norms that are folded where branches may be merged."""
    from bnify.folding import FoldOptions, fold_graph

    if live.captured is None:
        return frozenset()
    return frozenset(e.layer for e in fold_graph(live.captured, FoldOptions(merge=True)).edits)
