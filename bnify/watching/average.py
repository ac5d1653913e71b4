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
    """An average (EMA, SWA) of the model that is watched, compared with what it was at the start.

    Its parameters are compared by their values: ``average.data.lerp_(...)`` raises no version.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._start: tuple[Vector, ...] | None = None
        self._norms: dict[str, NormState] = {}
        self._others: dict[str, NormState] = {}

    @property
    def live(self) -> Live:
        """Its modules as they are now."""
        return Live(self.model)

    @property
    def followed(self) -> Sequence[Tensor]:
        """Parameters by which it is told whether it moves."""
        return sorted(self.model.parameters(), key=lambda p: p.numel())[:_FOLLOWED]

    def subject(
        self,
        norms: Sequence[NormState],
        others: Sequence[NormState],
        followed: tuple[Vector, ...],
    ) -> Subject | None:
        """What BN307 looks at; None at the start.

        Args:
            norms: Of the average.
            others: Of the model in training.
            followed: Values of :attr:`followed`.
        """
        subject = Subject(norms=tuple(norms))
        refer(subject, Subject(norms=tuple(others)))
        pairs = subject.reference or {}
        if self._start is None:
            self._start = followed
            self._norms = {norm.path: norm for norm in norms}
            self._others = {path: pairs[path] for path in pairs}
            return None
        subject.reference_moved = any(
            not np.array_equal(now, then, equal_nan=True)
            for now, then in zip(followed, self._start, strict=False)
        )
        still = frozenset(
            norm.path
            for norm in norms
            if norm.path in self._others
            and norm.path in pairs
            and _same(norm, self._norms[norm.path])
            and not _same(pairs[norm.path], self._others[norm.path])
        )
        subject.observed = Observed(still=still)
        return subject


def _same(one: NormState, other: NormState) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True)
        for name in ("mean", "var")
    )
