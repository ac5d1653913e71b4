"""REWRITE of the recording: the FX pass that puts norm operators behind the layers of a plan.

It writes operators by the kind of norm and never looks at the norm modules, so that running it
against the rewritten module checks both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnify import ops
from bnify.capture import Captured, ModuleCall, copied
from bnify.errors import PlanError
from bnify.norms import effective_eps, group_count
from bnify.plan import Edit, Plan

aten = torch.ops.aten


def rewrite_graph(captured: Captured, plan: Plan, norms: Mapping[str, nn.Module]) -> fx.GraphModule:
    """The recording with the plan's norms in it, as a GraphModule on its own tensors.

    Args:
        captured: The recording; it is not changed.
        plan: The plan.
        norms: The norm modules by carrier; only their tensors are read.

    Raises:
        PlanError: The plan does not fit the recording.
    """
    graph, twin = copied(captured.graph)
    calls: dict[str, list[ModuleCall]] = {}
    for call in captured.calls:
        calls.setdefault(call.path, []).append(call)
    tensors: dict[str, Tensor] = {}
    for edit in plan.edits:
        at = edit.carrier
        tensors.update(_named_state(at, norms[at]))
        if edit.drop_bias:
            _drop_bias(captured, edit, twin)
        for number, call in enumerate(calls.get(at, ())):
            if len(call.outputs) != 1:
                raise PlanError(f"{at} returns {len(call.outputs)} tensors: no norm fits behind it")
            prefix = f"{at}.norm" if at else "norm"
            if edit.calls > 1:
                prefix += f".{number}"
            if edit.tokens and edit.norm not in ("layer", "rms"):
                prefix += ".inner"
            insert_norm(graph, twin[call.outputs[0]], edit, prefix, train=captured.train)
    if not captured.train:  # a dead dropout still draws random numbers
        graph.eliminate_dead_code()
    module = captured.module(graph, extra=tensors)
    module.graph.lint()
    return module


def insert_norm(
    graph: fx.Graph, value: fx.Node, edit: Edit, prefix: str, *, train: bool
) -> fx.Node:
    """Write the operators of a norm behind ``value``; every reader then reads the normed value.

    Args:
        graph: The graph that holds ``value``.
        value: What is normalized, of shape (N, C, *) or (N, ..., C).
        edit: Kind, channels and axis of the norm.
        prefix: Where its tensors are: ``prefix.weight`` and so on.
        train: Whether batch statistics are used and running ones updated.
    """
    own: set[fx.Node] = set()
    shape = value.meta["shape"]
    with graph.inserting_before(value.next):

        def op(target: Any, *args: Any) -> fx.Node:
            node = graph.call_function(target, args)
            node.meta.update(shape=shape, dtype=value.meta["dtype"], module=edit.layer, writes=())
            own.add(node)
            return node

        def tensor(name: str) -> fx.Node:
            node = graph.create_node("get_attr", f"{prefix}.{name}", (), {})
            node.meta.update(shape=(edit.channels,), writes=())
            return node

        rows = value
        flat = edit.tokens and edit.norm not in ("layer", "rms")
        if flat:
            rows = op(aten.reshape.default, value, [-1, edit.channels])
        result = _operators(op, tensor, rows, edit, shape, train)
        if flat:
            result = op(aten.view.default, result, [-1, *shape[1:]])
    result.meta["norm_of"] = edit.carrier
    value.replace_all_uses_with(result, delete_user_cb=lambda user: user not in own)
    return result


def _operators(
    op: Any, tensor: Any, x: fx.Node, edit: Edit, shape: tuple[int, ...], train: bool
) -> fx.Node:
    """One kind of norm as operators."""
    eps, channels = effective_eps(edit), edit.channels
    spatial = edit.dims > 2 and not edit.tokens
    cudnn = torch.backends.cudnn.enabled
    node: fx.Node
    match edit.norm:
        case "batch" | "sync" | "batch-noaffine":
            weight = bias = None
            if edit.norm != "batch-noaffine":
                weight, bias = tensor("weight"), tensor("bias")
            if train:
                op(aten.add_.Tensor, tensor("num_batches_tracked"), 1)
            momentum = 0.1 if edit.momentum is None else edit.momentum
            mean, var = tensor("running_mean"), tensor("running_var")
            node = op(
                aten.batch_norm.default, x, weight, bias, mean, var, train, momentum, eps, cudnn
            )
        case "group":
            groups = edit.groups or group_count(channels, linear=not spatial)
            weight, bias = tensor("weight"), tensor("bias")
            node = op(aten.group_norm.default, x, groups, weight, bias, eps, cudnn)
        case "layer" if spatial:
            node = op(aten.group_norm.default, x, 1, tensor("weight"), tensor("bias"), eps, cudnn)
        case "layer":
            weight, bias = tensor("weight"), tensor("bias")
            node = op(aten.layer_norm.default, x, [channels], weight, bias, eps, cudnn)
        case "rms" if spatial:
            normed = op(aten.rms_norm.default, x, list(shape[1:]), None, edit.eps)
            scale = op(aten.view.default, tensor("weight"), [channels] + [1] * (len(shape) - 2))
            node = op(aten.mul.Tensor, normed, scale)
        case "rms":
            node = op(aten.rms_norm.default, x, [channels], tensor("weight"), edit.eps)
        case "instance":
            weight, bias = tensor("weight"), tensor("bias")
            node = op(
                aten.instance_norm.default, x, weight, bias, None, None, True, 0.1, eps, cudnn
            )
        case _:
            raise PlanError(f"unknown norm {edit.norm!r} for {edit.layer}")
    return node


def _named_state(at: str, norm: nn.Module) -> dict[str, Tensor]:
    prefix = f"{at}.norm" if at else "norm"
    named = [*norm.named_parameters(), *norm.named_buffers()]
    return {f"{prefix}.{name}": tensor for name, tensor in named}


def _drop_bias(captured: Captured, edit: Edit, twin: Mapping[fx.Node, fx.Node]) -> None:
    """Take the bias out of the layer's own operators; the running mean has it."""
    for node in captured.graph.nodes:
        if node.meta.get("module") != edit.layer or node.op != "call_function":
            continue
        if ops.name_of(node) in ops.WEIGHT_POSITION and len(node.args) > 2:
            copy = twin[node]
            copy.args = (*copy.args[:2], None, *copy.args[3:])
