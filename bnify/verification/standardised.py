"""With ``init="stats"`` the input of every norm has, on the data, the statistics of the norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bnify.borrow import copy_model
from bnify.errors import BnifyError
from bnify.norms import each_norm, effective_eps
from bnify.pooled import Point, Pooled
from bnify.rewrite import Statistics
from bnify.staged import Pooling, Site, norm_at, with_open_inputs
from bnify.verdict import Check

NAME = "mean 0, variance 1 behind the statistics, on the data"
#: Units in the last place of a value that rounding may move a statistic by.
_ROUNDING = 1e4


def check_standardised(
    result: nn.Module,
    order: Sequence[Sequence[Site]],
    statistics: Statistics,
    pool: Pooling,
) -> Check:
    """Run the data through the result in eval mode and compare what reaches each norm with it.

    In units of the norm, sqrt(running variance + ε): the distance of the mean from the running
    mean, and of the variance from the running one. Undecided where the data is not the same twice.

    Args:
        result: The rewritten model; a copy of it runs.
        order: The stages of its plan.
        statistics: What was measured.
        pool: Runs a model over the data and pools its points.
    """
    working = copy_model(result)
    sites = [site for stage in order for site in stage]
    norms = {site: each_norm(norm_at(working, site))[0] for site in sites}
    points = with_open_inputs(working, sites)
    try:
        found = pool(working, list(points.values()))
    except BnifyError as error:
        return Check(name=NAME, passed=False, detail=f"the result raised: {error.message}")
    distances = []
    for site in sites:
        (seen,) = found[points[site.path].path]
        precision = torch.finfo(_tensor(norms[site], "running_mean").dtype).eps
        if precision > 1e-4:
            return Check(name=NAME, passed=None, detail="half precision rounds too much to tell")
        distances.append((*_distance(seen, norms[site], site, precision), site.edit.layer))
    worst, allowed, where = max(distances, key=lambda one: one[0] / one[1])
    passed = worst <= allowed
    if not passed and not _repeatable(order[0], statistics, found, points):
        return Check(name=NAME, passed=None, detail="the data is not the same twice")
    return Check(
        name=NAME,
        passed=passed,
        error=worst,
        threshold=allowed,
        detail=f"{len(sites)} norm{'s' * (len(sites) != 1)}" if passed else f"worst at {where}",
    )


def _distance(seen: Pooled, norm: nn.Module, site: Site, precision: float) -> tuple[float, float]:
    """Of the channel that is worst for what rounding explains: its distance and what that is."""
    mean, var = (_tensor(norm, name).double().cpu() for name in ("running_mean", "running_var"))
    variance = var + effective_eps(site.edit)
    size = variance.sqrt()
    error = torch.maximum((seen.mean - mean).abs() / size, (seen.var - var).abs() / variance)
    allowed = _ROUNDING * precision * (1 + mean.abs() / size)
    error = error.nan_to_num(torch.inf)
    index = int((error / allowed).argmax())
    return float(error[index]), float(allowed[index])


def _repeatable(
    first: Sequence[Site],
    statistics: Statistics,
    found: Mapping[str, tuple[Pooled, ...]],
    points: Mapping[str, Point],
) -> bool:
    """Whether the sites that rest on no other norm see what they saw when they were measured.

    By count and variance: the mean lacks a bias that was dropped meanwhile.
    """
    for site in first:
        (now,) = found[points[site.path].path]
        then = statistics[site.edit.carrier][site.call]
        if now.count != then.count or not torch.allclose(now.var, then.var, rtol=1e-4, atol=1e-12):
            return False
    return True


def _tensor(module: nn.Module, name: str) -> Tensor:
    tensor: Tensor = getattr(module, name)
    return tensor
