"""Clean-up of a recording before any planning; both passes keep every value as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_LIKE_INPUT = {  # these read a shape from their second argument
    aten.view_as.default: aten.view.default,
    aten.reshape_as.default: aten.reshape.default,
    aten.expand_as.default: aten.expand.default,
}
_FILLED = {  # these read shape, dtype and device from their first argument
    aten.zeros_like.default: aten.zeros.default,
    aten.ones_like.default: aten.ones.default,
    aten.empty_like.default: aten.empty.memory_format,
    aten.full_like.default: aten.full.default,
    aten.rand_like.default: aten.rand.default,
    aten.randn_like.default: aten.randn.default,
}
_NEW = {  # these read dtype and device from their first argument
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_empty.default: aten.empty.memory_format,
    aten.new_full.default: aten.full.default,
}


def shapes_to_constants(graph: fx.Graph) -> int:
    """Rewrite operators that read a value only for its shape; they are no readers of it.

    Returns:
        The number of operators rewritten.
    """
    rewritten = 0
    for node in graph.nodes:
        target: Any = node.target
        if node.op != "call_function":
            continue
        if target in _LIKE_INPUT and _shape(node.args[1]) is not None:
            node.target = _LIKE_INPUT[target]
            node.args = (node.args[0], list(_shape(node.args[1])))
        elif target is aten.type_as.default and _shape(node.args[1]) is not None:
            node.target = aten.to.dtype
            node.args = (node.args[0], node.args[1].meta["dtype"])
        elif target in _FILLED and _shape(node.args[0]) is not None:
            source = node.args[0]
            node.target = _FILLED[target]
            node.kwargs = _factory_options(node, source)
            node.args = (list(_shape(source)), *node.args[1:])
        elif target in _NEW and isinstance(node.args[0], fx.Node):
            source = node.args[0]
            node.target = _NEW[target]
            node.kwargs = _factory_options(node, source)
            node.args = node.args[1:]
        else:
            continue
        rewritten += 1
    return rewritten


def _shape(node: Any) -> tuple[int, ...] | None:
    return node.meta.get("shape") if isinstance(node, fx.Node) else None


def _factory_options(node: fx.Node, source: fx.Node) -> dict[str, Any]:
    """Dtype and device of a factory call: as given, else those of the value it read."""
    given = {k: v for k, v in node.kwargs.items() if v is not None and k in ("dtype", "device")}
    return {"dtype": source.meta["dtype"], "device": source.meta["device"], **given}


def functionalise(graph: fx.Graph) -> int:
    """Turn ``foo_`` into ``foo`` where nobody can see the difference.

    That is: no older value sharing its memory is read later, and the memory holds no input,
    parameter, buffer or constant.

    Returns:
        The number of operators rewritten.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    groups: dict[int, list[fx.Node]] = {}
    for node in order:
        if (group := node.meta.get("alias")) is not None:
            groups.setdefault(group, []).append(node)
    rewritten = 0
    for node, index in order.items():
        replacement = _functional(node)
        if replacement is None:
            continue
        older = [n for n in groups.get(node.meta.get("alias", -1), ()) if order[n] < index]
        if any(n.op != "call_function" for n in older):
            continue
        if any(order[user] > index for n in older for user in n.users):
            continue
        node.target = replacement
        node.meta["writes"] = ()
        rewritten += 1
        # From here on the result has memory of its own, and so have its views.
        fresh = max(groups) + 1
        younger = [n for n in groups[node.meta["alias"]] if order[n] >= index]
        groups[node.meta["alias"]] = older
        groups[fresh] = younger
        for n in younger:
            n.meta["alias"] = fresh
    return rewritten


def _functional(node: fx.Node) -> Any:
    """The operator that returns what this one writes in place, if there is one."""
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name.removeprefix("aten::")
    if not name.endswith("_") or name.endswith("__") or name in ("copy_", "set_", "resize_"):
        return None
    if node.meta.get("writes") != (node.args[0],) or node.meta.get("shape") is None:
        return None
    source = node.args[0]
    if source.meta.get("dtype") != node.meta["dtype"] or source.meta["shape"] != node.meta["shape"]:
        return None
    if name in ("zero_", "fill_", "uniform_", "normal_", "bernoulli_", "detach_"):
        return None  # factories rather than functions of their input
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None
