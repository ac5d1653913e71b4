"""What can be asked for: words, ranges, contradictions, and globs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bnify
from bnify import api


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


X = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": "bacth"}, "unknown norm 'bacth'"),
        ({"position": "before"}, "unknown position 'before'"),
        ({"init": "calibrated"}, "unknown init 'calibrated'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": -4}, "batch_size=-4"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"eps": -1e-5}, "eps=-1e-05"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"eps": float("inf")}, "eps=inf"),
        ({"momentum": 0.0}, "momentum=0.0"),
        ({"momentum": 1.5}, "momentum=1.5"),
        ({"norm": "group", "groups": 0}, "groups=0"),
    ],
)
def test_what_cannot_be_right(options, words):
    with pytest.raises(bnify.UsageError) as caught:
        bnify.insert(model(), X, **options)
    assert words in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init": "preserve", "norm": "group"}, "preserve"),
        ({"init": "preserve", "norm": "batch-noaffine"}, "preserve"),
        ({"init": "preserve", "norm": "auto"}, "preserve"),
        ({"init": "preserve", "zero_gamma": True}, "zero_gamma"),
        ({"zero_gamma": True, "norm": "batch-noaffine"}, "no scale"),
        ({"drop_bias": True, "norm": "layer"}, "drop_bias"),
        ({"drop_bias": True, "norm": "group"}, "drop_bias"),
        ({"drop_bias": True, "norm": "instance"}, "drop_bias"),
        ({"drop_bias": True, "position": "after-act"}, "drop_bias"),
        ({"groups": 4}, "groups"),
    ],
)
def test_contradictions(options, words):
    with pytest.raises(bnify.PlanError) as caught:
        bnify.insert(model(), X, **options)
    assert words in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("option", ["include", "exclude", "only"])
@pytest.mark.parametrize("glob", ["5", "1", "layer*", "type:Conv2d", "type:ReLU", ""])
def test_a_glob_that_matches_no_layer(option, glob):
    with pytest.raises(bnify.PlanError) as caught:
        bnify.insert(model(), X, **{option: [glob]})
    assert repr(glob) in caught.value.message
    assert "0, 2, 4" in caught.value.hint


def edits(**options) -> list[str]:
    return [e.layer for e in api.plan(model(), X, **options).edits]


def test_globs_select():
    assert edits() == ["0", "2"]
    assert edits(include="4") == ["0", "2", "4"]  # includes, does not restrict
    assert edits(include="type:Linear") == ["0", "2", "4"]
    assert edits(include="type:Lin*") == ["0", "2", "4"]
    assert edits(exclude="0") == ["2"]
    assert edits(exclude=["[02]"]) == []
    assert edits(only="2") == ["2"]
    assert edits(only="4") == []  # restricts, does not include
    assert edits(only="4", include="4") == ["4"]
    assert edits(include="*", exclude="4", only=["0", "4"]) == ["0"]  # exclude wins


def test_type_globs_know_base_classes():
    class MyLinear(nn.Linear):
        pass

    net = nn.Sequential(MyLinear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def skipped(glob):
        return [s.layer for s in api.plan(net, X, exclude=glob).skips if s.reason == "excluded"]

    assert skipped("type:MyLinear") == ["0"]
    assert skipped("type:Linear") == ["0", "2", "4"]


def test_a_glob_matches_every_name_of_a_shared_layer():
    net = model()
    net.register_module("alias", net[0])
    plan = api.plan(nn.Sequential(*list(net.children())[:5]), X)
    assert plan.edits[0].layer == "0"

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.same = self.a
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(torch.relu(self.same(x)))

    assert [e.layer for e in api.plan(Twice(), X).edits] == ["a"]
    assert [e.layer for e in api.plan(Twice(), X, exclude="same").edits] == []


def test_the_reason_names_the_option():
    plan = api.plan(model(), X, exclude="0", only=["0", "2"])
    details = {s.layer: s.detail for s in plan.skips}
    assert details == {"0": "by exclude '0'", "4": "not named by only"}


def test_options_are_remembered():
    plan = api.plan(model(), X, norm="group", include="4", batch_size=8)
    assert plan.options == {"norm": "group", "include": ["4"], "batch_size": 8}
    assert api.plan(model(), X).options == {}
