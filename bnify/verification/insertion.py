"""The verdict on an insertion: algebra on float64 copies, then the delivered objects themselves."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor, fx, nn

from bnify.borrow import copy_model, evaluating, fused_attention, seeded
from bnify.devices import full_precision
from bnify.double import StayInFloat64
from bnify.layers import without_synchronisation
from bnify.structure import Call, device_of, outputs_of, run_graph
from bnify.verdict import Check, Verification
from bnify.verification.algebra import check_insertion
from bnify.verification.bench import CONDITIONING, Realised, move_one_ulp
from bnify.verification.drift import train_drift
from bnify.verification.measures import is_exact, mismatch, relative_l2

#: Two float32 runs of the same operators; they are bit-equal nearly always.
_DELIVERED = 1e-5


def verify_insertion(
    realised: Realised,
    original: nn.Module,
    result: nn.Module,
    graph: fx.GraphModule,
    drift_calls: Sequence[Call],
    others: Sequence[Check] = (),
    data: Call | None = None,
) -> Verification:
    """Measure a rewritten model before anybody gets it.

    Args:
        realised: The plan, carried out twice on float64 copies.
        original: The model as it was.
        result: The rewritten model that will be handed out; it is run on a copy.
        graph: The rewritten recording that will be handed out.
        drift_calls: Inputs for the train-mode drift, one call for each batch size.
        others: Checks that were made already and count as well.
        data: A batch of what the statistics are of, where that is not the example.
    """
    with full_precision():
        return _verify(realised, original, result, graph, drift_calls, others, data)


def _verify(
    realised: Realised,
    original: nn.Module,
    result: nn.Module,
    graph: fx.GraphModule,
    drift_calls: Sequence[Call],
    others: Sequence[Check],
    data: Call | None,
) -> Verification:
    if not realised.plan.edits:
        check = _delivered(result, graph, realised.call)
        return Verification(
            passed=check.passed is True, checks=(check,), notes=("nothing was changed",)
        )
    algebra = check_insertion(realised)
    delivered = _delivered(result, graph, realised.call)
    if delivered.passed is False and realised.baked:
        delivered = Check(name=delivered.name, passed=None, detail=realised.baked)
    checks = [*algebra.checks, delivered, *others]
    if all(edit.init == "preserve" for edit in realised.plan.edits):
        checks.append(_kept(realised, original, result, data or realised.call))
    notes = list(algebra.notes)
    if not realised.wide:
        notes.append(
            f"the model does not run in float64 ({realised.why_narrow}): compared in its own dtype"
        )
    drifts = [train_drift(original, result, call) for call in drift_calls]
    lost = [call.batch for call, one in zip(drift_calls, drifts, strict=True) if one is None]
    if lost:
        sizes = ", ".join(str(size or 1) for size in lost)
        notes.append(f"train mode could not be compared at batch size {sizes}")
    decided = [check.passed for check in checks if check.passed is not None]
    return Verification(
        passed=bool(decided) and all(decided),
        algebra=algebra.worst if realised.wide else None,
        device=str(device_of(result)),
        first_divergent=None if all(decided) else algebra.first_divergent,
        checks=tuple(checks),
        drift=tuple(drift for drift in drifts if drift is not None),
        inputs=("example", "redrawn (seed 1)"),
        notes=tuple(notes),
    )


def _kept(realised: Realised, original: nn.Module, result: nn.Module, call: Call) -> Check:
    """The function of the original in its own dtype, where statistics have been rounded.

    On the data that the statistics are of: (x - mean) rounds in units of the mean, and an input
    far from the data may be small beside it.

    The error against the float64 original may be ten times the original's own, or what a change
    of its weights by one unit in the last place explains.
    """
    name = "result = original, own dtype"
    parameter = next((p for p in original.parameters() if p.is_floating_point()), None)
    own = call if parameter is None else call.to(dtype=parameter.dtype)

    def outputs(model: nn.Module, call: Call) -> list[Tensor]:
        working = without_synchronisation(copy_model(model))
        with torch.no_grad(), seeded(0), fused_attention(enabled=False), evaluating(working):
            return [t for _, t in outputs_of(call.clone()(working)) if t.is_floating_point()]

    if not realised.wide:
        return Check(name=name, passed=None, detail="no float64 run to compare with")
    with StayInFloat64():  # type: ignore[no-untyped-call]
        truth = outputs(realised.model, call.to(dtype=torch.float64))
    base = outputs(original, own)
    nudged = copy_model(original)
    move_one_ulp(nudged)
    # In half precision a hundred units in the last place are the size of the value itself.
    single = parameter is None or parameter.dtype in (torch.float32, torch.float64)
    conditioning = CONDITIONING if single else 10.0
    allowed = max(
        1e-6,
        10 * _worst(base, truth),
        conditioning * _worst(outputs(nudged, own), base),
    )
    try:
        error = _worst(outputs(result, own), truth)
    except Exception as raised:  # forward() is user code, and what we made of it raised
        return _raised(name, raised)
    return Check(name=name, passed=error <= allowed, error=error, threshold=allowed)


def _raised(name: str, error: Exception) -> Check:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return Check(name=name, passed=False, detail=f"the result raised: {lines[0]}")


def _worst(got: list[Tensor], want: list[Tensor]) -> float:
    """Worst relative error over the outputs; infinite where a value is not finite."""
    errors = [
        relative_l2(a, b) if bool(a.isfinite().all()) else inf
        for a, b in zip(got, want, strict=True)
    ]
    return max(errors, default=0.0)


def _delivered(result: nn.Module, graph: fx.GraphModule, call: Call) -> Check:
    """The objects that are handed out, in their own dtype."""
    name = "result.graph = result.model, own dtype"
    parameter = next((p for p in result.parameters() if p.is_floating_point()), None)
    own = call if parameter is None else call.to(dtype=parameter.dtype)
    working = copy_model(result)
    with torch.no_grad(), seeded(0), fused_attention(enabled=False), evaluating(working):
        try:
            want = [t for _, t in outputs_of(own.clone()(working))]
        except Exception as error:  # forward() is user code, and what we made of it raised
            return _raised(name, error)
    with torch.no_grad(), seeded(0), fused_attention(enabled=False):
        got = run_graph(copy_model(graph), own)
    worst = 0.0
    if len(got) != len(want):
        counts = f"{len(got)} outputs, expected {len(want)}"
        return Check(name=name, passed=False, error=float("inf"), detail=counts)
    for a, b in zip(got, want, strict=True):
        why = mismatch(a, b)
        if why is None and is_exact(b) and not torch.equal(a, b):
            why = "integers differ"
        if why is not None:
            return Check(name=name, passed=False, error=float("inf"), detail=why)
        finite = b.isfinite()
        if not is_exact(b):
            if not bool(finite.all()):
                return Check(name=name, passed=False, detail="the output is not finite")
            worst = max(worst, relative_l2(a, b))
    return Check(name=name, passed=worst <= _DELIVERED, error=worst, threshold=_DELIVERED)
