"""Backwards: let what makes a value make the normalized value instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.modules.padding import _ConstantPadNd

from bnify import ops
from bnify.algebra import Affine
from bnify.folding.arguments import arguments, place_of
from bnify.folding.channels import Flow
from bnify.folding.draft import Draft, Transaction
from bnify.folding.families import (
    AVERAGES,
    CASTS,
    LISTS,
    MAXIMA,
    NONLINEAR,
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
)
from bnify.folding.layers import CONVS, Layer
from bnify.folding.refusal import NeedsBias, Refused
from bnify.reason import Reason

_ATTENTION = "scaled_dot_product_attention"


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
        source = ops.first(value)
        if source is None and name not in ("cat", "stack", "concat", "concatenate"):
            raise Refused(Reason.NO_ABSORBER, f"{place_of(value)} takes no value")
        if is_dropout_off(value) or is_same_dtype(value):
            self.push(source, value, self._same(flow, source))
        elif name == "getitem":
            self._element(value, source, flow)
        elif is_mover(value):
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
            self._sum(value, flow)
        elif name in PRODUCTS:
            self._product(value, flow)
        elif name == "neg":
            self.push(source, value, _mapped(flow, flow.affine.scale, -flow.affine.shift))
        elif name in ops.NORMS:
            self._norm(value, flow)
        elif name == _ATTENTION or name in ("matmul", "bmm"):
            self._attention(value, flow)
        else:
            raise self._stuck(value)

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
            if not is_mover(other) or ops.name_of(other) in LISTS:
                raise Refused(Reason.ANOTHER_CONSUMER, where)
            read = moved(other, numbers(value.meta["shape"]), self.draft.value)
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
        scale, shift = flow.elementwise(source.meta["shape"])
        step = reader
        current = value
        while current is not source:  # who reads the parameter itself
            if len(self.draft.readers(current)) > 1:
                raise Refused(
                    Reason.ANOTHER_CONSUMER, f"{place_of(current)} is read more than once"
                )
            step, current = current, ops.first(current)  # type: ignore[assignment]
        self.txn.set(source, step, self.draft.value(source) * scale + shift)
        self.into[str(source.target)] = None

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
        self.txn.set(weight, value, self.draft.value(weight) * scale)
        if isinstance(bias, fx.Node):
            self.txn.set(bias, value, self.draft.value(bias) * scale + shift)
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
            if value.args[1] == 0 and len(self.draft.readers(lister)) == 1:
                if name in MAXIMA:
                    self._maximum(lister, flow)
                    return
                if name in ops.NORMS:
                    self._norm(lister, flow)
                    return
            raise self._stuck(lister)
        source: Any = ops.first(lister)
        places = moved(lister, numbers(source.meta["shape"]), self.draft.value)
        flow = flow.moved_back(places[value.args[1]].long(), source.meta["shape"])
        for other in self.draft.readers(lister):
            if other is not value and self.draft.readers(other):
                flow = flow.leaving(places[other.args[1]].long().reshape(-1))  # type: ignore[index]
        self.push(source, lister, flow)

    def _padded(self, value: fx.Node, flow: Flow) -> None:
        source: Any = ops.first(value)
        _, constant = padding_of(value)
        mapped = flow.affine.scale[flow.used] * constant + flow.affine.shift[flow.used]
        if bool((mapped != mapped[0]).any()):
            raise Refused(
                Reason.PADDED_CONSTANT, f"{place_of(value)} pads with {constant:g} before the norm"
            )
        padded = float(mapped[0])
        if padded != constant:
            module = self.draft.module(value.meta["module"])
            alone = self.draft.calls_of(value.meta["module"]) == 1
            if not self.draft.as_graph and not (isinstance(module, _ConstantPadNd) and alone):
                raise Refused(
                    Reason.PADDED_CONSTANT, f"{place_of(value)} pads with {constant:g} in a forward"
                )
            self.txn.padding[value] = padded
        marked = self._unpadded(value, source)
        inside = marked >= 0
        scale_at = torch.where(inside, flow.dense, torch.full_like(flow.dense, -1))
        inner = Flow(flow.affine, flow.shape, None, scale_at)
        self.push(source, value, inner.moved_back(marked.clamp(min=0), source.meta["shape"]))

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
            shape = part.meta["shape"]  # type: ignore[union-attr]
            if shape == (0,):
                continue
            length = shape[axis]
            if parts.count(part) > 1:
                raise Refused(Reason.ANOTHER_CONSUMER, f"{place_of(value)} reads it twice")
            some = flow.part(axis, start, length, shape)  # type: ignore[union-attr]
            if self.whole is not None and flow.axis == axis and flow.affine is self.whole:
                self._part(part, value, some, slice(start, start + length))  # type: ignore[arg-type]
            else:
                self.push(part, value, some)  # type: ignore[arg-type]
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
            shape = part.meta["shape"]  # type: ignore[union-attr]
            some = flow.dense.select(axis, index)
            self.push(part, value, Flow(flow.affine, shape, None, some))  # type: ignore[arg-type]

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
            raise self._stuck(value)
        self.push(source, value, self._before_pooling(value, source, flow))

    def _before_pooling(self, value: fx.Node, source: fx.Node, flow: Flow) -> Flow:
        axes, shape = pooled_axes(value), source.meta["shape"]
        if len(flow.shape) != len(shape):  # keepdim=False
            dense = flow.dense
            for axis in axes:
                dense = dense.unsqueeze(axis)
            flow = Flow(flow.affine, tuple(dense.shape), None, dense)
        return flow.spread(axes, shape)

    # -- with other values -----------------------------------------------------------------------

    def _sum(self, value: fx.Node, flow: Flow) -> None:
        """``a ± k·b``: the scale goes to both, the shift to one of them."""
        given = arguments(value)
        a, b, alpha = given["self"], given["other"], given.get("alpha", 1)
        if ops.name_of(value) == "rsub":
            a, b = b, a
        sign = -alpha if ops.name_of(value) in ("sub", "rsub") else alpha
        for one, other in ((a, b), (b, a)):
            if not isinstance(one, fx.Node):  # x + 2: s·(x + 2) + t = (s·x + (s - 1)·2 + t) + 2
                self._beside_constant(value, other, one, a is other, sign, flow)
                return
            if one in self.draft.static and self._constant(value, one, flow):
                number = self.draft.value(one)
                self._beside_constant(value, other, number, a is other, sign, flow)
                return
        if a is b:
            raise Refused(Reason.ANOTHER_CONSUMER, f"{place_of(value)} reads it twice")
        bare = flow.without_shift()
        shift_of_b = _mapped(flow, flow.affine.scale, flow.affine.shift / sign) if sign else flow
        refusals = []
        for first, second in ((flow, bare), (bare, shift_of_b)):
            tried = Backward(self.txn.branch())
            try:
                tried._operands(value, (a, first), (b, second))
            except Refused as refused:
                refusals.append(refused)
                if not flow.shifts:
                    break
                continue
            self.txn.adopt(tried.txn)
            self.into |= tried.into
            return
        raise refusals[0]

    def _operands(self, value: fx.Node, *operands: tuple[fx.Node, Flow]) -> None:
        """Push into both; a layer's own input beside it stays, and the layer makes up for it."""
        failed: list[tuple[fx.Node, Flow, Refused]] = []
        for node, flow in operands:
            tried = Backward(self.txn.branch())
            try:
                tried.push(node, value, flow.operand(node.meta["shape"]))
            except Refused as refused:
                failed.append((node, flow, refused))
                continue
            self.txn.adopt(tried.txn)
            self.into |= tried.into
        if not failed:
            return
        node, flow, refused = failed[0]
        if len(failed) > 1 or flow.shifts or ops.name_of(value) != "add":
            raise refused
        self._make_up(value, node, flow, refused)

    def _make_up(self, value: fx.Node, identity: fx.Node, flow: Flow, refused: Refused) -> None:
        """``s·(conv(x) + x) = (s·conv(x) + (s - 1)·x) + x``: one more tap in the middle."""
        if arguments(value).get("alpha", 1) != 1 or identity.meta["shape"] != value.meta["shape"]:
            raise refused
        for proposal in list(self.txn.proposals.values()):
            layer = proposal.layer
            if layer.value is identity and passes_input_on(layer) and self._summand(layer, value):
                self.txn.add_tap(layer, flow.vector(layer.axis).scale - 1)
                return
        raise refused

    def _summand(self, layer: Layer, total: fx.Node) -> bool:
        """Whether a layer's result enters a sum as it is."""
        node = layer.node
        while node is not total:
            readers = self.draft.readers(node)
            if len(readers) != 1 or ops.name_of(readers[0]) != "add":
                return False
            if arguments(readers[0]).get("alpha", 1) != 1:
                return False
            node = readers[0]
        return True

    def _constant(self, value: fx.Node, static: fx.Node, flow: Flow) -> bool:
        """Whether a static operand is the same for a whole channel."""
        return flow.by_channel(self.draft.value(static)) is not None

    def _beside_constant(
        self, value: fx.Node, other: Any, number: Any, first: bool, sign: float, flow: Flow
    ) -> None:
        """``x ± k`` with a constant k, which stays: s(x ± k) + t = (s·x + t ± (s - 1)k) ± k."""
        by_channel = flow.by_channel(torch.as_tensor(number, dtype=torch.float64))
        scale, shift = flow.affine.scale, flow.affine.shift
        if by_channel is None or not isinstance(other, fx.Node):
            raise self._stuck(value)
        if first:  # x ± k
            mapped = _mapped(flow, scale, shift + (scale - 1) * sign * by_channel)
        elif sign:  # k ± x: x gets the shift through the sign
            mapped = _mapped(flow, scale, (shift + (scale - 1) * by_channel) / sign)
        else:
            raise self._stuck(value)
        self.push(other, value, mapped.operand(other.meta["shape"]))

    def _product(self, value: fx.Node, flow: Flow) -> None:
        """``k·x`` with a constant k, which stays: s·k·x + t = k·(s·x + t/k)."""
        given = arguments(value)
        a, b = given["self"], given["other"]
        divides = ops.name_of(value) == "div"
        if given.get("rounding_mode") is not None:
            raise self._stuck(value)
        for x, k in ((a, b), (b, a)):
            if (isinstance(k, fx.Node) and k not in self.draft.static) or (divides and x is b):
                continue
            if not isinstance(x, fx.Node):
                continue
            number = self.draft.value(k) if isinstance(k, fx.Node) else k
            factor = flow.by_channel(torch.as_tensor(number, dtype=torch.float64))
            if factor is None:
                raise Refused(Reason.WRONG_AXIS, f"{place_of(value)} scales each element apart")
            shift = flow.affine.shift * factor if divides else flow.affine.shift / factor
            shift = torch.where(flow.affine.shift == 0, 0.0, shift)
            if not bool(shift.isfinite().all()):
                raise Refused(Reason.NO_ABSORBER, f"{place_of(value)} multiplies by 0")
            self.push(x, value, _mapped(flow, flow.affine.scale, shift).operand(x.meta["shape"]))
            return
        raise self._stuck(value)

    def _attention(self, value: fx.Node, flow: Flow) -> None:
        """Weights that add up to 1 average the values: the map goes to the values."""
        given = arguments(value)
        if ops.name_of(value) == _ATTENTION:
            weights_sum_to_one = not given.get("dropout_p")
            values = given["value"]
        else:
            left, values = value.args[0], value.args[1]
            weights_sum_to_one = isinstance(left, fx.Node) and self._is_softmax(left)
        if not weights_sum_to_one or not isinstance(values, fx.Node):
            raise self._stuck(value)
        shape = values.meta["shape"]
        if len(shape) != len(flow.shape) or shape[-1] != flow.shape[-1]:
            raise self._stuck(value)
        axis = len(shape) - 2
        if flow.shape[:axis] != shape[:axis]:
            raise self._stuck(value)
        self.push(values, value, flow.spread([axis], shape))

    def _is_softmax(self, node: fx.Node) -> bool:
        """Whether the last axis adds up to 1."""
        while is_dropout_off(node) or is_same_dtype(node) or ops.name_of(node) == "contiguous":
            before = ops.first(node)
            if before is None:
                return False
            node = before
        if ops.name_of(node) not in ("softmax", "_softmax"):
            return False
        return bool(node.args[1] in (-1, len(node.meta["shape"]) - 1))

    def _stuck(self, value: fx.Node) -> Refused:
        return stuck(self.draft, value)


def stuck(draft: Draft, node: fx.Node) -> Refused:
    """Why an operator lets no affine map pass."""
    name = ops.name_of(node)
    live = [s for s in ops.sources(node) if s not in draft.static]
    if name in NONLINEAR and not (name in ops.PRODUCTS or name in CASTS):
        what = place_of(node)
        if name in PRODUCTS and len(live) > 1:
            what = f"{what} multiplies two values"
        return Refused(Reason.NONLINEARITY_BETWEEN, what)
    return Refused(Reason.NO_ABSORBER, f"{place_of(node)} takes no affine map")


def passes_input_on(layer: Layer) -> bool:
    """Whether one more tap in the middle makes a layer add its own input to its result."""
    if layer.value is None or layer.value.meta["shape"] != layer.node.meta["shape"]:
        return False
    if layer.kernel.kind == "linear":
        return True
    if ops.name_of(layer.node) not in CONVS:
        return False
    given = arguments(layer.node)
    kernel = layer.weight.meta["shape"][2:]
    if any(k % 2 == 0 for k in kernel) or any(s != 1 for s in given["stride"]):
        return False
    if isinstance(given["padding"], str):
        return bool(given["padding"] == "same" or all(k == 1 for k in kernel))
    steps = zip(
        kernel,
        _each(given["padding"], len(kernel)),
        _each(given["dilation"], len(kernel)),
        strict=True,
    )
    return all(p == d * (k - 1) // 2 for k, p, d in steps)


def _each(values: Any, count: int) -> list[int]:
    listed = list(values)
    return listed * count if len(listed) == 1 else listed


def _mapped(flow: Flow, scale: Tensor, shift: Tensor) -> Flow:
    return Flow(Affine(scale, shift), flow.shape, flow.axis, flow.index)


def _flat(node: fx.Node) -> list[fx.Node]:
    """Everything a node reads, as often as it reads it."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found
