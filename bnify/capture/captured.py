"""What one recorded forward pass is: an executable fx graph and the facts beside it."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnify.errors import CaptureError
from bnify.structure import Call, run_graph


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of one module.

    Attributes:
        path: Module path, the first where a module has several.
        number: 0 for the first call of this module, 1 for the second, ...
        inputs: Nodes of the tensors passed to it.
        outputs: Nodes of the tensors its ``forward`` returned, before any user hook.
        depth: Number of calls it is nested in.
    """

    path: str
    number: int
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    depth: int


@dataclass(frozen=True, slots=True)
class Escape:
    """A value that left for Python and is baked into the recording.

    Attributes:
        how: ``"item"``, ``"branch"`` or ``"numpy"``.
        module: Path of the module that did it.
        node: The node whose value escaped; None for a parameter or constant.
    """

    how: str
    module: str
    node: fx.Node | None


@dataclass(slots=True)
class Captured:
    """A recorded forward pass.

    The graph's placeholders are the tensors of the call, flat and in order; parameters, buffers
    and constants are ``get_attr`` nodes by fully qualified name; the output has the structure of
    the model's return value (dataclasses as dicts). Node meta holds ``shape``, ``dtype``,
    ``device``, ``module`` (innermost path), ``call`` (its call number), ``alias`` (a number that
    values sharing memory have in common), ``writes`` (nodes written in place).

    Attributes:
        model: The model as the user gave it, untouched.
        call: The inputs of the recorded pass.
        train: Whether the pass ran in train mode.
        graph: The recording.
        constants: Values of the ``get_attr`` nodes that are no tensor of the model.
        calls: Every module call in the order of their ends.
        aliases: All names of each tensor that has several, by its first name.
        escapes: Values that left for Python.
        unreplayable: Why the graph cannot be run again; empty when it can.
        custom_gradients: Whether an ``autograd.Function`` ran, whose gradients a replay, which
            differentiates its operators, need not have.
        composite: Whether composite operators arrived whole (recorded below autograd).
        casts: Whether the pass names a floating-point dtype: a float64 copy needs care.
        kept: Values of the pass that the model keeps in an attribute, and its name.
        outputs: The tensors that the recorded pass returned.
        notes: What a recording cannot know, in sentences.
    """

    model: nn.Module
    call: Call
    train: bool
    graph: fx.Graph
    constants: dict[str, Tensor]
    calls: tuple[ModuleCall, ...]
    aliases: Mapping[str, tuple[str, ...]]
    escapes: tuple[Escape, ...] = ()
    unreplayable: str = ""
    composite: bool = True
    custom_gradients: bool = False
    casts: bool = True
    kept: Mapping[fx.Node, str] = field(default_factory=dict)
    outputs: tuple[Tensor, ...] = ()
    notes: list[str] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor the graph reads, by name; the model's own, not copies."""
        return {
            name: self.constants[name] if name in self.constants else tensor_at(self.model, name)
            for node in self.graph.nodes
            if node.op == "get_attr"
            for name in (str(node.target),)
        }

    def module(
        self, graph: fx.Graph | None = None, extra: Any = None, *, own: bool = True
    ) -> fx.GraphModule:
        """A GraphModule of the recording (or of a rewritten graph) on its own copies.

        Args:
            graph: The graph to build; the recording itself when None.
            extra: Tensors by name that a rewritten graph reads and the recording does not.
            own: Copy the tensors; else the module reads those that there are.

        Raises:
            CaptureError: The recording cannot be run again.
        """
        if self.unreplayable:
            raise CaptureError(f"the recording cannot be run again: {self.unreplayable}")
        graph, _ = copied(graph if graph is not None else self.graph)
        extra = extra or {}
        sources: dict[str, Tensor] = {}
        for node in graph.nodes:
            name = str(node.target)
            if node.op == "get_attr":
                node.target = attribute_name(name)
            if node.op == "get_attr" and node.target not in sources:
                if name in extra:
                    source = extra[name]
                elif name in self.constants:
                    source = self.constants[name]
                else:
                    source = tensor_at(self.model, name)
                sources[node.target] = source
        root = _own_copies(sources) if own else sources
        module = fx.GraphModule(root, graph, class_name=type(self.model).__name__)
        module.meta["custom_gradients"] = self.custom_gradients
        return module

    def replay(self, call: Call | None = None) -> list[Tensor]:
        """Run the recording on its own inputs or on others of the same shapes."""
        return run_graph(self.module(), call or self.call)


def copied(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph, which no GraphModule owns yet, and the copy of each of its nodes."""
    copy = fx.Graph()
    twin: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        twin[node] = copy.node_copy(node, lambda source: twin[source])
    return copy, twin


def attribute_name(name: str) -> str:
    """Where a GraphModule keeps the tensor of this name.

    A model may have children called ``code`` or ``graph``, which a GraphModule has itself; and
    then others called ``code_``, which make room in turn.
    """
    head, *rest = name.split(".")
    taken = head in _TAKEN or head.rstrip("_") in _TAKEN
    parts = [f"{head}_" if taken else head, *rest]
    # Keys of a ModuleDict may be words of Python, which the generated code would write as such.
    return ".".join(f"{p}_" if keyword.iskeyword(p.rstrip("_")) else p for p in parts)


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """The parameter, buffer or tensor attribute with this fully qualified name."""
    path, _, leaf = name.rpartition(".")
    value: Tensor = getattr(model.get_submodule(path), leaf)
    return value


def _own_copies(sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors; those that share memory share it again, for one may be written to."""
    sharing: dict[int, list[str]] = {}
    for name, tensor in sources.items():
        if tensor.layout == torch.strided:
            sharing.setdefault(int(tensor.untyped_storage()._cdata), []).append(name)
    memory: dict[str, Any] = {}
    for names in sharing.values():
        if len(names) > 1:
            storage: Any = sources[names[0]].untyped_storage()
            memory |= dict.fromkeys(names, storage.clone())
    copies: dict[str, Tensor] = {}
    for name, tensor in sources.items():
        if name in memory:
            own = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            own.set_(memory[name], tensor.storage_offset(), tensor.shape, tensor.stride())
        else:
            own = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            own = nn.Parameter(own, requires_grad=tensor.requires_grad)
        copies[name] = own
    return copies


#: What a GraphModule, class and instance, has itself.
_TAKEN = frozenset(dir(fx.GraphModule({}, fx.Graph())))
