"""The arms of a comparison: one recipe a kind of norm, and the model that it makes.

A model without norms gets each kind by an insertion; in a model that has norms each of them is
swapped for the kind, on the same channels. Whatever is planned here was carried out once on a copy
and measured; workers then only build.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnify.borrow import copy_model, in_mode, seeded, training_possible
from bnify.capture import record_example
from bnify.comparing.own_norms import OwnNorm, own_norms
from bnify.comparing.replacement import (
    Swap,
    are_all,
    never_run,
    refusal,
    replace_norms,
    swap_for,
)
from bnify.errors import BnifyError, PlanError
from bnify.insertion import InsertOptions
from bnify.inserts import carry_out, plan_insertion
from bnify.layers import without_synchronisation
from bnify.plan import Edit, Plan
from bnify.reason import Reason
from bnify.rewrite import check_fingerprint, initial_norms, rewrite_tree
from bnify.spec.usercode import article, user_code
from bnify.structure import Call, outputs_of

#: Names in one line of reasons; the rest is counted.
_SHOWN = 4
_TWIN = "too few channels for groups, where group norm is layer norm"


@dataclass(frozen=True, kw_only=True)
class ArmPlan:
    """How to make the model of one arm out of a fresh instance; plain data.

    Attributes:
        norm: ``"none"``, ``"as-is"`` or a kind of norm.
        plan: An insertion; None where nothing is inserted.
        swaps: What becomes of the model's own norms.
        left_out: Why this arm cannot be run, one line; empty where it can.
        same_as: The arm that has the same norms, for which this one is left out; else empty.
        notes: What a reader should know of it, one sentence each.
        norms: How many norms the model has with it.
        parameters: All parameters of the model with it, shared ones counted once.
    """

    norm: str
    plan: Plan | None = None
    swaps: tuple[Swap, ...] = ()
    left_out: str = ""
    same_as: str = ""
    notes: tuple[str, ...] = ()
    norms: int = 0
    parameters: int = 0

    def build(self, model: nn.Module) -> nn.Module:
        """Edit a fresh instance in place, and return it; no random number is drawn.

        Weights keep their bits, so that arms made of equal instances share them.

        Raises:
            PlanError: The arm was left out, or the model is not the one it was planned for.
        """
        if self.left_out:
            raise PlanError(f"{self.norm} was left out: {self.left_out}")
        if self.plan is not None:
            check_fingerprint(model, self.plan)
            return rewrite_tree(model, self.plan, initial_norms(model, self.plan))
        return replace_norms(model, self.swaps)


def plan_arms(
    model: nn.Module, call: Call, norms: Sequence[str], *, batch_size: int
) -> tuple[str, tuple[ArmPlan, ...]]:
    """Plan, carry out on a copy and measure each arm; the model is not touched.

    Args:
        model: Any plain module.
        call: Example inputs.
        norms: Kinds of norm, ``"none"`` and ``"as-is"``; the reference is put first if missing.
        batch_size: Samples per step of the training.

    Returns:
        The reference, ``"as-is"`` where the model has norms of its own and ``"none"`` elsewhere,
        and the arms in order, those left out too.

    Raises:
        CaptureError: The forward pass cannot be recorded.
        SpecError: The forward pass raised.
        PlanError: The model has no norms, and no layer that could take any of those wanted.
    """
    sized = call.resized(batch_size)
    found = own_norms(model, sized)
    reference = "as-is" if any(norm.calls for norm in found) else "none"
    wanted = list(dict.fromkeys(norms))
    if reference not in wanted:
        wanted.insert(0, reference)
    planned = []
    for norm in wanted:
        if reference == "as-is":
            arm = _swapped(norm, found, model)
        elif norm in ("none", "as-is"):
            arm = _plain(norm, found)
        else:
            arm = _inserted(norm, model, call, batch_size)
        planned.append(arm if arm.left_out else _tried(arm, model, sized))
    planned = _without_twin(planned)
    if reference == "none":
        _refuse_without_sites(model, planned)
    return reference, tuple(planned)


# -- a model without norms -------------------------------------------------------------------------


def _plain(norm: str, found: Sequence[OwnNorm]) -> ArmPlan:
    if norm == "as-is":
        return ArmPlan(norm=norm, left_out="the model has no norms of its own: see none")
    return ArmPlan(norm=norm, notes=tuple(f"{n.path} stays: {n.refusal}" for n in found))


def _inserted(norm: str, model: nn.Module, call: Call, batch_size: int) -> ArmPlan:
    """An insertion that was carried out and verified."""
    options = InsertOptions(norm=norm, batch_size=batch_size)
    with training_possible():
        captured = record_example(model, call)
        try:
            with user_code(type(model).__name__):  # its forward pass may end the program
                plan = plan_insertion(captured, options, call)
            if not plan.edits:
                why = _skips(plan)
                return ArmPlan(norm=norm, plan=plan, left_out=f"no layer takes {_a(norm)}: {why}")
            with user_code(f"{type(model).__name__} with {_a(norm)}"):
                carry_out(model, call, captured, plan, None, inplace=False, verify=True)
        except BnifyError as error:
            return ArmPlan(norm=norm, left_out=error.message)
    written_out = [s for s in plan.skips if s.reason is Reason.ALREADY_NORMED]
    notes = [f"{s.layer} keeps the norm of its own: {s.detail}" for s in written_out]
    count = sum(edit.calls for edit in plan.edits)
    notes += _twin(norm, plan.edits)
    return ArmPlan(norm=norm, plan=plan, notes=(*plan.notes, *notes), norms=count)


def _skips(plan: Plan) -> str:
    if not plan.skips:
        return "it has no Linear and no Conv"
    return _grouped((skip.layer or "the root", str(skip.reason)) for skip in plan.skips)


def _refuse_without_sites(model: nn.Module, arms: Sequence[ArmPlan]) -> None:
    kinds = [arm for arm in arms if arm.norm not in ("none", "as-is")]
    barren = [_skips(arm.plan) for arm in kinds if arm.plan is not None and not arm.plan.edits]
    if kinds and len(barren) == len(kinds):
        why = "; ".join(dict.fromkeys(barren))
        raise PlanError(
            f"no norm can be put anywhere in {type(model).__name__}: {why}",
            hint="bnify insert SPEC --dry-run has more on each layer",
        )


# -- a model with norms ----------------------------------------------------------------------------


def _swapped(norm: str, found: Sequence[OwnNorm], model: nn.Module) -> ArmPlan:
    """Each norm of the model that can go becomes this kind; the others start afresh or stay."""
    free = [own for own in found if not own.refusal]
    if norm == "as-is":
        swaps = tuple(swap_for(own, norm) for own in free)
        return ArmPlan(norm=norm, swaps=swaps, notes=_remarks(found), norms=_count(found))
    if not free:
        why = _grouped((own.path or "the root", own.refusal) for own in found)
        return ArmPlan(norm=norm, left_out=f"no norm of the model can be swapped: {why}")
    if norm != "none" and are_all(free, norm):
        same = _twin(norm, [e for own in free if (e := swap_for(own, norm).edit) is not None])
        why = same[0] if same else f"the model's own norms are {norm} norms"
        return ArmPlan(norm=norm, left_out=f"{why}: see as-is", same_as="as-is")
    refusals = [(own.path, refusal(own, norm)) for own in free]
    refused = [(path, why) for path, why in refusals if why is not None]
    if len(refused) == len(free):
        return ArmPlan(norm=norm, left_out=f"{_a(norm)} can take no place: {_grouped(refused)}")
    staying = {path for path, _ in refused}
    swaps = tuple(swap_for(own, "as-is" if own.path in staying else norm) for own in free)
    notes = []
    if refused:
        notes.append(f"the model's own norm stays where {norm} norm cannot be: {_grouped(refused)}")
    bare = [path for path, m in model.named_modules() if norm == "none" and _lacks_bias(m)]
    if bare:
        notes.append(f"layers that leave their bias to a norm have none here: {_names(bare)}")
    notes += _twin(norm, [swap.edit for swap in swaps if swap.edit is not None])
    count = _count(found) - (len(free) if norm == "none" else 0)
    return ArmPlan(norm=norm, swaps=swaps, notes=tuple(notes), norms=count)


def _count(found: Sequence[OwnNorm]) -> int:
    return sum(own.calls > 0 for own in found)


def _lacks_bias(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module.bias is None


def _remarks(found: Sequence[OwnNorm]) -> tuple[str, ...]:
    """What holds for every arm of a model that has norms; told once, with its own."""
    notes = []
    zero = [own.path for own in found if own.started == "zero" and not own.refusal]
    other = [own.path for own in found if own.started == "other" and not own.refusal]
    if zero:
        notes.append(f"scales that the model starts at 0 start at 1 in every arm: {_names(zero)}")
    if other:
        notes.append(f"scales and shifts start at 1 and 0 in every arm, not as in {_names(other)}")
    staying = [(f"{own.path} ({own.type_name})", own.refusal) for own in found if own.refusal]
    if staying:
        notes.append(f"norms that stay as they are in every arm: {_grouped(staying)}")
    return tuple(notes)


# -- measuring -------------------------------------------------------------------------------------


def _tried(arm: ArmPlan, model: nn.Module, call: Call) -> ArmPlan:
    """The arm with its size, after one step in each mode on a copy; or why it cannot be run."""
    try:
        with training_possible(), seeded(0), user_code(f"{type(model).__name__} with {arm.norm}"):
            built = without_synchronisation(arm.build(copy_model(model)))
            size = sum(p.numel() for p in built.parameters())
            for train in (True, False):
                with in_mode(built, train=train):
                    _loss(call.clone()(built)).backward()  # type: ignore[no-untyped-call]
            passed_by = never_run(built, arm.swaps, call)
    except BnifyError as error:
        return replace(arm, left_out=error.message)
    if passed_by:
        return replace(arm, left_out=f"swapped norms that never run: {_names(passed_by)}")
    return replace(arm, parameters=size)


def _loss(output: Any) -> Tensor:
    """Something that a gradient flows back from."""
    floats = [t.double().mean() for _, t in outputs_of(output) if t.requires_grad]
    if not floats:
        raise PlanError("no output depends on a parameter that takes a gradient")
    return torch.stack(floats).sum()


def _without_twin(arms: Sequence[ArmPlan]) -> list[ArmPlan]:
    """Group norm that is layer norm everywhere is left out: it would be tested twice."""
    layer = {arm.norms for arm in arms if arm.norm == "layer" and not arm.left_out}
    return [
        replace(arm, left_out=f"{_TWIN}: see layer", same_as="layer", notes=())
        if not arm.left_out and _TWIN in arm.notes and arm.norms in layer
        else arm
        for arm in arms
    ]


# -- words -----------------------------------------------------------------------------------------


def _a(norm: str) -> str:
    return f"{article(norm)} {norm} norm"


def _twin(norm: str, edits: Sequence[Edit]) -> list[str]:
    """Group norm with one group everywhere is layer norm."""
    one = norm == "group" and all(e.norm == "layer" or e.groups == 1 for e in edits)
    return [_TWIN] if one and edits else []


def _names(names: Sequence[str]) -> str:
    """``"a, b, c, d and 3 more"``."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _grouped(reasons: Iterable[tuple[str, str]]) -> str:
    """``"fc1, fc2 (one-value-per-channel), fc3 (output-head)"``, in the order of the reasons."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons:
        by_reason.setdefault(reason, []).append(name)
    return ", ".join(f"{_names(names)} ({reason})" for reason, names in by_reason.items())
