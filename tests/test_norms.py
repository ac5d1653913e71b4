"""Kinds of norm: which module a kind becomes, what it computes, and the rules that choose."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnify
import laws
from bnify.layers import ChannelRMSNorm, TokenNorm
from bnify.norms import KINDS, each_norm, group_count, resolve

LAYERS = {
    "Linear": (lambda: nn.Linear(6, 32), (6,)),
    "Conv1d": (lambda: nn.Conv1d(4, 32, 3), (4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 32, 3, groups=2), (4, 7, 6)),
    "Conv3d": (lambda: nn.Conv3d(2, 32, 2), (2, 4, 5, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 32, 2, 2, groups=2), (4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 32, 2, bias=False), (4, 3, 4)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 32, 2), (2, 2, 3, 2)),
    "tokens": (lambda: nn.Linear(6, 32), (5, 6)),
    "tokens-T-equals-C": (lambda: nn.Linear(6, 32), (32, 6)),
    "tokens-4d": (lambda: nn.Linear(6, 32), (3, 4, 6)),
}


class OneLayer(nn.Module):
    """A layer whose output is scaled per channel: no head, no activation."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(32, 3) if isinstance(layer, nn.Linear) else _head(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)))


def _head(layer: nn.Module) -> nn.Module:
    space = len(layer.kernel_size)
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[space](32, 2, 1)


def by_hand(norm: str, y: Tensor, last: bool, eps: float = 1e-5) -> Tensor:
    """What a fresh norm gives in train mode, from its definition, channels on axis 1 or last."""
    z = y.movedim(-1, 1) if last else y
    over = tuple(range(2, z.ndim))
    match norm:
        case "batch" | "batch-noaffine" | "sync":
            axes = (0, *over)
        case "instance":
            axes = over
        case "layer" | "rms":
            axes = (1,) if last else (1, *over)
        case "group":
            groups = group_count(z.shape[1], linear=last)
            if last:  # every row is a sample
                g = z.movedim(1, -1).unflatten(-1, (groups, -1))
                var, mean = torch.var_mean(g, -1, correction=0, keepdim=True)
                return ((g - mean) / (var + eps).sqrt()).flatten(-2)
            g = z.unflatten(1, (groups, -1))
            axes = tuple(range(2, g.ndim))
            var, mean = torch.var_mean(g, axes, correction=0, keepdim=True)
            return ((g - mean) / (var + eps).sqrt()).flatten(1, 2)
    if norm == "rms":
        eps = torch.finfo(y.dtype).eps
        z = z / (z.square().mean(axes, keepdim=True) + eps).sqrt()
    else:
        var, mean = torch.var_mean(z, axes, correction=0, keepdim=True)
        z = (z - mean) / (var + eps).sqrt()
    return z.movedim(1, -1) if last else z


@pytest.mark.parametrize("norm", [k for k in KINDS if k != "auto"])
@pytest.mark.parametrize("where", LAYERS)
def test_every_kind_on_every_layer(norm, where):
    make, shape = LAYERS[where]
    model = OneLayer(make()).double()
    x = torch.randn(4, *shape, dtype=torch.float64) * 3 + 1
    result = bnify.insert(model, x, norm=norm, include="layer")
    linear = isinstance(model.layer, nn.Linear)
    if norm == "instance" and linear:
        reason = "one-value-per-channel" if where == "Linear" else "token-layer"
        assert {s.layer: s.reason for s in result.plan.skips}["layer"] == reason
        return
    (edit,) = result.plan.edits
    assert (edit.norm, edit.channels) == (norm, 32)
    assert result.verification.passed
    got = result.model.train().layer(x)
    want = by_hand(norm, model.layer(x), linear)
    assert laws.relative_error(want, got) < 1e-9
    assert not laws.training_step(result.model, x)


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "rms", "instance", "sync"])
def test_scale_and_shift_are_per_channel(norm):
    conv = OneLayer(nn.Conv2d(4, 32, 3)).double()
    x = torch.randn(4, 4, 7, 6, dtype=torch.float64)
    model = bnify.insert(conv, x, norm=norm, verify=False).model.train()
    own = each_norm(model.layer.norm)[0]
    want = by_hand(norm, conv.layer(x), last=False)
    with torch.no_grad():
        own.weight.copy_(torch.linspace(-2, 2, 32))
        scale = own.weight.view(-1, 1, 1)
        shift = torch.zeros(1, dtype=torch.float64)
        if norm != "rms":
            own.bias.copy_(torch.linspace(3, 1, 32))
            shift = own.bias.view(-1, 1, 1)
    assert laws.relative_error(want * scale + shift, model.layer(x)) < 1e-9


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("batch", nn.BatchNorm2d),
        ("batch-noaffine", nn.BatchNorm2d),
        ("sync", nn.SyncBatchNorm),
        ("group", nn.GroupNorm),
        ("layer", nn.GroupNorm),
        ("rms", ChannelRMSNorm),
        ("instance", nn.InstanceNorm2d),
    ],
)
def test_modules_on_convolutions(norm, kind):
    model = bnify.insert(OneLayer(nn.Conv2d(4, 32, 3)), torch.randn(4, 4, 6, 6), norm=norm).model
    assert type(model.layer.norm) is kind


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("batch", TokenNorm),
        ("sync", TokenNorm),
        ("group", TokenNorm),
        ("layer", nn.LayerNorm),
        ("rms", nn.RMSNorm),
    ],
)
def test_modules_on_tokens(norm, kind):
    x = torch.randn(4, 5, 6)
    model = bnify.insert(OneLayer(nn.Linear(6, 32)), x, norm=norm, include="layer").model
    assert type(model.layer.norm) is kind


@pytest.mark.parametrize("eps", [1e-3, 0.5])
@pytest.mark.parametrize("norm", [k for k in KINDS if k != "auto"])
def test_eps_reaches_the_norm_and_the_recording(norm, eps):
    x = torch.randn(4, 4, 6, 6) * 0.1
    result = bnify.insert(OneLayer(nn.Conv2d(4, 32, 3)), x, norm=norm, eps=eps)
    own = each_norm(result.model.layer.norm)[0]
    assert own.eps == eps
    assert result.verification.passed
    plain = bnify.insert(OneLayer(nn.Conv2d(4, 32, 3)), x, norm=norm)
    assert each_norm(plain.model.layer.norm)[0].eps in (1e-5, None)


def test_momentum_reaches_the_norm_and_the_recording():
    x = torch.randn(4, 4, 6, 6)
    result = bnify.insert(OneLayer(nn.Conv2d(4, 32, 3)), x, momentum=0.37)
    assert result.model.layer.norm.momentum == 0.37
    assert result.verification.passed
    group = bnify.insert(OneLayer(nn.Conv2d(4, 32, 3)), x, norm="group", momentum=0.37)
    assert group.plan.edits[0].momentum is None


# -- how many groups -------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [*range(1, 70), 96, 128, 192, 256, 257, 320, 512, 768, 1000])
@pytest.mark.parametrize("linear", [False, True])
def test_group_count_is_the_largest_that_leaves_enough(channels, linear):
    least = 16 if linear else 8
    fitting = [g for g in range(1, 33) if channels % g == 0 and channels // g >= least]
    assert group_count(channels, linear=linear) == max(fitting, default=1)


@pytest.mark.parametrize(
    ("channels", "linear", "groups"),
    [
        (64, False, 8),
        (64, True, 4),
        (512, False, 32),
        (512, True, 32),
        (7, False, 1),
        (16, True, 1),
    ],
)
def test_group_count_of_known_widths(channels, linear, groups):
    assert group_count(channels, linear=linear) == groups


def test_a_linear_with_too_few_channels_gets_layer_norm():
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    result = bnify.insert(model, torch.randn(4, 6), norm="group")
    assert [(e.norm, e.groups) for e in result.plan.edits] == [("layer", None), ("group", 4)]
    assert result.verification.passed


def test_groups_that_do_not_divide():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    with pytest.raises(bnify.PlanError, match="3 groups do not divide the 16 channels of 0"):
        bnify.insert(model, torch.randn(4, 6), norm="group", groups=3)
    assert (
        bnify.insert(model, torch.randn(4, 6), norm="group", groups=2).model[0].norm.num_groups == 2
    )


# -- auto ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "world", "conv", "linear"),
    [
        (32, 1, "batch", "batch"),
        (16, 1, "batch", "batch"),
        (16, 8, "batch", "batch"),
        (15, 1, "batch", "batch"),
        (8, 1, "batch", "batch"),
        (8, 2, "sync", "sync"),
        (15, 2, "sync", "sync"),
        (2, 8, "sync", "sync"),
        (2, 7, "group", "layer"),
        (7, 1, "group", "layer"),
        (2, 1, "group", "layer"),
        (1, 1, "group", "layer"),
    ],
)
def test_auto(batch_size, world, conv, linear):
    def kind(is_linear):
        return resolve("auto", linear=is_linear, batch_size=batch_size, world_size=world)

    assert (kind(False), kind(True)) == (conv, linear)


@pytest.mark.parametrize(
    ("batch_size", "kinds", "noisy"),
    [
        (2, ["group", "layer"], False),
        (8, ["batch", "batch"], True),
        (16, ["batch", "batch"], False),
    ],
)
def test_auto_in_a_plan(batch_size, kinds, noisy):
    model = nn.Sequential(
        nn.Conv1d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
    )
    result = bnify.insert(model, torch.randn(4, 3, 6), norm="auto", batch_size=batch_size)
    assert [e.norm for e in result.plan.edits] == kinds
    assert any("noisy" in note for note in result.plan.notes) == noisy
    assert result.verification.passed


def test_batch_size_of_the_example_or_assumed():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    small = bnify.insert(model, torch.randn(4, 6), norm="auto", verify=False).plan
    assert small.edits[0].norm == "layer"
    single = bnify.insert(model, torch.randn(1, 6), norm="auto", verify=False).plan
    assert single.edits[0].norm == "batch"
    assert any("batch size 32 assumed" in note for note in single.notes)
    said = bnify.insert(model, torch.randn(1, 6), norm="auto", batch_size=4, verify=False).plan
    assert said.edits[0].norm == "layer"
    assert not any("assumed" in note for note in said.notes)


# -- what is said ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["group", "layer", "instance", "rms"])
def test_kinds_that_do_not_fold_say_so(norm):
    x = torch.randn(4, 4, 6, 6)
    plan = bnify.insert(OneLayer(nn.Conv2d(4, 32, 3)), x, norm=norm, verify=False).plan
    assert any("only batch norm folds away" in note for note in plan.notes)
    plan = bnify.insert(OneLayer(nn.Conv2d(4, 32, 3)), x, verify=False).plan
    assert not any("folds away" in note for note in plan.notes)


def test_channel_rms_norm_is_the_definition():
    x = torch.randn(3, 5, 4, 2, dtype=torch.float64) - 2
    norm = ChannelRMSNorm(5, eps=0.25).double()
    nn.init.normal_(norm.weight)
    want = x / (x.square().mean((1, 2, 3), keepdim=True) + 0.25).sqrt()
    assert laws.relative_error(want * norm.weight.view(1, 5, 1, 1), norm(x)) < 1e-14


def test_token_norm_is_batch_norm_of_the_rows():
    x = torch.randn(4, 7, 7, 5, dtype=torch.float64).transpose(0, 2)
    norm = TokenNorm(nn.BatchNorm1d(5).double())
    rows = x.reshape(-1, 5)
    want = F.batch_norm(rows, None, None, training=True).view(x.shape)
    assert laws.relative_error(want, norm(x)) < 1e-14
