"""To synchronized batch norm and back, without losing what a subclass does besides."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bnify
import laws
from bnify.frozen import freeze_norms
from bnify.layers import TokenNorm, without_synchronisation
from bnify.synced import BatchNormNd, sync_norms, unsync_norms

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class WithActivation(nn.BatchNorm2d):
    """Its own call of ``F.batch_norm``, with a scale of its own making, and an activation."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        gamma = 1 + self.weight
        return F.leaky_relu(
            F.batch_norm(
                input,
                running_mean=self.running_mean,
                running_var=self.running_var,
                weight=gamma,
                bias=self.bias,
                training=self.training,
                momentum=0.3,
                eps=self.eps,
            )
        )


class ThroughSuper(nn.BatchNorm2d):
    """Its forward calls that of batch norm."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


class OnlyNamed(nn.BatchNorm2d):
    """No forward of its own."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), WithActivation(4), ThroughSuper(4)),
        *(OnlyNamed(4), nn.BatchNorm2d(4, momentum=None), BatchNormNd(4), nn.Flatten()),
        *(nn.Linear(144, 8), nn.BatchNorm1d(8, affine=False)),
    )


def nothing(*_: object) -> None:
    """A hook."""


NORMS = ("1", "2", "3", "4", "5", "6", "9")


def test_in_one_process_nothing_changes_but_the_class():
    plain, model = net(), net()
    hook = model[2].register_forward_hook(nothing)
    identities = {n: id(t) for n, t in (*model.named_parameters(), *model.named_buffers())}
    assert sync_norms(model) == NORMS
    assert sync_norms(model) == ()
    assert all(isinstance(model[int(i)], nn.SyncBatchNorm) for i in NORMS)
    assert hook.id in model[2]._forward_hooks
    assert {n: id(t) for n, t in (*model.named_parameters(), *model.named_buffers())} == identities
    for _ in range(3):
        assert torch.equal(model.train()(X), plain.train()(X))
        assert torch.equal(model.eval()(X), plain.eval()(X))
    for (name, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(X), model(X))
        assert unsync_norms(copied) == NORMS
    assert unsync_norms(model) == NORMS
    assert [type(m) for m in model] == [type(m) for m in plain]
    assert [vars(m).keys() for m in model] == [vars(m).keys() for m in plain]


def test_the_conversion_of_torch_loses_the_activation():
    """The fault that this module is for; were it gone, so could this module be."""
    plain = net()[:4].eval()
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)).eval()
    assert laws.worst_error([plain(X)], [theirs(X)]) > 1e-2
    ours = copy.deepcopy(plain)
    sync_norms(ours)
    assert torch.equal(plain(X), ours(X))


def test_norms_of_timm_keep_their_activation():
    layers = pytest.importorskip("timm.layers")
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), layers.BatchNormAct2d(4, act_layer=nn.SiLU))
    model = copy.deepcopy(plain)
    assert sync_norms(model) == ("1",)
    assert torch.equal(model(X), plain(X))
    assert torch.equal(model[1].running_var, plain[1].running_var)
    assert unsync_norms(model) == ("1",)
    assert type(model[1]) is layers.BatchNormAct2d


def test_a_sync_norm_of_another_origin_is_taken_back():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(
        nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3))
    )
    assert unsync_norms(model) == ("0", "1")
    assert type(model[0]) is BatchNormNd
    assert model[0](X.mean((2, 3))).shape == (8, 3)
    assert torch.equal(model[1](X), nn.BatchNorm2d(3)(X))
    with pytest.raises(ValueError, match="2 dims or more, got 1"):
        model[0](torch.ones(3))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, WithActivation])
def test_a_parametrized_norm_stays_so(kind):
    model = nn.Sequential(kind(3))
    parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    want = model(X)
    assert sync_norms(model) == ("0",)
    assert isinstance(model[0], nn.SyncBatchNorm)
    assert torch.equal(model(X), want)
    parametrize.remove_parametrizations(model[0], "weight")
    assert unsync_norms(model) == ("0",)
    assert type(model[0]) is kind


def test_frozen_and_lazy_norms_are_left_alone():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d(), nn.BatchNorm2d(3))
    freeze_norms(model[0])
    assert sync_norms(model) == ("2",)
    synced = nn.Sequential(WithActivation(3))
    sync_norms(synced)
    freeze_norms(synced)
    again = pickle.loads(pickle.dumps(synced))
    assert type(again[0]) is type(synced[0])
    assert not again.train()[0].training
    assert unsync_norms(synced) == ()


def test_a_copy_of_one_process_asks_no_other():
    model = net()
    sync_norms(model)
    without_synchronisation(model)
    assert type(model[2]) is WithActivation
    result = bnify.insert(
        nn.Sequential(model[:4], nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), X
    )
    assert result.verification.passed


@pytest.mark.parametrize("convert", [sync_norms, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_norms_that_bnify_put_in(convert):
    """Tokens stay in their container, and never become channels."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
            return self.head(torch.relu(self.up(x)).mean(1))

    model = bnify.insert(Net(), X, include="up", verify=False).model
    plain = copy.deepcopy(model)
    keys = list(model.state_dict())
    changed = convert(model)
    model = model if isinstance(changed, tuple) else changed
    assert list(model.state_dict()) == keys
    assert isinstance(model.up.norm, TokenNorm)
    assert type(model.up.norm.inner) is type(model.conv.norm) is nn.SyncBatchNorm
    assert torch.equal(model.train()(X), plain.train()(X))
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))
    folded = bnify.fold(model.double(), X.double(), verify=False)
    laws.assert_same_function(plain.double(), folded.model, X)
