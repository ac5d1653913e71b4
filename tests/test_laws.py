"""The test helpers themselves: a helper that cannot see a fault would make every test pass."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import laws
import zoo
from bnify.structure import as_call, outputs_of

COUNT = 200


def test_random_networks_are_distinct_reproducible_and_finite():
    signatures = set()
    for seed in range(COUNT):
        net, x = laws.random_network(seed)
        signatures.add(net.signature)
        with torch.no_grad():
            for _, value in outputs_of(net(x)):
                assert value.isfinite().all(), seed
                assert value.double().std() > 1e-9, seed
    assert len(signatures) == COUNT
    again, x = laws.random_network(5)
    first, y = laws.random_network(5)
    assert torch.equal(x, y)
    assert laws.worst_error(laws.run64(first, x), laws.run64(again, y)) == 0


def test_random_networks_train():
    for seed in range(0, COUNT, 10):
        net, x = laws.random_network(seed)
        result = laws.training_step(net, x)
        used = {s.layer for s in net.steps}
        assert {name.split(".")[1] for name in result} <= used


def test_random_networks_cover_the_vocabulary():
    ops, layers = set(), set()
    for seed in range(COUNT):
        net, _ = laws.random_network(seed)
        ops |= {s.op for s in net.steps}
        layers |= {type(m).__name__ for m in net.layers.values()}
    assert {"add", "add_", "cat", "gate", "max_pool", "avg_pool", "mean", "flatten"} <= ops
    assert {"Linear", "Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"} <= layers
    assert {"BatchNorm1d", "BatchNorm2d", "ReLU", "GELU"} <= layers


def test_hostile_norms_have_every_trap():
    norm = laws.hostile_(nn.BatchNorm2d(256))
    assert (norm.weight < 0).any()
    assert (norm.weight == 0).any()
    assert (norm.running_var < norm.eps).any()
    assert norm.running_mean.std() > 0.1
    assert norm.num_batches_tracked == 1000


@pytest.mark.parametrize("fault", ["weight", "bias", "eps", "mean", "swap", "nan"])
def test_a_planted_fault_is_seen(fault):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    laws.hostile_(model, 3)
    broken = copy.deepcopy(model)
    x = torch.randn(4, 3, 8, 8)
    laws.assert_same_function(model, broken, x)
    with torch.no_grad():
        match fault:
            case "weight":
                broken[0].weight *= 1 + 1e-6
            case "bias":
                broken[1].bias[2] += 1e-6
            case "eps":
                broken[1].eps *= 1.001
            case "mean":
                broken[1].running_mean[0] += 1e-6
            case "swap":
                broken[1].weight.copy_(broken[1].weight.flip(0))
            case "nan":
                broken[3].bias[0] = math.nan
    with pytest.raises(AssertionError, match="outputs differ"):
        laws.assert_same_function(model, broken, x)


@pytest.mark.parametrize("entry", list(zoo.small()), ids=lambda e: e.name)
def test_small_zoo_builds_runs_and_repeats(entry):
    model, inputs = entry.build(), entry.inputs()
    with torch.no_grad():
        first = outputs_of(as_call(inputs)(model))
        again = outputs_of(as_call(entry.inputs())(entry.build()))
    assert first
    for (name, want), (_, got) in zip(first, again, strict=True):
        assert want.isfinite().all(), name
        assert torch.equal(want, got), name


def test_the_zoo_is_large_enough():
    names = [entry.name for entry in zoo.ZOO]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("torchvision:") for name in names) >= 20
    assert sum(name.startswith("timm:") for name in names) >= 30
    assert zoo.entry("resnet18").name == "torchvision:resnet18"
    with pytest.raises(KeyError):
        zoo.entry("resnet19")
