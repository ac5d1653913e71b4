"""The recording while it is being folded, with the tensors as they are by now.

Steps collect what they would change in a :class:`~bnify.folding.transaction.Transaction`.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnify import ops
from bnify.capture import Captured, ModuleCall, copied, tensor_at
from bnify.changes import Change, Changes
from bnify.double import widened
from bnify.folding.arguments import place_of, rerun
from bnify.folding.layers import Layer, read_layer
from bnify.folding.refusal import Refused
from bnify.reason import Reason


class Draft:
    """A recording that is being folded.

    Args:
        captured: The recording; it is not changed.
        as_graph: The result is a graph, which can express what a module tree cannot.

    Attributes:
        graph: A copy of its graph, which is changed.
        changes: What the model's tensors and tree become.
        origin: Node of the recording that each node of ``graph`` is a copy of.
    """

    def __init__(self, captured: Captured, *, as_graph: bool = False) -> None:
        self.captured = captured
        self.as_graph = as_graph
        self.graph, twin = copied(captured.graph)
        self.twin = twin
        self.changes = Changes()
        self._evaluated: dict[fx.Node, Tensor] = {}
        self._layers: dict[fx.Node, Layer | None] = {}
        self._modules = dict(captured.model.named_modules(remove_duplicate=False))
        self._attributes: dict[str, fx.Node] = {}
        self.static: set[fx.Node] = set()
        self.order: dict[fx.Node, int] = {}
        for index, node in enumerate(self.graph.nodes):
            self.order[node] = index
            if node.op == "get_attr":
                self._attributes[str(node.target)] = node
            if node.op == "get_attr" or (
                node.op == "call_function"
                and "number" not in node.meta
                and not _is_random(node)
                and all(s in self.static or "number" in s.meta for s in ops.sources(node))
                and not node.meta.get("writes")
            ):
                self.static.add(node)
        self.overwritten = {
            written.meta.get("alias")
            for node in self.graph.nodes
            for written in node.meta.get("writes", ())
        }
        self.kept = {twin[node]: name for node, name in captured.kept.items() if node in twin}
        self.escaped = {twin[e.node] for e in captured.escapes if e.node in twin}
        self._sharing = _sharing(captured)
        self._stored = _stored(captured.model)
        self._groups: dict[Any, list[fx.Node]] = {}
        for node in self.order:
            self._groups.setdefault(node.meta.get("alias"), []).append(node)
        self._dropped: dict[fx.Node, fx.Node] = {}
        self.gone: set[fx.Node] = set()
        #: Calls of a shared layer that have weights of their own.
        self.untied: set[fx.Node] = set()
        #: Values that the model still gives to a norm which does nothing: their shape must stay.
        self.pinned: set[fx.Node] = set()
        #: Values that the model copies (``x + 0``) before anybody writes to them.
        self.copied: set[fx.Node] = set()
        self._inside: dict[tuple[str, int], list[fx.Node]] = {}
        self._foreign: set[Any] = set()
        for node in self.graph.nodes:
            if node.op == "call_function":
                where = (node.meta.get("module", ""), node.meta.get("call", 0))
                self._inside.setdefault(where, []).append(node)
            elif node.op in ("placeholder", "get_attr"):
                self._foreign.add(node.meta.get("alias"))
        self._calls: dict[str, list[ModuleCall]] = {}
        for call in captured.calls:
            self._calls.setdefault(call.path, []).append(call)

    # -- tensors ---------------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model or a constant, as the user has it."""
        if name in self.captured.constants:
            return self.captured.constants[name]
        return tensor_at(self.captured.model, name)

    def value(self, node: fx.Node) -> Tensor:
        """What a static node is by now: float64 where it is floating-point, on the CPU."""
        if node in self._evaluated:
            return self._evaluated[node]
        if node.op == "get_attr":
            name = str(node.target)
            if name in self.changes.values:
                result: Any = self.changes.values[name]
            else:
                result = self.tensor(name).detach()
                if name in self.changes.weights:
                    result = self.changes.weights[name].of(result)
                result = result.cpu()
                if result.is_floating_point():
                    result = result.double()
        else:
            result = rerun(_wide(node), self.value)
        self._evaluated[node] = result
        return self._evaluated[node]

    def constant(self, operand: Any) -> Tensor:
        """A number or a static operand, float64.

        Raises:
            Refused: It is one element of a larger table, and at another size perhaps more.
        """
        if not isinstance(operand, fx.Node):
            return torch.as_tensor(operand, dtype=torch.float64)
        value = self.value(operand).double()
        if value.numel() == 1 and operand.op == "call_function":
            source = ops.first(operand)
            while source is not None and source.op == "call_function":
                source = ops.first(source)
            if source is not None and prod(source.meta.get("shape") or ()) > 1:
                raise Refused(
                    Reason.NO_ABSORBER, f"{place_of(operand)} is one element of a larger tensor"
                )
        return value

    def reads_alone(self, node: fx.Node) -> bool:
        """Whether an operator reads one value, and otherwise what does not depend on the input."""
        return all(s in self.static or "number" in s.meta for s in ops.sources(node)[1:])

    def weight(self, layer: Layer) -> Tensor:
        """The weight of a layer by now, on its own device."""
        if layer.name is None or layer.name in self.changes.values:
            return self.value(layer.weight)
        weight = self.tensor(layer.name).detach()
        pending = self.changes.weights.get(layer.name)
        return weight if pending is None else pending.of(weight)

    def module(self, path: str) -> nn.Module | None:
        """The module at a path of the model."""
        return self._modules.get(path)

    def layer(self, node: fx.Node) -> Layer | None:
        """The node as something that can take an affine map, if it is that."""
        if node not in self._layers:
            self._layers[node] = read_layer(self, node)
        return self._layers[node]

    def attribute(self, name: str, like: fx.Node, shape: tuple[int, ...]) -> fx.Node:
        """The node of a tensor that the fold adds to the model."""
        if name not in self._attributes:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                node = self.graph.create_node("get_attr", name, (), {})
            node.meta.update(
                shape=shape, dtype=like.meta.get("dtype"), module="", writes=(), alias=-1
            )
            self._attributes[name] = node
            self.static.add(node)
            self.order[node] = -1
        return self._attributes[name]

    # -- who reads what --------------------------------------------------------------------------

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Who reads a value; a node that only asks for its shape does not, nor one that is gone."""
        return [u for u in node.users if "number" not in u.meta and u not in self.gone]

    def check_memory(self, value: fx.Node) -> None:
        """Refuse a value that changes behind the graph's back, or is seen beside it.

        Raises:
            Refused: It is written to in place, kept by the model, or taken to Python.
        """
        if value.meta.get("alias") in self.overwritten:
            raise Refused(Reason.ANOTHER_CONSUMER, f"{place_of(value)} is written to in place")
        if value in self.kept:
            raise Refused(
                Reason.ANOTHER_CONSUMER,
                f"the model keeps {place_of(value)} as {self.kept[value]}",
            )
        if value in self.escaped:
            raise Refused(Reason.ANOTHER_CONSUMER, f"{place_of(value)} is taken to Python")

    def check_writable(self, node: fx.Node, allowed: Iterable[fx.Node]) -> str:
        """The name of a tensor that may be given other values.

        Args:
            node: Its ``get_attr``.
            allowed: The operators that may read it.

        Raises:
            Refused: It is no tensor of the model, or others depend on it too.
        """
        name = str(node.target)
        if name in self.captured.constants or name in self.changes.graph_only:
            raise Refused(Reason.NO_ABSORBER, f"{place_of(node)} is a constant")
        if node.meta.get("alias") in self.overwritten:
            raise Refused(Reason.COMPUTED_WEIGHT, f"forward writes to {name}")
        known = name in self._stored or name in self.changes.values
        if not known and not self.as_graph:
            raise Refused(Reason.NO_ABSORBER, f"{name} is in no state dict")
        ours = set(allowed)
        others = [user for user in self.readers(node) if user not in ours]
        if others:
            where = {user.meta.get("module") for user in ours}
            same = all(user.meta.get("module") in where for user in others)
            reason = Reason.SHARED_LAYER if same else Reason.TIED_WEIGHTS
            raise Refused(reason, f"{name} is also read by {place_of(others[0])}")
        tied = self._sharing.get(name, ())
        if tied:
            raise Refused(Reason.TIED_WEIGHTS, f"{name} is also {tied[0]}")
        return name

    def forget_tensors(self, layer: Layer) -> None:
        """Nothing is written to a layer that goes away."""
        for name in (layer.target, None if layer.bias is None else str(layer.bias.target)):
            self.changes.weights.pop(name or "", None)
            self.changes.values.pop(name or "", None)
        gone = {"bias", "bake", "weight"}
        self.changes.tree = [
            c for c in self.changes.tree if c.path != layer.path or c.kind not in gone
        ]

    def resized(self, layer: Layer, shape: tuple[int, ...]) -> None:
        """A layer reads a new weight of this shape, under the old name."""
        node = self.attribute(f"{layer.target}", layer.weight, shape)
        node.meta["shape"] = shape
        if layer.weight is not node:
            layer.node.replace_input_with(layer.weight, node)
            path, _, leaf = layer.target.rpartition(".")
            change = Change(kind="bake", path=path, names=(leaf,))
            if layer.baked and change not in self.changes.tree:
                self.changes.tree.append(change)

    def drop(self, node: fx.Node, kept: fx.Node) -> None:
        """Let everybody read ``kept`` where they read ``node``."""
        kept = self.current(kept)
        node.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)
        self._dropped[node] = kept
        self.gone.add(node)
        if node in self.pinned:
            self.pinned.add(kept)

    def now(self, recorded: fx.Node) -> fx.Node:
        """The node that a node of the recording is by now."""
        return self.current(self.twin[recorded])

    def current(self, node: fx.Node) -> fx.Node:
        """What is read by now where a node was read."""
        while node in self._dropped:
            node = self._dropped[node]
        return node

    def inside(self, path: str, call: int) -> list[fx.Node]:
        """The operators that ran in one call of a module, those of its children left out."""
        return self._inside.get((path, call), [])

    def is_seen_elsewhere(self, value: fx.Node, steps: Iterable[fx.Node]) -> bool:
        """Whether others than these operators read the memory of a value, or write to it."""
        own = set(self._groups.get(value.meta.get("alias"), (value,)))
        beside = set(steps) | own
        return any(
            node.meta.get("overwritten") or any(r not in beside for r in self.readers(node))
            for node in own
        )

    def is_foreign(self, node: fx.Node) -> bool:
        """Whether a value shares its memory with an input or a tensor of the model."""
        return node.meta.get("alias") in self._foreign

    def calls(self, path: str) -> list[ModuleCall]:
        """The calls of a module, in order."""
        return self._calls.get(path, [])

    def call_at(self, path: str, number: int) -> ModuleCall | None:
        """One call of a module."""
        return next((call for call in self.calls(path) if call.number == number), None)

    def calls_of(self, path: str) -> int:
        """How often a module is called."""
        return len(self.calls(path))

    def forget(self) -> None:
        """Values and layers are read anew after a change."""
        self._evaluated.clear()
        self._layers.clear()


def _is_random(node: fx.Node) -> bool:
    """Whether an operator draws numbers, or leaves memory as it is."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or ops.name_of(node).startswith("empty")


def _wide(node: fx.Node) -> fx.Node:
    """The node, with casts to other floating-point types as casts to float64, on the CPU."""
    changed = {k: widened(v) for k, v in node.kwargs.items() if k != "device"}
    args = tuple(
        widened(a) if not isinstance(a, torch.device) else torch.device("cpu") for a in node.args
    )
    if changed == dict(node.kwargs) and args == tuple(node.args):
        return node
    twin = object.__new__(_Call)
    twin.target, twin.args, twin.kwargs = node.target, args, changed
    return twin  # type: ignore[return-value]


class _Call:
    """What :func:`rerun` reads of a node."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage may share an element."""

    def extent(tensor: Tensor) -> tuple[int, int]:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        first = int(tensor.storage_offset()) * tensor.element_size()
        last = int(sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()
        return first, first + last

    (start, end), (other_start, other_end) = extent(a), extent(b)
    return start <= other_end and other_start <= end


def _stored(model: nn.Module) -> set[str]:
    """Names of the tensors that a state dict holds: all but buffers that are not persistent."""
    stored = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for path, module in model.named_modules(remove_duplicate=False):
        for name in module._buffers.keys() - module._non_persistent_buffers_set:
            stored.add(f"{path}.{name}" if path else name)
    return stored


def _sharing(captured: Captured) -> dict[str, list[str]]:
    """Other names of a tensor's memory, except those of the same module registered twice."""
    model = captured.model
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    tensors = dict(named)
    memory: dict[int, list[str]] = {}
    for name, tensor in named:
        if tensor.layout == torch.strided:
            memory.setdefault(int(tensor.untyped_storage()._cdata), []).append(name)
    sharing: dict[str, list[str]] = {}
    for names in memory.values():
        if len(names) < 2:
            continue
        for name in names:
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            others = [
                other
                for other in names
                if other != name
                and _overlap(tensors[name], tensors[other])
                and not (
                    other.rpartition(".")[2] == leaf
                    and model.get_submodule(other.rpartition(".")[0]) is owner
                )
            ]
            if others:
                sharing[name] = others
    return sharing
