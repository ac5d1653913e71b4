"""REWRITE of the module tree for a fold: other weights, and something plain where norms were."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from bnify.borrow import copy_model, own_generated_class
from bnify.capture import Captured, tensor_at
from bnify.changes import Change, Changes
from bnify.errors import PlanError, SpecError
from bnify.frozen import keep_in_eval


def fold_tree(model: nn.Module, changes: Changes, *, shared: bool = False) -> nn.Module:
    """Make the changes of a fold on a model, in place; it ends in eval mode.

    Args:
        model: The model, or a copy.
        changes: What to change.
        shared: The memory of the parameters belongs to another model, and is not written to.
    """
    restructure(model, changes.tree)
    with torch.no_grad():
        for name, pending in changes.weights.items():
            tensor = tensor_at(model, name)
            if shared or not pending.scale_in_place(tensor):
                _write(tensor, pending.of(tensor), shared=shared)
        for name, value in changes.values.items():
            if name not in changes.graph_only:
                _write(tensor_at(model, name), value, shared=shared)
    return model.eval()


def folded_copy(model: nn.Module, changes: Changes) -> nn.Module:
    """A folded copy of a model; weights that are scaled are not copied before."""
    replaced: dict[int, Any] = {}
    rest = dict(changes.weights)
    for name, pending in changes.weights.items():
        weight = tensor_at(model, name)
        if type(weight) is nn.Parameter:
            scaled = pending.of(weight.detach()).to(weight.dtype)
            replaced[id(weight)] = nn.Parameter(scaled, requires_grad=weight.requires_grad)
            del rest[name]
    return fold_tree(copy_model(model, replaced), replace(changes, weights=rest))


def restructure(model: nn.Module, tree: Iterable[Change]) -> nn.Module:
    """Make the structural changes of a fold, in place; tensors that are new hold zeros.

    Raises:
        SpecError: The model has no such module: it is not the one that was folded.
    """
    # Looked for once: thousands of norms may go.
    places = _places(model)
    for change in tree:
        try:
            if change.kind in _REPLACEMENTS:
                old = model.get_submodule(change.path)
                _replace(model, old, _REPLACEMENTS[change.kind](model, old, change), places)
            else:
                _CHANGES[change.kind](model, change)
            if change.kind == "clone":
                places = _places(model)
        except (AttributeError, KeyError) as error:
            raise SpecError(
                f"the change {change.kind!r} of {change.path or 'the root'} does not fit: {error}",
                hint="pass the model that was folded",
            ) from error
    return model


def folded_module(
    captured: Captured,
    graph: fx.Graph,
    changes: Changes,
    model: nn.Module | None = None,
    *,
    own: bool = True,
    originals: Mapping[str, Tensor] | None = None,
) -> fx.GraphModule:
    """The folded recording as a GraphModule.

    Args:
        captured: The recording that was folded.
        graph: The folded graph.
        changes: What its tensors become.
        model: The folded model, whose tensors are taken where it has them.
        own: Copy the tensors.
        originals: The model's tensors as they were, where it has been folded in place.
    """
    tensors: dict[str, Tensor] = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op != "get_attr" or name in tensors:
            continue
        found = None if model is None else _tensor_or_none(model, name)
        if found is None and originals is not None and name not in changes.values:
            found = originals.get(name)
        tensors[name] = found if found is not None else _folded(captured, changes, node, name)
    module = captured.module(graph, extra=tensors, own=own)
    module.graph.lint()
    return module.eval()


def _folded(captured: Captured, changes: Changes, node: fx.Node, name: str) -> Tensor:
    if name in captured.constants:
        return captured.constants[name].clone()
    if name in changes.values:
        old = _tensor_or_none(captured.model, name)
        like = next(captured.model.parameters(), None) if old is None else old
        dtype = node.meta.get("dtype") if old is None else old.dtype
        value = changes.values[name].to(dtype=dtype)
        value = value if like is None else value.to(like.device)
        added = old is None and name.endswith("bias")
        return _like_original(value, nn.Parameter(value) if added else old)
    tensor = tensor_at(captured.model, name)
    if name in changes.weights:
        return _like_original(changes.weights[name].of(tensor.detach()).to(tensor.dtype), tensor)
    return tensor


def _like_original(value: Tensor, original: Tensor | None) -> Tensor:
    """A parameter where the original is one."""
    if isinstance(original, nn.Parameter):
        return nn.Parameter(value, requires_grad=original.requires_grad)
    return value


def _tensor_or_none(model: nn.Module, name: str) -> Tensor | None:
    try:
        found: Any = tensor_at(model, name)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def _write(tensor: Tensor, value: Tensor, *, shared: bool) -> None:
    """Give a tensor of the model other values."""
    if shared or torch._debug_has_internal_overlap(tensor) == 1:
        tensor.data = value.to(device=tensor.device, dtype=tensor.dtype)
    else:
        tensor.copy_(value)


# -- changes of the tree ---------------------------------------------------------------------------


def _places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All paths of each module."""
    places: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(path)
    return places


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def _replace(
    model: nn.Module,
    old: nn.Module,
    replacement: nn.Module,
    places: dict[nn.Module, list[str]],
) -> None:
    """Put a module where another is, everywhere it is registered; its hooks move along."""
    if old is model:
        raise PlanError("the root itself cannot be replaced", hint="use emit='graph'")
    for name in _HOOKS:
        getattr(replacement, name).update(getattr(old, name))
    replacement.train(old.training)
    for place in places.get(old, ()):
        parent, _, leaf = place.rpartition(".")
        setattr(model.get_submodule(parent), leaf, replacement)


def _identity(model: nn.Module, old: nn.Module, change: Change) -> nn.Module:
    del model, old, change
    return nn.Identity()


def _children(model: nn.Module, old: nn.Module, change: Change) -> nn.Module:
    """What is left of a norm with an activation: the activation."""
    del model
    children = [(name, old.get_submodule(name)) for name in change.names]
    hooked = any(getattr(old, name) for name in _HOOKS)  # not on what others may share
    if len(children) == 1 and not hooked:
        return children[0][1]
    return nn.Sequential(OrderedDict(children))


def _shift(model: nn.Module, old: nn.Module, change: Change) -> nn.Module:
    return _with_constants(model, old, change, "shift", {"shift": operator.add})


def _affine(model: nn.Module, old: nn.Module, change: Change) -> nn.Module:
    steps = {"scale": operator.mul, "shift": operator.add}
    return _with_constants(model, old, change, "affine", steps)


def _with_constants(
    model: nn.Module, old: nn.Module, change: Change, kind: str, steps: dict[str, Any]
) -> nn.Module:
    """What of a norm stays by channel, and its children."""
    like = _like(model, old)
    dtype = getattr(torch, change.values["dtype"].removeprefix("torch."))
    if like.dtype is torch.float64:
        dtype = torch.float64
    tensors = {n: torch.zeros(change.shape, dtype=dtype, device=like.device) for n in steps}
    first = plain_module(kind.capitalize(), tensors, *steps.values())
    if not change.names:
        return first
    children = [(name, old.get_submodule(name)) for name in change.names]
    return nn.Sequential(OrderedDict([(kind, first), *children]))


def _zero(model: nn.Module, old: nn.Module, change: Change) -> nn.Module:
    del model, old, change
    graph = fx.Graph()
    value = graph.placeholder("x")
    graph.output(graph.call_method("new_zeros", (value, ())))
    return fx.GraphModule({}, graph, class_name="Zero")


def plain_module(kind: str, tensors: dict[str, Tensor], *steps: Any) -> fx.GraphModule:
    """A module of torch alone that combines its input with one buffer after the other."""
    root = nn.Module()
    graph = fx.Graph()
    value = graph.placeholder("x")
    for (name, tensor), step in zip(tensors.items(), steps, strict=True):
        root.register_buffer(name, tensor)
        value = graph.call_function(step, (value, graph.create_node("get_attr", name, (), {})))
    graph.output(value)
    return fx.GraphModule(root, graph, class_name=kind)


def _like(model: nn.Module, module: nn.Module) -> Tensor:
    """A floating-point tensor of a module, else of the model, for device and dtype."""
    for tensor in (*module.parameters(), *module.buffers(), *model.parameters()):
        if tensor.is_floating_point():
            return tensor
    return torch.zeros(())


def _bias(model: nn.Module, change: Change) -> None:
    module = model.get_submodule(change.path)
    weight: Tensor = module.weight  # type: ignore[assignment]
    empty = torch.zeros(change.shape, dtype=weight.dtype, device=weight.device)
    module.register_parameter("bias", nn.Parameter(empty, requires_grad=weight.requires_grad))


def _bake(model: nn.Module, change: Change) -> None:
    """Make computed weights plain: a parametrization's, or those of the older hooks."""
    module = model.get_submodule(change.path)
    for name in change.names:
        if parametrize.is_parametrized(module, name):
            # Removal edits the generated class, which deepcopy shares between models.
            own_generated_class(module, type(module).__bases__[0])
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            continue
        for number, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "name", None) == name and hasattr(hook, "remove"):
                hook.remove(module)
                del module._forward_pre_hooks[number]
        for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
            for number, hook in list(hooks.items()):
                inner = getattr(hook, "hook", hook)
                if type(inner).__name__.startswith("SpectralNorm"):
                    del hooks[number]


def _none(model: nn.Module, change: Change) -> None:
    module = model.get_submodule(change.path)
    for name in change.names:
        setattr(module, name, None)


def _constant(model: nn.Module, change: Change) -> None:
    module: Any = model.get_submodule(change.path)
    module.value = change.values["value"]


def _weight(model: nn.Module, change: Change) -> None:
    """A weight of another shape, and the attributes that go with it."""
    module: Any = model.get_submodule(change.path)
    old = module.weight
    empty = torch.zeros(change.shape, dtype=old.dtype, device=old.device)
    module.weight = nn.Parameter(empty, requires_grad=old.requires_grad)
    for name, value in change.values.items():
        setattr(module, name, tuple(value) if isinstance(value, list) else value)
    if isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module.padding, str):
        module._reversed_padding_repeated_twice = [
            size for size in reversed(module.padding) for _ in range(2)
        ]


def _clone(model: nn.Module, change: Change) -> None:
    parent, _, leaf = change.path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, copy_model(model.get_submodule(change.path)))


def _set(model: nn.Module, change: Change) -> None:
    module = model.get_submodule(change.path)
    for name, value in change.values.items():
        setattr(module, name, value)


def _float(model: nn.Module, change: Change) -> None:
    model.get_submodule(change.path).float()


def _keep_in_eval(model: nn.Module, change: Change) -> None:
    keep_in_eval(model.get_submodule(change.path))


_REPLACEMENTS = {
    "identity": _identity,
    "children": _children,
    "shift": _shift,
    "affine": _affine,
    "zero": _zero,
}
_CHANGES = {
    "clone": _clone,
    "bias": _bias,
    "bake": _bake,
    "none": _none,
    "constant": _constant,
    "weight": _weight,
    "set": _set,
    "float": _float,
    "keep-eval": _keep_in_eval,
}
