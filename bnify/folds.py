"""The straight line of a fold: capture, fold, rewrite, verify."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from bnify.borrow import copy_model, sharing_copy
from bnify.capture import Captured, free_batch, record_example
from bnify.changes import Change
from bnify.errors import PlanError, VerificationError
from bnify.fingerprint import fingerprint
from bnify.folding import Folded, FoldOptions, fold_graph, separable
from bnify.optional import drop_optional
from bnify.plan import Edit, Plan, Skip
from bnify.reason import Reason
from bnify.refold import Refolded
from bnify.result import Result
from bnify.rewrite import (
    check_fingerprint,
    fold_tree,
    folded_copy,
    folded_module,
    restructure,
)
from bnify.structure import Call, describe
from bnify.verdict import Verification
from bnify.verification.folding import unchanged, verify_fold
from bnify.verification.refolds import Delivered

#: How often a fold that fails its verification is undone in part and tried again.
_ROUNDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """What a fold is to be like beyond its plan."""

    inplace: bool = False
    verify: bool = True
    say: Callable[[str], None] = lambda _: None


def plan_fold(model: nn.Module, call: Call, options: FoldOptions) -> Plan:
    """What a fold with these options does; nothing is changed."""
    captured = record_example(_Work(model, options).model, call, borrow=True)
    return _plan(model, captured, options, _planned(captured, options, None))


def fold_model(
    model: nn.Module,
    call: Call,
    options: FoldOptions,
    plan: Plan | None,
    how: How,
) -> Result:
    """Fold a model that has been accepted.

    Raises:
        PlanError: The plan is for another model, or one of its edits cannot be done.
        VerificationError: The result was measured and found wrong.
    """
    if plan is not None:
        check_fingerprint(model, plan)
        options = FoldOptions.of(plan)
        options.check(inplace=how.inplace)
    how.say("recording")
    work = _Work(model, options)
    captured = record_example(work.model, call, borrow=True)
    how.say("folding")
    folded = _planned(captured, options, plan)
    verification = delivered = None
    if how.verify:
        how.say("verifying")
        folded, verification, delivered = _verified(work, captured, folded, how)
    made = _plan(model, captured, options, folded)
    if model.training:
        made = made.with_notes("the model came in train mode; the folded one is in eval mode")
    return _deliver(work, captured, folded, made, verification, how, delivered)


def check_fold(model: nn.Module, call: Call, plan: Plan) -> None:
    """Refuse a plan that cannot be carried out on this model.

    Raises:
        PlanError: The plan is for another model, or one of its edits cannot be done.
    """
    check_fingerprint(model, plan)
    options = FoldOptions.of(plan)
    captured = record_example(_Work(model, options).model, call, borrow=True)
    _planned(captured, options, plan)


class _Work:
    """What is folded: the user's model, or with ``untie`` one whose shared modules are apart.

    Args:
        model: The user's model; it is not touched.
        options: What is to be folded.

    Attributes:
        model: What is recorded and folded.
        original: The user's model.
        first: Changes that make the one of the other.
    """

    def __init__(self, model: nn.Module, options: FoldOptions) -> None:
        self.original = self.model = model
        self.options = options
        self.first: tuple[Change, ...] = ()
        if options.untie and not options.as_graph:
            self.first = tuple(separable(model))
        if self.first:
            self.model = restructure(sharing_copy(model), self.first)


# -- the stages -----------------------------------------------------------------------------------


def _planned(captured: Captured, options: FoldOptions, plan: Plan | None) -> Folded:
    """Fold as a plan says, or what can be.

    Raises:
        PlanError: An edit of the plan cannot be done.
    """
    if plan is None:
        return drop_optional(captured, fold_graph(captured, options))
    folded = fold_graph(captured, options, only={edit.layer: edit for edit in plan.edits})
    check_same(plan.edits, folded)
    return drop_optional(captured, folded)


def check_same(edits: tuple[Edit, ...], folded: Folded) -> None:
    """Refuse if a fold is not the one that was planned.

    Raises:
        PlanError: The first edit that differs, with the reason.
    """
    found = {edit.layer: edit for edit in folded.edits}
    left = {skip.layer: skip for skip in folded.skips}
    for edit in edits:
        got = found.get(edit.layer)
        if got is not None and (got.kind, got.into) == (edit.kind, edit.into):
            continue
        why = "the forward pass runs no such norm"
        if got is not None:
            why = f"it would go by {got.kind} into {', '.join(got.into)}"
        elif edit.layer in left:
            skip = left[edit.layer]
            why = ": ".join(filter(None, (skip.reason.sentence, skip.detail)))
        raise PlanError(
            f"the plan's edit of {edit.layer or 'the root'} cannot be done: {why}",
            hint="take the edit out of the plan, or make the plan again",
        )


def _plan(model: nn.Module, captured: Captured, options: FoldOptions, folded: Folded) -> Plan:
    skeleton, specs = describe(captured.call, model)
    return Plan(
        verb="fold",
        edits=folded.edits,
        skips=folded.skips,
        fingerprint=fingerprint(model),
        call=skeleton,
        inputs=specs,
        options=options.to_dict(),
        notes=(*captured.notes, *folded.notes, *_never_ran(captured, folded)),
    )


def _never_ran(captured: Captured, folded: Folded) -> list[str]:
    """A note on norms that the example did not run: it took one of several paths."""
    called = {id(captured.model.get_submodule(call.path)) for call in captured.calls}
    idle = [
        path
        for path, module in captured.model.named_modules()
        if isinstance(getattr(module, "running_mean", None), Tensor) and id(module) not in called
    ]
    if not idle or not folded.edits:
        return []
    named = ", ".join(idle[:3]) + (", ..." if len(idle) > 3 else "")
    return [f"{named} never ran: a call that runs them may need folded layers as they were"]


def _verified(
    work: _Work, captured: Captured, folded: Folded, how: How
) -> tuple[Folded, Verification, nn.Module]:
    """Measure a fold; what fails is undone, reported and measured again.

    Raises:
        VerificationError: What is left fails too.
    """
    undone: dict[str, Skip] = {}
    for _ in range(_ROUNDS):
        verification, delivered = _measure(work, captured, folded)
        if verification.passed:
            return folded, verification, delivered
        if not _says_what_fails(verification):
            break
        guilty = _guilty(work, captured, folded)
        if not guilty:
            break
        how.say(f"undoing {len(guilty)} folds that fail")
        undone |= guilty
        wanted = {e.layer: e for e in folded.edits if e.layer not in undone}
        fewer = fold_graph(captured, work.options, only=wanted, without=undone)
        folded = drop_optional(captured, fewer)
    raise _failed(work, captured, folded, verification)


def _says_what_fails(verification: Verification) -> bool:
    """Whether a fold was found wrong, and not merely impossible to judge."""
    wrong = any(
        check.passed is False and (check.error is not None or "raised" in check.detail)
        for check in verification.checks
    )
    judged = any(c.passed and c.name.startswith("result = original") for c in verification.checks)
    return wrong or (judged and any(not output.passed for output in verification.outputs))


def _measure(work: _Work, captured: Captured, folded: Folded) -> tuple[Verification, nn.Module]:
    """The verdict on one fold, and what was measured.

    It is measured on float64 copies, and in the model's own dtype as it will be handed out.
    """
    model, options = work.model, work.options
    if not folded.edits:
        return unchanged(), copy_model(model).eval()
    if options.as_graph:
        delivered: nn.Module = folded_module(captured, folded.graph, folded.changes)
    else:
        delivered = folded_copy(model, folded.changes)

    def graph() -> fx.GraphModule:
        # A forward may write to its buffers: not to those that will be handed out.
        writes = any(node.meta.get("writes") for node in folded.graph.nodes)
        beside = sharing_copy(delivered) if writes else delivered
        return folded_module(captured, folded.graph, folded.changes, beside, own=False)

    verdict = verify_fold(Refolded(captured, options, folded), Delivered(delivered, graph))
    return verdict, delivered


def _guilty(work: _Work, captured: Captured, folded: Folded) -> dict[str, Skip]:
    """The edits that fail by themselves, found by halving."""

    def fails(edits: tuple[Edit, ...]) -> bool:
        wanted = {edit.layer: edit for edit in edits}
        some = drop_optional(captured, fold_graph(captured, work.options, only=wanted))
        return not _measure(work, captured, some)[0].passed

    def search(edits: tuple[Edit, ...]) -> list[Edit]:
        if not fails(edits):
            return []
        if len(edits) == 1:
            return list(edits)
        middle = len(edits) // 2
        return search(edits[:middle]) + search(edits[middle:])

    found = search(folded.edits)
    return {
        edit.layer: Skip(
            layer=edit.layer,
            reason=Reason.VERIFICATION_FAILED,
            detail=f"{edit.kind} into {', '.join(edit.into)}",
        )
        for edit in found
    }


def _failed(
    work: _Work,
    captured: Captured,
    folded: Folded,
    verification: Verification,
) -> VerificationError:
    plan = _plan(work.original, captured, work.options, folded)
    result = _deliver(work, captured, folded, plan, verification, How())
    check = next((c for c in verification.checks if c.passed is False), None)
    what = "nothing could be decided" if check is None else f"{check.name}: {check.detail}"
    if check is not None and check.error is not None and check.threshold is not None:
        what = f"{check.name}: error {check.error:.1e}, allowed {check.threshold:.0e}"
    return VerificationError(
        f"the fold was measured and found wrong ({what})",
        hint="look at the checks of error.result.verification; try other example inputs",
        result=result,
    )


def _deliver(
    work: _Work,
    captured: Captured,
    folded: Folded,
    plan: Plan,
    verification: Verification | None,
    how: How,
    delivered: nn.Module | None = None,
) -> Result:
    """The result: a folded copy, the one that was measured, or the model itself."""
    model, options = work.model, work.options
    before = str(work.original)
    if options.as_graph:
        built, notes = _with_free_batch(captured, options, folded)
        return Result(
            built,
            built,
            plan.with_notes(*notes),
            verification,
            captured.call,
            before=before,
            captured=captured,
        )
    if how.inplace:
        originals = captured.tensors()
        result_model = fold_tree(restructure(work.original, work.first), folded.changes)
    else:
        result_model = delivered or folded_copy(model, folded.changes)
    tree = (*work.first, *folded.changes.tree)

    def graph() -> fx.GraphModule:
        if how.inplace:  # the original is gone: the batch stays as it was recorded
            return folded_module(
                captured, folded.graph, folded.changes, result_model, originals=originals
            )
        return _with_free_batch(captured, options, folded, result_model)[0]

    return Result(
        result_model,
        graph,
        plan,
        verification,
        captured.call,
        before=before,
        structure=tree,
        captured=None if how.inplace else captured,  # its tensors are the folded ones now
    )


def _with_free_batch(
    captured: Captured, options: FoldOptions, folded: Folded, model: nn.Module | None = None
) -> tuple[fx.GraphModule, list[str]]:
    """The folded recording with its batch made symbolic, where that goes; else why not."""
    wanted: Mapping[str, Edit] = {edit.layer: edit for edit in folded.edits}
    notes = free_batch(captured)
    again = fold_graph(captured, options, only=wanted)
    try:
        check_same(folded.edits, again)
    except PlanError as error:
        again, notes = folded, [f"result.graph runs at the recorded batch size: {error.message}"]
    if model is not None:  # the original may have changed since
        for name in again.changes.graph_only & folded.changes.graph_only:
            again.changes.values[name] = folded.changes.values[name]
    return folded_module(captured, again.graph, again.changes, model), notes
