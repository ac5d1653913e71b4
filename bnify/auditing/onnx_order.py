"""An order in which the nodes of an ONNX graph can run, or why there is none."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bnify.auditing.onnx_reading import damaged, shown


def in_order(path: Path, nodes: Sequence[Any], known: Container[str]) -> list[Any]:
    """The nodes so that each comes after what it reads.

    Args:
        path: The file, for errors.
        nodes: The nodes (NodeProto) of one graph or function.
        known: Names that are there before they run.

    Raises:
        WeightsError: There is a circle, or something is read that nothing makes.
    """
    maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    waits: list[set[int]] = []
    readers: dict[int, list[int]] = {}
    for index, node in enumerate(nodes):
        makers = set()
        for name in _reads(node):
            if name in maker:
                makers.add(maker[name])
            elif name not in known:
                what = f"{_named(node)} reads {shown(name)!r}, which nothing makes"
                raise damaged(path, what)
        waits.append(makers)
        for made in makers:
            readers.setdefault(made, []).append(index)
    if all(max(makers, default=-1) < index for index, makers in enumerate(waits)):
        return list(nodes)
    ready = deque(index for index, makers in enumerate(waits) if not makers)
    order = []
    while ready:
        index = ready.popleft()
        order.append(nodes[index])
        for reader in readers.get(index, ()):
            waits[reader].discard(index)
            if not waits[reader]:
                ready.append(reader)
    if len(order) < len(nodes):
        stuck = next(node for node, makers in zip(nodes, waits, strict=True) if makers)
        raise damaged(path, f"{_named(stuck)} is part of a circle")
    return order


def _named(node: Any) -> str:
    return f"{shown(node.op_type)} {shown(node.name)}".strip()


def graphs_in(attributes: Iterable[Any]) -> Iterator[Any]:
    """Branches and loop bodies among attributes."""
    for attribute in attributes:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _reads(node: Any) -> Iterator[str]:
    """What a node reads, with what its branches and bodies take from around them."""
    yield from (name for name in node.input if name)
    for graph in graphs_in(node.attribute):
        own = {v.name for v in (*graph.input, *graph.initializer)}
        own |= {sparse.values.name for sparse in graph.sparse_initializer}
        own |= {name for inner in graph.node for name in inner.output}
        for inner in graph.node:
            yield from (name for name in _reads(inner) if name not in own)
        yield from (value.name for value in graph.output if value.name not in own)
