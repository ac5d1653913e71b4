"""What has moved since an earlier look: scale and shift, and the running statistics."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from bnify.auditing.live import NormModule
from bnify.auditing.state import NormState
from bnify.watching.average import same_statistics
from bnify.watching.steps import parameters_of

#: Steps that the earlier look lies back, where there is one: in a GAN some of them train others.
_BACK: Final = 10


class Progress:
    """Looks of the last steps, and what has moved between them.

    Attributes:
        stepping: Optimizers of the model that have stepped since the last look.
        moved: Whether any running statistics have moved at all.
    """

    def __init__(self) -> None:
        self.stepping: set[torch.optim.Optimizer] = set()
        self.moved = False
        self._looks: deque[tuple[int, Mapping[str, NormState]]] = deque()

    def since(
        self, norms: Sequence[NormModule], states: Iterable[NormState], step: int
    ) -> dict[str, Any]:
        """The fields ``trained`` and ``ungraded`` of what is observed, at this look."""
        now = {state.path: state for state in states}
        while len(self._looks) > 1 and self._looks[1][0] <= step - _BACK:
            self._looks.popleft()
        then, before = self._looks[0] if self._looks else (step, now)
        self._looks.append((step, now))
        pairs = [(path, before[path], state) for path, state in now.items() if path in before]
        trained = frozenset(path for path, old, new in pairs if not _same_affine(old, new))
        written = {path for path, old, new in pairs if not same_statistics(old, new)}
        self.moved |= bool(written)
        owned = {id(p) for optimizer in self.stepping for p in parameters_of(optimizer)}
        self.stepping.clear()
        ungraded = {
            norm.path: step - then
            for norm in norms
            if norm.path in written - trained and norm.module.training and _left_out(norm, owned)
        }
        return {"trained": trained, "ungraded": ungraded}


def _left_out(norm: NormModule, owned: set[int]) -> bool:
    """Whether an optimizer that has stepped holds scale and shift, and has no gradient of them."""
    parameters = [p for p in norm.module._parameters.values() if p is not None and p.requires_grad]
    held = [p for p in parameters if id(p) in owned]
    return bool(held) and all(p.grad is None for p in parameters)


def _same_affine(one: NormState, other: NormState) -> bool:
    for name in ("weight", "bias"):
        own, theirs = getattr(one, name), getattr(other, name)
        if (own is None) != (theirs is None):
            return False
        if own is not None and not np.array_equal(own, theirs, equal_nan=True):
            return False
    return True
