"""Operators that can take an affine map into their weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from bnify import ops
from bnify.algebra import Kernel
from bnify.folding.arguments import arguments, place_of, rerun
from bnify.folding.refusal import Refused
from bnify.reason import Reason

if TYPE_CHECKING:
    from bnify.folding.draft import Draft

CONVS = frozenset({"conv1d", "conv2d", "conv3d"})
TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
SPLIT_CONVS = frozenset({"convolution", "_convolution"})


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """An operator with a weight that can be scaled.

    Attributes:
        node: The operator.
        value: What it works on.
        weight: The node of its weight.
        bias: The node of its bias; None without.
        kernel: How the weight is laid out.
        axis: Channel axis of its result.
        input_axis: Channel axis of what it works on.
        source: The tensor behind the weight: a ``get_attr``, or a computed weight.
        steps: The operators that read ``source``.
        name: Name of ``source`` if that is the weight itself; None if it is seen through views.
        target: Name of the tensor that is written.
        path: Path of the module that the operator runs in.
        takes_bias: Whether a bias can be added.
        baked: Whether a computed weight becomes a plain one.
        why_fixed: Reason and detail if the weight cannot be changed.
        places: For a weight seen through views, where each element is in ``source``.
    """

    node: fx.Node
    value: fx.Node | None
    weight: fx.Node
    bias: fx.Node | None
    kernel: Kernel
    axis: int
    input_axis: int
    source: fx.Node
    steps: tuple[fx.Node, ...]
    name: str | None
    target: str
    path: str
    takes_bias: bool = False
    baked: bool = False
    why_fixed: tuple[Reason, str] | None = None
    places: Tensor | None = None

    @property
    def label(self) -> str:
        """What a reader knows it by: the module, else the weight."""
        leaf = self.target.rpartition(".")[2]
        return self.path if self.path and leaf == "weight" else self.target

    @property
    def bias_name(self) -> str:
        """Name of the bias that is added."""
        return self.target.removesuffix("weight") + "bias" if self._own else f"{self.target}_bias"

    @property
    def _own(self) -> bool:
        return self.target.rpartition(".")[0] == self.path and self.target.endswith("weight")

    def stored(self, weight: Tensor) -> Tensor:
        """A new weight as the tensor behind the views has it."""
        if self.places is None:
            return weight
        stored = torch.empty(prod(self.source.meta["shape"]), dtype=weight.dtype)
        stored[self.places.reshape(-1)] = weight.reshape(-1).cpu()
        return stored.view(self.source.meta["shape"])

    def set_bias(self, bias: fx.Node) -> None:
        """Let the operator read this bias."""
        if "bias" in self.node.kwargs:
            self.node.kwargs = {**self.node.kwargs, "bias": bias}
        else:
            rest = self.node.args[3:]
            self.node.args = (*self.node.args[:2], bias, *rest)


def read_layer(draft: Draft, node: fx.Node) -> Layer | None:
    """The node as a layer; None if it is no linear operator with a static weight."""
    name = ops.name_of(node)
    if name not in _KINDS or node in draft.static or node.meta.get("shape") is None:
        return None
    args = arguments(node)
    value, weight, bias = (args.get(key) for key in _KINDS[name])
    if not isinstance(weight, fx.Node) or weight not in draft.static:
        return None
    if not weight.meta["dtype"].is_floating_point:
        return None
    kernel, axis, input_axis = _layout(name, args, node, weight)
    if kernel is None:
        return None
    if name == "addmm" and (args["beta"] != 1 or args["alpha"] != 1):
        return None
    if bias is not None and (
        not isinstance(bias, fx.Node)
        or bias not in draft.static
        or prod(bias.meta["shape"]) != node.meta["shape"][axis]
        or bias.meta["shape"][-1:] != node.meta["shape"][axis : axis + 1]
    ):
        return None
    return Layer(
        node=node,
        value=value if isinstance(value, fx.Node) else None,
        bias=bias,
        kernel=kernel,
        axis=axis,
        input_axis=input_axis,
        **_behind(draft, node, weight, name),
    )


#: Names of the value, the weight and the bias in the schema.
_KINDS: dict[str, tuple[str, str, str]] = {
    "linear": ("input", "weight", "bias"),
    **dict.fromkeys(CONVS | TRANSPOSED | SPLIT_CONVS, ("input", "weight", "bias")),
    "mm": ("self", "mat2", ""),
    "matmul": ("self", "other", ""),
    "addmm": ("mat1", "mat2", "self"),
    "embedding": ("indices", "weight", ""),
}


def _layout(
    name: str, args: dict[str, Any], node: fx.Node, weight: fx.Node
) -> tuple[Kernel | None, int, int]:
    """Kernel, channel axis of the result, channel axis of the input."""
    last = len(node.meta["shape"]) - 1
    dims = len(weight.meta["shape"])
    if name in CONVS | TRANSPOSED | SPLIT_CONVS:
        transposed = name in TRANSPOSED or bool(args.get("transposed"))
        axis = last + 1 - (dims - 1)
        return Kernel("conv_transpose" if transposed else "conv", args["groups"]), axis, axis
    if dims != 2:
        return None, 0, 0
    if name == "embedding":
        return Kernel("embedding"), last, last
    value = args["self" if name in ("mm", "matmul") else "mat1" if name == "addmm" else "input"]
    before = len(value.meta["shape"]) - 1
    return Kernel("linear" if name == "linear" else "matmul"), last, before


def _behind(draft: Draft, node: fx.Node, weight: fx.Node, name: str) -> dict[str, Any]:
    """Where the weight comes from, and what may be done to it."""
    path = node.meta.get("module", "")
    module = draft.module(path)
    plain = isinstance(module, (nn.Linear, _ConvNd)) and name != "embedding"
    chain, source = [node], weight
    while source.op == "call_function" and ops.name_of(source) in ops.VIEWS:
        before = ops.first(source)
        if before is None:
            break
        chain, source = [source], before
    found: dict[str, Any] = {
        "weight": weight,
        "source": source,
        "steps": (chain[0],),
        "name": None,
        "path": path,
    }
    if source.op == "get_attr":
        found["target"] = str(source.target)
        inside = plain and found["target"] == (f"{path}.weight" if path else "weight")
        if source is weight:
            found["name"] = found["target"]
        else:
            found["places"] = places = _places(weight, source)
            if places is None:
                found["why_fixed"] = (Reason.COMPUTED_WEIGHT, f"{place_of(weight)} is a part of it")
    else:
        found["target"] = f"{path}.weight" if path else "weight"
        inside = found["baked"] = plain and _bakeable(path, module, source)
        found["source"] = weight
        if not found["baked"]:
            standardised = any(
                ops.name_of(n) in ops.NORMS | ops.REDUCTIONS for n in ancestors(weight)
            )
            reason = Reason.WEIGHT_STANDARDISED if standardised else Reason.COMPUTED_WEIGHT
            found["why_fixed"] = (reason, f"that of {path or place_of(node)}")
    found["takes_bias"] = name not in ("mm", "matmul", "embedding", "addmm") and (
        draft.as_graph or (inside and getattr(module, "bias", None) is None)
    )
    return found


def _places(weight: fx.Node, source: fx.Node) -> Tensor | None:
    """Where each element of a viewed weight is in its tensor; None if some are not seen."""
    numel = prod(source.meta["shape"])
    numbers = torch.arange(numel, dtype=torch.float64).view(source.meta["shape"])

    def follow(node: fx.Node) -> Tensor:
        if node is source:
            return numbers
        seen: Tensor = rerun(node, follow)
        return seen

    places = follow(weight).long()
    whole = places.numel() == numel and bool(
        (places.reshape(-1).sort().values == torch.arange(numel)).all()
    )
    return places if whole else None


def ancestors(node: fx.Node) -> set[fx.Node]:
    """A static node and everything it is computed from."""
    found, pending = {node}, [node]
    while pending:
        for source in ops.sources(pending.pop()):
            if source not in found:
                found.add(source)
                pending.append(source)
    return found


def _bakeable(path: str, module: nn.Module | None, weight: fx.Node) -> bool:
    """Whether a computed weight is that of a parametrization or of an old-style hook."""
    if module is None:
        return False
    roots = {str(n.target) for n in ancestors(weight) if n.op == "get_attr"}
    prefix = f"{path}." if path else ""
    if not all(root.startswith(prefix) for root in roots):
        return False
    if parametrize.is_parametrized(module, "weight"):
        return True
    return any(
        type(hook).__name__ in ("WeightNorm", "SpectralNorm")
        and type(hook).__module__.startswith("torch.nn.utils.")
        for hook in module._forward_pre_hooks.values()
    )


def check_bake(layers: list[Layer]) -> None:
    """Refuse to bake a weight that is computed for somebody else as well.

    Raises:
        Refused: Another operator reads what the weight is computed from.
    """
    known = set().union(*(ancestors(layer.weight) for layer in layers))
    known |= {layer.node for layer in layers}
    for node in known:
        for user in node.users if node.op == "get_attr" or node in known else ():
            if user not in known and node not in {layer.node for layer in layers}:
                raise Refused(
                    Reason.TIED_WEIGHTS, f"{place_of(node)} is also read by {place_of(user)}"
                )


def check_own_weight(draft: Draft, layer: Layer) -> None:
    """Refuse to write a weight that others read, or that is computed for others too.

    Raises:
        Refused: Somebody does.
    """
    if layer.baked:
        check_bake([layer])
    else:
        draft.check_writable(layer.source, layer.steps)
