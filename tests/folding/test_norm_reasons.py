"""Reasons that are about the norm, its neighbourhood or the plan: each is true."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnify
import laws
from bnify import Reason, changes
from counting import count_norms
from forcing import affine_of, bend, by_force, error_of, forward_, hostile, reasons_of
from patterns.kit import Line, Net

STATISTICS = {
    "batch norm without running ones": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "instance norm": lambda: nn.InstanceNorm2d(6, affine=True),
    "layer norm": lambda: nn.LayerNorm([6, 6, 6]),
}


@pytest.mark.parametrize("make", STATISTICS.values(), ids=STATISTICS)
def test_a_norm_with_statistics_of_the_batch_is_no_affine_map(make):
    model = hostile(lambda: Line(conv=nn.Conv2d(4, 6, 3), bn=make(), head=nn.Conv2d(6, 3, 1)))
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    result = bnify.fold(model, x)
    assert reasons_of(result.plan) == {"bn": Reason.BATCH_STATISTICS}
    assert bend(model.bn, torch.randn(3, 6, 6, 6, dtype=torch.float64)) > 1e-2
    tracked = hostile(lambda: nn.BatchNorm2d(6))
    assert bend(tracked, torch.randn(3, 6, 6, 6, dtype=torch.float64)) <= 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, -float("inf")])
def test_bad_statistics_give_no_finite_scale(bad):
    model = hostile(lambda: Line(conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6), act=nn.ReLU()))
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    if bad == float("inf"):
        model.bn.running_mean[2] = bad
    else:
        model.bn.running_var[2] = bad
    scale, shift = affine_of(model.bn)
    assert not (scale.isfinite().all() and shift.isfinite().all())
    result = bnify.fold(model, x, verify=False)
    assert reasons_of(result.plan) == {"bn": Reason.BAD_STATISTICS}
    assert laws.worst_error(laws.run64(model, x), laws.run64(result.model, x)) == 0


def looking(*, before: bool) -> tuple[nn.Module, list[Tensor]]:
    """A norm that can only go forwards, with a hook that keeps what it sees."""
    model = hostile(lambda: Line(act=nn.Tanh(), bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 6, 3)))
    seen: list[Tensor] = []
    if before:
        model.bn.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    else:
        model.bn.register_forward_hook(lambda m, a, y: seen.append(y))
    return model, seen


def seen_after_force(model: nn.Module, seen: list[Tensor], x: Tensor) -> float:
    """How much a hook sees differently once the layer behind the norm has absorbed it."""
    seen.clear()
    with torch.no_grad():
        model(x)
        by_force(model, "bn", "conv", forward_)(x)
    want, got = seen
    return laws.relative_error(want, got)


def test_a_hook_that_looks_would_see_other_values():
    model, seen = looking(before=False)
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    assert reasons_of(bnify.fold(model, x).plan) == {"bn": Reason.HOOK_ON_NORM}
    assert seen_after_force(model, seen, x) > 1e-2


def test_a_hook_before_a_norm_that_goes_forwards_sees_the_same_and_is_no_reason():
    model, seen = looking(before=True)
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    assert seen_after_force(model, seen, x) == 0
    result = bnify.fold(model, x)
    assert reasons_of(result.plan) == {}
    seen.clear()
    with torch.no_grad():
        model(x), result.model(x)
    assert len(seen) == 2, "the hook is gone"
    assert torch.equal(*seen)


class _Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Line(bn=nn.BatchNorm2d(4)),
        lambda: Net(
            lambda m, x: m.bn(x) + m.n2(x).tanh(), bn=nn.BatchNorm2d(4), n2=nn.BatchNorm2d(4)
        ),
    ],
)
def test_where_no_layer_is_beside_the_norm_none_runs(build):
    model, x = hostile(build), torch.randn(3, 4, 8, 8, dtype=torch.float64)
    result = bnify.fold(model, x)
    assert result.plan.edits == ()
    assert Reason.NO_ABSORBER in reasons_of(result.plan).values(), result.plan.skips
    with torch.no_grad(), _Operators() as seen:
        model(x)
    weighted = {"linear", "addmm", "mm", "matmul", "bmm", "convolution", "embedding"}
    assert any("batch_norm" in name for name in seen.names)
    assert not {n for n in seen.names if n in weighted or n.startswith("conv")}


class WrittenOut(nn.Module):
    """A norm in the forward itself, with numbers that no tensor of the model holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.mean, self.var = nn.Buffer(torch.zeros(6)), nn.Buffer(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean - 0.5, self.var * 3).relu()


def test_what_is_written_in_a_forward_goes_from_the_graph_only():
    model, x = WrittenOut().double().eval(), torch.randn(3, 4, 8, 8, dtype=torch.float64)
    kept = bnify.fold(model, x)
    (skip,) = kept.plan.skips
    assert skip.reason is Reason.IN_FORWARD
    assert count_norms(kept.model, x).batch == 1
    # no submodule but the convolution: nothing can be put in the norm's place
    assert [name for name, _ in model.named_modules()] == ["", "conv"]
    gone = bnify.fold(model, x, emit="graph")
    assert gone.plan.skips == ()
    assert count_norms(gone.model, x).batch == 0
    laws.assert_same_function(model, gone.model, x)


def test_what_a_plan_leaves_out_is_not_planned_and_could_fold():
    model, x = two_blocks(), torch.randn(3, 4, 8, 8, dtype=torch.float64)
    whole = bnify.fold(model, x)
    part = replace(whole.plan, edits=tuple(e for e in whole.plan.edits if e.layer != "n2"))
    result = bnify.apply(model, part, x)
    assert reasons_of(result.plan) == {"n2": Reason.NOT_PLANNED}
    assert "n2" in {edit.layer for edit in whole.plan.edits}
    laws.assert_same_function(model, result.model, x)


# -- what fails is undone, reported, and nothing else is -------------------------------------------


def two_blocks() -> nn.Module:
    return hostile(
        lambda: Line(
            conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6), act=nn.Tanh(),
            c2=nn.Conv2d(6, 5, 3), n2=nn.BatchNorm2d(5), a2=nn.Tanh(),
            c3=nn.Conv2d(5, 3, 3), n3=nn.BatchNorm2d(3), a3=nn.Tanh(),
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_fold_that_is_wrong_by_a_percent_is_undone_and_the_others_stay(monkeypatch, dtype):
    right, right_ = changes.scaled, changes.scale_
    faulty = (5, 6, 3, 3)  # c2's weight

    def scaled(weight, *rest):
        got = right(weight, *rest)
        return got * 1.01 if tuple(weight.shape) == faulty else got

    def scale_(weight, *rest):
        right_(weight, *rest)
        if tuple(weight.shape) == faulty:
            weight.mul_(1.01)

    monkeypatch.setattr(changes, "scaled", scaled)
    monkeypatch.setattr(changes, "scale_", scale_)
    model, x = two_blocks().to(dtype), torch.randn(3, 4, 9, 9).to(dtype)
    result = bnify.fold(model, x)
    assert reasons_of(result.plan) == {"n2": Reason.VERIFICATION_FAILED}
    assert {edit.layer for edit in result.plan.edits} == {"bn", "n3"}
    assert result.passed
    assert isinstance(result.model.n2, nn.BatchNorm2d)
    error = laws.worst_error(laws.run64(model, x), laws.run64(result.model, x))
    assert error <= (1e-12 if dtype == torch.float64 else 1e-5)
    # the reason is true: with verify=False the fault is handed out
    unchecked = bnify.fold(model, x, verify=False)
    assert error_of(model, unchecked.model, x) > 1e-4
