"""``bnify insert``: norms into a model, verified, written as a folder."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from bnify.atomic import check_output
from bnify.cli import options as o
from bnify.cli.config import read_config
from bnify.cli.session import Session
from bnify.cli.source import InputOptions, ModelOptions, load_batches, load_inputs, load_source
from bnify.errors import PlanError, UsageError, VerificationError

if TYPE_CHECKING:
    from bnify.plan import Plan
    from bnify.result import Result
    from bnify.saved import Saved


def insert(
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
    batches: o.Batches = 8,
    seed: o.Seed = 0,
    norm: Annotated[o.Norm, typer.Option(help="Kind.", rich_help_panel=o.NORMS)] = o.Norm.BATCH,
    position: Annotated[
        o.Position, typer.Option(help="Where.", rich_help_panel=o.NORMS)
    ] = o.Position.BEFORE,
    init: Annotated[
        Optional[o.Init],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option(
            help="How norms start: from scratch, or as the old function (default with weights, "
            "for batch and sync).",
            show_default=False,
            rich_help_panel=o.NORMS,
        ),
    ] = None,
    include: Annotated[
        o.Texts,
        typer.Option(
            metavar="GLOB", help="Layers to include against the policy.", rich_help_panel=o.NORMS
        ),
    ] = None,
    exclude: Annotated[
        o.Texts,
        typer.Option(metavar="GLOB", help="Layers to leave alone.", rich_help_panel=o.NORMS),
    ] = None,
    only: Annotated[
        o.Texts,
        typer.Option(metavar="GLOB", help="Only these layers.", rich_help_panel=o.NORMS),
    ] = None,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            metavar="N", help="Samples per device in training.", rich_help_panel=o.NORMS
        ),
    ] = None,
    eps: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="X", help="Of the norms.", rich_help_panel=o.NORMS),
    ] = None,
    momentum: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="X", help="Of running statistics.", rich_help_panel=o.NORMS),
    ] = None,
    groups: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="Of a group norm.", rich_help_panel=o.NORMS),
    ] = None,
    drop_bias: Annotated[
        bool,
        typer.Option(
            "--drop-bias", help="Fold biases into running means.", rich_help_panel=o.NORMS
        ),
    ] = False,
    zero_gamma: Annotated[
        bool,
        typer.Option(
            "--zero-gamma", help="Residual branches start at 0.", rich_help_panel=o.NORMS
        ),
    ] = False,
    per_call: Annotated[
        bool,
        typer.Option("--per-call", help="One norm for each call.", rich_help_panel=o.NORMS),
    ] = False,
    skip_frozen: Annotated[
        bool,
        typer.Option("--skip-frozen", help="Leave frozen layers alone.", rich_help_panel=o.NORMS),
    ] = False,
    plan: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Carry out this plan.", rich_help_panel=o.NORMS),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder to write: weights, plan, ONNX file, report.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    force: o.Force = False,
    no_onnx: Annotated[
        bool, typer.Option("--no-onnx", help="Write no ONNX file.", rich_help_panel=o.OUTPUT)
    ] = False,
    keep_failed: Annotated[
        bool,
        typer.Option(
            "--keep-failed",
            help="Keep an unverified result, as DIR.failed or DIR.unverified.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only make and print the plan.", rich_help_panel=o.OUTPUT),
    ] = False,
    diff: Annotated[
        bool,
        typer.Option(
            "--diff", help="Show the module tree before and after.", rich_help_panel=o.OUTPUT
        ),
    ] = False,
    print_code: Annotated[
        bool,
        typer.Option("--print-code", help="Show the rewritten forward.", rich_help_panel=o.OUTPUT),
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Measure nothing.", rich_help_panel=o.CHECKS)
    ] = False,
    device: o.Device = None,
    fmt: o.FormatOption = o.Form.RICH,
    color: o.ColorOption = o.Color.AUTO,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,  # noqa: ARG001 - read before parsing, so that it holds for usage errors
) -> None:
    """Put norms after the Linear and Conv layers of a model, where one belongs.

    Example: bnify insert net.py:MyNetwork --input 32,784 -o out/
    """
    session = Session(ctx, fmt=fmt, color=color, quiet=quiet, verbose=verbose)
    kept_as = _kept_as(output, unverified=no_verify, keep_failed=keep_failed)
    places = (kept_as, _failed(output) if keep_failed else None) if not dry_run else ()
    for place in places:
        if place is not None:
            _check_folder(place, force=force)
    where = device or read_config(Path.cwd()).device or "cpu"
    asked = {
        "norm": norm.value,
        "position": position.value,
        "include": tuple(include or ()),
        "exclude": tuple(exclude or ()),
        "only": tuple(only or ()),
        "batch_size": batch_size,
        "eps": eps,
        "momentum": momentum,
        "groups": groups,
        "drop_bias": drop_bias,
        "zero_gamma": zero_gamma,
        "per_call": per_call,
        "skip_frozen": skip_frozen,
    }
    given = _read_plan(plan, asked | {"init": init}) if plan is not None else None
    has_weights = weights is not None or pretrained
    asked["init"] = init.value if init else _default_init(norm, zero_gamma, has_weights)
    model_options = ModelOptions(
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
    )
    input_options = InputOptions(
        input=input_items or (), input_file=input_file, data=data, batches=batches, seed=seed
    )
    saved = None
    with session.work():
        if dry_run:
            result: Any = _plan_only(session, model_options, input_options, asked, given, where)
        else:
            result = _insert(
                session,
                model_options,
                input_options,
                asked,
                given,
                where,
                verify=not no_verify,
                keep=(_failed(output) if keep_failed else None, force),
            )
        if kept_as is not None and not dry_run:
            with session.step("writing"):
                saved = _save(result, kept_as, force=force, onnx=not no_onnx, device=where, seed=seed)
            if saved.export is not None:
                session.detail(saved.export.log)
    shown = {}
    if print_code and not dry_run:
        shown["code"] = result.graph.code.strip()
    if diff and not dry_run:
        shown["diff"] = _diff(result)
    session.emit(
        result,
        files=saved.files if saved else None,
        export=saved.export if saved else None,
        environment=saved.report["environment"] if saved else _environment(result, where, seed),
        dry_run=dry_run,
        shown=shown,
    )


def _default_init(norm: o.Norm, zero_gamma: bool, has_weights: bool) -> str:
    """Trained weights are worth keeping, where a norm can start as the old function."""
    able = norm in (o.Norm.BATCH, o.Norm.SYNC) and not zero_gamma
    return "preserve" if has_weights and able else "reset"


def _kept_as(output: Path | None, *, unverified: bool, keep_failed: bool) -> Path | None:
    """Where the result goes; what nobody verified has a name that says so."""
    if output is None or not unverified:
        return output
    if not keep_failed:
        raise UsageError(
            "with --no-verify the result is unverified and is not written",
            hint=f"add --keep-failed, which writes {_named(output, 'unverified')}",
        )
    return _named(output, "unverified")


def _failed(output: Path | None) -> Path | None:
    return None if output is None else _named(output, "failed")


def _named(output: Path, what: str) -> Path:
    return output.with_name(f"{output.name}.{what}")


def _check_folder(place: Path, *, force: bool) -> None:
    # The names of bnify's own files, without importing what writes them.
    ours = ("model.safetensors", "bnify.json", "model.onnx", "model.onnx.data", "report.json")
    check_output(place, force=force, ours=ours)


def _read_plan(path: Path, asked: dict[str, Any]) -> Plan:
    """A plan as --dry-run or a folder holds it, and nothing beside it that contradicts."""
    import json

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
        raise PlanError(f"--plan {path} is not JSON: {error}", hint="write one with --dry-run "
                        "--format json") from error
    if isinstance(data, dict) and isinstance(data.get("plan"), dict):
        data = data["plan"]
    return Plan.from_dict(data)


def _plan_only(
    session: Session,
    model_options: ModelOptions,
    input_options: InputOptions,
    asked: dict[str, Any],
    given: Plan | None,
    device: str,
) -> Any:
    """What --dry-run shows: the plan, as a result that has only that."""
    from bnify import api
    from bnify.cli.planned import Planned

    source, call = _prepare(session, model_options, input_options, given, device)
    if given is None:
        with session.step("planning"):
            given = api.plan(source.model, call, **asked)
    return Planned(plan=given, source=source.source)


def _insert(
    session: Session,
    model_options: ModelOptions,
    input_options: InputOptions,
    asked: dict[str, Any],
    given: Plan | None,
    device: str,
    *,
    verify: bool,
    keep: tuple[Path | None, bool],
) -> Result:
    from bnify import api

    source, call = _prepare(session, model_options, input_options, given, device)
    try:
        with session.step("inserting"):
            result = api.insert(
                source.model,
                call,
                data=load_batches(input_options),
                plan=given,
                verify=verify,
                progress=session.doing,
                **asked,
            )
    except VerificationError as error:
        if error.result is not None:
            error.result.source = source.source
            place, force = keep
            if place is not None:
                _save(error.result, place, force=force, onnx=False, device=device,
                      seed=model_options.seed)
                error.hint = f"it is kept in {place}; {error.hint}"
        raise
    result.source = source.source
    return result


def _prepare(
    session: Session,
    model_options: ModelOptions,
    input_options: InputOptions,
    given: Plan | None,
    device: str,
) -> tuple[Any, Any]:
    """The model and its inputs, where they are to run."""
    from bnify.devices import resolve
    from bnify.structure import draw

    place = resolve(device)
    source = load_source(model_options, session)
    own = source.call
    if given is not None and own is None and given.inputs:
        own = draw(given.call, given.inputs, input_options.seed)
    call = load_inputs(input_options, model=source.model, own=own)
    source.model.to(place)
    return source, call.to(device=place)


def _save(
    result: Result, place: Path, *, force: bool, onnx: bool, device: str, seed: int
) -> Saved:
    from bnify.saved import write

    return write(
        result, place, onnx=onnx, force=force, call=result.call, device=device, seed=seed
    )


def _diff(result: Result) -> str:
    before, after = result.before.splitlines(), str(result.model).splitlines()
    lines = difflib.unified_diff(before, after, "before", "after", lineterm="", n=2)
    return "\n".join(lines) or "(no difference)"


def _environment(result: Any, device: str, seed: int) -> dict[str, Any]:
    from bnify.environment import environment

    hashes = {"model": result.plan.fingerprint.digest}
    checkpoint = result.source.get("checkpoint")
    if checkpoint:
        hashes["checkpoint"] = checkpoint["sha256"]
    return {**environment(device=device, seed=seed), "hashes": hashes}
