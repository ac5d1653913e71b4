"""The norm modules of a plan with their initial values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bnify.errors import PlanError
from bnify.norms import build, each_norm, effective_eps
from bnify.plan import Edit, Plan
from bnify.pooled import Point, Pooled

Statistics = Mapping[str, Sequence[Pooled]]


def points(plan: Plan) -> list[Point]:
    """Where statistics have to be measured: behind every layer whose norm starts from them."""
    return [
        Point(edit.carrier, edit.axis, edit.channels, edit.calls)
        for edit in plan.edits
        if edit.init != "reset"
    ]


def initial_norms(
    model: nn.Module, plan: Plan, statistics: Statistics | None = None
) -> dict[str, nn.Module]:
    """One norm module per edit, by the path that carries it.

    With measured statistics each norm is as :func:`start` leaves it. A dropped bias b moves into
    the running mean: (Wx + b) − mean = Wx − (mean − b).
    """
    norms = {}
    for edit in plan.edits:
        layer = model.get_submodule(edit.layer)
        like = next((p for p in layer.parameters() if p.is_floating_point()), torch.empty(0))
        module = build(edit, like)
        measured = (statistics or {}).get(edit.carrier, ())
        with torch.no_grad():
            if edit.init != "reset" and measured:
                for norm, pooled in zip(each_norm(module), measured, strict=True):
                    start(norm, pooled, edit)
            if edit.drop_bias:
                for norm in each_norm(module):
                    _tensor(norm, "running_mean").sub_(_tensor(layer, "bias"))
        norms[edit.carrier] = module
    return norms


@torch.no_grad()
def start(norm: nn.Module, pooled: Pooled, edit: Edit) -> None:
    """Give a batch norm the statistics of its input, and the scale and shift that go with them.

    ``preserve``: γ = sqrt(var + ε) and β = mean, so that in eval mode
    (x − mean) / sqrt(var + ε) · γ + β = x. ``stats``: γ = 1 and β = 0, as they are.

    Args:
        norm: The norm, in its container or out of it; edited in place.
        pooled: The statistics of one call.
        edit: Its edit.

    Raises:
        PlanError: A value is too large for the norm's dtype.
    """
    (norm,) = each_norm(norm)
    values = [("running_mean", pooled.mean), ("running_var", pooled.var)]
    if edit.init == "preserve":
        values += [
            ("weight", (pooled.var + effective_eps(edit)).sqrt()),
            ("bias", pooled.mean),
        ]
    for name, value in values:
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
