"""The straight line, one verb each: capture, plan, rewrite, verify, export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bnify.accept import accept
from bnify.borrow import copy_model
from bnify.calibrate import pool
from bnify.capture import Captured, make_symbolic, record
from bnify.errors import CaptureError, PlanError, VerificationError
from bnify.insertion import InsertOptions, plan_insert
from bnify.optim import check_optimizer, extend_optimizer
from bnify.plan import Plan
from bnify.realise import Realisations
from bnify.result import Result
from bnify.rewrite import (
    Statistics,
    check_edits,
    check_fingerprint,
    initial_norms,
    points,
    rewrite_graph,
    rewrite_tree,
)
from bnify.structure import Call, Inputs, as_call, draw, match_batch
from bnify.verdict import Verification
from bnify.verification.insertion import verify_insertion

if TYPE_CHECKING:
    from bnify.exporting import Export

#: Batch size for the drift report when the example has batch 1, if it is not too large.
_MOST_VALUES = 4_000_000


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
    plan: Plan | None = None,
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
            and shift undo the running statistics, which are measured on ``data``.
        data: Batches for ``init="preserve"``: an iterable of inputs, of ``(inputs, labels)`` or of
            dicts; the example inputs when None.
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
        plan: Carry out this plan instead of making one.
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
    call = as_call(inputs)
    say("recording")
    captured = _record(model, call)
    if plan is None:
        train, note = _record_train(model, captured.call)
        say("planning")
        plan = plan_insert(captured, options, train=train, example_batch=call.batch)
        plan = plan.with_notes(*note)
    else:
        check_fingerprint(model, plan)
    if optimizer is None and inplace and plan.edits:
        plan = plan.with_notes(
            "an optimizer built before does not know the new parameters: pass optimizer="
        )
    return _carry_out(
        model,
        captured,
        plan,
        data,
        inplace=inplace,
        verify=verify,
        optimizer=optimizer,
        say=say,
    )


def plan(model: nn.Module, inputs: Inputs, **options: Any) -> Plan:
    """What :func:`insert` would do with these options: recorded and planned, nothing changed."""
    for name in ("include", "exclude", "only"):
        options[name] = _globs(options.get(name, ()))
    chosen = InsertOptions(**options)
    chosen.check()
    accept(model)
    call = as_call(inputs)
    captured = _record(model, call)
    train, note = _record_train(model, captured.call)
    made = plan_insert(captured, chosen, train=train, example_batch=call.batch)
    return made.with_notes(*note)


def apply(
    model: nn.Module,
    plan: Plan,
    inputs: Inputs | None = None,
    verify: bool = True,
    *,
    data: Any = None,
    inplace: bool = False,
) -> Result:
    """Carry out a plan, made earlier and perhaps edited by hand, on a fresh instance of its model.

    Args:
        model: An instance of the model the plan was made for.
        plan: The plan.
        inputs: Example inputs; drawn from what the plan remembers of them when None.
        verify: Measure the result before it is returned.
        data: Batches for ``init="preserve"``, as in :func:`insert`.
        inplace: Edit this model instead of a copy.

    Raises:
        PlanError: The plan is for another model (the first difference is named), or one of its
            edits cannot be done (the edit is named).
        VerificationError: The result was measured and found wrong.
    """
    accept(model)
    check_fingerprint(model, plan)
    call = as_call(inputs) if inputs is not None else draw(plan.call, plan.inputs)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    captured = _record(model, call.to(device=device))
    return _carry_out(model, captured, plan, data, inplace=inplace, verify=verify)


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


def _record(model: nn.Module, call: Call) -> Captured:
    """Record eval mode at batch 2 or more: at 1, axes cannot be told apart."""
    if call.batch == 1:
        try:
            return record(model, call.resized(2))
        except CaptureError:
            captured = record(model, call)
            captured.notes.append("the model runs at batch size 1 only: recorded at 1")
            return captured
    return record(model, call)


def _any_batch(captured: Captured) -> str | None:
    """Record once more at another batch size, so that the graph runs at any."""
    if captured.call.batch is None:
        return None
    try:
        sizes = (captured.call.batch + 1, captured.call.batch + 3)
        others = [record(captured.model, captured.call.resized(size)) for size in sizes]
    except CaptureError:
        return f"the model runs at batch size {captured.call.batch} only"
    return make_symbolic(captured, *others)


def _record_train(model: nn.Module, call: Call) -> tuple[Captured | None, list[str]]:
    try:
        return record(model, call, train=True), []
    except CaptureError as error:
        return None, [f"train mode could not be recorded: {error.message}"]


def _carry_out(
    model: nn.Module,
    captured: Captured,
    plan: Plan,
    data: Any,
    *,
    inplace: bool,
    verify: bool,
    optimizer: torch.optim.Optimizer | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Result:
    """Measure, rewrite and verify one plan."""
    check_edits(captured, plan)
    fixed = _any_batch(captured)
    if fixed is not None:
        plan = plan.with_notes(f"result.graph runs at the recorded batch size: {fixed}")
    statistics, notes = _statistics(model, captured.call, plan, data, say)
    plan = plan.with_notes(*notes)
    before = str(model)
    say("rewriting")
    norms = initial_norms(model, plan, statistics)
    graph = rewrite_graph(captured, plan, norms)
    rewritten = rewrite_tree(copy_model(model), plan, norms)
    verification = None
    if verify:
        say("verifying")
        realised = Realisations(model, plan, captured.call, statistics)
        drift = _drift_call(captured.call, plan)
        verification = verify_insertion(realised, model, rewritten, graph, drift)
    result = Result(rewritten, graph, plan, verification, captured.call, before=before)
    if verification is not None and not verification.passed:
        failed = next((c for c in verification.checks if c.passed is False), None)
        what = f"{failed.name}: {failed.detail or failed.error}" if failed else "no check decided"
        raise VerificationError(
            f"the result was measured and found wrong ({what})",
            hint="exclude the layer that first diverges, or report this as a bug",
            result=result,
        )
    if inplace:
        dropped = [
            model.get_submodule(e.layer).get_parameter("bias") for e in plan.edits if e.drop_bias
        ]
        result.model = rewrite_tree(model, plan, initial_norms(model, plan, statistics))
        if optimizer is not None:
            extend_optimizer(optimizer, model, plan, dropped)
    return result


def _statistics(
    model: nn.Module, call: Call, plan: Plan, data: Any, say: Callable[[str], None]
) -> tuple[Statistics | None, list[str]]:
    """Pooled statistics for ``init="preserve"``, on the data or on the example inputs."""
    wanted = points(plan)
    if not wanted:
        return None, []
    notes = []
    if data is None:
        notes.append("statistics come from the example inputs: pass data= for those of your data")
    say("measuring statistics")
    # On a copy: a model may count its calls or keep caches, and the user's stays as it is.
    pooled = pool(copy_model(model), _batches(data, call, model), wanted)
    few = min(one.count for statistics in pooled.values() for one in statistics)
    if few < 1000:
        notes.append(f"statistics rest on only {few} values a channel; 1000 or more are steadier")
    still = [p for p, s in pooled.items() if any(bool((one.var < 1e-10).any()) for one in s)]
    if still:
        notes.append(
            f"{len(still)} layers have channels that do not vary on this data, first {still[0]}"
        )
    notes.append(
        "preserve suits small learning rates: scales of σ keep the gradients of the old weights"
    )
    return pooled, notes


def _batches(data: Any, call: Call, model: nn.Module) -> Iterator[Call]:
    if data is None:
        yield call
        return
    batches: Iterable[Any] = [data] if isinstance(data, (Tensor, Mapping, Call)) else data
    try:
        batches = iter(batches)
    except TypeError:
        raise PlanError(
            f"data is a {type(data).__name__}, which yields no batches",
            hint="pass a loader, a list of batches, or one tensor",
        ) from None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for batch in batches:
        matched = batch if isinstance(batch, Call) else match_batch(batch, call, model)
        yield matched.to(device=device)


def _drift_call(call: Call, plan: Plan) -> Call:
    """Inputs at the training batch size, as far as that is affordable."""
    size = plan.options.get("batch_size") or call.batch
    values = sum(t.numel() for _, t in call.tensors()) / max(call.batch or 1, 1)
    if not size or size == call.batch or size * values > _MOST_VALUES:
        return call
    return call.resized(size).redrawn(3)


def _rebuild(model: nn.Module, plan: Plan) -> nn.Module:
    """Carry out a plan for its structure only; the weights come from a folder."""
    reset = replace(plan, edits=tuple(replace(e, init="reset") for e in plan.edits))
    return rewrite_tree(model, reset, initial_norms(model, reset))


def _side(side: nn.Module | str | Path) -> Any:
    """A folder as the model in it; anything else as it is."""
    if isinstance(side, (str, Path)) and Path(side).is_dir():
        return load(side)
    return side


def _globs(globs: str | Sequence[str]) -> tuple[str, ...]:
    return (globs,) if isinstance(globs, str) else tuple(globs)


__all__ = ["apply", "export", "insert", "load", "plan", "verify"]
