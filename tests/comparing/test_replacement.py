"""The norms of a model are found as they run, and others stand in their places exactly."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import laws
from bnify.comparing.own_norms import own_norms
from bnify.comparing.replacement import (
    are_all,
    never_run,
    refusal,
    replace_norms,
    swap_for,
)
from bnify.errors import PlanError, SpecError
from bnify.layers import ChannelRMSNorm, TokenNorm
from bnify.norms import group_count
from bnify.structure import Call

KINDS = ("batch", "batch-noaffine", "group", "layer", "instance", "rms")
EPS = 1e-5


def on(*shape: int, dtype: torch.dtype = torch.float64) -> Call:
    generator = torch.Generator().manual_seed(1)
    return Call((torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype),))


def swapped(model: nn.Module, call: Call, kind: str) -> nn.Module:
    swaps = [swap_for(norm, kind) for norm in own_norms(model, call) if not norm.refusal]
    return replace_norms(copy.deepcopy(model), swaps)


def only(model: nn.Module, call: Call):
    (found,) = own_norms(model, call)
    return found


def behind_a_relu(norm: nn.Module) -> nn.Module:
    """Nothing is at the root, where no other module could stand."""
    return nn.Sequential(nn.ReLU(), norm).double()


# -- what a kind computes in a place, written down in full -----------------------------------------


def by_hand(kind: str, x: Tensor, axis: int) -> Tensor:
    """The fresh norm in train mode: statistics of its own, no scale and shift."""
    x = x.movedim(axis, 1)
    token = axis == x.ndim - 1 and x.ndim > 2
    spatial = [] if token else list(range(2, x.ndim))
    match kind:
        case "batch" | "batch-noaffine":
            axes = [0, *range(2, x.ndim)]
        case "instance":
            axes = spatial
        case "layer":
            axes = [1, *spatial]
        case "rms":
            square = (x**2).mean([1, *spatial], keepdim=True)
            tiny = torch.finfo(x.dtype).eps
            return (x / (square + tiny).sqrt()).movedim(1, axis)
        case "group":
            groups = group_count(x.shape[1], linear=not spatial)
            parts = x.unflatten(1, (groups, -1))
            over = [2, *(a + 1 for a in spatial)]
            mean, var = parts.mean(over, keepdim=True), parts.var(over, False, keepdim=True)
            return ((parts - mean) / (var + EPS).sqrt()).flatten(1, 2).movedim(1, axis)
    mean, var = x.mean(axes, keepdim=True), x.var(axes, False, keepdim=True)
    return ((x - mean) / (var + EPS).sqrt()).movedim(1, axis)


PLACES = {
    "vectors": (nn.BatchNorm1d(32), (6, 32), 1),
    "sequences": (nn.BatchNorm1d(16), (3, 16, 5), 1),
    "images": (nn.BatchNorm2d(16), (3, 16, 4, 5), 1),
    "volumes": (nn.BatchNorm3d(8), (2, 8, 2, 3, 2), 1),
    "groups": (nn.GroupNorm(4, 16), (3, 16, 4, 5), 1),
    "instances": (nn.InstanceNorm2d(16, affine=True), (3, 16, 4, 5), 1),
    "tokens": (nn.LayerNorm(32), (3, 5, 32), 2),
    "channels last": (nn.LayerNorm(32), (2, 4, 3, 32), 3),
    "rows": (nn.RMSNorm(32), (6, 32), 1),
    "bnify rms": (ChannelRMSNorm(16), (3, 16, 4, 5), 1),
    "bnify tokens": (TokenNorm(nn.BatchNorm1d(32)), (3, 5, 32), 2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_each_kind_computes_its_formula_in_each_place(place, kind):
    norm, shape, axis = PLACES[place]
    model, call = behind_a_relu(copy.deepcopy(norm)), on(*shape)
    laws.hostile_(model)
    found = only(model, call)
    assert not found.refusal
    if kind == "instance" and (len(shape) == 2 or axis > 1):
        assert refusal(found, kind)
        return
    assert refusal(found, kind) is None
    made = swapped(model, call, kind).train()
    want = by_hand(kind, call.args[0].relu(), axis)
    assert laws.relative_error(want, made(*call.args)) < 1e-10


@pytest.mark.parametrize("place", PLACES)
def test_without_norms_the_input_passes(place):
    norm, shape, _ = PLACES[place]
    model, call = behind_a_relu(laws.hostile_(copy.deepcopy(norm))), on(*shape)
    made = swapped(model, call, "none")
    assert torch.equal(made(*call.args), call.args[0].relu())
    assert not list(made.parameters())


@pytest.mark.parametrize("place", PLACES)
def test_as_is_starts_where_a_fresh_norm_does(place):
    norm, shape, _ = PLACES[place]
    fresh = behind_a_relu(copy.deepcopy(norm))
    call, made = on(*shape), swapped(laws.hostile_(copy.deepcopy(fresh)), on(*shape), "as-is")
    for train in (True, False):
        assert torch.equal(fresh.train(train)(*call.args), made.train(train)(*call.args))
    assert [type(m) for m in made.modules()] == [type(m) for m in fresh.modules()]


# -- finding ---------------------------------------------------------------------------------------


class Odd(nn.LayerNorm):
    def forward(self, input):
        return input + super().forward(input)


class OffsetScale(nn.LayerNorm):
    """As some language models have it: equal to layer norm at some scales, and only there."""

    def forward(self, input):
        return F.layer_norm(input, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


class TrainsOtherwise(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input.tanh() if self.training else input)


class Twice(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x).sum() + self.norm(x.flatten(2)).sum()


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        nn.utils.parametrize.register_parametrization(self.norm, "weight", nn.Softplus())

    def forward(self, x):
        return self.norm(x)


@pytest.mark.parametrize(
    ("model", "shape", "why"),
    [
        (nn.Sequential(Odd(8)), (2, 3, 8), "its own forward"),
        (nn.Sequential(OffsetScale(8)), (2, 3, 8), "its own forward"),
        (nn.Sequential(TrainsOtherwise(4)), (2, 4, 3, 3), "its own forward"),
        (nn.Sequential(FrozenBatchNorm2d(4)), (2, 4, 3, 3), "its class"),
        (nn.Sequential(nn.LayerNorm((3, 8))), (2, 3, 8), "2 axes"),
        (nn.Sequential(nn.InstanceNorm2d(4)), (4, 3, 3), "no batch axis"),
        (nn.Sequential(nn.LayerNorm(8)), (8,), "no batch axis"),
        (Twice(nn.GroupNorm(2, 4)), (2, 4, 3, 3), "3 and 4 dimensions"),
        (nn.BatchNorm2d(4), (2, 4, 3, 3), "the model itself"),
        (Computed(), (2, 8), "computed at every call"),
    ],
)
def test_what_cannot_be_swapped_says_why(model, shape, why):
    found = only(model, on(*shape, dtype=torch.float32))
    assert why in found.refusal
    assert found.calls


def test_what_never_runs_has_no_calls():
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    model[1].unused = nn.BatchNorm1d(4)
    found = only(model, on(2, 4, dtype=torch.float32))
    assert (found.path, found.calls) == ("1.unused", 0)
    assert "never runs" in found.refusal


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.LocalResponseNorm(2)),
    ],
)
def test_nothing_is_taken_for_a_norm_that_is_none(model):
    assert own_norms(model, on(2, 4, 4, 4, dtype=torch.float32)) == ()


def test_a_norm_inside_another_is_part_of_it():
    model = nn.Sequential(TokenNorm(nn.BatchNorm1d(8)), nn.Sequential(nn.LayerNorm(8)))
    assert [n.path for n in own_norms(model.double(), on(2, 3, 8))] == ["0", "1.0"]


def test_a_container_by_the_name_of_a_norm_is_opened():
    class ConvBatchNorm(nn.Sequential):
        pass

    model = ConvBatchNorm(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double()
    assert [n.path for n in own_norms(model, on(2, 3, 4, 4))] == ["1"]


def test_a_forward_of_the_instance_is_one_of_its_own():
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0].forward = lambda x: x * 3
    assert "its own forward" in only(model, on(2, 4, 3, 3, dtype=torch.float32)).refusal


def test_an_error_of_the_model_is_the_users():
    with pytest.raises(SpecError, match="Sequential raised RuntimeError"):
        own_norms(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), on(2, 5, dtype=torch.float32))


def test_the_model_stays_as_it_was():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(4), nn.ReLU()).double()
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    own_norms(model, on(2, 4, 3, 3))
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model[1]._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), rng)


# -- norms with activation, of their own classes ---------------------------------------------------


def timm_layers():
    import timm.layers

    return timm.layers


@pytest.mark.parametrize("name", ["BatchNormAct2d", "GroupNormAct", "LayerNormAct2d"])
def test_norms_with_activation_keep_it(name):
    layer = getattr(timm_layers(), name)
    norm = layer(16, act_layer=nn.SiLU, **({"num_groups": 4} if name == "GroupNormAct" else {}))
    model, call = behind_a_relu(norm), on(3, 16, 4, 5)
    found = only(model, call)
    assert (found.edit.axis, found.edit.dims, found.keep) == (1, 4, ("drop", "act"))
    x = call.args[0].relu()
    for train in (True, False):
        group = swapped(model, call, "group").train(train)
        assert laws.relative_error(F.silu(by_hand("group", x, 1)), group(*call.args)) < 1e-10
        none = swapped(model, call, "none").train(train)
        assert torch.equal(none(*call.args), F.silu(x))


def test_layer_norm_on_the_channels_of_images():
    model, call = behind_a_relu(timm_layers().LayerNorm2d(16)), on(3, 16, 4, 16)
    found = only(model, call)
    assert (found.edit.axis, found.edit.channels, found.keep) == (1, 16, ())
    made = swapped(model, call, "batch")
    assert type(made[1]) is nn.BatchNorm2d


# -- refusing and recognising ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "shape", "refused"),
    [
        (nn.BatchNorm1d(8), (1, 8), {"batch", "batch-noaffine", "instance"}),
        (nn.BatchNorm1d(8), (2, 8), {"instance"}),
        (nn.BatchNorm2d(8), (4, 8, 1, 1), {"instance"}),
        (nn.BatchNorm2d(1), (4, 1, 1, 1), {"instance", "group", "layer", "rms"}),
        (nn.BatchNorm2d(1), (4, 1, 2, 1), set()),
        (nn.LayerNorm(8), (1, 3, 8), {"instance"}),
        (nn.LayerNorm(1), (2, 3, 1), {"instance", "group", "layer", "rms"}),
    ],
)
def test_a_kind_without_values_is_refused(norm, shape, refused):
    found = only(behind_a_relu(norm), on(*shape))
    assert {kind for kind in KINDS if refusal(found, kind)} == refused
    assert refusal(found, "none") is None


@pytest.mark.parametrize(
    ("norms", "kinds"),
    [
        ([nn.BatchNorm2d(16), nn.BatchNorm2d(16)], {"batch"}),
        ([nn.BatchNorm2d(16, eps=1e-3), nn.BatchNorm2d(16, eps=1e-3)], {"batch"}),
        ([nn.BatchNorm2d(16), nn.BatchNorm2d(16, eps=1e-3)], set()),
        ([nn.BatchNorm2d(16), nn.BatchNorm2d(16, momentum=0.2)], set()),
        ([nn.BatchNorm2d(16), nn.BatchNorm2d(16, affine=False)], set()),
        ([nn.BatchNorm2d(16, affine=False)], {"batch-noaffine"}),
        ([nn.BatchNorm2d(16, track_running_stats=False)], set()),
        ([nn.SyncBatchNorm(16)], set()),
        ([nn.GroupNorm(2, 16)], {"group"}),
        ([nn.GroupNorm(4, 16)], set()),
        ([nn.GroupNorm(1, 16)], {"layer"}),
        ([nn.InstanceNorm2d(16, affine=True)], {"instance"}),
        ([nn.InstanceNorm2d(16)], set()),
        ([nn.LayerNorm(5)], {"layer", "group"}),
        ([nn.LayerNorm(5, bias=False)], set()),
        ([nn.RMSNorm(5)], {"rms"}),
        ([ChannelRMSNorm(16)], {"rms"}),
        ([TokenNorm(nn.BatchNorm1d(5))], {"batch"}),
        ([nn.BatchNorm2d(16), nn.GroupNorm(2, 16)], set()),
    ],
)
def test_which_kind_a_model_has_already(norms, kinds):
    found = own_norms(nn.Sequential(*norms).double(), on(3, 16, 4, 5))
    assert {kind for kind in KINDS if are_all(found, kind)} == kinds


# -- doing -----------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One norm under two names, called twice; a frozen one; a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3)
        self.conv2 = nn.Conv2d(16, 16, 1)
        self.bn = nn.BatchNorm2d(16)
        self.alias = self.bn
        self.frozen = nn.BatchNorm2d(16).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.alias(self.conv2(self.bn(self.conv1(x)))))


def test_shared_frozen_and_hooked_norms_stay_so():
    model, runs = Shared().double(), []
    model.frozen.eval()
    model.bn.register_forward_hook(lambda *_: runs.append(1))
    call = on(2, 3, 8, 8)
    found = own_norms(model, call)
    assert [(n.path, n.calls) for n in found] == [("bn", 2), ("frozen", 1)]
    made = replace_norms(model, [swap_for(n, "group") for n in found])
    assert made is model
    assert isinstance(made.bn, nn.GroupNorm)
    assert made.alias is made.bn
    assert made.bn.weight.requires_grad
    assert not made.frozen.weight.requires_grad
    assert not made.frozen.training
    assert made.bn.weight.dtype is torch.float64
    runs.clear()
    made(*call.args)
    assert len(runs) == 2


def test_another_model_is_refused_before_anything_is_changed():
    model, call = Shared().double(), on(2, 3, 8, 8)
    swaps = [swap_for(n, "group") for n in own_norms(model, call)]
    other = Shared().double()
    other.frozen = nn.GroupNorm(2, 16)
    with pytest.raises(PlanError, match="frozen is a GroupNorm in this model, not a BatchNorm2d"):
        replace_norms(other, swaps)
    assert isinstance(other.bn, nn.BatchNorm2d)
    with pytest.raises(PlanError, match="no module bn"):
        replace_norms(nn.Sequential(nn.ReLU()), swaps)
    replace_norms(model, swaps)
    with pytest.raises(PlanError, match="bn is a GroupNorm"):
        replace_norms(model, swaps)


class ReadsTensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        if torch.is_grad_enabled():
            return self.norm(x)
        return F.layer_norm(x, (8,), self.norm.weight)


def test_a_norm_that_is_passed_by_is_told():
    call, model = on(2, 8), ReadsTensors().double()
    found = only(nn.Sequential(nn.LayerNorm(8)).double(), call)
    swap = replace(swap_for(found, "rms"), path="norm")
    assert never_run(replace_norms(model, [swap]), [swap], call) == ["norm"]
    honest = nn.Sequential(nn.LayerNorm(8)).double()
    assert (
        never_run(replace_norms(honest, [swap_for(found, "rms")]), [replace(swap, path="0")], call)
        == []
    )


@settings(max_examples=15, deadline=None)
@given(
    widths=st.lists(st.sampled_from([8, 12, 16, 32]), min_size=1, max_size=3),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_every_other_tensor_keeps_its_bits(widths, kind, seed):
    torch.manual_seed(seed)
    layers, before = [], 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    model, call = nn.Sequential(*layers), on(2, 3, 4, 4, dtype=torch.float32)
    rng = torch.get_rng_state()
    made = swapped(laws.hostile_(model), call, kind)
    assert torch.equal(torch.get_rng_state(), rng)
    assert len(list(made)) == len(layers)
    for old, new in zip(model, made, strict=True):
        if isinstance(old, nn.Conv2d):
            assert torch.equal(old.weight, new.weight)
            assert torch.equal(old.bias, new.bias)
