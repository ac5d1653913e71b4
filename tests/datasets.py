"""Small data sets and networks for the tests of a comparison's data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bnify.comparing.data import Data, Part

FEATURES = 4


def pair(samples: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and classes 0 to 2."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, FEATURES, generator=generator), torch.arange(samples) % 3


class Items(Dataset):
    """A Dataset of the user's; items can be changed on the way."""

    def __init__(self, x, y, change: Callable | None = None) -> None:
        self.x, self.y = x, y
        self.change = change or (lambda x, y: (x, y))
        self.drawn: list[int] = []

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int):
        self.drawn.append(index)
        return self.change(self.x[index], self.y[index])


def net(outputs: int = 3) -> nn.Module:
    return nn.Linear(FEATURES, outputs)


def cnn(channels: int = 1, classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, classes),
    )


def everything(part: Part) -> tuple[Tensor, Tensor]:
    """The first input and the targets of all samples."""
    call, targets = part.batch(torch.arange(len(part)))
    return call.tensors()[0][1], targets


def parts(data: Data) -> tuple[Part, Part, Part]:
    return data.train, data.validation, data.test


def same(one: Data, other: Data) -> bool:
    return all(
        torch.equal(a, b)
        for mine, theirs in zip(parts(one), parts(other), strict=True)
        for a, b in zip(everything(mine), everything(theirs), strict=True)
    )
