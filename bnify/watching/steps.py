"""Optimizer steps as they happen, without a line in the user's loop; and what wraps a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel

from bnify.errors import UsageError

_WRAPPERS: Final = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


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
    optimizer: torch.optim.Optimizer | None,
    mine: Callable[[int], bool],
    stepped: Callable[[], None],
) -> Any:
    """Call ``stepped`` after each step; returns a handle with ``remove()``.

    Args:
        optimizer: Whose steps; None for any that holds a parameter of the model.
        mine: Whether the ``id`` of a parameter is one of the model's.
        stepped: What to call.
    """

    def hook(stepping: torch.optim.Optimizer, *_args: Any) -> None:
        if optimizer is not None or any(
            mine(id(p)) for group in stepping.param_groups for p in group["params"]
        ):
            stepped()

    if optimizer is None:
        return register_optimizer_step_post_hook(hook)
    return optimizer.register_step_post_hook(hook)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within torch.compile, DistributedDataParallel, DataParallel and AveragedModel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            if not isinstance(model, _WRAPPERS):
                return model
            inner = model.get_submodule("module")
        model = inner
