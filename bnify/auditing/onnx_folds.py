"""Which norms of an ONNX file exact algebra could put into the layer in front of them.

``s·(W x + b) + t = (s·W) x + (s·b + t)`` where the layer's output feeds the norm and nothing
else, its weight and bias are stored and read by it alone, its output channels are on axis 1 as the
norm's are, and the statistics give a finite scale and shift. ``bnify fold`` knows more ways than
this (forwards, through pooling and sums): what is listed here, it folds too, at the latest with
``--emit graph``, where a module computes more than its norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bnify.auditing.onnx_constants import Constants
from bnify.auditing.onnx_graph import Op, Value
from bnify.auditing.onnx_names import place_of
from bnify.auditing.onnx_norm import OnnxNorm
from bnify.auditing.state import NormState, Vector

_DEEPEST: Final = 64
#: Operators whose result has as many axes as their first input.
_KEEP_AXES: Final = frozenset(
    {"Identity", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Dropout", "BatchNormalization", "Cast"}
    | {"Clip", "Elu", "Gelu", "HardSwish", "HardSigmoid", "Softplus", "Softmax", "Transpose"}
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnnxFold:
    """A norm and the layer that can take it.

    Attributes:
        norm: The norm.
        op: Conv, ConvTranspose, Gemm or MatMul.
        layer: The layer's name.
        weight: Its weight.
        bias: Its bias; None without one.
    """

    norm: OnnxNorm
    op: Op
    layer: str
    weight: Value
    bias: Value | None


def find_folds(norms: Sequence[OnnxNorm], constants: Constants) -> tuple[OnnxFold, ...]:
    """Every norm that the layer before it can take; all calls of a norm, or none."""
    found = [(norm, _fold(norm, constants)) for norm in norms]
    refused = {norm.base for norm, fold in found if fold is None}
    return tuple(fold for norm, fold in found if fold is not None and norm.base not in refused)


def _fold(norm: OnnxNorm, constants: Constants) -> OnnxFold | None:
    state = norm.state
    if norm.kind != "batch" or state is None or norm.training or norm.results > 1:
        return None
    scale, shift = affine(state)
    if not (np.isfinite(scale).all() and np.isfinite(shift).all() and state.finite):
        return None
    read = _before(norm)
    if read is None:
        return None
    op, added, rows = read
    if op.body != norm.op.body:
        return None
    weight = op.input(1)
    bias = added or op.input(2)
    if weight is None or not _stored(weight) or (bias is not None and not bias.static):
        return None
    shape = constants.shape(weight)
    channels = None if shape is None else _channels(op, shape)
    if channels != state.channels or not _bias_fits(bias, state.channels, constants):
        return None
    if op.kind == "MatMul" and rows != channels and _axes_of(op.result) != 2:
        return None
    return OnnxFold(norm=norm, op=op, layer=place_of(op, (weight, bias)), weight=weight, bias=bias)


def affine(state: NormState) -> tuple[Vector, Vector]:
    """Scale and shift by channel, float64, each of shape (C,)."""
    with np.errstate(all="ignore"):
        scale = 1 / np.sqrt(state.var + state.eps)
        scale = scale if state.weight is None else scale * state.weight
        shift = -state.mean * scale
        return scale, shift if state.bias is None else shift + state.bias


def folded_rows(fold: OnnxFold, constants: Constants) -> tuple[Vector, Vector | None]:
    """The largest magnitude of each output channel after folding, and the new bias.

    Returns:
        max|W'| by channel and b', float64, each of shape (C,); b' is None where it is not known.
    """
    state = fold.norm.state
    weight = constants.value(fold.weight)
    if state is None or weight is None:
        return np.zeros(0), None
    scale, shift = affine(state)
    gemm = fold.op.kind == "Gemm"
    alpha, beta = (fold.op.number(n, 1.0) if gemm else 1.0 for n in ("alpha", "beta"))
    with np.errstate(all="ignore"):  # what is not finite stays so
        rows = channel_rows(fold.op, weight, int(fold.op.number("group", 1)))
        largest = np.abs(rows).max(axis=1, initial=0) * abs(alpha) * np.abs(scale)
        if fold.bias is None:
            return largest, shift
        bias = constants.vector(fold.bias)
        return largest, None if bias is None else beta * bias * scale + shift


def channel_rows(op: Op, weight: NDArray[np.generic], groups: int = 1) -> Vector:
    """A weight as float64 [output channels, numbers of each]."""
    array = weight.astype(np.float64)
    if op.kind == "ConvTranspose":  # [groups · in/groups, out/groups, *k]
        split = array.reshape(groups, array.shape[0] // groups, array.shape[1], -1)
        return split.transpose(0, 2, 1, 3).reshape(groups * array.shape[1], -1)
    if op.kind == "MatMul" or (op.kind == "Gemm" and not op.number("transB", 0)):
        array = array.T
    return array.reshape(array.shape[0], -1)


# -- conditions -----------------------------------------------------------------------------------


def _before(norm: OnnxNorm) -> tuple[Op, Value | None, int | None] | None:
    """The layer that makes what is normalized.

    Returns:
        The layer, a bias that is added behind it, and where its tokens are flattened into the
        batch the length of the last axis, else None.
    """
    added: Value | None = None
    rows: int | None = None
    value = norm.value
    for _ in range(_DEEPEST):
        op = value.op
        if op is None or value.output or len(value.readers) != 1:
            return None
        if op.kind in ("Conv", "ConvTranspose", "Gemm"):
            return (op, None, None) if added is None and rows is None else None
        if op.kind == "MatMul":
            return op, added, rows
        following = op.input(0)
        if op.kind == "Add" and added is None:
            sides = [v for v in op.inputs if v is not None]
            static = [v for v in sides if v.static]
            if len(static) != 1 or len(sides) != 2:
                return None
            added = static[0]
            following = sides[0] if sides[1] is added else sides[1]
        elif op.kind == "Reshape" and rows is None and value.shape is not None:
            if len(value.shape) != 2:
                return None
            rows = value.shape[1]
        elif op.kind != "Identity":
            return None
        if following is None:
            return None
        value = following
    return None


def _stored(weight: Value) -> bool:
    """Whether a weight is stored, and read by one layer alone."""
    value: Value | None = weight
    while value is not None:
        if not value.static or value.output or len(_real_readers(value)) != 1:
            return False
        if value.tensor is not None:
            return True
        if value.op is None or value.op.kind not in ("Identity", "Cast", "Transpose"):
            return False
        value = value.op.input(0)
    return False


def _real_readers(value: Value) -> list[Op]:
    """Readers of the numbers, not of the shape or the type alone."""
    return [op for op in value.readers if not _looks_only(op, value)]


def _looks_only(op: Op, value: Value) -> bool:
    like = op.kind == "CastLike" and op.input(0) is not value
    return like or op.kind in ("Shape", "Size")


def _channels(op: Op, shape: tuple[int, ...]) -> int | None:
    """Number of output channels."""
    match op.kind:
        case "Conv":
            return shape[0] if len(shape) > 2 else None
        case "ConvTranspose":
            groups = int(op.number("group", 1))
            fits = len(shape) > 2 and groups > 0 and shape[0] % groups == 0
            return shape[1] * groups if fits else None
        case "Gemm" if len(shape) == 2:
            return shape[0] if op.number("transB", 0) else shape[1]
        case "MatMul" if len(shape) == 2:
            return shape[1]
        case _:
            return None


def _bias_fits(bias: Value | None, channels: int, constants: Constants) -> bool:
    """Whether a bias is one number a channel, on the last axis or alone."""
    if bias is None:
        return True
    shape = constants.shape(bias)
    return shape is not None and all(n == 1 for n in shape[:-1]) and shape[-1:] in (
        (), (1,), (channels,)
    )  # fmt: skip


def _axes_of(value: Value | None) -> int | None:
    """Number of axes of a value, as far as it is declared or follows from its operators."""
    known: dict[Value, int | None] = {}

    def count(value: Value | None, depth: int) -> int | None:
        if value is None or depth > _DEEPEST:
            return None
        if value not in known:
            known[value] = _count_axes(value, lambda before: count(before, depth + 1))
        return known[value]

    return count(value, 0)


def _count_axes(value: Value, count: Callable[[Value | None], int | None]) -> int | None:
    if value.shape is not None:
        return len(value.shape)
    if value.tensor is not None:
        return len(value.tensor.dims)
    op = value.op
    if op is None:
        return None
    if op.kind in ("Gemm", "Flatten"):
        return 2
    if op.kind in _KEEP_AXES:
        return count(op.input(0))
    if op.kind in ("MatMul", "Add", "Sub", "Mul", "Div"):
        counts = [count(v) for v in op.inputs]
        known = [n for n in counts if n is not None]
        if len(known) < 2 or len(counts) > 2 or (op.kind == "MatMul" and min(known) < 2):
            return None
        return max(known)
    return None
