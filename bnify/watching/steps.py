"""Optimizer steps as they happen, without a line in the user's loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from bnify.errors import UsageError


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer of torch within the wrappers of Lightning and Accelerate.

    Raises:
        UsageError: It is none of torch's.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if optimizer is not None and not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise UsageError(
            f"optimizer is a {type(optimizer).__name__}, no torch.optim.Optimizer",
            hint="leave optimizer= out and call watcher.step() after each step",
        )
    plain: torch.optim.Optimizer | None = optimizer
    return plain


def on_steps(
    mine: Callable[[torch.optim.Optimizer], bool], stepped: Callable[[torch.optim.Optimizer], None]
) -> Any:
    """Call ``stepped`` after each step of a model's optimizers; a handle with ``remove()``.

    Args:
        mine: Whether an optimizer holds a parameter of the model.
        stepped: What to call with the optimizer.
    """

    def hook(optimizer: torch.optim.Optimizer, *_args: Any) -> None:
        if mine(optimizer):
            stepped(optimizer)

    return register_optimizer_step_post_hook(hook)


class Owned:
    """Which optimizers hold parameters of a model, whose parameters may become others."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters: frozenset[int] = frozenset()
        self._others: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self.refresh()

    def refresh(self) -> None:
        """Read the model's parameters anew."""
        self._parameters = frozenset(map(id, self._model.parameters()))
        self._others.clear()

    def holds(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer has one; the parameters are read anew for each unknown one."""
        if optimizer in self._others:
            return False
        if not self._has(optimizer):
            self.refresh()
            if not self._has(optimizer):
                self._others.add(optimizer)
                return False
        return True

    def _has(self, optimizer: torch.optim.Optimizer) -> bool:
        return any(id(p) in self._parameters for p in parameters_of(optimizer))


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The parameters in all groups of an optimizer."""
    for group in optimizer.param_groups:
        yield from group["params"]
