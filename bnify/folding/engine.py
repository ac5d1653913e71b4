"""FOLD: one norm after the other, backwards first, then forwards, until nothing more goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from bnify.capture import Captured
from bnify.changes import Change, Changes
from bnify.folding.backward import Backward
from bnify.folding.draft import Draft
from bnify.folding.forward import Forward
from bnify.folding.merge import merge_all
from bnify.folding.options import FoldOptions
from bnify.folding.refusal import NeedsBias, Refused
from bnify.folding.slots import Slot, neutral_values, replaced_hooks, slot_of
from bnify.folding.sources import Source, by_layer, find_sources, renew
from bnify.folding.transaction import Transaction
from bnify.folding.untie import tie_again, untie_calls
from bnify.plan import Edit, Skip
from bnify.reason import Reason

aten = torch.ops.aten
BACKWARD, FORWARD, MERGE = "fold-backward", "fold-forward", "merge"


@dataclass(slots=True)
class Folded:
    """A recording with its norms folded.

    Attributes:
        graph: The rewritten recording; no GraphModule owns it.
        changes: What the model's tensors and tree become.
        edits: What was folded, in the order of execution.
        skips: What was not, and why.
        notes: What a user should know.
    """

    graph: fx.Graph
    changes: Changes
    edits: tuple[Edit, ...]
    skips: tuple[Skip, ...]
    notes: list[str] = field(default_factory=list)


def fold_graph(
    captured: Captured,
    options: FoldOptions,
    *,
    only: Mapping[str, Edit] | None = None,
    without: Mapping[str, Skip] | None = None,
) -> Folded:
    """Fold what exact algebra allows, in a copy of the recording.

    Args:
        captured: The recording of one forward pass in eval mode; it is not changed.
        options: What to fold.
        only: Fold these norms only, and in this way.
        without: Leave these norms alone.
    """
    draft = Draft(captured, as_graph=options.as_graph)
    return _Engine(draft, options, only, without or {}).run()


@dataclass(slots=True)
class _Step:
    """What one norm's fold comes to, before it is committed.

    Attributes:
        txn: The changes.
        kinds: Backward or forward, for each call.
        into: The layers that take it.
        shifts_left: The shift stays in the norm's place.
        rest: Channels for which scale and shift stay, with ``partial``.
    """

    txn: Transaction
    kinds: list[str] = field(default_factory=list)
    into: dict[str, None] = field(default_factory=dict)
    shifts_left: bool = False
    rest: Tensor | None = None


class _Engine:
    def __init__(
        self,
        draft: Draft,
        options: FoldOptions,
        only: Mapping[str, Edit] | None,
        without: Mapping[str, Skip],
    ) -> None:
        self.draft = draft
        self.options = options
        self.only = only
        self.without = without
        self.edits: dict[str, Edit] = {}
        self.refused: dict[str, tuple[Source, Refused]] = {}
        self.hooks: list[str] = []

    def run(self) -> Folded:
        sources = find_sources(self.draft, affines=self.options.affines)
        waiting = list(by_layer(sources))
        order = [calls[0].layer for calls in waiting]
        self.first = {calls[0].layer: calls[0] for calls in waiting}
        while True:
            left = self._round(waiting)
            if len(left) == len(waiting) or not left:
                waiting = left
                if not self.options.merge:
                    break
                merged = merge_all(self.draft, waiting, self.only)
                if not merged:
                    break
                for edit in merged:
                    self.edits[edit.layer] = edit
                    if edit.layer not in self.first:
                        order.append(edit.layer)
                gone = {edit.layer for edit in merged}
                waiting = [calls for calls in waiting if calls[0].layer not in gone]
                self.draft.forget()
                continue
            waiting = left
        skips = [self._skip(calls) for calls in waiting]
        graph = self.draft.graph
        graph.eliminate_dead_code()
        edits = [self.edits[layer] for layer in order if layer in self.edits]
        notes = [f"a hook on {path} sees the folded value" for path in self.hooks]
        return Folded(graph, self.draft.changes, tuple(edits), tuple(skips), notes)

    def _round(self, waiting: list[list[Source]]) -> list[list[Source]]:
        """Try every norm once; what is left."""
        left = []
        for calls in waiting:
            try:
                self._fold(calls)
            except Refused as refused:
                self.refused[calls[0].layer] = (calls[0], refused)
                left.append(calls)
        return left

    def _fold(self, calls: list[Source]) -> None:
        """Fold all calls of one norm, or refuse.

        Raises:
            Refused: One of them cannot be folded.
        """
        layer = calls[0].layer
        if layer in self.without:
            skip = self.without[layer]
            raise Refused(skip.reason, skip.detail)
        for source in calls:
            if source.reason is None:
                renew(self.draft, source)  # another norm may have gone into this one
            if source.reason is not None:
                raise Refused(source.reason, source.detail)
        if self.only is not None and layer not in self.only:
            raise Refused(Reason.NOT_PLANNED)
        wanted = self.only[layer].kind if self.only is not None else None
        if wanted == MERGE:
            raise Refused(Reason.NOT_PLANNED)
        slot = slot_of(self.draft, calls)
        try:
            step = self._untied(calls, slot, wanted)
        except Refused as refused:
            if not self.options.partial or len(calls) > 1 or calls[0].tail:
                raise
            step = self._partial(calls[0], slot, refused)
        step.txn.commit()
        self._finish(calls, slot, step)

    def _untied(self, calls: list[Source], slot: Slot, wanted: str | None) -> _Step:
        """The step; with ``untie``, where a layer is shared, with a weight of its own for each call.

        Raises:
            Refused: It cannot be done.
        """
        try:
            return self._step(calls, slot, wanted)
        except Refused as refused:
            shared = refused.reason in (Reason.SHARED_LAYER, Reason.TIED_WEIGHTS)
            if not (shared and self.options.untie and self.options.as_graph):
                raise
        undo = untie_calls(self.draft, calls)
        try:
            return self._step(calls, slot, wanted)
        except Refused:
            tie_again(self.draft, undo)
            raise

    def _step(self, calls: list[Source], slot: Slot, wanted: str | None) -> _Step:
        """All calls at once, each backwards or forwards.

        The calls of one norm may go into one layer, each with a call of its own (Siamese
        networks): they are checked together first, then one by one.

        Raises:
            Refused: One of them cannot be folded.
        """
        together = (True, False) if len(calls) > 1 else (False,)
        leaves = (False, True) if not calls[0].tail and self._holds_shift(calls, slot) else (False,)
        refusals: list[Refused] = []
        for leave_shift in leaves:
            for alike in together:
                try:
                    return self._calls(calls, slot, wanted, leave_shift=leave_shift, alike=alike)
                except Refused as refused:
                    refusals.append(refused)
            if not any(isinstance(refused, NeedsBias) for refused in refusals):
                break
        raise refusals[len(together) - 1]

    def _calls(
        self,
        calls: list[Source],
        slot: Slot,
        wanted: str | None,
        *,
        leave_shift: bool,
        alike: bool,
    ) -> _Step:
        step = _Step(Transaction(self.draft), shifts_left=leave_shift)
        for source in calls:
            kind, found, step.txn = self._one(
                source, step.txn, wanted, leave_shift=leave_shift, check=not alike
            )
            step.kinds.append(kind)
            step.into |= found
        step.txn.check()
        hooked = replaced_hooks(self.draft.module(slot.path)) if slot.path is not None else False
        if hooked and FORWARD in step.kinds:
            raise Refused(Reason.HOOK_ON_NORM, "it has a forward hook")
        if hooked and slot.path is not None and slot.path not in self.hooks:
            self.hooks.append(slot.path)
        return step

    def _one(
        self,
        source: Source,
        txn: Transaction,
        wanted: str | None,
        *,
        leave_shift: bool,
        check: bool,
    ) -> tuple[str, dict[str, None], Transaction]:
        """One call, backwards if that goes, else forwards."""
        flow = source.flow
        if flow is None:  # it has been refused for that
            raise Refused(Reason.BAD_STATISTICS)
        refusals: list[Refused] = []
        if not source.tail and wanted in (None, BACKWARD):
            tried = Backward(txn.branch())
            reader = source.steps[0]
            try:
                tried.push(source.value, reader, flow.without_shift() if leave_shift else flow)
                if check:
                    tried.txn.check()
                self._check_inplace(source)
                return BACKWARD, tried.into, tried.txn
            except Refused as refused:
                refusals.append(refused)
        if wanted in (None, FORWARD) and not leave_shift:
            shared = source.tail or self._is_shared(source)
            ahead = Forward(txn.branch(), shared=shared)
            try:
                ahead.push(source.result, flow)
                if check:
                    ahead.txn.check()
                return FORWARD, ahead.into, ahead.txn
            except Refused as refused:
                refusals.append(refused)
        if not refusals:
            raise Refused(Reason.NOT_PLANNED)
        raise _told(refusals)

    def _partial(self, source: Source, slot: Slot, refused: Refused) -> _Step:
        """Fold what some inputs of a concatenation can take; the rest stays in the norm's place.

        Raises:
            Refused: None of them can take anything.
        """
        flow = source.flow
        tensors = {"weight", "bias"} <= set(source.tensors)
        if flow is None or not (slot.path is not None or self.options.as_graph or tensors):
            raise refused
        tried = Backward(Transaction(self.draft), whole=flow.affine)
        try:
            tried.push(source.value, source.steps[0], flow)
            tried.txn.check()
        except Refused:
            raise refused from None
        if tried.rest is None:
            raise refused
        return _Step(tried.txn, [BACKWARD], tried.into, rest=tried.rest)

    def _check_inplace(self, source: Source) -> None:
        """Refuse if what follows writes into the norm's result, which would be a parameter then.

        Raises:
            Refused: It would.
        """
        if source.result.meta.get("overwritten") and self._is_shared(source):
            raise Refused(
                Reason.ANOTHER_CONSUMER, "what follows the norm writes into its result in place"
            )

    def _is_shared(self, source: Source) -> bool:
        """Whether anybody else can see the memory of the norm's input."""
        return len(self.draft.readers(source.value)) > 1 or self.draft.is_foreign(source.value)

    def _holds_shift(self, calls: list[Source], slot: Slot) -> bool:
        """Whether the place of the norm can keep one addition."""
        return slot.path is not None or self.options.as_graph or "bias" in calls[0].tensors

    def _finish(self, calls: list[Source], slot: Slot, step: _Step) -> None:
        """Take the norm out of the graph, and say what the tree has in its place."""
        draft, first = self.draft, calls[0]
        details = ["shift left"] if step.shifts_left else []
        if step.rest is not None:
            folded = int((~step.rest).sum())
            details.append(f"{folded} of {first.channels} channels, the rest stays")
        for node in first.tensors.values():  # what went into them before goes with them
            draft.changes.values.pop(str(node.target), None)
        left = self._left(first, step)
        for source in calls:
            if source.tail:
                self._drop_tail(source)
                continue
            kept = self._beside(source, slot, left) if left else source.value
            draft.drop(source.result, kept)
            draft.gone.update(source.steps)
        if first.tail:
            self._change_tail(first)
            details.append("scale and shift")
        elif slot.path is not None:
            kind = "children" if slot.children else "identity"
            if left:
                kind = "affine" if "scale" in left else "shift"
            shape = self._constant_shape(first) if left else ()
            draft.changes.tree.append(
                Change(kind=kind, path=slot.path, names=slot.children, shape=shape)
            )
        elif not draft.as_graph:
            self._neutralise(first, left)
            details.append("written out in a forward, where it does nothing now")
        draft.forget()
        flow = first.flow
        self.edits[first.layer] = Edit(
            layer=first.layer,
            kind=BACKWARD if BACKWARD in step.kinds else FORWARD,
            norm=first.kind,
            channels=first.channels,
            axis=(flow.axis if flow is not None and flow.axis is not None else 1),
            dims=len(first.result.meta["shape"]),
            calls=len(calls),
            into=tuple(step.into),
            detail="; ".join(details),
            layer_type=_type_name(draft, first),
        )

    def _left(self, source: Source, step: _Step) -> dict[str, Tensor]:
        """The constants that stay in the norm's place: a shift, or scale and shift by channel."""
        if source.flow is None or (not step.shifts_left and step.rest is None):
            return {}
        affine = source.flow.affine
        if step.rest is None:
            return {"shift": affine.shift}
        one, zero = torch.ones_like(affine.scale), torch.zeros_like(affine.shift)
        return {
            "scale": torch.where(step.rest, affine.scale, one),
            "shift": torch.where(step.rest, affine.shift, zero),
        }

    def _neutralise(self, source: Source, left: Mapping[str, Tensor]) -> None:
        """Let a norm that is written out in a forward do nothing, or only what is left."""
        tensors = source.tensors
        for node, value in neutral_values(self.draft, source).items():
            if node is tensors.get("bias") and "shift" in left:
                value = left["shift"].reshape(value.shape)
            if node is tensors.get("weight") and "scale" in left:
                value = value * left["scale"].reshape(value.shape)
            self.draft.changes.values[str(node.target)] = value

    def _constant_shape(self, source: Source) -> tuple[int, ...]:
        dims = len(source.result.meta["shape"])
        axis = source.flow.axis if source.flow is not None and source.flow.axis is not None else 1
        return (source.channels, *[1] * (dims - 1 - axis))

    def _beside(self, source: Source, slot: Slot, left: Mapping[str, Tensor]) -> fx.Node:
        """The operators that stay in the norm's place, in the graph."""
        draft, node = self.draft, source.value
        inner = ".affine" if "scale" in left else ".shift"
        place = f"{slot.path}{inner if slot.children else ''}" if slot.path else ""
        shape = self._constant_shape(source)
        for role, target in (("scale", aten.mul.Tensor), ("shift", aten.add.Tensor)):
            if role not in left:
                continue
            name = f"{place}.{role}" if place else f"{source.layer}_{role}"
            constant = draft.attribute(name, source.result, shape)
            draft.changes.values[name] = left[role].view(shape)
            if not place:
                draft.changes.graph_only.add(name)
            with draft.graph.inserting_before(source.result):
                node = draft.graph.call_function(target, (node, constant))
            node.meta.update(source.result.meta)
            draft.order[node] = draft.order[source.result]
        return node

    def _drop_tail(self, source: Source) -> None:
        """The norm without scale and shift."""
        node = source.steps[0]
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        args = list(node.args)
        for role in ("weight", "bias"):
            if role in names and names.index(role) < len(args):
                args[names.index(role)] = None
        node.args = tuple(args)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")}

    def _change_tail(self, source: Source) -> None:
        """Scale and shift of a norm are None where torch's own class takes that, else 1 and 0."""
        draft = self.draft
        if draft.as_graph:
            return
        path = source.module
        names = [str(node.target) for node in source.tensors.values()]
        parent = draft.module(path.rpartition(".")[0])
        plain = type(draft.module(path)) in (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
        # The fused path of this layer reads the tensors itself.
        fused = isinstance(parent, nn.TransformerEncoderLayer)
        if plain and not fused and all(name.rpartition(".")[0] == path for name in names):
            leaves = tuple(name.rpartition(".")[2] for name in names)
            draft.changes.tree.append(Change(kind="none", path=path, names=leaves))
            return
        for role, node in source.tensors.items():
            like = draft.value(node)
            neutral = torch.ones_like(like) if role == "weight" else torch.zeros_like(like)
            draft.changes.values[str(node.target)] = neutral

    # -- what stays ------------------------------------------------------------------------------

    def _skip(self, calls: list[Source]) -> Skip:
        source = calls[0]
        _, refused = self.refused[source.layer]
        return Skip(
            layer=source.layer,
            reason=refused.reason,
            detail=refused.detail,
            layer_type=_type_name(self.draft, source),
        )


def _type_name(draft: Draft, source: Source) -> str:
    module = draft.module(source.layer)
    return type(module).__name__ if module is not None and source.layer else ""


_VAGUE = (Reason.NONLINEARITY_BETWEEN, Reason.NO_ABSORBER)


def _told(refusals: list[Refused]) -> Refused:
    """One refusal for both directions: the one that says most, with both details."""
    if len(refusals) == 1:
        return refusals[0]
    back, ahead = refusals
    chosen = back
    if (back.reason in _VAGUE and ahead.reason not in (*_VAGUE, Reason.VALUE_IS_OUTPUT)) or (back.reason is Reason.NO_ABSORBER and ahead.reason is Reason.NONLINEARITY_BETWEEN):
        chosen = ahead
    before = f"before it: {back.detail}" if back.detail else ""
    after = f"after it: {ahead.detail}" if ahead.detail else ""
    if isinstance(back, NeedsBias):
        return NeedsBias(chosen.reason, "; ".join(filter(None, (before, after))))
    return Refused(chosen.reason, "; ".join(filter(None, (before, after))))
