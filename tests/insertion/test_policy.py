"""The reasons after the output head, each with a network in which it holds and a near miss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nets
from bnify import api
from deciding import Net, decide, mlp, rows

# -- norms that are there --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "middle",
    [
        (nn.BatchNorm1d(8), nn.ReLU()),
        (nn.ReLU(), nn.BatchNorm1d(8)),
        (nn.Dropout(0.1), nn.Identity(), nn.LayerNorm(8)),
        (nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Tanh(), nn.RMSNorm(8)),
        (nn.Unflatten(1, (8, 1)), nn.GroupNorm(2, 8), nn.Flatten()),
    ],
)
def test_already_normed(middle):
    assert decide(mlp(*middle), rows(6))["0"] == "already-normed"
    assert decide(mlp(*middle), rows(6), include="0")["0"] == "batch"


def test_a_norm_behind_two_activations_does_not_count():
    assert decide(mlp(nn.ReLU(), nn.Tanh(), nn.BatchNorm1d(8)), rows(6))["0"] == "batch"


def test_a_norm_on_the_other_branch_only():
    def forward(net, x):
        return net.head(F.relu(net.a(x)) + net.bn(net.b(x)))

    model = Net(
        forward, a=nn.Linear(6, 8), b=nn.Linear(6, 8), bn=nn.BatchNorm1d(8), head=nn.Linear(8, 2)
    )
    decided = decide(model, rows(6))
    assert (decided["a"], decided["b"]) == ("batch", "already-normed")


def test_a_norm_is_judged_by_what_it_does():
    class NormActivation(nn.Module):  # a name is no norm
        def forward(self, x):
            return F.relu(x)

    class Standard(nn.Module):  # written by hand
        def forward(self, x):
            return (x - x.mean(0)) * torch.rsqrt(x.var(0) + 1e-5)

    assert decide(mlp(NormActivation()), rows(6))["0"] == "batch"
    assert decide(mlp(Standard()), rows(6))["0"] == "already-normed"


# -- gates -----------------------------------------------------------------------------------------


def test_gates():
    decided = decide(nets.SqueezeExcite(), torch.randn(4, 3, 16, 16))
    assert (decided["squeeze"], decided["excite"]) == ("gate", "gate")
    assert (decided["depthwise"], decided["point"]) == ("batch", "batch")


@pytest.mark.parametrize("squash", [torch.sigmoid, F.hardsigmoid, lambda x: F.softmax(x, 1)])
def test_a_gate_of_linear_layers(squash):
    def forward(net, x):
        return net.head(x * squash(net.g2(F.relu(net.g1(x)))))

    layers = {"g1": nn.Linear(6, 4), "g2": nn.Linear(4, 6), "head": nn.Linear(6, 2)}
    decided = decide(Net(forward, **layers), rows(6))
    assert (decided["g1"], decided["g2"]) == ("gate", "gate")
    assert decide(Net(forward, **layers), rows(6), include="g1")["g1"] == "batch"


def test_swish_and_a_branch_that_also_goes_elsewhere_are_no_gates():
    def swish(net, x):
        y = net.a(x)
        return net.head(y * torch.sigmoid(y))

    def both(net, x):
        y = net.a(x)
        return net.head(torch.cat([x * torch.sigmoid(y), torch.relu(y)], 1))

    a = nn.Linear(6, 6)
    assert decide(Net(swish, a=a, head=nn.Linear(6, 2)), rows(6))["a"] == "batch"
    assert decide(Net(both, a=a, head=nn.Linear(12, 2)), rows(6))["a"] == "batch"


# -- one value per channel -------------------------------------------------------------------------


def pooled_conv() -> nn.Module:
    def forward(net, x):
        x = F.relu(net.a(x)).mean((2, 3), keepdim=True)
        return net.head(F.relu(net.b(x)).flatten(1))

    return Net(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 16, 1), head=nn.Linear(16, 2))


@pytest.mark.parametrize("norm", ["batch", "batch-noaffine", "sync", "instance"])
def test_one_value_per_channel(norm):
    x = torch.randn(4, 3, 8, 8)
    decided = decide(pooled_conv(), x, norm=norm, include="*")
    assert (decided["a"], decided["b"]) == (norm, "one-value-per-channel")


@pytest.mark.parametrize("norm", ["group", "layer", "rms"])
def test_other_kinds_need_no_space(norm):
    assert decide(pooled_conv(), torch.randn(4, 3, 8, 8), norm=norm)["b"] == norm


def test_one_value_per_channel_at_the_batch_size_of_training():
    model = mlp(nn.ReLU())
    assert decide(model, rows(6), batch_size=1)["0"] == "one-value-per-channel"
    assert decide(model, rows(6), batch_size=2)["0"] == "batch"
    conv = nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Conv1d(4, 2, 1))
    assert decide(conv, rows(3, 2), batch_size=1)["0"] == "batch"


def test_few_values_are_warned_of():
    plan = api.plan(mlp(nn.ReLU()), rows(6), batch_size=15)
    assert any("fewer than 16 values" in note for note in plan.notes)
    plan = api.plan(mlp(nn.ReLU()), rows(6), batch_size=16)
    assert not any("fewer than 16 values" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("norm", "groups", "width", "reason"),
    [
        ("group", 8, 8, "one-value-per-channel"),
        ("group", 4, 8, "group"),
        ("layer", None, 1, "one-value-per-channel"),
        ("rms", None, 1, "one-value-per-channel"),
        ("instance", None, 8, "one-value-per-channel"),
    ],
)
def test_a_norm_over_a_single_value_is_a_constant(norm, groups, width, reason):
    """GroupNorm(C, C) on (N, C) and LayerNorm(1) give 0 whatever comes in."""
    model = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
    decided = decide(model, rows(6), norm=norm, groups=groups, include="0")
    assert decided["0"] == reason


# -- pre-norm --------------------------------------------------------------------------------------


def test_pre_norm_residual():
    decided = decide(nets.PreActivation(), torch.randn(4, 3, 12, 12))
    assert decided["convs.0"] == decided["convs.1"] == "pre-norm"
    included = decide(nets.PreActivation(), torch.randn(4, 3, 12, 12), include="convs.*")
    assert included["convs.0"] == "batch"


def test_pre_norm_concat_and_near_misses():
    def block(join):
        def forward(net, x):
            return net.head(join(x, net.conv(F.relu(net.bn(x)))))

        layers = {"bn": nn.BatchNorm1d(6), "conv": nn.Conv1d(6, 6, 1), "head": nn.Conv1d(6, 2, 1)}
        return Net(forward, **layers)

    x = rows(6, 5)
    assert decide(block(lambda a, b: a + b), x)["conv"] == "pre-norm"
    # normed at the entrance, but an activation comes before the join, or there is no join
    assert decide(block(lambda a, b: a + F.relu(b)), x)["conv"] == "batch"
    assert decide(block(lambda a, b: F.relu(b)), x)["conv"] == "batch"
    wide = block(lambda a, b: torch.cat([a, b], 1))
    wide.head = nn.Conv1d(12, 2, 1)
    assert decide(wide, x)["conv"] == "pre-norm"


def test_a_residual_without_a_norm_at_the_entrance():
    decided = decide(nets.PlainResidual(), torch.randn(4, 3, 16, 16))
    assert decided["blocks.0.conv2"] == "batch"


# -- tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "layer", "rms", "group"])
def test_token_layer(norm):
    def forward(net, x):
        return net.head(F.relu(net.a(x)).mean(1))

    model = Net(forward, a=nn.Linear(6, 32), head=nn.Linear(32, 2))
    assert decide(model, rows(5, 6), norm=norm)["a"] == "token-layer"
    assert decide(model, rows(5, 6), norm=norm, include="a")["a"] == norm


def test_two_dimensional_rows_are_no_tokens():
    def forward(net, x):
        return net.head(F.relu(net.a(x.flatten(0, 1))).view(x.shape[0], -1))

    model = Net(forward, a=nn.Linear(6, 8), head=nn.Linear(40, 2))
    assert decide(model, rows(5, 6))["a"] == "batch"


def test_no_option_puts_instance_norm_on_tokens():
    def forward(net, x):
        return net.head(F.relu(net.a(x)).mean(1))

    model = Net(forward, a=nn.Linear(6, 8), head=nn.Linear(8, 2))
    assert decide(model, rows(5, 6), norm="instance", include="a")["a"] == "token-layer"
