"""An optimizer that was built before the norms existed trains them afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bnify

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net.train()(X).square().mean().backward()
    optimizer.step()


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99), weight_decay=0.02),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_new_parameters_are_trained_and_the_state_stays(name):
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters())
    step(net, optimizer)
    old = dict(net.named_parameters())
    state = {n: copy.deepcopy(optimizer.state[p]) for n, p in old.items()}
    result = bnify.insert(net, X, optimizer=optimizer, inplace=True)
    assert result.model is net
    for n, parameter in old.items():
        for key, value in state[n].items():
            assert torch.equal(
                torch.as_tensor(optimizer.state[parameter][key]), torch.as_tensor(value)
            )
    first, second = optimizer.param_groups
    new = {n: p for n, p in net.named_parameters() if n not in old}
    assert {id(p) for p in second["params"]} == {id(p) for p in new.values()}
    assert second["weight_decay"] == 0
    for key, value in first.items():
        assert key in ("params", "weight_decay") or second[key] == value
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    step(net, optimizer)
    # Biases before batch norm have no gradient to speak of.
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert {*new, "0.weight", "2.weight", "4.weight"} <= moved


def test_one_new_group_for_each_source_group():
    net = model()
    groups = [
        {"params": net[0].parameters(), "lr": 0.1},
        {"params": net[2].parameters(), "lr": 0.01, "weight_decay": 0.5},
        {"params": net[4].parameters(), "lr": 0.001},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.7)
    bnify.insert(net, X, optimizer=optimizer, inplace=True)
    new = optimizer.param_groups[3:]
    assert [(g["lr"], g["weight_decay"], g["momentum"], len(g["params"])) for g in new] == [
        (0.1, 0, 0.7, 2),
        (0.01, 0, 0.7, 2),
    ]
    assert {id(p) for p in new[1]["params"]} == {id(p) for p in net[2].norm.parameters()}


def test_the_groups_of_weights_and_biases():
    """A layer that sits in two groups takes the group of its weight."""
    net = model()
    weights = [p for p in net.parameters() if p.ndim > 1]
    biases = [p for p in net.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": biases, "weight_decay": 0.0, "lr": 0.5}, {"params": weights, "lr": 0.1}]
    )
    bnify.insert(net, X, optimizer=optimizer, inplace=True)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups[2:]] == [(0.1, 0.0)]


def test_a_norm_without_parameters_adds_no_group():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    bnify.insert(net, X, optimizer=optimizer, inplace=True, norm="batch-noaffine")
    assert len(optimizer.param_groups) == 1


def test_dropped_biases_leave_the_optimizer():
    net = model()
    optimizer = torch.optim.Adam(net.parameters())
    step(net, optimizer)
    biases = [net[0].bias, net[2].bias]
    bnify.insert(net, X, optimizer=optimizer, inplace=True, drop_bias=True)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in net.parameters()}
    assert not any(bias in optimizer.state for bias in biases)
    step(net, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())


def test_after_act_and_frozen_layers():
    net = model()
    net[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    bnify.insert(net, X, optimizer=optimizer, inplace=True, position="after-act")
    new = {id(p) for i in (1, 3) for p in net[i].norm.parameters()}
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == new


# -- refusals --------------------------------------------------------------------------------------


def refused(net: nn.Module, optimizer, **options) -> bnify.PlanError:
    keys, groups = list(net.state_dict()), copy.copy(getattr(optimizer, "param_groups", None))
    with pytest.raises(bnify.PlanError) as caught:
        bnify.insert(net, X, optimizer=optimizer, **options)
    assert list(net.state_dict()) == keys
    assert getattr(optimizer, "param_groups", None) == groups
    return caught.value


def test_inplace_is_needed():
    net = model()
    error = refused(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert "inplace=True" in error.message
    assert error.hint == "result = bnify.insert(model, inputs, optimizer=optimizer, inplace=True)"


def test_the_optimizer_of_another_model():
    error = refused(model(), torch.optim.SGD(model().parameters(), lr=0.1), inplace=True)
    assert "no parameter of this model" in error.message
    assert error.hint


def test_what_is_no_optimizer():
    net = model()
    assert "function" in refused(net, lambda: None, inplace=True).message
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert "StepLR" in refused(net, schedule, inplace=True).message


def test_lbfgs_cannot_be_extended():
    net = model()
    assert "LBFGS" in refused(net, torch.optim.LBFGS(net.parameters()), inplace=True).message


def test_without_optimizer_the_report_says_so():
    noted = bnify.insert(model(), X, inplace=True).plan.notes
    assert any("does not know the new parameters" in note for note in noted)
    noted = bnify.insert(model(), X).plan.notes
    assert not any("does not know the new parameters" in note for note in noted)


# -- groups for a new optimizer --------------------------------------------------------------------


def test_param_groups():
    net = bnify.insert(model(), X).model
    net[0].weight.requires_grad_(False)
    decayed, others = bnify.param_groups(net, weight_decay=0.3)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(net[2].weight), id(net[4].weight)}
    held = {id(p) for g in (decayed, others) for p in g["params"]}
    assert held == {id(p) for p in net.parameters() if p.requires_grad}
    torch.optim.AdamW([decayed, others])


def test_layers_of_another_optimizer_are_not_touched():
    net = model()
    head = torch.optim.SGD(net[-1].parameters(), lr=0.1)
    groups = len(head.param_groups)
    result = bnify.insert(net, X, optimizer=head, inplace=True)
    assert len(head.param_groups) == groups
    assert any("does not train" in note for note in result.plan.notes)


def test_named_parameters_keep_their_names():
    net = model()
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=0.01)
    bnify.insert(net, X, optimizer=optimizer, inplace=True, drop_bias=True)
    names = dict(net.named_parameters())
    for group in optimizer.param_groups:
        assert len(group["params"]) == len(group["param_names"])
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert names[name] is parameter
