"""Small networks and training loops for the tests of the watcher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from bnify.watching import Watcher

EVERY = 10


def codes(watcher: Watcher) -> set[tuple[str, str]]:
    """What was found where."""
    return {(finding.code, finding.module) for finding in watcher.findings}


def network() -> nn.Sequential:
    """A convolutional network with two batch norms ("1", "5") and dropout, for (N, 3, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def batch(size: int = 8) -> Tensor:
    return torch.randn(size, 3, 8, 8)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)


def loss_of(model: nn.Module, size: int = 8) -> Tensor:
    return F.cross_entropy(model(batch(size)), torch.randint(0, 4, (size,)))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1, *, accumulate: int = 1
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            loss_of(model).backward()
        optimizer.step()


def passes(model: nn.Module, count: int) -> None:
    """Forward passes that train nothing, in the mode that the model is in."""
    with torch.no_grad():
        for _ in range(count):
            model(batch())


def hooks_of(model: nn.Module) -> int:
    """Number of hooks anywhere in a model, and on optimizers in general."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_backward_hooks",
        "_backward_pre_hooks",
    )
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds) + len(
        _global_optimizer_post_hooks
    )
