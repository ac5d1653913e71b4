"""Every reason is true: folding by force, written out here by hand, changes the function.

Each case comes with a control, the same network without what the reason speaks of. There the same
hand-written fold is exact, and bnify makes it: so it is that and nothing else that stands in the
way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnify
import laws
from bnify import Reason
from foldparts import NormThenRelu
from forcing import backward_, by_force, error_of, forward_, hostile, reasons_of
from patterns.kit import Line, Net

Build = Callable[[], nn.Module]


# -- one obstacle, one reason ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network with an obstacle, and the same without.

    Attributes:
        reason: What bnify says.
        stuck: Builds the network whose norm stays.
        control: Builds the network without the obstacle, whose norm folds.
        inputs: Example inputs.
        into: The layer that absorbs by force.
        push: How.
        norm: Path of the norm.
        tune: Conditions on values.
    """

    reason: Reason
    stuck: Build
    control: Build
    inputs: Callable[[], Any] = lambda: torch.randn(3, 4, 8, 8, dtype=torch.float64)
    control_inputs: Callable[[], Any] | None = None
    into: str = "conv"
    push: Callable[..., None] = backward_
    norm: str = "bn"
    name: str = ""


def net(forward: Callable[..., Any], **parts: Callable[[], nn.Module]) -> Build:
    return lambda: Net(
        forward,
        conv=nn.Conv2d(4, 6, 3),
        bn=nn.BatchNorm2d(6),
        **{name: make() for name, make in parts.items()},
    )


def ahead(conv: Callable[[], nn.Module], before: Callable[[], nn.Module] = nn.Tanh) -> Build:
    """Activation, norm, layer."""
    return lambda: Line(act=before(), bn=nn.BatchNorm2d(4), conv=conv())


def tied(*, apart: bool) -> Build:
    def build() -> nn.Module:
        model = Net(
            lambda m, x: m.bn(m.conv(x)).relu() + m.n2(m.b(x)).relu(),
            conv=nn.Conv2d(4, 6, 3),
            b=nn.Conv2d(4, 6, 3),
            bn=nn.BatchNorm2d(6),
            n2=nn.BatchNorm2d(6),
        )
        if not apart:
            model.b.weight = model.conv.weight
        return model

    return build


class Standardised(nn.Conv2d):
    """Its weight is normalized at every call."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


class Squashed(nn.Conv2d):
    """Its weight goes through a function at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.tanh(), self.bias)


def line(conv: Callable[..., nn.Module]) -> Build:
    return lambda: Line(conv=conv(4, 6, 3), bn=nn.BatchNorm2d(6), act=nn.ReLU())


def hooked(hook: Callable[..., Any]) -> Build:
    """A norm behind its layer, with a hook before it."""

    def build() -> nn.Module:
        model = Line(conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6), act=nn.ReLU())
        model.bn.register_forward_pre_hook(hook)
        return model

    return build


def one_norm(kind: Callable[[int], nn.Module]) -> Build:
    return lambda: Line(conv=nn.Conv2d(4, 6, 3), bn=kind(6), head=nn.Conv2d(6, 3, 1))


CASES = (
    Case(
        reason=Reason.ANOTHER_CONSUMER,
        stuck=net(lambda m, x: m.bn(y := m.conv(x)).relu() + y.tanh()),
        control=net(lambda m, x: m.bn(y := m.conv(x)).relu() + torch.zeros_like(y)),
    ),
    Case(
        name="forwards",
        reason=Reason.ANOTHER_CONSUMER,
        stuck=lambda: Net(
            lambda m, x: m.conv(y := m.bn(x.tanh())) + y.tanh(),
            bn=nn.BatchNorm2d(4),
            conv=nn.Conv2d(4, 4, 1),
        ),
        control=ahead(lambda: nn.Conv2d(4, 4, 1)),
        push=forward_,
    ),
    Case(
        reason=Reason.VALUE_IS_OUTPUT,
        stuck=net(lambda m, x: (y := m.conv(x), m.bn(y).relu())),
        control=net(lambda m, x: (x, m.bn(m.conv(x)).relu())),
    ),
    Case(
        reason=Reason.PADDED_FORWARD,
        stuck=ahead(lambda: nn.Conv2d(4, 6, 3, padding=1)),
        control=ahead(lambda: nn.Conv2d(4, 6, 3)),
        push=forward_,
    ),
    Case(
        name="depthwise, same",
        reason=Reason.PADDED_FORWARD,
        stuck=ahead(lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4)),
        control=ahead(lambda: nn.Conv2d(4, 4, 3, padding="valid", groups=4)),
        push=forward_,
    ),
    Case(
        name="circular control",
        reason=Reason.PADDED_FORWARD,
        stuck=ahead(lambda: nn.Conv2d(4, 6, 3, padding=1)),
        control=ahead(lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")),
        push=forward_,
    ),
    Case(
        reason=Reason.PADDED_CONSTANT,
        stuck=net(lambda m, x: m.bn(F.pad(m.conv(x), (1, 1, 1, 1))).relu()),
        control=net(lambda m, x: m.bn(F.pad(m.conv(x), (1, 1, 1, 1), "reflect")).relu()),
    ),
    Case(
        reason=Reason.WRONG_AXIS,
        stuck=lambda: Line(conv=nn.Linear(6, 6), bn=nn.BatchNorm1d(6), act=nn.ReLU()),
        control=lambda: Line(conv=nn.Linear(6, 6), bn=nn.BatchNorm1d(6), act=nn.ReLU()),
        inputs=lambda: torch.randn(3, 6, 6, dtype=torch.float64),
        control_inputs=lambda: torch.randn(3, 6, dtype=torch.float64),
    ),
    Case(
        reason=Reason.NONLINEARITY_BETWEEN,
        stuck=net(lambda m, x: m.bn(m.conv(x).relu()).tanh()),
        control=net(lambda m, x: m.bn(m.conv(x).contiguous()).tanh()),
    ),
    Case(
        name="a maximum under negative scales",
        reason=Reason.NONLINEARITY_BETWEEN,
        stuck=net(lambda m, x: m.bn(F.max_pool2d(m.conv(x), 2)).tanh()),
        control=net(lambda m, x: m.bn(F.avg_pool2d(m.conv(x), 2)).tanh()),
    ),
    Case(
        reason=Reason.SHARED_LAYER,
        stuck=net(
            lambda m, x: m.bn(m.conv(x)).relu() + m.n2(m.conv(2 * x)).relu(),
            n2=lambda: nn.BatchNorm2d(6),
        ),
        control=net(
            lambda m, x: m.bn(m.conv(x)).relu() + m.n2(m.c2(2 * x)).relu(),
            n2=lambda: nn.BatchNorm2d(6),
            c2=lambda: nn.Conv2d(4, 6, 3),
        ),
    ),
    Case(reason=Reason.TIED_WEIGHTS, stuck=tied(apart=False), control=tied(apart=True)),
    Case(
        reason=Reason.EXTRA_COMPUTATION,
        stuck=one_norm(NormThenRelu),
        control=one_norm(nn.BatchNorm2d),
    ),
    Case(
        reason=Reason.HOOK_ON_NORM,
        stuck=hooked(lambda m, a: (a[0] * 2 - 1,)),
        control=line(nn.Conv2d),
    ),
    Case(
        reason=Reason.WEIGHT_STANDARDISED,
        stuck=line(Standardised),
        control=line(nn.Conv2d),
    ),
    Case(reason=Reason.COMPUTED_WEIGHT, stuck=line(Squashed), control=line(nn.Conv2d)),
)


def title(case: Case) -> str:
    return case.reason.value + (f" ({case.name})" if case.name else "")


@pytest.mark.parametrize("case", CASES, ids=title)
def test_folding_by_force_changes_the_function(case):
    model, x = hostile(case.stuck), case.inputs()
    result = bnify.fold(model, x)
    assert reasons_of(result.plan).get(case.norm) == case.reason, result.plan.skips
    laws.assert_same_function(model, result.model, x)
    forced = by_force(model, case.norm, case.into, case.push)
    assert error_of(model, forced, x) > 1e-3, "the reason is not true: it could be folded"


@pytest.mark.parametrize("case", CASES, ids=title)
def test_without_the_obstacle_the_same_fold_is_exact_and_made(case):
    model, x = hostile(case.control), (case.control_inputs or case.inputs)()
    forced = by_force(model, case.norm, case.into, case.push)
    assert error_of(model, forced, x) <= 1e-12, "the fold by hand is wrong itself"
    result = bnify.fold(model, x)
    assert case.norm in {edit.layer for edit in result.plan.edits}, result.plan.skips
    laws.assert_same_function(forced, result.model, x)


def test_a_padded_forward_fold_is_wrong_at_the_border_only():
    model = hostile(ahead(lambda: nn.Conv2d(4, 6, 3, padding=1)))
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    forced = by_force(model, "bn", "conv", forward_)
    (want,), (got,) = laws.run64(model, x), laws.run64(forced, x)
    inner = (..., slice(1, -1), slice(1, -1))
    assert laws.relative_error(want[inner], got[inner]) <= 1e-12
    for edge in ((..., 0, slice(None)), (..., -1), (..., slice(None), 0)):
        assert laws.relative_error(want[edge], got[edge]) > 1e-2
    assert "pads with zeros" in bnify.fold(model, x, verify=False).plan.skips[0].detail


def test_without_a_shift_the_padding_is_no_obstacle():
    """The reason names the shift: where it is 0, the same fold is exact."""
    model, x = hostile(ahead(lambda: nn.Conv2d(4, 6, 3, padding=1))), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        model.bn.bias.zero_()
        model.bn.running_mean.zero_()
    assert error_of(model, by_force(model, "bn", "conv", forward_), x) <= 1e-12
    assert bnify.fold(model, x.double()).plan.skips == ()


def test_with_positive_scales_a_maximum_is_no_obstacle():
    model = hostile(net(lambda m, x: m.bn(F.max_pool2d(m.conv(x), 2)).tanh()))
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        model.bn.weight.abs_().clamp_(min=0.3)
    assert error_of(model, by_force(model, "bn", "conv", backward_), x) <= 1e-12
    assert bnify.fold(model, x).plan.skips == ()


def test_every_reason_of_folding_has_its_check():
    listed = list(Reason)
    of_folding = {*listed[listed.index(Reason.BATCH_STATISTICS) :]}
    of_folding |= {Reason.WEIGHT_STANDARDISED, Reason.TIED_WEIGHTS}
    elsewhere = {
        Reason.BATCH_STATISTICS,
        Reason.BAD_STATISTICS,
        Reason.NO_ABSORBER,
        Reason.IN_FORWARD,
        Reason.NOT_PLANNED,
        Reason.VERIFICATION_FAILED,
    }
    assert {case.reason for case in CASES} | elsewhere == of_folding
