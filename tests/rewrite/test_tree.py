"""The rewritten module tree behaves as the user's own model: copies, pickles, scripts, loads."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import bnify
import laws
import zoo
from bnify.layers import OnDemand, normed_class

with_space = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}


class Padded(nn.Conv2d):
    """A convolution of the user's own, importable, with its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 0, 0, 1)))


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)
    )


def cnn(kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(
        kind(3, 8, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 49, 3),
    )


def same(a: nn.Module, b: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(a(x), b(x))


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """After a few steps no two tensors are alike."""
    for _ in range(3):
        laws.training_step(model, x, lr=0.05)
    return model.eval()


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", list(zoo.small()), ids=lambda e: e.name)
def test_old_checkpoints_load_and_only_norm_keys_are_new(entry):
    model = entry.build()
    result = bnify.insert(model, entry.inputs(), verify=False, include="*", batch_size=32)
    old, new = model.state_dict(), result.model.state_dict()
    carriers = {e.carrier for e in result.plan.edits}
    assert set(old) <= set(new)
    assert {key.partition(".norm.")[0] for key in set(new) - set(old)} == carriers
    changed = model.state_dict()  # with its metadata, which some models ask for
    changed.update({key: value + 1 for key, value in old.items()})
    loaded = result.model.load_state_dict(changed, strict=False)
    assert loaded.unexpected_keys == []
    # torch fills in num_batches_tracked by itself.
    assert set(loaded.missing_keys) <= set(new) - set(old)
    after = result.model.state_dict()
    assert all(torch.equal(after[key], changed[key]) for key in changed)


def test_layers_stay_what_they_were():
    model = mlp()
    model[0].custom = "mine"
    model[0].weight.tag = 7
    result = bnify.insert(model, torch.randn(4, 6)).model
    assert isinstance(result[0], nn.Linear)
    assert result[0].custom == "mine"
    assert type(result) is nn.Sequential
    assert type(result[4]) is nn.Linear
    assert type(result[0]).__name__ == "LinearNorm"
    assert "in_features=6" in repr(result)
    assert [n for n, _ in result[0].named_children()] == ["norm"]


def test_the_norm_follows_the_mode_of_its_layer():
    model = mlp().train()
    model[2].eval()
    result = bnify.insert(model, torch.randn(4, 6)).model
    assert (result.training, result[0].norm.training, result[2].norm.training) == (
        True,
        True,
        False,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_has_the_dtype_of_its_layer(dtype):
    result = bnify.insert(mlp().to(dtype), torch.randn(4, 6, dtype=dtype))
    assert result.model[0].norm.weight.dtype == dtype
    assert result.model(torch.randn(4, 6, dtype=dtype)).dtype == dtype
    assert result.verification.passed


def test_a_single_layer_as_the_whole_model():
    x = torch.randn(4, 6)
    result = bnify.insert(nn.Linear(6, 8), x, include="*")
    assert [e.layer for e in result.plan.edits] == [""]
    assert sorted(result.model.state_dict())[:2] == ["bias", "norm.bias"]
    assert result.verification.passed


# -- copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "inputs", "options"),
    [
        (mlp, (4, 6), {}),
        (mlp, (4, 6), {"position": "after-act"}),
        (mlp, (4, 6), {"norm": "rms"}),
        (cnn, (4, 3, 8, 8), {}),
        (cnn, (4, 3, 8, 8), {"norm": "rms", "position": "after-act"}),
        (lambda: cnn(Padded), (4, 3, 8, 8), {"drop_bias": True}),
    ],
)
def test_copies_and_pickles(make, inputs, options):
    if make is not mlp and make is not cnn:
        inputs = (4, 3, 7, 7)
    x = torch.randn(*inputs)
    model = trained(bnify.insert(make(), x, verify=False, **options).model, x)
    y = torch.randn(*inputs)
    assert same(model, copy.deepcopy(model), y)
    assert same(model, copy.deepcopy(copy.deepcopy(model)), y)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert same(model, loaded, y)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert same(model, pickle.loads(pickle.dumps(model)), y)
    fresh = bnify.insert(make(), x, verify=False, **options).model.eval()
    assert not same(model, fresh, y)
    fresh.load_state_dict(model.state_dict())
    assert same(model, fresh, y)
    assert not laws.training_step(loaded, x)


def test_a_copy_shares_nothing():
    x = torch.randn(4, 6)
    model = bnify.insert(mlp(), x).model
    other = copy.deepcopy(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    laws.training_step(other, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_functional_call():
    x = torch.randn(4, 6)
    model = bnify.insert(mlp(), x).model.eval()
    state = {
        k: torch.randn_like(v).abs() if v.is_floating_point() else v
        for k, v in model.state_dict().items()
    }
    got = torch.func.functional_call(model, state, (x,))
    model.load_state_dict(state)
    assert torch.equal(got, model(x))


@pytest.mark.parametrize(
    "make", [mlp, lambda: nn.Sequential(nn.Conv1d(6, 8, 1), nn.ReLU(), nn.Conv1d(8, 2, 1))]
)
def test_scripting(make):
    x = torch.randn(4, 6) if make is mlp else torch.randn(4, 6, 5)
    model = trained(bnify.insert(make(), x).model, x)
    assert same(model, torch.jit.script(model), x)
    assert same(model, torch.jit.trace(model, x), x)


@pytest.mark.parametrize("space", [2, 3])
def test_scripting_other_convolutions(space):
    conv = with_space[space][0]
    x = torch.randn(2, 3, *[4] * space)
    model = nn.Sequential(conv(3, 4, 3, padding=1), nn.ReLU(), conv(4, 2, 1))
    model = trained(bnify.insert(model, x).model, x)
    assert same(model, torch.jit.script(model), x)


def test_padding_modes_survive():
    x = torch.randn(2, 3, 8, 8)
    for mode in ("reflect", "circular", "replicate", "zeros"):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.ReLU(), nn.Conv2d(4, 2, 1)
        )
        assert bnify.insert(model, x, init="preserve", data=x).verification.passed


# -- classes ---------------------------------------------------------------------------------------


def test_classes_are_made_once():
    assert normed_class(Padded) is normed_class(Padded)
    assert issubclass(normed_class(Padded), Padded)
    assert issubclass(normed_class(Padded), OnDemand)


def test_a_subclass_keeps_its_forward():
    x = torch.randn(4, 3, 7, 7)
    result = bnify.insert(cnn(Padded), x, init="preserve", data=x)
    assert isinstance(result.model[0], Padded)
    assert type(result.model[0]).__name__ == "PaddedNorm"
    assert result.verification.passed


def test_hooks_of_the_user_see_the_normed_value():
    x = torch.randn(4, 6)
    model = mlp()
    seen = []
    model[0].register_forward_hook(lambda _m, _i, out: seen.append(out) or out * 2)
    model[0].register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
    result = bnify.insert(model, x, init="preserve", data=x)
    assert result.verification.passed
    seen.clear()
    result.model.train()(x)
    assert abs(float((seen[0].mean() - result.model[0].norm.bias.mean()).detach())) < 1e-5
