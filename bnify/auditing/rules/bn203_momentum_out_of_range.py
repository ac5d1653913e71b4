"""BN203: a momentum that forgets everything, or nothing."""

from __future__ import annotations

from collections.abc import Iterator

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject

_USUAL = 0.1


class MomentumOutOfRange(Rule):
    """The momentum of running statistics is 0.5 or more, or 0.

    What it checks:
        ``momentum`` of every batch norm that tracks statistics. In PyTorch it is the weight of the
        new batch: running = (1 - m)·running + m·batch. ``None`` is a cumulative average and fine.
        Of ``F.batch_norm`` it is known for eval mode alone, where 0 means nothing: 0.5 or more.

    Why it is bad:
        TensorFlow and Keras have it the other way round: 0.99 there is 0.01 here. With 0.99 the
        running statistics are those of the last batch, and eval mode depends on which one that
        was. With 0 they stay as they were initialised.

    Example:
        ``nn.BatchNorm2d(64, momentum=0.99)``, copied from a TensorFlow model.

    How to fix it:
        Set 1 - m (0.99 becomes 0.01); for 0 or 0.5, PyTorch's own 0.1. Recalibrate if the model
        was trained with it.

    Fix safety:
        Safe: momentum is not used in eval mode.

    Source:
        PyTorch documentation of ``torch.nn.BatchNorm2d``, note on ``momentum``; Keras
        documentation of ``BatchNormalization``.
    """

    code = "BN203"
    name = "momentum-out-of-range"
    severity = Severity.ERROR
    tiers = ("T1", "T3")
    needs = needs(Need.MODULES)
    fix = "set momentum to 1 - m"
    safety = Safety.SAFE
    cost = "running statistics are those of the last batch, or never move"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm, with the value to set."""
        for path, momentum in out_of_range(subject):
            yield self._of_one(path, momentum, self.safety)
        for path, momentum in _functional(subject):
            yield self._of_one(path, momentum, Safety.ADVICE)

    def _of_one(self, path: str, momentum: float, safety: Safety) -> Finding:
        wanted = proposed(momentum)
        return self.finding(
            path,
            f"momentum {momentum:g} is not in (0, 0.5)",
            {"momentum": momentum, "proposed": wanted},
            fix=f"set momentum to {wanted}"
            + (f" (1 - {momentum:g})" if 0.5 < momentum < 1 else ""),
            safety=safety,
        )


def out_of_range(subject: Subject) -> Iterator[tuple[str, float]]:
    """Norms and their momentum."""
    if subject.live is None:
        return
    for norm in subject.live.norms:
        momentum = getattr(norm.module, "momentum", None)
        if not norm.tracked or not isinstance(momentum, (int, float)):
            continue
        if momentum >= 0.5 or momentum <= 0:
            yield norm.path, float(momentum)


def _functional(subject: Subject) -> Iterator[tuple[str, float]]:
    """Norms that are no modules with a momentum, and what they were called with in eval mode."""
    if subject.live is None:
        return
    held = {id(norm.module) for norm in subject.live.norms if hasattr(norm.module, "momentum")}
    owners = {norm.path for norm in subject.live.norms if id(norm.module) in held}
    seen: set[str] = set()
    for use in subject.live.uses:
        momentum = use.given.get("momentum")
        owner = use.layer if use.layer in owners else use.layer.rpartition(".")[0]
        if not use.of_batch or not use.tracked or owner in owners or use.layer in seen:
            continue
        if isinstance(momentum, (int, float)) and momentum >= 0.5:
            seen.add(use.layer)
            yield use.layer, float(momentum)


def proposed(momentum: float) -> str:
    """The momentum to set, in plain decimals: 0.9997 gives ``0.0003``."""
    other = 1 - momentum
    if not 0 < other < 0.5:
        return str(_USUAL)
    return f"{other:.12f}".rstrip("0")
