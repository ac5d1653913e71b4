"""Refusals: other readers, nothing that absorbs, statistics that are not constants."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldparts import NormAct
from patterns.kit import (
    TOKENS,
    VECTOR,
    Line,
    Net,
    Pattern,
    bn2,
    draw,
    net,
    pattern,
)

#: Nothing linear beside the norm.
STUCK = ("no-absorber", "nonlinearity-between")
READ = ("another-consumer", "no-absorber")
SQUARE = draw(3, 6, 6)


class StandardisedConv(nn.Conv2d):
    """Weight standardisation: the norm is of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


def kept(m, x):
    m.last_value = m.conv(x)
    return m.bn(m.last_value).relu()


def negative(model: nn.Module) -> None:
    """Smaller than 0 by less than ε: the output is finite, the statistics are not right."""
    model.bn.running_var[1] = -5e-6


CONSUMERS = (
    pattern(
        "read by an activation",
        net(lambda m, x: m.bn(y := m.conv(x)).relu() + y.tanh()),
        skips={"bn": "another-consumer"},
    ),
    pattern(
        "read twice by one operator",
        net(lambda m, x: m.bn(y := m.conv(x)).relu() * (y + y)),
        skips={"bn": "another-consumer"},
    ),
    pattern(
        "read by a residual",
        net(lambda m, x: m.bn(y := m.conv(x)).relu() + y),
        skips={"bn": "another-consumer"},
    ),
    pattern(
        "read through a view",
        net(lambda m, x: m.bn(y := m.conv(x)).relu() + y.flatten(2).mean(-1)[:, :, None, None]),
        skips={"bn": "another-consumer"},
    ),
    pattern(
        "read by another norm",
        net(lambda m, x: m.bn(y := m.conv(x)).relu() + m.n(y).relu(), n=bn2()),
        skips={"bn": "another-consumer", "n": "another-consumer"},
    ),
    pattern(
        "value is an output",
        net(lambda m, x: (y := m.conv(x), m.bn(y).relu())),
        skips={"bn": "value-is-output"},
    ),
    pattern(
        "view of the value is an output",
        net(lambda m, x: {"y": (y := m.conv(x)).flatten(2), "z": m.bn(y).relu()}),
        skips={"bn": ("value-is-output", "another-consumer")},
    ),
    pattern(
        "only its shape is read",
        net(lambda m, x: m.bn(y := m.conv(x)).relu() + torch.zeros_like(y)),
        folds="bn",
    ),
    pattern(
        "forward, another consumer",
        lambda: Net(
            lambda m, x: m.c(y := m.bn(x.relu())) + y.tanh(),
            bn=nn.BatchNorm2d(4),
            c=nn.Conv2d(4, 4, 1),
        ),
        skips={"bn": ("another-consumer", "nonlinearity-between")},
    ),
    pattern(
        "forward, value is an output",
        lambda: Net(
            lambda m, x: (y := m.bn(x.relu()), m.c(y)), bn=nn.BatchNorm2d(4), c=nn.Conv2d(4, 4, 1)
        ),
        skips={"bn": ("value-is-output", "nonlinearity-between")},
    ),
    pattern(
        "forward, one consumer is padded",
        lambda: Net(
            lambda m, x: m.a(y := m.bn(x.relu())) + m.b(y),
            bn=nn.BatchNorm2d(4),
            a=nn.Conv2d(4, 4, 1),
            b=nn.Conv2d(4, 4, 3, padding=1),
        ),
        skips={"bn": "padded-forward"},
    ),
    pattern("kept by the model", net(kept), skips={"bn": ("another-consumer", "value-is-output")}),
)

STUCK_NORMS = (
    pattern(
        "activation between",
        lambda: Line(c=nn.Conv2d(4, 6, 3), a=nn.ReLU(), bn=nn.BatchNorm2d(6), b=nn.ReLU()),
        skips={"bn": "nonlinearity-between"},
    ),
    pattern(
        "softmax between",
        lambda: Line(c=nn.Linear(6, 5), a=nn.Softmax(-1), bn=nn.BatchNorm1d(5), b=nn.ReLU()),
        VECTOR,
        skips={"bn": "nonlinearity-between"},
    ),
    pattern(
        "norm of the input", lambda: Line(bn=nn.BatchNorm2d(4), act=nn.ReLU()), skips={"bn": STUCK}
    ),
    pattern(
        "nothing but a norm",
        lambda: Line(bn=nn.BatchNorm2d(4)),
        skips={"bn": (*STUCK, "value-is-output")},
    ),
    pattern(
        "padded forward",
        lambda: Line(a=nn.ReLU(), bn=nn.BatchNorm2d(4), c=nn.Conv2d(4, 6, 3, padding=1)),
        skips={"bn": "padded-forward"},
    ),
    pattern(
        "padded forward, same",
        lambda: Line(a=nn.ReLU(), bn=nn.BatchNorm2d(4), c=nn.Conv2d(4, 6, 3, padding="same")),
        skips={"bn": "padded-forward"},
    ),
    pattern(
        "padded forward, pointwise",
        lambda: Line(a=nn.ReLU(), bn=nn.BatchNorm2d(4), c=nn.Conv2d(4, 6, 1, padding=1)),
        skips={"bn": "padded-forward"},
    ),
    pattern(
        "padded forward by a module",
        lambda: Line(a=nn.ReLU(), bn=nn.BatchNorm2d(4), p=nn.ZeroPad2d(1), c=nn.Conv2d(4, 6, 3)),
        skips={"bn": ("padded-constant", "padded-forward")},
    ),
    pattern(
        "forward into a transposed conv",
        lambda: Line(a=nn.ReLU(), bn=nn.BatchNorm2d(4), c=nn.ConvTranspose2d(4, 6, 3, 2)),
        skips={"bn": "padded-forward"},
    ),
    pattern(
        "forward into a strided pointwise transposed conv",
        lambda: Line(a=nn.ReLU(), bn=nn.BatchNorm2d(4), c=nn.ConvTranspose2d(4, 6, 1, 2)),
        skips={"bn": "padded-forward"},
    ),
    pattern(
        "forward through a max pool, some negative",
        lambda: Line(a=nn.ReLU(), bn=nn.BatchNorm2d(4), p=nn.MaxPool2d(2), c=nn.Conv2d(4, 6, 3)),
        skips={"bn": "nonlinearity-between"},
        tune=lambda m: m.bn.weight[0].fill_(-1.0),
    ),
    pattern(
        "forward through a counted pad",
        lambda: Line(
            a=nn.ReLU(), bn=nn.BatchNorm2d(4), p=nn.AvgPool2d(3, 2, 1), c=nn.Conv2d(4, 6, 3)
        ),
        skips={"bn": ("padded-constant", "padded-forward", "no-absorber", "nonlinearity-between")},
    ),
    pattern(
        "sum with the input",
        lambda: Net(
            lambda m, x: m.bn(m.conv(x) + x).relu(), conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4)
        ),
        either={"bn": READ},
        note="s·(W x + x) = (s·W + (s − 1)·I) x + x: the layer can take it alone",
    ),
    pattern(
        "sum with an activation",
        lambda: Net(
            lambda m, x: m.bn(m.conv(x) + x.tanh()).relu(),
            conv=nn.Conv2d(4, 4, 1),
            bn=nn.BatchNorm2d(4),
        ),
        skips={"bn": (*READ, "nonlinearity-between")},
    ),
    pattern(
        "sum with the input of another layer",
        lambda: Net(
            lambda m, x, y: m.bn(m.conv(x) + y).relu(),
            conv=nn.Conv2d(4, 4, 1),
            bn=nn.BatchNorm2d(4),
        ),
        lambda: (draw(3, 4, 6, 6)(), draw(3, 4, 6, 6)().flip(0)),
        skips={"bn": (*READ, "nonlinearity-between")},
    ),
    pattern(
        "sum with one channel of the input",
        net(lambda m, x: m.bn(m.conv(x) + x[:, :1, 1:-1, 1:-1]).relu()),
        skips={"bn": (*READ, "wrong-axis")},
    ),
    pattern(
        "concat with an activation",
        lambda: Net(
            lambda m, x: m.bn(torch.cat([m.c(x), x.relu()], 1)).relu(),
            c=nn.Conv2d(4, 6, 1),
            bn=nn.BatchNorm2d(10),
        ),
        skips={"bn": (*STUCK, "another-consumer")},
    ),
    pattern(
        "norm and activation, conv after",
        lambda: Line(a=nn.Tanh(), bn=NormAct(4), c=nn.Conv2d(4, 6, 3)),
        skips={"bn": STUCK},
    ),
    pattern(
        "recurrent reader",
        lambda: Net(
            lambda m, x: m.lstm(m.bn(x.relu().flatten(0, 1)).view(3, 5, 6))[0],
            bn=nn.BatchNorm1d(6),
            lstm=nn.LSTM(6, 4, batch_first=True),
        ),
        TOKENS,
        skips={"bn": STUCK},
    ),
)

STATISTICS = (
    pattern(
        "batch statistics",
        lambda: Line(
            c=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6, track_running_stats=False), a=nn.ReLU()
        ),
        skips={"bn": "batch-statistics"},
    ),
    pattern(
        "functional batch statistics",
        net(
            lambda m, x: F.batch_norm(
                m.conv(x), None, None, m.bn.weight, m.bn.bias, training=True
            ).relu()
        ),
        skips={"bn|bn.weight": "batch-statistics"},
    ),
    pattern(
        "negative variance",
        lambda: Line(c=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6), a=nn.ReLU()),
        skips={"bn": "bad-statistics"},
        tune=negative,
    ),
    pattern(
        "wrong axis, square",
        lambda: Line(fc=nn.Linear(6, 6), bn=nn.BatchNorm1d(6), a=nn.ReLU()),
        SQUARE,
        skips={"bn": "wrong-axis"},
    ),
    pattern(
        "wrong axis of an image",
        lambda: Line(
            c=nn.Conv2d(4, 6, 3), t=lambda x: x.transpose(1, 3), bn=nn.BatchNorm2d(6), a=nn.ReLU()
        ),
        skips={"bn": "wrong-axis"},
    ),
    pattern(
        "wrong axis forwards",
        lambda: Line(a=nn.ReLU(), bn=nn.BatchNorm1d(6), fc=nn.Linear(6, 6)),
        SQUARE,
        either={"bn": ("wrong-axis", "no-absorber")},
    ),
    pattern(
        "every pixel has its statistics",
        lambda: Line(c=nn.Conv2d(4, 2, 5), f=nn.Flatten(), bn=nn.BatchNorm1d(32), a=nn.ReLU()),
        skips={"bn": ("wrong-axis", "no-absorber")},
    ),
    pattern(
        "every pixel has its statistics, then linear",
        lambda: Line(
            c=nn.Conv2d(4, 2, 5),
            a=nn.ReLU(),
            f=nn.Flatten(),
            bn=nn.BatchNorm1d(32),
            fc=nn.Linear(32, 5),
        ),
        folds="bn",
        kind="fold-forward",
    ),
    pattern(
        "not asked: other norms",
        lambda: Line(
            c=nn.Conv2d(4, 6, 3), g=nn.GroupNorm(2, 6), d=nn.Conv2d(6, 6, 1), i=nn.InstanceNorm2d(6)
        ),
        skips={"g": "batch-statistics", "i": "batch-statistics"},
    ),
    pattern(
        "weight standardisation",
        lambda: Line(conv=StandardisedConv(4, 6, 3), a=nn.ReLU()),
        either={"conv|conv.weight": "weight-standardised"},
    ),
    pattern(
        "weight standardisation, then a norm",
        lambda: Line(conv=StandardisedConv(4, 6, 3), bn=nn.BatchNorm2d(6), a=nn.ReLU()),
        either={
            "conv|conv.weight": "weight-standardised",
            "bn": ("weight-standardised", "computed-weight", "no-absorber"),
        },
    ),
)

REFUSALS: tuple[Pattern, ...] = (*CONSUMERS, *STUCK_NORMS, *STATISTICS)
