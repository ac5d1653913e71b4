"""Whether gradients reach scale and shift: read on the host after each step, without hooks.

What a parameter takes and has (``requires_grad``, whether ``grad`` is there) is no tensor's value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import ne
from typing import Final, TypeAlias

import torch
from torch import nn

from bnify.auditing.live import NormModule
from bnify.watching.steps import parameters_of
from bnify.watching.updates import counter_of

#: Whether a parameter takes gradients, and whether it has none.
_State: TypeAlias = tuple[bool, bool]
#: Steps after which what a parameter takes or has is no passing state, at most and at least; in
#: between the interval. In a GAN some steps train others.
_LASTING: Final = 10
_PASSING: Final = 3


class Gradients:
    """What the first parameter of each norm took and had, and since which step.

    Args:
        every: The interval of looks.

    Attributes:
        stepping: Optimizers of the model that have stepped since the last look.
    """

    def __init__(self, every: int) -> None:
        self._lasting = min(_LASTING, max(every, _PASSING))
        self.stepping: set[torch.optim.Optimizer] = set()
        self._norms: list[tuple[NormModule, nn.Parameter]] = []
        self._states: list[_State] = []
        #: The step after which each state began, None for the start; and the statistics' version.
        self._since: list[tuple[int | None, int]] = []

    def stepped(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """An optimizer of the model has stepped, after so many counted steps."""
        self.stepping.add(optimizer)
        now = [(p.requires_grad, p.grad is None) for _, p in self._norms]
        if now != self._states:
            for index, other in enumerate(map(ne, now, self._states)):
                if other:
                    self._since[index] = steps, _version(self._norms[index][0])
            self._states = now

    def look(self, norms: Sequence[NormModule]) -> None:
        """Read these norms from now on."""
        pairs = [
            (norm, parameters[0])
            for norm in norms
            if norm.tracked
            and not norm.frozen
            and (parameters := [p for p in norm.module._parameters.values() if p is not None])
        ]
        if [id(p) for _, p in pairs] != [id(p) for _, p in self._norms]:
            self._norms = pairs
            # Before the first step no gradient is there: that is no state to go by.
            self._states = [(p.requires_grad, False) for _, p in pairs]
            self._since = [(None, _version(norm)) for norm, _ in pairs]
        self.stepping.clear()

    def trained(self, steps: int) -> frozenset[str]:
        """Paths of norms whose parameters took gradients in the last steps."""
        return frozenset(
            norm.path
            for (norm, _), state, (since, _) in self._lately()
            if state[0] or (since is not None and steps - since < self._lasting)
        )

    def left_out(self, steps: int) -> dict[str, int]:
        """Norms in train mode whose statistics moved without any gradient for them, and how long.

        An optimizer that has stepped since the last look holds their parameters.
        """
        owned = {id(p) for optimizer in self.stepping for p in parameters_of(optimizer)}
        return {
            norm.path: steps - (since or 0)
            for (norm, parameter), state, (since, version) in self._lately()
            if state == (True, True)
            and steps - (since or 0) >= self._lasting
            and norm.module.training
            and id(parameter) in owned
            and _version(norm) != version
        }

    def _lately(
        self,
    ) -> Iterator[tuple[tuple[NormModule, nn.Parameter], _State, tuple[int | None, int]]]:
        return zip(self._norms, self._states, self._since, strict=True)


def _version(norm: NormModule) -> int:
    counter = counter_of(norm.module)
    return 0 if counter is None else int(counter._version)
