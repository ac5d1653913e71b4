"""The norm modules of a plan with their initial values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bnify.pooled import Point, Pooled
from bnify.errors import PlanError
from bnify.norms import build, each_norm, effective_eps
from bnify.plan import Edit, Plan

Statistics = Mapping[str, Sequence[Pooled]]


def points(plan: Plan) -> list[Point]:
    """Where statistics have to be measured for ``init="preserve"``."""
    return [
        Point(edit.carrier, edit.axis, edit.channels, edit.calls)
        for edit in plan.edits
        if edit.init == "preserve"
    ]


def initial_norms(
    model: nn.Module, plan: Plan, statistics: Statistics | None = None
) -> dict[str, nn.Module]:
    """One norm module per edit, by the path that carries it.

    With ``init="preserve"`` and measured statistics, γ = sqrt(var + ε) and β = mean, so that in
    eval mode (x − mean) / sqrt(var + ε) · γ + β = x. A dropped bias b moves into the running mean:
    (Wx + b) − mean = Wx − (mean − b).
    """
    norms = {}
    for edit in plan.edits:
        layer = model.get_submodule(edit.layer)
        like = next((p for p in layer.parameters() if p.is_floating_point()), torch.empty(0))
        module = build(edit, like)
        measured = (statistics or {}).get(edit.carrier, ())
        with torch.no_grad():
            if edit.init == "preserve" and measured:
                for norm, pooled in zip(each_norm(module), measured, strict=True):
                    _preserve(norm, pooled, edit)
            if edit.drop_bias:
                for norm in each_norm(module):
                    _tensor(norm, "running_mean").sub_(_tensor(layer, "bias"))
        norms[edit.carrier] = module
    return norms


def _preserve(norm: nn.Module, pooled: Pooled, edit: Edit) -> None:
    scale = (pooled.var + effective_eps(edit)).sqrt()
    for name, value in (
        ("running_mean", pooled.mean),
        ("running_var", pooled.var),
        ("weight", scale),
        ("bias", pooled.mean),
    ):
        tensor = _tensor(norm, name)
        tensor.copy_(value)
        if not bool(tensor.isfinite().all()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise PlanError(
                f"the {name.replace('_', ' ')} behind {edit.carrier or 'the root'} is "
                f"{float(value.abs().max()):.1e}, too large for {dtype}",
                hint="insert into a float32 model (model.float()) and convert afterwards",
            )


def _tensor(module: nn.Module, name: str) -> Tensor:
    tensor: Tensor = getattr(module, name)
    return tensor
