"""What ``bnify insert`` and ``bnify fold`` do between their options and their report."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bnify.cli.keeping import Keeping
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
    from bnify.saved.write import Savable
    from bnify.structure import Call

#: What a person is told while it lasts.
_DOING: Final = {"insert": "inserting", "fold": "folding"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for, once the options are read.

    Attributes:
        verb: ``"insert"`` or ``"fold"``.
        model: How to get the model.
        inputs: How to get its inputs.
        asked: Keyword arguments of the verb's Python function that shape the plan.
        plan: The plan to carry out instead of making one.
        device: Where the model runs.
        verify: Measure the result.
        keeping: Where the result goes.
        dry_run: Only make the plan.
        diff: Show the module tree before and after.
        print_code: Show the rewritten forward.
        opset: Of the ONNX file; torch's own when None.
        k: Factor of the ONNX file's error budget; bnify's own when None.
    """

    verb: str
    model: ModelOptions
    inputs: InputOptions
    asked: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    device: str = "cpu"
    verify: bool = True
    keeping: Keeping = field(default_factory=Keeping)
    dry_run: bool = False
    diff: bool = False
    print_code: bool = False
    opset: int | None = None
    k: float | None = None

    @property
    def seed(self) -> int:
        """Of all random numbers."""
        return self.model.seed


def perform(
    request: Request,
    session: Session,
    *,
    complete: Callable[[Result], Savable] | None = None,
    finish: Callable[[Any, Call, Saved | None], None] | None = None,
) -> None:
    """Carry a request out, and report.

    Args:
        request: What was asked for.
        session: Where to say it.
        complete: Makes of a good result what is to be written and reported; it has the result's
            attributes, and more.
        finish: What is to be done when that is written: with it, the example inputs, and what was
            written.

    Raises:
        VerificationError: The result was measured and found wrong.
    """
    with session.work():
        if request.dry_run:
            _perform_dry(request, session)
            return
        source, call = _prepare(request, session)
        result, data = _rewritten(request, source, call, session)
        whole: Any = result
        if complete is not None:
            with session.step("counting"):
                whole = complete(result)
        saved = None
        if request.keeping.place is not None:
            with session.step("writing"):
                saved = _write(request, result, whole, request.keeping.place, data)
            if saved.export is not None:
                session.detail(saved.export.log)
        if finish is not None:
            finish(whole, call, saved)
        shown = _shown(request, result)
    session.emit(
        whole,
        files=saved.files if saved else None,
        export=saved.export if saved else None,
        environment=saved.report["environment"] if saved else _made_with(result, request),
        shown=shown,
    )


def _perform_dry(request: Request, session: Session) -> None:
    """Show the plan; nothing is measured or written."""
    from bnify import api
    from bnify.cli.planned import Planned

    if request.keeping.output is not None:
        session.note(f"--dry-run writes nothing: -o {request.keeping.output} is left alone")
    source, call = _prepare(request, session)
    made, shown = request.plan, {}
    if request.diff or request.print_code:
        with session.step("rewriting"):
            result = _run(request, source, call, load_batches(request.inputs), session, False)
        made, shown = result.plan, _shown(request, result)
    elif made is not None:
        with session.step("checking the plan"):
            api.check(source.model, made, call)
    else:
        make = api.plan if request.verb == "insert" else api.plan_for_fold
        with session.step("planning"):
            made = make(source.model, call, **request.asked)
    planned = Planned(plan=made, source=source.source)
    session.emit(planned, environment=_made_with(planned, request), dry_run=True, shown=shown)


def _rewritten(
    request: Request, source: Source, call: Call, session: Session
) -> tuple[Result, Iterable[Any] | None]:
    """A verified result and the user's batches; one that failed is kept where that was asked for.

    Raises:
        VerificationError: The result was measured and found wrong.
    """
    data = load_batches(request.inputs)
    failed = request.keeping.failed
    try:
        with session.step(_DOING[request.verb]):
            result = _run(request, source, call, data, session, request.verify)
    except VerificationError as error:
        if error.result is not None:
            error.result.source = source.source
            if failed is not None:
                _write(request, error.result, error.result, failed, data, onnx=False)
                error.hint = f"it is kept in {failed}; {error.hint}"
        raise
    result.source = source.source
    return result, data


def _run(
    request: Request,
    source: Source,
    call: Call,
    data: Iterable[Any] | None,
    session: Session,
    verify: bool,
) -> Result:
    """The verb's Python function."""
    from bnify import api

    asked, doing = request.asked, session.doing
    if request.verb == "fold":
        return api.fold(
            source.model, call, plan=request.plan, verify=verify, progress=doing, **asked
        )
    return api.insert(
        source.model, call, data=data, plan=request.plan, verify=verify, progress=doing, **asked
    )


def _prepare(request: Request, session: Session) -> tuple[Source, Call]:
    """The model and its inputs, where they are to run; options that cannot be right come first."""
    from bnify.devices import resolve
    from bnify.folding import FoldOptions
    from bnify.insertion import InsertOptions
    from bnify.structure import draw

    options = InsertOptions if request.verb == "insert" else FoldOptions
    options(**request.asked).check()
    place = resolve(request.device)
    source = load_source(request.model, session)
    own, plan = source.call, request.plan
    if own is None and plan is not None and plan.inputs:
        own = draw(plan.call, plan.inputs, request.seed)
    call = load_inputs(request.inputs, model=source.model, own=own)
    source.model.to(place)
    if request.verb == "fold":  # as it will run; that it came in train mode is our own doing
        source.model.eval()
    return source, call.to(device=place)


def _write(
    request: Request,
    result: Result,
    whole: Savable,
    place: Path,
    data: Iterable[Any] | None,
    *,
    onnx: bool | None = None,
) -> Saved:
    from bnify.saved import write

    return write(
        whole,
        place,
        onnx=request.keeping.onnx if onnx is None else onnx,
        force=request.keeping.force,
        call=result.call,
        device=request.device,
        seed=request.seed,
        opset=request.opset,
        data=data,
        batches=request.inputs.batches,
        **({"k": request.k} if request.k is not None else {}),
    )


def read_plan(path: Path, asked: dict[str, Any], *, verb: str) -> Plan:
    """A plan as ``--dry-run`` or a folder holds it.

    Args:
        path: The file or folder.
        asked: The options beside it.
        verb: What the plan must be for.

    Raises:
        UsageError: An option beside it would shape another plan.
        PlanError: The file cannot be read, holds no plan, or one for another verb.
    """
    from bnify.plan import Plan

    for name, value in asked.items():
        if value and value != _PLAIN.get(name):
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
    plan = Plan.from_dict(data)
    if plan.verb != verb:
        raise PlanError(
            f"--plan {path} is a plan to {plan.verb}, not to {verb}",
            hint=f"bnify {plan.verb} SPEC --plan {path}",
        )
    return plan


_PLAIN: Final = {"norm": "batch", "position": "before-act", "emit": "module"}


def _shown(request: Request, result: Result) -> dict[str, str]:
    """The code and the difference that were asked for."""
    shown = {"code": _rewritten_forward(result)} if request.print_code else {}
    return shown | ({"diff": tree_difference(result)} if request.diff else {})


def tree_difference(result: Result) -> str:
    """The module tree before and after, as a unified diff."""
    from torch import nn

    # A graph would show its code with its tree.
    before, after = result.before.splitlines(), nn.Module.__repr__(result.model).splitlines()
    lines = difflib.unified_diff(before, after, "before", "after", lineterm="", n=2)
    return "\n".join(lines) or "(no difference)"


_DELETIONS = re.compile(r";  [\w ]+( = \w+)* = None$", re.MULTILINE)


def _rewritten_forward(result: Result) -> str:
    """The code of the rewritten recording, without the lines' ends that free its variables."""
    return _DELETIONS.sub("", result.graph.code).strip()


def _made_with(result: Result | Planned, request: Request) -> dict[str, Any]:
    """Versions, device, seed and hashes of a result that is not written."""
    from bnify.environment import environment

    hashes = {"model": result.plan.fingerprint.digest}
    checkpoint = result.source.get("checkpoint")
    if checkpoint:
        hashes["checkpoint"] = checkpoint["sha256"]
    return {**environment(device=request.device, seed=request.seed), "hashes": hashes}
