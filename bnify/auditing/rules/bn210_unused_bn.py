"""BN210: a batch norm that is registered and never runs."""

from __future__ import annotations

from collections.abc import Iterator

from bnify.auditing.finding import Finding, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject


class UnusedNorm(Rule):
    """A batch norm is part of the model, and the forward pass does not run it.

    What it checks:
        Every batch norm module: whether it, or an operator with its tensors, ran in one pass in
        eval mode on the example.

    Why it is bad:
        It is dead weight in checkpoints and in the optimizer, DDP complains about parameters
        without gradients, and its statistics stay 0 and 1 for whoever uses it later. Some norms
        run in train mode only (auxiliary heads), or for other inputs: that is design.

    Example:
        ``self.bn3`` is built in ``__init__``, and ``forward`` forgot it.

    How to fix it:
        Call it or remove it.

    Fix safety:
        Only a person knows which of the two was meant.

    Source:
        PyTorch documentation of ``DistributedDataParallel``, ``find_unused_parameters``.
    """

    code = "BN210"
    name = "unused-bn"
    severity = Severity.INFO
    tiers = ("T1",)
    needs = needs(Need.FORWARD)
    fix = "call it or remove it, unless it runs in train mode or for other inputs"
    cost = "parameters without gradients, statistics that never move"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        live = subject.live
        if live is None or live.captured is None:
            return
        called = {id(live.modules.get(call.path)) for call in live.captured.calls}
        read = {use.layer for use in live.uses}
        for norm in live.norms:
            if id(norm.module) not in called and norm.path not in read:
                yield self.finding(norm.path, "it did not run in a forward pass in eval mode")
