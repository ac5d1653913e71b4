"""REWRITE of the module tree: the user's own modules, each with its norm as a child."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from bnify.layers import attach, carries_norm, restart_calls
from bnify.plan import Plan


def rewrite_tree(model: nn.Module, plan: Plan, norms: Mapping[str, nn.Module]) -> nn.Module:
    """Put each norm on the module that carries it, in place; returns the model.

    Same objects, same parameters, same names; new names are ``<layer>.norm.*`` only.
    """
    for edit in plan.edits:
        module, norm = model.get_submodule(edit.carrier), norms[edit.carrier]
        if edit.drop_bias:
            _drop_bias(module)
        attach(module, norm.train(module.training))
    for scope in dict.fromkeys(edit.scope for edit in plan.edits if edit.calls > 1):
        _restart_calls_at(model.get_submodule(scope))
    _leave_fast_path(model)
    return model


def _drop_bias(layer: nn.Module) -> None:
    """The running mean has taken the bias; it is remembered so that old checkpoints load."""
    bias = layer.get_parameter("bias")
    layer.register_parameter("bias", None)
    layer.register_buffer("dropped_bias", bias.detach().clone())


def _restart_calls_at(model: nn.Module) -> None:
    hooks = model._forward_pre_hooks.values()
    if restart_calls not in hooks:
        model.register_forward_pre_hook(restart_calls)


def _leave_fast_path(model: nn.Module) -> None:
    """Encoder layers with a norm inside must not take the fused path, which reads weights only.

    ``nn.TransformerEncoderLayer`` takes it in eval mode without gradients whenever
    ``activation_relu_or_gelu`` says that its activation is one the kernel knows.
    """
    for module in model.modules():
        if not any(carries_norm(inner) for inner in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = False  # nested tensors exist for the fused path only
            module.use_nested_tensor = False
