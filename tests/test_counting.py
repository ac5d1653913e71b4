"""The ruler of the fold benchmarks: it must see every spelling, and only norms of values."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from counting import NormCount, count_norms


class Frozen(nn.Module):
    """A look-alike of a batch norm: four buffers, one multiplication."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class Of(nn.Module):
    """A module that runs a function with itself as the first argument."""

    def __init__(self, function, **children) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args):
        return self.function(self, *args)


def image():
    return torch.randn(2, 4, 6, 6)


def parameter(*shape):
    return nn.Parameter(torch.rand(*shape) + 0.5)


def functional(m, x):
    return F.batch_norm(x, m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias)


def standardised(m, x):
    weight = F.batch_norm(m.conv.weight.reshape(1, 4, -1), None, None, training=True)
    return F.conv2d(x, weight.reshape_as(m.conv.weight))


CASES = {
    "module": (nn.BatchNorm2d(4), NormCount(1, 0, 0)),
    "functional": (Of(functional, bn=nn.BatchNorm2d(4)), NormCount(1, 0, 0)),
    "batch statistics": (nn.BatchNorm2d(4, track_running_stats=False), NormCount(1, 0, 0)),
    "called twice": (Of(lambda m, x: m.n(m.n(x)), n=nn.BatchNorm2d(4)), NormCount(2, 0, 0)),
    "not called": (Of(lambda m, x: x + 1, n=nn.BatchNorm2d(4)), NormCount(0, 0, 0)),
    "frozen": (Frozen(4), NormCount(0, 0, 1, 1)),
    "weight standardisation": (
        Of(standardised, conv=nn.Conv2d(4, 4, 3)),
        NormCount(0, 0, 0, 0, 1),
    ),
    "instance, running": (nn.InstanceNorm2d(4, track_running_stats=True), NormCount(1, 0, 0)),
    "instance": (nn.InstanceNorm2d(4), NormCount(0, 1, 0)),
    "group": (nn.GroupNorm(2, 4), NormCount(0, 1, 0)),
    "layer": (nn.LayerNorm(6), NormCount(0, 1, 0)),
    "layer scale": (Of(lambda m, x: x * m.g, g=parameter(6)), NormCount(0, 0, 1)),
    "layer scale of ones": (
        Of(lambda m, x: x * m.g, g=nn.Parameter(torch.ones(6))),
        NormCount(0, 0, 1, neutral=1),
    ),
    "a number": (Of(lambda m, x: x * m.g / 3, g=parameter(1)), NormCount(0, 0, 0)),
    "division": (Of(lambda m, x: x / m.g, g=parameter(4, 1, 1)), NormCount(0, 0, 1)),
    "in place": (Of(lambda m, x: (x + 1).mul_(m.g), g=parameter(4, 1, 1)), NormCount(0, 0, 1)),
    "addcmul": (
        Of(lambda m, x: torch.addcmul(m.g, x, m.g), g=parameter(4, 1, 1)),
        NormCount(0, 0, 1),
    ),
    "per position": (Of(lambda m, x: x * m.g, g=parameter(4, 6, 6)), NormCount(0, 0, 0)),
    "gate": (Of(lambda m, x: x * x.mean((2, 3), keepdim=True).sigmoid()), NormCount(0, 0, 0)),
    "of weights": (
        Of(lambda m, x: F.linear(x, m.w * m.g), w=parameter(6, 6), g=parameter(6)),
        NormCount(0, 0, 0),
    ),
    "through data": (Of(lambda m, x: m.n((x + 1).data), n=nn.BatchNorm2d(4)), NormCount(1, 0, 0)),
    "through a written buffer": (
        Of(lambda m, x: m.n(torch.zeros(x.shape).copy_(x)), n=nn.BatchNorm2d(4)),
        NormCount(1, 0, 0),
    ),
    "of a shape": (Of(lambda m, x: x + m.n(torch.ones_like(x)), n=nn.BatchNorm2d(4)), None),
}


@pytest.mark.parametrize("name", CASES)
def test_what_counts(name: str) -> None:
    model, want = CASES[name]
    assert count_norms(model, image()) == (want or NormCount(0, 0, 0))


def test_the_mode_and_the_buffers_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).train()
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    assert count_norms(model, image()).batch == 1
    assert [m.training for m in model.modules()] == [True, False, True]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_scripted_and_frozen_modules_are_counted_too() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    with torch.no_grad():
        traced = torch.jit.trace(model.eval(), image(), check_trace=False)
        frozen = torch.jit.freeze(traced)
    assert count_norms(traced, image()).batch == 2
    assert count_norms(frozen, image()).batch == 1


def test_a_scale_left_in_place_of_a_norm_is_a_norm_left() -> None:
    def scaled(n: int) -> nn.Module:
        return nn.Sequential(*(Of(lambda m, x: x * m.g, g=parameter(6)) for _ in range(n)))

    before = count_norms(nn.Sequential(nn.BatchNorm2d(4), Frozen(4), scaled(1)), image())
    assert (before.affine, before.scales) == (2, 2)
    assert count_norms(scaled(1), image()).left(before) == 0  # the LayerScale that was there
    assert count_norms(scaled(2), image()).left(before) == 1
    assert count_norms(scaled(0), image()).left(before) == 0
