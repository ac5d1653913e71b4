"""What ``bnify insert`` does between its options and its report."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnify.atomic import check_output
from bnify.cli.options import Norm
from bnify.cli.session import Session
from bnify.cli.source import (
    InputOptions,
    ModelOptions,
    Source,
    load_batches,
    load_inputs,
    load_source,
)
from bnify.errors import PlanError, UsageError, VerificationError

if TYPE_CHECKING:
    from bnify.cli.planned import Planned
    from bnify.plan import Plan
    from bnify.result import Result
    from bnify.saved import Saved
    from bnify.structure import Call


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for, once the options are read.

    Attributes:
        model: How to get the model.
        inputs: How to get its inputs.
        asked: Keyword arguments of ``bnify.insert`` that shape the plan.
        plan: The plan to carry out instead of making one.
        device: Where the model runs.
        verify: Measure the result.
        output: Where to keep a good result; None to keep nothing.
        failed: Where to keep one that failed its verification; None to keep nothing.
        force: Replace what is there.
        onnx: Write an ONNX file too.
        opset: Of the ONNX file; torch's own when None.
        k: Factor of the ONNX file's error budget; bnify's own when None.
    """

    model: ModelOptions
    inputs: InputOptions
    asked: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    device: str = "cpu"
    verify: bool = True
    output: Path | None = None
    failed: Path | None = None
    force: bool = False
    onnx: bool = True
    opset: int | None = None
    k: float | None = None

    @property
    def seed(self) -> int:
        """Of all random numbers."""
        return self.model.seed


def plan_only(request: Request, session: Session) -> Planned:
    """The plan that the request leads to; nothing is changed, measured or written.

    Raises:
        PlanError: The plan that was given cannot be carried out on this model.
    """
    from bnify import api
    from bnify.cli.planned import Planned

    source, call = _prepare(request, session)
    made = request.plan
    if made is not None:
        with session.step("checking the plan"):
            api.check(source.model, made, call)
    else:
        with session.step("planning"):
            made = api.plan(source.model, call, **request.asked)
    return Planned(plan=made, source=source.source)


def rewrite_only(request: Request, session: Session) -> tuple[Planned, Result]:
    """The plan as :func:`plan_only` gives it, and the rewritten model, to be looked at only."""
    from bnify import api
    from bnify.cli.planned import Planned

    source, call = _prepare(request, session)
    with session.step("rewriting"):
        result = api.insert(
            source.model,
            call,
            data=load_batches(request.inputs),
            plan=request.plan,
            verify=False,
            progress=session.doing,
            **request.asked,
        )
    return Planned(plan=result.plan, source=source.source), result


def insert_and_save(request: Request, session: Session) -> tuple[Result, Saved | None]:
    """Insert, verify and write; a result that failed is kept only where that was asked for.

    Raises:
        VerificationError: The result was measured and found wrong.
    """
    from bnify import api

    source, call = _prepare(request, session)
    data = load_batches(request.inputs)
    try:
        with session.step("inserting"):
            result = api.insert(
                source.model,
                call,
                data=data,
                plan=request.plan,
                verify=request.verify,
                progress=session.doing,
                **request.asked,
            )
    except VerificationError as error:
        if error.result is not None:
            error.result.source = source.source
            if request.failed is not None:
                _write(request, error.result, request.failed, data, onnx=False)
                error.hint = f"it is kept in {request.failed}; {error.hint}"
        raise
    result.source = source.source
    if request.output is None:
        return result, None
    with session.step("writing"):
        saved = _write(request, result, request.output, data, onnx=request.onnx)
    if saved.export is not None:
        session.detail(saved.export.log)
    return result, saved


def _prepare(request: Request, session: Session) -> tuple[Source, Call]:
    """The model and its inputs, where they are to run; options that cannot be right come first."""
    from bnify.devices import resolve
    from bnify.insertion import InsertOptions
    from bnify.structure import draw

    InsertOptions(**request.asked).check()
    place = resolve(request.device)
    source = load_source(request.model, session)
    own, plan = source.call, request.plan
    if own is None and plan is not None and plan.inputs:
        own = draw(plan.call, plan.inputs, request.seed)
    call = load_inputs(request.inputs, model=source.model, own=own)
    source.model.to(place)
    return source, call.to(device=place)


def _write(
    request: Request, result: Result, place: Path, data: Iterable[Any] | None, *, onnx: bool
) -> Saved:
    from bnify.saved import write

    return write(
        result,
        place,
        onnx=onnx,
        force=request.force,
        call=result.call,
        device=request.device,
        seed=request.seed,
        opset=request.opset,
        data=data,
        batches=request.inputs.batches,
        **({"k": request.k} if request.k is not None else {}),
    )


def check_folder(place: Path, *, force: bool) -> None:
    """Refuse a folder that may not be written, before the work is done; as ``check_output``."""
    # The names of bnify's own files, without importing torch with what writes them.
    ours = ("model.safetensors", "bnify.json", "model.onnx", "model.onnx.data", "report.json")
    check_output(place, force=force, ours=ours)


def default_init(norm: Norm, *, zero_gamma: bool, has_weights: bool) -> str:
    """Trained weights are worth keeping, where a norm can start as the old function."""
    able = norm in (Norm.BATCH, Norm.SYNC) and not zero_gamma
    return "preserve" if has_weights and able else "reset"


def kept_as(output: Path | None, *, unverified: bool, keep_failed: bool) -> Path | None:
    """Where the result goes; what nobody verified has a name that says so."""
    if output is None or not unverified:
        return output
    place = output.with_name(f"{output.name}.unverified")
    if not keep_failed:
        raise UsageError(
            "with --no-verify the result is unverified and is not written",
            hint=f"add --keep-failed, which writes {place}",
        )
    return place


def failed_as(output: Path | None, *, keep_failed: bool) -> Path | None:
    """Where a result goes that failed its verification."""
    return output.with_name(f"{output.name}.failed") if output and keep_failed else None


def read_plan(path: Path, asked: dict[str, Any]) -> Plan:
    """A plan as ``--dry-run`` or a folder holds it.

    Raises:
        UsageError: An option beside it would shape another plan.
        PlanError: The file cannot be read, or holds no plan.
    """
    from bnify.plan import Plan

    plain = {"norm": "batch", "position": "before-act"}
    for name, value in asked.items():
        if value and value != plain.get(name):
            raise UsageError(
                f"--{name.replace('_', '-')} shapes a plan, and --plan gives one",
                hint="leave one of them out, or edit the plan",
            )
    file = path / "bnify.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise PlanError(f"--plan {path}: {reason}", hint="check the path") from error
    except ValueError as error:
        raise PlanError(
            f"--plan {path} is not JSON: {error}", hint="write one with --dry-run --format json"
        ) from error
    if isinstance(data, dict) and isinstance(data.get("plan"), dict):
        data = data["plan"]
    return Plan.from_dict(data)


def tree_difference(result: Result) -> str:
    """The module tree before and after, as a unified diff."""
    before, after = result.before.splitlines(), str(result.model).splitlines()
    lines = difflib.unified_diff(before, after, "before", "after", lineterm="", n=2)
    return "\n".join(lines) or "(no difference)"


_DELETIONS = re.compile(r";  [\w ]+( = \w+)* = None$", re.MULTILINE)


def rewritten_forward(result: Result) -> str:
    """The code of the rewritten recording, without the lines' ends that free its variables."""
    return _DELETIONS.sub("", result.graph.code).strip()


def made_with(result: Result | Planned, request: Request) -> dict[str, Any]:
    """Versions, device, seed and hashes of a result that is not written."""
    from bnify.environment import environment

    hashes = {"model": result.plan.fingerprint.digest}
    checkpoint = result.source.get("checkpoint")
    if checkpoint:
        hashes["checkpoint"] = checkpoint["sha256"]
    return {**environment(device=request.device, seed=request.seed), "hashes": hashes}
