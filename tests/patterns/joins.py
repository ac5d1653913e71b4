"""Passages: sums, concatenations and layouts of values between layers and a norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patterns.kit import (
    ANY,
    IMAGE,
    TOKENS,
    VECTOR,
    Line,
    Net,
    Pattern,
    both,
    draw,
    pattern,
)


def tokens(name: str, forward, **parts) -> Pattern:
    """Linear on tokens, a way to lay them out, BatchNorm1d(6) named ``bn``."""
    return pattern(
        name,
        lambda: Net(forward, fc=nn.Linear(6, 6), bn=nn.BatchNorm1d(6), **parts),
        TOKENS,
        "bn",
    )


class Sum(nn.Module):
    """Two layers of one value, joined by a function, then a norm."""

    def __init__(self, join, after: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1, bias=False)
        self.bn, self.join = nn.BatchNorm2d(after), join

    def forward(self, x):
        return torch.relu(self.bn(self.join(self.a(x), self.b(x))))


def in_place(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


JOINS = (
    pattern("concat of two layers", lambda: Sum(lambda a, b: torch.cat([a, b], 1), 12), folds="bn"),
    pattern("concat along the width", lambda: Sum(lambda a, b: torch.cat([a, b], 3)), folds="bn"),
    pattern("stack", lambda: Sum(lambda a, b: torch.stack([a, b], 2).flatten(2, 3)), folds="bn"),
    pattern("sum of two layers", lambda: Sum(torch.add), folds="bn"),
    pattern("sum in place", lambda: Sum(in_place), folds="bn"),
    pattern("difference of two layers", lambda: Sum(torch.sub), folds="bn"),
    pattern("weighted sum", lambda: Sum(lambda a, b: torch.add(a, b, alpha=0.3)), folds="bn"),
    pattern("mean of two layers", lambda: Sum(lambda a, b: (a + b) / 2), folds="bn"),
    pattern(
        "sum with a broadcast mean",
        lambda: Sum(lambda a, b: a + b.mean((2, 3), keepdim=True)),
        folds="bn",
    ),
    pattern(
        "sum of stack", lambda: Sum(lambda a, b: torch.stack([a, b]).sum(0)), either={"bn": ANY}
    ),
    pattern(
        "larger of two",
        lambda: Sum(torch.maximum),
        either={"bn": ("nonlinearity-between", "no-absorber")},
    ),
    pattern(
        "product of two",
        lambda: Sum(torch.mul),
        skips={"bn": ("nonlinearity-between", "no-absorber")},
    ),
    pattern("lerp", lambda: Sum(lambda a, b: torch.lerp(a, b, 0.3)), either={"bn": ANY}),
    pattern(
        "both halves have a norm",
        lambda: Net(
            lambda m, x: [
                n(y).relu() for n, y in zip((m.a, m.b), m.conv(x).chunk(2, 1), strict=True)
            ],
            conv=nn.Conv2d(4, 6, 3),
            a=nn.BatchNorm2d(3),
            b=nn.BatchNorm2d(3),
        ),
        folds=("a", "b"),
    ),
    pattern(
        "one half has a norm",
        lambda: Net(
            lambda m, x: [
                f(y).relu() for f, y in zip((m.bn, abs), m.conv(x).chunk(2, 1), strict=True)
            ],
            conv=nn.Conv2d(4, 6, 3),
            bn=nn.BatchNorm2d(3),
        ),
        folds="bn",
    ),
    pattern(
        "split over a concat",
        lambda: Net(
            lambda m, x: m.bn(torch.cat([m.a(x), m.b(x), m.c(x)], 1)).relu(),
            a=nn.Conv2d(4, 2, 1),
            b=nn.Conv2d(4, 3, 3, padding=1, groups=1),
            bn=nn.BatchNorm2d(9, affine=False),
            c=nn.Conv2d(4, 4, 1, groups=4, bias=False),
        ),
        folds="bn",
    ),
    pattern(
        "sum of a layer and a norm",
        lambda: Net(
            lambda m, x: m.last(m.bn(m.a(x)) + m.b(x)).relu(),
            a=nn.Conv2d(4, 6, 3),
            b=nn.Conv2d(4, 6, 3),
            bn=nn.BatchNorm2d(6),
            last=nn.BatchNorm2d(6),
        ),
        folds=("bn", "last"),
    ),
)

LAYOUTS = (
    tokens("tokens, transposed", lambda m, x: m.bn(m.fc(x).transpose(1, 2)).relu()),
    tokens("tokens, rows", lambda m, x: m.bn(m.fc(x).flatten(0, 1)).reshape_as(x).relu()),
    tokens("tokens, rows of a view", lambda m, x: m.bn(m.fc(x).view(-1, 6)).view(x.shape).relu()),
    tokens("tokens, permuted", lambda m, x: m.bn(m.fc(x).permute(1, 2, 0)).relu()),
    tokens(
        "tokens, zeros of the shape",
        lambda m, x: torch.maximum(m.bn(y := m.fc(x).flatten(0, 1)), torch.zeros_like(y)),
    ),
    pattern(
        "vector as an image",
        lambda: Line(
            fc=nn.Linear(6, 12),
            view=lambda x: x.view(-1, 3, 2, 2),
            bn=nn.BatchNorm2d(3),
            act=nn.ReLU(),
        ),
        VECTOR,
        "bn",
    ),
    pattern(
        "heads of a linear",
        lambda: Line(
            fc=nn.Linear(6, 8),
            heads=lambda x: x.view(3, 5, 2, 4).flatten(0, 2),
            bn=nn.BatchNorm1d(4),
            act=nn.ReLU(),
        ),
        TOKENS,
        "bn",
        note="the norm's channels repeat along the layer's",
    ),
    pattern(
        "image of tokens",
        lambda: Line(
            fc=nn.Linear(6, 4),
            image=lambda x: x.transpose(1, 2).unflatten(2, (5, 1)),
            bn=nn.BatchNorm2d(4),
            act=nn.ReLU(),
        ),
        TOKENS,
        "bn",
    ),
    pattern(
        "two inputs of other shapes",
        lambda: Net(
            lambda m, x, y: m.bn(m.conv(x) + m.fc(y)[:, :, None, None]).relu(),
            conv=nn.Conv2d(4, 5, 3),
            fc=nn.Linear(6, 5),
            bn=nn.BatchNorm2d(5),
        ),
        both(IMAGE, draw(3, 6)),
        "bn",
    ),
)
