"""Backwards: let what makes a value make the normalized value instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.modules.padding import _ConstantPadNd

from bnify import ops
from bnify.algebra import Affine
from bnify.folding.arguments import arguments, place_of
from bnify.folding.beside import ATTENTION, mapped, push_attention, push_product, push_sum
from bnify.folding.channels import FREE, Flow
from bnify.folding.draft import Draft
from bnify.folding.families import (
    AVERAGES,
    LISTS,
    MAXIMA,
    PRODUCTS,
    SUMS,
    adds_zeros,
    is_dropout_off,
    is_mover,
    is_same_dtype,
    moved,
    numbers,
    padding_of,
    pooled_axes,
    stuck,
)
from bnify.folding.layers import Layer
from bnify.folding.refusal import NeedsBias, Refused
from bnify.folding.transaction import Transaction
from bnify.reason import Reason


class Backward:
    """Pushes an affine map from a value into what it is computed from.

    Args:
        txn: What is to be changed; a refusal leaves it in an unknown state.
        whole: The norm's affine map, if it may be folded in part.

    Attributes:
        into: The layers that take it.
        rest: With ``whole``, the channels for which it is not folded.
    """

    def __init__(self, txn: Transaction, *, whole: Affine | None = None) -> None:
        self.txn = txn
        self.draft: Draft = txn.draft
        self.into: dict[str, None] = {}
        self.whole = whole
        self.rest: Tensor | None = None

    def push(self, value: fx.Node, reader: fx.Node, flow: Flow) -> None:
        """Let ``value`` become the affine map of it, for ``reader``, who expects just that.

        Raises:
            Refused: It cannot, or somebody else reads it.
        """
        if value in self.txn.fence:
            raise Refused(Reason.SHARED_LAYER, "it comes from another call of the same norm")
        if value in self.draft.static:
            self._static(value, reader, flow)
            return
        if value.op == "placeholder":
            raise Refused(Reason.NO_ABSORBER, f"{place_of(value)} is an input of the model")
        self.draft.check_memory(value)
        flow = self._alone(value, reader, flow)
        layer = self.draft.layer(value)
        if layer is not None:
            self._absorb(layer, flow)
            return
        name = ops.name_of(value)
        source: Any = ops.first(value)
        if source is None and name not in ("cat", "stack", "concat", "concatenate"):
            raise Refused(Reason.NO_ABSORBER, f"{place_of(value)} takes no value")
        if is_dropout_off(value) or is_same_dtype(value):
            self.push(source, value, self._same(flow, source))
        elif name == "getitem":
            self._element(value, source, flow)
        elif is_mover(value) and self.draft.reads_alone(value):
            self._mover(value, flow)
        elif name in ("pad", "constant_pad_nd"):
            self._padded(value, flow)
        elif name in ("cat", "concat", "concatenate"):
            self._concatenated(value, flow)
        elif name == "stack":
            self._stacked(value, flow)
        elif name in AVERAGES:
            self._averaged(value, flow)
        elif name in MAXIMA:
            self._maximum(value, flow)
        elif name in SUMS:
            push_sum(self, value, flow)
        elif name in PRODUCTS:
            push_product(self, value, flow)
        elif name == "neg":
            self.push(source, value, mapped(flow, flow.affine.scale, -flow.affine.shift))
        elif name in ops.NORMS:
            self._norm(value, flow)
        elif name == ATTENTION or name in ("matmul", "bmm"):
            push_attention(self, value, flow)
        else:
            raise stuck(self.draft, value)

    # -- who else reads --------------------------------------------------------------------------

    def _alone(self, value: fx.Node, reader: fx.Node, flow: Flow) -> Flow:
        """The flow with the elements left as they are that others read.

        Raises:
            Refused: Others read elements of ours.
        """
        if list(_flat(reader)).count(value) > 1:
            raise Refused(Reason.ANOTHER_CONSUMER, f"{place_of(reader)} reads it twice")
        for other in self.draft.readers(value):
            if other is reader:
                continue
            where = f"{place_of(value)} is also read by {place_of(other)}"
            if other.op == "output":
                raise Refused(Reason.VALUE_IS_OUTPUT, f"{place_of(value)} is an output")
            moves = is_mover(other) and self.draft.reads_alone(other)
            if not moves or ops.name_of(other) in LISTS:
                raise Refused(Reason.ANOTHER_CONSUMER, where)
            read = moved(other, numbers(value.meta["shape"]), self.draft.value)
            if not read.numel():  # at another size it reads something
                raise Refused(Reason.ANOTHER_CONSUMER, where)
            try:
                flow = flow.leaving(read.long().reshape(-1))
            except Refused:
                raise Refused(Reason.ANOTHER_CONSUMER, where) from None
        return flow

    def _same(self, flow: Flow, source: fx.Node) -> Flow:
        return flow.operand(source.meta["shape"])

    # -- where it ends ---------------------------------------------------------------------------

    def _absorb(self, layer: Layer, flow: Flow) -> None:
        if layer.why_fixed:
            raise Refused(*layer.why_fixed)
        affine = flow.vector(layer.axis)
        if layer.kernel.kind == "embedding":
            self._embedding(layer, affine)
        else:
            shifts = bool(affine.shift.any())
            if shifts and layer.bias is None and not layer.takes_bias:
                raise NeedsBias(Reason.NO_ABSORBER, f"{layer.label} can take no bias")
            self.txn.scale_outputs(layer, affine)
        self.into[layer.label] = None

    def _embedding(self, layer: Layer, affine: Affine) -> None:
        if layer.name is None:
            raise Refused(Reason.COMPUTED_WEIGHT, f"that of {layer.label}")
        was = self.txn.proposal(layer).table
        table = self.draft.weight(layer).double() if was is None else was
        place = table.device
        self.txn.set_table(layer, table * affine.scale.to(place) + affine.shift.to(place))

    def _static(self, value: fx.Node, reader: fx.Node, flow: Flow) -> None:
        """A parameter in the chain takes the map element by element."""
        source, current = value, value
        while current.op == "call_function" and is_mover(current):
            before = ops.first(current)
            if before is None:
                break
            current, source = before, before
        if source.op != "get_attr":
            raise Refused(Reason.NO_ABSORBER, f"{place_of(value)} is computed from parameters")
        places = self._follow(value, source)
        if source is not value:
            flow = flow.moved_back(places, source.meta["shape"])
            flow = self._of_all(flow, source)
        scale, shift = flow.elementwise(source.meta["shape"])
        step = reader
        current = value
        while current is not source:  # who reads the parameter itself
            if len(self.draft.readers(current)) > 1:
                raise Refused(
                    Reason.ANOTHER_CONSUMER, f"{place_of(current)} is read more than once"
                )
            step, current = current, ops.first(current)  # type: ignore[assignment]
        self.txn.give(source, step, self.draft.value(source) * scale + shift)
        self.into[str(source.target)] = None

    def _of_all(self, flow: Flow, source: fx.Node) -> Flow:
        """The flow of a parameter of which the example reads a part: other sizes read the rest.

        Raises:
            Refused: What the rest would be is not known.
        """
        if not bool((flow.dense == FREE).any()):
            return flow
        for axis in range(len(flow.shape)):
            try:
                numbers = flow.reduced_to([axis])
            except Refused:
                continue
            if not bool((numbers == FREE).any()):
                return Flow(flow.affine, flow.shape, None, numbers.expand(flow.shape))
        raise Refused(Reason.COMPUTED_WEIGHT, f"only a part of {source.target} is read")

    def _follow(self, value: fx.Node, source: fx.Node) -> Tensor:
        start = numbers(source.meta["shape"])

        def run(node: fx.Node) -> Tensor:
            if node is source:
                return start
            found: Tensor = moved(node, run(ops.first(node)), self.draft.value)  # type: ignore[arg-type]
            return found

        return run(value).long()

    def _norm(self, value: fx.Node, flow: Flow) -> None:
        """A norm's own scale and shift take the map."""
        given = arguments(value)
        weight, bias = given.get("weight"), given.get("bias")
        if not isinstance(weight, fx.Node):
            raise Refused(Reason.NO_ABSORBER, f"{place_of(value)} has no scale and shift")
        if weight.op != "get_attr" or (isinstance(bias, fx.Node) and bias.op != "get_attr"):
            raise Refused(Reason.COMPUTED_WEIGHT, f"the scale of {place_of(value)}")
        by_channel = ops.name_of(value) not in (
            "layer_norm",
            "native_layer_norm",
            "rms_norm",
            "_fused_rms_norm",
        )
        shape = tuple(weight.meta["shape"])
        if by_channel:
            affine = flow.vector(1)
            scale, shift = affine.scale.view(shape), affine.shift.view(shape)
        else:
            scale, shift = flow.elementwise(shape)
        if not isinstance(bias, fx.Node) and bool(shift.any()):
            raise NeedsBias(Reason.NO_ABSORBER, f"{place_of(value)} has no shift")
        self.txn.give(weight, value, self.draft.value(weight) * scale)
        if isinstance(bias, fx.Node):
            self.txn.give(bias, value, self.draft.value(bias) * scale + shift)
        self.into[str(weight.target).rpartition(".")[0] or str(weight.target)] = None

    # -- passages --------------------------------------------------------------------------------

    def _mover(self, value: fx.Node, flow: Flow) -> None:
        source: Any = ops.first(value)
        places = moved(value, numbers(source.meta["shape"]), self.draft.value).long()
        self.push(source, value, flow.moved_back(places, source.meta["shape"]))

    def _element(self, value: fx.Node, lister: fx.Node, flow: Flow) -> None:
        """One of several parts (``chunk``), or the values of a maximum with its places."""
        name = ops.name_of(lister)
        if name not in LISTS:
            others = [r for r in self.draft.readers(lister) if r is not value]
            if value.args[1] == 0 and not any(self.draft.readers(r) for r in others):
                if name in MAXIMA:
                    self._maximum(lister, flow)
                    return
                if name in ops.NORMS:
                    self._norm(lister, flow)
                    return
            raise stuck(self.draft, lister)
        source: Any = ops.first(lister)
        places = moved(lister, numbers(source.meta["shape"]), self.draft.value)
        flow = flow.moved_back(places[value.args[1]].long(), source.meta["shape"])
        for other in self.draft.readers(lister):
            if other is not value and self.draft.readers(other):
                flow = flow.leaving(places[other.args[1]].long().reshape(-1))
        self.push(source, lister, flow)

    def _padded(self, value: fx.Node, flow: Flow) -> None:
        source: Any = ops.first(value)
        marked = self._unpadded(value, source)
        # A negative padding crops; one of 0 may be another at another size.
        if any(size >= 0 for size in arguments(value)["pad"]):
            self._map_constant(value, flow)
        inside = marked >= 0
        scale_at = torch.where(inside, flow.dense, torch.full_like(flow.dense, -1))
        inner = Flow(flow.affine, flow.shape, None, scale_at)
        self.push(source, value, inner.moved_back(marked.clamp(min=0), source.meta["shape"]))

    def _map_constant(self, value: fx.Node, flow: Flow) -> None:
        """Let the padding be what the map makes of it.

        Raises:
            Refused: That is not one number, or it cannot be set.
        """
        _, constant = padding_of(value)
        constants = flow.affine.scale[flow.used] * constant + flow.affine.shift[flow.used]
        padded = float(constants[0])
        if bool((constants != padded).any()):
            raise Refused(
                Reason.PADDED_CONSTANT, f"{place_of(value)} pads with {constant:g} before the norm"
            )
        if padded == constant:
            return
        path = value.meta["module"]
        in_module = isinstance(self.draft.module(path), _ConstantPadNd)
        if not self.draft.as_graph and not (in_module and self.draft.calls_of(path) == 1):
            raise Refused(
                Reason.PADDED_CONSTANT, f"{place_of(value)} pads with {constant:g} in a forward"
            )
        self.txn.padding[value] = padded

    def _unpadded(self, value: fx.Node, source: fx.Node) -> Tensor:
        """Where each element of a padded value comes from; -1 for padding."""
        given = arguments(value)
        before = numbers(source.meta["shape"])
        return torch.nn.functional.pad(before, list(given["pad"]), value=-1.0).long()

    def _concatenated(self, value: fx.Node, flow: Flow) -> None:
        given = arguments(value)
        parts = list(value.args[0])  # type: ignore[arg-type]
        axis = int(given.get("dim") or 0) % len(value.meta["shape"])
        start = 0
        for part in parts:
            shape = part.meta["shape"]
            if shape == (0,):
                continue
            length = shape[axis]
            if parts.count(part) > 1:
                raise Refused(Reason.ANOTHER_CONSUMER, f"{place_of(value)} reads it twice")
            some = flow.part(axis, start, length, shape)
            if self.whole is not None and flow.axis == axis and flow.affine is self.whole:
                self._part(part, value, some, slice(start, start + length))
            else:
                self.push(part, value, some)
            start += length
        if self.rest is not None and bool(self.rest.all()):
            raise Refused(Reason.NO_ABSORBER, f"no input of {place_of(value)} can take it")

    def _part(self, part: fx.Node, value: fx.Node, flow: Flow, channels: slice) -> None:
        """One input of a concatenation, which may be left to the norm's place."""
        tried = Backward(self.txn.branch())
        try:
            tried.push(part, value, flow)
            tried.txn.check()
        except Refused:
            if self.whole is not None and self.rest is None:
                self.rest = torch.zeros(len(self.whole.scale), dtype=torch.bool)
            if self.rest is not None:
                self.rest[channels] = True
            return
        self.txn.adopt(tried.txn)
        self.into |= tried.into

    def _stacked(self, value: fx.Node, flow: Flow) -> None:
        given = arguments(value)
        parts = list(value.args[0])  # type: ignore[arg-type]
        axis = int(given.get("dim") or 0) % len(value.meta["shape"])
        for index, part in enumerate(parts):
            shape = part.meta["shape"]
            some = flow.dense.select(axis, index)
            self.push(part, value, Flow(flow.affine, shape, None, some))

    def _averaged(self, value: fx.Node, flow: Flow) -> None:
        source: Any = ops.first(value)
        why = adds_zeros(value)
        if why and flow.shifts:
            raise Refused(Reason.PADDED_CONSTANT, f"{place_of(value)}: {why}")
        self.push(source, value, self._before_pooling(value, source, flow))

    def _maximum(self, value: fx.Node, flow: Flow) -> None:
        source: Any = ops.first(value)
        if flow.negative:
            raise Refused(
                Reason.NONLINEARITY_BETWEEN,
                f"{place_of(value)}, and the scale of {flow.negative} channels is negative",
            )
        if arguments(value).get("other") is not None:
            raise stuck(self.draft, value)
        self.push(source, value, self._before_pooling(value, source, flow))

    def _before_pooling(self, value: fx.Node, source: fx.Node, flow: Flow) -> Flow:
        axes, shape = pooled_axes(value), source.meta["shape"]
        if len(flow.shape) != len(shape):  # keepdim=False
            dense = flow.dense
            for axis in axes:
                dense = dense.unsqueeze(axis)
            flow = Flow(flow.affine, tuple(dense.shape), None, dense)
        return flow.spread(axes, shape)

    def fork(self) -> Backward:
        """The same on a copy of what is to be changed, to try something."""
        return Backward(self.txn.branch())

    def adopt(self, tried: Backward) -> None:
        """Take over what was tried."""
        self.txn.adopt(tried.txn)
        self.into |= tried.into


def _flat(node: fx.Node) -> list[fx.Node]:
    """Everything a node reads, as often as it reads it."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found
