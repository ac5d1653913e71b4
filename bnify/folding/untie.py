"""A weight of its own for each call of a shared layer."""

from __future__ import annotations

from torch import fx, nn

from bnify.changes import Change
from bnify.folding.backward import Backward
from bnify.folding.draft import Draft
from bnify.folding.forward import Forward
from bnify.folding.layers import Layer
from bnify.folding.refusal import Refused
from bnify.folding.sources import Source
from bnify.folding.transaction import Transaction


def untie_calls(draft: Draft, calls: list[Source]) -> list[tuple[fx.Node, tuple[object, ...]]]:
    """Give the layers that would take a norm weights that nobody else reads, in the graph.

    Returns:
        The operators that were changed, with the arguments that they had.
    """
    undo: list[tuple[fx.Node, tuple[object, ...]]] = []
    for source in calls:
        for layer in _takers(draft, source):
            if layer.name is None or not _is_shared(draft, layer):
                continue
            undo.append((layer.node, tuple(layer.node.args)))
            for role in (layer.weight, layer.bias):
                if role is not None and role.op == "get_attr":
                    layer.node.replace_input_with(role, _clone(draft, role, layer))
    draft.forget()
    return undo


def tie_again(draft: Draft, undo: list[tuple[fx.Node, tuple[object, ...]]]) -> None:
    """Undo what :func:`untie_calls` did."""
    for node, args in reversed(undo):
        node.args = args  # type: ignore[assignment]
    draft.forget()


def _takers(draft: Draft, source: Source) -> list[Layer]:
    """The layers that a norm would go into, whoever else reads their weights."""
    if source.flow is None:
        return []
    back, ahead = Backward(Transaction(draft)), Forward(Transaction(draft))
    try:
        back.push(source.value, source.steps[0], source.flow)
        return [proposal.layer for proposal in back.txn.proposals.values()]
    except Refused:
        pass  # forwards, then
    try:
        ahead.push(source.result, source.flow)
    except Refused:
        return []
    return [proposal.layer for proposal in ahead.txn.proposals.values()]


def _is_shared(draft: Draft, layer: Layer) -> bool:
    try:
        draft.check_writable(layer.source, layer.steps)
        if layer.bias is not None and layer.bias.op == "get_attr":
            draft.check_writable(layer.bias, [layer.node])
    except Refused:
        return True
    return False


def _clone(draft: Draft, node: fx.Node, layer: Layer) -> fx.Node:
    path, _, leaf = str(node.target).rpartition(".")
    name = ".".join(filter(None, (path, f"untied_{layer.node.name}", leaf)))
    draft.untied.add(layer.node)
    clone = draft.attribute(name, node, tuple(node.meta["shape"]))
    draft.changes.values[name] = draft.value(node)
    return clone


# -- in the module tree ----------------------------------------------------------------------------


def separable(model: nn.Module) -> list[Change]:
    """Changes that give each place of a module that is registered several times its own copy.

    Only innermost modules with parameters of their own; a forward that calls one name several
    times cannot be told apart this way.
    """
    places: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if next(module.parameters(recurse=False), None) is not None:
            places.setdefault(module, []).append(path)
    return [Change(kind="clone", path=path) for paths in places.values() for path in paths[1:]]
