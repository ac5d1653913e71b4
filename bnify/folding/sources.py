"""What can be folded: norms with fixed statistics, and other affine maps by channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from bnify import ops
from bnify.algebra import Affine, norm_affine
from bnify.folding.arguments import arguments
from bnify.folding.channels import Flow
from bnify.folding.draft import Draft
from bnify.folding.layers import ancestors
from bnify.reason import Reason

BATCH_NORMS = frozenset(
    {"batch_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit"}
    | {"_native_batch_norm_legit_no_training", "miopen_batch_norm"}
)
_KINDS = {
    "instance_norm": "instance",
    "layer_norm": "layer",
    "native_layer_norm": "layer",
    "group_norm": "group",
    "native_group_norm": "group",
    "rms_norm": "rms",
    "_fused_rms_norm": "rms",
}
_STEPS = frozenset({"mul", "div", "add", "sub"})


@dataclass(slots=True, eq=False)
class Source:
    """One call of one norm, or of another affine map.

    Attributes:
        kind: ``"batch"``, ``"instance"``, ``"frozen"``, ``"affine"``, or the kind of a norm of
            which only the affine tail can go: ``"layer"``, ``"group"``, ``"rms"``.
        result: The node of the normalized value.
        value: The node of what is normalized.
        flow: The affine map, over the normalized value.
        steps: The nodes that go when it is folded.
        layer: The name it has in a plan.
        module: Path of the module that its operators run in.
        call: Which call of that module.
        tensors: Names of its tensors, by their role.
        reason: Why it cannot be folded whatever is around it.
        detail: What makes it so.
    """

    kind: str
    result: fx.Node
    value: fx.Node
    steps: tuple[fx.Node, ...]
    flow: Flow | None = None
    layer: str = ""
    module: str = ""
    call: int = 0
    tensors: dict[str, fx.Node] = field(default_factory=dict)
    reason: Reason | None = None
    detail: str = ""

    @property
    def tail(self) -> bool:
        """Whether only the scale and shift of the norm can go."""
        return self.kind in ("layer", "group", "rms")

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.flow.affine.scale) if self.flow is not None else 0


def find_sources(draft: Draft, *, affines: bool) -> list[Source]:
    """Every norm that runs, in the order of execution; with ``affines`` other affine maps too."""
    found: list[Source] = []
    taken: set[fx.Node] = set()
    for node in draft.graph.nodes:
        if node.op != "call_function" or node in taken:
            continue
        name = ops.name_of(node)
        if name in BATCH_NORMS:
            found.append(_batch(draft, node))
        elif name in _KINDS:
            found.append(_instance_or_tail(draft, node, affines=affines))
        elif name in _STEPS and node not in draft.static:
            chain = _chain(draft, node, affines=affines)
            if chain is not None:
                found.append(chain)
                taken.update(chain.steps)
    _name(draft, found)
    return found


def renew(draft: Draft, source: Source) -> None:
    """Read a source again: its tensors may have taken up another norm, its value be another."""
    node = source.steps[0]
    name = ops.name_of(node)
    found: Source | None
    if name in BATCH_NORMS:
        found = _batch(draft, node)
    elif name in _KINDS:
        found = _instance_or_tail(draft, node, affines=source.tail)
    else:
        found = _chain(draft, node, affines=True)
    if found is None or found.result is not source.result:
        source.reason, source.detail = Reason.NO_ABSORBER, "it is no norm any more"
        return
    source.value, source.flow = found.value, found.flow
    source.reason, source.detail = found.reason, found.detail


# -- norms as one operator ------------------------------------------------------------------------


def _batch(draft: Draft, node: fx.Node) -> Source:
    given = arguments(node)
    result = _first_result(node)
    value = given["input"]
    roles = {"weight": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    tensors = {r: given[n] for r, n in roles.items() if isinstance(given.get(n), fx.Node)}
    source = _source("batch", node, result, value, tensors)
    training = given.get("training", given.get("train", False))
    if value in draft.static:
        source.reason, source.detail = Reason.WEIGHT_STANDARDISED, "it normalizes a weight"
    elif training or "mean" not in tensors or "var" not in tensors:
        source.reason = Reason.BATCH_STATISTICS
    elif any(t not in draft.static for t in tensors.values()):
        source.reason, source.detail = Reason.BATCH_STATISTICS, "its statistics are computed"
    else:
        _with_statistics(draft, source, given)
    return source


def _instance_or_tail(draft: Draft, node: fx.Node, *, affines: bool) -> Source:
    given = arguments(node)
    value = given["input"]
    kind = _KINDS[ops.name_of(node)]
    tensors = {r: given[r] for r in ("weight", "bias") if isinstance(given.get(r), fx.Node)}
    if kind == "instance":
        for role in ("mean", "var"):
            if isinstance(given.get(f"running_{role}"), fx.Node):
                tensors[role] = given[f"running_{role}"]
    source = _source(kind, node, _first_result(node), value, tensors)
    if value in draft.static:
        source.reason, source.detail = Reason.BATCH_STATISTICS, "of parameters, not of the input"
        return source
    if kind == "instance" and not given["use_input_stats"] and {"mean", "var"} <= set(tensors):
        _with_statistics(draft, source, given)
        return source
    source.reason = Reason.BATCH_STATISTICS
    if not affines or "weight" not in tensors or kind == "instance":
        return source
    if any(t.op != "get_attr" for t in tensors.values()):
        return source
    source.reason = None
    weight = draft.value(tensors["weight"])
    bias = draft.value(tensors["bias"]) if "bias" in tensors else torch.zeros_like(weight)
    affine = Affine(weight.reshape(-1), bias.reshape(-1))
    shape = source.result.meta["shape"]
    if kind == "group":
        source.flow = Flow.along(affine, shape, 1)
    elif weight.ndim == 1:
        source.flow = Flow.along(affine, shape, -1)
    else:
        numbers = torch.arange(weight.numel()).view(weight.shape).expand(shape)
        source.flow = Flow(affine, tuple(shape), None, numbers)
    return source


def _with_statistics(draft: Draft, source: Source, given: dict[str, Any]) -> None:
    """Work out the map, or say why there is none."""
    values = {role: draft.value(node) for role, node in source.tensors.items()}
    affine = norm_affine(
        values.get("weight"), values.get("bias"), values["mean"], values["var"], given["eps"]
    )
    bad = [role for role, tensor in values.items() if not bool(tensor.isfinite().all())]
    negative = int((values["var"] < 0).sum())
    if bad or negative or not bool((affine.scale.isfinite() & affine.shift.isfinite()).all()):
        source.reason = Reason.BAD_STATISTICS
        source.detail = (
            f"{negative} channels have a negative variance"
            if negative
            else f"the {bad[0]} is not finite"
            if bad
            else "a variance is 0"
        )
        return
    source.flow = Flow.along(affine, source.result.meta["shape"], 1)


def _source(
    kind: str, node: fx.Node, result: fx.Node, value: fx.Node, tensors: dict[str, fx.Node]
) -> Source:
    steps = (node,) if result is node else (node, result)
    return Source(
        kind=kind,
        result=result,
        value=value,
        steps=steps,
        module=node.meta.get("module", ""),
        call=node.meta.get("call", 0),
        tensors=tensors,
    )


def _first_result(node: fx.Node) -> fx.Node:
    """The normalized value: the operator itself, or the first of what it returns."""
    if node.meta.get("shape") is not None:
        return node
    for user in node.users:
        if ops.name_of(user) == "getitem" and user.args[1] == 0:
            return user
    return node


# -- maps that are written out --------------------------------------------------------------------


def _chain(draft: Draft, start: fx.Node, *, affines: bool) -> Source | None:
    """``x·s + t`` by static tensors, written out: a frozen batch norm, a layer scale."""
    steps: list[fx.Node] = []
    value: fx.Node | None = None
    node = start
    affine: Affine | None = None
    axis: int | None = None
    statics: list[fx.Node] = []
    while True:
        step = _step(draft, node)
        if step is None:
            break
        read, static, scale, shift, along = step
        if steps and read is not steps[-1]:
            break
        if along is not None and axis is not None and along != axis:
            break
        if along is None and not steps:
            return None  # a scalar starts no chain
        size = node.meta["shape"][along] if along is not None else None
        if size is not None and affine is not None and len(affine.scale) == 1:
            affine = Affine(affine.scale.expand(size), affine.shift.expand(size))
        axis = along if axis is None else axis
        length = len(affine.scale) if affine is not None else size or 1
        now = Affine(scale.expand(length), shift.expand(length))
        affine = now if affine is None else affine.then(now)
        value = read if value is None else value
        steps.append(node)
        statics.extend(static)
        readers = draft.readers(node)
        if len(readers) != 1 or any(
            readers[0].meta.get(key) != start.meta.get(key) for key in ("module", "call")
        ):
            break
        node = readers[0]
    if value is None or affine is None or axis is None:
        return None
    frozen = any(_has_root(static) for static in statics)
    scales = any(ops.name_of(step) in ("mul", "div") for step in steps)
    if not frozen and not (affines and scales):
        return None
    result = steps[-1]
    source = _source("frozen" if frozen else "affine", steps[0], result, value, {})
    source.steps = tuple(steps)
    for number, tensor in enumerate(statics):
        for root in ancestors(tensor):
            if root.op == "get_attr":
                source.tensors.setdefault(f"{number}:{root.target}", root)
    if not bool((affine.scale.isfinite() & affine.shift.isfinite()).all()):
        source.reason = Reason.BAD_STATISTICS
    else:
        source.flow = Flow.along(affine, result.meta["shape"], axis)
    return source


def _step(
    draft: Draft, node: fx.Node
) -> tuple[fx.Node, list[fx.Node], Tensor, Tensor, int | None] | None:
    """One operator by a static tensor: what it reads, the tensor, scale, shift and axis."""
    name = ops.name_of(node)
    if node.op != "call_function" or name not in _STEPS or node.meta.get("shape") is None:
        return None
    given = arguments(node)
    a, b = given["self"], given["other"]
    live = [n for n in (a, b) if isinstance(n, fx.Node) and n not in draft.static]
    if len(live) != 1 or live[0].meta.get("shape") != node.meta["shape"]:
        return None
    if given.get("alpha", 1) != 1 or given.get("rounding_mode") is not None:
        return None
    if not node.meta["dtype"].is_floating_point:
        return None
    x = live[0]
    other = b if a is x else a
    if name in ("div", "sub") and a is not x:
        return None
    static = [other] if isinstance(other, fx.Node) else []
    if static and prod(other.meta["shape"]) > max(node.meta["shape"], default=1):
        return None  # one number for each element: no map by channel, and perhaps large
    number = draft.value(other) if isinstance(other, fx.Node) else other
    number = torch.as_tensor(number, dtype=torch.float64)
    along: int | None = None
    if number.numel() > 1:
        shape = (1,) * (len(node.meta["shape"]) - number.ndim) + tuple(number.shape)
        axes = [i for i, size in enumerate(shape) if size > 1]
        if len(axes) != 1 or len(shape) < 2 or axes[0] == 0:
            return None
        along = axes[0]
    vector = number.reshape(-1)
    one, zero = torch.ones_like(vector), torch.zeros_like(vector)
    match name:
        case "mul":
            return x, static, vector, zero, along
        case "div":
            return x, static, one / vector, zero, along
        case "add":
            return x, static, one, vector, along
        case _:
            return x, static, one, -vector, along


def _has_root(static: fx.Node) -> bool:
    """Whether a square root is taken on the way: of a variance."""
    return any(
        ops.name_of(node) in ("rsqrt", "sqrt")
        or (ops.name_of(node) == "pow" and node.args[1] in (-0.5, 0.5))
        for node in ancestors(static)
    )


# -- names ----------------------------------------------------------------------------------------


def _name(draft: Draft, sources: list[Source]) -> None:
    """The name of each source in a plan: its module, unless that has several."""
    for source in sources:
        source.layer = _owner(source)
        if source.kind == "affine" and not _is_all_of(draft, source.layer, source):
            source.layer = _tensor_name(source)
    owners: dict[str, set[tuple[str, ...]]] = {}
    for source in sources:
        owners.setdefault(source.layer, set()).add(_identity(source))
    for source in sources:
        if not source.layer or len(owners[source.layer]) > 1:
            source.layer = _tensor_name(source) or source.layer


def _is_all_of(draft: Draft, path: str, source: Source) -> bool:
    """Whether a module has no other parameters and buffers than these."""
    module = draft.module(path)
    names = {str(node.target).rpartition(".")[2] for node in source.tensors.values()}
    own = (*module.named_parameters(), *module.named_buffers()) if module is not None else ()
    return bool(own) and {name for name, _ in own} <= names


def _owner(source: Source) -> str:
    """Path of the module that owns the statistics."""
    names = _ordered(source)
    if not names:
        return source.module
    return names[0].rpartition(".")[0]


def _ordered(source: Source) -> list[str]:
    """The names of its tensors, the statistics first."""
    roles = ("mean", "var", "weight", "bias")
    first = [str(source.tensors[role].target) for role in roles if role in source.tensors]
    return first or [str(node.target) for node in source.tensors.values()]


def _tensor_name(source: Source) -> str:
    for role in ("weight", "mean"):
        if role in source.tensors:
            return str(source.tensors[role].target)
    return next((str(node.target) for node in source.tensors.values()), "")


def _identity(source: Source) -> tuple[str, ...]:
    return tuple(sorted(str(node.target) for node in source.tensors.values())) or (
        f"{source.module}#{source.result.name}",
    )


def by_layer(sources: list[Source]) -> Iterator[list[Source]]:
    """The calls of each norm together, in the order of first calls."""
    groups: dict[str, list[Source]] = {}
    for source in sources:
        groups.setdefault(source.layer, []).append(source)
    yield from groups.values()
