"""Random splits: disjoint, complete, and the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bnify.errors import SpecError


def split_three(samples: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of 60 % training, 20 % validation and 20 % test samples (these two rounded up).

    Raises:
        SpecError: There are fewer than three.
    """
    held = fifth(samples)
    if samples < 3:
        raise SpecError(
            f"{samples} samples cannot be split into training, validation and test data",
            hint="bring more samples",
        )
    order = _order(samples, seed)
    return order[2 * held :], order[:held], order[held : 2 * held]


def fifth(samples: int) -> int:
    """A fifth, rounded up."""
    return -(-samples // 5)


def hold_out(samples: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of what is left, and of so many held out.

    Raises:
        SpecError: Nothing is left, or nothing is held out.
    """
    if not 0 < count < samples:
        raise SpecError(
            f"{samples} training samples cannot be split further", hint="bring more samples"
        )
    order = _order(samples, seed)
    return order[count:], order[:count]


def by_class(labels: Tensor, split: Callable[[int], Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Split each class on its own, so that a rare one is in every part.

    Args:
        labels: (N,).
        split: From a number of samples to the indices of each part.
    """
    chosen = []
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero()[:, 0]
        chosen.append([members[indices] for indices in split(len(members))])
    return tuple(torch.cat(part) for part in zip(*chosen, strict=True))


def _order(samples: int, seed: int) -> Tensor:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
