"""What long runs of ``make fuzz`` found; each test states the right behaviour."""

from __future__ import annotations

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
