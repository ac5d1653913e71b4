"""BN204: norms that differ in eps or momentum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from bnify.auditing.finding import Finding, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject

_REAL = (int, float)


class MixedHyperparameters(Rule):
    """The batch norms of one model have different ε.

    What it checks:
        Whether all batch norms have one ε; how many have which, and the same for momentum.

    Why it is bad:
        Often it is design. Where it is not, parts come from different frameworks (1e-3 in
        TensorFlow, 1e-5 in PyTorch), and ported weights are off where a variance is small.

    Example:
        A backbone from a TensorFlow checkpoint with eps=1e-3, and a head with PyTorch's default.

    How to fix it:
        If the weights were ported, give each norm the ε that it was trained with.

    Fix safety:
        A person must know where the weights come from.

    Source:
        Documentation of ``torch.nn.BatchNorm2d`` (eps=1e-05) and of Keras' ``BatchNormalization``
        (epsilon=0.001).
    """

    code = "BN204"
    name = "mixed-hyperparameters"
    severity = Severity.INFO
    tiers = ("T1",)
    needs = needs(Need.MODULES)
    fix = "give each norm the eps that it was trained with"
    cost = "ported weights are off where a variance is small"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """At most one finding, for the model."""
        if subject.live is None:
            return
        norms = [n for n in subject.live.norms if isinstance(getattr(n.module, "eps", None), _REAL)]
        eps = Counter(float(norm.module.eps) for norm in norms)
        if len(eps) < 2:
            return
        given = (getattr(norm.module, "momentum", None) for norm in norms)
        momenta = Counter(value if isinstance(value, _REAL) else None for value in given)
        message = f"eps: {_listed(eps)}"
        if len(momenta) > 1:
            message += f"; momentum: {_listed(momenta)}"
        values = {
            "eps": {f"{value:g}": count for value, count in eps.items()},
            "momentum": {_number(value): count for value, count in momenta.items()},
        }
        yield self.finding("", message, values)


def _listed(counted: Counter[float] | Counter[float | None]) -> str:
    return ", ".join(f"{_number(value)} in {count}" for value, count in counted.most_common())


def _number(value: float | None) -> str:
    return "None" if value is None else f"{value:g}"
