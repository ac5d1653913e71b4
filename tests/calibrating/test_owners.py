"""Whose statistics are whose: shared scales and buffers, tensors put in their place, any axis."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from normed import images
from torch import Tensor, nn
from torch.func import functional_call

import bnify
from bnify.calibrations import calibrate


def double(*modules: nn.Module) -> list[nn.Module]:
    return [module.double().eval() for module in modules]


# -- shared tensors -------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two norms, the second on values far from the first's."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.a, self.b = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * 2 + 700)


def test_a_scale_may_be_shared_with_a_norm_without_statistics():
    model = Pair(*double(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)))
    model.b.weight = model.a.weight
    x = images()
    found = calibrate(model, x.split(20))
    assert [(norm.name, norm.count) for norm in found.norms] == [("a", 61 * 36)]
    assert torch.allclose(model.a.running_mean, x.mean((0, 2, 3)), rtol=1e-12)


def test_functional_norms_may_share_a_scale():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in (("a", 0.0), ("b", 1.0), ("c", 0.0), ("d", 1.0)):
                self.register_buffer(name, torch.full((3,), value, dtype=torch.float64))
            self.gamma = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            x = F.batch_norm(x, self.a, self.b, self.gamma)
            x = F.batch_norm(x * 2 + 700, None, None, self.gamma, training=True)
            return F.batch_norm(x - 5, self.c, self.d, self.gamma)

    model, x = Functional().eval(), images(20)
    calibrate(model, x.split(10))
    assert torch.allclose(model.a, x.mean((0, 2, 3)), rtol=1e-12)
    assert torch.allclose(model.c, torch.full_like(model.c, -5), rtol=1e-12)


def test_norms_that_share_their_statistics_are_both_reported():
    model = Pair(*double(nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    model.b.running_mean, model.b.running_var = model.a.running_mean, model.a.running_var
    found = calibrate(model, images().split(10), tolerance=1e-6)
    first, second = found.norms
    assert (first.name, second.name) == ("a", "b")
    assert first.updated
    assert second.updated
    assert first.count == second.count == 2 * 61 * 36
    assert first.error == second.error
    for norm in found.norms:
        assert torch.equal(norm.mean, model.a.running_mean)
        assert torch.equal(norm.var, model.b.running_var)


# -- tensors in place of buffers ------------------------------------------------------------------


class Replaced(nn.Module):
    """Norms that run on copies of their tensors, which are gone before the next ones are made."""

    def __init__(self, norms: int = 6) -> None:
        super().__init__()
        layers = [(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(norms)]
        self.one = nn.Sequential(*(layer for pair in layers for layer in pair)).double()
        self.other = copy.deepcopy(self.one)

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.one, self.other):
            state = {name: tensor.clone() for name, tensor in part.state_dict().items()}
            x = functional_call(part, state, (x,))
            del state
        return x


def test_functional_call_gives_every_norm_its_own_statistics():
    torch.manual_seed(0)
    model = Replaced().eval()
    plain = copy.deepcopy(nn.Sequential(model.one, model.other))
    data = images().split(20)
    found, want = calibrate(model, data), calibrate(plain, data)
    names = [norm.name.replace("0.", "one.", 1) for norm in want.norms[:6]]
    names += [norm.name.replace("1.", "other.", 1) for norm in want.norms[6:]]
    assert [norm.name for norm in found.norms] == names
    for norm, other in zip(found.norms, want.norms, strict=True):
        assert norm.count == other.count == 61 * 36
        assert torch.equal(norm.mean, other.mean)
        assert torch.equal(norm.var, other.var)


def test_functional_norms_under_functional_call():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("m", torch.zeros(3))
            self.register_buffer("v", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.m, self.v)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(Functional() for _ in range(4)).double()

        def forward(self, x: Tensor) -> Tensor:
            for shift, part in enumerate(self.parts):
                state = {name: tensor.clone() for name, tensor in part.state_dict().items()}
                x = functional_call(part, state, (x + shift,))
                del state
            return x

    model = Outer().eval()
    found = calibrate(model, images().split(20))
    assert [norm.name for norm in found.norms] == [f"parts.{i}.m" for i in range(4)]
    assert [norm.count for norm in found.norms] == [61 * 36] * 4
    for shift in (1, 2, 3):
        assert torch.allclose(found.norms[shift].mean, torch.full((3,), float(shift)).double())


# -- the axis of the channels ---------------------------------------------------------------------


class ByHand(nn.Module):
    """A look-alike with its channels on any axis; its first channel has a scale of 0."""

    def __init__(self, channels: int, axis: int, after=torch.relu) -> None:
        nn.Module.__init__(self)  # of whatever else it is, the class is what counts
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.weight = nn.Parameter((torch.arange(channels) > 0).float())
        self.momentum, self.axis, self.after = 0.1, axis, after

    def forward(self, x: Tensor) -> Tensor:
        shape = [-1 if axis == self.axis % x.ndim else 1 for axis in range(x.ndim)]
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return self.after((x - self.running_mean.view(shape)) * scale.view(shape))


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(16, 8, 8), (4, 8, 5, 8), (16, 8)])
@pytest.mark.parametrize("kind", [nn.Module, nn.BatchNorm1d])
def test_as_many_tokens_as_channels(axis, shape, kind):
    class Norm(ByHand, kind):
        pass

    model = nn.Sequential(Norm(8, axis)).double().eval()
    x = torch.randn(shape, dtype=torch.float64) * torch.arange(1, 9)
    x += 100 * torch.arange(8).view(-1, *[1] * (x.ndim - 2))
    found = calibrate(model, [x, 2 * x]).norms[0]
    both = torch.cat([x, 2 * x]).movedim(axis, -1).flatten(0, -2)
    var, mean = torch.var_mean(both, 0)
    assert found.count == len(both)
    assert torch.allclose(found.mean, mean, rtol=1e-12)
    assert torch.allclose(found.var, var, rtol=1e-12)


@pytest.mark.parametrize("after", [lambda y: y.softmax(1), lambda y: y.flip(1), lambda y: y.sum()])
def test_an_axis_that_cannot_be_told_is_not_guessed(after):
    model = nn.Sequential(nn.BatchNorm1d(8), ByHand(8, 1, after)).eval()
    found = calibrate(model, torch.randn(16, 8, 8))
    assert [norm.name for norm in found.updated] == ["0"]
    assert [norm.name for norm in found.left] == ["1"]
    assert "two axes" in found.left[0].notes[0]
    with pytest.raises(bnify.PlanError, match="no norm could be calibrated"):
        calibrate(model[1:], torch.randn(16, 8, 8))
    assert calibrate(model, torch.randn(16, 8, 5)).left == ()
