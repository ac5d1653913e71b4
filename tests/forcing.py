"""Folding by hand, in plain torch and without asking whether it is right.

What the reasons of bnify are checked against: a norm that is said to stay is folded by force, and
the function must change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import bnify
import laws
from bnify.structure import as_call, outputs_of


def affine_of(norm: Any) -> tuple[Tensor, Tensor]:
    """s and t of a batch norm with running statistics."""
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -scale * norm.running_mean
    return scale, shift if norm.bias is None else shift + norm.bias


def laid(vector: Tensor, weight: Tensor, axis: int) -> Tensor:
    """The vector along one axis of the weight."""
    return vector.view(*[-1 if i == axis else 1 for i in range(weight.ndim)])


@torch.no_grad()
def backward_(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """W' = s·W and b' = s·b + t, for a layer with its outputs on axis 0."""
    bias = torch.zeros_like(shift) if layer.bias is None else layer.bias
    layer.weight.mul_(laid(scale, layer.weight, 0))
    layer.bias = nn.Parameter(scale * bias + shift)


@torch.no_grad()
def forward_(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """W' = W·s and b' = b + W·t, for a layer with its inputs on axis 1; groups 1 or depthwise."""
    bias = layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias
    axis = 1 if layer.weight.shape[1] == scale.numel() else 0
    moved = layer.weight * laid(shift, layer.weight, axis)
    layer.bias = nn.Parameter(bias + moved.flatten(1).sum(1))
    layer.weight.mul_(laid(scale, layer.weight, axis))


def by_force(model: nn.Module, norm: str, layer: str, push: Callable[..., None]) -> nn.Module:
    """A copy in which the layer has absorbed the norm and the norm is gone; its hooks stay."""
    forced = copy.deepcopy(model)
    old = forced.get_submodule(norm)
    push(forced.get_submodule(layer), *affine_of(old))
    place = nn.Identity()
    place._forward_pre_hooks.update(old._forward_pre_hooks)
    place._forward_hooks.update(old._forward_hooks)
    parent, _, leaf = norm.rpartition(".")
    setattr(forced.get_submodule(parent), leaf, place)
    return forced


def run(model: nn.Module, x: Any) -> list[Tensor]:
    """The outputs in eval mode, of the model itself and in its own dtype."""
    with torch.no_grad():
        return [tensor for _, tensor in outputs_of(as_call(x).clone()(model.eval()))]


def error_of(model: nn.Module, forced: nn.Module, x: Any) -> float:
    """How far a forced fold is from the model, both in float64."""
    return laws.worst_error(laws.run64(model, x), laws.run64(forced, x))


def bend(module: nn.Module, x: Tensor) -> float:
    """How far a module is from affine: 0 where f((a+b)/2) = (f(a)+f(b))/2."""
    generator = torch.Generator().manual_seed(1)
    other = torch.randn(x.shape, generator=generator).to(x) * 3 + 1
    middle, a, b = (laws.run64(module, v)[0] for v in ((x + other) / 2, x, other))
    return laws.relative_error(middle, (a + b) / 2)


def hostile(build: Callable[[], nn.Module], seed: int = 5) -> nn.Module:
    """What is built, in float64, with hostile norms."""
    torch.manual_seed(seed)
    return laws.hostile_(build().eval(), seed).double()


def reasons_of(plan: bnify.Plan) -> dict[str, bnify.Reason]:
    """The reason of each norm that stays."""
    return {skip.layer: skip.reason for skip in plan.skips}
