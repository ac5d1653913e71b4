"""Backwards through operators of two values: sums, products, attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from bnify import ops
from bnify.algebra import Affine
from bnify.folding.arguments import arguments, place_of
from bnify.folding.channels import Flow
from bnify.folding.families import is_dropout_off, is_same_dtype, stuck
from bnify.folding.geometry import geometry_of
from bnify.folding.layers import Layer
from bnify.folding.refusal import NeedsBias, Refused
from bnify.reason import Reason

if TYPE_CHECKING:
    from bnify.folding.backward import Backward

ATTENTION = "scaled_dot_product_attention"


def push_sum(back: Backward, value: fx.Node, flow: Flow) -> None:
    """``a ± k·b``: the scale goes to both, the shift to one of them."""
    given = arguments(value)
    a, b, alpha = given["self"], given["other"], given.get("alpha", 1)
    if ops.name_of(value) == "rsub":
        a, b = b, a
    sign = -alpha if ops.name_of(value) in ("sub", "rsub") else alpha
    if a is b or not sign:
        raise Refused(Reason.ANOTHER_CONSUMER, f"{place_of(value)} reads it twice")
    bare, of_b = flow.without_shift(), mapped(flow, flow.affine.scale, flow.affine.shift / sign)
    static = [x for x in (a, b) if not isinstance(x, fx.Node) or x in back.draft.static]
    ways = [((a, flow), (b, bare)), ((a, bare), (b, of_b))]
    if static:  # a parameter beside the value takes the shift, which then needs no bias elsewhere
        ways = ways[:1] if static[0] is a else ways[1:]
    refusals: list[Refused] = []
    for way in ways if all(isinstance(x, fx.Node) for x in (a, b)) else []:
        tried = back.fork()
        try:
            _push_operands(tried, value, way)
        except Refused as refused:
            refusals.append(refused)
            if not flow.shifts:
                break
            continue
        back.adopt(tried)
        return
    if static:
        _beside_constant(back, value, (a, b), sign, flow)
        return
    raise refusals[0]


def _push_operands(
    back: Backward, value: fx.Node, operands: tuple[tuple[fx.Node, Flow], ...]
) -> None:
    """Push into both; a layer's own input beside it stays, and the layer makes up for it."""
    failed: list[tuple[fx.Node, Flow, Refused]] = []
    for node, flow in operands:
        tried = back.fork()
        try:
            tried.push(node, value, flow.operand(node.meta["shape"]))
        except Refused as refused:
            failed.append((node, flow, refused))
            continue
        back.adopt(tried)
    if not failed:
        return
    node, flow, refusal = failed[0]
    if len(failed) > 1 or flow.shifts or ops.name_of(value) != "add":
        raise refusal
    _make_up(back, value, node, flow, refusal)


def _make_up(
    back: Backward, value: fx.Node, identity: fx.Node, flow: Flow, refusal: Refused
) -> None:
    """``s·(conv(x) + x) = (s·conv(x) + (s - 1)·x) + x``: one more tap in the middle."""
    if arguments(value).get("alpha", 1) != 1 or identity.meta["shape"] != value.meta["shape"]:
        raise refusal
    for proposal in list(back.txn.proposals.values()):
        layer = proposal.layer
        geometry = geometry_of(layer) if layer.value is identity else None
        if geometry is not None and geometry.keeps_shape and _is_summand(back, layer, value):
            back.txn.add_tap(layer, flow.vector(layer.axis).scale - 1)
            return
    raise refusal


def _is_summand(back: Backward, layer: Layer, total: fx.Node) -> bool:
    """Whether a layer's result enters a sum as it is."""
    node = layer.node
    while node is not total:
        readers = back.draft.readers(node)
        if len(readers) != 1 or ops.name_of(readers[0]) != "add":
            return False
        if arguments(readers[0]).get("alpha", 1) != 1:
            return False
        node = readers[0]
    return True


def _beside_constant(
    back: Backward, value: fx.Node, operands: tuple[Any, Any], sign: float, flow: Flow
) -> None:
    """``x ± k`` with a constant k, which stays: s(x ± k) + t = (s·x + t ± (s - 1)k) ± k."""
    a, b = operands
    first = isinstance(a, fx.Node) and a not in back.draft.static
    x, constant = (a, b) if first else (b, a)
    by_channel = flow.by_channel(back.draft.constant(constant))
    if by_channel is None or not isinstance(x, fx.Node):
        raise stuck(back.draft, value)
    scale, shift = flow.affine.scale, flow.affine.shift
    if first:
        moved = mapped(flow, scale, shift + (scale - 1) * sign * by_channel)
    else:  # k ± x: x gets the shift through the sign
        moved = mapped(flow, scale, (shift + (scale - 1) * by_channel) / sign)
    back.push(x, value, moved.operand(x.meta["shape"]))


def push_product(back: Backward, value: fx.Node, flow: Flow) -> None:
    """``k·x`` with a constant k, which stays: s·k·x + t = k·(s·x + t/k)."""
    given = arguments(value)
    a, b = given["self"], given["other"]
    divides = ops.name_of(value) == "div"
    if given.get("rounding_mode") is not None:
        raise stuck(back.draft, value)
    for x, k in ((a, b), (b, a)):
        if (isinstance(k, fx.Node) and k not in back.draft.static) or (divides and x is b):
            continue
        if not isinstance(x, fx.Node):
            continue
        factor = flow.by_channel(back.draft.constant(k))
        if factor is None:
            raise Refused(Reason.WRONG_AXIS, f"{place_of(value)} scales each element apart")
        shift = flow.affine.shift * factor if divides else flow.affine.shift / factor
        shift = torch.where(flow.affine.shift == 0, 0.0, shift)
        if not bool(shift.isfinite().all()):
            raise NeedsBias(Reason.NO_ABSORBER, f"{place_of(value)} multiplies by 0")
        back.push(x, value, mapped(flow, flow.affine.scale, shift).operand(x.meta["shape"]))
        return
    raise stuck(back.draft, value)


def push_attention(back: Backward, value: fx.Node, flow: Flow) -> None:
    """Weights that add up to 1 average the values: the map goes to the values."""
    given = arguments(value)
    if ops.name_of(value) == ATTENTION:
        sum_to_one = not given.get("dropout_p") and given.get("attn_mask") is None
        values = given["value"]
    else:
        left, values = value.args[0], value.args[1]
        sum_to_one = isinstance(left, fx.Node) and _is_softmax(left)
    if not sum_to_one or not isinstance(values, fx.Node):
        raise stuck(back.draft, value)
    shape = values.meta["shape"]
    if len(shape) != len(flow.shape) or shape[-1] != flow.shape[-1]:
        raise stuck(back.draft, value)
    axis = len(shape) - 2
    if flow.shape[:axis] != shape[:axis]:
        raise stuck(back.draft, value)
    back.push(values, value, flow.spread([axis], shape))


def _is_softmax(node: fx.Node) -> bool:
    """Whether the last axis adds up to 1."""
    while is_dropout_off(node) or is_same_dtype(node) or ops.name_of(node) == "contiguous":
        before = ops.first(node)
        if before is None:
            return False
        node = before
    if ops.name_of(node) not in ("softmax", "_softmax"):
        return False
    return bool(node.args[1] in (-1, len(node.meta["shape"]) - 1))


def mapped(flow: Flow, scale: Tensor, shift: Tensor) -> Flow:
    """The same channels with another map."""
    return Flow(Affine(scale, shift), flow.shape, flow.axis, flow.index)
