"""The straight line of an insertion: capture, plan, rewrite, verify."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bnify.borrow import copy_model
from bnify.capture import Captured, free_batch, record_train
from bnify.errors import VerificationError
from bnify.insertion import InsertOptions, plan_insert, reconciled
from bnify.measure import measure
from bnify.optim import extend_optimizer, optimizer_notes
from bnify.plan import Plan
from bnify.realise import Realisations
from bnify.result import Result
from bnify.rewrite import check_edits, initial_norms, rewrite_graph, rewrite_tree
from bnify.structure import Call
from bnify.verdict import Verification
from bnify.verification.drift import drift_calls
from bnify.verification.insertion import verify_insertion
from bnify.verification.standardised import check_standardised


def plan_insertion(captured: Captured, options: InsertOptions, example: Call) -> Plan:
    """Plan on a recording in eval mode, with one in train mode beside it where there can be one."""
    train, note = record_train(captured.model, captured.call)
    made = plan_insert(captured, options, train=train, example_batch=example.batch)
    return made.with_notes(*note)


def carry_out(
    model: nn.Module,
    example: Call,
    captured: Captured,
    plan: Plan,
    data: Any,
    *,
    inplace: bool,
    verify: bool,
    optimizer: torch.optim.Optimizer | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Result:
    """Measure, rewrite and verify one plan.

    Raises:
        PlanError: An edit of the plan cannot be done.
        VerificationError: The result was measured and found wrong; the model is untouched.
    """
    check_edits(captured, plan)
    plan = reconciled(plan, captured)
    measured = measure(model, plan, captured, example, data, say)
    statistics = measured.statistics
    plan = plan.with_notes(
        *free_batch(captured), *measured.notes, *optimizer_notes(model, plan, optimizer, inplace)
    )
    before = str(model)
    say("rewriting")
    norms = initial_norms(model, plan, statistics)
    graph = rewrite_graph(captured, plan, norms)
    rewritten = rewrite_tree(copy_model(model), plan, norms)
    verification = None
    if verify:
        say("verifying")
        realised = Realisations(model, plan, captured.call, statistics)
        drift = drift_calls(plan, captured.call, example, measured.batch)
        own = []
        if measured.order and statistics is not None and measured.pool is not None:
            own.append(check_standardised(rewritten, measured.order, statistics, measured.pool))
        verification = verify_insertion(
            realised, model, rewritten, graph, drift, own, measured.batch
        )
    result = Result(rewritten, graph, plan, verification, captured.call, before=before)
    if verification is not None and not verification.passed:
        raise _failed(result, verification)
    if inplace:
        norms = initial_norms(model, plan, statistics)
        if optimizer is not None:  # first: it may refuse
            extend_optimizer(optimizer, model, plan, norms)
        result.model = rewrite_tree(model, plan, norms)
    return result


def _failed(result: Result, verification: Verification) -> VerificationError:
    """What was found wrong, and what to do about it."""
    found = next((c for c in verification.checks if c.passed is False), None)
    undecided = next((c for c in verification.checks if c.passed is None), None)
    check = found or undecided
    what = "nothing was checked"
    if check is not None:
        numbers = ""
        if check.error is not None and check.threshold is not None:
            numbers = f"error {check.error:.1e}, allowed {check.threshold:.0e}"
        what = f"{check.name}: {'; '.join(filter(None, (numbers, check.detail)))}"
    layer = verification.first_divergent
    hint = "look at the checks of error.result.verification; try other example inputs"
    if layer:
        hint = f"leave {layer} out with exclude, and report this as a bug"
    if "NoneType" in what and any(edit.drop_bias for edit in result.plan.edits):
        hint = "the model may ask for a bias that was dropped: leave drop_bias out"
    return VerificationError(
        f"the result was measured and found wrong ({what})", hint=hint, result=result
    )
