"""Taking a folded norm out of the graph; what the module tree has in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from bnify.changes import Change
from bnify.folding.draft import Draft
from bnify.folding.slots import Slot, neutral_values
from bnify.folding.sources import Source
from bnify.folding.transaction import Transaction
from bnify.plan import Edit

aten = torch.ops.aten
BACKWARD, FORWARD = "fold-backward", "fold-forward"
#: Detail of an edit whose operators stay in a forward.
IN_FORWARD = "stays in a forward, where it does nothing now (emit='graph' drops it)"


@dataclass(slots=True)
class Step:
    """What one norm's fold comes to, before it is committed.

    Attributes:
        txn: The changes.
        kinds: Backward or forward, for each call.
        into: The layers that take it.
        shifts_left: The shift stays in the norm's place.
        rest: Channels for which scale and shift stay, with ``partial``.
    """

    txn: Transaction
    kinds: list[str] = field(default_factory=list)
    into: dict[str, None] = field(default_factory=dict)
    shifts_left: bool = False
    rest: Tensor | None = None


def remove(draft: Draft, calls: list[Source], slot: Slot, step: Step) -> Edit:
    """Take a norm out of the graph, and say what the tree has in its place.

    Args:
        draft: The recording.
        calls: All calls of the norm.
        slot: Where it sits in the module tree.
        step: Its fold, committed.

    Returns:
        What was done, for the plan.
    """
    first = calls[0]
    details = ["shift left"] if step.shifts_left else []
    if step.rest is not None:
        folded = int((~step.rest).sum())
        details.append(f"{folded} of {first.channels} channels, the rest stays")
    for node in first.tensors.values():  # what went into them before goes with them
        draft.changes.values.pop(str(node.target), None)
    left = _left(first, step)
    for source in calls:
        if source.tail:
            _drop_tail(source)
            continue
        kept = _beside(draft, source, slot, left) if left else source.value
        draft.drop(source.result, kept)
        draft.gone.update(source.steps)
    if first.tail:
        _change_tail(draft, first)
        details.append("scale and shift")
    elif slot.path is not None:
        kind = "children" if slot.children else "identity"
        if left:
            kind = "affine" if "scale" in left else "shift"
        shape = _constant_shape(first) if left else ()
        values = {"dtype": str(first.result.meta["dtype"])} if left else {}
        change = Change(kind=kind, path=slot.path, names=slot.children, shape=shape, values=values)
        draft.changes.tree.append(change)
    elif not draft.as_graph:
        _neutralise(draft, first, left)
        draft.pinned.update(source.value for source in calls)
        details.append(IN_FORWARD)
    draft.forget()
    flow = first.flow
    return Edit(
        layer=first.layer,
        kind=BACKWARD if BACKWARD in step.kinds else FORWARD,
        norm=first.kind,
        channels=first.channels,
        axis=(flow.axis if flow is not None and flow.axis is not None else 1),
        dims=len(first.result.meta["shape"]),
        calls=len(calls),
        into=tuple(step.into),
        detail="; ".join(details),
        layer_type=type_name(draft, first),
    )


def _left(source: Source, step: Step) -> dict[str, Tensor]:
    """The constants that stay in the norm's place: a shift, or scale and shift by channel."""
    if source.flow is None or (not step.shifts_left and step.rest is None):
        return {}
    affine = source.flow.affine
    if step.rest is None:
        return {"shift": affine.shift}
    one, zero = torch.ones_like(affine.scale), torch.zeros_like(affine.shift)
    return {
        "scale": torch.where(step.rest, affine.scale, one),
        "shift": torch.where(step.rest, affine.shift, zero),
    }


def _neutralise(draft: Draft, source: Source, left: Mapping[str, Tensor]) -> None:
    """Let a norm that is written out in a forward do nothing, or only what is left."""
    tensors = source.tensors
    for node, value in neutral_values(draft, source).items():
        if node is tensors.get("bias") and "shift" in left:
            value = left["shift"].reshape(value.shape)
        if node is tensors.get("weight") and "scale" in left:
            value = value * left["scale"].reshape(value.shape)
        draft.changes.values[str(node.target)] = value
        if source.kind == "affine" and not left:
            draft.changes.neutral.append(str(node.target))


def _constant_shape(source: Source) -> tuple[int, ...]:
    dims = len(source.result.meta["shape"])
    axis = source.flow.axis if source.flow is not None and source.flow.axis is not None else 1
    return (source.channels, *[1] * (dims - 1 - axis))


def _beside(draft: Draft, source: Source, slot: Slot, left: Mapping[str, Tensor]) -> fx.Node:
    """The operators that stay in the norm's place, in the graph."""
    node = source.value
    inner = ".affine" if "scale" in left else ".shift"
    place = f"{slot.path}{inner if slot.children else ''}" if slot.path else ""
    shape = _constant_shape(source)
    for role, target in (("scale", aten.mul.Tensor), ("shift", aten.add.Tensor)):
        if role not in left:
            continue
        name = f"{place}.{role}" if place else f"{source.layer}_{role}"
        constant = draft.attribute(name, source.result, shape)
        draft.changes.values[name] = left[role].view(shape)
        if not place:
            draft.changes.graph_only.add(name)
        with draft.graph.inserting_before(source.result):
            node = draft.graph.call_function(target, (node, constant))
        node.meta.update(source.result.meta)
        draft.order[node] = draft.order[source.result]
    return node


def _drop_tail(source: Source) -> None:
    """The norm without scale and shift."""
    node = source.steps[0]
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    args = list(node.args)
    for role in ("weight", "bias"):
        if role in names and names.index(role) < len(args):
            args[names.index(role)] = None
    node.args = tuple(args)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")}


def stays_with_ones(draft: Draft, source: Source) -> bool:
    """Whether scale and shift of a norm must stay tensors, of 1 and 0: its class wants them."""
    path = source.module
    parent = draft.module(path.rpartition(".")[0])
    plain = type(draft.module(path)) in (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    # The fused path of this layer reads the tensors itself.
    fused = isinstance(parent, nn.TransformerEncoderLayer)
    owned = all(str(n.target).rpartition(".")[0] == path for n in source.tensors.values())
    return not (plain and owned) or fused


def _change_tail(draft: Draft, source: Source) -> None:
    """Scale and shift of a norm are None where torch's own class takes that, else 1 and 0."""
    if draft.as_graph:
        return
    path = source.module
    names = [str(node.target) for node in source.tensors.values()]
    if not stays_with_ones(draft, source):
        leaves = tuple(name.rpartition(".")[2] for name in names)
        draft.changes.tree.append(Change(kind="none", path=path, names=leaves))
        return
    for role, node in source.tensors.items():
        like = draft.value(node)
        neutral = torch.ones_like(like) if role == "weight" else torch.zeros_like(like)
        draft.changes.values[str(node.target)] = neutral


def type_name(draft: Draft, source: Source) -> str:
    """Class name of a norm's module; empty where it has none."""
    module = draft.module(source.layer)
    return type(module).__name__ if module is not None and source.layer else ""
