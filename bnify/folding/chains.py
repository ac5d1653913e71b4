"""Two linear layers in a row are one, where that is no larger."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, fx

from bnify.algebra import chained_linear
from bnify.changes import Change
from bnify.folding.draft import Draft
from bnify.folding.families import is_dropout_off
from bnify.folding.geometry import Geometry, alone_in_module, geometry_of, reshape_layer
from bnify.folding.layers import Layer, check_own_weight
from bnify.folding.refusal import Refused
from bnify.folding.transaction import Transaction
from bnify.plan import Edit


def merge_chains(draft: Draft, only: Mapping[str, Edit] | None) -> list[Edit]:
    """Merge every two linear layers of which the second alone reads the first."""
    edits: list[Edit] = []
    for node in list(draft.graph.nodes):
        live = node.op == "call_function" and node not in draft.gone
        second = draft.layer(node) if live else None
        if second is None or second.value is None:
            continue
        first = _before(draft, second)
        if first is None:
            continue
        try:
            edit = _merge(draft, first, second, only)
        except Refused:
            continue
        if edit is not None:
            edits.append(edit)
            draft.forget()
    return edits


def _before(draft: Draft, second: Layer) -> Layer | None:
    node = second.value
    while node is not None and len(draft.readers(node)) == 1 and node not in draft.pinned:
        if not is_dropout_off(node):
            return draft.layer(node)
        node = node.args[0]  # type: ignore[assignment]
    return None


def _merge(
    draft: Draft, first: Layer, second: Layer, only: Mapping[str, Edit] | None
) -> Edit | None:
    a, b = geometry_of(first), geometry_of(second)
    if a is None or b is None or a.groups != 1 or b.groups != 1:
        return None
    if len(a.kernel) != len(b.kernel):
        return None
    if {first.node, second.node} & (draft.pinned | draft.untied):
        return None
    if not all(alone_in_module(draft, layer, exact=True) for layer in (first, second)):
        return None
    txn = Transaction(draft)
    weights = txn.effective(first), txn.effective(second)
    biases = txn.bias(first), txn.bias(second)
    size = sum(weight.numel() for weight in weights)
    outputs, inputs = weights[1].shape[0], weights[0].shape[1]
    if outputs * inputs * prod(a.kernel) * prod(b.kernel) > size:
        return None
    draft.check_memory(first.node)
    draft.check_memory(second.node)
    for layer in (first, second):
        check_own_weight(draft, layer)
    if _pointwise(a) and (not any(b.padding) or biases[0] is None or not bool(biases[0].any())):
        weight, bias = chained_linear(weights[0], biases[0], weights[1], biases[1])
        kept, gone = second, first
        sizes = {"in_features" if not a.kernel else "in_channels": inputs}
    elif _pointwise(b):
        weight, bias = _behind(weights, biases)
        kept, gone = first, second
        sizes = {"out_channels": outputs}
    else:
        return None
    if only is not None and (gone.label not in only or only[gone.label].kind != "merge"):
        return None
    reshape_layer(draft, kept, weight, bias, sizes=sizes)
    draft.gone.update(_between(first, second))
    if kept is second:
        draft.gone.add(first.node)
        second.node.replace_input_with(second.value, first.value)  # type: ignore[arg-type]
    else:
        draft.drop(second.node, first.node)
        first.node.meta["shape"] = second.node.meta["shape"]
    if not draft.as_graph:
        draft.changes.tree.append(Change(kind="identity", path=gone.path))
        draft.forget_tensors(gone)
    return Edit(
        layer=gone.label,
        kind="merge",
        norm="",
        channels=weights[0].shape[0],
        into=(kept.label,),
        detail="two linear layers in a row",
    )


def _between(first: Layer, second: Layer) -> list[fx.Node]:
    """What does nothing between the two."""
    nodes: list[fx.Node] = []
    node = second.value
    while node is not None and node is not first.node:
        nodes.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return nodes


def _pointwise(geometry: Geometry) -> bool:
    """Whether each output position sees one input position, its own."""
    return (
        all(k == 1 for k in geometry.kernel)
        and all(s == 1 for s in geometry.stride)
        and not any(geometry.padding)
    )


def _behind(
    weights: tuple[Tensor, Tensor], biases: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """``W₂(W₁ x + b₁) + b₂`` with a pointwise W₂: ``W[o,i,k] = Σ_m W₂[o,m] W₁[m,i,k]``."""
    first, second = weights
    outer = second.flatten(1)
    weight = torch.tensordot(outer, first.to(outer.device), dims=([1], [0]))
    bias = None if biases[0] is None else outer.cpu() @ biases[0]
    if biases[1] is not None:
        bias = biases[1] if bias is None else bias + biases[1]
    return weight, bias
