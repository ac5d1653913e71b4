"""Absorbers forwards: a norm whose every reader is a linear layer, directly or behind passages."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from foldparts import FrozenScale, NormAct
from patterns.kit import (
    ANY,
    IMAGE,
    SIGNAL,
    TOKENS,
    VECTOR,
    Line,
    Net,
    Pattern,
    draw,
    pattern,
    positive,
    shiftless,
)


def before(name: str, reader: Any, inputs=IMAGE, folds="bn", tune=None, **more) -> Pattern:
    """ReLU, norm, what is between, one layer.

    Args:
        name: See :class:`Pattern`.
        reader: Makes the layers after the norm: one, or a dict of parts.
        inputs: See :class:`Pattern`; the norm is on its channels.
        folds: See :class:`Pattern`.
        tune: See :func:`pattern`.
        **more: Other fields.
    """
    shape = inputs().shape
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[len(shape) - 2]

    def build() -> nn.Module:
        parts = reader()
        parts = parts if isinstance(parts, dict) else {"layer": parts}
        return Line(act=nn.ReLU(), bn=norm(shape[1]), **parts)

    return pattern(name, build, inputs, folds, tune=tune, **more)


def two_readers(join) -> nn.Module:
    def forward(m, x):
        y = m.bn(torch.relu(x))
        return join(m.a(y), m.b(y))

    return Net(
        forward,
        bn=nn.BatchNorm2d(4),
        a=nn.Conv2d(4, 6, 1),
        b=nn.Conv2d(4, 6, 1, bias=False),
    )


class QueryKeyValue(nn.Module):
    """A batch norm on tokens before three projections."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(6)
        self.q, self.k, self.v = (nn.Linear(6, 6, bias=i != 1) for i in range(3))

    def forward(self, x):
        x = self.bn(x.transpose(1, 2)).transpose(1, 2)
        return (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)


class DenseLayer(nn.Module):
    """Norm over a concatenation, then an unpadded convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 5, 1)
        self.bn, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = torch.cat([self.a(x).relu(), self.b(x).tanh()], 1)
        return self.last(self.bn(y))


def zero_border(model: nn.Module) -> None:
    """t = β − s·mean = 0 without either being 0 in every channel."""
    bn = model.bn
    bn.running_mean.copy_(torch.tensor([0.5, -0.25, 0.0, 1.0]))
    bn.running_var.fill_(1.0 - bn.eps)
    bn.weight.copy_(torch.tensor([2.0, -1.0, 0.5, 0.0]))
    bn.bias.copy_(bn.weight * bn.running_mean)


FORWARD: tuple[Pattern, ...] = (
    before("unpadded conv", lambda: nn.Conv2d(4, 6, 3), kind="fold-forward"),
    before("pointwise conv", lambda: nn.Conv2d(4, 6, 1, bias=False), kind="fold-forward"),
    before("linear reader", lambda: nn.Linear(6, 5), VECTOR, kind="fold-forward"),
    before("linear reader, no bias", lambda: nn.Linear(6, 5, bias=False), VECTOR),
    before("strided conv", lambda: nn.Conv2d(4, 6, 3, stride=2)),
    before("grouped conv", lambda: nn.Conv2d(4, 6, 3, groups=2)),
    before("depthwise conv", lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False)),
    before("reflect-padded conv", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
    before("circular-padded conv", lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular")),
    before(
        "replicate-padded depthwise conv",
        lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate", groups=4),
    ),
    before("valid conv", lambda: nn.Conv2d(4, 6, 3, padding="valid")),
    before("conv 1d reader", lambda: nn.Conv1d(4, 6, 3), SIGNAL),
    before("padded conv, no shift", lambda: nn.Conv2d(4, 6, 3, padding=1), tune=shiftless()),
    before(
        "padded conv, shift cancels",
        lambda: nn.Conv2d(4, 6, 3, padding=1),
        tune=zero_border,
        folds=(),
        either={"bn": ("padded-forward",)},
        note="t is 0 up to rounding, or exactly",
    ),
    before(
        "same-padded conv, no shift", lambda: nn.Conv2d(4, 6, 3, padding="same"), tune=shiftless()
    ),
    before(
        "same-padded pointwise conv",
        lambda: nn.Conv2d(4, 6, 1, padding="same"),
        folds=(),
        either={"bn": ("padded-forward",)},
    ),
    before("transposed, pointwise", lambda: nn.ConvTranspose2d(4, 6, 1)),
    before(
        "transposed, no shift", lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2), tune=shiftless()
    ),
    before(
        "transposed, pointwise groups", lambda: nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False)
    ),
    before(
        "dropout, flatten, linear",
        lambda: {"drop": nn.Dropout(), "flat": nn.Flatten(), "fc": nn.Linear(4 * 64, 5)},
        kind="fold-forward",
    ),
    before(
        "global pool, linear",
        lambda: {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(4, 5)},
    ),
    before("mean, linear", lambda: {"mean": lambda x: x.mean((2, 3)), "fc": nn.Linear(4, 5)}),
    before("average pool, conv", lambda: {"pool": nn.AvgPool2d(2), "conv": nn.Conv2d(4, 6, 3)}),
    before(
        "max pool, conv",
        lambda: {"pool": nn.MaxPool2d(2), "conv": nn.Conv2d(4, 6, 3)},
        tune=positive(),
    ),
    before(
        "reflect pad, conv",
        lambda: {"pad": nn.ReflectionPad2d(1), "conv": nn.Conv2d(4, 6, 3)},
    ),
    before(
        "nearest, conv",
        lambda: {"up": nn.Upsample(scale_factor=2), "conv": nn.Conv2d(4, 6, 3)},
    ),
    before(
        "bilinear, conv",
        lambda: {"up": nn.Upsample(scale_factor=2, mode="bilinear"), "conv": nn.Conv2d(4, 6, 3)},
    ),
    before(
        "crop, conv",
        lambda: {"crop": lambda x: x[:, :, 1:-1, 2:], "conv": nn.Conv2d(4, 6, 3)},
    ),
    before(
        "channels, conv",
        lambda: {"part": lambda x: x[:, 1:], "conv": nn.Conv2d(3, 6, 3)},
    ),
    before(
        "pixel unshuffle, conv",
        lambda: {"move": nn.PixelUnshuffle(2), "conv": nn.Conv2d(16, 6, 1)},
    ),
    before(
        "channel shuffle, grouped conv",
        lambda: {"move": nn.ChannelShuffle(2), "conv": nn.Conv2d(4, 6, 1, groups=2)},
    ),
    before(
        "tokens, linear",
        lambda: {"turn": lambda x: x.flatten(2).transpose(1, 2), "fc": nn.Linear(4, 5)},
    ),
    before("scalar, conv", lambda: {"half": lambda x: x * 0.5 - 1, "conv": nn.Conv2d(4, 6, 1)}),
    before(
        "norm, norm, conv",
        lambda: {"last": FrozenScale(4), "conv": nn.Conv2d(4, 6, 3)},
        folds=("bn", "last"),
    ),
    before(
        "conv between two norms",
        lambda: {"conv": nn.Conv2d(4, 6, 3), "last": nn.BatchNorm2d(6), "end": nn.ReLU()},
        folds=("bn", "last"),
    ),
    pattern(
        "norm without activation, conv",
        lambda: Line(act=nn.ReLU(), bn=NormAct(4, nn.Identity()), conv=nn.Conv2d(4, 6, 3)),
        IMAGE,
        "bn",
    ),
    pattern(
        "norm of the input, conv",
        lambda: Line(bn=nn.BatchNorm2d(4), c=nn.Conv2d(4, 6, 3)),
        IMAGE,
        "bn",
    ),
    pattern("two linear consumers, summed", lambda: two_readers(torch.add), IMAGE, "bn"),
    pattern("two linear consumers, multiplied", lambda: two_readers(torch.mul), IMAGE, "bn"),
    pattern(
        "two linear consumers, two outputs", lambda: two_readers(lambda a, b: (a, b)), IMAGE, "bn"
    ),
    pattern("three projections", QueryKeyValue, TOKENS, "bn"),
    pattern("norm over a concatenation", DenseLayer, IMAGE, "bn"),
    pattern(
        "chunks to two convs",
        lambda: Net(
            lambda m, x: [
                c(y) for c, y in zip((m.a, m.b), m.bn(x.relu()).chunk(2, 1), strict=True)
            ],
            bn=nn.BatchNorm2d(4),
            a=nn.Conv2d(2, 3, 3),
            b=nn.Conv2d(2, 3, 1),
        ),
        IMAGE,
        "bn",
    ),
    pattern(
        "one part of a concatenation",
        lambda: Net(
            lambda m, x: m.conv(torch.cat([m.bn(x.relu()), x.sin()], 1)),
            bn=nn.BatchNorm2d(4),
            conv=nn.Conv2d(8, 5, 3),
        ),
        IMAGE,
        "bn",
    ),
    pattern(
        "two norms in one concatenation",
        lambda: Net(
            lambda m, x: m.conv(torch.cat([m.a(x.relu()), m.b(x.sin())], 1)),
            a=nn.BatchNorm2d(4),
            b=FrozenScale(4),
            conv=nn.Conv2d(8, 5, 3),
        ),
        IMAGE,
        ("a", "b"),
    ),
    pattern(
        "x @ W after the norm",
        lambda: Net(
            lambda m, x: (m.bn(x.relu()) @ m.w).relu(),
            bn=nn.BatchNorm1d(6),
            w=nn.Parameter(torch.randn(6, 5)),
        ),
        VECTOR,
        either={"bn": ANY},
        note="the scale goes into W, the shift has no bias to go to",
    ),
    pattern(
        "functional conv with bias after the norm",
        lambda: Net(
            lambda m, x: F.conv2d(m.bn(x.relu()), m.w, m.b),
            bn=nn.BatchNorm2d(4),
            w=nn.Parameter(torch.randn(6, 4, 3, 3)),
            b=nn.Parameter(torch.randn(6)),
        ),
        IMAGE,
        "bn",
    ),
    pattern(
        "weight norm after the norm",
        lambda: Line(
            act=nn.ReLU(),
            bn=nn.BatchNorm2d(4),
            conv=nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
        ),
        IMAGE,
        "bn",
    ),
    pattern(
        "spectral norm after the norm",
        lambda: Line(
            act=nn.ReLU(),
            bn=nn.BatchNorm1d(6),
            fc=nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)),
        ),
        VECTOR,
        "bn",
    ),
    pattern(
        "instance norm, conv",
        lambda: Line(
            act=nn.ReLU(),
            bn=nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
            conv=nn.Conv1d(4, 6, 3),
        ),
        SIGNAL,
        "bn",
    ),
    pattern(
        "one layer after a norm, twice",
        lambda: Net(
            lambda m, x, y: m.conv(m.bn(x.relu())) * m.conv(m.bn(y.relu())),
            bn=nn.BatchNorm2d(4),
            conv=nn.Conv2d(4, 6, 3),
        ),
        lambda: (IMAGE(), draw(3, 4, 8, 8)() * 2),
        "bn",
    ),
)
