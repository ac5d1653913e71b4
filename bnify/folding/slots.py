"""What remains of a norm in the module tree: where it was, something must still be called."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from bnify import ops
from bnify.folding.arguments import arguments, place_of
from bnify.folding.draft import Draft
from bnify.folding.families import CASTS, is_dropout_off, moved, numbers
from bnify.folding.layers import ancestors
from bnify.folding.refusal import Refused
from bnify.folding.sources import Source
from bnify.reason import Reason


@dataclass(frozen=True, slots=True)
class Slot:
    """What becomes of the place of a norm.

    Attributes:
        path: Module path; None where the norm is written out in a forward.
        children: Names of the children that stay (the activation of a norm with activation).
    """

    path: str | None
    children: tuple[str, ...] = ()


def slot_of(draft: Draft, calls: list[Source]) -> Slot:
    """Where a norm sits, if it can be taken out there.

    Args:
        draft: The recording.
        calls: All calls of the norm.

    Raises:
        Refused: Its module does more than normalize, or it cannot be taken out of a forward.
    """
    if calls[0].tail:
        for source in calls:
            for node in source.tensors.values():
                draft.check_writable(node, [step for call in calls for step in call.steps])
        return Slot(None)
    if draft.as_graph:
        return Slot(None)
    path = calls[0].module
    module = draft.module(path)
    owned = path and module is not None and all(source.module == path for source in calls)
    if owned and module is not None:
        try:
            children = {_children(draft, source) for source in calls}
            if len(children) == 1 and draft.calls_of(path) == len(calls):
                _check_tensors(draft, path, calls)
                return Slot(path, children.pop())
        except Refused as refused:
            if refused.reason is _EXTRA and module._forward_pre_hooks:
                raise Refused(
                    Reason.HOOK_ON_NORM, "its forward pre-hook changes what it is given"
                ) from None
            alone = calls[0].kind != "affine" and _is_norm_module(draft, path, calls[0])
            if alone or refused.reason is not _EXTRA:
                raise
    _check_neutral(draft, calls)
    return Slot(None)


_EXTRA = Reason.EXTRA_COMPUTATION


def _children(draft: Draft, source: Source) -> tuple[str, ...]:
    """The children that run behind the norm in one call of its module.

    Raises:
        Refused: The module does something else as well.
    """
    path = source.module
    call = draft.call_at(path, source.call)
    if call is None or len(call.outputs) != 1:
        raise Refused(_EXTRA, f"{path} does not give one value")
    # Called by keyword it has no positional input; then it was given what the norm reads.
    given = draft.now(call.inputs[0]) if call.inputs else source.value
    result = draft.now(call.outputs[0])
    inside = set(draft.inside(path, source.call))
    children: list[str] = []
    walked: list[fx.Node] = []
    node = result
    while node is not given:
        if node is source.result:
            node = source.value
            continue
        child = _child_behind(draft, path, node)
        if child is not None:
            name, before = child
            children.insert(0, name)
            node = before
        elif node in inside and _only_moves(node):
            walked.append(node)
            before_move = ops.first(node)
            if before_move is None:
                raise Refused(_EXTRA, place_of(node))
            node = before_move
        else:
            raise Refused(_EXTRA, f"{place_of(node)} runs in it too")
    extra = inside - set(source.steps) - set(walked) - draft.static
    extra = {n for n in extra if "number" not in n.meta and (n.users or n.meta.get("writes"))}
    if extra:
        raise Refused(_EXTRA, f"{place_of(next(iter(extra)))} runs in it too")
    if walked:
        _check_stays(draft, given, walked, alone=not children)
    return tuple(children)


def _child_behind(draft: Draft, path: str, node: fx.Node) -> tuple[str, fx.Node] | None:
    """The child that made a value, with what it was given."""
    where = node.meta.get("module", "")
    if not where.startswith(f"{path}."):
        return None
    name = where[len(path) + 1 :].partition(".")[0]
    for call in draft.calls(f"{path}.{name}"):
        if len(call.outputs) == 1 and draft.now(call.outputs[0]) is node and call.inputs:
            return name, draft.now(call.inputs[0])
    return None


def _only_moves(node: fx.Node) -> bool:
    return (ops.name_of(node) in ops.VIEWS | CASTS or is_dropout_off(node)) and (
        node.meta.get("shape") is not None
    )


def _check_stays(draft: Draft, given: fx.Node, walked: list[fx.Node], *, alone: bool) -> None:
    """Refuse a module that, without its norm, would still move elements.

    Raises:
        Refused: It would.
    """
    why = Refused(_EXTRA, f"{place_of(walked[0])} runs in it too")
    if not alone:
        raise why
    before = numbers(given.meta["shape"])
    value = before
    for node in reversed(walked):
        if ops.name_of(node) not in CASTS and not is_dropout_off(node):
            value = moved(node, value, draft.value)
    last = walked[0].meta
    if last["dtype"] != given.meta["dtype"] or not torch.equal(value, before):
        raise why


def _check_tensors(draft: Draft, path: str, calls: list[Source]) -> None:
    """Refuse to take a module away whose tensors somebody else reads.

    Raises:
        Refused: Somebody does.
    """
    for node in {node for source in calls for node in source.tensors.values()}:
        name = str(node.target)
        if not name.startswith(f"{path}."):
            continue
        for user in draft.readers(node):
            if user.meta.get("module") != path:
                raise Refused(Reason.ANOTHER_CONSUMER, f"{place_of(user)} reads {name}")


def _is_norm_module(draft: Draft, path: str, source: Source) -> bool:
    """Whether a module is a norm and nothing else: it has no other tensors and no children."""
    module = draft.module(path)
    if module is None or next(module.children(), None) is not None:
        return False
    names = {str(node.target).rpartition(".")[2] for node in source.tensors.values()}
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return own <= names | {"num_batches_tracked"}


# -- norms that are written out in a forward ------------------------------------------------------


def _check_neutral(draft: Draft, calls: list[Source]) -> None:
    """Refuse a norm that can neither be taken out nor be made to do nothing.

    Raises:
        Refused: Its tensors are read elsewhere, or it has none that could be set.
    """
    neutral_values(draft, calls[0])
    steps = {step for source in calls for step in source.steps}
    between = {
        node
        for step in steps
        for static in ops.sources(step)
        if static in draft.static
        for node in ancestors(static)
    }
    for source in calls:
        for node in source.tensors.values():
            draft.check_writable(node, steps | between)


def neutral_values(draft: Draft, source: Source) -> dict[fx.Node, torch.Tensor]:
    """Values of a norm's tensors with which it passes its input on.

    Raises:
        Refused: There are none.
    """
    values: dict[fx.Node, torch.Tensor] = {}
    tensors = source.tensors
    if len(set(tensors.values())) < len(tensors):
        raise Refused(Reason.IN_FORWARD, "one tensor has two parts in it")
    if source.kind in ("batch", "instance"):
        if any(node.op != "get_attr" for node in tensors.values()):
            raise Refused(Reason.IN_FORWARD, "its tensors are computed")
        eps = float(arguments(source.steps[0])["eps"])
        var = draft.value(tensors["var"])
        if "weight" not in tensors and eps >= 1:
            raise Refused(Reason.IN_FORWARD, f"eps is {eps:g} and there is no scale to undo it")
        spread = torch.full_like(var, max(1 - eps, 0.0))
        values[tensors["mean"]] = torch.zeros_like(var)
        values[tensors["var"]] = spread
        if "weight" in tensors:
            values[tensors["weight"]] = (spread + eps).sqrt()
        if "bias" in tensors:
            values[tensors["bias"]] = torch.zeros_like(var)
        return values
    if source.kind == "affine":
        for step in source.steps:
            given = arguments(step)
            static = [
                n
                for n in (given["self"], given["other"])
                if isinstance(n, fx.Node) and n in draft.static
            ]
            scales = ops.name_of(step) in ("mul", "div")
            if not static:
                raise Refused(Reason.IN_FORWARD, f"{place_of(step)} is a number in the code")
            root = _behind_views(static[0])
            if root is None:
                raise Refused(Reason.IN_FORWARD, f"what {place_of(step)} reads is computed")
            values[root] = torch.full(root.meta["shape"], float(scales), dtype=torch.float64)
        return values
    raise Refused(Reason.IN_FORWARD, place_of(source.result))


def _behind_views(node: fx.Node) -> fx.Node | None:
    """The parameter behind views of all of it."""
    size = prod(node.meta["shape"])
    while node.op == "call_function" and ops.name_of(node) in ops.VIEWS:
        before = ops.first(node)
        if before is None:
            return None
        node = before
    whole = node.op == "get_attr" and prod(node.meta["shape"]) == size
    return node if whole else None
