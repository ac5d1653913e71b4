"""Layers that carry their norm: on and off again without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from bnify.layers import (
    CallNorms,
    LocalSyncBatchNorm,
    TokenNorm,
    attach,
    carries_norm,
    detach,
    norm_of,
    restart_calls,
    without_synchronisation,
)

LAYERS = {
    "Linear": lambda: nn.Linear(4, 6),
    "Conv1d": lambda: nn.Conv1d(4, 6, 3),
    "Conv2d": lambda: nn.Conv2d(4, 6, 3),
    "Conv3d": lambda: nn.Conv3d(4, 6, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 6, 3),
    "ReLU": nn.ReLU,
    "parametrized": lambda: weight_norm(nn.Linear(4, 6)),
    "parametrized-transposed": lambda: weight_norm(nn.ConvTranspose1d(4, 6, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_attach_and_detach(name):
    layer = LAYERS[name]()
    kind, attributes, keys = type(layer), set(vars(layer)), list(layer.state_dict())
    norm = nn.Identity()
    attach(layer, norm)
    assert carries_norm(layer)
    assert isinstance(layer, kind.__bases__[0] if "parametrized" in name else kind)
    assert norm_of(layer) is norm
    assert list(layer.state_dict()) == keys
    assert detach(layer) is norm
    assert not carries_norm(layer)
    assert type(layer).__name__ == kind.__name__
    assert type(layer).__mro__[1:] == kind.__mro__[1:]
    assert set(vars(layer)) == attributes
    assert not dict(layer.named_children()).keys() - {"parametrizations"}


def test_attach_leaves_other_instances_of_the_class_alone():
    import copy

    first = weight_norm(nn.Linear(4, 6))
    second = copy.deepcopy(first)  # shares the generated class
    attach(second, nn.Identity())
    assert not carries_norm(first)
    assert type(first) is not type(second)
    plain, normed = nn.Linear(4, 6), nn.Linear(4, 6)
    attach(normed, nn.Identity())
    assert type(plain) is nn.Linear


class Recording(nn.Module):
    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def forward(self, x):
        self.log.append(self.name)
        return x


def test_call_norms_take_turns():
    log: list[str] = []
    norms = CallNorms([Recording(n, log) for n in "abc"])
    root = nn.Sequential(norms)
    for _ in range(3):
        norms(torch.zeros(1))
    assert log == ["a", "b", "c"]
    with pytest.raises(RuntimeError, match="norms for 3 calls"):
        norms(torch.zeros(1))
    assert log == ["a", "b", "c"]
    restart_calls(root, ())
    norms(torch.zeros(1))
    assert log[-1] == "a"
    assert [n.name for n in norms.norms()] == ["a", "b", "c"]


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5), (5, 5, 5), (2, 3, 4, 5), (0, 3, 5)])
def test_token_norm_keeps_the_shape(shape):
    norm = TokenNorm(nn.BatchNorm1d(5)).eval()
    nn.init.normal_(norm.inner.bias)
    x = torch.randn(shape)
    assert norm(x).shape == x.shape
    assert torch.allclose(norm(x), x / (1 + 1e-5) ** 0.5 + norm.inner.bias, atol=1e-6)


def test_without_synchronisation():
    model = nn.Sequential(nn.SyncBatchNorm(3), nn.BatchNorm1d(3))
    x = torch.randn(8, 3)
    plain = nn.BatchNorm1d(3)
    assert without_synchronisation(model) is model
    assert type(model[0]) is LocalSyncBatchNorm
    assert type(model[1]) is nn.BatchNorm1d
    assert torch.equal(model[0](x), plain(x))
    assert torch.equal(model[0].running_var, plain.running_var)
