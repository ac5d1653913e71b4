"""The graph of an ONNX file as operators and values that know each other.

Bodies of branches and loops are walked, local functions are written out at every call, so that a
rule sees each operator with the tensors that it really gets. Operators come in an order in which
they can run; a file where there is none is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bnify.auditing.onnx_order import graphs_in, in_order
from bnify.auditing.onnx_reading import Tensors, damaged, every_tensor, shown

_STANDARD: Final = frozenset({"", "ai.onnx"})
_MOST_OPERATORS: Final = 200_000
_DEEPEST_FUNCTION: Final = 32
#: Beyond this many operators a constant counts as computed; no exporter comes near.
_DEEPEST_CONSTANT: Final = 64
_RANDOM: Final = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial"}
    | {"Bernoulli", "If", "Loop", "Scan", "Dropout"}
)
#: Operators that read an input for its shape or type alone.
_LIKE: Final = {"Shape": 0, "Size": 0, "CastLike": 1, "ConstantOfShape": -1}
_SCOPES: Final = "pkg.torch.onnx.name_scopes"
_QUOTED: Final = re.compile(r"'((?:[^'\\]|\\.)*)'")

Shape = tuple[int | None, ...]


@dataclass(slots=True, eq=False)
class Value:
    """One tensor that flows.

    Attributes:
        name: As in the file.
        op: What makes it; None for inputs and stored tensors.
        tensor: The stored tensor (a TensorProto); None for all others.
        readers: What reads it, once for each input.
        output: Whether it leaves its graph.
        shape: As the file declares it, None for an open axis; None where it declares none.
        static: Whether it is the same at every call, whatever the inputs are.
        depth: How many operators a static value is away from what is stored.
    """

    name: str
    op: Op | None = None
    tensor: Any = None
    readers: list[Op] = field(default_factory=list)
    output: bool = False
    shape: Shape | None = None
    static: bool = False
    depth: int = 0


@dataclass(slots=True, eq=False)
class Op:
    """One operator.

    Attributes:
        kind: Its type; with its domain where that is not the standard one.
        name: As in the file, inside functions behind the name of the call.
        inputs: What it reads, None where an optional input is left out.
        outputs: What it makes, None where an optional output is left out.
        attributes: Its attributes (AttributeProto) by name.
        scope: Path of the module it comes from; None where the exporter left none.
        body: Number of the graph, or branch or loop body, that it runs in.
        version: Version of the standard operators.
    """

    kind: str
    name: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value | None, ...]
    attributes: Mapping[str, Any]
    scope: str | None
    body: int
    version: int

    def number(self, name: str, default: float) -> float:
        """A float or integer attribute."""
        found = self.attributes.get(name)
        if found is None:
            return default
        return float(found.f) if found.HasField("f") else float(found.i)

    def numbers(self, name: str) -> tuple[int, ...] | None:
        """An attribute of several integers; None where there is none."""
        found = self.attributes.get(name)
        return None if found is None else tuple(found.ints)

    def input(self, index: int) -> Value | None:
        """An input, None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    @property
    def result(self) -> Value | None:
        """Its first output."""
        return self.outputs[0] if self.outputs else None


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A file as operators.

    Attributes:
        path: The file.
        ops: Every operator, in an order in which they can run.
        tensors: Decodes stored tensors.
        version: Version of the standard operators.
    """

    path: Path
    ops: tuple[Op, ...]
    tensors: Tensors
    version: int


def graph_of(path: Path, model: Any) -> Graph:
    """Link the operators of a file.

    Args:
        path: The file.
        model: The ModelProto in it.

    Raises:
        WeightsError: It is damaged: something is read that nothing makes, there is a circle, a
            function calls itself, a tensor claims more than there is.
    """
    tensors = Tensors(path)
    for tensor in every_tensor(model):
        tensors.check(tensor)
    version = next((o.version for o in model.opset_import if o.domain in _STANDARD), 1)
    linker = _Linker(path, model, version)
    linker.graph(model.graph, {}, {}, "")
    return Graph(path, tuple(linker.ops), tensors, version)


class _Linker:
    def __init__(self, path: Path, model: Any, version: int) -> None:
        self.path = path
        self.version = version
        self.ops: list[Op] = []
        self.bodies = self.written = 0
        self.functions = {
            (f.domain, f.name): f for f in model.functions if f.domain not in _STANDARD
        }

    def graph(self, graph: Any, around: Mapping[str, Value], bound: Mapping[str, Any],
              prefix: str) -> None:  # fmt: skip
        """One graph: the main one, a branch or the body of a loop."""
        self.bodies += 1
        scope = dict(around)
        for value in graph.input:
            scope[value.name] = Value(value.name, shape=_shape(value))
        for tensor in graph.initializer:
            scope[tensor.name] = Value(
                tensor.name, tensor=tensor, shape=tuple(tensor.dims), static=True
            )
        for sparse in graph.sparse_initializer:
            scope[sparse.values.name] = Value(sparse.values.name, static=True)
        shapes = {value.name: _shape(value) for value in (*graph.value_info, *graph.output)}
        self._nodes(graph.node, scope, shapes, bound, prefix, self.bodies, 0)
        for value in graph.output:
            if value.name not in scope:
                raise damaged(self.path, f"nothing makes its output {shown(value.name)!r}")
            scope[value.name].output = True

    def _nodes(
        self,
        nodes: Sequence[Any],
        scope: dict[str, Value],
        shapes: Mapping[str, Shape | None],
        bound: Mapping[str, Any],
        prefix: str,
        body: int,
        depth: int,
    ) -> None:
        for node in in_order(self.path, nodes, scope):
            function = self.functions.get((node.domain, node.op_type))
            if function is not None:
                self._call(node, function, scope, bound, prefix, body, depth + 1)
                continue
            attributes = dict(_attributes(node, bound))
            for graph in graphs_in(attributes.values()):
                self.graph(graph, scope, bound, prefix)
            self._op(node, attributes, scope, shapes, prefix, body)

    def _op(
        self,
        node: Any,
        attributes: dict[str, Any],
        scope: dict[str, Value],
        shapes: Mapping[str, Shape | None],
        prefix: str,
        body: int,
    ) -> None:
        self._count()
        kind = node.op_type if node.domain in _STANDARD else f"{node.domain}::{node.op_type}"
        inputs = tuple(scope[name] if name else None for name in node.input)
        outputs = tuple(
            Value(name, shape=shapes.get(name)) if name else None for name in node.output
        )
        name = f"{prefix}{node.name}" if node.name else ""
        op = Op(kind, name, inputs, outputs, attributes, _scope(node), body, self.version)
        self.ops.append(op)
        reads = [v for i, v in enumerate(inputs) if v is not None and i != _LIKE.get(kind)]
        depth = 1 + max((value.depth for value in reads), default=0)
        static = (
            all(value.static for value in reads)
            and kind not in _RANDOM
            and "::" not in kind
            and depth <= _DEEPEST_CONSTANT
        )
        for value in outputs:
            if value is not None:
                value.op, value.static, value.depth = op, static, depth if static else 0
                scope[value.name] = value
        for read in inputs:
            if read is not None:
                read.readers.append(op)
        if kind == "Constant" and "value" in attributes and op.result is not None:
            op.result.tensor = attributes["value"].t

    def _count(self) -> None:
        """Refuse functions that call each other without end, or nearly so.

        Raises:
            WeightsError: There are too many operators and calls.
        """
        self.written += 1
        if self.written > _MOST_OPERATORS:
            raise damaged(self.path, f"its functions come to over {_MOST_OPERATORS} operators", "")

    def _call(
        self,
        node: Any,
        function: Any,
        scope: dict[str, Value],
        bound: Mapping[str, Any],
        prefix: str,
        body: int,
        depth: int,
    ) -> None:
        """A local function, written out with what this call gives it."""
        if depth > _DEEPEST_FUNCTION:
            raise damaged(self.path, f"its function {shown(function.name)!r} calls itself", "")
        self._count()
        given = [scope[name] if name else None for name in node.input]
        inner: dict[str, Value] = {}
        for index, name in enumerate(function.input):
            value = given[index] if index < len(given) else None
            if value is not None:
                inner[name] = value
        attributes = {a.name: a for a in function.attribute_proto}
        attributes |= dict(_attributes(node, bound))
        missing = set(function.input) - set(inner)
        nodes = [_without(n, missing) for n in function.node] if missing else function.node
        within = f"{prefix}{node.name or function.name}/"
        shapes = {value.name: _shape(value) for value in getattr(function, "value_info", ())}
        self._nodes(nodes, inner, shapes, attributes, within, body, depth)
        for index, name in enumerate(node.output):
            formal = function.output[index] if index < len(function.output) else ""
            if name and formal not in inner:
                what = f"nothing makes {shown(name)!r} in function {shown(function.name)!r}"
                raise damaged(self.path, what)
            if name:
                scope[name] = inner[formal]


def _attributes(node: Any, bound: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Attributes; those that a function takes from its call are what the call gives."""
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            yield attribute.name, attribute
        elif attribute.ref_attr_name in bound:
            yield attribute.name, bound[attribute.ref_attr_name]


def _without(node: Any, names: set[str]) -> Any:
    """A node of a function whose optional inputs a call leaves out."""
    copy = type(node)()
    copy.CopyFrom(node)
    for index, name in enumerate(node.input):
        if name in names:
            copy.input[index] = ""
    return copy


def _shape(value: Any) -> Shape | None:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)


def _scope(node: Any) -> str | None:
    """Path of the module that a node comes from, as torch's exporters leave it."""
    for prop in node.metadata_props:
        if prop.key == _SCOPES and len(prop.value) < 10_000:
            parts = _QUOTED.findall(prop.value)
            return parts[-2] if len(parts) > 1 else None
    for prop in node.metadata_props:
        if prop.key == "namespace" and len(prop.value) < 10_000:
            parts = [part.partition(":")[0].strip() for part in prop.value.split("/")]
            return parts[-2] if len(parts) > 1 else None
    return _slashed(node.name, node.op_type)


def _slashed(name: str, kind: str) -> str | None:
    """``/layer1/layer1.0/bn1/BatchNormalization`` is in ``layer1.0.bn1``."""
    parts = name.split("/")
    if len(parts) < 3 or parts[0] or not parts[-1].startswith(kind):
        return None
    path: list[str] = []
    for part in parts[1:-1]:
        if path and part.startswith(f"{path[-1]}."):
            path.pop()
        path.append(part)
    return ".".join(path)
