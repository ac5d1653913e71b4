"""Statistics are pooled exactly: whatever the order and the sizes of the batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bnify
from bnify.pooled import PerInstance, Point, Pooled, pool
from bnify.structure import Call


def pooled(chunks, axis=1) -> Pooled:
    total = Pooled.empty(chunks[0].shape[axis])
    for chunk in chunks:
        total.add(chunk, axis)
    return total


def split(values, how):
    if how == "sorted":  # the loader's worst: every batch from another part of the distribution
        order = values.flatten(1).mean(1).argsort()
        return values[order].split(8)
    return {"whole": [values], "last-of-1": values.split(7), "singles": values.split(1)}[how]


@pytest.mark.parametrize("how", ["whole", "sorted", "last-of-1", "singles"])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e7])
def test_pooling_is_exact(how, offset):
    values = torch.randn(64, 5, 3, 2, dtype=torch.float64) + offset
    values += torch.linspace(-3, 3, 64, dtype=torch.float64).view(-1, 1, 1, 1)
    assert 64 % 7 == 1
    got = pooled(split(values, how))
    assert got.count == 64 * 6
    # Exact, so that the truth does not depend on how torch takes a variance of large numbers.
    centred = values - offset
    want_var, want_mean = torch.var_mean(centred.movedim(1, -1).reshape(-1, 5), 0)
    conditioning = max(1.0, offset)
    assert float((got.mean - offset - want_mean).abs().max()) < 1e-14 * conditioning
    assert float(((got.var - want_var) / want_var).abs().max()) < 1e-14 * conditioning


def test_pooling_channels_last_and_float32():
    values = torch.randn(50, 4, 6) * 1e-3 + 100  # float32 alone would lose the variance
    got = pooled(values.split(9), axis=2)
    want_var, want_mean = torch.var_mean(values.double().reshape(-1, 6), 0)
    assert torch.allclose(got.mean, want_mean, rtol=1e-13, atol=0)
    assert torch.allclose(got.var, want_var, rtol=1e-9, atol=0)


def test_merging_in_any_grouping():
    parts = [pooled([torch.randn(n, 3, dtype=torch.float64) * n]) for n in (1, 5, 2, 40)]
    left, right = Pooled.empty(3), Pooled.empty(3)
    for part in parts:
        left.merge(part)
    for part in reversed(parts):
        right.merge(part)
    assert left.count == right.count == 48
    assert torch.allclose(left.mean, right.mean, rtol=1e-13)
    assert torch.allclose(left.m2, right.m2, rtol=1e-12)


def test_nothing_and_one_value():
    empty = Pooled.empty(2)
    empty.merge(Pooled.empty(2))
    empty.add(torch.zeros(0, 2), 1)
    assert (empty.count, empty.var.tolist()) == (0, [0.0, 0.0])
    empty.add(torch.tensor([[3.0, -1.0]]), 1)
    assert (empty.count, empty.mean.tolist(), empty.var.tolist()) == (1, [3.0, -1.0], [0.0, 0.0])


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [
        (torch.float64, 1e6),
        (torch.float64, -1e12),
        (torch.float32, 1e6),
        (torch.bfloat16, 50.0),
        (torch.float16, 500.0),
    ],
)
def test_a_large_mean_does_not_hide_that_a_channel_varies(dtype, offset):
    """What counts is what the dtype can tell apart, and no other channel."""
    values = torch.randn(300, 3, dtype=torch.float64)
    values[:, 0] = 0.3  # which no dtype holds exactly
    values[:, 1] *= 1e-5
    values[:, 2] += offset
    got = pooled(values.to(dtype).split([100, 7, 193]))
    assert got.still.tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rounding_is_no_variation(dtype, scale):
    conv = nn.Conv2d(256, 8, 3).to(dtype)
    nn.init.uniform_(conv.weight, 0.5, 1)  # sums without cancellation
    pixel = (torch.rand(1, 256, 1, 1) * scale).to(dtype)
    with torch.no_grad():
        flat = [conv(pixel.expand(n, 256, 9, 9)) for n in (8, 5, 1)]
        zero = [torch.zeros_like(one) + conv.bias[:, None, None] * 1e3 for one in flat]
    assert pooled(flat).still.all()
    assert pooled(zero).still.all()


def test_the_coarsest_dtype_says_what_varies():
    values = torch.randn(300, 1, dtype=torch.float64) + 1e4
    parts = [values[:200], values[200:].bfloat16()]  # all of those are 9984
    assert not pooled(parts[:1]).still.any()
    assert pooled(parts).still.all()
    assert pooled(parts[::-1]).still.all()


def test_instance_statistics_vary_beside_a_large_mean():
    seen = PerInstance.empty(2)
    values = torch.randn(40, 2, 50, dtype=torch.float64) + 1e6
    values[:, 1] = 1e6 + 0.1
    seen.add(values, 1)
    assert seen.still.tolist() == [False, True]


class Stateful(nn.Module):
    """Counts its calls and fails on request."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.head = nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        if x.shape[0] == 13:
            raise RuntimeError("unlucky")
        return self.head(self.drop(torch.relu(self.a(x))))


def batches(*sizes):
    return [Call((torch.randn(n, 4),)) for n in sizes]


def test_a_pass_gives_everything_back():
    model = Stateful().train()
    model.drop.eval()
    data = batches(3, 5)
    state = torch.get_rng_state()
    pool(model, data, [Point("a", 1, 6)])
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert not model.a._forward_hooks
    with pytest.raises(bnify.PlanError, match="RuntimeError on batch 1 of the data: unlucky"):
        pool(model, batches(3, 13), [Point("a", 1, 6)])
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert not model.a._forward_hooks


def test_dropout_is_off_during_the_pass():
    model = Stateful().train()
    x = torch.randn(20, 4)
    stats = pool(model, [Call((x,))], [Point("drop", 1, 6)])["drop"][0]
    assert torch.allclose(stats.mean, torch.relu(model.a(x)).mean(0).double(), atol=1e-6)


def test_no_batches_and_no_finite_values():
    with pytest.raises(bnify.PlanError, match="no batch"):
        pool(Stateful(), [], [Point("a", 1, 6)])
    assert pool(Stateful(), [], []) == {}
    bad = torch.randn(4, 4)
    bad[2, 1] = float("nan")
    with pytest.raises(bnify.PlanError, match="output of a is not finite"):
        pool(Stateful(), [Call((bad,))], [Point("a", 1, 6)])


def test_the_users_model_is_not_run_for_calibration():
    model = Stateful()
    x = torch.randn(8, 4)
    bnify.insert(model, x, init="preserve", data=[x, x])
    assert float(model.calls) == 0


def test_each_call_is_measured_on_its_own():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(self.a(x))

    model, x = Twice(), torch.randn(30, 4)
    first, second = pool(model, [Call((b,)) for b in x.split(7)], [Point("a", 1, 4, calls=2)])["a"]
    assert first.count == second.count == 30
    assert torch.allclose(first.mean, model.a(x).mean(0).double(), atol=1e-6)
    assert torch.allclose(second.mean, model(x).mean(0).double(), atol=1e-6)
