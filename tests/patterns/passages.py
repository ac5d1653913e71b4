"""Passages: what may stand between a layer and its norm, row by row of the specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patterns.kit import (
    ANY,
    SIGNAL,
    TOKENS,
    Line,
    Net,
    Pattern,
    bn2,
    pattern,
    positive,
    shiftless,
    values,
)

#: Averages with zeros in them, sums: reasons that are all true.
ZEROS = ("padded-constant", "no-absorber", "nonlinearity-between")


def through(
    name: str, between: Any, norm: Callable[[], nn.Module] | None = None, **more
) -> Pattern:
    """Conv2d(4, 8), what is between (a function, or :class:`Made`), norm, ReLU."""

    def build() -> nn.Module:
        step = between if not isinstance(between, Made) else between.make()
        made = nn.BatchNorm2d(8) if norm is None else norm()
        return Line(conv=nn.Conv2d(4, 8, 3), between=step, bn=made, act=nn.ReLU())

    if not {"skips", "either"} & more.keys():
        more.setdefault("folds", "bn")
    return pattern(name, build, **more)


class Made:
    """A module that stands between, made anew for every model."""

    def __init__(self, kind: Callable[..., nn.Module], *arguments: Any, **options: Any) -> None:
        self.make = lambda: kind(*arguments, **options)


def bn1(channels: int) -> Callable[[], nn.Module]:
    return lambda: nn.BatchNorm1d(channels)


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def pool2(*arguments: Any, **options: Any) -> Made:
    return Made(nn.AvgPool2d, *arguments, **options)


MOVING = (
    through("dropout", Made(nn.Dropout, 0.5)),
    through("functional dropout", lambda x: F.dropout2d(x, 0.5, training=False)),
    through("identity", Made(nn.Identity)),
    through("contiguous", lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
    through("channels last", lambda x: x.to(memory_format=torch.channels_last)),
    through("cast to the same type", lambda x: x.type_as(x).to(x.dtype)),
    through("clone and detach", lambda x: x.clone().detach()),
    through("flatten space", lambda x: x.flatten(2), bn1(8)),
    through("unsqueeze", lambda x: x.flatten(2).unsqueeze(-1)),
    through("squeeze", lambda x: x[..., :1].squeeze(-1), bn1(8)),
    through("swap of height and width", lambda x: x.transpose(2, 3)),
    through("select a column", lambda x: x.select(3, 2), bn1(8)),
    through("mean kept, expanded", lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 3, 2)),
    through("crop", lambda x: x[:, :, 1:-1, ::2]),
    through("narrow off the channels", lambda x: x.narrow(2, 1, 3)),
    through("narrow along the channels", lambda x: x.narrow(1, 2, 5), bn2(5)),
    through("strided channels", lambda x: x[:, ::2], bn2(4)),
    through("chosen channels", lambda x: x[:, [3, 0, 5]], bn2(3)),
    through(
        "repeated channels",
        lambda x: torch.cat([x, x.flip(1)], 1),
        bn2(16),
        folds=(),
        skips={"bn": ANY},
        note="each channel meets two scales: only equal ones would do",
    ),
    through("channel shuffle", shuffled),
    through("channel shuffle module", Made(nn.ChannelShuffle, 2)),
    through("pixel shuffle", Made(nn.PixelShuffle, 2), bn2(2), folds="bn"),
    through(
        "pixel unshuffle",
        Made(nn.PixelUnshuffle, 2),
        bn2(32),
        folds=(),
        skips={"bn": ("wrong-axis", "no-absorber")},
        note="one channel of the layer meets four of the norm",
    ),
    through("flip and roll", lambda x: x.flip(1).roll(1, 3)),
    through("repeat interleave", lambda x: x.repeat_interleave(2, 2)),
    through("tile", lambda x: x.repeat(1, 1, 2, 1)),
    through("other half of a chunk unread", lambda x: x.chunk(2, 1)[1], bn2(4)),
    through("split", lambda x: x.split([3, 5], 1)[1], bn2(5)),
    through("unbind", lambda x: torch.stack(x.unbind(1)[::-1], 1)),
    through("unfold", lambda x: F.unfold(x, 2).view(3, 8, 4, -1)),
)

AVERAGES = (
    through("average pool", pool2(2)),
    through("average pool, overlapping", pool2(3, 1)),
    through("average pool, padded, not counted", pool2(3, 2, 1, count_include_pad=False)),
    through("average pool, padded, counted", pool2(3, 2, 1), skips={"bn": ZEROS}),
    through("average pool, padded, counted, no shift", pool2(3, 2, 1), tune=shiftless()),
    through("average pool, ceil", pool2(4, 4, ceil_mode=True, count_include_pad=False)),
    through("average pool, ceil, counted", pool2(4, 4, ceil_mode=True)),
    through("average pool, divisor", pool2(2, divisor_override=3), skips={"bn": ZEROS}),
    through("average pool, divisor, no shift", pool2(2, divisor_override=3), tune=shiftless()),
    through("average pool, true divisor", pool2(2, divisor_override=4), either={"bn": ANY}),
    through("global pool", Made(nn.AdaptiveAvgPool2d, 1)),
    through("adaptive pool", Made(nn.AdaptiveAvgPool2d, (4, 3))),
    through("mean over space", lambda x: x.mean((2, 3)), bn1(8)),
    through("mean over a row", lambda x: x.mean(-1), bn1(8)),
    through("sum over space", lambda x: x.sum((2, 3)), bn1(8), skips={"bn": ZEROS}),
    through("sum over space, no shift", lambda x: x.sum((2, 3)), bn1(8), tune=shiftless()),
    through(
        "mean over the channels",
        lambda x: x.mean(1, keepdim=True).expand(-1, 8, -1, -1),
        skips={"bn": ANY},
    ),
    through("bilinear", Made(nn.Upsample, scale_factor=2, mode="bilinear")),
    through(
        "bilinear, corners", Made(nn.Upsample, size=(9, 7), mode="bilinear", align_corners=True)
    ),
    through(
        "bilinear, antialiased",
        lambda x: F.interpolate(x, (4, 3), mode="bilinear", antialias=True),
        either={"bn": ANY},
    ),
    through("nearest", Made(nn.Upsample, scale_factor=2)),
    through("nearest, exact", lambda x: F.interpolate(x, scale_factor=1.5, mode="nearest-exact")),
    through("bicubic", Made(nn.Upsample, scale_factor=2, mode="bicubic"), either={"bn": ANY}),
    through("area", lambda x: F.interpolate(x, (4, 3), mode="area")),
    pattern(
        "linear interpolation",
        lambda: Line(
            conv=nn.Conv1d(4, 5, 3),
            up=nn.Upsample(scale_factor=2, mode="linear"),
            bn=nn.BatchNorm1d(5),
            act=nn.ReLU(),
        ),
        SIGNAL,
        "bn",
    ),
)

MAXIMA = (
    through("max pool, positive", Made(nn.MaxPool2d, 2), tune=positive()),
    through("max pool, padded, positive", Made(nn.MaxPool2d, 3, 2, 1), tune=positive()),
    through("max pool, ceil, positive", Made(nn.MaxPool2d, 4, ceil_mode=True), tune=positive()),
    through("adaptive max pool, positive", Made(nn.AdaptiveMaxPool2d, 2), tune=positive()),
    through("maximum over space, positive", lambda x: x.amax((2, 3)), bn1(8), tune=positive()),
    through(
        "max pool, some negative",
        Made(nn.MaxPool2d, 2),
        skips={"bn": ("nonlinearity-between", "no-absorber")},
        tune=lambda m: m.bn.weight[0].fill_(-1.0),
    ),
    through(
        "maximum over space, some negative",
        lambda x: x.amax((2, 3)),
        bn1(8),
        skips={"bn": ("nonlinearity-between", "no-absorber")},
        tune=lambda m: m.bn.weight[0].fill_(-1.0),
    ),
    through(
        "max pool, some zero",
        Made(nn.MaxPool2d, 2),
        either={"bn": ANY},
        tune=lambda m: (positive()(m), m.bn.weight[1].zero_()),
    ),
    through(
        "maximum over the channels",
        lambda x: x.amax(1, keepdim=True).expand(-1, 8, -1, -1),
        skips={"bn": ANY},
        tune=positive(),
    ),
)

PADS = (
    through("reflect pad", Made(nn.ReflectionPad2d, 1)),
    through("replicate pad", Made(nn.ReplicationPad2d, (1, 2, 0, 3))),
    through("circular pad", lambda x: F.pad(x, (1, 1, 2, 0), mode="circular")),
    through("zero pad", Made(nn.ZeroPad2d, 1), skips={"bn": "padded-constant"}),
    through("zero pad, no shift", Made(nn.ZeroPad2d, 1), tune=shiftless()),
    through(
        "zero pad, one shift",
        Made(nn.ZeroPad2d, 1),
        either={"bn": "padded-constant"},
        tune=lambda m: (shiftless()(m), m.bn.bias.fill_(0.5)),
        note="the constant becomes 0.5: only a graph can change it",
    ),
    through(
        "zero pad, one shift, graph",
        lambda x: F.pad(x, (1, 1)),
        options={"emit": "graph"},
        tune=lambda m: (shiftless()(m), m.bn.bias.fill_(0.5)),
    ),
    through("constant pad", Made(nn.ConstantPad2d, 1, 0.5), skips={"bn": "padded-constant"}),
    through("negative pad", lambda x: F.pad(x, (-1, -1))),
    through(
        "zero pad of channels",
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
        bn2(10),
        either={"bn": "padded-constant"},
    ),
)

CONSTANTS = (
    through("times a number", lambda x: x * -0.5),
    through("divided by a number", lambda x: x / 3),
    through("plus a number", lambda x: x + 1),
    through("number minus", lambda x: 1 - x),
    through("minus", lambda x: -x),
    through(
        "number over", lambda x: 1 / (x + 9), skips={"bn": ("nonlinearity-between", "no-absorber")}
    ),
    pattern(
        "times a constant per channel",
        lambda: Net(
            lambda m, x: m.bn(m.conv(x) * m.c[:, None, None]).relu(),
            conv=nn.Conv2d(4, 6, 3),
            c=torch.tensor([1.0, -2, 0.5, 3, 1, -1]),
            bn=nn.BatchNorm2d(6),
        ),
        folds="bn",
        left=1,
    ),
    pattern(
        "plus a constant per channel",
        lambda: Net(
            lambda m, x: m.bn(m.conv(x) + m.b).relu(),
            conv=nn.Conv2d(4, 6, 3),
            b=values(6, 1, 1),
            bn=nn.BatchNorm2d(6),
        ),
        folds="bn",
    ),
    pattern(
        "position embedding",
        lambda: Net(
            lambda m, x: m.bn((m.fc(x) + m.position).transpose(1, 2)).relu(),
            fc=nn.Linear(6, 4),
            position=values(5, 4),
            bn=nn.BatchNorm1d(4),
        ),
        TOKENS,
        "bn",
    ),
)


PASSAGES: tuple[Pattern, ...] = (*MOVING, *AVERAGES, *MAXIMA, *PADS, *CONSTANTS)
