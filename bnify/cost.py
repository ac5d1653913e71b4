"""What a model holds and what one forward pass of it costs, from its recorded graph.

FLOPs of one call, two for each multiply-add (the usual "MACs" are half of it):

    linear, matmul, bmm, addmm     2 · elements of the result · length of the summed axis
    convolution                    2 · elements of the result · in/groups · taps
    transposed convolution         2 · elements of the input · out/groups · taps
    attention                      2 · B · L · S · (E + Eᵥ), masked positions included
    lstm, gru, rnn and cells       2 · positions · elements of all weight matrices
    batch norm with given statistics   2 an element: its scale and its shift
    layer, group, instance norm, batch norm with the batch's statistics
                                   8 an element: mean 1, variance 3, normalize 2, affine 2
    RMS norm                       4 an element: square, sum, scale, weight
    add, sub, mul, div             1 an element; addcmul 2

Biases, activations, pools, lookups and copies count nothing, and neither does what is computed of
weights only. Divide by the batch size for FLOPs per sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from torch import Tensor, fx, nn

from bnify import ops
from bnify.errors import PlanError
from bnify.graph import Facts

_ELEMENTWISE: Final = {"add": 1, "sub": 1, "rsub": 1, "mul": 1, "div": 1, "addcmul": 2}
_BATCH_NORMS: Final = frozenset(n for n in ops.NORMS if "batch_norm" in n)
_RMS_NORMS: Final = frozenset({"rms_norm", "_fused_rms_norm"})
_CONVOLUTIONS: Final = frozenset(n for n in ops.WEIGHT_POSITION if "conv" in n)
#: Position of the left factor; the right one comes after it.
_MATRIX_PRODUCTS: Final = {
    "matmul": 0,
    "bmm": 0,
    "mm": 0,
    "mv": 0,
    "dot": 0,
    "addmm": 1,
    "addmv": 1,
    "baddbmm": 1,
}


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model holds and what one recorded call of it runs.

    Attributes:
        parameters: Numbers in the model's parameters, tied ones once.
        flops: Floating-point operations of the call, for its whole batch.
        norms: Norms executed on values: norm operators, and norms written out (frozen batch
            norms, hand-written RMS norms); norms of weights are none.
        weighted: Operators executed that multiply a value by a weight: linear layers and
            convolutions.
    """

    parameters: int
    flops: int
    norms: int
    weighted: int

    def to_dict(self) -> dict[str, int]:
        """The four numbers as JSON-ready data."""
        return asdict(self)


def cost_of(model: nn.Module, graph: fx.Graph) -> Cost:
    """Count what a model holds and what its recorded forward pass costs.

    Args:
        model: The model, whose parameters are counted.
        graph: The graph of ``bnify.capture.record(model, inputs)``: every value has its shape in
            ``meta["shape"]``.

    Raises:
        PlanError: An operator that counts has no recorded shape, as in a graph that was rewritten.
    """
    facts = Facts(graph)
    return Cost(
        parameters=parameter_count(model),
        flops=sum(_flops(node, facts) for node in facts.nodes if node not in facts.static),
        norms=sum(_is_norm(node, facts) for node in facts.nodes),
        weighted=len(facts.weighted),
    )


def parameter_count(model: nn.Module) -> int:
    """Numbers in the parameters of a model; tied parameters, and views of one memory, once."""
    seen: dict[Any, Tensor] = {}
    for parameter in model.parameters():
        seen.setdefault(_place(parameter), parameter)
    return sum(p.numel() for p in seen.values())


def _place(tensor: Tensor) -> Any:
    """Where a parameter's numbers are; its own identity where it has no memory."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return id(tensor)
    try:
        where = tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse tensors have none
        return id(tensor)
    return (where, tensor.storage_offset(), tuple(tensor.shape), tensor.dtype)


# -- one operator --------------------------------------------------------------------------------


def _flops(node: fx.Node, facts: Facts) -> int:
    name = facts.name[node]
    if name in _CONVOLUTIONS:
        return _convolution(node, name)
    if name == "linear":
        return 2 * _elements(node) * _shape(node.args[0])[-1]
    if name in _MATRIX_PRODUCTS:
        left = node.args[_MATRIX_PRODUCTS[name]]
        return 2 * _elements(node) * _shape(left)[-1]
    if name == "einsum":
        return _einsum(node)
    if name in ops.ATTENTION:
        query, key, value = (_shape(argument) for argument in node.args[:3])
        positions = math.prod(query[:-1]) * key[-2]
        return 2 * positions * (query[-1] + value[-1])
    if name in ops.RECURRENT:
        return _recurrent(node, facts)
    if name in ops.NORMS:
        return _per_element(node, name) * _elements(node.args[0])
    if name in _ELEMENTWISE:
        return _ELEMENTWISE[name] * _elements(node)
    return 0


def _convolution(node: fx.Node, name: str) -> int:
    """Each weight meets each position of the result; of the input, where it is transposed."""
    weight = _shape(node.args[1])
    general = name in ("convolution", "_convolution")
    transposed = bool(node.args[6]) if general else "transpose" in name
    return 2 * _elements(node.args[0] if transposed else node) * math.prod(weight[1:])


def _einsum(node: fx.Node) -> int:
    """2 · the product of the lengths of all letters; a summed product of two at a time."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    lengths: dict[str, int] = {}
    free: tuple[int, ...] = ()
    if not isinstance(operands, (list, tuple)):
        return 0
    for letters, operand in zip(equation.partition("->")[0].split(","), operands, strict=True):
        shape = _shape(operand)
        before, dots, after = letters.partition("...")
        if dots:
            rest = shape[len(before) : len(shape) - len(after)]
            free = max(free, rest, key=math.prod)
            shape = (*shape[: len(before)], *shape[len(shape) - len(after) :])
        for letter, size in zip(before + after, shape, strict=True):
            lengths[letter] = max(size, lengths.get(letter, 1))
    factors = len(operands)
    return 2 * max(factors - 1, 0) * math.prod(lengths.values()) * math.prod(free)


def _recurrent(node: fx.Node, facts: Facts) -> int:
    """Every weight matrix meets every position once; projections and both directions included."""
    positions = math.prod(_shape(node.args[0])[:-1])
    state = node.args[1]  # zeros that torch makes are static too
    states = state if isinstance(state, (list, tuple)) else (state,)
    matrices = [
        s
        for s in ops.sources(node)
        if s in facts.static and s not in states and len(_shape(s)) == 2
    ]
    return 2 * positions * sum(_elements(matrix) for matrix in matrices)


def _per_element(node: fx.Node, name: str) -> int:
    if name in _RMS_NORMS:
        return 4
    if name in _BATCH_NORMS and not _uses_batch_statistics(node, name):
        return 2
    if name == "instance_norm" and not node.args[5]:  # use_input_stats
        return 2
    return 8


def _uses_batch_statistics(node: fx.Node, name: str) -> bool:
    """Whether a batch norm computes the statistics that it uses."""
    if name == "_native_batch_norm_legit_no_training":
        return False
    if name == "_native_batch_norm_legit" and not isinstance(node.args[3], fx.Node):
        return True  # the overload without running statistics
    return bool(node.args[5]) or node.args[3] is None


def _is_norm(node: fx.Node, facts: Facts) -> bool:
    """Whether a node is where a norm on a value begins; its own scale and shift are part of it."""
    if node in facts.static or facts.name[node] == "getitem":
        return False
    if facts.name[node] in ops.NORMS:
        return True
    if node not in facts.normed:
        return False
    sources = ops.sources(node)
    if not any(s in facts.normed for s in sources):
        return True
    # After another norm: a frozen batch norm's scale has a square root, a norm's own has none.
    return facts.name[node] == "mul" and any(
        s in facts.static and _has_root(s, facts) for s in sources
    )


def _has_root(node: fx.Node, facts: Facts) -> bool:
    """Whether a static value is computed with a square root."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if facts.name[current] in ("rsqrt", "sqrt"):
            return True
        fresh = [s for s in ops.sources(current) if s not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return False


# -- shapes --------------------------------------------------------------------------------------


def _elements(value: Any) -> int:
    return math.prod(_shape(value))


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, fx.Node):
        return ()
    shape: Iterable[int] | None = value.meta.get("shape")
    if shape is None:  # an operator with several results: the first is the one that counts
        first = next((u for u in value.users if u.args[1:] == (0,)), None)
        shape = None if first is None else first.meta.get("shape")
    if shape is None:
        raise PlanError(
            f"{value.name} has no recorded shape, so its cost cannot be counted",
            hint="record the rewritten model and count on that recording",
        )
    return tuple(shape)
