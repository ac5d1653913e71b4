"""Two ONNX files side by side: how many operators and norms each of them runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bnify.exporting.program import NORM_OPERATORS


@dataclass(frozen=True, slots=True)
class OnnxSize:
    """What a file holds.

    Attributes:
        nodes: Operators, those of functions and subgraphs included; constants are none.
        norms: Normalization operators among them.
    """

    nodes: int
    norms: int


@dataclass(frozen=True, slots=True)
class OnnxSizes:
    """Two files.

    Attributes:
        before: The exporter's own optimised file of the original.
        after: The file of the folded model.
    """

    before: OnnxSize
    after: OnnxSize

    def to_dict(self) -> dict[str, Any]:
        """The sizes as JSON-ready data."""
        return asdict(self)


def onnx_size(path: str | Path) -> OnnxSize:
    """Count the operators of an ONNX file; weights beside it are not read."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    types = [
        node.op_type
        for holder in (model.graph, *model.functions)
        for node in _nodes(holder)
        if node.op_type != "Constant"
    ]
    return OnnxSize(len(types), sum(kind in NORM_OPERATORS for kind in types))


def _nodes(holder: Any) -> Iterator[Any]:
    """The nodes of a graph or function, with those of branches and loops."""
    for node in holder.node:
        yield node
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.HasField("g") else []
            for graph in (*inner, *attribute.graphs):
                yield from _nodes(graph)
