"""BN209: a linear layer and a batch norm at the end of the model."""

from __future__ import annotations

from collections.abc import Iterator

from bnify.auditing.finding import Finding, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject


class NormAtOutput(Rule):
    """What the model returns is a batch norm behind a linear layer.

    What it checks:
        Whether an output of the model is the result of a batch norm whose input is a Linear.
        Off unless selected.

    Why it is bad:
        In a classifier the norm limits the logits and makes them depend on the rest of the batch
        in training. Self-supervised projectors and backbones end that way on purpose.

    Example:
        ``nn.Linear(128, 10), nn.BatchNorm1d(10)`` as the last two layers of a classifier.

    How to fix it:
        Drop the norm behind the last layer of a classifier or a regressor.

    Fix safety:
        It changes the function.

    Source:
        Grill et al. (2020), "Bootstrap your own latent", for a projector that ends in one on
        purpose.
    """

    code = "BN209"
    name = "bn-at-output"
    severity = Severity.INFO
    tiers = ("T1",)
    needs = needs(Need.FORWARD)
    default = False
    fix = "drop the norm behind the last layer, unless this is a projector or a backbone"
    cost = "logits are bounded and depend on the batch"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        from bnify import ops
        from bnify.auditing.flow import ARRANGING, before

        live = subject.live
        if live is None:
            return

        def arranging(node: object) -> bool:
            return ops.name_of(node) in ARRANGING  # type: ignore[arg-type]

        for use in live.uses:
            if not use.of_batch or not _is_output(use.source.result, ARRANGING):
                continue
            above = list(before(live, use.source.value, 4, arranging))
            if any(n.op == "call_function" and ops.name_of(n) == "linear" for n in above):
                yield self.finding(use.layer, "the model returns its result, behind a Linear")


def _is_output(node: object, arranging: frozenset[str]) -> bool:
    from bnify import ops

    users = list(node.users)  # type: ignore[attr-defined]
    return any(
        user.op == "output" or (ops.name_of(user) in arranging and _is_output(user, arranging))
        for user in users
    )
