"""The norms of an ONNX file: the operator, and what exporters write in its place.

``batch``
    BatchNormalization. Its statistics may be computed by the file, from the values at hand.
``frozen``
    ``x·s + t`` by channel with a square root of something stored in ``s``: a frozen batch norm.
``written``
    A division by the square root of a mean over axis 0: batch norm by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from bnify.auditing.onnx_batch import is_per_sample, reduction_of, written_norm
from bnify.auditing.onnx_constants import Constants, root
from bnify.auditing.onnx_frozen import frozen_norm
from bnify.auditing.onnx_graph import Graph, Op, Value
from bnify.auditing.onnx_names import Names, place_of
from bnify.auditing.onnx_norm import OnnxNorm, short
from bnify.auditing.onnx_reading import damaged, shown
from bnify.auditing.state import NormState

_ATTRIBUTE: Final = 14  # from this opset on, training mode is an attribute
_TESTED: Final = 7  # below this one, it is the attribute is_test


def find_norms(graph: Graph, constants: Constants, names: Names) -> Iterator[OnnxNorm]:
    """Every norm of activations, in the order of execution.

    What normalizes a weight (weight standardisation) is left out.

    Raises:
        WeightsError: A norm lacks inputs.
    """
    taken: set[Op] = set()
    for op in graph.ops:
        if op in taken:
            continue
        if op.kind == "BatchNormalization":
            found = _batch(graph, op, constants, names)
        elif op.kind in ("Add", "Sub", "Mul", "Div"):
            found = frozen_norm(op, constants, names, taken) or written_norm(op, constants, names)
        else:
            continue
        if found is not None:
            yield found


def _batch(graph: Graph, op: Op, constants: Constants, names: Names) -> OnnxNorm | None:
    given = [op.input(i) for i in range(5)]
    value, result = given[0], op.result
    if value is None or result is None or any(v is None for v in given):
        raise damaged(graph.path, f"BatchNormalization {shown(op.name)} lacks inputs or a result")
    if value.static:
        return None
    scale, shift, mean, var = given[1:]
    base = place_of(op, (scale, mean, var, shift))
    path = names.unique(base)
    computed = not (mean and var and mean.static and var.static)
    reduced = [reduction_of(v, constants) for v in (mean, var)] if computed else []
    per_sample = is_per_sample(value, constants)
    if per_sample:  # the vectors are repeated for every sample
        given[1:] = [root(v) if _is_vector(root(v), constants) else v for v in given[1:]]
    state = None if computed else _state(path, op, given, constants)
    return OnnxNorm(
        path=path,
        base=base,
        kind="batch",
        op=op,
        value=value,
        result=result,
        training=_in_training(op),
        results=sum(output is not None for output in op.outputs),
        computed=any(reduced),
        per_sample=per_sample,
        state=state,
    )


def _is_vector(value: Value | None, constants: Constants) -> bool:
    shape = constants.shape(value)
    return shape is not None and len(shape) == 1 and shape[0] > 1


def _in_training(op: Op) -> bool:
    """Whether the operator normalizes with the statistics of the batch."""
    if op.version >= _ATTRIBUTE or "training_mode" in op.attributes:
        return bool(op.number("training_mode", 0))
    return op.version < _TESTED and not op.number("is_test", 0)


def _state(path: str, op: Op, given: list[Value | None], constants: Constants) -> NormState | None:
    scale, shift, mean, var = (constants.vector(value) for value in given[1:])
    if mean is None or var is None or mean.size != var.size:
        return None
    momentum = 1 - short(op.number("momentum", 0.9))
    return NormState(
        path=path,
        mean=mean,
        var=var,
        weight=scale if scale is not None and scale.size == mean.size else None,
        bias=shift if shift is not None and shift.size == mean.size else None,
        dtype=constants.dtype(given[4]),
        eps=short(op.number("epsilon", 1e-5)),
        momentum=float(f"{momentum:.7g}"),
    )
