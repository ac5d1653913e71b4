"""One step of a fold, all or nothing: what layers would become, checked before it is written."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from bnify import ops
from bnify.algebra import Affine, identity_kernel, scaled
from bnify.changes import Change, Scaled
from bnify.folding.draft import Draft
from bnify.folding.layers import Layer, check_bake
from bnify.folding.refusal import Refused
from bnify.reason import Reason


@dataclass(frozen=True, slots=True)
class Proposal:
    """What one layer would become.

    Attributes:
        layer: The layer.
        out: Factor of each output channel.
        inp: Factor of each input channel.
        bias: The new bias; None while it is as it was.
        tap: What is added to the weight to pass the layer's own input on, by channel.
        rows: For an embedding, the new table.
    """

    layer: Layer
    out: Tensor | None = None
    inp: Tensor | None = None
    bias: Tensor | None = None
    tap: Tensor | None = None
    table: Tensor | None = None


@dataclass
class Transaction:
    """The changes of one step, before they are made.

    Attributes:
        draft: The recording.
        fence: Operators that go in this step: no other map may pass through them.
        proposals: What layers would become, by operator.
        tensors: New values of other tensors, with the operator that reads them.
        padding: New constants of padding operators.
    """

    draft: Draft
    fence: frozenset[fx.Node] = frozenset()
    proposals: dict[fx.Node, Proposal] = field(default_factory=dict)
    tensors: dict[fx.Node, tuple[fx.Node, Tensor]] = field(default_factory=dict)
    padding: dict[fx.Node, float] = field(default_factory=dict)

    def branch(self) -> Transaction:
        """A copy to try something on."""
        return Transaction(
            self.draft,
            self.fence,
            dict(self.proposals),
            dict(self.tensors),
            dict(self.padding),
        )

    def adopt(self, tried: Transaction) -> None:
        """Take over what was tried on a copy."""
        self.proposals, self.tensors = tried.proposals, tried.tensors
        self.padding = tried.padding

    def proposal(self, layer: Layer) -> Proposal:
        """What the layer would become by now."""
        return self.proposals.get(layer.node) or Proposal(layer)

    def bias(self, layer: Layer) -> Tensor | None:
        """The layer's bias by now, float64, (output channels,)."""
        proposed = self.proposal(layer).bias
        if proposed is not None:
            return proposed
        return None if layer.bias is None else self.draft.value(layer.bias).reshape(-1)

    def scale_outputs(self, layer: Layer, affine: Affine) -> None:
        """Let the layer give ``scale·y + shift`` for y; exact for every linear layer."""
        was = self.proposal(layer)
        bias = self.bias(layer)
        changed = affine.shift if bias is None else affine.scale * bias + affine.shift
        moves = bias is not None or bool(affine.shift.any())
        self.proposals[layer.node] = replace(
            was,
            out=affine.scale if was.out is None else was.out * affine.scale,
            tap=None if was.tap is None else was.tap * affine.scale,
            bias=changed if moves else was.bias,
        )

    def scale_inputs(self, layer: Layer, affine: Affine, gained: Tensor | None) -> None:
        """Let the layer take x for ``scale·x + shift``; ``gained`` is what the shift amounts to."""
        was = self.proposal(layer)
        bias = self.bias(layer)
        if gained is not None:
            bias = gained if bias is None else bias + gained
        self.proposals[layer.node] = replace(
            was,
            inp=affine.scale if was.inp is None else was.inp * affine.scale,
            tap=None if was.tap is None else was.tap * affine.scale,
            bias=bias if gained is not None else was.bias,
        )

    def add_tap(self, layer: Layer, scale: Tensor) -> None:
        """Let the layer add ``scale·x`` of its own input to its result."""
        was = self.proposal(layer)
        self.proposals[layer.node] = replace(was, tap=scale if was.tap is None else was.tap + scale)

    def set_table(self, layer: Layer, table: Tensor) -> None:
        """Give an embedding other rows."""
        self.proposals[layer.node] = replace(self.proposal(layer), table=table)

    def give(self, node: fx.Node, reader: fx.Node, value: Tensor) -> None:
        """Give a tensor that ``reader`` reads another value, float64."""
        self.draft.check_writable(node, [reader])
        if not node.meta["dtype"].is_floating_point:
            raise Refused(Reason.NO_ABSORBER, f"{node.target} holds no floating-point numbers")
        if node in self.tensors and not torch.equal(self.tensors[node][1], value):
            raise Refused(Reason.SHARED_LAYER, f"{node.target} would need two values")
        self.tensors[node] = (reader, value)

    def effective(self, layer: Layer) -> Tensor:
        """The layer's weight by now, with what is proposed, float64."""
        was = self.proposal(layer)
        weight = self.draft.weight(layer)

        def place(factor: Tensor | None) -> Tensor | None:
            return None if factor is None else factor.to(weight.device)

        result = scaled(weight, layer.kernel, place(was.out), place(was.inp))
        if was.tap is not None:
            result = result + identity_kernel(weight.shape, layer.kernel, place(was.tap))
        return result

    # -- in earnest ------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse the step if a tensor would be changed that others depend on.

        Raises:
            Refused: The first tensor that cannot be written.
        """
        by_weight: dict[fx.Node, list[Proposal]] = {}
        for proposal in self.proposals.values():
            layer = proposal.layer
            by_weight.setdefault(layer.source, []).append(proposal)
            if layer.why_fixed:
                raise Refused(*layer.why_fixed)
            if proposal.bias is not None and layer.bias is None and not layer.takes_bias:
                raise Refused(Reason.NO_ABSORBER, f"{layer.label} can take no bias")
        baked = [p.layer for p in self.proposals.values() if p.layer.baked]
        if baked:
            check_bake(baked)
        by_target: dict[str, list[Proposal]] = {}
        for proposal in self.proposals.values():
            by_target.setdefault(proposal.layer.target, []).append(proposal)
        if any(not _equal(same[0], other) for same in by_target.values() for other in same[1:]):
            label = next(iter(self.proposals.values())).layer.label
            raise Refused(Reason.SHARED_LAYER, f"{label} would need two weights")
        for source, proposals in by_weight.items():
            if source.op == "get_attr" and not proposals[0].layer.baked:
                readers = [step for p in proposals for step in p.layer.steps]
                self.draft.check_writable(source, readers)
        biases: dict[fx.Node, list[Proposal]] = {}
        for proposal in self.proposals.values():
            if proposal.bias is not None and proposal.layer.bias is not None:
                biases.setdefault(proposal.layer.bias, []).append(proposal)
        for node, proposals in biases.items():
            if node.op != "get_attr":
                raise Refused(
                    Reason.COMPUTED_WEIGHT, f"the bias of {proposals[0].layer.label} is computed"
                )
            self.draft.check_writable(node, [p.layer.node for p in proposals])
            if any(not _equal(proposals[0], other) for other in proposals[1:]):
                raise Refused(
                    Reason.SHARED_LAYER, f"{proposals[0].layer.label} would need two biases"
                )

    def commit(self) -> None:
        """Make the changes, in the graph and in what the model's tensors become."""
        draft = self.draft
        done: set[str] = set()
        biased: set[str] = set()
        for proposal in self.proposals.values():
            layer = proposal.layer
            if layer.target not in done:
                done.add(layer.target)
                self._write_weight(proposal)
            if layer.baked:
                self._read_baked(layer)
            if proposal.bias is not None:
                self._write_bias(proposal, biased)
        for node, (_, value) in self.tensors.items():
            draft.changes.values[str(node.target)] = value
        for node, constant in self.padding.items():
            self._write_padding(node, constant)
        draft.forget()

    def _write_weight(self, proposal: Proposal) -> None:
        layer, changes = proposal.layer, self.draft.changes
        if proposal.table is not None:
            changes.values[str(layer.source.target)] = proposal.table
            return
        if layer.name is None or layer.name in changes.values:  # viewed, baked, merged: as a whole
            changes.values[layer.target] = layer.stored(self.effective(layer))
            return
        if proposal.tap is not None:
            changes.weights[layer.name] = Scaled(layer.kernel, dense=self.effective(layer))
            return
        pending = changes.weights.get(layer.name) or Scaled(layer.kernel)
        pending.out = _times(pending.out, proposal.out)
        pending.inp = _times(pending.inp, proposal.inp)
        changes.weights[layer.name] = pending

    def _read_baked(self, layer: Layer) -> None:
        """Let the operator read the baked tensor."""
        draft = self.draft
        node = draft.attribute(layer.target, layer.weight, layer.weight.meta["shape"])
        layer.node.replace_input_with(layer.weight, node)
        path, _, leaf = layer.target.rpartition(".")
        change = Change(kind="bake", path=path, names=(leaf,))
        if change not in draft.changes.tree:
            draft.changes.tree.append(change)

    def _write_bias(self, proposal: Proposal, biased: set[str]) -> None:
        layer, draft = proposal.layer, self.draft
        bias = proposal.bias
        if bias is None:
            return
        if layer.bias is not None:
            name = str(layer.bias.target)
            draft.changes.values[name] = bias.reshape(layer.bias.meta["shape"])
            return
        name = layer.bias_name
        node = draft.attribute(name, layer.weight, (len(bias),))
        layer.set_bias(node)
        draft.changes.values[name] = bias
        if name not in biased:
            biased.add(name)
            change = Change(kind="bias", path=layer.path, shape=(len(bias),))
            if change not in draft.changes.tree:
                draft.changes.tree.append(change)

    def _write_padding(self, node: fx.Node, constant: float) -> None:
        values = list(node.args)
        position = 3 if ops.name_of(node) == "pad" else 2
        while len(values) <= position:
            values.append("constant" if len(values) == 2 and position == 3 else None)
        values[position] = constant
        node.args = tuple(values)
        path = node.meta["module"]
        self.draft.changes.tree.append(
            Change(kind="constant", path=path, values={"value": constant})
        )


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b


def _equal(a: Proposal, b: Proposal) -> bool:
    """Whether two calls of one layer would have it become the same."""
    return all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in (
            (a.out, b.out),
            (a.inp, b.inp),
            (a.bias, b.bias),
            (a.tap, b.tap),
            (a.table, b.table),
        )
    )
