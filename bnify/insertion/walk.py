"""What stands around a layer: the norm, activation or join its output meets."""

from __future__ import annotations

from torch import fx

from bnify import ops
from bnify.graph import Facts

_PASSED = ops.VIEWS | ops.DROPOUTS | ops.POOLS
#: Views that keep every element where it is.
_COPIES = frozenset(
    {"alias", "clone", "contiguous", "detach", "lift_fresh", "to", "_to_copy", "type_as"}
)


def norm_after(facts: Facts, value: fx.Node) -> fx.Node | None:
    """The norm that follows through views, dropout, pooling and at most one activation.

    The parts of a mixed convolution, concatenated and then normalized, have one as well.
    """
    pending = [(value, False)]
    seen = {value}
    while pending:
        node, activated = pending.pop()
        for user in node.users:
            if user in facts.normed:
                return user
            if user in seen:
                continue
            seen.add(user)
            name = facts.name[user]
            if name in _PASSED or _statistic(facts, user) or _one_layer_in_parts(facts, user):
                pending.append((user, activated))
            elif name in ops.ACTIVATIONS and not activated:
                pending.append((user, True))
    return None


def _one_layer_in_parts(facts: Facts, node: fx.Node) -> bool:
    """A concat of nothing but layer outputs: a mixed convolution, one layer in several parts."""
    if facts.name[node] != "cat" or len(ops.sources(node)) < 2:
        return False
    for part in ops.sources(node):
        current: fx.Node | None = part
        while current is not None and facts.name[current] in ops.VIEWS:
            current = ops.first(current)
        if current not in facts.weighted:
            return False
    return True


def _statistic(facts: Facts, node: fx.Node) -> bool:
    """The first step of a hand-written norm: x - mean(x)."""
    return facts.name[node] == "sub" and any(u in facts.normed for u in node.users)


def norm_before(facts: Facts, value: fx.Node) -> fx.Node | None:
    """The norm a value comes from through views, dropout and at most one activation."""
    activated = False
    node: fx.Node | None = value
    while node is not None:
        if node in facts.normed:
            return node
        name = facts.name[node]
        if name in ops.ACTIVATIONS and not activated:
            activated = True
        elif name not in ops.VIEWS and name not in ops.DROPOUTS:
            return None
        node = ops.first(node)
    return None


def join_after(facts: Facts, value: fx.Node) -> fx.Node | None:
    """The norm, residual add or concat that a value meets before any activation."""
    pending, seen = [value], {value}
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            name = facts.name[user]
            if user in facts.normed or name == "cat" or is_residual_add(facts, user):
                return user
            if name in _PASSED or (name in ("mul", "add") and _by_static(facts, user, node)):
                pending.append(user)
    return None


def is_residual_add(facts: Facts, node: fx.Node) -> bool:
    """Whether two computed values are added."""
    if facts.name[node] != "add":
        return False
    reads = [s for s in ops.sources(node) if s not in facts.static]
    return len(reads) == 2


def _by_static(facts: Facts, node: fx.Node, value: fx.Node) -> bool:
    """Whether the other operand is a parameter or constant: a layer scale, a position table."""
    return all(s in facts.static for s in ops.sources(node) if s is not value)


def residual_add_after(facts: Facts, value: fx.Node) -> fx.Node | None:
    """The residual add that reads the value, through views and dropout only."""
    pending = [value]
    while pending:
        for user in pending.pop().users:
            if is_residual_add(facts, user):
                return user
            if facts.name[user] in ops.VIEWS | ops.DROPOUTS:
                pending.append(user)
    return None


def same_elements(facts: Facts, value: fx.Node, later: fx.Node) -> bool:
    """Whether nothing between the two moves elements: channels stay on their axis."""
    node = ops.first(later)
    while node is not None and node is not value:
        if facts.name[node] in ops.VIEWS and facts.name[node] not in _COPIES:
            return False
        node = ops.first(node)
    return True


def activation_after(facts: Facts, value: fx.Node) -> fx.Node | None:
    """The activation that alone reads the value, through views and dropout."""
    node = value
    while len(node.users) == 1:
        node = next(iter(node.users))
        if facts.name[node] in ops.ACTIVATIONS:
            return node
        if facts.name[node] not in ops.VIEWS | ops.DROPOUTS:
            return None
    return None
