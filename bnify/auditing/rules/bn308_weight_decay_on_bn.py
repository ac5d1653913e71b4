"""BN308: weight decay on the scale and shift of norms."""

from __future__ import annotations

from collections.abc import Iterator

from bnify.auditing.finding import Finding, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject


class WeightDecayOnNorm(Rule):
    """The optimizer decays the scale or shift of a batch norm.

    What it checks:
        Whether a parameter group with ``weight_decay`` above 0 holds parameters of a batch norm.

    Why it is bad:
        Decay pulls the scale towards 0 and the shift with it, which is no regularisation of what
        the network computes: the layers before a norm can be scaled at will. The evidence is
        contested, and many good recipes decay everything.

    Example:
        ``SGD(model.parameters(), lr=0.1, weight_decay=1e-4)``.

    How to fix it:
        ``SGD(bnify.param_groups(model, weight_decay=1e-4), lr=0.1)``.

    Fix safety:
        It changes training.

    Source:
        He et al. (2019), "Bag of Tricks for Image Classification", section 3.1, for leaving them
        out; van Laarhoven (2017), "L2 Regularization versus Batch and Weight Normalization".
    """

    code = "BN308"
    name = "weight-decay-on-bn"
    severity = Severity.INFO
    tiers = ("T1",)
    needs = needs((Need.MODULES, Need.OPTIMIZER))
    fix = "split the groups: bnify.param_groups(model, weight_decay=...)"
    cost = "scales are pulled towards 0; whether that hurts is contested"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        live = subject.live
        if live is None:
            return
        decays = {
            id(parameter): float(group["weight_decay"])
            for group in getattr(subject.optimizer, "param_groups", ())
            if group.get("weight_decay")
            for parameter in group["params"]
        }
        for norm in live.norms:
            found = {
                name: decays[id(parameter)]
                for name, parameter in norm.module._parameters.items()
                if parameter is not None and id(parameter) in decays
            }
            if found:
                decay = max(found.values())
                yield self.finding(
                    norm.path,
                    f"weight_decay {decay:g} on {' and '.join(found)}",
                    {"weight_decay": decay, "parameters": list(found)},
                )
