"""Norms behind activations, and layers that cannot carry one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnify
from bnify import api
from deciding import Net, decide, mlp, rows

# -- after-act -------------------------------------------------------------------------------------


def after_act(model: nn.Module, *inputs: Tensor, **options) -> dict[str, str]:
    plan = api.plan(model, inputs, position="after-act", batch_size=32, **options)
    decided = {edit.layer: edit.carrier for edit in plan.edits}
    return decided | {skip.layer: str(skip.reason) for skip in plan.skips}


def test_after_act():
    assert after_act(mlp(nn.ReLU()), rows(6)) == {"0": "1", "2": "output-head"}
    assert after_act(mlp(nn.Dropout(0.1), nn.PReLU()), rows(6))["0"] == "2"


def test_functional_activation():
    def forward(net, x):
        return net.head(F.relu(net.a(x)))

    model = Net(forward, a=nn.Linear(6, 8), head=nn.Linear(8, 2))
    assert after_act(model, rows(6))["a"] == "functional-activation"
    assert after_act(model, rows(6), include="*")["a"] == "functional-activation"


def test_a_shared_activation_module_is_no_carrier():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(6, 8), act, nn.Linear(8, 8), act, nn.Linear(8, 2))
    decided = after_act(model, rows(6))
    assert decided == {
        "0": "functional-activation",
        "2": "functional-activation",
        "4": "output-head",
    }


def test_an_activation_module_that_does_more_is_no_carrier():
    class Scaled(nn.Module):
        def forward(self, x):
            return F.relu(x) * 2

    assert after_act(mlp(Scaled()), rows(6))["0"] == "functional-activation"


def test_an_activation_on_another_shape_is_no_carrier():
    """Behind a transpose the channels are elsewhere: a norm there would take tokens for them."""

    def transposed(net, x):
        return net.head(net.act(net.a(x).transpose(1, 2)).mean(2))

    model = Net(transposed, a=nn.Linear(6, 8), act=nn.ReLU(), head=nn.Linear(8, 2))
    assert after_act(model, rows(5, 6), include="*")["a"] == "functional-activation"
    assert after_act(model, rows(8, 6), include="*")["a"] == "functional-activation"

    def flat(net, x):
        return net.head(net.act(net.a(x).flatten(1)))

    model = Net(flat, a=nn.Conv1d(3, 4, 1), act=nn.ReLU(), head=nn.Linear(20, 2))
    assert after_act(model, rows(3, 5))["a"] == "functional-activation"


def test_after_act_without_an_activation():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    assert after_act(model, rows(6))["0"] == "0"


# -- beyond the policy -----------------------------------------------------------------------------


class PostActivated(nn.Conv2d):
    """Does more than its weight."""

    def forward(self, x):
        return F.relu(super().forward(x))


class SamePadded(nn.Conv2d):
    """Does more, but before its weight is applied."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class OwnNorm(nn.Conv2d):
    """A convolution with an optional norm, as detection code bases have it."""

    def __init__(self, *args, norm=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return x if self.norm is None else self.norm(x)


@pytest.mark.parametrize(
    ("kind", "decision"),
    [(PostActivated, "custom-forward"), (SamePadded, "batch"), (OwnNorm, "custom-forward")],
)
def test_custom_forward(kind, decision):
    model = nn.Sequential(
        kind(3, 8, 3), nn.ReLU(), nn.Flatten(2), nn.Conv1d(8, 4, 1), nn.ReLU(), nn.Conv1d(4, 2, 1)
    )
    assert decide(model, torch.randn(4, 3, 8, 8), include="0")["0"] == decision
    assert bnify.insert(model, torch.randn(4, 3, 8, 8)).verification.passed


def test_frozen():
    model = mlp(nn.ReLU())
    model[0].requires_grad_(False)
    assert decide(model, rows(6))["0"] == "batch"
    assert decide(model, rows(6), skip_frozen=True)["0"] == "frozen"
    model[0].bias.requires_grad_(True)  # takes gradients still
    assert decide(model, rows(6), skip_frozen=True)["0"] == "batch"
    model[0].bias.requires_grad_(False)
    notes = api.plan(model, rows(6)).notes
    assert any("1 frozen layer;" in note for note in notes)


def test_no_batch_axis():
    def forward(net, x):
        return net.head(F.relu(net.a(x.mean(0))))

    model = Net(forward, a=nn.Linear(6, 8), head=nn.Linear(8, 2))
    assert decide(model, rows(6), include="*")["a"] == "no-batch-axis"
    image = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    assert decide(image, torch.randn(3, 9, 9), include="*")["0"] == "no-batch-axis"
