"""What folds with ``affines``: LayerScale, input normalization, tails of other norms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldparts import LayerScale
from patterns.kit import (
    ANY,
    IMAGE,
    SIGNAL,
    TOKENS,
    Line,
    Net,
    Pattern,
    pattern,
    values,
)

AFFINES = {"affines": True}
STUCK = ("no-absorber", "nonlinearity-between")


def affine(name: str, build, inputs=TOKENS, folds: Any = (), skips=None, **more: Any) -> Pattern:
    """A pattern with ``affines``."""
    return pattern(name, build, inputs, folds, skips, options=AFFINES, **more)


class Normalize(nn.Module):
    """(x − mean) / std, as data loaders do it, inside the model."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("std", torch.rand(channels) + 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


def tail(norm: nn.Module, **layers: nn.Module) -> nn.Module:
    """A norm that several layers read; their outputs."""
    model = Net(lambda m, x: [getattr(m, name)(y) for y in (m.norm(x),) for name in layers])
    model.norm = norm
    for name, layer in layers.items():
        setattr(model, name, layer)
    return model


class Residual(nn.Module):
    """Pre-norm transformer block without attention, with LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.scale = LayerScale(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(self.down(F.gelu(self.up(self.norm(x)))))


AFFINE_TAILS: tuple[Pattern, ...] = (
    affine(
        "layer scale, module",
        lambda: Line(fc=nn.Linear(6, 6), scale=LayerScale(6), act=nn.GELU()),
        folds="scale|scale.gamma",
    ),
    pattern(
        "layer scale, inline",
        lambda: Net(lambda m, x: x + m.fc(x) * m.gamma, fc=nn.Linear(6, 6), gamma=values(6)),
        TOKENS,
        "gamma",
        options={"affines": True, "emit": "graph"},
    ),
    pattern(
        "layer scale, inline, module",
        lambda: Net(lambda m, x: x + m.fc(x) * m.gamma, fc=nn.Linear(6, 6), gamma=values(6)),
        TOKENS,
        either={"gamma": "in-forward"},
        options=AFFINES,
        left=1,
        note="it still runs, and may be left with nothing to do",
    ),
    pattern(
        "layer scale, not asked",
        lambda: Line(fc=nn.Linear(6, 6), scale=LayerScale(6), act=nn.GELU()),
        TOKENS,
    ),
    affine(
        "layer scale of an image",
        lambda: Line(conv=nn.Conv2d(4, 6, 3), scale=LayerScale(6, last=False), act=nn.GELU()),
        IMAGE,
        "scale|scale.gamma",
    ),
    affine(
        "layer scale behind an activation",
        lambda: Line(fc=nn.Linear(6, 6), act=nn.GELU(), scale=LayerScale(6), end=nn.Tanh()),
        skips={"scale|scale.gamma": STUCK},
    ),
    affine("transformer block", Residual, folds=("norm", "scale|scale.gamma")),
    affine(
        "layer norm, one linear", lambda: tail(nn.LayerNorm(6), a=nn.Linear(6, 5)), folds="norm"
    ),
    affine(
        "layer norm, three linears",
        lambda: tail(
            nn.LayerNorm(6), q=nn.Linear(6, 5), k=nn.Linear(6, 5, bias=False), v=nn.Linear(6, 4)
        ),
        folds="norm",
    ),
    affine(
        "layer norm, read by a residual",
        lambda: Net(
            lambda m, x: m.fc(y := m.norm(x)) + y, norm=nn.LayerNorm(6), fc=nn.Linear(6, 6)
        ),
        skips={"norm": ("another-consumer", *STUCK)},
    ),
    affine(
        "layer norm, an activation reads it",
        lambda: Line(norm=nn.LayerNorm(6), act=nn.GELU(), fc=nn.Linear(6, 6)),
        skips={"norm": STUCK},
    ),
    affine(
        "layer norm without a tail",
        lambda: Line(norm=nn.LayerNorm(6, elementwise_affine=False), fc=nn.Linear(6, 6)),
        skips={"norm": "batch-statistics"},
    ),
    affine(
        "layer norm without a shift",
        lambda: Line(norm=nn.LayerNorm(6, bias=False), fc=nn.Linear(6, 6, bias=False)),
        folds="norm",
    ),
    pattern(
        "layer norm, not asked",
        lambda: Line(norm=nn.LayerNorm(6), fc=nn.Linear(6, 6)),
        TOKENS,
        skips={"norm": "batch-statistics"},
    ),
    affine(
        "group norm, pointwise conv",
        lambda: Line(norm=nn.GroupNorm(2, 4), conv=nn.Conv2d(4, 6, 1)),
        IMAGE,
        "norm",
    ),
    affine(
        "group norm, padded conv",
        lambda: Line(norm=nn.GroupNorm(2, 4), conv=nn.Conv2d(4, 6, 3, padding=1)),
        IMAGE,
        skips={"norm": "padded-forward"},
    ),
    affine("rms norm", lambda: Line(norm=nn.RMSNorm(6), fc=nn.Linear(6, 5)), folds="norm"),
    affine(
        "rms norm, two linears without bias",
        lambda: tail(nn.RMSNorm(6), a=nn.Linear(6, 5, bias=False), b=nn.Linear(6, 5, bias=False)),
        folds="norm",
    ),
    affine(
        "instance norm of the batch, conv",
        lambda: Line(norm=nn.InstanceNorm1d(4, affine=True), conv=nn.Conv1d(4, 5, 3)),
        SIGNAL,
        either={"norm": ANY},
        left=1,
    ),
    affine(
        "input normalization",
        lambda: Line(normalize=Normalize(4), conv=nn.Conv2d(4, 6, 3), act=nn.ReLU()),
        IMAGE,
        "normalize|normalize.mean|normalize.std",
    ),
    affine(
        "input normalization, padded conv",
        lambda: Line(normalize=Normalize(4), conv=nn.Conv2d(4, 6, 3, padding=1), act=nn.ReLU()),
        IMAGE,
        skips={"normalize|normalize.mean|normalize.std": "padded-forward"},
    ),
    pattern(
        "input normalization in the forward",
        lambda: Net(
            lambda m, x: m.conv((x - m.mean) / m.std).relu(),
            mean=torch.randn(1, 4, 1, 1),
            std=torch.rand(1, 4, 1, 1) + 0.3,
            conv=nn.Conv2d(4, 6, 3),
        ),
        IMAGE,
        "mean|std",
        options={"affines": True, "emit": "graph"},
    ),
    affine(
        "learned scale and bias",
        lambda: Net(
            lambda m, x: (m.conv(x) * m.s + m.b).relu(),
            conv=nn.Conv2d(4, 6, 3),
            s=values(6, 1, 1),
            b=values(6, 1, 1),
        ),
        IMAGE,
        either={"s": "in-forward", "b": "in-forward"},
    ),
    affine(
        "batch norm and layer scale",
        lambda: Line(
            conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6), scale=LayerScale(6, False), act=nn.ReLU()
        ),
        IMAGE,
        ("bn", "scale|scale.gamma"),
    ),
)
