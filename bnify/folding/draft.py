"""The recording while it is being folded, with the tensors as they are by now.

Steps collect what they would change in a :class:`Transaction`; nothing happens before all of it
is known to be possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnify import ops
from bnify.algebra import Affine, identity_kernel, scaled
from bnify.capture import Captured, ModuleCall, copied, tensor_at
from bnify.changes import Change, Changes, Scaled
from bnify.double import widened
from bnify.folding.arguments import place_of, rerun
from bnify.folding.layers import Layer, check_bake, read_layer
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
        self._evaluated: dict[fx.Node, Any] = {}
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
                and all(s in self.static for s in ops.sources(node))
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
        self._dropped: dict[fx.Node, fx.Node] = {}
        self.gone: set[fx.Node] = set()
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
            found: Tensor = self._evaluated[node]
            return found
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
        return result

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
        if name in self.captured.constants:
            raise Refused(Reason.NO_ABSORBER, f"{place_of(node)} is a constant")
        if node.meta.get("alias") in self.overwritten:
            raise Refused(Reason.COMPUTED_WEIGHT, f"forward writes to {name}")
        others = [user for user in self.readers(node) if user not in set(allowed)]
        if others:
            owner = name.rpartition(".")[0]
            reason = (
                Reason.SHARED_LAYER
                if all(user.meta.get("module") == owner for user in others)
                else Reason.TIED_WEIGHTS
            )
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
        node.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)
        self._dropped[node] = kept
        self.gone.add(node)

    def now(self, recorded: fx.Node) -> fx.Node:
        """The node that a node of the recording is by now."""
        node = self.twin[recorded]
        while node in self._dropped:
            node = self._dropped[node]
        return node

    def inside(self, path: str, call: int) -> list[fx.Node]:
        """The operators that ran in one call of a module, those of its children left out."""
        return self._inside.get((path, call), [])

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


def _wide(node: fx.Node) -> fx.Node:
    """The node, with casts to other floating-point types as casts to float64, on the CPU."""
    changed = {k: widened(v) for k, v in node.kwargs.items() if k != "device"}
    args = tuple(widened(a) if not isinstance(a, torch.device) else torch.device("cpu")
                 for a in node.args)
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


def _sharing(captured: Captured) -> dict[str, list[str]]:
    """Other names of a tensor's memory, except those of the same module registered twice."""
    model = captured.model
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
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
                and not (
                    other.rpartition(".")[2] == leaf
                    and model.get_submodule(other.rpartition(".")[0]) is owner
                )
            ]
            if others:
                sharing[name] = others
    return sharing


# -- one step, all or nothing ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Proposal:
    """What one layer would become.

    Attributes:
        layer: The layer.
        out: Factor of each output channel.
        inp: Factor of each input channel.
        bias: The new bias; None while it is as it was.
        tap: What is added to the weight to pass the layer's own input on, by channel.
        rows: For an embedding, the new table.
    """

    layer: Layer
    out: Tensor | None = None
    inp: Tensor | None = None
    bias: Tensor | None = None
    tap: Tensor | None = None
    table: Tensor | None = None


@dataclass
class Transaction:
    """The changes of one step, before they are made."""

    draft: Draft
    proposals: dict[fx.Node, Proposal] = field(default_factory=dict)
    tensors: dict[fx.Node, tuple[fx.Node, Tensor]] = field(default_factory=dict)
    padding: dict[fx.Node, float] = field(default_factory=dict)
    removals: list[Callable[[], None]] = field(default_factory=list)

    def branch(self) -> Transaction:
        """A copy to try something on."""
        return Transaction(
            self.draft,
            dict(self.proposals),
            dict(self.tensors),
            dict(self.padding),
            list(self.removals),
        )

    def adopt(self, tried: Transaction) -> None:
        """Take over what was tried on a copy."""
        self.proposals, self.tensors = tried.proposals, tried.tensors
        self.padding, self.removals = tried.padding, tried.removals

    def proposal(self, layer: Layer) -> Proposal:
        """What the layer would become by now."""
        return self.proposals.get(layer.node) or Proposal(layer)

    def bias(self, layer: Layer) -> Tensor | None:
        """The layer's bias by now, float64, (output channels,)."""
        proposed = self.proposal(layer).bias
        if proposed is not None:
            return proposed
        return None if layer.bias is None else self.draft.value(layer.bias).reshape(-1)

    def scale_outputs(self, layer: Layer, affine: Affine) -> None:
        """Let the layer give ``scale·y + shift`` for y; exact for every linear layer."""
        was = self.proposal(layer)
        bias = self.bias(layer)
        changed = affine.shift if bias is None else affine.scale * bias + affine.shift
        moves = bias is not None or bool(affine.shift.any())
        self.proposals[layer.node] = replace(
            was,
            out=affine.scale if was.out is None else was.out * affine.scale,
            tap=None if was.tap is None else was.tap * affine.scale,
            bias=changed if moves else was.bias,
        )

    def scale_inputs(self, layer: Layer, affine: Affine, gained: Tensor | None) -> None:
        """Let the layer take x for ``scale·x + shift``; ``gained`` is what the shift amounts to."""
        was = self.proposal(layer)
        bias = self.bias(layer)
        if gained is not None:
            bias = gained if bias is None else bias + gained
        self.proposals[layer.node] = replace(
            was,
            inp=affine.scale if was.inp is None else was.inp * affine.scale,
            tap=None if was.tap is None else was.tap * affine.scale,
            bias=bias if gained is not None else was.bias,
        )

    def add_tap(self, layer: Layer, scale: Tensor) -> None:
        """Let the layer add ``scale·x`` of its own input to its result."""
        was = self.proposal(layer)
        self.proposals[layer.node] = replace(
            was, tap=scale if was.tap is None else was.tap + scale
        )

    def set_table(self, layer: Layer, table: Tensor) -> None:
        """Give an embedding other rows."""
        self.proposals[layer.node] = replace(self.proposal(layer), table=table)

    def set(self, node: fx.Node, reader: fx.Node, value: Tensor) -> None:
        """Give a tensor that ``reader`` reads another value, float64."""
        self.draft.check_writable(node, [reader])
        if node in self.tensors and not torch.equal(self.tensors[node][1], value):
            raise Refused(Reason.SHARED_LAYER, f"{node.target} would need two values")
        self.tensors[node] = (reader, value)

    def effective(self, layer: Layer) -> Tensor:
        """The layer's weight by now, with what is proposed, float64."""
        was = self.proposal(layer)
        weight = self.draft.weight(layer)

        def place(factor: Tensor | None) -> Tensor | None:
            return None if factor is None else factor.to(weight.device)

        result = scaled(weight, layer.kernel, place(was.out), place(was.inp))
        if was.tap is not None:
            result = result + identity_kernel(weight.shape, layer.kernel, place(was.tap))
        return result

    # -- in earnest ------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse the step if a tensor would be changed that others depend on.

        Raises:
            Refused: The first tensor that cannot be written.
        """
        by_weight: dict[fx.Node, list[Proposal]] = {}
        for proposal in self.proposals.values():
            layer = proposal.layer
            by_weight.setdefault(layer.source, []).append(proposal)
            if layer.why_fixed:
                raise Refused(*layer.why_fixed)
            if proposal.bias is not None and layer.bias is None and not layer.takes_bias:
                raise Refused(Reason.NO_ABSORBER, f"{layer.label} can take no bias")
        baked = [p.layer for p in self.proposals.values() if p.layer.baked]
        if baked:
            check_bake(baked)
        by_target: dict[str, list[Proposal]] = {}
        for proposal in self.proposals.values():
            by_target.setdefault(proposal.layer.target, []).append(proposal)
        if any(not _equal(same[0], other) for same in by_target.values() for other in same[1:]):
            label = next(iter(self.proposals.values())).layer.label
            raise Refused(Reason.SHARED_LAYER, f"{label} would need two weights")
        for source, proposals in by_weight.items():
            if source.op == "get_attr" and not proposals[0].layer.baked:
                readers = [step for p in proposals for step in p.layer.steps]
                self.draft.check_writable(source, readers)
        biases: dict[fx.Node, list[Proposal]] = {}
        for proposal in self.proposals.values():
            if proposal.bias is not None and proposal.layer.bias is not None:
                biases.setdefault(proposal.layer.bias, []).append(proposal)
        for node, proposals in biases.items():
            if node.op != "get_attr":
                raise Refused(
                    Reason.COMPUTED_WEIGHT, f"the bias of {proposals[0].layer.label} is computed"
                )
            self.draft.check_writable(node, [p.layer.node for p in proposals])
            if any(not _equal(proposals[0], other) for other in proposals[1:]):
                raise Refused(
                    Reason.SHARED_LAYER, f"{proposals[0].layer.label} would need two biases"
                )

    def commit(self) -> None:
        """Make the changes, in the graph and in what the model's tensors become."""
        draft = self.draft
        done: set[str] = set()
        biased: set[str] = set()
        for proposal in self.proposals.values():
            layer = proposal.layer
            if layer.target not in done:
                done.add(layer.target)
                self._write_weight(proposal)
            if layer.baked:
                self._read_baked(layer)
            if proposal.bias is not None:
                self._write_bias(proposal, biased)
        for node, (_, value) in self.tensors.items():
            draft.changes.values[str(node.target)] = value
        for node, constant in self.padding.items():
            self._write_padding(node, constant)
        for removal in self.removals:
            removal()
        draft.forget()

    def _write_weight(self, proposal: Proposal) -> None:
        layer, changes = proposal.layer, self.draft.changes
        if proposal.table is not None:
            changes.values[str(layer.source.target)] = proposal.table
            return
        if layer.name is None or layer.name in changes.values:  # viewed, baked, merged: as a whole
            changes.values[layer.target] = layer.stored(self.effective(layer))
            return
        if proposal.tap is not None:
            changes.weights[layer.name] = Scaled(layer.kernel, dense=self.effective(layer))
            return
        pending = changes.weights.get(layer.name) or Scaled(layer.kernel)
        pending.out = _times(pending.out, proposal.out)
        pending.inp = _times(pending.inp, proposal.inp)
        changes.weights[layer.name] = pending

    def _read_baked(self, layer: Layer) -> None:
        """Let the operator read the baked tensor."""
        draft = self.draft
        node = draft.attribute(layer.target, layer.weight, layer.weight.meta["shape"])
        layer.node.replace_input_with(layer.weight, node)
        path, _, leaf = layer.target.rpartition(".")
        change = Change(kind="bake", path=path, names=(leaf,))
        if change not in draft.changes.tree:
            draft.changes.tree.append(change)

    def _write_bias(self, proposal: Proposal, biased: set[str]) -> None:
        layer, draft = proposal.layer, self.draft
        bias = proposal.bias
        if bias is None:
            return
        if layer.bias is not None:
            name = str(layer.bias.target)
            draft.changes.values[name] = bias.reshape(layer.bias.meta["shape"])
            return
        name = layer.bias_name
        node = draft.attribute(name, layer.weight, (len(bias),))
        layer.set_bias(node)
        draft.changes.values[name] = bias
        if name not in biased:
            biased.add(name)
            change = Change(kind="bias", path=layer.path, shape=(len(bias),))
            if change not in draft.changes.tree:
                draft.changes.tree.append(change)

    def _write_padding(self, node: fx.Node, constant: float) -> None:
        values = list(node.args)
        position = 3 if ops.name_of(node) == "pad" else 2
        while len(values) <= position:
            values.append("constant" if len(values) == 2 and position == 3 else None)
        values[position] = constant
        node.args = tuple(values)
        path = node.meta["module"]
        self.draft.changes.tree.append(
            Change(kind="constant", path=path, values={"value": constant})
        )


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b


def _equal(a: Proposal, b: Proposal) -> bool:
    """Whether two calls of one layer would have it become the same."""
    return all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in (
            (a.out, b.out),
            (a.inp, b.inp),
            (a.bias, b.bias),
            (a.tap, b.tap),
            (a.table, b.table),
        )
    )
