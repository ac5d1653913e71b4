"""Record what a forward pass runs, operator by operator, as a real ``fx.Graph``.

The recorder sits below autograd, where composite operators arrive whole (``aten.linear``,
``aten.batch_norm``) and tensors that the model keeps stay ordinary tensors, which
``inference_mode`` would not give.
"""

from __future__ import annotations

import itertools
import keyword
import re
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.weak import WeakIdKeyDictionary

from bnify.capture.captured import Escape, ModuleCall
from bnify.capture.reading import (
    first_names,
    function_running,
    output_of,
    tensor_names,
    writes_of,
)
from bnify.double import widened
from bnify.errors import CaptureError
from bnify.structure import map_tensors, named_tensors

_SCALARS = {
    "aten::item": "item",
    "aten::_local_scalar_dense": "item",
    "aten::is_nonzero": "branch",
    "aten::equal": "branch",
    "aten::allclose": "branch",
}
#: Fake tensors ask for their device through the dispatcher; profilers mark regions.
_SILENT = frozenset({"prim", "profiler"})


class BorrowedWriteError(CaptureError):
    """An operator would have written to a parameter of the user's."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes every operator that runs under it into ``graph``.

    Args:
        model: The model that will run; its parameters and buffers become ``get_attr`` nodes.
        inputs: The tensors of the call with their names, each a distinct object.
        original: The model that ``model`` is a copy of; reaching for its tensors is an error.
        wide: Record casts to other floating-point types as casts to float64.
        differentiates: Gradients are on outside of what the model itself runs without them.
        borrowed: The parameters are the user's own memory: nobody may write to them.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[tuple[str, Tensor]],
        *,
        original: nn.Module | None = None,
        wide: bool = False,
        differentiates: bool = False,
        borrowed: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._wide = wide
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.calls: list[ModuleCall] = []
        self.escapes: list[Escape] = []
        self.unreplayable = ""
        self.custom_gradients = False
        self._differentiates = differentiates
        self._nodes: MutableMapping[Tensor, fx.Node] = WeakIdKeyDictionary()
        self._paths: dict[int, str] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), path)
        self.names, self._owned = tensor_names(model)
        self._memories: dict[int, StorageWeakRef] = {}
        self._homes = {key: self._memory(tensor) for key, tensor in self._owned.items()}
        self._storages: dict[int, list[Tensor]] = {}
        for key, tensor in self._owned.items():
            self._storages.setdefault(self._homes[key], []).append(tensor)
        self._untouchable = (
            {self._homes[id(p)] for p in model.parameters()} if borrowed else frozenset[int]()
        )
        self._bound: dict[fx.Node, int] = {}
        self._latest: dict[Any, fx.Node] = {}
        self._model = model
        self._original = {} if original is None else first_names(original)
        self._first = {
            (id(module), name): tensor
            for module in model.modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        self._described = {key: (t.shape, t.dtype) for key, t in self._owned.items()}
        self._attributes: dict[str, fx.Node] = {}
        self._stack: list[tuple[str, int, tuple[fx.Node, ...]]] = []
        self._counts: dict[str, int] = {}
        self._groups = 0
        self._storage_groups: dict[int, int] = {}
        self._conjugated: Any = None
        for name, tensor in inputs:
            node = self.graph.placeholder(self._argument(name))
            self._describe(node, tensor, self._new_group())
            self._know(tensor, node)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The wrapper this avoids imports torch._dynamo (a second) to keep a compiler out that
        # never sees this mode: compiled code runs eagerly while recording.
        return False

    # -- operators -------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and write it down."""
        kwargs = kwargs or {}
        if self._wide:
            args = tuple(widened(value) for value in args)
            kwargs = {key: widened(value) for key, value in kwargs.items()}
        if func.namespace in _SILENT:
            return func(*args, **kwargs)
        sources = [t for _, t in named_tensors((args, kwargs))]
        recorded = tuple(map_tensors(self.node_of, tuple(args)))
        options = map_tensors(self.node_of, dict(kwargs))
        groups = {self._memory(t): self._group(t) for t in sources}
        if self._untouchable and func._schema.is_mutable:
            self._check_untouched(func, args, kwargs)
        result = func(*args, **kwargs)
        name = func._schema.name
        if name in _SCALARS:
            self._escape(_SCALARS[name], sources)
            return result
        if name == "aten::resolve_conj":
            self._conjugated = sources[0]
        elif name == "aten::resolve_neg" and sources and sources[0] is self._conjugated:
            # tolist() and numpy() leave this pair and nothing else.
            self._escape("numpy", sources)
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            self.unreplayable = f"{name} takes a torch.Generator, which a graph cannot hold"
            recorded = tuple(None if isinstance(a, torch.Generator) else a for a in recorded)
            options = {k: v for k, v in options.items() if not isinstance(v, torch.Generator)}
        node = self.graph.call_function(func, recorded, options)
        node.meta["module"], node.meta["call"] = self._where()
        node.meta["writes"] = writes_of(func, recorded, options)
        if self._differentiates and not torch.is_grad_enabled():
            self._without_gradient(node)
        self._bind(node, result, groups)
        return result

    def _check_untouched(self, func: Any, args: Any, kwargs: Any) -> None:
        written: Any = writes_of(func, args, kwargs, Tensor)
        if any(self._memory(tensor) in self._untouchable for tensor in written):
            raise BorrowedWriteError(f"forward() writes to a parameter ({func._schema.name})")

    def _without_gradient(self, node: fx.Node) -> None:
        """Note an operator under ``no_grad``, or in the forward of an ``autograd.Function``."""
        function = function_running()
        if function is None:
            node.meta["grad"] = False
        elif function is not CheckpointFunction:  # whose gradients are those of its operators
            self.custom_gradients = True

    def _bind(self, node: fx.Node, result: Any, groups: dict[int, int]) -> None:
        """Let the tensors of a result be known by their nodes from now on."""
        if isinstance(result, Tensor):
            group = groups.get(self._memory(result))
            self._describe(node, result, self._new_group() if group is None else group)
            self._know(result, node)
        elif isinstance(result, (list, tuple)):
            node.meta["shape"] = None
            for index, item in enumerate(result):
                if isinstance(item, (Tensor, list, tuple)):
                    element = self.graph.call_function(getitem, (node, index))
                    element.meta.update(module=node.meta["module"], call=node.meta["call"])
                    element.meta["writes"] = ()
                    if "grad" in node.meta:
                        element.meta["grad"] = False
                    self._bind(element, item, groups)

    def _describe(self, node: fx.Node, tensor: Tensor, group: int) -> None:
        node.meta["shape"] = tuple(tensor.shape)
        node.meta["stride"] = tensor.stride() if tensor.layout == torch.strided else None
        node.meta["dtype"] = tensor.dtype
        node.meta["device"] = tensor.device
        node.meta["alias"] = group
        node.meta.setdefault("writes", ())
        node.meta.setdefault("module", "")

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that stands for this tensor: a value, a tensor of the model, or a constant."""
        node = self._value(tensor)
        if node is not None:
            return node
        if id(tensor) in self._original:
            raise CaptureError(
                f"forward() reads {self._original[id(tensor)]} of the model itself, where a copy "
                "of the model runs: a closure, or a forward that was replaced, holds the model",
                hint="use a method of a subclass instead of a function that closes over the model",
            )
        name = f"_const{len(self.constants)}"
        # Now, not at the end: a later operator may write to it.
        self.constants[name] = tensor.detach().clone()
        node = self._attribute(name, tensor, self._group(tensor))
        self._know(tensor, node)
        return node

    def _argument(self, name: str) -> str:
        """A name for an input that the generated code can have as an argument, each but once."""
        name = re.sub(r"\W", "_", name)
        if not name.isidentifier() or keyword.iskeyword(name) or name == "self":
            name = f"_{name}"
        taken = {node.target for node in self.graph.nodes}
        numbers = itertools.count(1)
        unique = name
        while unique in taken:
            unique = f"{name}_{next(numbers)}"
        return unique

    def _memory(self, tensor: Tensor) -> int:
        """A number for the memory of a tensor, never given to another while recording."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have none
            return id(tensor)
        memory = int(storage._cdata)
        if memory not in self._memories:
            # The weak reference frees the memory but keeps its address from being used again.
            self._memories[memory] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return memory

    def _place(self, tensor: Tensor) -> Any:
        """Where in which memory the elements of a tensor are."""
        if tensor.layout != torch.strided:
            return id(tensor)
        where = (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype)
        return (self._memory(tensor), *where, tensor.is_conj(), tensor.is_neg())

    def _know(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[tensor] = node
        self._bound[node] = self._memory(tensor)
        self._latest[self._place(tensor)] = node

    def _value(self, tensor: Tensor) -> fx.Node | None:
        """The node of what is in the memory of a tensor, which ``.data =`` may have exchanged."""
        node = self._nodes.get(tensor)
        if node is not None and self._bound[node] == self._memory(tensor):
            return node
        known = self._owned.get(id(tensor))
        if known is None or self._homes[id(known)] != self._memory(tensor):
            known = self._same_memory(tensor)
        if known is not None:
            return self._owned_node(known)
        return self._latest.get(self._place(tensor))

    def _owned_node(self, known: Tensor) -> fx.Node:
        name = self.names[id(known)][0]
        if name not in self._attributes:
            group = self._storage_groups.setdefault(self._homes[id(known)], self._new_group())
            self._attributes[name] = self._attribute(name, known, group)
        return self._attributes[name]

    def _attribute(self, name: str, tensor: Tensor, group: int) -> fx.Node:
        # fx asks the owning module whether the attribute exists; this graph has none yet.
        node = self.graph.create_node("get_attr", name, (), {})
        self._describe(node, tensor, group)
        return node

    def _same_memory(self, tensor: Tensor) -> Tensor | None:
        """The parameter of which this is ``.data``: another object on the same memory."""
        for known in self._storages.get(self._memory(tensor), ()):
            if (known.shape, known.stride(), known.storage_offset(), known.dtype) == (
                tensor.shape,
                tensor.stride(),
                tensor.storage_offset(),
                tensor.dtype,
            ):
                return known
        return None

    def _group(self, tensor: Tensor) -> int:
        storage = self._memory(tensor)
        if storage in self._storages:  # the model's own memory
            return self._storage_groups.setdefault(storage, self._new_group())
        node = self._value(tensor)
        return self._new_group() if node is None else int(node.meta["alias"])

    def _new_group(self) -> int:
        self._groups += 1
        return self._groups

    def _escape(self, how: str, sources: Sequence[Tensor]) -> None:
        node = next((self._nodes[t] for t in sources if t in self._nodes), None)
        self.escapes.append(Escape(how, self._where()[0], node))

    # -- modules ---------------------------------------------------------------------------------

    def _where(self) -> tuple[str, int]:
        return self._stack[-1][:2] if self._stack else ("", 0)

    def _enter(self, module: nn.Module, args: Any) -> None:
        path = self._paths.get(id(module))
        if path is None:  # made during the forward: its operators belong to its caller
            self._stack.append((*self._where(), ()))
            return
        number = self._counts.get(path, 0)
        self._counts[path] = number + 1
        inputs = tuple(self._nodes[t] for _, t in named_tensors(args) if t in self._nodes)
        self._stack.append((path, number, inputs))

    def _leave(self, module: nn.Module, _args: Any, output: Any) -> None:
        path, number, inputs = self._stack.pop()
        if id(module) in self._paths:
            outputs = tuple(self._nodes[t] for _, t in named_tensors(output) if t in self._nodes)
            self.calls.append(ModuleCall(path, number, inputs, outputs, len(self._stack)))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Follow module calls by global hooks, so that none is put on the model."""
        hooks = (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        )
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def kept(self) -> Iterator[tuple[fx.Node, str]]:
        """Values of this pass that the model keeps, with the attribute it keeps them in."""
        for path, module in self._model.named_modules():
            for name, value in vars(module).items():
                node = self._nodes.get(value) if isinstance(value, Tensor) else None
                if node is not None and node.op == "call_function":
                    yield node, f"{path}.{name}" if path else name

    def finish(self, output: Any) -> None:
        """Write the model's return value as the graph's output."""
        value = output_of(output, self.node_of)
        self._write_back(value)
        self.graph.output(value)

    def _write_back(self, output: Any) -> None:
        """Write what forward put in the place of parameters and buffers back to them.

        ``self.average = 0.9 * self.average + ...`` and ``p.data = ...`` are no operators, but the
        next call reads what they left.
        """
        returned: set[int] = set()
        fx.map_arg(output, lambda node: returned.add(node.meta["alias"]))
        writes: list[tuple[fx.Node, fx.Node, str]] = []
        for module in self._model.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                first = self._first.get((id(module), name))
                if first is None or tensor is None:
                    continue
                if tensor is first and self._homes[id(first)] == self._memory(tensor):
                    continue
                if self._described.get(id(first)) != (tensor.shape, tensor.dtype):
                    continue
                target = self._owned_node(first)
                if target.meta["alias"] in returned:
                    continue  # the value before the call is returned, and must stay
                value = self.node_of(tensor)
                if value.op == "get_attr":  # two buffers may change places
                    copied = self.graph.call_function(torch.ops.aten.clone.default, (value,))
                    copied.meta.update(value.meta, alias=self._new_group())
                    value = copied
                writes.append((target, value, self._paths.get(id(module), "")))
        for target, value, path in writes:
            copy = self.graph.call_function(torch.ops.aten.copy_.default, (target, value))
            copy.meta.update(target.meta, writes=(target,), module=path, call=0)
