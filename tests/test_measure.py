"""What an insertion measures on the user's data: statistics, drift, and what is said of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnify
from bnify.verdict import Drift


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


FAR = 50 + 0.01 * torch.randn(64, 6, generator=torch.Generator().manual_seed(1))


def drift(**options) -> Drift:
    result = bnify.insert(net(), FAR[:2], batch_size=32, **options)
    assert result.verification is not None
    return next(one for one in result.verification.drift if one.batch_size == 32)


def test_the_drift_is_measured_on_the_users_data_at_the_training_batch_size():
    alone, measured = drift(init="preserve"), drift(init="preserve", data=[FAR])
    assert (alone.batch_size, measured.batch_size) == (32, 32)
    assert measured.rel_l2 < 0.1 < alone.rel_l2  # the example's two rows know little of the data


def test_a_shuffling_loader_leaves_the_users_random_state_alone():
    loader = DataLoader(TensorDataset(FAR, torch.zeros(64)), batch_size=16, shuffle=True)
    model = net()
    for init in ("reset", "preserve"):
        torch.manual_seed(5)
        bnify.insert(model, FAR[:16], init=init, data=loader)
        after = torch.rand(3)
        torch.manual_seed(5)
        assert torch.equal(after, torch.rand(3))


def test_data_without_statistics_is_said_to_measure_the_drift_only():
    notes = bnify.insert(net(), FAR[:16], data=[FAR]).plan.notes
    assert any("train-mode drift only" in note for note in notes)


def test_a_generator_is_not_consumed_where_nothing_is_measured():
    batches = iter([FAR[:16], FAR[16:32]])
    bnify.insert(net(), FAR[:16], data=batches)
    assert len(list(batches)) == 2


def test_one_sample_is_one_value_and_its_drift_is_measured_on_more():
    result = bnify.insert(net(), FAR[:1], init="preserve")
    assert result.verification.passed
    assert result.verification.drift[-1].batch_size == 32
    assert any("only 1 values a channel" in note for note in result.plan.notes)
    assert any("batch size 32 assumed" in note for note in result.plan.notes)


@pytest.mark.parametrize(("scale", "still"), [(1e-8, False), (0.0, True)])
def test_small_is_not_still(scale, still):
    """A channel is called constant by its variance beside its size, not by an absolute number."""
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(scale)
        model[0].bias.mul_(scale)
    notes = bnify.insert(model, FAR[:16] - 50, init="preserve", data=[FAR - 50]).plan.notes
    assert any("do not vary" in note for note in notes) == still


@pytest.mark.parametrize("init", ["preserve", "stats"])
def test_the_drift_is_what_the_formula_of_batch_norm_gives(init):
    model, x = net().double(), 3 * torch.randn(40, 6, dtype=torch.float64) + 1
    result = bnify.insert(model, x[:32], init=init, data=[x])
    found = {one.batch_size: one.rel_l2 for one in result.verification.drift}
    with torch.no_grad():
        over_data = model[0](x)
        var, mean = torch.var_mean(over_data, 0)
        scale, shift = ((var + 1e-5).sqrt(), mean) if init == "preserve" else (1.0, 0.0)
        for size in (2, 8, 32):
            y = model[0](x[:size])
            spread = (y.var(0, correction=0) + 1e-5).sqrt()
            train = model[2](torch.relu((y - y.mean(0)) / spread * scale + shift))
            plain = model(x[:size])
            assert found[size] == pytest.approx(float((train - plain).norm() / plain.norm()))


def drift_sizes(data, example=FAR[:32], **options) -> list[int]:
    result = bnify.insert(net(), example, data=data, **options)
    return [one.batch_size for one in result.verification.drift]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_small_batches_of_data_are_joined_for_the_drift(size):
    loader = DataLoader(TensorDataset(FAR, torch.zeros(64)), batch_size=size)
    assert drift_sizes(loader, init="preserve") == [2, 8, 32]
    assert drift_sizes(loader, init="preserve", batch_size=50) == [2, 8, 32, 50]
    assert drift_sizes(loader, init="reset") == [32]
    joined = bnify.insert(net(), FAR[:32], init="preserve", data=loader).verification.drift
    whole = bnify.insert(net(), FAR[:32], init="preserve", data=[FAR]).verification.drift
    for a, b in zip(joined, whole, strict=True):
        assert a.rel_l2 == pytest.approx(b.rel_l2, rel=1e-3)


def test_one_sample_of_data_leaves_the_drift_to_the_example():
    result = bnify.insert(net(), FAR[:16], init="preserve", data=[FAR[:1]])
    assert [one.batch_size for one in result.verification.drift] == [2, 8, 16]
    assert any("compared on the example inputs" in note for note in result.plan.notes)


def test_data_of_different_lengths_is_measured_on_its_largest_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    model.append(nn.Linear(4, 2))
    data = [torch.randn(2, 3, 12), torch.randn(5, 3, 9), torch.randn(4, 3, 7)]
    result = bnify.insert(model, torch.randn(16, 3, 8), init="preserve", data=data)
    assert [one.batch_size for one in result.verification.drift] == [2, 5]
    assert any("up to 5 samples, not 16" in note for note in result.plan.notes)


def test_a_model_without_train_mode_at_a_size_says_so():
    class Fixed(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training or len(x) != 2
            return super().forward(x)

    result = bnify.insert(Fixed(*net()), FAR[:16], init="preserve", data=[FAR])
    assert [one.batch_size for one in result.verification.drift] == [8, 16, 32]
    notes = result.verification.notes
    assert any("could not be compared at batch size 2" in note for note in notes)


@pytest.mark.parametrize("init", ["reset", "preserve", "stats"])
def test_an_empty_batch_is_left_out(init):
    want = bnify.insert(net(), FAR[:16], init=init, data=[FAR])
    got = bnify.insert(net(), FAR[:16], init=init, data=[FAR[:0], FAR, FAR[:0]])
    assert got.verification.drift == want.verification.drift
    for a, b in zip(got.model.state_dict().values(), want.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("init", ["preserve", "stats"])
def test_data_without_a_sample_is_refused(init, verify):
    with pytest.raises(bnify.PlanError, match="the data holds no batch"):
        bnify.insert(net(), FAR[:16], init=init, data=[FAR[:0]], verify=verify)


@pytest.mark.parametrize("init", ["preserve", "stats"])
def test_a_layer_that_the_data_does_not_reach_is_refused(init):
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.a(x))
            return self.head(y if len(x) == 3 else torch.relu(self.b(y)))

    with pytest.raises(bnify.PlanError, match="b never ran on this data"):
        bnify.insert(Skipping(), FAR[:16], init=init, data=[FAR[:3]], verify=False)


@pytest.mark.parametrize("init", ["preserve", "stats"])
def test_channels_that_vary_by_less_than_eps_are_counted_and_named(init):
    model, x = net(), torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    assert not any("less than the norm's eps" in note for note in notes_of(model, x, init=init))
    with torch.no_grad():
        model[0].weight[:5] *= 1e-4
    (note,) = (note for note in notes_of(model, x, init=init) if "less than the norm's eps" in note)
    assert "a layer has channels" in note
    assert "first 0 (5 of 16 below eps 1e-05)" in note
    small = notes_of(model, x, init=init, eps=1e-12)
    assert not any("less than the norm's eps" in note for note in small)


def notes_of(model: nn.Module, x: torch.Tensor, **options) -> tuple[str, ...]:
    return bnify.insert(model, x[:16], data=[x], verify=False, **options).plan.notes


def test_a_second_insertion_says_nothing_of_a_start_that_nobody_asked_for():
    once = bnify.insert(net(), FAR[:16], init="preserve", data=[FAR]).model
    again = bnify.insert(once, FAR[:16], init="preserve", data=[FAR])
    assert again.plan.edits == ()
    assert not any("reset" in note for note in again.plan.notes)
