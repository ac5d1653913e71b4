"""What stands before and behind a norm in the recorded pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from bnify import ops
from bnify.folding.arguments import rerun

if TYPE_CHECKING:
    from bnify.auditing.live import Live, NormUse
    from bnify.folding.layers import Layer

#: Operators that give back their input, or a copy of it.
SAME = frozenset({"alias", "clone", "contiguous", "detach", "lift_fresh", "to", "_to_copy"})
#: Operators that only arrange its elements anew.
ARRANGING = SAME | frozenset(
    {"view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "permute"}
    | {"transpose", "t", "squeeze", "unsqueeze", "movedim", "swapaxes", "swapdims"}
)


def live_inputs(live: Live, node: fx.Node) -> list[fx.Node]:
    """The values an operator reads that depend on the input of the model."""
    static = live.draft.static if live.draft is not None else set()
    return [s for s in ops.sources(node) if s not in static and "number" not in s.meta]


def before(
    live: Live, node: fx.Node, depth: int, through: Callable[[fx.Node], bool]
) -> Iterator[fx.Node]:
    """Operators at most ``depth`` steps upstream of a value, itself included.

    Args:
        live: The model.
        node: The value; it is one step away.
        depth: How many steps.
        through: Whether to look behind an operator.
    """
    seen, front = {node}, [node]
    for _ in range(depth):
        following: list[fx.Node] = []
        for current in front:
            yield current
            if current.op != "call_function" or not through(current):
                continue
            fresh = [s for s in live_inputs(live, current) if s not in seen]
            seen.update(fresh)
            following += fresh
        front = following


def dropout_rate(node: fx.Node) -> float:
    """The rate of an element-wise dropout, which drops nothing in eval mode; else 0."""
    if node.op != "call_function" or ops.name_of(node) not in ("dropout", "native_dropout"):
        return 0.0
    p = node.args[1] if len(node.args) > 1 else 0.0
    return float(p) if isinstance(p, (int, float)) else 0.0


def norms_behind(live: Live, layer: Layer) -> list[NormUse] | None:
    """The norms with statistics over the batch that read a layer's result, channel for channel.

    None if anything else reads it, or a norm has its channels on another axis. Followed through
    operators that only arrange elements, by letting them arrange the numbers of the channels.
    """
    if live.draft is None:
        return None
    by_value: dict[fx.Node, list[NormUse]] = {}
    for use in live.uses:
        by_value.setdefault(use.source.value, []).append(use)
    numbers: Tensor | None = None  # of the channels; None while they are on the layer's own axis
    found: list[NormUse] = []
    pending: list[tuple[fx.Node, Tensor | None]] = [(layer.node, numbers)]
    while pending:
        value, numbers = pending.pop()
        uses = by_value.get(value, [])
        norms = {use.source.steps[0] for use in uses}
        for reader in live.draft.readers(value):
            if reader in norms:
                continue
            if reader.op != "call_function" or ops.name_of(reader) not in ARRANGING:
                return None
            given = _numbered(layer) if numbers is None else numbers
            pending.append((reader, rerun(reader, lambda _, given=given: given)))  # type: ignore[misc]
        for use in uses:
            if use.kind == "frozen" or not use.of_batch:
                return None  # statistics that are constant take nothing away
            if not _on_axis_one(use, layer, numbers):
                return None
            found.append(use)
    return found or None


def _numbered(layer: Layer) -> Tensor:
    """The number of its channel for each element of a layer's result, float64."""
    shape = tuple(layer.node.meta["shape"])
    axis = layer.axis % len(shape)
    view = [-1 if i == axis else 1 for i in range(len(shape))]
    return torch.arange(shape[axis], dtype=torch.float64).view(view).expand(shape)


def _on_axis_one(use: NormUse, layer: Layer, numbers: Tensor | None) -> bool:
    shape = use.shape
    if numbers is None:
        return layer.axis % len(shape) == 1
    channels = layer.node.meta["shape"][layer.axis]
    if len(shape) < 2 or shape[1] != channels or tuple(numbers.shape) != shape:
        return False
    wanted = torch.arange(channels, dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    return bool((numbers == wanted).all())
