"""A symbolic batch for the price of a second recording.

A recording has the batch size baked into shapes (``view``, ``expand``, ``arange``). Two recordings
at batch B₁ and B₂ are walked together; an integer that differs is q·B + r and is written as such.
A third one tells lines from squares and halves, which two points cannot.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bnify.capture.captured import Captured


def make_symbolic(captured: Captured, other: Captured, third: Captured | None = None) -> str | None:
    """Let the graph of ``captured`` run at any batch size, in place.

    Args:
        captured: The recording.
        other: The same model recorded at another batch size.
        third: The same at a third size, to check what the first two say.

    Returns:
        None, or why the batch stays baked in; the graph is unchanged then.
    """
    size, other_size = captured.call.batch, other.call.batch
    if size is None or other_size is None or size == other_size:
        return "the inputs have no batch axis"
    twin: dict[fx.Node, fx.Node] = {}
    third_twin: dict[fx.Node, fx.Node] = {}
    reason = _pair(captured, other, twin)
    if reason is None and third is not None:
        reason = _pair(captured, third, third_twin)
    if reason is not None:
        return reason
    plans: list[tuple[fx.Node, Any, Any]] = []
    for mine, theirs in twin.items():
        if mine.op != "call_function":
            continue
        if third is not None and not _confirmed(mine, theirs, third_twin, captured, other, third):
            return f"{mine.name} depends on the batch in a way that is no q·B + r"
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


def _pair(captured: Captured, other: Captured, twin: dict[fx.Node, fx.Node]) -> str | None:
    """Match two recordings node by node; the reason when they are not the same program."""
    size, other_size = captured.call.batch, other.call.batch
    if len(captured.graph.nodes) != len(other.graph.nodes):
        return f"the model runs other operators at batch {other_size} than at {size}"
    for mine, theirs in zip(captured.graph.nodes, other.graph.nodes, strict=True):
        if (mine.op, mine.target) != (theirs.op, theirs.target):
            return f"{mine.name} differs between batch {size} and {other_size}"
        twin[mine] = theirs
    for name, constant in captured.constants.items():
        theirs_constant = other.constants.get(name)
        if theirs_constant is None or not _equal(constant, theirs_constant):
            return f"a constant of shape {list(constant.shape)} depends on the batch"
    return None


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same shape and values, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _confirmed(
    mine: fx.Node,
    theirs: fx.Node,
    twin: dict[fx.Node, fx.Node],
    captured: Captured,
    other: Captured,
    third: Captured,
) -> bool:
    """Whether the line through two batch sizes gives the arguments at the third."""
    size, other_size, last = captured.call.batch, other.call.batch, third.call.batch
    if size is None or other_size is None or last is None:
        return True
    line = _Line(size, other_size, {})
    for a, b, c in (
        (mine.args, theirs.args, twin[mine].args),
        (mine.kwargs, theirs.kwargs, twin[mine].kwargs),
    ):
        if not _same(line.merged(a, b, lambda q, r: q * last + r), c, twin):
            return False
    return True


def _size_node(captured: Captured) -> fx.Node:
    """The batch size as a node: the length of the first axis of the first input that has one."""
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
    source = next(node for node in placeholders if node.meta["shape"])
    with captured.graph.inserting_after(placeholders[-1]):
        node = captured.graph.call_function(torch.ops.aten.sym_size.int, (source, 0))
    node.meta.update(shape=None, module="", writes=(), number=captured.call.batch)
    return node


def _writer(graph: fx.Graph, batch: fx.Node) -> Callable[[int, int], fx.Node]:
    """Writes q·B + r in front of a node."""

    def write(q: int, r: int) -> fx.Node:
        node = batch
        for function, number, neutral in ((operator.mul, q, 1), (operator.add, r, 0)):
            if number != neutral:
                value = function(node.meta["number"], number)
                node = graph.call_function(function, (node, number))
                node.meta.update(shape=None, module="", writes=(), number=value)
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

    def merged(self, mine: Any, theirs: Any, write: Callable[[int, int], Any]) -> Any:
        """The argument tree with what differs written as q·B + r."""
        if not isinstance(mine, fx.Node) and type(mine) is not type(theirs):
            return mine
        if isinstance(mine, (list, tuple)) and len(mine) != len(theirs):
            return mine
        if isinstance(mine, (list, tuple)):
            pairs = zip(mine, theirs, strict=True)
            return type(mine)(self.merged(a, b, write) for a, b in pairs)
        if isinstance(mine, dict):
            return {key: self.merged(value, theirs[key], write) for key, value in mine.items()}
        if type(mine) is not int or mine == theirs:
            return mine
        line = self.of(mine, theirs)
        return mine if line is None else write(*line)
