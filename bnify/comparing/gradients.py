"""How evenly a gradient reaches the layers."""

from __future__ import annotations

import math

from torch import nn


def gradient_spread(model: nn.Module) -> float:
    """Largest over smallest ratio of gradient norm to weight norm, over the layers' weights.

    Weights are the parameters of two or more dimensions: a norm's scale and shift are none, so
    that the number means the same with and without norms. 1 is even; infinite where a layer gets
    no gradient at all; NaN where there is none to compare.
    """
    ratios = []
    for parameter in model.parameters():
        if parameter.ndim < 2 or parameter.grad is None:
            continue
        size = float(parameter.detach().norm())
        if size > 0:
            ratios.append(float(parameter.grad.norm()) / size)
    if not ratios or not all(map(math.isfinite, ratios)):
        return math.nan
    return max(ratios) / min(ratios) if min(ratios) > 0 else math.inf
