"""Each reason to leave a layer alone: a network in which it holds, and a near miss.

Up to the output head, in the order of precedence, and of several reasons the first;
test_policy.py has the others.
"""

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
from deciding import Net, decide, detail, mlp, rows

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


def test_reasons_stand_in_their_order_of_precedence():
    """The README's table is written from the order of ``Reason``; the rules decide."""
    from bnify.insertion.rules import RULES, already_carries

    asked = [reason for reason, rule, _ in RULES if rule is not already_carries]
    assert [Reason.EXCLUDED, *dict.fromkeys(asked)] == [r for r in Reason if r.insertion]


@pytest.mark.parametrize("how", ["highway", "clamped", "one-plus"])
def test_gates_in_other_words(how):
    """t·h + (1 - t)·x, relu6 written as a clamp, and 1 + sigmoid are gates all the same."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.h, self.t, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            h, t = torch.relu(self.h(x)), self.t(x)
            if how == "highway":
                t = torch.sigmoid(t)
                return self.head(t * h + (1 - t) * x)
            t = torch.clamp(t + 3, 0, 6) / 6 if how == "clamped" else 1 + torch.sigmoid(t)
            return self.head(h * t)

    plan = api.plan(Gated(), torch.randn(16, 8))
    assert [edit.layer for edit in plan.edits] == ["h"]
    assert {s.layer: str(s.reason) for s in plan.skips}["t"] == "gate"
