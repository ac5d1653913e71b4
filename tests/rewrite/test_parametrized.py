"""Layers with computed weights, and conversion to synchronized batch norm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import bnify
import laws
from bnify.layers import TokenNorm, carries_norm

with_space = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)
    )


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """After a few steps no two tensors are alike."""
    for _ in range(3):
        laws.training_step(model, x, lr=0.05)
    return model.eval()


# -- parametrized layers ---------------------------------------------------------------------------


def old_style(kind: str, layer: nn.Module) -> nn.Module:
    return getattr(torch.nn.utils, kind)(layer)


def new_style(kind: str, layer: nn.Module) -> nn.Module:
    return getattr(parametrizations, kind)(layer)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("style", [old_style, new_style])
@pytest.mark.parametrize("init", ["reset", "preserve"])
def test_parametrized_layers(kind, style, init):
    x = torch.randn(8, 6)
    model = mlp()
    model[0], model[4] = style(kind, model[0]), style(kind, model[4])
    model.eval()
    want = model(x)
    result = bnify.insert(model, x, init=init, data=x if init == "preserve" else None)
    assert [e.layer for e in result.plan.edits] == ["0", "2"]
    assert result.verification.passed
    assert not laws.training_step(result.model, x)
    assert torch.equal(model.eval()(x), want)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_remove_parametrizations_leaves_the_norm(kind):
    x = torch.randn(8, 6)
    model = mlp()
    model[0], model[4] = new_style(kind, model[0]), new_style(kind, model[4])
    model.eval()
    want = model(x)
    result = trained(bnify.insert(model, x).model, x)
    before = result(x)
    for layer in (result[0], result[4]):
        parametrize.remove_parametrizations(layer, "weight")
    assert carries_norm(result[0])
    assert type(result[0]).__name__ == "LinearNorm"
    assert laws.relative_error(before, result(x)) < 1e-6
    # The original, whose generated classes deepcopy shares, still has its own.
    assert torch.equal(model(x), want)
    parametrize.remove_parametrizations(model[0], "weight")
    assert laws.relative_error(want, model(x)) < 1e-6


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_remove_old_weight_norm_leaves_the_norm():
    x = torch.randn(8, 6)
    model = mlp()
    model[0] = old_style("weight_norm", model[0])
    result = bnify.insert(model, x).model.eval()
    before = result(x)
    torch.nn.utils.remove_weight_norm(result[0])
    assert carries_norm(result[0])
    assert laws.relative_error(before, result(x)) < 1e-6


# -- conversion ------------------------------------------------------------------------------------


def test_conversion_to_sync_batch_norm_keeps_tokens_tokens():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(torch.relu(self.a(x)).mean(1))

    x = torch.randn(4, 5, 6)  # as many tokens as channels: a plain batch norm would mix them up
    model = bnify.insert(Tokens(), x, include="a").model
    laws.hostile_(model)
    want = model.eval()(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert isinstance(converted.a.norm, TokenNorm)
    assert isinstance(converted.a.norm.inner, nn.SyncBatchNorm)
    assert torch.equal(converted(x), want)
    mlp_model = bnify.insert(mlp(), torch.randn(4, 6)).model
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(mlp_model)[0].norm, nn.SyncBatchNorm)
