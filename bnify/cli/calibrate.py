"""``bnify calibrate``: running statistics from data, written as a folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from bnify.cli import options as o
from bnify.cli.config import read_config
from bnify.cli.keeping import Keeping
from bnify.cli.session import Session
from bnify.cli.source import InputOptions, ModelOptions, load_inputs, load_source
from bnify.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from bnify.calibrating.kept import CalibratedModel
    from bnify.calibrating.result import Calibration
    from bnify.structure import Call


def calibrate(
    ctx: typer.Context,
    spec: o.Spec,
    weights: o.Weights = None,
    weights_key: o.WeightsKey = None,
    allow_missing: o.AllowMissing = None,
    allow_unexpected: o.AllowUnexpected = None,
    trust_global: o.TrustGlobal = None,
    unsafe_pickle: o.UnsafePickle = False,
    arg: o.Arg = None,
    arg_json: o.ArgJson = None,
    pretrained: o.Pretrained = False,
    allow_download: o.AllowDownload = False,
    input_items: o.InputItems = None,
    input_file: o.InputFile = None,
    data: o.Data = None,
    batches: Annotated[
        Optional[int],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option(metavar="N", help="How many of them at most (all).", rich_help_panel=o.INPUTS),
    ] = None,
    tolerance: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            metavar="X",
            help="Stop when the standard error is this share of the standard deviation.",
            rich_help_panel=o.INPUTS,
        ),
    ] = None,
    seed: o.Seed = 0,
    output: o.Output = None,
    force: o.Force = False,
    onnx: o.Onnx = True,
    device: o.Device = None,
    fmt: o.FormatOption = o.Form.RICH,
    color: o.ColorOption = o.Color.AUTO,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,  # noqa: ARG001 - read before parsing, so that it holds for usage errors
) -> None:
    """Take the running statistics of a model's norms anew from data.

    With labels of classes in the data, accuracy on them is measured before and after.

    Example: bnify calibrate net.py:Net --weights net.pt --data data.py:loader -o out/
    """
    session = Session(ctx, fmt=fmt, color=color, quiet=quiet, verbose=verbose)
    config = read_config(Path.cwd())
    keeping = Keeping.checked(
        output, force=force, onnx=onnx, keep_failed=False, verify=True, dry_run=False
    )
    if data is None:
        raise UsageError("statistics are taken from data", hint="--data file.py:loader")
    if tolerance is not None and not 0 < tolerance < 1:
        raise UsageError(f"--tolerance {tolerance} is no share", hint="for example 0.02")
    request = _Request(
        model=ModelOptions(
            spec=spec,
            weights=weights,
            weights_key=weights_key,
            allow_missing=allow_missing or (),
            allow_unexpected=allow_unexpected or (),
            trust_global=trust_global or (),
            unsafe_pickle=unsafe_pickle,
            arg=arg or (),
            arg_json=arg_json,
            pretrained=pretrained,
            allow_download=allow_download,
            seed=seed,
            as_found=True,
        ),
        inputs=InputOptions(
            input=input_items or (), input_file=input_file, data=data, batches=1, seed=seed
        ),
        data=data,
        batches=batches,
        tolerance=tolerance,
        keeping=keeping,
        device=device or config.device or "cpu",
        opset=config.opset,
        k=config.k,
    )
    _perform(request, session)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What was asked for; fields are the options' names."""

    model: ModelOptions
    inputs: InputOptions
    data: str
    batches: int | None
    tolerance: float | None
    keeping: Keeping
    device: str
    opset: int | None
    k: float | None


def _perform(request: _Request, session: Session) -> None:
    """Calibrate, write, and report.

    Raises:
        VerificationError: The calibrated model's outputs are not finite.
    """
    with session.work():
        from bnify import spec
        from bnify.calibrating.kept import CalibratedModel
        from bnify.devices import resolve
        from bnify.environment import environment

        place = resolve(request.device)
        source = load_source(request.model, session)
        loaded = spec.load_data(request.data, batches=request.batches)
        call = load_inputs(request.inputs, model=source.model, own=source.call)
        model, call = source.model.to(place).eval(), call.to(device=place)
        found = _calibrated(request, model, loaded, call, session)
        with session.step("verifying"):
            kept = CalibratedModel.of(model, found, call, source.source)
        failed = [
            c for c in (kept.verification.checks if kept.verification else ()) if not c.passed
        ]
        if failed:
            raise VerificationError(
                f"the calibrated model is not used: {failed[0].detail}",
                hint="look at the weights and the data: bnify audit SPEC --data LOADER",
                result=kept,
            )
        saved = None
        if request.keeping.place is not None:
            with session.step("writing"):
                saved = _write(request, kept, call, loaded)
            if saved.export is not None:
                session.detail(saved.export.log)
        made = environment(device=request.device, seed=request.model.seed)
        made["hashes"] = {
            "model": kept.plan.fingerprint.digest,
            "checkpoint": (kept.source.get("checkpoint") or {}).get("sha256"),
        }
    session.emit(
        kept,
        files=saved.files if saved else None,
        export=saved.export if saved else None,
        environment=saved.report["environment"] if saved else made,
    )


def _calibrated(
    request: _Request, model: Any, data: Iterable[Any], call: Call, session: Session
) -> Calibration:
    """New statistics in the model; accuracy before and after, on the batches that gave them."""
    from bnify.borrow import copy_model
    from bnify.calibrating.scoring import accuracies
    from bnify.calibrations import calibrate as run

    old = copy_model(model)
    with session.step("calibrating"):
        found = run(model, data, inputs=call, tolerance=request.tolerance, progress=session.doing)
    with session.step("scoring"):
        scores = accuracies((old, model), data, found.batches, example=call)
    if scores is None:
        return found
    return replace(found, accuracy_before=scores[0], accuracy_after=scores[1])


def _write(request: _Request, kept: CalibratedModel, call: Call, data: Iterable[Any]) -> Any:
    from bnify.saved import write

    further: dict[str, Any] = {} if request.k is None else {"k": request.k}
    return write(
        kept,
        request.keeping.place or "",
        onnx=request.keeping.onnx,
        force=request.keeping.force,
        call=call,
        device=request.device,
        seed=request.model.seed,
        opset=request.opset,
        data=data,
        **further,
    )
