"""Forwards: let everything that reads the normalized value read the value instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bnify import ops
from bnify.algebra import Affine, shifted
from bnify.folding.arguments import arguments, place_of
from bnify.folding.channels import Flow
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
    padding_of,
    pooled_axes,
    stuck,
)
from bnify.folding.layers import CONVS, Layer
from bnify.folding.refusal import Refused
from bnify.folding.transaction import Transaction
from bnify.reason import Reason


class Forward:
    """Lets readers make up for an affine map that a value has lost.

    Args:
        txn: What is to be changed; a refusal leaves it in an unknown state.
        shared: Whether others read the value before the map: then nobody may write to it.
    """

    def __init__(self, txn: Transaction, *, shared: bool = False) -> None:
        self.txn = txn
        self.draft: Draft = txn.draft
        self.shared = shared
        self.into: dict[str, None] = {}

    def push(self, value: fx.Node, flow: Flow) -> None:
        """Every reader of ``value`` will read x where it read the map of x.

        Raises:
            Refused: One of them cannot make up for it.
        """
        self.draft.check_memory(value)
        readers = self.draft.readers(value)
        if not readers:
            raise Refused(Reason.NO_ABSORBER, f"nobody reads {place_of(value)}")
        refusals: list[Refused] = []
        for reader in readers:
            try:
                self._pass(reader, value, flow)
            except Refused as refused:
                refusals.append(refused)
                continue
            if reader.meta.get("inplace") and self.shared:
                raise Refused(Reason.ANOTHER_CONSUMER, f"{place_of(reader)} writes to it in place")

        if refusals:
            first = refusals[0]
            some_could = len(refusals) < len(readers)
            if some_could and first.reason in (Reason.NONLINEARITY_BETWEEN, Reason.NO_ABSORBER):
                raise Refused(Reason.ANOTHER_CONSUMER, first.detail)
            raise first

    def _pass(self, reader: fx.Node, value: fx.Node, flow: Flow) -> None:
        if reader.op == "output":
            raise Refused(Reason.VALUE_IS_OUTPUT, f"{place_of(value)} is an output")
        if reader in self.txn.fence:
            raise Refused(Reason.SHARED_LAYER, "another call of the same norm reads it")
        layer = self.draft.layer(reader)
        if layer is not None and layer.value is value and reader.all_input_nodes.count(value) == 1:
            self._absorb(layer, flow)
            return
        name = ops.name_of(reader)
        first = ops.first(reader)
        if is_dropout_off(reader) or is_same_dtype(reader):
            self.push(reader, flow)
        elif first is value and is_mover(reader) and self.draft.reads_alone(reader):
            self._mover(reader, flow)
        elif name in ("pad", "constant_pad_nd"):
            self._padded(reader, flow)
        elif name in ("cat", "concat", "concatenate"):
            self._concatenated(reader, value, flow)
        elif name in AVERAGES and first is value:
            self._averaged(reader, flow)
        elif name in MAXIMA and first is value:
            self._maximum(reader, flow)
        elif name in SUMS:
            self._sum(reader, value, flow)
        elif name in PRODUCTS:
            self._product(reader, value, flow)
        elif name == "neg":
            self.push(reader, Flow(_negated(flow), flow.shape, flow.axis, flow.index))
        else:
            raise stuck(self.draft, reader)

    # -- where it ends ---------------------------------------------------------------------------

    def _absorb(self, layer: Layer, flow: Flow) -> None:
        if layer.why_fixed:
            raise Refused(*layer.why_fixed)
        if layer.kernel.kind == "embedding":
            raise stuck(self.draft, layer.node)
        affine = flow.vector(layer.input_axis)
        gained: Tensor | None = None
        if bool(affine.shift.any()):
            self._check_borders(layer)
            if layer.bias is None and not layer.takes_bias:
                raise Refused(Reason.NO_ABSORBER, f"{layer.label} can take no bias")
            weight = self.txn.effective(layer)
            gained = shifted(weight, layer.kernel, affine.shift.to(weight.device)).cpu()
        self.txn.scale_inputs(layer, affine, gained)
        self.into[layer.label] = None

    def _check_borders(self, layer: Layer) -> None:
        """A shift is one number per output only where every tap sees it.

        Raises:
            Refused: The layer pads with zeros, or spreads its input over gaps.
        """
        if layer.kernel.kind not in ("conv", "conv_transpose"):
            return
        given = arguments(layer.node)
        name, taps = ops.name_of(layer.node), layer.weight.meta["shape"][2:]
        if layer.kernel.kind == "conv_transpose":
            plain = all(k == 1 for k in taps) and all(s == 1 for s in given["stride"])
            if not plain or any(given["padding"]) or any(given.get("output_padding") or ()):
                raise Refused(
                    Reason.PADDED_FORWARD,
                    f"{layer.label} is transposed: its outputs see different numbers of taps",
                )
            return
        padding = given["padding"]
        pads = padding == "same" if isinstance(padding, str) else any(padding)
        if isinstance(padding, str) and all(k == 1 for k in taps):
            pads = False
        if pads and name in CONVS | {"convolution", "_convolution"}:
            raise Refused(Reason.PADDED_FORWARD, f"{layer.label} pads with zeros")

    # -- passages --------------------------------------------------------------------------------

    def _mover(self, reader: fx.Node, flow: Flow) -> None:
        result = moved(reader, flow.dense.double(), self.draft.value)
        if ops.name_of(reader) in LISTS:
            for element in self.draft.readers(reader):
                part = result[element.args[1]].long()
                self.push(element, Flow(flow.affine, tuple(part.shape), None, part))
            return
        numbers = result.long()
        self.push(reader, Flow(flow.affine, tuple(numbers.shape), None, numbers))

    def _padded(self, reader: fx.Node, flow: Flow) -> None:
        """The constant around a value goes through the map as well, which is left out now."""
        _, constant = padding_of(reader)
        scale, shift = flow.affine.scale[flow.used], flow.affine.shift[flow.used]
        if bool((scale * constant + shift != constant).any()):
            raise Refused(Reason.PADDED_FORWARD, f"{place_of(reader)} pads with {constant:g}")
        given = arguments(reader)
        # Padding may count as any channel: the map leaves its constant alone. The nearest one's
        # keeps each position to one channel.
        numbers = torch.nn.functional.pad(
            flow.dense.double(), list(given["pad"]), value=-1.0
        ).long()
        self.push(reader, Flow(flow.affine, tuple(numbers.shape), None, numbers))

    def _concatenated(self, reader: fx.Node, value: fx.Node, flow: Flow) -> None:
        given = arguments(reader)
        parts = list(reader.args[0])  # type: ignore[arg-type]
        axis = int(given.get("dim") or 0) % len(reader.meta["shape"])
        if parts.count(value) > 1:
            raise Refused(Reason.ANOTHER_CONSUMER, f"{place_of(reader)} reads it twice")
        channels = len(flow.affine.scale)
        identity = Affine.identity(1)
        affine = Affine(
            torch.cat([flow.affine.scale, identity.scale]),
            torch.cat([flow.affine.shift, identity.shift]),
        )
        numbers = [
            flow.dense if part is value else torch.full(part.meta["shape"], channels)
            for part in parts
            if part.meta["shape"] != (0,)
        ]
        index = torch.cat(numbers, axis)
        self.push(reader, Flow(affine, tuple(index.shape), None, index))

    def _averaged(self, reader: fx.Node, flow: Flow) -> None:
        why = adds_zeros(reader)
        if why and flow.shifts:
            raise Refused(Reason.PADDED_CONSTANT, f"{place_of(reader)}: {why}")
        self.push(reader, self._behind_pooling(reader, flow))

    def _maximum(self, reader: fx.Node, flow: Flow) -> None:
        if flow.negative:
            raise Refused(
                Reason.NONLINEARITY_BETWEEN,
                f"{place_of(reader)}, and the scale of {flow.negative} channels is negative",
            )
        if arguments(reader).get("other") is not None:
            raise stuck(self.draft, reader)
        behind = self._behind_pooling
        if reader.meta.get("shape") is not None:
            self.push(reader, behind(reader, flow))
            return
        for element in self.draft.readers(reader):  # the values, and their places
            if element.args[1] != 0:
                raise Refused(Reason.ANOTHER_CONSUMER, f"{place_of(element)} reads the places")
            self.push(element, behind(reader, flow, element.meta["shape"]))

    def _behind_pooling(self, reader: fx.Node, flow: Flow, shape: Any = None) -> Flow:
        axes = pooled_axes(reader)
        shape = tuple(shape or reader.meta["shape"])
        if flow.axis is not None and flow.axis not in axes and len(shape) == len(flow.shape):
            return Flow(flow.affine, shape, flow.axis)
        kept = [axis for axis in range(len(flow.shape)) if axis not in axes]
        numbers = flow.reduced_to(kept)
        if len(shape) != len(flow.shape):
            numbers = numbers.reshape(shape)
        return Flow(flow.affine, shape, None, numbers.expand(shape))

    # -- with other values -----------------------------------------------------------------------

    def _sum(self, reader: fx.Node, value: fx.Node, flow: Flow) -> None:
        """``(s·x + t) ± k``, with x instead: it is s·(x ± k) + t ± (1 - s)·k."""
        given = arguments(reader)
        a, b, alpha = given["self"], given["other"], given.get("alpha", 1)
        if ops.name_of(reader) == "rsub":
            a, b = b, a
        sign = -alpha if ops.name_of(reader) in ("sub", "rsub") else alpha
        other = b if a is value else a
        if isinstance(other, fx.Node) and other not in self.draft.static:
            raise Refused(
                Reason.NO_ABSORBER, f"{place_of(reader)} adds another value, which has no norm"
            )
        self._check_shape(reader, flow)
        number = self._by_channel(reader, other, flow)
        scale, shift = flow.affine.scale, flow.affine.shift
        if a is value:
            mapped = Affine(scale, shift + sign * number * (1 - scale))
        else:  # k ± (s·x + t): the shift arrives with the sign
            mapped = Affine(scale, sign * shift + number * (1 - scale))
        self.push(reader, Flow(mapped, flow.shape, flow.axis, flow.index))

    def _product(self, reader: fx.Node, value: fx.Node, flow: Flow) -> None:
        """``k·(s·x + t)``, with x instead: it is s·(k·x) + k·t."""
        given = arguments(reader)
        a, b = given["self"], given["other"]
        divides = ops.name_of(reader) == "div"
        other = b if a is value else a
        dynamic = isinstance(other, fx.Node) and other not in self.draft.static
        if dynamic or (divides and a is not value) or given.get("rounding_mode") is not None:
            raise Refused(Reason.NONLINEARITY_BETWEEN, f"{place_of(reader)} multiplies two values")
        self._check_shape(reader, flow)
        number = self._by_channel(reader, other, flow)
        factor = 1 / number if divides else number
        mapped = Affine(flow.affine.scale, flow.affine.shift * factor)
        self.push(reader, Flow(mapped, flow.shape, flow.axis, flow.index))

    def _by_channel(self, reader: fx.Node, other: Any, flow: Flow) -> Tensor:
        found = flow.by_channel(self.draft.constant(other))
        if found is None:
            raise Refused(Reason.WRONG_AXIS, f"{place_of(reader)} treats each element apart")
        return found

    def _check_shape(self, reader: fx.Node, flow: Flow) -> None:
        """Refuse a value that another operand has blown up; such norms are rare.

        Raises:
            Refused: It has.
        """
        if tuple(reader.meta["shape"]) != flow.shape:
            raise stuck(self.draft, reader)


def _negated(flow: Flow) -> Affine:
    return Affine(flow.affine.scale, -flow.affine.shift)
