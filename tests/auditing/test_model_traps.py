"""Traps of live models: layouts that look like a fault, and fixes that cannot be made here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laws
from bnify.auditing.finding import AuditReport
from bnify.audits import audit
from bnify.errors import NothingToFix, PlanError
from bnify.report.audit import alike, summary
from patterns.kit import Line

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def found(report: AuditReport) -> dict[str, tuple[str, str]]:
    """Module → severity and safety, of a report on one rule."""
    return {f.module: (f.severity.value, f.safety.value) for f in report.findings}


class Constants(nn.Module):
    """A norm of constant statistics that is written out, as detection backbones have it."""

    def __init__(self, channels: int, *, tracking: bool = False) -> None:
        super().__init__()
        if tracking:
            self.momentum = 0.1
        for name, value in (("weight", 1.0), ("bias", 0.5)):
            self.register_buffer(name, torch.full((channels,), value))
        self.register_buffer("running_mean", torch.full((channels,), 0.25))
        self.register_buffer("running_var", torch.full((channels,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


@pytest.mark.parametrize(("tracking", "severity"), [(False, "info"), (True, "warning")])
def test_a_written_out_norm_in_half_precision_is_left_to_a_person(tracking, severity):
    """Made float32 it would give float32 to a convolution in bfloat16; other fixes are made."""
    net = Line(
        n=Constants(3, tracking=tracking), a=nn.Conv2d(3, 4, 3), m=nn.BatchNorm2d(4),
    ).bfloat16()  # fmt: skip
    report = audit(laws.hostile_(net), X.bfloat16(), select=["BN107", "BN201"])
    assert found(report) == {
        "n": (severity, "advice"), "m": ("warning", "safe"), "a": ("info", "safe")
    }  # fmt: skip
    assert "; 2 fixable" in summary(report)
    result = report.fix()
    assert {e.layer for e in result.plan.edits} == {"m", "a"}
    assert result.model(X.bfloat16()).dtype is torch.bfloat16


class Sums(nn.Module):
    """Two layers, two norms, and what is given to both."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.n, self.m = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        if shared:
            self.m.running_mean, self.m.running_var = self.n.running_mean, self.n.running_var

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.a(x)) + self.m(self.b(x))


def test_a_running_mean_that_two_norms_share_takes_up_no_bias():
    net = laws.hostile_(Sums(shared=True))
    assert not audit(net, X, select=["BN201"]).findings
    assert list(found(audit(laws.hostile_(Sums(shared=False)), X, select=["BN201"]))) == ["a", "b"]


def test_a_bias_of_a_parametrized_layer_is_left_to_a_person():
    weight_norm = nn.utils.parametrizations.weight_norm
    net = laws.hostile_(Line(a=weight_norm(nn.Conv2d(3, 4, 3)), n=nn.BatchNorm2d(4)))
    report = audit(net, X, select=["BN201"])
    assert found(report) == {"a": ("info", "advice")}
    assert "fixable" not in summary(report)


def test_a_pair_of_norms_is_fixable_in_eval_mode_alone():
    net = laws.hostile_(Line(a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4), m=nn.BatchNorm2d(4)))
    report = audit(net.train(), X, select=["BN208"])
    assert found(report) == {"n": ("warning", "advice")}
    with pytest.raises(NothingToFix):
        report.fix()
    assert found(audit(net.eval(), X, select=["BN208"])) == {"n": ("warning", "safe")}


class Functional(nn.Module):
    """A norm that is called as a function."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.full((3,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.mean, self.var, self.weight, self.bias, self.training, self.momentum
        )


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.99])
def test_momentum_of_a_functional_norm(momentum):
    """0 in eval mode is what many write who update by hand in train mode."""
    report = audit(Line(n=Functional(momentum), r=nn.ReLU()), X, select=["BN203"])
    assert found(report) == ({"n": ("error", "advice")} if momentum == 0.99 else {})


def test_a_cumulative_module_is_no_functional_norm():
    net = Line(n=nn.BatchNorm2d(3, momentum=None), m=nn.BatchNorm2d(3, momentum=0.99))
    assert found(audit(net, X, select=["BN203"])) == {"m": ("error", "safe")}


class Mixing(nn.Module):
    """A Linear over positions or over features, behind a convolution, and a norm on axis 1."""

    def __init__(self, *, swapped: bool) -> None:
        super().__init__()
        self.conv, self.swapped = nn.Conv1d(3, 12, 1), swapped
        self.linear, self.norm = nn.Linear(12, 12), nn.BatchNorm1d(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        return self.norm(self.linear(x.transpose(1, 2) if self.swapped else x))


@pytest.mark.parametrize("swapped", [False, True])
def test_a_linear_over_positions_leaves_channels_where_they_are(swapped):
    report = audit(Mixing(swapped=swapped), torch.randn(4, 3, 12), select=["BN207"])
    assert found(report) == ({"norm": ("warning", "advice")} if swapped else {})


def test_data_are_not_run_on_a_model_without_values():
    with torch.device("meta"):
        net = Line(a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4, momentum=0.99))
    report = audit(net, data=[X, X])
    assert [f.code for f in report.findings] == ["BN203"]
    assert "the data were not run: the model is on the meta device" in report.notes


def test_inputs_that_do_not_run_are_not_asked_for_again():
    net: Any = Line(a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4, momentum=0.99))
    with pytest.raises(PlanError) as error:
        audit(net, X[:, :2]).fix()
    assert "--input" not in (error.value.hint or "")
    with pytest.raises(PlanError) as error:
        audit(net).fix()
    assert "--input" in (error.value.hint or "")


def test_numbers_and_numbered_modules_are_alike():
    """``8 channels`` and module ``8``: what is a path in one row is a number in the next."""
    net = nn.Sequential(
        nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 64, 3), nn.BatchNorm2d(64)
    )
    assert [len(row.findings) for row in alike(audit(net, X, select=["BN201"]))] == [2]


class Renamed(nn.Module):
    """A functional norm whose scale goes by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.gamma, self.beta)


class Absolute(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.abs()


@pytest.mark.parametrize("kind", ["bare", "renamed", "parametrized"])
def test_a_channel_without_a_weight_of_its_own_is_not_set_to_zero(kind):
    norm: Any = Renamed() if kind == "renamed" else nn.BatchNorm2d(3, affine=kind != "bare")
    norm.running_var[:] = torch.tensor([1.0, 1e-9, 2.0])
    if kind == "parametrized":
        nn.utils.parametrize.register_parametrization(norm, "weight", Absolute())
    report = audit(Line(n=norm, r=nn.ReLU()), X, select=["BN105"])
    assert [f.code for f in report.findings] == ["BN105"]
    with pytest.raises(NothingToFix):
        report.fix(unsafe=True)
    if kind == "bare":
        assert found(report) == {"n": ("warning", "advice")}


class Forgotten(nn.Module):
    """A norm runs, another is registered and does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm, self.spare = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def test_statistics_of_a_norm_that_never_runs_are_not_lost():
    net = Forgotten()
    laws.hostile_(net.norm)
    codes = ["BN102", "BN210"]
    assert [(f.code, f.module) for f in audit(net, X, select=codes).findings] == [
        ("BN210", "spare")
    ]
    assert [f.module for f in audit(net, select=codes).findings] == ["spare"]  # who knows
    nn.init.uniform_(net.spare.bias)
    assert [f.code for f in audit(net, X, select=codes).findings] == codes


# -- values that are no numbers --------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), -1.0])
@pytest.mark.parametrize("data", [None, [X.double().repeat(8, 1, 1, 1)] * 8])
def test_fixes_are_measured_where_statistics_are_not_finite(value, data):
    """NaN against NaN is no difference that a fix has made; what data repair is repaired too."""
    net = laws.hostile_(
        Line(a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4), p=nn.AdaptiveAvgPool2d(1), f=nn.Flatten())
    ).double()
    net.n.running_var[1] = value
    result = audit(net, X.double(), data=data, select=["BN101", "BN201"]).fix(unsafe=True)
    kinds = {edit.kind for edit in result.plan.edits}
    assert kinds == ({"drop-bias"} if data is None else {"drop-bias", "recalibrate"})
    assert result.verification.passed
    assert any("not finite" in note for note in result.plan.notes)
    assert bool(result.model.n.running_var[1] > 0) == (data is not None)
    net.n.running_var[1] = result.model.n.running_var[1] = 2.0
    if data is None:
        laws.assert_same_function(net, result.model, X.double())


@pytest.mark.parametrize("lazy", [False, True])
def test_a_reference_without_values_is_none(lazy):

    def made(kind: Any = nn.Conv2d, channels: tuple[int, ...] = (3, 4)) -> nn.Module:
        return Line(a=kind(*channels, 3, bias=False), n=nn.BatchNorm2d(4, affine=False))

    with torch.device("cpu" if lazy else "meta"):
        other = made(nn.LazyConv2d, (4,)) if lazy else made()
    assert not audit(made(), reference=other, select=["BN307"]).findings
    half = laws.hostile_(made().half())
    assert len(audit(made(), reference=half, select=["BN307"]).findings) == 1


def test_options_that_are_no_numbers():
    net = Line(n=nn.BatchNorm2d(3), m=nn.BatchNorm2d(3, eps=1e-3))
    net.n.eps, net.m.momentum = None, "0.1"
    assert not audit(net, select=["BN2"]).findings
    net.n.eps = 1e-5
    assert [f.code for f in audit(net, select=["BN2"]).findings] == ["BN204"]


def test_a_world_size_that_is_no_number(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "auto")
    assert "BN302" in audit(Line(n=nn.BatchNorm2d(3)), X).unchecked
