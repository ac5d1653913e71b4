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
from bnify.verification.bench import CONDITIONING, move_one_ulp

NAME = "mean 0, variance 1 behind the statistics, on the data"
#: Units in the last place of a value that rounding may move a statistic by.
_ROUNDING = 1e4
#: Where rounding may explain a tenth of a standard deviation, nothing can be told.
_UNDECIDED = 0.1


def check_standardised(
    result: nn.Module,
    order: Sequence[Sequence[Site]],
    statistics: Statistics,
    pool: Pooling,
) -> Check:
    """Run the data through the result in eval mode and compare what reaches each norm with it.

    In units of the norm, sqrt(running variance + ε): the distance of the mean from the running
    mean, and of the variance from the running one. What is too far is measured once more with
    weights that differ by one unit in the last place: an ill-conditioned network rounds more.
    Undecided where the data is not the same twice.

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
    except BnifyError as raised:
        return Check(name=NAME, passed=False, detail=f"the result raised: {raised.message}")
    if any(_precision(norm) > 1e-4 for norm in norms.values()):
        return Check(name=NAME, passed=None, detail="half precision rounds too much to tell")
    seen = {site: found[points[site.path].path][0] for site in sites}
    distances = {site: _distance(seen[site], norms[site], site) for site in sites}
    where = max(sites, key=lambda site: _ratio(*distances[site]))
    if _ratio(*distances[where]) > 1:
        if not _repeatable(order[0], statistics, found, points):
            return Check(name=NAME, passed=None, detail="the data is not the same twice")
        move_one_ulp(working)
        moved = pool(working, list(points.values()))
        for site in sites:
            error, allowed = distances[site]
            other = moved[points[site.path].path][0]
            noise = _apart(other, seen[site].mean, seen[site].var, norms[site], site)
            if CONDITIONING * float(noise.max()) > _UNDECIDED:
                why = f"ill-conditioned: one ulp moves it by {float(noise.max()):.0e}"
                return Check(name=NAME, passed=None, detail=f"{why} at {site.edit.layer}")
            distances[site] = error, torch.maximum(allowed, CONDITIONING * noise)
        where = max(sites, key=lambda site: _ratio(*distances[site]))
    error, allowed = distances[where]
    index = int((error / allowed).argmax())
    passed = bool(error[index] <= allowed[index])
    return Check(
        name=NAME,
        passed=passed,
        error=float(error[index]),
        threshold=float(allowed[index]),
        detail=f"{len(sites)} norm{'s' * (len(sites) != 1)}"
        if passed
        else f"worst at {where.edit.layer}",
    )


def _distance(seen: Pooled, norm: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
    """By channel: the distance from the norm's statistics, and what rounding explains."""
    mean, var = (_tensor(norm, name).double().cpu() for name in ("running_mean", "running_var"))
    size = (var + effective_eps(site.edit)).sqrt()
    allowed = _ROUNDING * _precision(norm) * (1 + mean.abs() / size)
    return _apart(seen, mean, var, norm, site), allowed


def _apart(seen: Pooled, mean: Tensor, var: Tensor, norm: nn.Module, site: Site) -> Tensor:
    """By channel: the distance of statistics from others, in units of the norm."""
    variance = _tensor(norm, "running_var").double().cpu() + effective_eps(site.edit)
    error = torch.maximum(
        (seen.mean - mean).abs() / variance.sqrt(), (seen.var - var).abs() / variance
    )
    return error.nan_to_num(torch.inf)


def _ratio(error: Tensor, allowed: Tensor) -> float:
    return float((error / allowed).max())


def _precision(norm: nn.Module) -> float:
    return torch.finfo(_tensor(norm, "running_mean").dtype).eps


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
