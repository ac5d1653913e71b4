"""Frozen norms of an ONNX file: ``x·s + t`` by channel, from statistics that are stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from bnify.auditing.onnx_constants import Constants, ancestors, is_root, root
from bnify.auditing.onnx_graph import Op, Value
from bnify.auditing.onnx_names import Names, owner_of, place_of, split
from bnify.auditing.onnx_norm import OnnxNorm, short
from bnify.auditing.state import NormState, Vector

_STEPS: Final = frozenset({"Add", "Sub", "Mul", "Div"})


def frozen_norm(op: Op, constants: Constants, names: Names, taken: set[Op]) -> OnnxNorm | None:
    """A chain of operators by stored tensors, in one module, with a root in one of them."""
    chain: list[Op] = []
    statics: list[Value] = []
    first: Value | None = None
    current: Op | None = op
    while current is not None:
        step = _step(current)
        if step is None or (chain and step[0].op is not chain[-1]):
            break
        live, static = step
        size = constants.shape(static) if not chain else None
        if size is not None and all(n == 1 for n in size):
            break  # a scalar starts no norm
        first = first or live
        chain.append(current)
        statics.append(static)
        result = current.result
        readers = result.readers if result is not None and not result.output else []
        alone = len(readers) == 1 and readers[0].scope == op.scope and readers[0].body == op.body
        current = readers[0] if alone else None
    roots = [r for static in statics for r in _roots(static, constants)]
    if first is None or not roots or chain[-1].result is None:
        return None
    spread = next((r for r in roots if _stored_vector(r, constants)), None)
    if spread is None:
        return None
    taken.update(chain)
    leaves = _leaves(statics)
    base = place_of(op, leaves)
    path = names.unique(base)
    return OnnxNorm(
        path=path,
        base=base,
        kind="frozen",
        op=chain[-1],
        value=first,
        result=chain[-1].result,
        state=_frozen_state(path, chain[0], statics[0], spread, leaves, constants),
    )


def _step(op: Op) -> tuple[Value, Value] | None:
    """What flows and what is stored, of an operator on one of each."""
    if op.kind not in _STEPS or len(op.inputs) != 2:
        return None
    a, b = op.inputs
    if a is None or b is None or a.static == b.static:
        return None
    if op.kind in ("Sub", "Div") and a.static:
        return None
    return (b, a) if a.static else (a, b)


def _roots(static: Value, constants: Constants) -> Iterator[Value]:
    """What a square root is taken of on the way to a static value."""
    for value in ancestors(static):
        inner = value.op.input(0) if value.op is not None else None
        if inner is not None and value.op is not None and is_root(value.op, constants):
            yield inner


def _stored_vector(value: Value, constants: Constants) -> bool:
    found = constants.value(value)
    return found is not None and found.size > 1 and any(v.tensor is not None and v.op is None
                                                        for v in ancestors(value))  # fmt: skip


def _leaves(statics: list[Value]) -> list[Value]:
    """Stored tensors of several numbers that values are computed from."""
    found: dict[Value, None] = {}
    for static in statics:
        for value in ancestors(static):
            stored = root(value)
            if stored is not None and stored.tensor is not None and owner_of(value):
                found[value] = None
    return list(found)


def _frozen_state(
    path: str,
    start: Op,
    first: Value,
    spread: Value,
    leaves: list[Value],
    constants: Constants,
) -> NormState | None:
    """The vectors of a frozen norm, where its mean can be told from its shift."""

    def named(*endings: str) -> Vector | None:
        found = (leaf for leaf in leaves if split(leaf.name)[1] in endings)
        return constants.vector(next(found, None))

    var, eps, made = spread, 0.0, spread.op
    if made is not None and made.kind == "Add":
        for one, other in (made.inputs, made.inputs[::-1]):
            number = constants.scalar(other)
            if number is not None and one is not None:
                var, eps = one, short(number)
    variances = constants.vector(var)
    mean = named("running_mean", "moving_mean", "mean")
    if mean is None and start.kind == "Sub":
        mean = constants.vector(first)
    if variances is None or mean is None or mean.size != variances.size:
        return None
    return NormState(
        path=path,
        mean=mean,
        var=variances,
        weight=named("weight", "gamma", "scale"),
        bias=named("bias", "beta"),
        dtype=constants.dtype(var),
        eps=eps,
        momentum=None,
        frozen=True,
    )
