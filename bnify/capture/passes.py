"""Clean-up of a recording before any planning; both passes keep every value as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bnify import ops

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
        if target in _LIKE_INPUT and (shape := _shape(node.args[1])) is not None:
            node.target = _LIKE_INPUT[target]
            node.args = (node.args[0], shape)
        elif target is aten.type_as.default and _same_device(node.args[0], node.args[1]):
            node.target = aten.to.dtype
            node.args = (node.args[0], node.args[1].meta["dtype"])
        elif (
            target in _FILLED
            and (shape := _shape(node.args[0])) is not None
            and _contiguous(node, shape)
        ):
            source = node.all_input_nodes[0]
            node.target = _FILLED[target]
            node.kwargs = _factory_options(node, source)
            node.args = (shape, *node.args[1:])
        elif target in _NEW and isinstance(node.args[0], fx.Node):
            source = node.args[0]
            node.target = _NEW[target]
            node.kwargs = _factory_options(node, source)
            node.args = node.args[1:]
        else:
            continue
        rewritten += 1
    return rewritten


def _shape(node: Any) -> list[int] | None:
    shape = node.meta.get("shape") if isinstance(node, fx.Node) else None
    return None if shape is None else list(shape)


def _same_device(a: Any, b: Any) -> bool:
    nodes = isinstance(a, fx.Node) and isinstance(b, fx.Node)
    return nodes and "device" in a.meta and a.meta["device"] == b.meta.get("device")


def _contiguous(node: fx.Node, shape: list[int]) -> bool:
    """Whether ``*_like`` lays its result out as a plain factory would.

    Otherwise random numbers, written in the order of memory, would land on other elements.
    """
    wanted = node.kwargs.get("memory_format")
    if wanted is torch.contiguous_format:
        return True
    source = node.all_input_nodes[0]
    plain = torch.empty(shape, device="meta").stride()
    return wanted in (None, torch.preserve_format) and source.meta.get("stride") == plain


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
        group = groups.get(node.meta.get("alias", -1), ())
        older = [n for n in group if order[n] < index]
        if any(ops.name_of(user) == "as_strided" for n in group for user in n.users):
            continue  # it reads the memory, not the value
        if any(n.op != "call_function" for n in older):
            continue
        if any(order[user] > index for n in older for user in n.users):
            continue
        node.target = replacement
        node.meta["writes"] = ()
        node.meta["inplace"] = True  # in the model it still is
        for n in older:
            n.meta["overwritten"] = True
        rewritten += 1
        # From here on the result has memory of its own, and so have its views.
        fresh = max(groups) + 1
        younger = [n for n in groups[node.meta["alias"]] if order[n] >= index]
        groups[node.meta["alias"]] = older
        groups[fresh] = younger
        for n in younger:
            n.meta["alias"] = fresh
    return rewritten


def stop_gradients(graph: fx.Graph) -> int:
    """Let what the model runs under ``no_grad`` read detached values.

    A value that is written in place under ``no_grad`` keeps the gradient it had before.

    Returns:
        The number of operators changed.
    """
    free: set[fx.Node] = set()  # without gradient: made under no_grad
    changed = 0
    for node in list(graph.nodes):
        if node.meta.get("grad") is not False:
            continue
        target = ops.first(node)
        in_place = target is not None and target in node.meta.get("writes", ())
        for source in list(node.all_input_nodes):
            if source not in free:
                _detach_argument(graph, node, source)
        if target is not None and in_place and target not in free:
            node.replace_all_uses_with(target)
        else:
            free.add(node)
        changed += 1
    return changed


def _detach_argument(graph: fx.Graph, node: fx.Node, source: fx.Node) -> None:
    dtype = source.meta.get("dtype")
    if dtype is None or not dtype.is_floating_point:
        return
    with graph.inserting_before(node):
        detached = graph.call_function(aten.detach.default, (source,))
    detached.meta.update(source.meta, writes=())
    node.replace_input_with(source, detached)


def detach_updates(graph: fx.Graph) -> int:
    """Keep gradients out of updates of the model's own state.

    Training code updates buffers without gradients (spectral norm's power iteration, moving
    averages); the recording does not see ``no_grad``. Operators that write to memory of a
    parameter or buffer, or into ``out=``, read detached values.

    Returns:
        The number of operators changed.
    """
    state = {n.meta["alias"] for n in graph.nodes if n.op == "get_attr"}
    changed = 0
    for node in list(graph.nodes):
        written = node.meta.get("writes", ())
        if not written or ops.name_of(node) in ops.NORMS:
            continue
        if "out" not in node.kwargs and not any(w.meta.get("alias") in state for w in written):
            continue
        for source in list(node.all_input_nodes):
            _detach_argument(graph, node, source)
        changed += 1
    return changed


_COMPARISONS = frozenset(
    {"eq", "ne", "lt", "le", "gt", "ge", "not_equal", "less", "less_equal", "greater"}
    | {"greater_equal", "logical_and", "logical_or", "logical_xor", "logical_not"}
)


def _functional(node: fx.Node) -> Any:
    """The operator that returns what this one writes in place, if there is one."""
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name.removeprefix("aten::")
    if not name.endswith("_") or name.endswith("__") or name in ("copy_", "set_", "resize_"):
        return None
    source = ops.first(node)
    if source is None or node.meta.get("writes") != (source,) or node.meta.get("shape") is None:
        return None
    if source.meta.get("dtype") != node.meta["dtype"] or source.meta["shape"] != node.meta["shape"]:
        return None
    # In place a result takes the dtype of its memory; out of place it is promoted.
    dtype = node.meta["dtype"]
    if any(torch.promote_types(dtype, n.meta["dtype"]) != dtype for n in ops.sources(node)):
        return None
    if node.meta.get("grad") is False and (source.meta.get("grad", True) or source.meta["writes"]):
        return None  # see stop_gradients
    if name[:-1] in _COMPARISONS and dtype is not torch.bool:
        return None
    if name in ("zero_", "fill_", "uniform_", "normal_", "bernoulli_", "detach_"):
        return None  # factories rather than functions of their input
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None
