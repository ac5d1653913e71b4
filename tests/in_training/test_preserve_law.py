"""The law of the product: fold(insert(m, init="preserve", data=d)) is m, for any m and any d."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import bnify
import laws
import nets
import zoo
from bnify import api
from bnify.layers import TokenNorm
from bnify.structure import Call, as_call
from foldnets import random_fold_network

CHUNKS = 10
#: What is asked of float64; a network that one unit in the last place moves more is measured by it.
EXACT = 1e-10


def random_data(x: Tensor, seed: int, sizes: tuple[int, ...] = (4, 1, 6)) -> list[Tensor]:
    """Batches of several sizes and spreads."""
    call = as_call(x)
    return [call.resized(size).redrawn(seed + i, 1.0 + i).args[0] for i, size in enumerate(sizes)]


def allowed(model: nn.Module, x: Any) -> float:
    return max(EXACT, 100 * laws.one_ulp_noise(model, x))


def assert_the_law(model: nn.Module, x: Any, data: list[Any], **options: Any) -> bnify.Result:
    """Before folding and after it, on the example and on other inputs of other sizes.

    Folding takes every norm away again, and gives the weights that folding the original gives.
    """
    inserted = bnify.insert(model, x, init="preserve", data=data, verify=False, **options)
    if not inserted.plan.edits:
        return inserted
    folded = bnify.fold(inserted.model, x, verify=False)
    for call in (as_call(x), as_call(x).redrawn(91).resized(3)):
        want, limit = laws.run64(model, call), allowed(model, call)
        assert laws.worst_error(want, laws.run64(inserted.model, call)) <= limit, "before folding"
        assert laws.worst_error(want, laws.run64(folded.model, call)) <= limit, "folded"
    left = norms_left(folded.model, inserted.plan)
    if options.get("position") == "after-act":  # some cannot pass what follows the activation
        left -= {skip.layer for skip in folded.plan.skips}
    assert not left
    assert_same_weights(bnify.fold(model, x, verify=False).model, folded)
    return inserted


def norms_left(model: nn.Module, plan: bnify.Plan) -> set[str]:
    """Paths of the batch norms that are still where the plan put one."""
    inserted = tuple(f"{edit.carrier}.norm".lstrip(".") for edit in plan.edits)
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and path.startswith(inserted)
    }


def assert_same_weights(plain: nn.Module, folded: bnify.Result) -> None:
    """Names and values, but for what folding a norm into a layer changes besides.

    A computed weight is baked, and a bias that was dropped comes back only where it is not 0.
    """
    want, got = plain.state_dict(), folded.model.state_dict()
    baked = {key.partition(".parametrizations.")[0] for key in want.keys() - got.keys()}
    stayed = tuple(f"{skip.layer}." for skip in folded.plan.skips)
    for key in got.keys() - want.keys():
        layer = key.rpartition(".")[0]
        assert layer in baked or key.endswith(".dropped_bias") or key.startswith(stayed), key
    for key in want.keys() - got.keys():
        assert ".parametrizations." in key or (key.endswith("bias") and not want[key].any()), key
    for key in want.keys() & got.keys():
        value = want[key].double()
        error = (value - got[key].double()).abs().max() if value.numel() else 0.0
        assert error <= EXACT * value.abs().max(), key


@pytest.mark.parametrize("number", range(CHUNKS))
def test_random_networks(number):
    """The generator of the fold tests: every layer, join, gate, pool and sharing there is."""
    done = 0
    for seed in laws.seeds(120)[number::CHUNKS]:
        net, x = random_fold_network(seed)
        net, x = net.double(), x.double() if x.is_floating_point() else x
        try:
            data = random_data(x, seed, (4, 2, 6))  # some norms take batch statistics in eval too
            done += bool(assert_the_law(net, x, data).plan.edits)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    assert done >= 2


@pytest.mark.parametrize("number", range(CHUNKS))
def test_random_networks_with_biases_dropped(number):
    done = 0
    for seed in laws.seeds(60)[number::CHUNKS]:
        net, x = laws.random_network(seed)
        net, x = net.double(), x.double()
        with torch.no_grad():
            for module in net.modules():
                if isinstance(getattr(module, "bias", None), Tensor):
                    module.bias.add_(3.0)
        try:
            result = assert_the_law(net, x, random_data(x, seed), drop_bias=True)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        done += any(edit.drop_bias for edit in result.plan.edits)
    assert done >= 3


@pytest.mark.parametrize("number", range(4))
def test_random_networks_with_norms_behind_activations(number):
    for seed in laws.seeds(24)[number::4]:
        net, x = laws.random_network(seed)
        net, x = net.double(), x.double()
        assert_the_law(net, x, random_data(x, seed), position="after-act")


@pytest.mark.parametrize("drop_bias", [False, True])
@pytest.mark.parametrize("make", [nets.Mixer, nets.BertLike, nets.TorchTransformer])
def test_token_norms(make, drop_bias):
    entry = zoo.entry(make.__name__)
    model, x = entry.build().double(), as_call(entry.inputs(4)).to(dtype=torch.float64)
    plan = api.plan(model, x, init="preserve")
    tokens = [s.layer for s in plan.skips if s.reason == bnify.Reason.TOKEN_LAYER]
    assert tokens
    result = assert_the_law(
        model, x, [x, x.redrawn(3, 2.0)], include=tuple(tokens), drop_bias=drop_bias
    )
    token_norms = [m for m in result.model.modules() if isinstance(m, TokenNorm)]
    assert len(token_norms) >= len(tokens)
    assert any(edit.tokens and edit.drop_bias for edit in result.plan.edits) == drop_bias


class Stream(IterableDataset):
    """Samples one after the other, of no known number."""

    def __init__(self, samples: Tensor) -> None:
        self.samples = samples

    def __iter__(self):
        yield from zip(self.samples, range(len(self.samples)), strict=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_over_a_stream(workers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    samples = 2 * torch.randn(37, 6, dtype=torch.float64) + 1
    loader = DataLoader(Stream(samples), batch_size=5, num_workers=workers)
    model_in = bnify.insert(model, samples[:4], init="preserve", data=loader).model
    seen = samples.repeat(max(workers, 1), 1)  # each worker has the whole stream, as torch has it
    var, mean = torch.var_mean(model[0](seen), 0)
    assert torch.allclose(model_in[0].norm.running_mean, mean, rtol=1e-12)
    assert torch.allclose(model_in[0].norm.running_var, var, rtol=1e-12)


def narrow(model: nn.Module, most: int = 32) -> nn.Module:
    """The same network, its hidden Linear layers cut to this width: a gigabyte less to copy."""
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for number, (name, linear) in enumerate(linears):
        before = linear.in_features if number == 0 else most
        after = linear.out_features if number + 1 == len(linears) else most
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Linear(before, after))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("drop_bias", [False, True])
@pytest.mark.parametrize("name", ["alexnet", "vgg11", "squeezenet1_1"])
def test_known_networks(name, drop_bias):
    entry = zoo.entry(name)
    model, x = narrow(entry.build()).double(), entry.inputs(2).double()
    result = assert_the_law(model, x, [x, x * 3 + 1], drop_bias=drop_bias)
    assert len(result.plan.edits) >= 7


# -- drift and what is said ------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


DATA = torch.randn(64, 6, generator=torch.Generator().manual_seed(5)) * 2 + 1


def sizes(**options: Any) -> list[int]:
    verification = bnify.insert(mlp(), DATA[:16], **options).verification
    drifts = verification.drift
    assert all(0 < drift.rel_l2 < 2 for drift in drifts)
    return [drift.batch_size for drift in drifts]


@pytest.mark.parametrize("init", ["preserve", "stats"])
def test_the_drift_is_measured_at_several_batch_sizes(init):
    assert sizes(init=init, data=[DATA]) == [2, 8, 16, 32]
    assert sizes(init=init, data=[DATA], batch_size=64) == [2, 8, 32, 64]
    assert sizes(init=init, data=[DATA[:5]]) == [2, 5]
    assert sizes(init=init) == [2, 8, 16]
    assert sizes(init="reset") == [16]


def test_small_batches_drift_more():
    drifts = bnify.insert(mlp(), DATA[:16], init="preserve", data=[DATA]).verification.drift
    assert drifts[0].rel_l2 > 2 * drifts[-1].rel_l2


def test_still_channels_are_counted_and_named():
    model = mlp()
    with torch.no_grad():
        model[2].weight[::2] = 0
    notes = bnify.insert(model, DATA[:16], init="preserve", data=[DATA], verify=False).plan.notes
    assert any("a layer has channels that do not vary" in n and "2 (4 of 8)" in n for n in notes)


def test_too_little_data_names_the_layer_that_has_least():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.fc(torch.relu(self.conv(x)).mean((2, 3)))))

    x = torch.randn(8, 3, 14, 14)  # 8 · 12 · 12 values behind the convolution
    notes = bnify.insert(Two(), x, init="preserve", data=[x], verify=False).plan.notes
    assert any("only 8 values a channel (behind fc)" in note for note in notes)


def test_keyword_calls_and_labels():
    inputs = {"input": DATA[:16]}
    model = mlp()
    result = bnify.insert(
        model, inputs, init="preserve", data=[{"input": DATA, "labels": DATA[:, 0]}]
    )
    assert (
        laws.worst_error(
            laws.run64(model, Call((), inputs)), laws.run64(result.model, Call((), inputs))
        )
        < 1e-6
    )
