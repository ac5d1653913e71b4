"""``bnify.insert`` from outside: what happens to the user's model, data and class."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnify
import laws
import nets
import zoo
from bnify.layers import carries_norm
from mlp import MyNetwork

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def snapshot(model: nn.Module) -> tuple:
    tensors = {
        n: (id(t), t.clone(), t.requires_grad, t.grad)
        for n, t in (*model.named_parameters(), *model.named_buffers())
    }
    modules = {
        n: (
            id(m),
            type(m),
            m.training,
            set(vars(m)),
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
        )
        for n, m in model.named_modules()
    }
    return tensors, modules


def assert_untouched(before: tuple, model: nn.Module) -> None:
    tensors, modules = snapshot(model)
    assert modules == before[1]
    assert list(tensors) == list(before[0])
    for name, (identity, value, gradient_wanted, gradient) in before[0].items():
        now = tensors[name]
        assert (now[0], now[2]) == (identity, gradient_wanted)
        assert now[3] is gradient
        assert torch.equal(now[1], value) or name.endswith("nothing")


# -- the user's model ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry", [e for e in zoo.small() if e.name.startswith("own:")], ids=lambda e: e.name
)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_the_users_model_stays_as_it_was(entry, train):
    model, inputs = entry.build().train(train), entry.inputs(batch=4)
    before = snapshot(model)
    rng = torch.get_rng_state()
    result = bnify.insert(model, inputs, per_call=True, batch_size=32)
    assert_untouched(before, model)
    assert torch.equal(rng, torch.get_rng_state())
    assert result.verification.passed
    assert result.model.training == train
    assert torch.backends.mha.get_fastpath_enabled()


def test_modes_and_inputs_stay():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            x.mul_(2)
            return self.head(F.relu_(self.a(x)))

    model, x = InPlace().train(), X.clone()
    model.a.eval()
    result = bnify.insert(model, x, init="preserve", data=[x])
    assert torch.equal(x, X)
    assert (model.training, model.a.training, model.head.training) == (True, False, True)
    assert (result.model.training, result.model.a.training) == (True, False)


def test_a_cache_filled_earlier_is_no_obstacle():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head, self.cache = nn.Linear(6, 6), nn.Linear(6, 2), {}

        def forward(self, x):
            self.last = F.relu(self.a(x))
            self.cache["y"] = [self.last * 2]
            return self.head(self.last)

    model = Caching()
    model(X)  # leaves non-leaf tensors on the model
    result = bnify.insert(model, X)
    assert result.verification.passed
    assert model.last.grad_fn is not None


def test_inplace_keeps_the_objects():
    model = mlp()
    objects = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    result = bnify.insert(model, X, inplace=True)
    assert result.model is model
    assert all(model.get_submodule(n) is m for n, m in objects.items())
    assert all(model.get_parameter(n) is p for n, p in parameters.items())
    assert int(model[0].norm.num_batches_tracked) == 0
    assert torch.equal(model[0].norm.running_mean, torch.zeros(8))


def test_inplace_and_copy_are_the_same():
    for options in ({}, {"init": "preserve", "data": X}, {"drop_bias": True}, {"norm": "group"}):
        model = mlp()
        copied = bnify.insert(model, X, **options).model
        assert not any(carries_norm(m) for m in model.modules())
        edited = bnify.insert(model, X, inplace=True, **options).model
        want, got = copied.state_dict(), edited.state_dict()
        assert list(want) == list(got)
        assert all(torch.equal(want[k], got[k]) for k in want)


# -- the user's class ------------------------------------------------------------------------------


class Lit(nn.Module):
    """A training class: its own step, attributes, properties, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.history: list[float] = []
        self.hparams = {"lr": 0.1}

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.history.append(float(loss.detach()))
        return loss

    @property
    def device(self) -> torch.device:
        return self.net[0].weight.device


def test_a_class_with_its_own_training_step_keeps_it():
    module = Lit()
    module.net[0].register_forward_hook(lambda *_: module.history.append(-1.0))
    result = bnify.insert(module, X).model
    assert type(result) is Lit
    assert (result.hparams, result.device) == ({"lr": 0.1}, torch.device("cpu"))
    assert len(result.net[0]._forward_hooks) == 1
    loss = result.train().training_step((X, torch.zeros(16, dtype=torch.long)))
    loss.backward()
    assert result.history[-1] == float(loss.detach())
    assert result.net[0].norm.weight.grad is not None


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry", [e for e in zoo.small() if e.name.startswith("own:")], ids=lambda e: e.name
)
@pytest.mark.parametrize("options", [{}, {"include": "*", "per_call": True}], ids=["", "include"])
def test_after_one_step_every_norm_ran_and_learns(entry, options):
    model, inputs = entry.build(), entry.inputs(batch=4)
    idle = set(laws.training_step(copy.deepcopy(model), inputs))
    result = bnify.insert(model, inputs, verify=False, batch_size=32, **options)
    old = set(model.state_dict())
    without = set(laws.training_step(result.model, inputs)) - idle
    assert not without
    counts = {
        key: int(value)
        for key, value in result.model.state_dict().items()
        if key.endswith("num_batches_tracked") and key not in old
    }
    assert set(counts.values()) <= {1}
    assert len(counts) == sum(e.calls for e in result.plan.edits)


def test_the_mlp_learns():
    """The story of the article, in small: batch norm does no harm to learning."""
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = bnify.insert(mlp(), x).model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


# -- zero_gamma ------------------------------------------------------------------------------------


class Projected(nn.Module):
    """A residual block with a projection on its shortcut."""

    def __init__(self, project: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 8, 1) if project else nn.Identity()
        self.head = nn.Linear(8, 2)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem(x))
        return self.shortcut(x), self.conv2(F.relu(self.conv1(x)))

    def forward(self, x: Tensor) -> Tensor:
        short, deep = self.features(x)
        return self.head(F.relu(deep + short).mean((2, 3)))


@pytest.mark.parametrize("project", [False, True])
def test_zero_gamma_starts_the_branch_at_nothing(project):
    x = torch.randn(4, 3, 8, 8)
    result = bnify.insert(Projected(project), x, zero_gamma=True)
    assert result.verification.passed
    assert [e.layer for e in result.plan.edits if e.zero_gamma] == ["conv2"]
    for train in (False, True):
        _, deep = result.model.train(train).features(x)
        assert not deep.any()
    assert result.model.conv2.norm.weight.requires_grad
    if project:
        assert result.model.shortcut.norm.weight.all()


def test_zero_gamma_of_each_block():
    x = torch.randn(4, 3, 16, 16)
    for norm in ("batch", "group", "rms"):
        result = bnify.insert(nets.PlainResidual(), x, zero_gamma=True, norm=norm)
        zeroed = [e.layer for e in result.plan.edits if e.zero_gamma]
        assert zeroed == ["blocks.0.conv2", "blocks.1.conv2"]
        assert result.verification.passed
    plain = bnify.insert(MyNetwork(), torch.randn(4, 784), zero_gamma=True, verify=False)
    assert not any(e.zero_gamma for e in plain.plan.edits)


def test_plans_are_taken_as_they_are_stored(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(8, 6)
    result = bnify.insert(model, x)
    file = tmp_path / "plan.json"
    file.write_text(result.plan.to_json())
    result.save(tmp_path / "out", onnx=False)
    stored = (result.plan, result.plan.to_dict(), result.to_dict(), result.plan.to_json())
    for plan in (*stored, file, str(file), tmp_path / "out"):
        assert bnify.apply(model, plan, x).plan.edits == result.plan.edits
        assert bnify.insert(model, x, plan=plan).plan.edits == result.plan.edits
    for wrong in (3, [], tmp_path / "none.json", "{"):
        with pytest.raises(bnify.PlanError):
            bnify.apply(model, wrong, x)


def test_options_beside_a_plan_are_refused():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(8, 6)
    plan = bnify.insert(model, x, norm="layer").plan
    assert bnify.insert(model, x, plan=plan, norm="layer").plan.edits == plan.edits
    with pytest.raises(bnify.PlanError, match="exclude beside plan="):
        bnify.insert(model, x, plan=plan, exclude="0")


def test_a_plan_edited_by_hand_still_names_every_layer():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(8, 6)
    made = bnify.insert(model, x).plan
    data = made.to_dict()
    head = dict(data["edits"][0], layer="4", channels=2)
    data["edits"] = [data["edits"][1], head]
    carried = bnify.apply(model, data, x).plan
    assert [edit.layer for edit in carried.edits] == ["2", "4"]
    assert {skip.layer: str(skip.reason) for skip in carried.skips} == {"0": "excluded"}
