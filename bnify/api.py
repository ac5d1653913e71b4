"""The straight line, one verb each: capture, plan, rewrite, verify, export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bnify.accept import accept, as_plan, example_call, refuse_inference
from bnify.borrow import training_possible
from bnify.capture import record_example
from bnify.changes import Change
from bnify.errors import PlanError, UsageError
from bnify.folding import FoldOptions
from bnify.folds import How, check_fold, fold_model, plan_fold
from bnify.insertion import InsertOptions
from bnify.inserts import carry_out, plan_insertion
from bnify.optim import check_optimizer
from bnify.plan import Plan
from bnify.result import Result
from bnify.rewrite import (
    check_edits,
    check_fingerprint,
    initial_norms,
    restructure,
    rewrite_tree,
)
from bnify.structure import Call, Inputs, as_call, device_of, draw
from bnify.verdict import Verification

if TYPE_CHECKING:
    from bnify.exporting import Export


def insert(
    model: nn.Module,
    inputs: Inputs,
    *,
    norm: str = "batch",
    position: str = "before-act",
    init: str = "reset",
    data: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    only: Sequence[str] = (),
    batch_size: int | None = None,
    eps: float | None = None,
    momentum: float | None = None,
    groups: int | None = None,
    drop_bias: bool = False,
    zero_gamma: bool = False,
    per_call: bool = False,
    skip_frozen: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    plan: Plan | Mapping[str, Any] | str | Path | None = None,
    inplace: bool = False,
    verify: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Result:
    """Put a norm after the Linear and Conv layers of a model, where one belongs.

    Args:
        model: Any plain module; it is not touched unless ``inplace``.
        inputs: Example inputs: a tensor, a tuple of positional inputs, or a dict of keywords.
        norm: ``batch``, ``batch-noaffine``, ``sync``, ``group``, ``layer``, ``instance``, ``rms``
            or ``auto`` (by the batch size).
        position: ``before-act``, or ``after-act`` where the activation is a module called once.
        init: ``reset`` starts as from scratch. ``preserve`` keeps the function in eval mode: scale
            and shift undo the running statistics, which are measured on ``data``. ``stats`` starts
            as from scratch with the statistics of ``data``, measured one norm after the other.
        data: Batches for ``preserve`` and ``stats``: an iterable of inputs, of ``(inputs, labels)``
            or of dicts; the example inputs when None. Of several ranks each passes its share,
            ``[]`` where it has none: statistics are those of all.
        include: Globs on module paths, or ``type:Conv2d``, that override the policy.
        exclude: Globs of layers to leave alone; wins over ``include``.
        only: Globs that restrict to these layers.
        batch_size: Samples per device in training; the example's by default.
        eps: ε of the norms; each kind's own by default.
        momentum: Momentum of running statistics; torch's 0.1 by default.
        groups: Number of groups of a group norm; chosen per layer by default.
        drop_bias: Fold a layer's bias, redundant before batch norm, into the running mean.
        zero_gamma: Start the norm that closes a residual branch at scale 0.
        per_call: Give each call of a layer that runs several times its own norm.
        skip_frozen: Leave layers alone whose parameters take no gradient.
        optimizer: An optimizer of this very model, which then trains the new norms too.
        plan: Carry out this plan (or its JSON data, or a file with it) instead of making one.
        inplace: Edit this model instead of a copy.
        verify: Measure the result before it is returned.
        progress: Called with a few words at each stage.

    Returns:
        The rewritten model with plan, recording and verification.

    Raises:
        UsageError: An option that cannot be right.
        PlanError: Options that contradict each other or the model; a plan for another model.
        CaptureError: The forward pass cannot be recorded.
        WeightsError: A weight is not finite.
        VerificationError: The result was measured and found wrong; the model is untouched.
    """
    options = InsertOptions(
        norm=norm,
        position=position,
        init=init,
        include=_globs(include),
        exclude=_globs(exclude),
        only=_globs(only),
        batch_size=batch_size,
        eps=eps,
        momentum=momentum,
        groups=groups,
        drop_bias=drop_bias,
        zero_gamma=zero_gamma,
        per_call=per_call,
        skip_frozen=skip_frozen,
    )
    options.check()
    accept(model)
    check_optimizer(optimizer, model, inplace=inplace)
    say = progress or (lambda _: None)
    given = None if plan is None else as_plan(plan)
    if given is not None:
        _check_verb(given, "insert")
        _refuse_options_beside(given, options)
        check_fingerprint(model, given)
    call = example_call(model, inputs)
    with training_possible():
        say("recording")
        captured = record_example(model, call)
        if given is None:
            say("planning")
            given = plan_insertion(captured, options, call)
        return carry_out(
            model,
            call,
            captured,
            given,
            data,
            inplace=inplace,
            verify=verify,
            optimizer=optimizer,
            say=say,
        )


def fold(
    model: nn.Module,
    inputs: Inputs,
    *,
    affines: bool = False,
    merge: bool = False,
    partial: bool = False,
    untie: bool = False,
    plan: Plan | Mapping[str, Any] | str | Path | None = None,
    emit: str = "module",
    inplace: bool = False,
    verify: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Result:
    """Fold trained norms into neighbouring weights for inference, wherever the algebra is exact.

    A norm with running statistics is ``y = s·x + t`` by channel. It moves backwards into the layer
    that makes its input, or forwards into every layer that reads its result, through whatever lets
    it pass. Every other norm is listed with the reason.

    Args:
        model: Any plain module; it is not touched unless ``inplace``. It is folded as
            ``model.eval()`` would run it.
        inputs: Example inputs: a tensor, a tuple of positional inputs, or a dict of keywords.
        affines: Fold other affine maps by channel too: layer scale, input normalization, and scale
            and shift of layer, group and rms norms, which go into the layers behind them.
        merge: Make one layer of parallel linear branches that are summed (RepVGG, MobileOne), and
            of two linear layers in a row, where the result is no larger.
        partial: Where only some inputs of a concatenation can take a norm, let a scale and shift
            stay for the others.
        untie: Give a layer that runs several times with different norms a weight for each; needs
            ``emit="graph"``, or a module that is registered under several names.
        plan: Carry out this plan (or its JSON data, or a file with it) instead of making one.
        emit: ``"module"``: the user's own module tree. ``"graph"``: an ``fx.GraphModule`` for
            inference, in which norms can go that are written out in a forward.
        inplace: Edit this model instead of a copy.
        verify: Measure the result before it is returned. A fold that fails is undone and reported.
        progress: Called with a few words at each stage.

    Returns:
        The folded model in eval mode with plan, recording and verification.

    Raises:
        UsageError: An option that cannot be right.
        PlanError: A plan for another model, or one that cannot be carried out.
        CaptureError: The forward pass cannot be recorded.
        WeightsError: A weight is not finite.
        VerificationError: The result was measured and found wrong; the model is untouched.
    """
    options = FoldOptions(affines=affines, merge=merge, partial=partial, untie=untie, emit=emit)
    options.check(inplace=inplace)
    accept(model, statistics=False, verb="fold")
    given = None if plan is None else as_plan(plan)
    if given is not None:
        _check_verb(given, "fold")
        _refuse_options_beside(given, options)
    if inplace:
        refuse_inference(model)
    how = How(inplace=inplace, verify=verify, say=progress or (lambda _: None))
    with training_possible():
        return fold_model(model, example_call(model, inputs), options, given, how)


def plan_for_fold(model: nn.Module, inputs: Inputs, **options: Any) -> Plan:
    """What :func:`fold` would do with these options: recorded and planned, nothing changed."""
    chosen = FoldOptions(**options)
    chosen.check()
    accept(model, statistics=False, verb="fold")
    return plan_fold(model, example_call(model, inputs), chosen)


def plan(model: nn.Module, inputs: Inputs, **options: Any) -> Plan:
    """What :func:`insert` would do with these options: recorded and planned, nothing changed."""
    for name in ("include", "exclude", "only"):
        options[name] = _globs(options.get(name, ()))
    chosen = InsertOptions(**options)
    chosen.check()
    accept(model)
    call = example_call(model, inputs)
    return plan_insertion(record_example(model, call), chosen, call)


def check(model: nn.Module, plan: Plan, inputs: Inputs | None = None) -> None:
    """Refuse a plan that cannot be carried out on this model; nothing is changed.

    Raises:
        PlanError: The plan is for another model, or one of its edits cannot be done.
    """
    accept(model, statistics=plan.verb != "fold", verb=plan.verb)
    call = _inputs(model, plan, inputs)
    if plan.verb == "fold":
        check_fold(model, call, plan)
        return
    check_fingerprint(model, plan)
    check_edits(record_example(model, call), plan)


def apply(
    model: nn.Module,
    plan: Plan | Mapping[str, Any] | str | Path,
    inputs: Inputs | None = None,
    verify: bool = True,
    *,
    data: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    inplace: bool = False,
) -> Result:
    """Carry out a plan, made earlier and perhaps edited by hand, on a fresh instance of its model.

    Args:
        model: An instance of the model the plan was made for.
        plan: The plan, its JSON data, or a file with it.
        inputs: Example inputs; drawn from what the plan remembers of them when None.
        verify: Measure the result before it is returned.
        data: Batches for ``init="preserve"``, as in :func:`insert`.
        optimizer: An optimizer of this very model, as in :func:`insert`.
        inplace: Edit this model instead of a copy.

    Raises:
        PlanError: The plan is for another model (the first difference is named), or one of its
            edits cannot be done (the edit is named).
        VerificationError: The result was measured and found wrong.
    """
    plan = as_plan(plan)
    accept(model, statistics=plan.verb != "fold", verb=plan.verb)
    check_fingerprint(model, plan)
    if plan.verb in ("audit", "calibrate"):
        raise PlanError(
            f"what the plan of {plan.verb} does rests on what was measured, and is not made by it",
            hint="bnify.audit(model, inputs).fix()"
            if plan.verb == "audit"
            else "bnify.calibrate(model, data)",
        )
    call = _inputs(model, plan, inputs)
    if plan.verb == "fold":
        options = FoldOptions.of(plan)
        with training_possible():
            return fold_model(model, call, options, plan, How(inplace=inplace, verify=verify))
    check_optimizer(optimizer, model, inplace=inplace)
    with training_possible():
        captured = record_example(model, call)
        return carry_out(
            model,
            call,
            captured,
            plan,
            data,
            inplace=inplace,
            verify=verify,
            optimizer=optimizer,
        )


def export(
    model: nn.Module,
    inputs: Inputs,
    path: str | Path,
    dynamic_batch: bool = True,
    opset: int | None = None,
    optimize: bool = True,
    **options: Any,
) -> Export:
    """Write a model as ONNX and verify the file against it; see ``bnify.exporting.export_onnx``."""
    from bnify.exporting import export_onnx

    return export_onnx(
        model,
        as_call(inputs),
        path,
        dynamic_batch=dynamic_batch,
        opset=opset,
        optimize=optimize,
        **options,
    )


def verify(
    reference: nn.Module | str | Path,
    candidate: nn.Module | str | Path,
    inputs: Inputs,
    device: str = "cpu",
    k: float = 10.0,
    **options: Any,
) -> Verification:
    """Judge ``candidate`` against ``reference`` by error budget.

    Either side is a model, a folder written by bnify, or a path to an ONNX file; see
    ``bnify.verification.budget.verify_budget``.
    """
    from bnify.verification.budget import verify_budget

    return verify_budget(
        _side(reference), _side(candidate), as_call(inputs), device=device, k=k, **options
    )


def load(dir: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Rebuild the model of a folder that :meth:`Result.save` wrote, in eval mode.

    Args:
        dir: The folder.
        model: A fresh instance of the original model; required when the folder has no SPEC.

    Raises:
        SpecError: The folder cannot be read, or has no SPEC and no model was passed.
        WeightsError: Its weights do not fit.
    """
    from bnify.saved import load as load_folder

    return load_folder(dir, model, apply=_rebuild)


# -- the stages ----------------------------------------------------------------------------------


def _inputs(model: nn.Module, plan: Plan, inputs: Inputs | None) -> Call:
    """The inputs as given, else drawn from what the plan remembers of them."""
    if inputs is not None:
        return example_call(model, inputs)
    return draw(plan.call, plan.inputs).to(device=device_of(model))


def _check_verb(plan: Plan, verb: str) -> None:
    if plan.verb != verb:
        raise PlanError(
            f"this is a plan to {plan.verb}, not to {verb}", hint=f"bnify.{plan.verb}(plan=...)"
        )


def _refuse_options_beside(plan: Plan, options: InsertOptions | FoldOptions) -> None:
    """A plan has its options; others beside it would be ignored."""
    given = {k: v for k, v in options.to_dict().items() if plan.options.get(k) != v}
    if given:
        raise PlanError(
            f"{', '.join(given)} beside plan=: a plan is carried out as it is",
            hint="leave the options out, or make a new plan with them",
        )


def _rebuild(model: nn.Module, plan: Plan, structure: Sequence[Change] = ()) -> nn.Module:
    """Carry out a plan for its structure only; the weights come from a folder."""
    check_fingerprint(model, plan)
    if plan.verb in ("fold", "audit", "calibrate"):
        return restructure(model, structure)
    reset = replace(plan, edits=tuple(replace(e, init="reset") for e in plan.edits))
    return rewrite_tree(model, reset, initial_norms(model, reset))


def _side(side: nn.Module | str | Path) -> Any:
    """A folder as the model in it; anything else as it is."""
    if isinstance(side, (str, Path)) and Path(side).is_dir():
        return load(side)
    return side


def _globs(globs: Any) -> tuple[str, ...]:
    listed = (globs,) if isinstance(globs, str) else globs
    if not isinstance(listed, Sequence) or not all(isinstance(glob, str) for glob in listed):
        raise UsageError(
            f"include, exclude and only take globs, not {globs!r}", hint='include="features.*"'
        )
    return tuple(listed)


__all__ = ["apply", "check", "export", "insert", "load", "plan", "verify"]
