"""Sources: every spelling of a norm, behind a layer that takes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldparts import FrozenCall, FrozenScale, FrozenSteps, NormAct, PlainSubclass
from patterns.kit import IMAGE, SIGNAL, VECTOR, Line, Pattern, draw, pattern

GRAPH = {"emit": "graph"}


def behind_conv(norm: nn.Module) -> Line:
    return Line(conv=nn.Conv2d(4, 6, 3), bn=norm, act=nn.ReLU())


def lazy() -> nn.Module:
    model = Line(conv=nn.LazyConv2d(6, 3), bn=nn.LazyBatchNorm2d(), act=nn.ReLU())
    model(torch.randn(2, 4, 5, 5))
    return model


def neutral(model: nn.Module) -> None:
    """Four values that make every step of the algebra wrong if one of them is forgotten."""
    model.bn.weight.copy_(torch.tensor([0.0, -1.5, 1e-3, -1e-3, 2.0, 1.0]))
    model.bn.running_var.copy_(torch.tensor([1.0, 1e-7, 1e-8, 30.0, 1e-3, 0.5]))


class FunctionalNorm(nn.Module):
    """F.batch_norm in a forward; statistics are buffers beside the layer."""

    def __init__(self, affine: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("var", torch.rand(6) + 0.2)
        self.gamma = nn.Parameter(torch.randn(6)) if affine else None
        self.beta = nn.Parameter(torch.randn(6)) if affine and bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.conv(x), self.mean, self.var, self.gamma, self.beta, eps=1e-3)
        return torch.relu(x)


class BorrowedStatistics(nn.Module):
    """F.batch_norm with the tensors of a norm module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        bn, x = self.bn, self.conv(x)
        return torch.relu(
            F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        )


class ByHand(nn.Module):
    """The formula in the forward of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.bn.weight / torch.sqrt(self.bn.running_var + self.bn.eps)
        shift = self.bn.bias - self.bn.running_mean * scale
        return torch.relu(self.conv(x) * scale[:, None, None] + shift[:, None, None])


SOURCES: tuple[Pattern, ...] = (
    pattern("conv 1d", lambda: Line(c=nn.Conv1d(4, 5, 3), bn=nn.BatchNorm1d(5)), SIGNAL, "bn"),
    pattern("conv 2d", lambda: behind_conv(nn.BatchNorm2d(6)), folds="bn", kind="fold-backward"),
    pattern(
        "conv 3d",
        lambda: Line(conv=nn.Conv3d(2, 5, 3), bn=nn.BatchNorm3d(5), act=nn.ReLU()),
        draw(3, 2, 4, 5, 4),
        "bn",
    ),
    pattern(
        "linear",
        lambda: Line(fc=nn.Linear(6, 5), bn=nn.BatchNorm1d(5), act=nn.ReLU()),
        VECTOR,
        "bn",
        kind="fold-backward",
    ),
    pattern(
        "norm is the output", lambda: Line(c=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)), IMAGE, "bn"
    ),
    pattern("hand-picked values", lambda: behind_conv(nn.BatchNorm2d(6)), folds="bn", tune=neutral),
    pattern("large eps", lambda: behind_conv(nn.BatchNorm2d(6, eps=0.3)), folds="bn"),
    pattern("no eps", lambda: behind_conv(nn.BatchNorm2d(6, eps=0.0)), folds="bn"),
    pattern("no affine", lambda: behind_conv(nn.BatchNorm2d(6, affine=False)), folds="bn"),
    pattern("cumulative", lambda: behind_conv(nn.BatchNorm2d(6, momentum=None)), folds="bn"),
    pattern("sync", lambda: behind_conv(nn.SyncBatchNorm(6)), folds="bn"),
    pattern("lazy, built", lazy, folds="bn"),
    pattern("subclass that checks", lambda: behind_conv(PlainSubclass(6)), folds="bn"),
    pattern("norm and activation", lambda: behind_conv(NormAct(6)), folds="bn"),
    pattern("norm and swish", lambda: behind_conv(NormAct(6, nn.SiLU())), folds="bn"),
    pattern("norm and no activation", lambda: behind_conv(NormAct(6, nn.Identity())), folds="bn"),
    pattern("frozen, scale and shift", lambda: behind_conv(FrozenScale(6)), folds="bn"),
    pattern("frozen, step by step", lambda: behind_conv(FrozenSteps(6)), folds="bn"),
    pattern("frozen, functional inside", lambda: behind_conv(FrozenCall(6)), folds="bn"),
    pattern(
        "frozen, linear",
        lambda: Line(fc=nn.Linear(6, 5), bn=FrozenScale(5), a=nn.ReLU()),
        VECTOR,
        "bn",
    ),
    pattern(
        "instance 2d",
        lambda: behind_conv(nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
        folds="bn",
    ),
    pattern(
        "instance 2d, no affine",
        lambda: behind_conv(nn.InstanceNorm2d(6, track_running_stats=True)),
        folds="bn",
    ),
    pattern(
        "instance 1d",
        lambda: Line(
            conv=nn.Conv1d(4, 5, 3),
            bn=nn.InstanceNorm1d(5, affine=True, track_running_stats=True),
            act=nn.ReLU(),
        ),
        SIGNAL,
        "bn",
    ),
    pattern(
        "frozen parameters",
        lambda: behind_conv(nn.BatchNorm2d(6)).requires_grad_(False),
        folds="bn",
    ),
    pattern("train mode", lambda: behind_conv(nn.BatchNorm2d(6)), folds="bn", tune=nn.Module.train),
    pattern(
        "half precision", lambda: behind_conv(nn.BatchNorm2d(6)), folds="bn", dtype=torch.float16
    ),
    pattern("bfloat16", lambda: behind_conv(nn.BatchNorm2d(6)), folds="bn", dtype=torch.bfloat16),
    pattern("float32", lambda: behind_conv(nn.BatchNorm2d(6)), folds="bn", dtype=torch.float32),
    # Norms written into a forward: only a graph can drop them.
    pattern("functional", FunctionalNorm, folds="gamma|mean", options=GRAPH),
    pattern(
        "functional, no beta", lambda: FunctionalNorm(bias=False), folds="gamma|mean", options=GRAPH
    ),
    pattern("functional, no affine", lambda: FunctionalNorm(False), folds="mean", options=GRAPH),
    pattern(
        "functional, module",
        FunctionalNorm,
        either={"gamma|mean": "in-forward"},
        left=1,
        note="it still runs, and may be left with nothing to do",
    ),
    pattern(
        "functional, in a child",
        lambda: Line(a=FunctionalNorm()),
        folds="a|a.gamma|a.mean",
        options=GRAPH,
    ),
    pattern("borrowed statistics", BorrowedStatistics, folds="bn", options=GRAPH),
    pattern(
        "borrowed statistics, module",
        BorrowedStatistics,
        either={"bn": "in-forward"},
        left=1,
    ),
    pattern("by hand", ByHand, folds="bn|bn.weight|bn.running_mean", options=GRAPH),
    pattern(
        "several in a row",
        lambda: Line(
            conv=nn.Conv2d(4, 6, 3),
            bn=nn.BatchNorm2d(6),
            frozen=FrozenScale(6),
            last=nn.BatchNorm2d(6, affine=False),
            act=nn.ReLU(),
        ),
        folds=("bn", "frozen", "last"),
    ),
    pattern(
        "a whole network",
        lambda: nn.Sequential(
            *(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
            *(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.SiLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8)),
            *(nn.Dropout(0.5), nn.Linear(8, 3)),
        ),
        folds=("1", "4", "9"),
    ),
    pattern(
        "a norm inside two modules",
        lambda: Line(outer=Line(inner=behind_conv(nn.BatchNorm2d(6)))),
        folds="outer.inner.bn",
    ),
)
