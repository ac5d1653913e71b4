"""BN206: one batch norm for several values."""

from __future__ import annotations

from collections.abc import Iterator

from bnify.auditing.finding import Finding, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject


class SharedCallSites(Rule):
    """A batch norm that tracks statistics normalizes different values in one forward pass.

    What it checks:
        How often each batch norm runs in one pass, and on how many different values.

    Why it is bad:
        Its running statistics are a mixture: in train mode each call is normalized by its own
        batch, in eval mode all by one average that fits none of them.

    Example:
        A detection head whose convolutions and norms run on every pyramid level; the two branches
        of a siamese network on different kinds of images.

    How to fix it:
        A norm of its own for each call (keep the convolutions shared), as RetinaNet variants and
        EfficientDet do; or a norm without running statistics.

    Fix safety:
        It changes the function; new norms need training or calibration.

    Source:
        Tan, Pang & Le (2020), "EfficientDet", whose heads share convolutions and not norms.
    """

    code = "BN206"
    name = "shared-call-sites"
    severity = Severity.WARNING
    tiers = ("T1", "T3")
    needs = needs(Need.FORWARD, Need.LOOP)
    fix = "give each call a norm of its own"
    cost = "eval mode uses one average for populations that differ"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        for layer, (calls, different) in _calls(subject).items():
            if different > 1:
                yield self.finding(
                    layer,
                    f"it runs {calls} times in one forward pass, on {different} values",
                    {"calls": calls, "values": different},
                )


def _calls(subject: Subject) -> dict[str, tuple[int, int]]:
    """Calls in one forward pass of each norm that tracks statistics, and on how many values."""
    if subject.observed is not None:
        seen = subject.observed.calls
        return {layer: (calls.per_pass, calls.different) for layer, calls in seen.items()}
    if subject.live is None:
        return {}
    values: dict[str, list[object]] = {}
    for use in subject.live.uses:
        if use.of_batch and use.kind != "frozen" and use.tracked:
            values.setdefault(use.layer, []).append(use.source.value)
    return {layer: (len(nodes), len(set(nodes))) for layer, nodes in values.items()}
