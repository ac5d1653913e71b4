"""Statistics are those of all values together, whatever the batches."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from normed import hostile, images, in_train_mode, recorded
from torch import Tensor, nn

from bnify.calibrations import calibrate


def check(model: nn.Module, batches: list[Tensor]) -> None:
    with recorded(model) as values:
        found = calibrate(model, batches)
    assert {norm.name for norm in found.norms} == set(values)
    for norm in found.norms:
        want = torch.cat(values[norm.name])
        var, mean = torch.var_mean(want, 0)
        assert norm.updated
        assert norm.count == len(want)
        assert float(((norm.mean - mean) / (mean.abs() + var.sqrt())).abs().max()) < 1e-12
        error = ((norm.var - var).abs() / (var + 1e-16 * mean.square())).max()  # γ = 0: var is 0
        assert float(error) < 1e-12
        module = model.get_submodule(norm.name)
        assert torch.equal(module.running_mean, norm.mean)
        assert torch.equal(module.running_var, norm.var)


SPLITS = {
    "whole": [61],
    "sorted": [20, 20, 20, 1],
    "ragged": [2, 17, 3, 30, 7, 2],
    "pairs": [2] * 30 + [1],
}


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_pooled_statistics_are_those_of_the_activations(sizes):
    check(hostile(), list(images().split(sizes)))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, 9), min_size=2, max_size=6))
def test_any_network_and_any_sizes(seed, sizes):
    check(hostile(seed), list(images(sum(sizes), seed).split(sizes)))


def test_norms_run_as_in_train_mode_and_nothing_else_does():
    model, batches = hostile(), list(images().split([20, 20, 21]))
    want = in_train_mode(model, batches)
    for norm in calibrate(model, batches).norms:
        var, mean = torch.var_mean(want[norm.name], 0)
        # γ = 0 leaves a constant, whose rounding the next norm divides by sqrt(eps)
        assert torch.allclose(norm.mean, mean, rtol=1e-9, atol=1e-9)
        assert torch.allclose(norm.var, var, rtol=1e-9, atol=1e-9)


def test_the_first_norm_does_not_depend_on_how_the_data_are_batched():
    x = images()
    found = []
    for batches in (x.split(61), x.split(7), x.flip(0).split([1, 59, 1])):
        model = hostile()
        found.append(calibrate(model, list(batches)).norms[0])
    for other in found[1:]:
        assert torch.allclose(other.mean, found[0].mean, rtol=1e-13, atol=0)
        assert torch.allclose(other.var, found[0].var, rtol=1e-12, atol=0)


def test_an_average_of_batch_variances_would_not_do():
    """The planted fault: what ``update_bn`` computes on sorted data, off by a third."""
    model = hostile()
    batches = list(images().split(8))
    exact = calibrate(model, batches).norms[0].var
    averaged = torch.stack([in_train_mode(model, [b])["bn1"].var(0) for b in batches]).mean(0)
    assert float(((averaged - exact) / exact).abs().max()) > 0.3


@pytest.mark.parametrize("tail", [0, 1])
def test_old_statistics_have_no_part_in_the_new_ones(tail):
    """A batch of one sample gives norms a single value; old statistics would rule it."""
    batches = [*images(40).split(20), *([images(1)] * tail)]
    good, bad = hostile(), hostile()
    for norm in (bad.bn1, bad.bn2, bad.bn3, bad.twice, bad.bn5):
        norm.running_mean.fill_(1e4)
        norm.running_var.fill_(1e-12)
    bad.bn2.running_var.fill_(float("nan"))
    calibrate(good, batches)
    found = calibrate(bad, batches)
    for name, tensor in good.state_dict().items():
        assert torch.equal(bad.state_dict()[name], tensor), name
    assert next(n for n in found.norms if n.name == "bn2").drift == float("inf")
    alone = [n.name for n in found.norms if any("single value" in note for note in n.notes)]
    assert alone == ["bn5"] * tail


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d, (9, 4)),
        (nn.BatchNorm1d, (9, 4, 5)),
        (nn.BatchNorm2d, (9, 4, 3, 2)),
        (nn.BatchNorm3d, (9, 4, 3, 2, 2)),
        (nn.SyncBatchNorm, (9, 4)),
        (nn.LazyBatchNorm2d, (9, 4, 3, 2)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_and_dtype(norm, shape, dtype):
    model = nn.Sequential(norm(4)) if norm is not nn.LazyBatchNorm2d else nn.Sequential(norm())
    x = torch.randn(shape) * 3 + 2
    if norm is nn.LazyBatchNorm2d:
        model(x)
    model, x = model.eval().to(dtype), x.to(dtype)
    found = calibrate(model, [x[:4], x[4:]]).norms[0]
    var, mean = torch.var_mean(x.double().movedim(1, -1).flatten(0, -2), 0)
    assert torch.allclose(found.mean, mean, rtol=1e-12)
    assert torch.allclose(found.var, var, rtol=1e-12)
    assert torch.equal(model[0].running_var, found.var.to(dtype))
    assert model[0].running_var.dtype == dtype
    assert any("rounded to" in note for note in found.notes) == (dtype.itemsize == 2)


def test_half_precision_statistics_stay_finite():
    model = nn.Sequential(nn.BatchNorm1d(2)).half().eval()
    model[0].float()
    model[0].running_mean, model[0].running_var = torch.zeros(2).half(), torch.ones(2).half()
    x = torch.randn(200, 2) * torch.tensor([1000.0, 1.0])
    found = calibrate(nn.Sequential(Widened(model[0])), [x]).norms[0]
    assert float(model[0].running_var[0]) == 65504
    assert "1 channels were beyond its range 65504" in found.notes[-1]


class Widened(nn.Module):
    """Statistics in float16, arithmetic in float32."""

    def __init__(self, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.norm.running_mean.float(), self.norm.running_var.float()
        weight, bias = self.norm.weight, self.norm.bias
        return nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.1, 1e-5)


def test_tracked_instance_norms_average_over_samples():
    model = nn.Sequential(
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.Conv2d(3, 2, 1)
    )
    model = model.double().eval()
    x = images(20)
    found = calibrate(model, x.split([7, 12, 1])).norms[0]
    assert found.count == 20
    assert torch.allclose(found.mean, x.mean((0, 2, 3)), rtol=1e-13)
    assert torch.allclose(found.var, x.var((2, 3)).mean(0), rtol=1e-12)


def test_functional_norms_with_buffers_of_their_own():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in (("a", 0.0), ("b", 1.0), ("c", 0.0), ("d", 1.0)):
                self.register_buffer(name, torch.full((3,), value, dtype=torch.float64))
            self.gamma = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.batch_norm(x, self.a, self.b, None, None, self.training, 0.1)
            return nn.functional.batch_norm(x * 2, self.c, self.d, self.gamma, None, self.training)

    model, x = Functional().eval(), images(20)
    found = calibrate(model, x.split(10))
    assert [norm.name for norm in found.norms] == ["a", "gamma"]
    assert torch.allclose(model.b, x.var((0, 2, 3)), rtol=1e-12)
    assert float(model.c.abs().max()) < 1e-12


class Noisy(nn.Module):
    """Draws in every forward pass, from all three sources."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.randn_like(x)
        x = x + torch.tensor([0, random.gauss(0, 1), np.random.standard_normal()])  # noqa: NPY002
        return self.norm(x)


def test_each_batch_draws_its_own_numbers():
    """Drawn alike in each, a mean would be off by the spread of the few values of one batch."""
    model, again = Noisy().eval(), Noisy().eval()
    data = [torch.zeros(16, 3, dtype=torch.float64)] * 400
    before = torch.get_rng_state()
    found = calibrate(model, data, tolerance=1e-4).norms[0]
    assert torch.equal(torch.get_rng_state(), before)
    # N(0, 1) of 6400 values; what Python and NumPy draw is one N(0, 1) a batch more.
    assert abs(float(found.mean[0])) < 4 * 6400**-0.5
    assert abs(float(found.var[0]) - 1) < 4 * (2 / 6400) ** 0.5
    assert float(found.mean[1:].abs().max()) < 4 * (1 / 6400 + 1 / 400) ** 0.5
    assert float((found.var[1:] - 2).abs().max()) < 4 * (2 / 400) ** 0.5 * 1.5
    assert found.error == pytest.approx((0.5 / 400) ** 0.5, rel=0.3)
    assert torch.equal(calibrate(again, data).norms[0].mean, found.mean)


def test_num_batches_tracked_is_what_an_average_needs():
    model = hostile()
    for norm in (model.bn1, model.bn2):
        norm.num_batches_tracked.fill_(3)
    model.bn3.num_batches_tracked.fill_(1000)
    calibrate(model, images(20).split(10))
    assert int(model.bn1.num_batches_tracked) == 29  # 0.9²⁹ < 0.05
    assert int(model.bn3.num_batches_tracked) == 1000
    assert int(model.twice.num_batches_tracked) == 2  # momentum None: a plain average


def test_calibrating_twice_changes_nothing():
    model = hostile()
    calibrate(model, images().split(10))
    before = copy.deepcopy(model.state_dict())
    again = calibrate(model, images().split(10))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert max(norm.drift for norm in again.norms) == 0
