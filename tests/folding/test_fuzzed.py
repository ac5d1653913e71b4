"""What long runs of ``make fuzz`` found; each test states the right behaviour."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bnify
import laws
from foldparts import FrozenSteps
from patterns.kit import Line
from replaying import assert_untouched, fingerprint_of


def test_a_merged_layer_leaves_no_dropout_behind_in_the_graph():
    """An eval dropout counts as random to fx, and kept the layer before it in a dead chain."""
    net = laws.hostile_(
        Line(
            n=nn.BatchNorm1d(4), a=nn.Linear(4, 8, bias=False), d=nn.Dropout(0.3), b=nn.Linear(8, 8)
        )
    ).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    before = fingerprint_of(net)
    result = bnify.fold(net, x, merge=True)
    assert_untouched(before, fingerprint_of(net))
    assert {edit.layer: edit.kind for edit in result.plan.edits} == {
        "n": "fold-forward",
        "a": "merge",
    }
    laws.assert_same_function(net, result.model, x)
    assert not any("dropout" in str(node.target) for node in result.graph.graph.nodes)


def test_a_look_alike_that_runs_twice_in_a_row_is_one_norm():
    """Two calls of one module that follow each other are two chains, not a longer one."""
    net = laws.hostile_(Line(a=nn.Conv2d(3, 4, 3), n=FrozenSteps(4))).double()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x):
            y = self.net.n(self.net.n(self.net.a(x)))
            return y + self.net.n(x[:, :1].expand_as(y) if x.shape == y.shape else y.relu())

    model = Twice().eval()
    result = bnify.fold(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    listed = [e.layer for e in result.plan.edits] + [s.layer for s in result.plan.skips]
    assert listed == ["net.n"]


class Sum(nn.Module):
    """A sum of branches, as a function of the model and its input."""

    def __init__(self, run, **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.run(self, x)


@pytest.mark.parametrize("emit", ["module", "graph"])
def test_a_sum_that_is_added_to_itself_keeps_its_branches(emit):
    """``(a + b) + (a + b)`` reads each branch twice: merging one with itself lost it."""

    def twice(model, x):
        y = model.a(x) + model.b(x)
        return (y + y).relu()

    net = laws.hostile_(Sum(twice, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(3, 4, 1))).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    result = bnify.fold(net, x, merge=True, emit=emit, verify=False)
    assert [edit.kind for edit in result.plan.edits] == ["merge"]
    laws.assert_same_function(net, result.model, x)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.GroupNorm(4, 4)])
@pytest.mark.parametrize("emit", ["module", "graph"])
def test_a_group_norm_is_no_branch_to_merge(norm, emit):
    """With ``affines`` its scale and shift are known, and it is no affine map of its input."""
    net = Sum(lambda m, x: (m.a(x) + m.n(x)).relu(), a=nn.Conv2d(4, 4, 1), n=norm)
    net = laws.hostile_(net).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    result = bnify.fold(net, x, merge=True, affines=True, emit=emit, verify=False)
    assert not [edit for edit in result.plan.edits if edit.kind == "merge"]
    laws.assert_same_function(net, result.model, x)


def test_a_computed_weight_that_runs_twice_takes_no_branch():
    net = laws.hostile_(
        Sum(
            lambda m, x: m.p(m.a(x) + m.p(x)),
            a=nn.Linear(4, 4),
            p=nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        )
    ).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    result = bnify.fold(net, x, merge=True, verify=False)
    laws.assert_same_function(net, result.model, x)
    assert not [edit for edit in result.plan.edits if edit.layer == "p" or edit.into == ("p",)]


def test_a_norm_before_merged_layers_reads_no_layer_that_is_gone():
    """The first of two merged layers was still seen as a reader of the norm."""

    def run(model, x):
        y = model.n(x.relu())
        return model.b(model.d(model.a(y))), y.sin()

    parts = {
        "n": nn.BatchNorm1d(4),
        "a": nn.Linear(4, 6),
        "d": nn.Dropout(0.2),
        "b": nn.Linear(6, 3),
    }
    net = laws.hostile_(Sum(run, **parts)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    result = bnify.fold(net, x, merge=True, verify=False)
    assert {e.layer: e.kind for e in result.plan.edits} == {"a": "merge"}
    (skip,) = result.plan.skips
    assert skip.layer == "n"
    laws.assert_same_function(net, result.model, x)


def test_merged_layers_take_the_norm_behind_them():
    """What did nothing between them is no second reader either."""
    net = laws.hostile_(
        Line(a=nn.Linear(4, 6), d=nn.Dropout(0.2), b=nn.Linear(6, 3), n=nn.BatchNorm1d(3))
    ).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    result = bnify.fold(net, x, merge=True)
    assert {e.layer: e.kind for e in result.plan.edits} == {"a": "merge", "n": "fold-backward"}
    laws.assert_same_function(net, result.model, x)


class StaysInForward(nn.Module):
    """A norm in a forward, behind a sum, before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
        self.n = nn.BatchNorm1d(8)

    def forward(self, x):
        y, n = self.a(x) + self.b(x), self.n
        y = nn.functional.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias)
        return self.c(y)


@pytest.mark.parametrize("emit", ["module", "graph"])
def test_a_norm_that_stays_in_a_forward_keeps_its_width(emit):
    """In a module tree the norm still gets the sum, which must not become narrower."""
    net = laws.hostile_(StaysInForward().eval()).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    result = bnify.fold(net, x, merge=True, emit=emit)
    merged = {e.layer for e in result.plan.edits if e.kind == "merge"}
    assert merged == ({"b"} if emit == "module" else {"a", "b"})
    laws.assert_same_function(net, result.model, x)
