"""FOLD: one norm after the other, backwards first, then forwards, until nothing more goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from bnify import ops
from bnify.capture import Captured
from bnify.changes import Changes
from bnify.folding.arguments import arguments
from bnify.folding.backward import Backward
from bnify.folding.draft import Draft
from bnify.folding.forward import Forward
from bnify.folding.merge import merge_all
from bnify.folding.options import FoldOptions
from bnify.folding.refusal import NeedsBias, Refused
from bnify.folding.removal import (
    BACKWARD,
    FORWARD,
    Step,
    remove,
    stays_with_ones,
    type_name,
)
from bnify.folding.slots import Slot, slot_of
from bnify.folding.sources import Source, by_layer, find_sources, renew
from bnify.folding.transaction import Transaction
from bnify.folding.untie import tie_again, untie_calls
from bnify.plan import Edit, Skip
from bnify.reason import Reason

MERGE = "merge"


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
        graph.eliminate_dead_code(_has_effects)
        edits = [self.edits[layer] for layer in order if layer in self.edits]
        notes = [f"the hooks on {path} are on what stands in its place" for path in self.hooks]
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
        if len(calls) > 1:  # some may go backwards, others forwards
            wanted = None
        slot = slot_of(self.draft, calls)
        self._check_does_something(calls, slot)
        try:
            step = self._hooked(calls, slot, wanted)
        except Refused as refused:
            if not self.options.partial or len(calls) > 1 or calls[0].tail:
                raise
            step = self._partial(calls[0], slot, refused)
        step.txn.commit()
        self.edits[layer] = remove(self.draft, calls, slot, step)

    def _check_does_something(self, calls: list[Source], slot: Slot) -> None:
        """Refuse what stays in a forward and does nothing already.

        Raises:
            Refused: It does nothing.
        """
        source = calls[0]
        flow = source.flow
        if self.options.as_graph or slot.path is not None or flow is None:
            return
        if source.tail and not stays_with_ones(self.draft, source):
            return
        off = (flow.affine.scale - 1).abs().max() + flow.affine.shift.abs().max()
        if float(off) < 1e-6:
            raise Refused(Reason.IN_FORWARD, "it does nothing already")

    def _hooked(self, calls: list[Source], slot: Slot, wanted: str | None) -> Step:
        """The step; in the direction in which hooks on the norm see what they saw before.

        Raises:
            Refused: It cannot be done, or not without showing a hook other values.
        """
        module = self.draft.module(slot.path) if slot.path is not None else None
        looks = {
            BACKWARD: module is not None and bool(module._forward_hooks),
            FORWARD: module is not None and bool(module._forward_pre_hooks),
        }
        if module is None or not any(looks.values()):
            return self._untied(calls, slot, wanted)
        allowed = [kind for kind, hooked in looks.items() if hooked]
        if len(allowed) == 1 and wanted in (None, *allowed):
            try:
                step = self._untied(calls, slot, allowed[0])
            except Refused:
                pass  # for the hook, or anyway?
            else:
                self.hooks.append(slot.path or "")
                return step
        self._untied(calls, slot, wanted)
        raise Refused(Reason.HOOK_ON_NORM, "it would be given or give another value")

    def _untied(self, calls: list[Source], slot: Slot, wanted: str | None) -> Step:
        """The step; with ``untie``, and a shared layer, with a weight of its own for each call.

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

    def _step(self, calls: list[Source], slot: Slot, wanted: str | None) -> Step:
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
                    return self._calls(calls, wanted, leave_shift=leave_shift, alike=alike)
                except Refused as refused:
                    refusals.append(refused)
            if not any(isinstance(refused, NeedsBias) for refused in refusals):
                break
        raise refusals[len(together) - 1]

    def _calls(
        self,
        calls: list[Source],
        wanted: str | None,
        *,
        leave_shift: bool,
        alike: bool,
    ) -> Step:
        fence = frozenset(node for source in calls for node in source.steps)
        step = Step(Transaction(self.draft, fence), shifts_left=leave_shift)
        for source in calls:
            kind, found, step.txn = self._one(
                source, step.txn, wanted, leave_shift=leave_shift, check=not alike
            )
            step.kinds.append(kind)
            step.into |= found
        step.txn.check()
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
                if not source.tail and self._is_overwritten(source.value):
                    raise Refused(
                        Reason.ANOTHER_CONSUMER, "the norm's input is written to later, in place"
                    )
                ahead.push(source.result, flow)
                if check:
                    ahead.txn.check()
                return FORWARD, ahead.into, ahead.txn
            except Refused as refused:
                refusals.append(refused)
        if not refusals:
            raise Refused(Reason.NOT_PLANNED)
        raise _told(refusals)

    def _partial(self, source: Source, slot: Slot, refused: Refused) -> Step:
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
        return Step(tried.txn, [BACKWARD], tried.into, rest=tried.rest)

    def _check_inplace(self, source: Source) -> None:
        """Refuse if what follows writes into the norm's result, which would be a parameter then.

        Raises:
            Refused: It would.
        """
        if source.result.meta.get("overwritten") and self._is_shared(source):
            raise Refused(
                Reason.ANOTHER_CONSUMER, "what follows the norm writes into its result in place"
            )

    def _is_overwritten(self, value: fx.Node) -> bool:
        """Whether somebody writes to the memory of a value, which the norm's result would be."""
        return value.meta.get("overwritten", False) or (
            value.meta.get("alias") in self.draft.overwritten
        )

    def _is_shared(self, source: Source) -> bool:
        """Whether anybody else can see the memory of the norm's input."""
        draft = self.draft
        return draft.is_foreign(source.value) or draft.is_seen_elsewhere(source.value, source.steps)

    def _holds_shift(self, calls: list[Source], slot: Slot) -> bool:
        """Whether the place of the norm can keep one addition."""
        return slot.path is not None or self.options.as_graph or "bias" in calls[0].tensors

    # -- what stays ------------------------------------------------------------------------------

    def _skip(self, calls: list[Source]) -> Skip:
        source = calls[0]
        _, refused = self.refused[source.layer]
        return Skip(
            layer=source.layer,
            reason=refused.reason,
            detail=refused.detail,
            layer_type=type_name(self.draft, source),
        )


_VAGUE = (Reason.NONLINEARITY_BETWEEN, Reason.NO_ABSORBER)


def _told(refusals: list[Refused]) -> Refused:
    """One refusal for both directions: the one that says most, with both details."""
    if len(refusals) == 1:
        return refusals[0]
    back, ahead = refusals
    chosen = back
    if (back.reason in _VAGUE and ahead.reason not in (*_VAGUE, Reason.VALUE_IS_OUTPUT)) or (
        back.reason is Reason.NO_ABSORBER and ahead.reason is Reason.NONLINEARITY_BETWEEN
    ):
        chosen = ahead
    before = f"before it: {back.detail}" if back.detail else ""
    after = f"after it: {ahead.detail}" if ahead.detail else ""
    if isinstance(back, NeedsBias):
        return NeedsBias(chosen.reason, "; ".join(filter(None, (before, after))))
    return Refused(chosen.reason, "; ".join(filter(None, (before, after))))


def _has_effects(node: fx.Node) -> bool:
    """Whether an operator stays though nobody reads it; dropout draws nothing in eval mode."""
    if ops.name_of(node) in ops.DROPOUTS and not arguments(node).get("train", True):
        return False
    return node.is_impure()
