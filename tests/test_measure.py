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
