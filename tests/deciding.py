"""Small networks written as a function of their layers, and what an insertion decides on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnify import api


class Net(nn.Module):
    """Layers by keyword and a forward given as a function of (layers, x)."""

    def __init__(self, program, **layers: nn.Module) -> None:
        super().__init__()
        self.program = program
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor):
        return self.program(self, *inputs)


def rows(*shape: int) -> Tensor:
    return torch.randn(4, *shape)


def decide(model: nn.Module, *inputs: Tensor, **options) -> dict[str, str]:
    """Layer to reason, or to the kind of norm it gets."""
    plan = api.plan(model, inputs, **{"batch_size": 32, **options})
    decided = {edit.layer: edit.norm for edit in plan.edits}
    return decided | {skip.layer: str(skip.reason) for skip in plan.skips}


def detail(model: nn.Module, layer: str, *inputs: Tensor, **options) -> str:
    plan = api.plan(model, inputs, **{"batch_size": 32, **options})
    return next(s.detail for s in plan.skips if s.layer == layer)


def mlp(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Linear(8, 3))
