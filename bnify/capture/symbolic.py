"""A symbolic batch for the price of a second recording.

A recording has the batch size baked into shapes (``view``, ``expand``, ``arange``). Two recordings
at batch B₁ and B₂ are walked together; an integer that differs is q·B + r and is written as such.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bnify.capture.captured import Captured


def make_symbolic(captured: Captured, other: Captured) -> str | None:
    """Let the graph of ``captured`` run at any batch size, in place.

    Args:
        captured: The recording.
        other: The same model recorded at another batch size.

    Returns:
        None, or why the batch stays baked in; the graph is unchanged then.
    """
    size, other_size = captured.call.batch, other.call.batch
    if size is None or other_size is None or size == other_size:
        return "the inputs have no batch axis"
    pairs = list(zip(captured.graph.nodes, other.graph.nodes, strict=False))
    if len(captured.graph.nodes) != len(other.graph.nodes):
        return f"the model runs other operators at batch {other_size} than at {size}"
    twin: dict[fx.Node, fx.Node] = {}
    for mine, theirs in pairs:
        if (mine.op, mine.target) != (theirs.op, theirs.target):
            return f"{mine.name} differs between batch {size} and {other_size}"
        twin[mine] = theirs
    for name, constant in captured.constants.items():
        if name not in other.constants or constant.shape != other.constants[name].shape:
            return f"a constant of shape {list(constant.shape)} depends on the batch"
    plans: list[tuple[fx.Node, Any, Any]] = []
    for mine, theirs in pairs:
        if mine.op != "call_function":
            continue
        found = _same(mine.args, theirs.args, twin) and _same(mine.kwargs, theirs.kwargs, twin)
        if found:
            continue
        line = _Line(size, other_size, twin)
        if not (line.fits(mine.args, theirs.args) and line.fits(mine.kwargs, theirs.kwargs)):
            return f"{mine.name} depends on the batch in a way that is no q·B + r"
        plans.append((mine, theirs.args, theirs.kwargs))
    if not plans:
        return None
    batch = _size_node(captured)
    for mine, args, kwargs in plans:
        line = _Line(size, other_size, twin)
        with captured.graph.inserting_before(mine):
            write = _writer(captured.graph, batch)
            mine.args = line.merged(mine.args, args, write)
            mine.kwargs = line.merged(mine.kwargs, kwargs, write)
    return None


def _size_node(captured: Captured) -> fx.Node:
    """The batch size as a node: the length of the first axis of the first input that has one."""
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
    source = next(node for node in placeholders if node.meta["shape"])
    with captured.graph.inserting_after(placeholders[-1]):
        node = captured.graph.call_function(torch.ops.aten.sym_size.int, (source, 0))
    node.meta.update(shape=None, module="", writes=())
    return node


def _writer(graph: fx.Graph, batch: fx.Node) -> Callable[[int, int], fx.Node]:
    """Writes q·B + r in front of a node."""

    def write(q: int, r: int) -> fx.Node:
        node = batch
        for function, number, neutral in ((operator.mul, q, 1), (operator.add, r, 0)):
            if number != neutral:
                node = graph.call_function(function, (node, number))
                node.meta.update(shape=None, module="", writes=())
        return node

    return write


def _same(mine: Any, theirs: Any, twin: dict[fx.Node, fx.Node]) -> bool:
    if isinstance(mine, fx.Node):
        return twin.get(mine) is theirs
    if isinstance(mine, (list, tuple)):
        return len(mine) == len(theirs) and all(
            _same(a, b, twin) for a, b in zip(mine, theirs, strict=True)
        )
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(_same(mine[k], theirs[k], twin) for k in mine)
    return bool(mine == theirs)


class _Line:
    """The line through two sizes."""

    def __init__(self, size: int, other: int, twin: dict[fx.Node, fx.Node]) -> None:
        self.size, self.other, self.twin = size, other, twin

    def of(self, mine: int, theirs: int) -> tuple[int, int] | None:
        """Slope and offset q, r with q·B + r for both batch sizes, or None."""
        q, rest = divmod(theirs - mine, self.other - self.size)
        return None if rest else (q, mine - q * self.size)

    def fits(self, mine: Any, theirs: Any) -> bool:
        """Whether every difference of two argument trees is one of integers on a line."""
        if isinstance(mine, fx.Node):
            return self.twin.get(mine) is theirs
        if isinstance(mine, (list, tuple)):
            return (
                isinstance(theirs, (list, tuple))
                and len(mine) == len(theirs)
                and all(self.fits(a, b) for a, b in zip(mine, theirs, strict=True))
            )
        if isinstance(mine, dict):
            return mine.keys() == theirs.keys() and all(
                self.fits(value, theirs[key]) for key, value in mine.items()
            )
        if mine == theirs:
            return True
        integers = type(mine) is int and type(theirs) is int
        return integers and self.of(mine, theirs) is not None

    def merged(self, mine: Any, theirs: Any, write: Callable[[int, int], fx.Node]) -> Any:
        """The argument tree with what differs written as q·B + r."""
        if isinstance(mine, (list, tuple)):
            pairs = zip(mine, theirs, strict=True)
            return type(mine)(self.merged(a, b, write) for a, b in pairs)
        if isinstance(mine, dict):
            return {key: self.merged(value, theirs[key], write) for key, value in mine.items()}
        if isinstance(mine, fx.Node) or mine == theirs:
            return mine
        line = self.of(mine, theirs)
        return mine if line is None else write(*line)
