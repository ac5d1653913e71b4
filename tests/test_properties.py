"""Laws of the whole line, on random networks and on the small half of the zoo."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bnify
import laws
import zoo
from bnify.capture import record
from bnify.structure import as_call, outputs_of

CHUNKS = 10


def chunk(count: int, number: int) -> range:
    """Every ``CHUNKS``-th seed, so that workers share a property."""
    return laws.seeds(count)[number::CHUNKS]


def outputs(model: nn.Module, inputs) -> list[torch.Tensor]:
    with torch.no_grad():
        return [tensor for _, tensor in outputs_of(as_call(inputs).clone()(model))]


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("entry", list(zoo.small()), ids=lambda e: e.name)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_recording_of_the_zoo_replays(entry, train):
    model, inputs = entry.build(), entry.inputs()
    laws.hostile_(model)
    before = tensors(model)
    captured = record(model, inputs, train=train)
    assert all(torch.equal(before[name], value) for name, value in tensors(model).items())
    assert not any(module.training for module in model.modules())
    if train:
        return
    # Recording turns fused attention off, which rounds differently.
    assert laws.worst_error(outputs(model, inputs), captured.replay()) < 1e-5


@pytest.mark.parametrize("number", range(CHUNKS))
def test_recordings_of_random_networks_replay(number):
    for seed in chunk(200, number):
        net, x = laws.random_network(seed)
        assert laws.worst_error(outputs(net, x), record(net, x).replay()) == 0, seed


@pytest.mark.parametrize("number", range(CHUNKS))
def test_preserve_keeps_random_networks_the_same_function(number):
    for seed in chunk(200, number):
        # In float64 from the start: scales rounded to float32 are another function by 1e-8.
        net, x = (part.double() for part in laws.random_network(seed, batch=16))
        before = tensors(net)
        result = bnify.insert(net, x, init="preserve", data=[x], verify=False)
        assert all(torch.equal(before[name], value) for name, value in tensors(net).items()), seed
        laws.assert_same_function(net, result.model.eval(), x)


@pytest.mark.parametrize("number", range(CHUNKS))
def test_every_norm_in_random_networks_runs_and_learns(number):
    for seed in chunk(100, number):
        net, x = laws.random_network(seed, batch=16)
        result = bnify.insert(net, x, verify=False)
        reference, model = copy.deepcopy(net), result.model
        idle = laws.training_step(reference, x)
        without = set(laws.training_step(model, x)) - set(idle)
        old = set(net.state_dict())
        counts = {
            name: int(value)
            for name, value in model.state_dict().items()
            if name.endswith("num_batches_tracked") and name not in old
        }
        assert all(count == 1 for count in counts.values()), (seed, counts)
        assert not without, (seed, without)


@pytest.mark.parametrize("number", range(CHUNKS))
def test_inserting_twice_in_random_networks_changes_nothing(number):
    for seed in chunk(100, number):
        net, x = laws.random_network(seed, batch=16)
        once = bnify.insert(net, x, verify=False)
        twice = bnify.insert(once.model, x, verify=False)
        assert twice.plan.edits == (), seed


@pytest.mark.parametrize("number", range(CHUNKS))
def test_plans_of_random_networks_apply_to_a_fresh_instance(number):
    for seed in chunk(50, number):
        net, x = laws.random_network(seed, batch=16)
        result = bnify.insert(net, x, norm="group", verify=False)
        plan = bnify.Plan.from_json(result.plan.to_json())
        assert plan == result.plan, seed
        fresh = bnify.apply(laws.random_network(seed)[0], plan, x, verify=False).model
        fresh.load_state_dict(result.model.state_dict())
        want, got = outputs(result.model.eval(), x), outputs(fresh.eval(), x)
        assert laws.worst_error(want, got) == 0, seed


def test_random_networks_verify():
    """The whole line with its own checks on: no false alarm."""
    for seed in laws.seeds(10):
        net, x = laws.random_network(seed, batch=16)
        result = bnify.insert(net, x)
        assert result.verification.passed, seed
