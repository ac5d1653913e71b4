"""What a static value of an ONNX graph is: stored numbers behind Identity, Cast, Reshape and such.

A small evaluator in numpy, for the operators that exporters put between a stored vector and the
norm that reads it. What it does not know is None; what grows beyond reason is not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bnify.auditing.onnx_graph import Op, Value
from bnify.auditing.onnx_reading import Tensors

Array = NDArray[Any]

_MOST: Final = 1 << 24  # numbers in one computed tensor
_MOST_ANCESTORS: Final = 256  # a norm that is written out has some thirty
_TOGETHER: Final = 1 << 26  # and in all that are kept
#: Operators that hand on the numbers of their first input, and no others.
PASSES: Final = frozenset(
    {"Identity", "Cast", "CastLike", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Expand"}
    | {"Tile", "Transpose"}
)
#: Those that take no more memory than what is stored.
_VIEWS: Final = PASSES - {"Tile"}
#: TensorProto.DataType → numpy, of the casts that are followed.
_CASTS: Final = {
    1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16, 11: np.float64,
    16: np.float32,
}  # fmt: skip


class Constants:
    """Evaluates static values of one file, each once.

    Args:
        tensors: Decodes what is stored.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._known: dict[Value, Array | None] = {}
        self._left = _TOGETHER

    def value(self, value: Value | None) -> Array | None:
        """The numbers of a static value; None where they are not known.

        Raises:
            WeightsError: A stored tensor has not the bytes that its shape needs.
        """
        if value is None or not value.static:
            return None
        if value not in self._known:
            self._known[value] = self._compute(value)
        return self._known[value]

    def vector(self, value: Value | None) -> NDArray[np.float64] | None:
        """A static value as a float64 vector.

        Where it is a stored vector that is repeated by a number which only the input brings
        (instance norm at an open batch), it is that vector.
        """
        found = self.value(value)
        if found is None:
            stored = root(value)
            found = None if stored is None else self.value(stored)
        if found is None or found.dtype.kind not in "fiub":
            return None
        with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN as well
            result: NDArray[np.float64] = found.astype(np.float64).reshape(-1)
        return result

    def scalar(self, value: Value | None) -> float | None:
        """A static value of one number."""
        found = self.value(value)
        return float(found.reshape(-1)[0]) if found is not None and found.size == 1 else None

    def integers(self, value: Value | None) -> tuple[int, ...] | None:
        """A static value as integers: sizes or axes; None where it is something else."""
        found = self.value(value)
        if found is None or found.dtype.kind not in "iu":
            return None
        return tuple(int(number) for number in found.reshape(-1))

    def dtype(self, value: Value | None) -> str:
        """The type that a static value is stored in; ``"float32"`` where it is computed."""
        stored = root(value)
        if stored is None or stored.tensor is None:
            return "float32"
        return self._tensors.dtype(stored.tensor)

    def shape(self, value: Value | None) -> tuple[int, ...] | None:
        """Shape of a static value; a stored tensor is not decoded for it."""
        while value is not None and value.op is not None and value.op.kind in ("Identity", "Cast"):
            value = value.op.input(0)
        if value is not None and value.tensor is not None:
            return tuple(value.tensor.dims)
        found = self.value(value)
        return None if found is None else found.shape

    def _compute(self, value: Value) -> Array | None:
        if value.tensor is not None:
            return self._tensors.value(value.tensor)
        op = value.op
        if op is None or value is not op.result:
            return None
        if op.kind == "Constant":
            return _constant(op)
        compute = _OPERATORS.get(op.kind)
        if compute is None:
            return None
        if op.kind == "Shape":
            return _shape(op, self.value(op.input(0)))
        given = [self.value(v) for v in op.inputs]
        if any(g is None for v, g in zip(op.inputs, given, strict=True) if v is not None and g is
               None and not (op.kind == "CastLike" and v is op.inputs[-1])):  # fmt: skip
            return None
        try:
            with np.errstate(all="ignore"):
                result = np.asarray(compute(op, *given))
        except (ValueError, TypeError, IndexError, OverflowError, AttributeError, MemoryError):
            return None  # the file asks for what numpy refuses: then it is not known
        if op.kind not in _VIEWS:
            self._left -= result.size
        return result if self._left >= 0 else None


def root(value: Value | None) -> Value | None:
    """The stored value that a static value hands on, all operators between passing it through."""
    while value is not None and value.op is not None and value.tensor is None:
        if value.op.kind not in PASSES:
            return None
        value = value.op.input(0)
    return value if value is not None and value.static else None


def ancestors(value: Value) -> Iterator[Value]:
    """A static value and the values that it is computed from, at most some hundred of them."""
    seen = {value}
    waiting = [value]
    while waiting and len(seen) < _MOST_ANCESTORS:
        current = waiting.pop()
        yield current
        for before in current.op.inputs if current.op is not None else ():
            if before is not None and before.static and before not in seen:
                seen.add(before)
                waiting.append(before)


def is_root(op: Op, constants: Constants) -> bool:
    """Whether an operator takes a square root, or divides by one."""
    if op.kind == "Pow":
        return constants.scalar(op.input(1)) in (0.5, -0.5)
    return op.kind == "Sqrt"


# -- operators ------------------------------------------------------------------------------------


def _constant(op: Op) -> Array | None:
    found = op.attributes
    if "value_float" in found:
        return np.float32(found["value_float"].f) * np.ones((), np.float32)
    if "value_floats" in found:
        return np.array(found["value_floats"].floats, np.float32)
    if "value_int" in found:
        return np.array(found["value_int"].i, np.int64)
    if "value_ints" in found:
        return np.array(found["value_ints"].ints, np.int64)
    return None


def _shape(op: Op, known: Array | None) -> Array | None:
    given = op.input(0)
    sizes = known.shape if known is not None else given.shape if given is not None else None
    if sizes is None:
        return None
    end = op.attributes["end"].i if "end" in op.attributes else len(sizes)
    part = sizes[int(op.number("start", 0)) : end]
    return None if any(size is None for size in part) else np.array(part, np.int64)


def _cast(op: Op, x: Array, *_: Any) -> Array:
    if op.kind == "CastLike":
        return x
    return x.astype(_CASTS[int(op.number("to", 1))]) if int(op.number("to", 1)) in _CASTS else x


def _axes(op: Op, given: Array | None) -> tuple[int, ...] | None:
    if given is not None:
        return tuple(int(axis) for axis in given.reshape(-1))
    return op.numbers("axes")


def _reshape(op: Op, x: Array, shape: Array | None = None) -> Array:
    wanted = [int(n) for n in shape] if shape is not None else list(op.numbers("shape") or ())
    if not op.number("allowzero", 0):
        wanted = [x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    return x.reshape(wanted)


def _unsqueeze(op: Op, x: Array, axes: Array | None = None) -> Array:
    return np.expand_dims(x, _axes(op, axes) or ())


def _squeeze(op: Op, x: Array, axes: Array | None = None) -> Array:
    return np.squeeze(x, _axes(op, axes))


def _flatten(op: Op, x: Array) -> Array:
    axis = int(op.number("axis", 1))
    return x.reshape(prod(x.shape[:axis]), -1)


def _transpose(op: Op, x: Array) -> Array:
    return np.transpose(x, op.numbers("perm"))


def _expand(_: Op, x: Array, shape: Array) -> Array:
    target = np.broadcast_shapes(x.shape, tuple(int(n) for n in shape.reshape(-1)))
    _check(prod(target))
    return np.broadcast_to(x, target)


def _tile(_: Op, x: Array, repeats: Array) -> Array:
    times = [int(n) for n in repeats.reshape(-1)]
    _check(x.size * prod(times))
    return np.tile(x, times)


def _concat(op: Op, *parts: Array) -> Array:
    _check(sum(part.size for part in parts))
    return np.concatenate(parts, axis=int(op.number("axis", 0)))


def _filled(op: Op, shape: Array) -> Array:
    sizes = tuple(int(n) for n in shape.reshape(-1))
    _check(prod(sizes))
    if "value" in op.attributes:
        raise ValueError("only zeros are needed")
    return np.zeros(sizes, np.float32)


def _gather(op: Op, x: Array, index: Array) -> Array:
    _check(x.size * max(index.size, 1))
    return np.take(x, index, axis=int(op.number("axis", 0)))


def _broadcast(function: Callable[..., Array]) -> Callable[..., Array]:
    def compute(_: Op, *given: Array) -> Array:
        _check(prod(np.broadcast_shapes(*(x.shape for x in given))))
        return function(*given)

    return compute


def _check(size: int) -> None:
    if not 0 <= size <= _MOST:
        raise ValueError("too large")


_OPERATORS: Final[dict[str, Callable[..., Array]]] = {
    "Identity": lambda _, x: x,
    "Shape": lambda _, x: x,
    "Cast": _cast,
    "CastLike": _cast,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Expand": _expand,
    "Tile": _tile,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Gather": _gather,
    "Add": _broadcast(np.add),
    "Sub": _broadcast(np.subtract),
    "Mul": _broadcast(np.multiply),
    "Div": _broadcast(np.true_divide),
    "Pow": _broadcast(np.power),
    "Sqrt": _broadcast(np.sqrt),
    "Reciprocal": _broadcast(np.reciprocal),
    "Neg": _broadcast(np.negative),
    "Abs": _broadcast(np.abs),
    "Exp": _broadcast(np.exp),
    "Max": _broadcast(np.maximum),
}
