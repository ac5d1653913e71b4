"""Parallel linear branches on one value, summed, are one layer; found by pattern, not by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, fx

from bnify import ops
from bnify.algebra import grouped_to, identity_kernel, padded_kernel
from bnify.changes import Change
from bnify.folding.arguments import arguments
from bnify.folding.chains import merge_chains
from bnify.folding.draft import Draft
from bnify.folding.geometry import Geometry, alone_in_module, geometry_of, reshape_layer
from bnify.folding.layers import Layer, check_own_weight
from bnify.folding.refusal import Refused
from bnify.folding.slots import slot_of
from bnify.folding.sources import Source
from bnify.folding.transaction import Transaction
from bnify.plan import Edit


def merge_all(
    draft: Draft, waiting: list[list[Source]], only: Mapping[str, Edit] | None
) -> list[Edit]:
    """Merge what can be merged, in place; what was merged.

    Args:
        draft: The recording with its norms folded as far as they go.
        waiting: Norms that are not folded yet; a branch may consist of one.
        only: Merge these only.
    """
    drop_neutral(draft)
    edits: list[Edit] = []
    norms = {calls[0].result: calls for calls in waiting if len(calls) == 1}
    for root in [n for n in draft.graph.nodes if _is_sum(n) and not _inside_sum(draft, n)]:
        while found := _merge_one(draft, root, norms, only):
            edits += found
            if root in draft.gone:
                break
    return edits + merge_chains(draft, only)


def drop_neutral(draft: Draft) -> None:
    """Take ``x + 0`` and ``1·x`` out of the graph; in the module tree they stay as they are."""
    for node in list(draft.graph.nodes):
        name = ops.name_of(node)
        if node in draft.gone or name not in ("add", "sub", "mul", "div"):
            continue
        given = arguments(node)
        a, b = given["self"], given["other"]
        neutral = 0 if name in ("add", "sub") else 1
        for x, k in ((a, b), (b, a)) if name in ("add", "mul") else ((a, b),):
            same = isinstance(x, fx.Node) and x.meta.get("shape") == node.meta.get("shape")
            if isinstance(k, (int, float)) and k == neutral and same:
                if x.meta["dtype"] == node.meta["dtype"] and not node.meta.get("writes"):
                    draft.drop(node, x)
                    draft.copied.add(x)
                break


# -- sums -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Term:
    """One summand: the node, its sign, and the additions it goes through, innermost last."""

    node: fx.Node
    sign: int
    sums: tuple[fx.Node, ...]


@dataclass(slots=True)
class _Group:
    """Summands that are linear in the same value."""

    convs: list[tuple[_Term, Layer]] = field(default_factory=list)
    norms: list[tuple[_Term, Source]] = field(default_factory=list)


def _is_sum(node: fx.Node) -> bool:
    if node.op != "call_function" or ops.name_of(node) not in ("add", "sub"):
        return False
    given = arguments(node)
    parts = (given["self"], given["other"])
    return given["alpha"] == 1 and all(
        isinstance(p, fx.Node) and p.meta.get("shape") == node.meta["shape"] for p in parts
    )


def _inside_sum(draft: Draft, node: fx.Node) -> bool:
    readers = draft.readers(node)
    return len(readers) == 1 and _is_sum(readers[0]) and _reads(readers[0]).count(node) == 1


def _terms(draft: Draft, node: fx.Node, sign: int, sums: tuple[fx.Node, ...]) -> Iterator[_Term]:
    """The summands of a sum, in the order of evaluation."""
    given = arguments(node)
    minus = -1 if ops.name_of(node) == "sub" else 1
    for part, of_part in ((given["self"], sign), (given["other"], sign * minus)):
        once = _reads(node).count(part) == 1  # x + x has one reader, which reads it twice
        if once and len(draft.readers(part)) == 1 and _is_sum(part):
            yield from _terms(draft, part, of_part, (*sums, node))
        else:
            yield _Term(part, of_part, (*sums, node))


def _merge_one(
    draft: Draft,
    root: fx.Node,
    norms: Mapping[fx.Node, list[Source]],
    only: Mapping[str, Edit] | None,
) -> list[Edit]:
    """Merge one group of summands; empty if there is none."""
    groups: dict[fx.Node, _Group] = {}
    if root in draft.gone or not _is_sum(root):
        return []
    terms = list(_terms(draft, root, 1, ()))
    for term in terms:
        if len(draft.readers(term.node)) != 1 or _reads(term.sums[-1]).count(term.node) > 1:
            continue
        layer = draft.layer(term.node) if term.node not in draft.untied else None
        if layer is not None and layer.value is not None and geometry_of(layer) is not None:
            if _is_free(draft, layer):
                groups.setdefault(layer.value, _Group()).convs.append((term, layer))
        elif term.node in norms:
            source = norms[term.node][0]
            # Of a group norm only the tail is affine, not the norm.
            if source.flow is not None and source.reason is None and not source.tail:
                groups.setdefault(source.value, _Group()).norms.append((term, source))
    for group in groups.values():
        if group.convs and len(group.convs) + len(group.norms) > 1:
            edits = _merge_group(draft, group, terms, norms, only)
            if edits:
                return edits
    return []


def _is_free(draft: Draft, layer: Layer) -> bool:
    """Whether nobody but a sum depends on a layer's result and on its weight."""
    try:
        draft.check_memory(layer.node)
        check_own_weight(draft, layer)
    except Refused:
        return False
    return True


def _reads(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _merge_group(
    draft: Draft,
    group: _Group,
    terms: list[_Term],
    norms: Mapping[fx.Node, list[Source]],
    only: Mapping[str, Edit] | None,
) -> list[Edit]:
    """Merge what fits around the largest kernel; empty if nothing does."""

    def asked(name: str, into: Layer) -> bool:
        edit = None if only is None else only.get(name)
        return only is None or (
            edit is not None and edit.kind == "merge" and edit.into == (into.label,)
        )

    convs = [(term, layer, geometry_of(layer)) for term, layer in group.convs]
    host = max((g for _, _, g in convs if g is not None), key=lambda g: prod(g.kernel))
    fitting = [(t, la, g) for t, la, g in convs if g is not None and g.fits(host)]
    removable = [
        (term, source)
        for term, source in group.norms
        if host.keeps_shape and _removable(draft, norms[term.node])
    ]
    for term, layer, geometry in _targets(draft, fitting, host):
        merged = [
            (t, la, g)
            for t, la, g in fitting
            if t is not term
            and asked(la.label, layer)
            and (draft.as_graph or alone_in_module(draft, la))
            and t.node not in draft.pinned
        ]
        through = [(t, source) for t, source in removable if asked(source.layer, layer)]
        gone = {t.node for t, *_ in merged} | {t.node for t, _ in through}
        staying: set[fx.Node] = set()
        if not draft.as_graph and not _left_operands_stay(terms, gone):
            # A norm may stay as its input, if that is copied before something is added to it.
            staying = {t.node for t, s in through if s.result in draft.copied and t.sign == 1}
        if not gone or (not draft.as_graph and not _left_operands_stay(terms, gone - staying)):
            continue
        try:
            work = _Work((term, layer, geometry), merged, through, staying, host)
            return _carry_out(draft, work, norms)
        except Refused:
            continue
    return []


_Candidate = tuple[_Term, Layer, Geometry]


@dataclass(frozen=True, slots=True)
class _Work:
    """One merge: the target, what goes into it, and which norms leave their input behind."""

    target: _Candidate
    merged: list[_Candidate]
    through: list[tuple[_Term, Source]]
    staying: set[fx.Node]
    host: Geometry


def _targets(draft: Draft, fitting: list[_Candidate], host: Geometry) -> Iterator[_Candidate]:
    """Layers that can become the sum: those with the host's kernel, then those that can grow."""
    yield from (c for c in fitting if c[2] == host)
    yield from (
        c
        for c in fitting
        if c[2] != host and (draft.as_graph or alone_in_module(draft, c[1], exact=True))
    )


def _removable(draft: Draft, calls: list[Source]) -> bool:
    try:
        slot = slot_of(draft, calls)
    except Refused:
        return False
    if draft.as_graph:
        return True
    module = draft.module(slot.path) if slot.path is not None else None
    return module is not None and not slot.children and not module._forward_hooks


def _left_operands_stay(terms: list[_Term], gone: set[fx.Node]) -> bool:
    """Whether every ``a += b`` of the sum still has a value of full shape on its left."""
    for step in {step for term in terms for step in term.sums if step.meta.get("inplace")}:
        left = arguments(step)["self"]
        inside = [t for t in terms if t.node is left or left in t.sums]
        if all(term.node in gone for term in inside):
            return False
    return True


def _carry_out(draft: Draft, work: _Work, norms: Mapping[fx.Node, list[Source]]) -> list[Edit]:
    """Write the sum into the target, and take the other summands out.

    Raises:
        Refused: The target's weight cannot be written.
    """
    (term, layer, geometry), host = work.target, work.host
    txn = Transaction(draft)
    weight, bias = _placed(txn, layer, geometry, host), txn.bias(layer)
    for other, its_layer, its_geometry in work.merged:
        sign = term.sign * other.sign
        weight = weight + sign * _placed(txn, its_layer, its_geometry, host).to(weight.device)
        its_bias = txn.bias(its_layer)
        if its_bias is not None:
            bias = sign * its_bias if bias is None else bias + sign * its_bias
    for other, source in work.through:
        if source.flow is None:
            continue
        sign = term.sign * other.sign
        affine = source.flow.vector(layer.input_axis)
        taps = affine.scale - 1 if other.node in work.staying else affine.scale
        tap = identity_kernel(tuple(weight.shape), host.layout(layer), sign * taps)
        weight = weight + tap.to(weight.device)
        bias = sign * affine.shift if bias is None else bias + sign * affine.shift
    reshape_layer(draft, layer, weight, bias, host if geometry != host else None)
    edits = []
    for other, its_layer, _ in work.merged:
        _remove(draft, other)
        if not draft.as_graph:
            draft.changes.tree.append(Change(kind="zero", path=its_layer.path))
            draft.forget_tensors(its_layer)
        edits.append(_edit(its_layer.label, "", its_layer.kernel.outputs(weight.shape), layer))
    for other, source in work.through:
        slot = slot_of(draft, norms[other.node])
        stays = other.node in work.staying
        if stays:
            draft.drop(source.result, source.value)
            draft.gone.update(source.steps)
        else:
            _remove(draft, other)
        for node in source.tensors.values():
            draft.changes.values.pop(str(node.target), None)
        if slot.path is not None:
            kind = "identity" if stays else "zero"
            draft.changes.tree.append(Change(kind=kind, path=slot.path))
        edits.append(_edit(source.layer, source.kind, source.channels, layer))
    draft.forget()
    return edits


def _edit(name: str, norm: str, channels: int, into: Layer) -> Edit:
    return Edit(layer=name, kind="merge", norm=norm, channels=channels, into=(into.label,))


def _placed(txn: Transaction, layer: Layer, own: Geometry, host: Geometry) -> Tensor:
    """A layer's weight as the host's kernel and groups have it, float64."""
    weight = txn.effective(layer)
    if own.groups != host.groups:
        weight = grouped_to(weight, own.groups, host.groups)
    return padded_kernel(weight, host.kernel) if host.kernel else weight


def _remove(draft: Draft, term: _Term) -> None:
    """Take a summand out of its addition, in the graph."""
    # Not the addition that it was found in: that may have gone with the other summand.
    (step,) = draft.readers(term.node)
    draft.gone.add(term.node)
    given = arguments(step)
    left, right = given["self"], given["other"]
    if term.node is right:
        draft.drop(step, left)
        return
    if ops.name_of(step) == "sub":
        step.target = torch.ops.aten.neg.default
        step.args, step.kwargs = (right,), {}
        return
    draft.drop(step, right)
