"""Arms of transformer encoders, whose fused kernel is layer norm's alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from comparing.arming import image, planned, running
from torch import Tensor, nn

import laws
from bnify.comparing import replacement
from bnify.comparing.arms import plan_arms
from bnify.structure import Call


def encoder_layer(**options) -> nn.TransformerEncoderLayer:
    options = {"batch_first": True, "dropout": 0.0, **options}
    return nn.TransformerEncoderLayer(16, 2, 32, dtype=torch.float64, **options)


def explicit(layer: nn.TransformerEncoderLayer, x: Tensor, norm) -> Tensor:
    """A post-norm encoder layer written down, its norms given by ``norm(x)``."""
    attended = F.multi_head_attention_forward(
        *(x.transpose(0, 1),) * 3,
        16,
        2,
        layer.self_attn.in_proj_weight,
        layer.self_attn.in_proj_bias,
        *(None, None, False, 0.0),
        layer.self_attn.out_proj.weight,
        layer.self_attn.out_proj.bias,
        training=False,
        need_weights=False,
    )[0].transpose(0, 1)
    x = norm(x + attended)
    return norm(x + layer.linear2(F.relu(layer.linear1(x))))


def batch(x: Tensor) -> Tensor:
    return F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2)


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (16,))


@pytest.mark.parametrize(
    ("kind", "train", "norm"),
    [
        ("batch", True, batch),
        ("batch", False, lambda x: x / (1 + 1e-5) ** 0.5),
        ("rms", True, rms),
        ("rms", False, rms),
        ("none", True, lambda x: x),
        ("none", False, lambda x: x),
        ("as-is", True, lambda x: F.layer_norm(x, (16,))),
        ("as-is", False, lambda x: F.layer_norm(x, (16,))),
    ],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_an_encoder_layer_runs_its_new_norms(kind, train, norm, gradients):
    assert torch.backends.mha.get_fastpath_enabled()
    layer, x = encoder_layer(), image(3, 5, 16).double()
    _, arms = planned(layer, x)
    made = arms[kind].build(copy.deepcopy(layer)).train(train)
    with torch.set_grad_enabled(gradients):
        got, want = made(x), explicit(layer, x, norm)
    assert laws.relative_error(want, got) < 1e-10
    assert layer.activation_relu_or_gelu == 1
    assert made.activation_relu_or_gelu == (kind == "as-is")


@pytest.mark.parametrize("kind", ["rms", "batch"])
def test_an_encoder_with_padding_takes_no_nested_tensors(kind):
    model = nn.TransformerEncoder(encoder_layer(), 2)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    call = Call((), {"src": image(3, 5, 16).double(), "src_key_padding_mask": mask})
    _, arms = plan_arms(model, call, [kind], batch_size=3)
    made = {arm.norm: arm for arm in arms}[kind].build(copy.deepcopy(model)).eval()
    slow = call(made)
    with torch.no_grad():
        fast = call(made)
    assert laws.relative_error(slow[~mask], fast[~mask]) < 1e-12


def test_kinds_of_an_encoder():
    _, arms = planned(encoder_layer(), image(3, 5, 16).double())
    assert arms["layer"].left_out == "the model's own norms are layer norms: see as-is"
    assert "too few channels" in arms["group"].left_out
    assert "no form for tokens" in arms["instance"].left_out
    assert running(arms) == ["as-is", "none", "batch", "batch-noaffine", "rms"]


def test_a_fused_kernel_with_other_norms_would_be_caught(monkeypatch):
    """The planted fault: the fast path stays on, and the kernel reads tensors of two rms norms."""
    monkeypatch.setattr(replacement, "_leave_fast_path", lambda *_: None)
    layer, x = encoder_layer(), image(3, 5, 16).double()
    _, arms = planned(layer, x, ("none", "rms", "batch"))
    for kind in ("none", "rms", "batch"):
        assert arms[kind].left_out
