"""Every Linear and Conv of a model, and where in the recording it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from torch import fx, nn

from bnify import ops
from bnify.capture import Captured, ModuleCall
from bnify.graph import Facts, WeightedOp

LINEAR: Final = (nn.Linear,)
CONVS: Final = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
LAYERS: Final = LINEAR + CONVS


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layer of the model with everything the rules ask about it.

    Attributes:
        layer: Module path (or the weight's name, or a recurrent module's path).
        names: All module paths of the same object.
        module: The layer; None for a weight that no Linear or Conv owns.
        calls: Its calls in eval mode, in order.
        train_calls: Number of its calls in train mode; None without a train recording.
        operators: The weighted operators that read its weight, wherever they run.
        inside: Those of them that run inside the layer's own call.
        weight: Name of the weight.
        tied: Other names of the same weight, or of memory shared with it.
        bias_read: Whether something reads its bias besides the layers that have it as theirs.
    """

    layer: str
    names: tuple[str, ...]
    module: nn.Module | None
    calls: tuple[ModuleCall, ...] = ()
    train_calls: int | None = None
    operators: tuple[WeightedOp, ...] = ()
    inside: tuple[WeightedOp, ...] = ()
    weight: str = ""
    tied: tuple[str, ...] = ()
    bias_read: bool = False

    @property
    def type_name(self) -> str:
        """Class name of the layer, without the prefix of a parametrization."""
        kind = type(self.module)
        if self.module is not None and nn.utils.parametrize.is_parametrized(self.module):
            kind = kind.__bases__[0]
        return kind.__name__ if self.module is not None else "functional"

    @property
    def linear(self) -> bool:
        """Whether the channel axis is the last one."""
        return isinstance(self.module, LINEAR)

    @property
    def value(self) -> fx.Node:
        """The node of what the first call returns."""
        return self.calls[0].outputs[0]

    @property
    def axis(self) -> int:
        """Channel axis of the output."""
        return len(self.value.meta["shape"]) - 1 if self.linear else 1


def candidates(captured: Captured, facts: Facts, train: Captured | None) -> list[Candidate]:
    """Every Linear and Conv, functional ones too, in the order in which they first run."""
    readers = _readers(facts)
    calls: dict[str, list[ModuleCall]] = {}
    for call in captured.calls:
        calls.setdefault(call.path, []).append(call)
    train_calls: dict[str, int] = {}
    for call in train.calls if train is not None else ():
        train_calls[call.path] = train_calls.get(call.path, 0) + 1
    names: dict[int, list[str]] = {}
    modules: dict[str, nn.Module] = {}
    for path, module in captured.model.named_modules(remove_duplicate=False):
        if id(module) not in names:
            modules[path] = module
        names.setdefault(id(module), []).append(path)
    shared = _shared_memory(captured.model)
    read = _read_elsewhere(captured, *([train] if train is not None else []))
    found: list[Candidate] = []
    owned: set[str] = set()
    for path, module in modules.items():
        if not isinstance(module, LAYERS):
            continue
        roots = [f"{path}.{leaf}" if path else leaf for leaf in _weight_leaves(module)]
        own = {alias for r in roots for alias in (r, *captured.aliases.get(r, ()))}
        own |= {_first_name(captured, r) for r in roots}
        operators = tuple(op for name in own for op in readers.get(name, ()))
        inside = tuple(op for op in operators if op.node.meta["module"] == path)
        owned |= own
        own_names = {
            f"{n}.{leaf}" if n else leaf
            for n in names[id(module)]
            for leaf in _weight_leaves(module)
        }
        tied = {a for r in roots for a in captured.aliases.get(_first_name(captured, r), ())}
        tied |= {other for r in roots for other in shared.get(r, ())}
        found.append(
            Candidate(
                layer=path,
                names=tuple(names[id(module)]),
                module=module,
                calls=tuple(calls.get(path, ())),
                train_calls=None if train is None else train_calls.get(path, 0),
                operators=operators,
                inside=inside,
                weight=roots[0],
                tied=tuple(sorted(tied - own_names)),
                bias_read=(f"{path}.bias" if path else "bias") in read,
            )
        )
    found.extend(_functional(captured.model, facts, modules, owned))
    never = len(facts.nodes)
    position = {
        c.layer: min((facts.order[op.node] for op in c.operators), default=never) for c in found
    }
    return sorted(found, key=lambda c: position[c.layer])


def _weight_leaves(module: nn.Module) -> list[str]:
    """Names of the tensors behind ``weight``: itself, or the originals of a parametrization."""
    if "weight" in module._parameters and module._parameters["weight"] is not None:
        return ["weight"]
    originals = [n for n, _ in module.named_parameters() if n.startswith("parametrizations.weight")]
    return originals or [n for n in module._parameters if n.startswith("weight")] or ["weight"]


def _first_name(captured: Captured, name: str) -> str:
    """The name under which the recording knows a tensor with several names."""
    return next((f for f, all_names in captured.aliases.items() if name in all_names), name)


def _readers(facts: Facts) -> dict[str, list[WeightedOp]]:
    """The weighted operators behind each tensor name."""
    readers: dict[str, list[WeightedOp]] = {}
    for op in facts.weighted.values():
        for root in op.roots:
            readers.setdefault(root, []).append(op)
    return readers


def _read_elsewhere(*recordings: Captured) -> set[str]:
    """Names of the tensors that are read by more than the weighted operator of their module."""
    found: set[str] = set()
    for recording in recordings:
        for node in recording.graph.nodes:
            if node.op != "get_attr":
                continue
            name = str(node.target)
            names = {name, *recording.aliases.get(name, ())}
            owners = {one.rpartition(".")[0] for one in names}
            for user in node.users:
                weighted = ops.name_of(user) in ops.WEIGHT_POSITION
                if not weighted or user.meta.get("module") not in owners:
                    found |= names
    return found


def _shared_memory(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each parameter the names of other Parameter objects on the same memory."""
    groups: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(parameter.untyped_storage()._cdata, []).append((name, parameter))
    return {
        name: tuple(other for other, _ in group if other != name)
        for group in groups.values()
        if len(group) > 1
        for name, _ in group
    }


def _functional(
    model: nn.Module, facts: Facts, modules: dict[str, nn.Module], owned: set[str]
) -> Iterator[Candidate]:
    """Weights that no Linear or Conv owns: recurrent modules, and functional calls.

    A fixed filter (a buffer, as in blur pooling) is no layer.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    seen: set[str] = set()
    for op in facts.weighted.values():
        name, root = facts.name[op.node], op.roots[0]
        if root not in parameters or any(r in owned for r in op.roots):
            continue
        owner = root.rpartition(".")[0]
        recurrent = isinstance(modules.get(owner), (nn.RNNBase, nn.RNNCellBase))
        layer = owner if recurrent else root
        if layer in seen or not (recurrent or name.startswith(("linear", "conv", "addmm"))):
            continue
        seen.add(layer)
        module = modules.get(owner) if recurrent else None
        yield Candidate(layer=layer, names=(layer,), module=module, operators=(op,), weight=root)


def activation_call(captured: Captured, facts: Facts, value: fx.Node) -> ModuleCall | None:
    """The call of an activation module that returned this value and did nothing else."""
    path = value.meta["module"]
    if isinstance(captured.model.get_submodule(path), LAYERS):
        return None
    found = [c for c in captured.calls if c.path == path]
    alone = [c for c in found if c.outputs == (value,) and len(c.inputs) == 1]
    own = [n for n in facts.nodes if n.op == "call_function" and n.meta.get("module") == path]
    return alone[0] if len(found) == 1 and alone and own == [value] else None


def effective_rows(candidate: Candidate, example_batch: int, batch_size: int) -> int:
    """Values per channel that a batch norm on this layer sees at the training batch size."""
    shape = candidate.value.meta["shape"]
    total = 1
    for axis, length in enumerate(shape):
        if axis != candidate.axis:
            total *= length
    return total * batch_size // max(example_batch, 1)
