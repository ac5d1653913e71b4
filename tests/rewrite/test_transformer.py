"""Fused attention reads weights itself: norms inside must run all the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bnify
import laws
import nets
from bnify.layers import carries_norm


def encoder(nested: bool = True, **options) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)


X = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))


class Counting:
    """How often each norm that bnify put there runs."""

    def __init__(self, model: nn.Module) -> None:
        self.runs = {path: 0 for path, m in model.named_modules() if carries_norm(m)}
        for path in self.runs:
            model.get_submodule(path).norm.register_forward_hook(self.hook(path))

    def hook(self, path: str):
        def count(*_):
            self.runs[path] += 1

        return count


@pytest.mark.parametrize("norm", ["batch", "layer", "rms", "group"])
def test_every_norm_runs_on_the_fast_path(norm):
    assert torch.backends.mha.get_fastpath_enabled()
    result = bnify.insert(encoder().eval(), X, include="*", norm=norm)
    assert result.verification.passed
    reasons = {s.layer: s.reason for s in result.plan.skips}
    carriers = [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert sorted(e.layer for e in result.plan.edits) == carriers
    for i in (0, 1):
        assert reasons[f"layers.{i}.self_attn.out_proj"] == "inside-fused-module"
    counting = Counting(result.model)
    with torch.no_grad():
        plain = result.model.eval()(X)
    assert counting.runs == dict.fromkeys(carriers, 1)
    laws.hostile_(result.model)
    with torch.no_grad():
        hostile = result.model(X)
    assert laws.relative_error(plain, hostile) > 1e-3


@pytest.mark.parametrize("masked", [False, True])
def test_padding_masks_take_no_shortcut(masked):
    """With a mask torch would go through nested tensors, which exist for the fused path only."""
    mask = torch.zeros(4, 5, dtype=torch.bool)
    if masked:
        mask[1, 3:] = True
        mask[2, 1:] = True
    inputs = {"src": X, "src_key_padding_mask": mask}
    result = bnify.insert(encoder().eval(), inputs, include="*")
    assert result.verification.passed
    laws.hostile_(result.model)
    with torch.no_grad():
        fast = result.model.eval()(**inputs)
    slow = result.model(**inputs)  # gradients are on: never the fused path
    kept = ~mask
    assert laws.relative_error(slow[kept], fast[kept]) < 1e-5


def test_the_original_keeps_its_fast_path():
    model = encoder().eval()
    before = copy.deepcopy({k: v for k, v in vars(model.layers[0]).items() if k[0] != "_"})
    bnify.insert(model, X, include="*")
    assert {k: v for k, v in vars(model.layers[0]).items() if k[0] != "_"} == before
    assert model.enable_nested_tensor
    untouched = bnify.insert(model, X).model  # nothing inserted: nothing to leave
    assert untouched.layers[0].activation_relu_or_gelu == 1


def test_preserve_inside_an_encoder():
    model = encoder().eval().double()
    result = bnify.insert(model, X.double(), include="*", init="preserve", data=[X.double()])
    assert result.verification.passed
    with torch.no_grad():
        assert laws.relative_error(model(X.double()), result.model(X.double())) < 1e-12


def test_pre_norm_encoder_layer():
    model = encoder(nested=False, norm_first=True, activation="gelu").eval()
    result = bnify.insert(model, X, include="type:Linear")
    assert result.verification.passed
    assert not laws.training_step(result.model, X)


def test_multihead_attention_beside_plain_layers():
    x = torch.randn(4, 5, 6)
    result = bnify.insert(nets.CrossAttention(), x, include="*")
    layers = [e.layer for e in result.plan.edits]
    assert layers == ["embed", "fc", "head"]
    assert result.verification.passed
    assert not carries_norm(result.model.attention.out_proj)


def test_a_decoder():
    decoder = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True).eval()
    result = bnify.insert(decoder, (X, X[:, :3]), include="*")
    assert {"linear1", "linear2"} == {e.layer for e in result.plan.edits}
    assert result.verification.passed
