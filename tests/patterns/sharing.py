"""Refusals: shared and tied layers, modules that do more than a norm, writes in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foldparts import NormThenRelu
from patterns.kit import ANY, Line, Net, bn2, conv2, net, pattern


def tied() -> nn.Module:
    model = Net(
        lambda m, x: m.n1(m.a(x)).relu() + m.n2(m.b(x)).relu(),
        a=nn.Conv2d(4, 6, 3),
        b=nn.Conv2d(4, 6, 3),
        n1=nn.BatchNorm2d(6),
        n2=nn.BatchNorm2d(6),
    )
    model.b.weight = model.a.weight
    return model


def tied_norms() -> nn.Module:
    model = Net(
        lambda m, x: m.n1(m.a(x)).relu() + m.n2(m.b(x)).relu(),
        a=nn.Conv2d(4, 6, 3),
        b=nn.Conv2d(4, 6, 3),
        n1=nn.BatchNorm2d(6),
        n2=nn.BatchNorm2d(6),
    )
    model.n2.weight = model.n1.weight
    return model


def tied_to_idle() -> nn.Module:
    model = Net(
        lambda m, x: m.bn(m.conv(x)).relu(),
        conv=nn.Conv2d(4, 6, 3),
        idle=nn.Conv2d(4, 6, 3),
        bn=nn.BatchNorm2d(6),
    )
    model.idle.weight = model.conv.weight
    return model


def one_norm_two_paths() -> nn.Module:
    norm = nn.BatchNorm2d(6)
    return Net(
        lambda m, x: m.a(x).relu() + m.b(x).relu(),
        a=nn.Sequential(nn.Conv2d(4, 6, 3), norm),
        b=nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), norm),
    )


def decoder() -> nn.Module:
    """A Linear whose weight is that of the embedding."""
    model = Net(
        lambda m, x: m.out(m.bn(m.embed(x).flatten(0, 1)).relu()),
        embed=nn.Embedding(11, 5),
        bn=nn.BatchNorm1d(5),
        out=nn.Linear(5, 11, bias=False),
    )
    model.out.weight = model.embed.weight
    return model


def fill(y: Tensor) -> Tensor:
    y[:, 0] = 0
    return y


def scaled_view(m, x):
    y = m.conv(x)
    y.view(-1)[::2].mul_(2)
    return m.bn(y).relu()


def written_later(m, x):
    y = m.conv(x)
    z = m.bn(y)
    y.relu_()
    return z.relu() + y


def hooked(kind: str, hook) -> Any:
    def build() -> nn.Module:
        model = Line(conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6), act=nn.ReLU())
        getattr(model.bn, kind)(hook)
        return model

    return build


def twice(m, x):
    return m.n1(m.conv(x)).relu() + m.n2(m.conv(x * 2)).relu()


def _tied_readers() -> nn.Module:
    model = Net(
        lambda m, x: m.a(m.bn(x.relu())) + m.b(x),
        bn=nn.BatchNorm2d(4),
        a=nn.Conv2d(4, 4, 1),
        b=nn.Conv2d(4, 4, 1),
    )
    model.a.weight = model.b.weight
    return model


def _conv_hook() -> nn.Module:
    model = Line(conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6), act=nn.ReLU())
    model.conv.register_forward_hook(lambda m, a, y: y * 3 - 1)
    return model


SHARING = (
    pattern(
        "shared layer, two norms",
        net(twice, n1=bn2(), n2=bn2()),
        skips={"n1": "shared-layer", "n2": "shared-layer"},
    ),
    pattern(
        "shared layer, one norm",
        net(lambda m, x: m.bn(m.conv(x)).relu() + m.conv(x * 2).relu()),
        skips={"bn": "shared-layer"},
    ),
    pattern("tied weights", tied, skips={"n1": "tied-weights", "n2": "tied-weights"}),
    pattern("tied with an idle layer", tied_to_idle, either={"bn": "tied-weights"}),
    pattern("tied scales of two norms", tied_norms, either={"n1": ANY, "n2": ANY}),
    pattern("one norm at two paths", one_norm_two_paths, folds="a.1|b.1"),
    pattern(
        "embedding and decoder",
        decoder,
        lambda: torch.arange(12).view(3, 4) % 11,
        skips={"bn": "tied-weights"},
    ),
    pattern(
        "a norm that is stuck once",
        net(
            lambda m, x: m.bn(m.conv(x)).relu() + m.bn(m.other(x).tanh()).relu(),
            other=conv2(4, 6, 3),
        ),
        skips={"bn": ANY},
        left=2,
    ),
    pattern(
        "forward into a shared layer",
        lambda: Net(
            lambda m, x: m.c(m.bn(x.relu())) * m.c(x), bn=nn.BatchNorm2d(4), c=nn.Conv2d(4, 6, 3)
        ),
        skips={"bn": "shared-layer"},
    ),
    pattern("forward into tied layers", lambda: _tied_readers(), skips={"bn": "tied-weights"}),
    pattern(
        "weight of the layer is read elsewhere",
        net(lambda m, x: m.bn(m.conv(x)).relu() * m.conv.weight.abs().sum()),
        skips={"bn": ("tied-weights", "shared-layer", "another-consumer")},
    ),
    pattern(
        "scale of the norm is read elsewhere",
        net(lambda m, x: m.bn(m.conv(x)).relu() + m.bn.weight.sum()),
        skips={"bn": ("tied-weights", "shared-layer", "another-consumer", "extra-computation")},
    ),
    pattern(
        "mean of the norm is read elsewhere",
        net(lambda m, x: m.bn(m.conv(x)).relu() + m.bn.running_mean.sum()),
        skips={"bn": ("tied-weights", "shared-layer", "another-consumer", "extra-computation")},
    ),
)

MORE_THAN_A_NORM = (
    pattern(
        "relu in the norm's forward",
        lambda: Line(c=nn.Conv2d(4, 6, 3), bn=NormThenRelu(6), d=nn.Conv2d(6, 4, 1)),
        skips={"bn": "extra-computation"},
    ),
    pattern(
        "pre-hook on the norm",
        hooked("register_forward_pre_hook", lambda m, a: (a[0] * 2,)),
        either={"bn": ("hook-on-norm", "extra-computation")},
    ),
    pattern(
        "hook that changes the output",
        hooked("register_forward_hook", lambda m, a, y: y * 2),
        either={"bn": ("hook-on-norm", "extra-computation")},
    ),
    pattern(
        "hook that is nonlinear",
        hooked("register_forward_hook", lambda m, a, y: y.tanh()),
        either={"bn": ("hook-on-norm", "extra-computation")},
    ),
    pattern(
        "hook that only looks",
        hooked("register_forward_hook", lambda m, a, y: None),
        either={"bn": ("hook-on-norm", "extra-computation")},
    ),
    pattern("hook on the conv", lambda: _conv_hook(), either={"bn": ANY}),
    pattern("written in place", net(lambda m, x: m.bn(fill(m.conv(x))).relu()), skips={"bn": ANY}),
    pattern(
        "written in place after the norm",
        net(lambda m, x: fill(m.bn(m.conv(x))).relu()),
        either={"bn": ANY},
    ),
    pattern("written through a view", net(scaled_view), skips={"bn": ANY}),
    pattern(
        "written after it was read",
        net(written_later),
        skips={"bn": ("another-consumer", "value-is-output")},
    ),
    pattern(
        "in-place activation after the norm", net(lambda m, x: m.bn(m.conv(x)).relu_()), folds="bn"
    ),
    pattern(
        "in-place sum after the norm",
        net(lambda m, x: m.bn(m.conv(x)).add_(x[:, :1, 1:-1, 1:-1]).relu()),
        folds="bn",
    ),
    pattern(
        "in-place write to what a norm of the input gives",
        lambda: Net(
            lambda m, x: m.c(m.bn(x).mul_(2)) + x[:, :1], bn=nn.BatchNorm2d(4), c=nn.Conv2d(4, 4, 1)
        ),
        either={"bn": ANY},
        note="with the norm gone the write would hit the input",
    ),
)
