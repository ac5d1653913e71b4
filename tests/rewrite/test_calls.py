"""Layers that run several times, and norms behind activations."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import bnify
import laws
import nets
from bnify.layers import CallNorms

with_space = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)
    )


# -- several calls ---------------------------------------------------------------------------------


class Repeated(nn.Module):
    """One layer, three calls on different populations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(self.a(x * 3 + 1))
        if self.fail:
            raise RuntimeError("in the middle")
        return self.head(torch.relu(self.a(x - 5)))


def test_each_call_has_its_own_norm():
    x = torch.randn(64, 6)
    model = Repeated()
    result = bnify.insert(model, x, per_call=True, init="preserve", data=x)
    (edit,) = result.plan.edits
    assert (edit.calls, result.verification.passed) == (3, True)
    norms = result.model.a.norm.norms()
    first = model.a(x)
    second = model.a(torch.relu(first) * 3 + 1)
    third = model.a(torch.relu(second) - 5)
    for norm, seen in zip(norms, (first, second, third), strict=True):
        assert torch.allclose(norm.running_mean, seen.mean(0), atol=1e-5)
        assert torch.allclose(norm.running_var, seen.var(0), rtol=1e-4)
    assert laws.relative_error(model(x), result.model.eval()(x)) < 1e-5
    laws.training_step(result.model, x)
    assert [int(n.num_batches_tracked) for n in norms] == [1, 1, 1]


def test_every_forward_starts_at_the_first_norm():
    x = torch.randn(16, 6)
    model = bnify.insert(Repeated(), x, per_call=True).model
    laws.hostile_(model)
    model.eval()
    want = model(x)
    assert torch.equal(model(x), want)
    model.fail = True
    with pytest.raises(RuntimeError, match="in the middle"):
        model(x)
    model.fail = False
    assert torch.equal(model(x), want)
    assert torch.equal(copy.deepcopy(model)(x), want)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(x), want)
    assert torch.equal(loaded(x), want)
    state = dict(model.state_dict())
    assert torch.equal(torch.func.functional_call(model, state, (x,)), want)


def test_tied_layers_get_a_norm_each():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.head(torch.relu(self.b(torch.relu(self.a(x)))))

    x = torch.randn(16, 6)
    result = bnify.insert(Tied(), x, per_call=True, init="preserve", data=x)
    assert [e.layer for e in result.plan.edits] == ["a", "b"]
    assert result.model.a.norm is not result.model.b.norm
    assert result.model.a.weight is result.model.b.weight
    assert result.verification.passed


def test_siamese_per_call_on_every_kind():
    pair = (torch.randn(16, 10), torch.randn(16, 10) * 2 + 1)
    for norm in ("batch", "sync", "group", "layer", "rms", "batch-noaffine"):
        result = bnify.insert(nets.Siamese(), pair, per_call=True, norm=norm)
        assert isinstance(result.model.encoder[0].norm, CallNorms)
        assert result.verification.passed
    dropped = bnify.insert(nets.Siamese(), pair, per_call=True, drop_bias=True)
    assert dropped.verification.passed


# -- after the activation --------------------------------------------------------------------------


def test_after_act_puts_the_norm_on_the_activation():
    x = torch.randn(64, 6)
    model = mlp()
    result = bnify.insert(model, x, position="after-act", init="preserve", data=x)
    assert sorted(set(result.model.state_dict()) - set(model.state_dict()))[0] == "1.norm.bias"
    assert type(result.model[1]).__name__ == "ReLUNorm"
    assert isinstance(result.model[1], nn.ReLU)
    assert torch.allclose(
        result.model[1].norm.running_mean, torch.relu(model[0](x)).mean(0), atol=1e-6
    )
    assert result.verification.passed


def test_after_act_behind_an_inplace_activation():
    x = torch.randn(8, 6)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    for norm in ("batch", "layer", "rms"):
        assert bnify.insert(model, x, position="after-act", norm=norm).verification.passed


@pytest.mark.parametrize("activation", [nn.PReLU(8), nn.GLU(), nn.Softplus(), nn.Hardswish()])
def test_after_act_behind_other_activations(activation):
    x = torch.randn(8, 6)
    width = 4 if isinstance(activation, nn.GLU) else 8
    model = nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(width, 2))
    result = bnify.insert(model, x, position="after-act")
    assert [(e.carrier, e.channels) for e in result.plan.edits] == [("1", width)]
    assert result.verification.passed


class Shared(nn.Module):
    """Runs its layer as often as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, times: int = 2) -> torch.Tensor:
        for _ in range(times):
            x = torch.relu(self.layer(x))
        return x


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Shared(), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


def test_the_count_restarts_where_all_calls_are_and_not_at_the_root_only():
    x = torch.randn(8, 6)
    model = bnify.insert(Around(), x, per_call=True).model.eval()
    for number, norm in enumerate(model.encoder.layer.norm.norms()):
        nn.init.constant_(norm.weight, 1.0 + number)
    once = model.encoder(x)
    assert torch.equal(model.encoder(x), once)
    model.encoder(x, times=1)  # stopped half-way
    assert torch.equal(model(x), model.head(once))


def test_a_call_too_many_is_an_error_and_not_another_norm():
    x = torch.randn(8, 6)
    model = bnify.insert(Around(), x, per_call=True).model
    with pytest.raises(RuntimeError, match="norms for 2 calls and is called once more"):
        model.encoder(x, times=3)


def test_calls_in_checkpoints_of_their_own_are_refused():
    """Recomputed last first, they would meet each other's norms."""
    from torch.utils.checkpoint import checkpoint

    class Net(Around):
        def forward(self, x):
            for _ in range(3):
                x = checkpoint(lambda t: torch.relu(self.encoder.layer(t)), x, use_reentrant=False)
            return self.head(x)

    with pytest.raises(bnify.VerificationError, match="activation checkpointing"):
        bnify.insert(Net(), torch.randn(8, 6), per_call=True)
