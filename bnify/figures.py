"""A fold in numbers: what it saves, and what it does to the range of the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnify import ops
from bnify.capture import Captured, record, tensor_at
from bnify.capture.captured import attribute_name
from bnify.cost import Cost, cost_of
from bnify.errors import BnifyError
from bnify.folding.arguments import arguments
from bnify.ranges import RangeWarning, largest_magnification, range_warnings
from bnify.result import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a fold changed, in numbers.

    Attributes:
        before: What the original holds and runs; None where it is gone or not counted.
        after: What the folded model holds and runs; None where that could not be counted.
        samples: Samples in the call whose operations are counted; None without a batch axis.
        magnified: The weight that grew most, and max|W'| / max|W|; None where no weight changed.
        warnings: Weights that a number format does not hold well any more.
        notes: What could not be counted, and why.
    """

    before: Cost | None
    after: Cost | None
    samples: int | None = None
    magnified: tuple[str, float] | None = None
    warnings: tuple[RangeWarning, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON-ready data."""
        magnified = None
        if self.magnified is not None:
            magnified = {"tensor": self.magnified[0], "ratio": self.magnified[1]}
        return {
            "cost": {
                "before": None if self.before is None else self.before.to_dict(),
                "after": None if self.after is None else self.after.to_dict(),
                "samples": self.samples,
            },
            "magnification": magnified,
            "warnings": [warning.to_dict() for warning in self.warnings],
        }


def figures_of(result: Result) -> Figures:
    """Count what a fold saved and judge the weights that it wrote.

    The folded model is recorded anew, so that what really runs is counted. After a fold in place
    the original is gone, and nothing is compared.

    Args:
        result: What ``bnify.fold`` gave.
    """
    captured = result.captured
    if captured is None or captured.model is result.model:
        return Figures(before=None, after=None, notes=("the original is gone: not compared",))
    before, after, groups, notes = None, None, {}, []
    try:
        before = after = cost_of(captured.model, captured.graph)
        if result.plan.edits:
            graph = _folded_graph(result)
            after, groups = cost_of(result.model, graph), _transposed(graph)
            if isinstance(result.model, fx.GraphModule):
                after = replace(after, parameters=_numbers(result.model, captured))
    except BnifyError as error:  # the fold stands without it
        after = None
        notes.append(f"parameters and operations: {error.message}")
    old, new = _written(captured.model, result.model)
    return Figures(
        before=before,
        after=after,
        samples=captured.call.batch,
        magnified=largest_magnification(old, new),
        warnings=range_warnings(old, new, transposed=groups),
        notes=tuple(notes),
    )


def _folded_graph(result: Result) -> fx.Graph:
    if isinstance(result.model, fx.GraphModule):
        return result.model.graph
    return record(result.model, result.call, borrow=True).graph


def _numbers(graph: fx.GraphModule, captured: Captured) -> int:
    """Numbers in the weights of a graph, whose tensors are no parameters."""
    others = {name for name, _ in captured.model.named_buffers()} | set(captured.constants)
    kept = {attribute_name(name) for name in others}
    tensors = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    return sum(tensor.numel() for name, tensor in tensors.items() if name not in kept)


def _written(original: nn.Module, folded: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that a fold wrote, as they were where they were there, and as they are."""
    old: dict[str, Tensor] = {}
    new: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in (*folded.named_parameters(), *folded.named_buffers()):
            before = _tensor(original, name)
            if before is not None and _same(before, tensor):
                continue
            new[name] = tensor
            if before is not None:
                old[name] = before
    return old, new


def _same(one: Tensor, other: Tensor) -> bool:
    alike = (one.shape, one.dtype) == (other.shape, other.dtype)
    return alike and torch.equal(one, other)


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    """The tensor of this name; one that is computed at every call (weight norm) as it comes out."""
    try:
        found: Any = tensor_at(model, name)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def _transposed(graph: fx.Graph) -> dict[str, int]:
    """Groups of the weights of transposed convolutions, by name."""
    groups = {}
    for node in graph.nodes:
        name = ops.name_of(node) if node.op == "call_function" else ""
        if name.startswith("conv_transpose"):
            weight = node.args[1]
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                groups[str(weight.target)] = int(arguments(node)["groups"])
    return groups
