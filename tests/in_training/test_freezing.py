"""Norms that are frozen stay so, whatever ``train()`` is called."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

import bnify
import laws
from bnify.frozen import freeze_norms, is_frozen, thaw_norms
from bnify.layers import CallNorms, TokenNorm

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class NormAndDropout(nn.BatchNorm2d):
    """A norm with a forward of its own and children, as timm has them."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.5), nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        y = torch.nn.functional.batch_norm(
            *(input, self.running_mean, self.running_var, self.weight, self.bias),
            *(self.training, 0.1, self.eps),
        )
        return self.act(self.drop(y))


class LookAlike(nn.Module):
    """Batch norm by hand."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, (0, 2, 3))
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(var, 0.1)
        else:
            mean, var = self.running_mean, self.running_var
        scale = self.gamma / (var + 1e-5).sqrt()
        return x * scale[:, None, None] - (mean * scale)[:, None, None]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        NormAndDropout(4),
        LookAlike(4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.SyncBatchNorm(4),
        nn.GroupNorm(2, 4),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(144, 8),
        nn.Sequential(nn.BatchNorm1d(8, affine=False)),
    )


FROZEN = ("1", "2", "3", "4", "5", "10.0")


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if "running" in n or "tracked" in n}


def test_statistics_stay_through_train_calls_and_steps():
    model = laws.hostile_(net(), 1)
    keys, tensors = list(model.state_dict()), {n: id(p) for n, p in model.named_parameters()}
    before = statistics(model)
    assert freeze_norms(model) == FROZEN
    assert freeze_norms(model) == FROZEN, "twice changes nothing"
    assert list(model.state_dict()) == keys
    assert {n: id(p) for n, p in model.named_parameters()} == tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model.train()
        assert all(not model.get_submodule(path).training for path in FROZEN)
        assert model[0].training
        assert model[2].drop.training, "the dropout in it is no statistic"
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    after = statistics(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model[1].weight.grad is not None
    for module, plain in zip(model, net(), strict=True):
        assert isinstance(module, type(plain))


def test_thawed_they_move_again():
    model = net()
    freeze_norms(model)
    model.train()
    assert thaw_norms(model) == FROZEN
    assert thaw_norms(model) == ()
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]
    assert all(m.training for m in model.modules()), "as the model around them"
    before = statistics(model)
    model(X)
    moved = {n for n, b in statistics(model).items() if not torch.equal(before[n], b)}
    assert {n for n in before if "running" in n} <= moved
    freeze_norms(model)
    thaw_norms(model.eval())
    assert not any(m.training for m in model.modules())


def test_scale_and_shift_are_frozen_on_request_and_given_back_as_they_were():
    model = net()
    model[1].bias.requires_grad_(False)  # it did not learn before either
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    def step() -> set[str]:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model.train()
        (model(X) ** 3).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}

    step()
    freeze_norms(model)
    freeze_norms(model, affine=True)
    frozen = {n for n, _ in model.named_parameters() if n.rpartition(".")[0] in FROZEN}
    assert not step() & frozen
    assert step() >= {"0.weight", "6.weight"}
    thaw_norms(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@pytest.mark.parametrize("affine", [False, True])
def test_copies_and_pickles_are_frozen_too(affine):
    model = net()
    freeze_norms(model, affine=affine)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert [is_frozen(m) for m in copied.modules()] == [is_frozen(m) for m in model.modules()]
        assert not copied.train()[1].training
        assert torch.equal(copied.eval()(X), model.eval()(X))
        assert thaw_norms(copied) == FROZEN
        assert copied[1].weight.requires_grad
        copied.load_state_dict(net().state_dict())


@pytest.mark.parametrize("norm", ["batch", "sync", "batch-noaffine"])
def test_norms_that_bnify_put_in(norm):
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.twice = nn.Linear(6, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.up(x))
            x = torch.relu(self.twice(torch.relu(self.twice(x))))
            return self.head(x.mean(1))

    x = torch.randn(8, 5, 6)
    options = {"include": ("up", "twice"), "per_call": True, "norm": norm}
    model = bnify.insert(Tokens(), x, **options, verify=False).model
    assert isinstance(model.up.norm, TokenNorm)
    assert isinstance(model.twice.norm, CallNorms)
    paths = ("up.norm.inner", "twice.norm.0.inner", "twice.norm.1.inner")
    assert freeze_norms(model) == paths
    before = statistics(model)
    assert not model.train().up.norm.inner.training
    model(x).sum().backward()
    assert all(torch.equal(before[n], b) for n, b in statistics(model).items())


def test_a_frozen_model_is_folded_stripped_and_audited():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model = laws.hostile_(bnify.insert(plain, X, verify=False).model, 3).double()
    freeze_norms(model, affine=True)
    x = X.double()
    report = bnify.audit(model.train(), x)
    assert not [f for f in report.findings if f.code == "BN301"], "frozen, and not by half"
    folded = bnify.fold(model, x)
    laws.assert_same_function(model, folded.model, x)
    assert folded.plan.skips == ()
    inserted = bnify.insert(plain, X, verify=False)
    freeze_norms(inserted.model)
    kinds = {type(m).__module__.split(".")[0] for m in inserted.strip().modules()}
    assert "bnify" not in kinds
    assert not any(is_frozen(m) for m in inserted.strip().modules())


def test_a_lazy_norm_has_nothing_to_keep():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyBatchNorm2d())
    with pytest.raises(bnify.PlanError, match="1 is lazy") as caught:
        freeze_norms(model)
    assert "run the model once" in caught.value.hint
    model(X)
    assert freeze_norms(model) == ("1",)


def test_a_norm_by_itself():
    norm = nn.BatchNorm2d(3)
    assert freeze_norms(norm) == ("",)
    assert not norm.train().training
    assert thaw_norms(norm) == ("",)
    assert norm.train().training


def test_a_frozen_norm_is_one_node_of_a_symbolic_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    freeze_norms(model)
    traced = fx.symbolic_trace(model).train()
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    assert torch.equal(traced(X), model.train()(X))
    assert torch.equal(model[1].running_mean, torch.zeros(4))


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("first", ["freeze", "parametrize"])
@pytest.mark.parametrize("affine", [False, True])
def test_a_parametrized_norm(first, affine):
    """Frozen and given back, whichever of both is there first and goes first."""
    model = laws.hostile_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 1)
    for path in ("0", "1"):
        if first == "freeze":
            freeze_norms(model, affine=affine)
        parametrize.register_parametrization(model[1], "weight", Doubled())
        freeze_norms(model, affine=affine)
        before, want = statistics(model), model.eval()(X)
        assert torch.equal(model.train()(X), want)
        assert all(torch.equal(before[name], b) for name, b in statistics(model).items())
        assert [p.requires_grad for p in model[1].parameters()] == [not affine] * 2
        assert is_frozen(copy.deepcopy(model)[1])
        if path == "0":
            parametrize.remove_parametrizations(model[1], "weight")
            assert is_frozen(model[1])
            assert laws.worst_error([want], [model.train()(X)]) < 1e-6
        assert thaw_norms(model) == ("1",)
        if path == "1":
            parametrize.remove_parametrizations(model[1], "weight")
        assert type(model[1]) is nn.BatchNorm2d
        assert model[1].training
        assert all(p.requires_grad for p in model.parameters())
        assert thaw_norms(model) == ()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_norm_cannot_be_frozen():
    model = nn.Sequential(nn.BatchNorm2d(3), torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))))
    with pytest.raises(bnify.PlanError, match="0 is a ScriptModule") as caught:
        freeze_norms(model)
    assert "eval mode" in caught.value.hint
    assert not is_frozen(model[0])
    assert freeze_norms(torch.jit.script(nn.Sequential(nn.GroupNorm(1, 3)))) == ()
