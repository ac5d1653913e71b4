"""Statistics that an ONNX file computes from the batch at hand, and norms written out with them."""

from __future__ import annotations

from typing import Final

from bnify.auditing.onnx_constants import Constants, is_root
from bnify.auditing.onnx_graph import Op, Value
from bnify.auditing.onnx_names import Names, place_of
from bnify.auditing.onnx_norm import OnnxNorm

#: Operators between a mean over the batch and the division by its square root.
_BETWEEN: Final = frozenset(
    {"Sqrt", "Reciprocal", "Pow", "Add", "Sub", "Mul", "Div", "Reshape", "Unsqueeze", "Squeeze"}
    | {"Expand", "Cast", "CastLike", "Identity", "Clip", "Max", "Abs"}
)
_REDUCTIONS: Final = frozenset({"ReduceMean", "ReduceSum", "ReduceSumSquare"})
_FARTHEST: Final = 24


def written_norm(op: Op, constants: Constants, names: Names) -> OnnxNorm | None:
    """``(x − mean) / sqrt(var + ε)`` with a mean over axis 0."""
    result = op.result
    if op.kind not in ("Mul", "Div") or result is None or result.static or len(op.inputs) != 2:
        return None
    a, b = op.inputs
    sides = [(a, b)] if op.kind == "Div" else [(a, b), (b, a)]
    for value, spread in sides:
        if value is None or spread is None or value.static or spread.static:
            continue
        found = reduction_of(spread, constants, rooted=True)
        if found is None or not found[1] or 0 not in found[1]:
            continue
        given = _before_centring(value)
        if given.shape is not None and len(given.shape) < 2:
            continue  # a vector has no batch axis
        base = place_of(op, ())
        return OnnxNorm(
            path=names.unique(base),
            base=base,
            kind="written",
            op=op,
            value=given,
            result=result,
            axes=found[1],
            computed=True,
            per_sample=is_per_sample(given, constants),
        )
    return None


def _before_centring(value: Value) -> Value:
    op = value.op
    before = op.input(0) if op is not None and op.kind == "Sub" else None
    return before if before is not None else value


def reduction_of(
    value: Value | None, constants: Constants, *, rooted: bool = False
) -> tuple[Op, tuple[int, ...] | None] | None:
    """The mean over several samples that a value comes from, with its axes.

    Args:
        value: What is looked behind.
        constants: Knows the axes.
        rooted: Look for a square root on the way, too.
    """
    waiting = [(value, not rooted)] if value is not None else []
    for _ in range(_FARTHEST):
        if not waiting:
            break
        current, has_root = waiting.pop(0)
        op = current.op
        if op is None or current.static:
            continue
        if op.kind in _REDUCTIONS and has_root:
            return op, _axes(op, constants)
        if op.kind in _BETWEEN:
            rooted_now = has_root or is_root(op, constants)
            waiting += [(v, rooted_now) for v in op.inputs if v is not None]
    return None


def _axes(op: Op, constants: Constants) -> tuple[int, ...] | None:
    """Axes of a reduction, counted from the front; None where they are not known."""
    given = op.input(0)
    rank = len(given.shape) if given is not None and given.shape is not None else None
    axes = op.numbers("axes")
    if axes is None and op.input(1) is not None:
        axes = constants.integers(op.input(1))
        if axes is None:
            return None
    if not axes:
        return () if op.number("noop_with_empty_axes", 0) else tuple(range(rank or 1))
    if min(axes) < 0:
        if rank is None:
            return None
        axes = tuple(axis + rank if axis < 0 else axis for axis in axes)
    return tuple(sorted(axes))


def is_per_sample(value: Value, constants: Constants) -> bool:
    """Whether batch and channels were reshaped into one axis behind an axis of length 1."""
    op = value.op
    if op is None or op.kind != "Reshape":
        return False
    sizes = op.input(1)
    while sizes is not None and sizes.op is not None and sizes.op.kind == "Concat":
        sizes = sizes.op.input(0)
    found = constants.integers(sizes) or op.numbers("shape") or (0,)
    return found[0] == 1
