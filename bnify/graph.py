"""Read-only questions about a recorded graph, answered for all nodes at once.

Every pass is linear in the size of the graph: facts are computed in one walk along the order of
execution or against it, never by a search from each layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from bnify import ops


@dataclass(frozen=True, slots=True)
class WeightedOp:
    """An operator that multiplies a value by a weight.

    Attributes:
        node: The operator.
        weight: The node of the weight: a ``get_attr``, or what a computed weight ends in.
        roots: Names of the tensors the weight comes from.
    """

    node: fx.Node
    weight: fx.Node
    roots: tuple[str, ...]

    @property
    def computed(self) -> bool:
        """Whether the weight is computed at every call."""
        return self.weight.op != "get_attr"


class Facts:
    """What planning asks about a graph.

    Attributes:
        order: Position of each node.
        static: Nodes that depend on no input: parameters, buffers, constants, and what is
            computed of them only.
        weighted: Every weighted operator by node.
        normed: Nodes that are the result of a norm, operator or hand-written.
        heads: Nodes from which an output is reached without another weighted layer.
        gates: Nodes from which every path ends in a gate that multiplies another value.
        attention: Weighted operators that project to or from attention.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.name = {node: ops.name_of(node) for node in self.nodes}
        self.static = self._find_static()
        self.weighted = self._find_weighted()
        self.normed = self._find_norms()
        self.heads = self._find_heads()
        self.gates = self._find_gates()
        self.attention = self._find_attention()

    # -- one walk each ---------------------------------------------------------------------------

    def _find_static(self) -> set[fx.Node]:
        static: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "get_attr" or (
                node.op == "call_function" and all(s in static for s in ops.sources(node))
            ):
                static.add(node)
        return static

    def _find_weighted(self) -> dict[fx.Node, WeightedOp]:
        found = {}
        for node in self.nodes:
            name = self.name[node]
            candidates: list[fx.Node] = []
            if name in ops.RECURRENT or name == "einsum":
                candidates = [s for s in ops.sources(node) if s in self.static]
            elif name in ops.WEIGHT_POSITION:
                position = ops.WEIGHT_POSITION[name]
                argument = node.args[position] if len(node.args) > position else None
                candidates = [argument] if isinstance(argument, fx.Node) else []
                if name in ops.PRODUCTS:  # x @ W or W @ x
                    candidates += [s for s in ops.sources(node) if s is not argument]
            for weight in candidates:
                roots = self._roots(weight) if weight in self.static else ()
                if roots and node not in self.static:
                    found[node] = WeightedOp(node, self._through_t(weight), roots)
                    break
        return found

    def _through_t(self, weight: fx.Node) -> fx.Node:
        """The weight behind the transpose that a split-up linear wears."""
        source = ops.first(weight)
        return source if source is not None and self.name[weight] == "t" else weight

    def _roots(self, node: fx.Node) -> tuple[str, ...]:
        """Names of the tensors a static node is computed from."""
        roots: dict[str, None] = {}
        pending, seen = [node], {node}
        while pending:
            current = pending.pop()
            if current.op == "get_attr":
                roots[str(current.target)] = None
            for source in ops.sources(current):
                if source not in seen:
                    seen.add(source)
                    pending.append(source)
        return tuple(roots)

    def _find_heads(self) -> set[fx.Node]:
        heads: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if any(u.op == "output" or (u in heads and u not in self.weighted) for u in node.users):
                heads.add(node)
        return heads

    def _find_gates(self) -> set[fx.Node]:
        gated: set[fx.Node] = set()
        for node in reversed(self.nodes):
            users = [u for u in node.users if u.op == "output" or u.users]
            if users and all(u in gated or self._is_gate(u, node) for u in users):
                gated.add(node)
        return gated

    def _is_gate(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether this node squashes ``value`` and all its readers multiply another one by it."""
        squashing = self.name[node] in ops.GATES or (
            self.name[node] in ("hardtanh", "relu6", "clamp") and self._six(node)
        )
        if not squashing:
            return False
        pending, products = [node], 0
        while pending:
            current = pending.pop()
            for user in current.users:
                name = self.name[user]
                others = [s for s in ops.sources(user) if s is not current]
                if name in ops.VIEWS or name in ops.DROPOUTS:
                    pending.append(user)
                elif name in _AFFINE and all(o in self.static for o in others):
                    pending.append(user)  # relu6(x + 3) / 6, 1 + sigmoid(x), 1 - sigmoid(x)
                elif name == "mul" or name in ops.PRODUCTS:
                    if value in others:
                        return False  # x * sigmoid(x) is an activation
                    products += 1
                else:
                    return False
        return products > 0

    def _six(self, node: fx.Node) -> bool:
        """Whether a relu6 is the middle of a hard sigmoid: relu6(x + 3) / 6."""
        if self.name[node] != "relu6" and tuple(node.args[1:3]) not in ((0, 6), (0.0, 6.0)):
            return False
        return all(self.name[u] in ("div", "mul") for u in node.users)

    # -- norms -----------------------------------------------------------------------------------

    def _find_norms(self) -> set[fx.Node]:
        normed: set[fx.Node] = set()
        for node in self.nodes:
            name = self.name[node]
            if node in self.static:
                continue
            part = name == "getitem" and ops.first(node) in normed and node.args[1] == 0
            if name in ops.NORMS or part:
                normed.add(node)
            elif name == "mul" and any(
                s in self.static and self._scales(s) for s in ops.sources(node)
            ):
                normed.add(node)  # a frozen batch norm: x · w·rsqrt(var + eps) + shift
            elif name in ("rsqrt", "sqrt", "std"):
                normed |= self._hand_written(node)
            elif name in ("mul", "add") and any(
                s in normed and all(o in self.static for o in ops.sources(node) if o is not s)
                for s in ops.sources(node)
            ):
                normed.add(node)  # its scale and shift
        return normed

    def _scales(self, node: fx.Node) -> bool:
        """Whether a static value is one scale per channel, computed with a square root."""
        if math.prod(node.meta.get("shape") or ()) < 2:
            return False
        pending, steps = [node], 0
        while pending and steps < 16:
            current = pending.pop()
            steps += 1
            if self.name[current] in ("rsqrt", "sqrt"):
                return True
            pending.extend(ops.sources(current))
        return False

    def _hand_written(self, root: fx.Node) -> set[fx.Node]:
        """Products of a value with the inverse root of a reduction over the same value."""
        behind: set[fx.Node] = set()
        pending, reduced = [root], self.name[root] == "std"
        while pending and len(behind) < 24:
            current = pending.pop()
            for source in ops.sources(current):
                name = self.name[source]
                if source in behind or source in self.static:
                    continue
                behind.add(source)
                if name in ops.REDUCTIONS:
                    reduced = True
                if name in _STATISTIC_STEPS:
                    pending.append(source)
        if not reduced:
            return set()
        products: set[fx.Node] = set()
        pending = [root]
        while pending:
            current = pending.pop()
            for user in current.users:
                others = [s for s in ops.sources(user) if s is not current]
                name = self.name[user]
                if name in ("mul", "div") and any(self._near(o, behind) for o in others):
                    products.add(user)
                elif (name in ops.VIEWS or name in _AFTER_ROOT) and all(
                    o in self.static for o in others
                ):
                    pending.append(user)
        return products

    def _near(self, node: fx.Node, behind: set[fx.Node]) -> bool:
        """Whether a value, or what it is the centred form of, is among ``behind``."""
        while node not in behind:
            source = ops.first(node)
            if source is None or self.name[node] not in ("sub", "to", "_to_copy"):
                return False
            node = source
        return True

    # -- attention -------------------------------------------------------------------------------

    def _find_attention(self) -> set[fx.Node]:
        projections: set[fx.Node] = set()
        results: list[fx.Node] = []
        weights: set[fx.Node] = set()
        operands: list[fx.Node] = []
        for node in self.nodes:
            name, reads = self.name[node], ops.sources(node)
            if name in ops.ATTENTION:
                operands += reads[:3]
                results.append(node)
            elif name in ("softmax", "_softmax"):
                if (scores := self._scores(node)) is not None:
                    weights.add(node)
                    operands += ops.sources(scores)
            elif name in ops.PRODUCTS and any(s in weights for s in reads):
                operands += [s for s in reads if s not in weights]
                results.append(node)
            elif any(s in weights for s in reads) and (name in ops.VIEWS | ops.DROPOUTS):
                weights.add(node)
        for operand in operands:
            found = self._projection_behind(operand)
            if found is not None:
                projections.add(found)
        pending, seen = list(results), set(results)
        while pending:
            for user in pending.pop().users:
                if user in seen:
                    continue
                seen.add(user)
                if user in self.weighted:
                    projections.add(user)
                elif self.name[user] in _AFTER_ATTENTION:
                    pending.append(user)
        return projections

    def _scores(self, softmax: fx.Node) -> fx.Node | None:
        """The product of queries and keys that a softmax is taken of."""
        node = ops.first(softmax)
        while node is not None and self.name[node] not in ops.PRODUCTS:
            if self.name[node] not in _BEFORE_SOFTMAX:
                return None
            node = ops.first(node)
        return None if node is None or node in self.weighted else node

    def _projection_behind(self, node: fx.Node, depth: int = 32) -> fx.Node | None:
        """The one weighted operator a query, key or value comes from."""
        if node in self.weighted:
            return node
        if depth == 0 or node in self.static or node.op != "call_function":
            return None
        if not (self.name[node] in _BESIDE_ATTENTION or node in self.normed):
            return None
        reads = [s for s in ops.sources(node) if s not in self.static]
        found = {self._projection_behind(s, depth - 1) for s in reads}
        return found.pop() if len(found) == 1 else None


_AFFINE = frozenset({"mul", "div", "add", "sub", "rsub"})
_AFTER_ROOT = frozenset({"add", "reciprocal", "clamp", "clamp_min"})
_STATISTIC_STEPS = ops.REDUCTIONS | ops.VIEWS | {"add", "pow", "square", "mul", "sub", "clamp"}
_BEFORE_SOFTMAX = ops.VIEWS | {"add", "sub", "mul", "div", "masked_fill", "where", "add_"}
_BESIDE_ATTENTION = ops.VIEWS | ops.DROPOUTS | {"mul", "div", "add", "cat", "stack", "neg", "sub"}
_AFTER_ATTENTION = ops.VIEWS | ops.DROPOUTS | ops.NORMS | ops.ACTIVATIONS | {"getitem"}
