"""``init="preserve"`` on data as it comes: far from 0, or of a large scale, in both dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bnify
import laws
from bnify import inserts
from bnify.norms import each_norm
from bnify.realise import Realisations

X = torch.randn(256, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def with_a_timestamp(x: Tensor) -> Tensor:
    return torch.cat([1.7e9 + 1e6 * x[:, :1], x[:, 1:]], 1)


UNSCALED = {
    "far": lambda x: x + 1e5,
    "farther": lambda x: x + 1e9,
    "large": lambda x: x * 1e6,
    "small": lambda x: x * 1e-6,
    "timestamp": with_a_timestamp,
}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("drop_bias", [False, True])
@pytest.mark.parametrize("example", ["of the data", "N(0, 1)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", UNSCALED)
def test_unscaled_data_is_no_fault(name, dtype, example, drop_bias):
    data = UNSCALED[name](X).to(dtype)
    x = (data if example == "of the data" else X.to(dtype))[:32]
    model = mlp().to(dtype)
    result = bnify.insert(model, x, init="preserve", data=[data], drop_bias=drop_bias)
    checks = {check.name: check for check in result.verification.checks}
    assert result.verification.passed
    assert checks["result = original, eval, example"].passed
    assert checks["result = original, own dtype"].passed
    with torch.no_grad():
        error = laws.worst_error([model(data)], [result.model.eval()(data)])
    assert error < (1e-4 if dtype is torch.float32 else 1e-10)


def one_percent(norm: nn.Module) -> None:
    norm.bias[5] *= 1.01


def lost_eps(norm: nn.Module) -> None:
    norm.eps = 0.0
    norm.running_var[5] *= 1.0001


def one_mean(norm: nn.Module) -> None:
    norm.running_mean[5] += norm.running_var[5].sqrt() * 1e-3


@pytest.mark.parametrize("fault", [one_percent, lost_eps, one_mean], ids=lambda f: f.__name__)
@pytest.mark.parametrize("example", ["of the data", "N(0, 1)"])
@pytest.mark.parametrize("name", UNSCALED)
def test_a_planted_fault_is_caught_on_unscaled_data(name, example, fault, monkeypatch):
    class Faulty(Realisations):
        def tree(self) -> nn.Module:
            tree = super().tree()
            with torch.no_grad():
                fault(each_norm(tree[2].norm)[0])
            return tree

    monkeypatch.setattr(inserts, "Realisations", Faulty)
    data = UNSCALED[name](X)
    x = (data if example == "of the data" else X)[:32]
    with pytest.raises(bnify.VerificationError) as caught:
        bnify.insert(mlp().double(), x, init="preserve", data=[data])
    wrong = {c.name for c in caught.value.result.verification.checks if c.passed is False}
    assert any(check.startswith("result = original, eval") for check in wrong)
