"""An averaged model beside the one in training: whether its parameters move without the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from bnify.auditing.live import Live
from bnify.auditing.observed import Observed
from bnify.auditing.reference import refer
from bnify.auditing.state import NormState, Vector
from bnify.auditing.subject import Subject

#: How many of its parameters are followed, the smallest ones: biases, scales and shifts.
_FOLLOWED = 8


class Average:
    """An average (EMA, SWA) of the model that is watched, compared with what it was at a look.

    Its parameters are compared by their values: ``average.data.lerp_(...)`` raises no version.

    Args:
        average: The average; in whatever module that holds it.
        model: The model in training.
    """

    def __init__(self, average: nn.Module, model: nn.Module) -> None:
        self._of = model
        self.model = _counterpart(average, model)
        self._followed: dict[str, Vector] = {}
        self._norms: dict[str, NormState] = {}
        self._others: dict[str, NormState] = {}

    @property
    def live(self) -> Live:
        """Its modules as they are now."""
        return Live(self.model)

    def followed(self) -> dict[str, Tensor]:
        """Parameters by which it is told whether it moves: of those that are trained."""
        known = {
            name: p
            for name, p in self.model.named_parameters()
            if not (bool(nn.parameter.is_lazy(p)) or p.is_meta)
        }
        trained = {name for name, p in self._of.named_parameters() if p.requires_grad}
        names = [name for name in known if name in trained] or list(known)
        return {n: known[n] for n in sorted(names, key=lambda n: known[n].numel())[:_FOLLOWED]}

    def subject(
        self,
        norms: Sequence[NormState],
        others: Sequence[NormState],
        followed: dict[str, Vector],
    ) -> Subject:
        """What BN307 looks at, since the last time this was called.

        Args:
            norms: Of the average.
            others: Of the model in training.
            followed: Values of :meth:`followed`.
        """
        subject = Subject(norms=tuple(norms))
        refer(subject, Subject(norms=tuple(others)))
        pairs = subject.reference or {}
        subject.reference_moved = any(
            name in self._followed and not np.array_equal(now, self._followed[name], equal_nan=True)
            for name, now in followed.items()
        )
        still = frozenset(
            norm.path
            for norm in norms
            if norm.path in self._others
            and norm.path in pairs
            and same_statistics(norm, self._norms[norm.path])
            and not same_statistics(pairs[norm.path], self._others[norm.path])
        )
        subject.observed = Observed(still=still)
        self._followed |= followed
        self._norms = {norm.path: norm for norm in norms}
        self._others = dict(pairs)
        return subject


def _counterpart(average: nn.Module, model: nn.Module) -> nn.Module:
    """The module in an average that is built as the model is; the average itself without one."""
    names = {name for name, _ in model.named_parameters()}
    for module in average.modules():
        built = list(module._modules) == list(model._modules) and module is not model
        if built and {name for name, _ in module.named_parameters()} == names:
            return module
    return average


def same_statistics(one: NormState, other: NormState) -> bool:
    """Whether running mean and variance are the same to the bit."""
    return all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True)
        for name in ("mean", "var")
    )
