"""The law of folding, on random networks: the same function, and every norm accounted for."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import bnify
import laws
from bnify.structure import as_call, outputs_of
from counting import count_norms
from foldnets import RandomFoldNetwork, random_fold_network
from replaying import assert_untouched, fingerprint_of

CHUNKS = 10
SEEDS = 500


def chunk(count: int, number: int, times: int = 1) -> range:
    """Every ``CHUNKS``-th seed, so that workers share a property."""
    return laws.seeds(count, times)[number::CHUNKS]


def drawn_options(seed: int) -> dict[str, Any]:
    """Options of a fold, drawn by seed; a third of all folds has none."""
    rng = random.Random(seed)
    if rng.random() < 0.33:
        return {}
    options: dict[str, Any] = {
        name: True for name in ("affines", "merge", "partial", "untie") if rng.random() < 0.35
    }
    if rng.random() < 0.3:
        options["emit"] = "graph"
    return options


def in_double(seed: int) -> tuple[RandomFoldNetwork, torch.Tensor]:
    """A random network and its inputs in float64: a fold then rounds nowhere else."""
    net, x = random_fold_network(seed)
    return net.double(), x.double() if x.is_floating_point() else x


def assert_every_norm_is_listed(
    net: RandomFoldNetwork, plan: bnify.Plan, options: dict[str, Any]
) -> None:
    """Each norm that runs is an edit or a skip, once for every call at most."""
    listed = Counter([e.layer for e in plan.edits] + [s.layer for s in plan.skips])
    for use in net.norms:
        times = sum(listed[name] for name in use.names)
        assert 1 <= times <= use.calls, f"{use.names} is listed {times} times"
        if use.calls == 1 or options.get("emit") != "graph":
            edited = {e.layer for e in plan.edits} & set(use.names)
            assert not edited & {s.layer for s in plan.skips}, f"{use.names} is both"
    others = set(listed) - {name for use in net.norms for name in use.names}
    modules, tensors = dict(net.named_modules()), net.state_dict()
    assert all(name in modules or name in tensors for name in others), others
    if not options.get("affines") and not options.get("merge"):
        kinds = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
        assert all(isinstance(modules.get(name), kinds) for name in others), others


@pytest.mark.parametrize("number", range(CHUNKS))
def test_random_networks_fold_exactly(number):
    for seed in chunk(SEEDS, number, times=40):  # make fuzz: 20,000
        net, x = in_double(seed)
        options = drawn_options(seed)
        before = fingerprint_of(net)
        try:
            result = bnify.fold(net, x, verify=seed % 10 == 0, **options)
            assert_untouched(before, fingerprint_of(net))
            assert_every_norm_is_listed(net, result.plan, options)
            laws.assert_same_function(net, result.model, x)
            laws.assert_same_function(net, result.model, as_call(x).redrawn(seed))
            left, most = count_norms(result.model, x), count_norms(net, x)
            assert left.batch <= most.batch, "more norms than before"
            if "emit" not in options and seed % 5 == 0:
                laws.assert_same_function(net, result.model, as_call(x).resized(5))
        except Exception as error:
            error.add_note(f"seed {seed}, options {options}")
            raise


@pytest.mark.parametrize("number", range(CHUNKS))
def test_recordings_of_random_folds_agree_with_the_model(number):
    """The graph and the module tree are two realisations of one plan."""
    for seed in chunk(100, number):
        net, x = in_double(seed)
        result = bnify.fold(net, x, verify=False, **drawn_options(seed))
        with torch.no_grad():
            want = [t for _, t in outputs_of(result.model(x.clone()))]
            got = [t for _, t in outputs_of(result.graph(x.clone()))]
        allowed = max(1e-12, 100 * laws.one_ulp_noise(net, x))
        assert laws.worst_error(want, got) <= allowed, seed


@pytest.mark.parametrize("number", range(CHUNKS))
def test_plans_of_random_folds_apply_to_a_fresh_instance(number):
    for seed in chunk(50, number):
        net, x = in_double(seed)
        result = bnify.fold(net, x, verify=False)
        plan = bnify.Plan.from_json(result.plan.to_json())
        assert plan == result.plan, seed
        fresh = bnify.apply(in_double(seed)[0], plan, x, verify=False).model
        laws.assert_same_function(net, fresh, x)


def test_random_networks_are_the_same_for_the_same_seed():
    for seed in (0, 1, 17):
        (a, x), (b, y) = random_fold_network(seed), random_fold_network(seed)
        assert a.signature == b.signature
        assert torch.equal(x, y)
        assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_random_networks_hold_every_kind_of_step():
    """What is never drawn is never tested."""
    seen: Counter[str] = Counter()
    signatures = set()
    for seed in range(300):
        net, x = random_fold_network(seed)
        signatures.add(net.signature)
        for step in net.steps:
            seen[type(net.layers[step.layer]).__name__ if step.layer else step.op] += 1
        with torch.no_grad():
            assert all(t.isfinite().all() for _, t in outputs_of(net(x.clone()))), seed
    assert len(signatures) == 300
    wanted = {"Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "Linear", "Embedding"}
    wanted |= {"ParametrizedConv2d", "ParametrizedLinear", "conv", "linear", "matmul", "norm"}
    wanted |= {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "InstanceNorm2d", "SyncBatchNorm"}
    wanted |= {"FrozenScale", "FrozenSteps", "FrozenCall", "NormAct", "NormThenRelu", "LayerNorm"}
    wanted |= {"GroupNorm", "RMSNorm", "LayerScale", "pool", "mean", "interpolate", "pad", "part"}
    wanted |= {"cat", "add", "add_", "relu_", "sub", "split", "times", "pixel_shuffle", "position"}
    assert wanted <= set(seen), wanted - set(seen)
