"""Each reason to leave a layer alone: a network in which it holds, and a near miss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import bnify
import nets
from bnify import api
from bnify.plan import Reason


class Net(nn.Module):
    """Layers by keyword and a forward given as a function of (layers, x)."""

    def __init__(self, program, **layers: nn.Module) -> None:
        super().__init__()
        self.program = program
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor):
        return self.program(self, *inputs)


def rows(*shape: int) -> Tensor:
    return torch.randn(4, *shape)


def decide(model: nn.Module, *inputs: Tensor, **options) -> dict[str, str]:
    """Layer to reason, or to the kind of norm it gets."""
    plan = api.plan(model, inputs, **{"batch_size": 32, **options})
    decided = {edit.layer: edit.norm for edit in plan.edits}
    return decided | {skip.layer: str(skip.reason) for skip in plan.skips}


def detail(model: nn.Module, layer: str, *inputs: Tensor, **options) -> str:
    plan = api.plan(model, inputs, **{"batch_size": 32, **options})
    return next(s.detail for s in plan.skips if s.layer == layer)


def mlp(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Linear(8, 3))


# -- excluded --------------------------------------------------------------------------------------


def test_excluded():
    model = mlp(nn.ReLU())
    assert decide(model, rows(6), exclude="0") == {"0": "excluded", "2": "output-head"}
    assert decide(model, rows(6), exclude="2")["0"] == "batch"


# -- never called ----------------------------------------------------------------------------------


def test_never_called():
    def forward(net, x):
        return net.head(F.relu(net.used(x)))

    layers = {n: nn.Linear(6, 6) for n in ("used", "unused", "head")}
    assert decide(Net(forward, **layers), rows(6)) == {
        "used": "batch",
        "unused": "never-called",
        "head": "output-head",
    }


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_never_called_in_one_of_the_modes(mode):
    def forward(net, x):
        x = F.relu(net.always(x))
        if net.training == (mode == "train"):
            x = F.relu(net.sometimes(x))
        return net.head(x)

    layers = {n: nn.Linear(6, 6) for n in ("always", "sometimes", "head")}
    model = Net(forward, **layers)
    assert decide(model, rows(6), include="*")["sometimes"] == "never-called"
    assert mode in detail(model, "sometimes", rows(6))
    result = bnify.insert(model, rows(6))
    assert result.verification.passed
    assert [e.layer for e in result.plan.edits] == ["always"]


# -- inside a fused module -------------------------------------------------------------------------


def test_inside_a_fused_module():
    inputs = torch.randn(2, 5, 6)
    decided = decide(nets.CrossAttention(), inputs, include="*")
    assert decided["attention.out_proj"] == "inside-fused-module"
    assert decided["fc"] == "batch"  # the near miss: the same size, called as a module


def test_recurrent_modules_are_fused():
    model = nets.LstmTagger()
    ids = torch.randint(0, 50, (4, 7))
    decided = decide(model, ids, include="*")
    assert decided["lstm"] == "inside-fused-module"
    assert decided["hidden"] == "batch"


def test_a_layer_used_through_its_weight_is_not_called():
    decided = decide(nets.FunctionalWeights(), torch.randn(4, 3, 8, 8), include="*")
    assert decided["conv"] == "inside-fused-module"
    assert decided["weight"] == "inside-fused-module"
    assert decided["head"] == "batch"


# -- attention -------------------------------------------------------------------------------------


def test_attention_projections():
    inputs = {"input_ids": torch.randint(1, 100, (4, 12))}
    plan = api.plan(nets.BertLike(), inputs, batch_size=32)
    reasons = {s.layer: s.reason for s in plan.skips}
    for name in ("query", "key", "value", "out"):
        assert reasons[f"blocks.0.{name}"] == Reason.ATTENTION_PROJECTION
    # The near miss: on the same tokens, beside the attention.
    assert reasons["blocks.0.up"] == Reason.TOKEN_LAYER


def test_attention_projections_can_be_included():
    inputs = {"input_ids": torch.randint(1, 100, (4, 12))}
    plan = api.plan(nets.BertLike(), inputs, include="*.query", batch_size=32)
    # The include overrides every policy reason, so that of tokens too.
    assert [e.layer for e in plan.edits] == ["blocks.0.query", "blocks.1.query"]


def test_one_matrix_for_query_key_and_value():
    plan = api.plan(nets.GptLike(), torch.randint(1, 100, (4, 10)), batch_size=32)
    reasons = {s.layer: s.reason for s in plan.skips}
    assert reasons["h.0.c_attn"] == Reason.ATTENTION_PROJECTION
    assert reasons["h.0.c_proj"] == Reason.ATTENTION_PROJECTION
    assert reasons["h.0.mlp.c_proj"] == Reason.TOKEN_LAYER
    assert reasons["lm_head"] == Reason.TIED_WEIGHTS


def test_a_product_without_softmax_is_no_attention():
    def forward(net, x):
        q, k = net.q(x), net.k(x)
        return net.head((q @ k.transpose(1, 2)).mean((1, 2), keepdim=True).flatten(1))

    model = Net(forward, q=nn.Linear(6, 6), k=nn.Linear(6, 6), head=nn.Linear(1, 2))
    assert decide(model, rows(5, 6))["q"] == "token-layer"


# -- computed weights ------------------------------------------------------------------------------


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class ScaledConv(nn.Conv2d):
    """Equalised learning rate: a constant times the weight, no statistics."""

    def forward(self, x):
        return F.conv2d(x, self.weight * 0.7, self.bias, self.stride, self.padding)


def test_weight_standardised():
    def net(kind):
        return nn.Sequential(
            kind(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2)
        )

    x = torch.randn(4, 3, 8, 8)
    assert decide(net(StandardisedConv), x)["0"] == "weight-standardised"
    assert decide(net(StandardisedConv), x, include="*")["0"] == "weight-standardised"
    assert decide(net(ScaledConv), x)["0"] == "batch"


def test_weight_norm_is_no_standardisation():
    model = nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    assert decide(model, rows(6))["0"] == "batch"


# -- shared layers ---------------------------------------------------------------------------------


def test_tied_weights():
    def forward(net, x):
        return net.head(F.relu(net.b(F.relu(net.a(x)))))

    model = Net(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 6), head=nn.Linear(6, 2))
    assert decide(model, rows(6))["a"] == "batch"
    model.b.weight = model.a.weight
    decided = decide(model, rows(6), include="*")
    assert (decided["a"], decided["b"]) == ("tied-weights", "tied-weights")
    assert "b.weight" in detail(model, "a", rows(6))
    assert decide(model, rows(6), per_call=True)["a"] == "batch"


def test_tied_by_memory_only():
    def forward(net, x):
        return net.head(F.relu(net.b(F.relu(net.a(x)))))

    model = Net(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 6), head=nn.Linear(6, 2))
    model.b.weight = nn.Parameter(model.a.weight.data)  # another Parameter on the same memory
    assert decide(model, rows(6))["a"] == "tied-weights"


def test_called_more_than_once():
    decided = decide(nets.Siamese(), rows(10), rows(10), include="*")
    assert decided["encoder.0"] == decided["encoder.2"] == "called-more-than-once"
    assert decided["head"] == "batch"
    assert decide(nets.Siamese(), rows(10), rows(10), per_call=True)["encoder.0"] == "batch"


def test_called_more_often_in_train_mode():
    def forward(net, x):
        y = net.a(x)
        if net.training:
            y = y + net.a(x * 0.5)
        return net.head(F.relu(y))

    model = Net(forward, a=nn.Linear(6, 6), head=nn.Linear(6, 2))
    assert decide(model, rows(6))["a"] == "called-more-than-once"
    assert decide(model, rows(6), per_call=True)["a"] == "called-more-than-once"
    assert "2 in train mode" in detail(model, "a", rows(6), per_call=True)


# -- heads -----------------------------------------------------------------------------------------


def test_output_head_behind_pooling_and_softmax():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 5, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Softmax(1),
    )
    decided = decide(model, torch.randn(4, 3, 8, 8))
    assert decided == {"0": "batch", "2": "output-head"}
    assert decide(model, torch.randn(4, 3, 8, 8), include="2")["2"] == "batch"


def test_several_heads_and_a_layer_that_is_one_on_one_path_only():
    def forward(net, x):
        body = F.relu(net.body(x))
        code = net.code(body)
        return net.a(body), code, net.b(F.relu(code))

    model = Net(forward, **{n: nn.Linear(6, 6) for n in ("body", "code", "a", "b")})
    decided = decide(model, rows(6))
    assert decided == {
        "body": "batch",
        "code": "output-head",
        "a": "output-head",
        "b": "output-head",
    }


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
    assert any("1 frozen layers" in note for note in notes)


def test_no_batch_axis():
    def forward(net, x):
        return net.head(F.relu(net.a(x.mean(0))))

    model = Net(forward, a=nn.Linear(6, 8), head=nn.Linear(8, 2))
    assert decide(model, rows(6), include="*")["a"] == "no-batch-axis"
    image = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    assert decide(image, torch.randn(3, 9, 9), include="*")["0"] == "no-batch-axis"


# -- precedence ------------------------------------------------------------------------------------


PRECEDENCE = (
    "excluded",
    "never-called",
    "inside-fused-module",
    "attention-projection",
    "weight-standardised",
    "tied-weights",
    "called-more-than-once",
    "output-head",
    "already-normed",
    "gate",
    "one-value-per-channel",
    "pre-norm",
    "token-layer",
    "functional-activation",
)


def test_rules_are_asked_in_the_order_of_precedence():
    from bnify.insertion.rules import RULES

    asked = [str(reason) for reason, _, _ in RULES]
    last = {reason: index for index, reason in enumerate(asked)}
    order = [last[reason] for reason in PRECEDENCE[1:]]
    assert order == sorted(order)


class Everything(nn.Module):
    """Layers for which several reasons hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = (nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:  # tied, called twice, head, normed, tokens
        return self.norm(self.a(self.a(x))) + self.b(x)


def test_of_several_reasons_the_first_is_given():
    x = rows(5, 6)
    decided = decide(Everything(), x)
    assert decided == {"a": "tied-weights", "b": "tied-weights", "unused": "never-called"}
    assert decide(Everything(), x, exclude=["unused", "a"])["unused"] == "excluded"
    model = Everything()
    model.b = nn.Linear(6, 6)
    assert decide(model, x) == {
        "a": "called-more-than-once",
        "b": "output-head",
        "unused": "never-called",
    }
    single = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2))
    assert decide(single, x)["0"] == "already-normed"  # before token-layer
    assert decide(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), x)["0"] == "output-head"


def test_gate_comes_before_one_value_per_channel():
    decided = decide(nets.SqueezeExcite(), torch.randn(4, 3, 16, 16))
    assert decided["squeeze"] == "gate"
    included = decide(nets.SqueezeExcite(), torch.randn(4, 3, 16, 16), include="squeeze")
    assert included["squeeze"] == "one-value-per-channel"  # include stops at an impossibility
