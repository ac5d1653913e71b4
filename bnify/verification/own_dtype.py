"""One output of a result in the model's own dtype, beside the original's own error."""

from __future__ import annotations

import torch
from torch import Tensor

from bnify.verdict import OutputVerdict
from bnify.verification.measures import UNCOMPARABLE, Distance, is_exact, mismatch
from bnify.verification.measures import distance as measured

#: The error of a result may be this many times the original's own, or this large.
BUDGET, FLOOR = 10.0, 1e-6


def finite(tensors: list[Tensor]) -> bool:
    """Whether outputs can be compared: no NaN, and not infinite throughout (masks are, in part)."""
    return all(
        not bool(t.isnan().any()) and (not t.numel() or bool(t.isfinite().any()))
        for t in tensors
        if t.is_floating_point()
    )


def within_budget(name: str, got: Tensor, own: Tensor, truth: Tensor) -> OutputVerdict:
    """One output in the model's own dtype, beside the original in that dtype."""
    why = mismatch(got, own) or ""
    if is_exact(own):
        why = why or ("" if torch.equal(got, own) else "integers differ")
        gap = UNCOMPARABLE if why else measured(got, own)
        return _verdict(name, gap, None, passed=not why, detail=why)
    if why or not finite([truth]):
        detail = why or "the output is not finite"
        return _verdict(name, UNCOMPARABLE, None, passed=False, detail=detail)
    whole = truth.isfinite()
    if not bool(whole.all()):  # where it is infinite both are, or there would be a mismatch
        got, own, truth = got[whole], own[whole], truth[whole]
    gap, base = measured(got, truth), measured(own, truth)
    least = FLOOR if own.dtype in (torch.float32, torch.float64) else torch.finfo(own.dtype).eps
    allowed = max(base.rel_l2, least / BUDGET)
    ratio = gap.rel_l2 / allowed
    return _verdict(name, gap, ratio, passed=ratio <= BUDGET)


def _verdict(
    name: str, gap: Distance, ratio: float | None, *, passed: bool, detail: str = ""
) -> OutputVerdict:
    return OutputVerdict(
        name=name,
        rel_l2=gap.rel_l2,
        max_abs=gap.max_abs,
        max_abs_over_rms=gap.max_abs_over_rms,
        budget_ratio=ratio,
        tolerance=gap.tolerance,
        top1=gap.top1,
        passed=passed,
        detail=detail,
    )
