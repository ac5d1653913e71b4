"""Verification by budget: a candidate against a reference, on several inputs and batch sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnify import devices
from bnify.structure import Call
from bnify.verdict import Check, OutputVerdict, Verification
from bnify.verification.cases import Case, Measured, Origin, measure
from bnify.verification.localise import first_divergence
from bnify.verification.noise import noise_floor
from bnify.verification.rules import (
    ErrorBudget,
    NoiseFloor,
    Rule,
    Ruling,
    Tolerance,
    refused,
    rule_output,
    worst,
)
from bnify.verification.runners import OnnxRunner, Runner, TorchRunner, as_runner, first_line

Rulings = dict[str, list[Ruling]]  # label of the input → one ruling for each output


def verify_budget(
    reference: nn.Module | Runner | str | Path,
    candidate: nn.Module | Runner | str | Path,
    call: Call,
    *,
    device: str = "cpu",
    k: float = 10.0,
    rtol: float | None = None,
    atol: float | None = None,
    data: Iterable[Any] | None = None,
    batches: int = 8,
    seeds: Sequence[int] = (1, 2),
    localise: bool = True,
) -> Verification:
    """Judge a candidate by the reference's own rounding error.

    Args:
        reference: A model, an ONNX file, or a runner. Models are run on copies, in eval mode.
        candidate: What is judged, likewise.
        call: The example inputs.
        device: Where the candidate runs; the reference runs on the CPU.
        k: How many times the reference's own error is allowed.
        rtol: Where float64 is impossible: relative tolerance instead of the noise floor.
        atol: The same, absolute.
        data: The user's batches, instead of the example and redrawn inputs.
        batches: How many of them.
        seeds: Seeds of the redrawn inputs.
        localise: Name the first node over its budget when the check fails.

    Raises:
        CaptureError: The reference raises on the example or on the user's data.
        ExportError: A file cannot be loaded by onnxruntime.
        DeviceError: The device is not there.
    """
    where = devices.resolve(device)
    with devices.full_precision():
        measured = measure(as_runner(reference), call, data=data, batches=batches, seeds=seeds)
        runner = as_runner(candidate, where, model=_model(measured.runner))
        return judge(measured, runner, device=where, k=k, rtol=rtol, atol=atol, localise=localise)


def judge(
    measured: Measured,
    candidate: Runner,
    *,
    device: torch.device | str = "cpu",
    k: float = 10.0,
    rtol: float | None = None,
    atol: float | None = None,
    localise: bool = True,
) -> Verification:
    """Judge one candidate against a reference that was measured before.

    Args:
        measured: From :func:`bnify.verification.cases.measure`.
        candidate: What is judged.
        device: The device asked for; on CUDA, PyTorch there is a row of its own.
        k: How many times the reference's own error is allowed.
        rtol: Where float64 is impossible: relative tolerance instead of the noise floor.
        atol: The same, absolute.
        localise: Name the first node over its budget when the check fails.
    """
    fixed = getattr(candidate, "static_batch", None)
    cases = [case for case in measured.cases if fixed is None or case.call.batch in (fixed, None)]
    rule, notes = _rule(measured, cases, k, rtol, atol)
    rulings = _rulings(rule, cases, candidate)
    outputs = _outputs(cases, rulings)
    checks = [_main_check(measured, rule, outputs), *_batch_checks(cases, rulings, fixed, measured)]
    checks += _cuda_checks(measured, candidate, torch.device(device), cases, rule)
    if measured.failure:
        checks.insert(0, Check(name="example", passed=False, detail=measured.failure))
    passed = bool(outputs) and all(output.passed for output in outputs)
    first = None
    failing = [case for case in cases if not all(r.verdict.passed for r in rulings[case.label])]
    if failing and localise and not measured.failure:
        first, said = first_divergence(measured.runner, candidate, failing[0].call, k)
        notes += [said] if said else []
    return Verification(
        passed=passed and all(check.passed is not False for check in checks),
        outputs=outputs,
        device=candidate.device,
        first_divergent=first,
        checks=tuple(checks),
        inputs=tuple(case.label for case in cases),
        notes=(*notes, *measured.notes),
    )


def _rule(
    measured: Measured,
    cases: Sequence[Case],
    k: float,
    rtol: float | None,
    atol: float | None,
) -> tuple[Rule, list[str]]:
    """The error budget where there is a float64 truth, else what stands in for it, with notes."""
    given = rtol is not None or atol is not None
    if measured.unavailable is None:
        notes = ["rtol and atol are not used: the error budget is available"] if given else []
        return ErrorBudget(cases, k), notes
    notes = [f"budget: unavailable: {measured.unavailable}"]
    if given:
        return Tolerance(rtol or 0.0, atol or 0.0), notes
    if not cases:
        return NoiseFloor([], k), notes
    floor, said = noise_floor(measured.runner, cases[0])
    return NoiseFloor(floor, k), notes + said


def _rulings(rule: Rule, cases: Sequence[Case], candidate: Runner) -> Rulings:
    return {case.label: _rule_case(rule, case, candidate) for case in cases}


def _rule_case(rule: Rule, case: Case, candidate: Runner) -> list[Ruling]:
    names = [name for name, _ in case.reference]
    try:
        got = candidate.run(case.call)
    except Exception as error:  # the candidate may be the user's model, or any file
        return [refused(name, f"the candidate raises: {first_line(error)}") for name in names]
    if len(got) != len(names):
        count = f"{len(got)} output{'s' if len(got) != 1 else ''}"
        return [refused(name, f"{count}, expected {len(names)}") for name in names]
    return [rule_output(rule, case, i, tensor) for i, (_, tensor) in enumerate(got)]


def _outputs(cases: Sequence[Case], rulings: Rulings) -> tuple[OutputVerdict, ...]:
    names = [name for name, _ in cases[0].reference] if cases else []
    return tuple(
        worst(name, [(case.label, rulings[case.label][i]) for case in cases])
        for i, name in enumerate(names)
    )


def _main_check(measured: Measured, rule: Rule, outputs: Sequence[OutputVerdict]) -> Check:
    if not outputs:
        reason = "no input is left to judge by" if measured.cases else "the reference has no output"
        return Check(name=rule.name, passed=False, detail=reason)
    detail = "" if measured.unavailable is None else "budget: unavailable"
    ratios = [output.budget_ratio for output in outputs if output.budget_ratio is not None]
    return Check(
        name=rule.name,
        passed=all(output.passed for output in outputs),
        error=max(ratios) if ratios else max(output.rel_l2 for output in outputs),
        threshold=rule.threshold if ratios else None,
        detail=detail,
    )


def _batch_checks(
    cases: Sequence[Case], rulings: Rulings, fixed: int | None, measured: Measured
) -> list[Check]:
    """One row for the batch sizes that are not the example's."""
    resized = [case for case in measured.cases if case.origin is Origin.RESIZED]
    if not resized:
        return []
    sizes = ", ".join(str(case.call.batch) for case in resized)
    if fixed is not None:
        said = f"the file is fixed at batch {fixed}"
        if not cases:
            return [Check(name="batch size", passed=False, detail=f"{said}, the inputs are not")]
        return [Check(name=f"batch size {sizes}", passed=None, detail=said)]
    wrong = [
        f"at batch {case.call.batch}: {r.verdict.name}: {r.verdict.detail}"
        for case in resized
        for r in rulings[case.label]
        if not r.verdict.passed
    ]
    said = wrong[0] if wrong else ""
    return [Check(name=f"batch size {sizes}", passed=not wrong, detail=said)]


def _cuda_checks(
    measured: Measured,
    candidate: Runner,
    device: torch.device,
    cases: Sequence[Case],
    rule: Rule,
) -> list[Check]:
    """PyTorch on CUDA against float64, and what the user's own precision settings make of it.

    Both are about PyTorch or the session named in them, never about a file that ran on the CPU.
    """
    model = _model(measured.runner)
    if device.type != "cuda" or not cases:
        return []
    checks = []
    rows: list[tuple[str, Runner]] = []
    if isinstance(candidate, TorchRunner):
        rows.append((f"torch on {device}", candidate))
    elif model is not None:
        on_cuda = TorchRunner(model, device)
        rows.append((f"torch on {device}", on_cuda))
        with devices.full_precision():
            checks.append(_row(f"torch on {device} against float64", rule, cases, on_cuda, True))
    if isinstance(candidate, OnnxRunner) and candidate.device.startswith("cuda"):
        relaxed = OnnxRunner(candidate.source, device, model=model, tf32=True)
        rows.append((f"onnxruntime on {device}, TF32 as is its default", relaxed))
    elif isinstance(candidate, OnnxRunner):
        detail = "onnxruntime has no CUDAExecutionProvider: the file ran on the CPU"
        checks.append(Check(name=f"file on {device}", passed=None, detail=detail))
    with devices.own_precision():
        settings = devices.precision_settings()
        for name, runner in rows:
            label = name if "TF32" in name else f"{name} with your settings ({settings})"
            checks.append(_row(label, rule, cases, runner, False))
    return checks


def _row(name: str, rule: Rule, cases: Sequence[Case], runner: Runner, judged: bool) -> Check:
    outputs = _outputs(cases, _rulings(rule, cases, runner))
    ratios = [output.budget_ratio for output in outputs if output.budget_ratio is not None]
    failed = next((output.detail for output in outputs if not output.passed), "")
    return Check(
        name=name,
        passed=all(output.passed for output in outputs) if judged else None,
        error=max(ratios) if ratios else max(output.rel_l2 for output in outputs),
        threshold=rule.threshold if ratios else None,
        detail=failed if judged else "reported, not judged",
    )


def _model(runner: Runner) -> nn.Module | None:
    return runner.model if isinstance(runner, TorchRunner) else None
