"""Plans that were edited by hand: each fault is refused with the name of its edit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import bnify
import nets
from bnify import api


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 8),
        nn.ReLU(),
        nn.Linear(8, 2),
    )


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def faulty(**changes) -> bnify.Plan:
    plan = api.plan(model(), X)
    first, *rest = plan.edits
    return replace(plan, edits=(replace(first, **changes), *rest))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer": "9"}, "edit of 9 cannot be done: the model has no module '9'"),
        ({"layer": "0.norm"}, "no module"),
        ({"kind": "fold-backward"}, "'fold-backward' is no insertion"),
        ({"norm": "bach"}, "unknown norm 'bach'"),
        ({"norm": "auto"}, "unknown norm 'auto'"),
        ({"channels": 7}, "7 channels, but the value has shape [4, 8, 6, 6]"),
        ({"channels": 6, "axis": 2}, "axis 2"),
        ({"channels": 6, "axis": 3}, "axis 3"),
        ({"axis": 0, "channels": 4}, "axis 0"),
        ({"axis": 9}, "axis 9"),
        ({"axis": -3}, "axis -3"),
        ({"dims": 3}, "of 3 dims"),
        ({"calls": 2}, "2 norms, but 0 is called 1 times"),
        ({"norm": "group", "groups": 3}, "3 groups do not divide"),
        ({"norm": "group", "groups": 0}, "0 groups do not divide"),
        ({"norm": "group", "drop_bias": True}, "drop_bias"),
        ({"at": "1", "drop_bias": True}, "drop_bias"),
        ({"at": "5"}, "cannot be done"),
        ({"at": "11"}, "no module '11'"),
        ({"init": "old"}, "unknown init 'old'"),
        ({"init": "stats", "norm": "group"}, "init 'stats' does not go with group norm"),
        ({"init": "preserve", "norm": "layer"}, "'preserve' does not go with layer"),
        ({"eps": -1.0}, "eps -1.0"),
        ({"momentum": 2.0}, "momentum 2.0"),
        ({"layer": "2"}, "two edits put a norm on 2"),
        ({"layer": "4"}, "cannot be done"),
    ],
)
def test_an_edit_that_cannot_be_done(changes, words):
    plan = faulty(**changes)
    with pytest.raises(bnify.PlanError) as caught:
        bnify.apply(model(), plan, X)
    assert words in caught.value.message
    assert repr(plan.edits[0].layer)[1:-1] in caught.value.message
    assert caught.value.hint
    with pytest.raises(bnify.PlanError):  # from JSON too
        bnify.apply(model(), bnify.Plan.from_json(plan.to_json()), X)


def test_the_norm_of_another_edit_on_the_same_activation():
    plan = api.plan(model(), X)
    twice = replace(plan, edits=(*plan.edits, replace(plan.edits[0], layer="2", at="1")))
    clash = replace(plan, edits=(replace(plan.edits[0], at="1"), *twice.edits[-1:]))
    with pytest.raises(bnify.PlanError, match="two edits put a norm on 1"):
        bnify.apply(model(), clash, X)


def test_drop_bias_without_a_bias():
    net = model()
    net[0] = nn.Conv2d(3, 8, 3, bias=False)
    plan = api.plan(net, X)
    plan = replace(plan, edits=(replace(plan.edits[0], drop_bias=True), *plan.edits[1:]))
    with pytest.raises(bnify.PlanError, match="the layer has no bias"):
        bnify.apply(net, plan, X)


def test_instance_norm_on_a_linear():
    plan = api.plan(model(), X)
    plan = replace(plan, edits=(*plan.edits[:2], replace(plan.edits[2], norm="instance")))
    with pytest.raises(bnify.PlanError, match=r"edit of 5 .* instance norm needs a spatial axis"):
        bnify.apply(model(), plan, X)


def test_a_layer_that_is_never_called_or_called_elsewhere():
    x = torch.randn(4, 5, 6)
    plan = api.plan(nets.CrossAttention(), x)
    (edit,) = [e for e in plan.edits if e.layer == "fc"]
    wrong = replace(edit, layer="attention.out_proj")
    with pytest.raises(bnify.PlanError, match=r"does not call attention\.out_proj"):
        bnify.apply(nets.CrossAttention(), replace(plan, edits=(wrong,)), x)


def test_a_layer_that_carries_a_norm():
    plan = api.plan(model(), X)
    done = bnify.apply(model(), plan, X).model
    with pytest.raises(bnify.PlanError, match="the plan does not fit this model"):
        bnify.apply(done, plan, X)
    refit = replace(api.plan(done, X), edits=plan.edits)
    with pytest.raises(bnify.PlanError, match="0 carries a norm already"):
        bnify.apply(done, refit, X)


def test_edits_that_can_be_done():
    """What a person may change: leave edits out, change kinds, move a norm, add a layer."""
    plan = api.plan(model(), X)
    assert [e.layer for e in plan.edits] == ["0", "2", "5"]
    fewer = bnify.apply(model(), replace(plan, edits=plan.edits[1:]), X)
    assert not any(key.startswith("0.norm") for key in fewer.model.state_dict())
    assert fewer.verification.passed
    none = bnify.apply(model(), replace(plan, edits=()), X)
    assert set(none.model.state_dict()) == set(model().state_dict())
    assert none.verification.passed
    first, second, third = plan.edits
    mixed = (
        replace(first, norm="group", groups=4, eps=0.01),
        replace(second, at="3", momentum=0.5),
        replace(third, norm="rms"),
        replace(third, layer="7", channels=2, norm="batch-noaffine"),
    )
    result = bnify.apply(model(), replace(plan, edits=mixed[::-1]), X)
    assert result.verification.passed
    assert isinstance(result.model[0].norm, nn.GroupNorm)
    assert result.model[3].norm.momentum == 0.5
