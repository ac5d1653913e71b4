"""Training goes on after an insertion: optimizers, schedulers, grad scaler, killed and resumed."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
import torch.optim.lr_scheduler as schedules
from torch import nn

import bnify
from bnify.optim import schedulers_of

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True).sin()


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    rows = torch.randperm(64)[:32]
    optimizer.zero_grad()
    loss = (model.train()(X[rows]) - Y[rows]).square().mean()
    loss.backward()
    optimizer.step()


# -- schedulers ------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, [lambda e: 0.9**e, lambda e: 0.8**e]),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: schedules.StepLR(o, 2),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 5]),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, 5),
    "LinearLR": lambda o: schedules.LinearLR(o, total_iters=6),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, [0.5, 0.2], total_steps=12),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, total_iters=3), schedules.CosineAnnealingLR(o, 8)], [3]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.LinearLR(o, total_iters=3), schedules.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0, min_lr=[1e-3, 1e-4]),
}


def rates(name: str, insert_at: int | None, *, build_after: bool = False) -> list[list[float]]:
    """Learning rates of all groups after each of nine steps; norms go in before ``insert_at``."""
    model = net()
    groups = [
        {"params": model[0].parameters(), "lr": 0.1},
        {"params": [*model[3].parameters(), *model[5].parameters()], "lr": 0.03},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    scheduler = None if build_after else SCHEDULERS[name](optimizer)
    found = []
    for number in range(9):
        if number == insert_at:
            bnify.insert(model, X[:32], optimizer=optimizer, inplace=True, verify=False)
        if scheduler is None:
            scheduler = SCHEDULERS[name](optimizer)
        step(model, optimizer)
        scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


@pytest.mark.parametrize("insert_at", [0, 4])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_was_built_before_drives_the_new_groups_too(name, insert_at):
    """A new group has the rates of its source group; those of the old groups are untouched."""
    plain, inserted = rates(name, None), rates(name, insert_at)
    for number, (want, got) in enumerate(zip(plain, inserted, strict=True)):
        assert got[:2] == want
        if number >= insert_at:
            assert got[2:] == want


_EASY = sorted(set(SCHEDULERS) - {"LambdaLR", "OneCycleLR", "ReduceLROnPlateau"})


@pytest.mark.parametrize("name", _EASY)
def test_a_scheduler_that_is_built_after_sees_all_groups(name):
    """Those that take a list want one entry for each of the groups that are there by then."""
    plain, inserted = rates(name, None), rates(name, 0, build_after=True)
    assert [got[:2] for got in inserted] == plain
    assert [got[2:] for got in inserted] == plain


def test_the_state_of_an_extended_scheduler_is_saved_and_loaded():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = schedules.CosineAnnealingLR(optimizer, 8)
    bnify.insert(model, X, optimizer=optimizer, inplace=True, verify=False)
    state = scheduler.state_dict()
    again = schedules.CosineAnnealingLR(optimizer, 8)
    again.load_state_dict(state)
    step(model, optimizer)
    again.step()


def test_only_schedulers_of_this_optimizer_are_extended():
    model, other = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)
    mine, untouched = (schedules.StepLR(o, 2) for o in (optimizer, theirs))
    assert schedulers_of(optimizer) == [mine]
    result = bnify.insert(model, X, optimizer=optimizer, inplace=True, verify=False)
    assert len(mine.base_lrs) == 2
    assert len(untouched.base_lrs) == 1
    assert any("its StepLR drives them too" in note for note in result.plan.notes)
    fresh = net()
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    notes = bnify.insert(fresh, X, optimizer=optimizer, inplace=True, verify=False).plan.notes
    assert any("another library" in note for note in notes)


def test_a_learning_rate_that_is_a_tensor_is_lowered_once():
    """A new group has its own tensor: a scheduler writes to that of each group."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1))
    scheduler = schedules.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    bnify.insert(model, X, optimizer=optimizer, inplace=True, verify=False)
    for _ in range(2):
        scheduler.step(1.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.05, 0.05])


class OwnFactors(schedules.LRScheduler):
    """One factor for each group, in a list that bnify does not know."""

    def __init__(self, optimizer: torch.optim.Optimizer, factors: list[float]) -> None:
        self.factors = factors
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        groups = self.optimizer.param_groups
        return [g["lr"] * f for g, f in zip(groups, self.factors, strict=True)]


class OwnRule(schedules.LRScheduler):
    """One rule for all groups."""

    def get_lr(self) -> list[float]:
        return [rate * 0.9**self.last_epoch for rate in self.base_lrs]


def test_schedulers_that_cannot_be_extended_are_said():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alive = [OwnFactors(optimizer, [0.9]), OwnRule(optimizer), schedules.StepLR(optimizer, 2)]
    result = bnify.insert(model, X, optimizer=optimizer, inplace=True, verify=False)
    notes = [note for note in result.plan.notes if "OwnFactors" in note]
    assert notes == ["OwnFactors is not extended for its own factors: build it anew"]
    assert any("its OwnRule, StepLR drives them too" in note for note in result.plan.notes)
    assert any("another library" in note for note in result.plan.notes)
    step(model, optimizer)
    with pytest.raises(ValueError, match="zip"):
        alive[0].step()
    alive[1].step()
    again = OwnFactors(optimizer, [0.9, 0.9])
    step(model, optimizer)
    again.step()


def test_schedulers_that_the_collector_does_not_show_are_said():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alive = schedules.StepLR(optimizer, 2)
    gc.freeze()
    try:
        result = bnify.insert(model, X, optimizer=optimizer, inplace=True, verify=False)
    finally:
        gc.unfreeze()
    assert alive.base_lrs == [0.1]
    assert any("gc.freeze() hides schedulers" in note for note in result.plan.notes)


# -- an optimizer that refuses ---------------------------------------------------------------------


class FewGroups(torch.optim.SGD):
    """It takes so many groups and no more."""

    most = 1

    def add_param_group(self, param_group: dict[str, object]) -> None:
        if len(self.param_groups) == self.most:
            raise ValueError("no more groups")
        super().add_param_group(param_group)


@pytest.mark.parametrize("most", [2, 3])
def test_an_optimizer_that_takes_no_further_group_leaves_everything_as_it_was(most, monkeypatch):
    """At once, and after one of two new groups."""
    monkeypatch.setattr(FewGroups, "most", most)
    model = net()
    keys, ids = list(model.state_dict()), [id(p) for p in model.parameters()]
    groups = [{"params": model[0].parameters()}, {"params": model[3:].parameters()}]
    optimizer = FewGroups(groups, lr=0.1, momentum=0.9)
    scheduler = schedules.StepLR(optimizer, 2)
    step(model, optimizer)
    states = {id(p): state["momentum_buffer"] for p, state in optimizer.state.items()}
    with pytest.raises(
        bnify.PlanError, match="FewGroups takes no further parameter group"
    ) as caught:
        bnify.insert(model, X, optimizer=optimizer, inplace=True, drop_bias=True, verify=False)
    assert "insert first" in caught.value.hint
    assert list(model.state_dict()) == keys
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == ids
    assert {id(p): state["momentum_buffer"] for p, state in optimizer.state.items()} == states
    assert scheduler.base_lrs == [0.1, 0.1]
    step(model, optimizer)


def test_a_dropped_bias_that_another_layer_keeps_is_trained_on():
    model = net()
    model[3].bias = model[0].bias
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"drop_bias": True, "exclude": "3", "verify": False}
    bnify.insert(model, X, optimizer=optimizer, inplace=True, **options)
    assert model[0].bias is None
    before = model[3].bias.detach().clone()
    step(model, optimizer)
    assert not torch.equal(before, model[3].bias)


# -- grad scaler -----------------------------------------------------------------------------------


def test_a_grad_scaler_goes_on_as_it_was():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def scaled_step() -> None:
        optimizer.zero_grad()
        scaler.scale((model.train()(X) - Y).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    scaled_step()
    before = scaler.state_dict()
    bnify.insert(model, X, init="preserve", optimizer=optimizer, inplace=True, verify=False)
    assert scaler.state_dict() == before
    gamma = model[0].norm.weight.clone()
    scaled_step()
    assert not torch.equal(gamma, model[0].norm.weight)
    assert scaler.get_scale() == 1024.0


# -- killed and resumed ----------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
}


def started(name: str, **options) -> tuple[nn.Module, torch.optim.Optimizer, schedules.LRScheduler]:
    """A script: model, optimizer, a first step, norms, scheduler."""
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    bnify.insert(model, X, optimizer=optimizer, inplace=True, verify=False, **options)
    return model, optimizer, schedules.LinearLR(optimizer, total_iters=8)


@pytest.mark.parametrize(
    "options",
    [{}, {"init": "preserve"}, {"init": "stats"}, {"init": "preserve", "drop_bias": True}],
    ids=str,
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_killed_and_resumed_training_ends_in_the_same_bits(name, options):
    parts = started(name, **options)
    for _ in range(3):
        step(*parts[:2])
        parts[2].step()
    file = io.BytesIO()
    torch.save({"parts": [p.state_dict() for p in parts], "rng": torch.get_rng_state()}, file)
    for _ in range(4):
        step(*parts[:2])
        parts[2].step()
    want = copy.deepcopy(parts[0].state_dict())

    torch.manual_seed(999)  # a new process, which has drawn other numbers
    again = started(name, **options)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for part, state in zip(again, saved["parts"], strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(saved["rng"])
    for _ in range(4):
        step(*again[:2])
        again[2].step()
    assert want.keys() == again[0].state_dict().keys()
    assert all(torch.equal(want[key], value) for key, value in again[0].state_dict().items())
    assert [g["lr"] for g in parts[1].param_groups] == [g["lr"] for g in again[1].param_groups]


@pytest.mark.parametrize("drop_bias", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_resumed_without_the_data_of_the_insertion(name, drop_bias):
    """The recipe: the same build, an insertion with ``reset``, then all states."""
    parts = started(name, init="preserve", data=[X], drop_bias=drop_bias)
    for _ in range(3):
        step(*parts[:2])
        parts[2].step()
    states = [copy.deepcopy(part.state_dict()) for part in parts]

    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(states[1])  # the natural order
    options = {"drop_bias": drop_bias, "verify": False}
    bnify.insert(model, X, init="reset", optimizer=optimizer, inplace=True, **options)
    again = model, optimizer, schedules.LinearLR(optimizer, total_iters=8)
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    for ours in (parts, again):
        torch.manual_seed(5)
        for _ in range(3):
            step(*ours[:2])
            ours[2].step()
    for key, value in parts[0].state_dict().items():
        assert torch.equal(value, again[0].state_dict()[key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizers_state_from_before_is_loaded_before(name):
    """The order that works: model, optimizer, their old states, then the insertion."""
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    old = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again = net()
    theirs = OPTIMIZERS[name](again.parameters())
    again.load_state_dict(old[0])
    theirs.load_state_dict(old[1])
    bnify.insert(again, X, optimizer=theirs, inplace=True, verify=False)
    for mine, other in zip(model.parameters(), (again[i].weight for i in (0, 3)), strict=False):
        if mine.ndim == 2:
            for key, value in optimizer.state[mine].items():
                assert torch.equal(
                    torch.as_tensor(value), torch.as_tensor(theirs.state[other][key])
                )
    step(again, theirs)
    with pytest.raises(ValueError, match="param"):  # the other order says so itself
        theirs.load_state_dict(old[1])


# -- requires_grad ---------------------------------------------------------------------------------


def test_the_norm_of_a_frozen_layer_learns_and_the_layer_does_not():
    model = net()
    model[0].requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    result = bnify.insert(model, X, optimizer=optimizer, inplace=True)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == flags.get(name, True), name
    assert any("a trainable norm for 1 frozen layer" in note for note in result.plan.notes)
    before = {name: p.clone() for name, p in model.named_parameters()}
    step(model, optimizer)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"0.norm.weight", "0.norm.bias"} <= moved
    assert not moved & {"0.weight", "0.bias"}


def test_a_norm_is_trainable_even_where_the_insertion_is_made_without_gradients():
    with torch.no_grad():
        model = bnify.insert(net(), X, verify=False).model
    assert all(p.requires_grad for p in model.parameters())
