"""Every reason is true: folding by force, written out here by hand, changes the function.

Each case comes with a control, the same network without what the reason speaks of. There the same
hand-written fold is exact, and bnify makes it: so it is that and nothing else that stands in the
way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnify
import laws
import zoo
from bnify import Reason, api, changes
from bnify.structure import as_call
from counting import count_norms
from foldparts import NormThenRelu
from patterns.kit import Line, Net

Build = Callable[[], nn.Module]
LINEAR = (nn.Linear, nn.modules.conv._ConvNd)


# -- folding by hand -------------------------------------------------------------------------------


def affine_of(norm: Any) -> tuple[Tensor, Tensor]:
    """s and t of a batch norm with running statistics."""
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -scale * norm.running_mean
    return scale, shift if norm.bias is None else shift + norm.bias


def laid(vector: Tensor, weight: Tensor, axis: int) -> Tensor:
    """The vector along one axis of the weight."""
    return vector.view(*[-1 if i == axis else 1 for i in range(weight.ndim)])


@torch.no_grad()
def backward_(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """W' = s·W and b' = s·b + t, for a layer with its outputs on axis 0."""
    bias = torch.zeros_like(shift) if layer.bias is None else layer.bias
    layer.weight.mul_(laid(scale, layer.weight, 0))
    layer.bias = nn.Parameter(scale * bias + shift)


@torch.no_grad()
def forward_(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """W' = W·s and b' = b + W·t, for a layer with its inputs on axis 1; groups 1 or depthwise."""
    bias = layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias
    axis = 1 if layer.weight.shape[1] == scale.numel() else 0
    moved = layer.weight * laid(shift, layer.weight, axis)
    layer.bias = nn.Parameter(bias + moved.flatten(1).sum(1))
    layer.weight.mul_(laid(scale, layer.weight, axis))


def by_force(model: nn.Module, norm: str, layer: str, push: Callable[..., None]) -> nn.Module:
    """A copy in which the layer has absorbed the norm and the norm is gone; its hooks stay."""
    forced = copy.deepcopy(model)
    old = forced.get_submodule(norm)
    push(forced.get_submodule(layer), *affine_of(old))
    place = nn.Identity()
    place._forward_pre_hooks.update(old._forward_pre_hooks)
    place._forward_hooks.update(old._forward_hooks)
    parent, _, leaf = norm.rpartition(".")
    setattr(forced.get_submodule(parent), leaf, place)
    return forced


def error_of(model: nn.Module, forced: nn.Module, x: Any) -> float:
    return laws.worst_error(laws.run64(model, x), laws.run64(forced, x))


def hostile(build: Build, seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return laws.hostile_(build().eval(), seed).double()


def reasons_of(plan: bnify.Plan) -> dict[str, Reason]:
    return {skip.layer: skip.reason for skip in plan.skips}


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


# -- reasons that are about the norm itself --------------------------------------------------------

STATISTICS = {
    "batch norm without running ones": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "instance norm": lambda: nn.InstanceNorm2d(6, affine=True),
    "layer norm": lambda: nn.LayerNorm([6, 6, 6]),
}


def bend(module: nn.Module, x: Tensor) -> float:
    """How far a module is from affine: 0 where f((a+b)/2) = (f(a)+f(b))/2."""
    generator = torch.Generator().manual_seed(1)
    other = torch.randn(x.shape, generator=generator).to(x) * 3 + 1
    middle, a, b = (laws.run64(module, v)[0] for v in ((x + other) / 2, x, other))
    return laws.relative_error(middle, (a + b) / 2)


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
    model = hostile(ahead(lambda: nn.Conv2d(4, 6, 3)))
    seen: list[Tensor] = []
    if before:
        model.bn.register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
    else:
        model.bn.register_forward_hook(lambda m, a, y: seen.append(y.clone()))
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
        lambda: Net(lambda m, x: m.bn(x * x.mean((2, 3), keepdim=True)), bn=nn.BatchNorm2d(4)),
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


# -- the zoo: no single layer could take what is left ----------------------------------------------


def beside(model: nn.Module, norm: str, x: Any, most: int = 4) -> Iterator[tuple[str, str]]:
    """Layers that ran closest to a norm and have its number of channels, and on which side."""
    order: list[tuple[str, nn.Module]] = []
    hooks = [
        module.register_forward_hook(lambda m, a, y, name=name: order.append((name, m)))
        for name, module in model.named_modules()
        if name == norm or isinstance(module, LINEAR)
    ]
    with torch.no_grad():
        as_call(x).clone()(model)
    for hook in hooks:
        hook.remove()
    place = [name for name, _ in order].index(norm)
    channels = model.get_submodule(norm).num_features
    found = []
    for index, (name, module) in enumerate(order):
        weight = getattr(module, "weight", None)
        if name == norm or weight is None or getattr(module, "transposed", False):
            continue
        if index < place and weight.shape[0] == channels:
            found.append((place - index, name, "before"))
        depthwise = getattr(module, "groups", 1) == channels == weight.shape[0]
        if index > place and (weight.shape[1] == channels or depthwise):
            found.append((index - place, name, "after"))
    yield from ((name, side) for _, name, side in sorted(found)[:most])


WITH_SKIPS = (
    "own:PreActivation",
    "own:BertLike",
    "own:TorchTransformer",
    "own:Mixer",
    "timm:mobileone_s0",
    "timm:repghostnet_050",
    "timm:dpn48b",
    "timm:edgenext_xx_small",
    "timm:mobilevit_xxs",
    "timm:pvt_v2_b0",
    "timm:inception_next_atto",
    "timm:convnextv2_atto",
    "timm:convmixer_768_32",
    "torchvision:densenet121",
)


def small(entry: zoo.Entry) -> Any:
    """Inputs that are small where that saves time: the reasons do not depend on the size."""
    pixels = {"timm:convmixer_768_32": 35, "timm:mobileone_s0": 32, "timm:repghostnet_050": 32}
    x = entry.inputs(2, pixels.get(entry.name))
    return as_call(x).to(dtype=torch.float64)


def some(skips: list[bnify.Skip], most: int = 2) -> list[bnify.Skip]:
    """The first and the last of them."""
    return skips if len(skips) <= most else [skips[0], skips[-1]]


def test_every_zoo_model_of_the_test_command_whose_norms_stay_is_checked():
    """A model that leaves a norm behind is held to the check below."""
    for entry in zoo.small():
        plan = api.plan_for_fold(entry.build(), entry.inputs(2))
        assert not plan.skips or entry.name in WITH_SKIPS, entry.name


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_SKIPS)
def test_what_a_zoo_model_keeps_could_not_be_folded(name):
    entry = zoo.entry(name)
    model, x = laws.hostile_(entry.build(), 7).double(), small(entry)
    plan = bnify.fold(model, x, verify=False).plan
    by_reason: dict[Reason, list[bnify.Skip]] = {}
    for skip in plan.skips:
        by_reason.setdefault(skip.reason, []).append(skip)
    assert by_reason
    want = laws.run64(model, x)
    allowed = max(1e-12, 100 * laws.one_ulp_noise(model, x))
    for reason, skips in by_reason.items():
        for skip in some(skips):
            norm = model.get_submodule(skip.layer)
            if reason is Reason.BATCH_STATISTICS:
                assert bend(norm, seen_by(model, skip.layer, x)) > 1e-3, skip
                continue
            assert bend(norm_alone(norm), seen_by(model, skip.layer, x)) <= 1e-12, skip
            tried = list(beside(copy.deepcopy(model), skip.layer, x))
            assert tried, skip
            for layer, side in tried:
                push = backward_ if side == "before" else forward_
                forced = by_force_keeping_act(model, skip.layer, layer, push)
                gap = laws.worst_error(want, laws.run64(forced, x))
                assert gap > 10 * allowed, f"{skip} could go into {layer}"


def seen_by(model: nn.Module, norm: str, x: Any) -> Tensor:
    """What a norm is given."""
    seen: list[Tensor] = []
    working = copy.deepcopy(model)
    working.get_submodule(norm).register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
    laws.run64(working, x)
    return seen[0]


def norm_alone(norm: nn.Module) -> nn.Module:
    """A norm without the activation that it may hold."""
    alone = nn.BatchNorm2d(norm.num_features, eps=norm.eps).double().eval()
    alone.load_state_dict(dict(norm.state_dict()), strict=False)
    return alone


def by_force_keeping_act(
    model: nn.Module, norm: str, layer: str, push: Callable[..., None]
) -> nn.Module:
    """As :func:`by_force`, with the activation of a norm that holds one."""
    forced = by_force(model, norm, layer, push)
    held = getattr(model.get_submodule(norm), "act", None)
    if held is not None:
        parent, _, leaf = norm.rpartition(".")
        setattr(forced.get_submodule(parent), leaf, copy.deepcopy(held))
    return forced


@pytest.mark.slow
def test_the_check_of_the_zoo_can_fail():
    """A norm that does fold is found out by it: some layer beside it takes it exactly."""
    entry = zoo.entry("torchvision:resnet18")
    model, x = laws.hostile_(entry.build(), 7).double(), small(entry)
    want = laws.run64(model, x)
    (first, *_) = (n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    gaps = [
        laws.worst_error(want, laws.run64(by_force(model, first, layer, backward_), x))
        for layer, side in beside(copy.deepcopy(model), first, x)
        if side == "before"
    ]
    assert min(gaps) <= 1e-11


def test_every_reason_of_folding_has_its_check():
    """No reason without a test here; ``only_insertion`` lists those that no fold gives."""
    only_insertion = {r for r in Reason if r not in _FOLDING}
    checked = {case.reason for case in CASES} | {
        Reason.BATCH_STATISTICS,
        Reason.BAD_STATISTICS,
        Reason.NO_ABSORBER,
        Reason.IN_FORWARD,
        Reason.NOT_PLANNED,
        Reason.VERIFICATION_FAILED,
    }
    assert checked == set(Reason) - only_insertion


_FOLDING = list(Reason)[list(Reason).index(Reason.BATCH_STATISTICS) :] + [
    Reason.WEIGHT_STANDARDISED,
    Reason.TIED_WEIGHTS,
]
