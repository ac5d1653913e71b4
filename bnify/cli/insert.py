"""``bnify insert``: norms into a model, verified, written as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from bnify.cli import options as o
from bnify.cli.config import read_config
from bnify.cli.inserting import (
    Request,
    check_folder,
    default_init,
    failed_as,
    insert_and_save,
    kept_as,
    made_with,
    plan_only,
    read_plan,
    rewrite_only,
    rewritten_forward,
    tree_difference,
)
from bnify.cli.session import Session
from bnify.cli.source import InputOptions, ModelOptions

if TYPE_CHECKING:
    from bnify.result import Result


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
        typer.Option(metavar="N", help="Samples per device in training.", rich_help_panel=o.NORMS),
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
        typer.Option("--zero-gamma", help="Residual branches start at 0.", rich_help_panel=o.NORMS),
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
    onnx: Annotated[
        bool,
        typer.Option(
            "--onnx/--no-onnx",
            help="Write an ONNX file too.",
            show_default=False,
            rich_help_panel=o.OUTPUT,
        ),
    ] = True,
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
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Measure the result, or nothing.",
            show_default=False,
            rich_help_panel=o.CHECKS,
        ),
    ] = True,
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
    config = read_config(Path.cwd())
    place = kept_as(output, unverified=not verify, keep_failed=keep_failed)
    failed = failed_as(output, keep_failed=keep_failed)
    for folder in (place, failed):
        if folder is not None and not dry_run:
            check_folder(folder, force=force)
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
    given = read_plan(plan, asked | {"init": init}) if plan is not None else None
    keeps = given is None and (weights is not None or pretrained)  # a plan says itself
    default = default_init(norm, zero_gamma=zero_gamma, has_weights=keeps)
    request = Request(
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
        ),
        inputs=InputOptions(
            input=input_items or (), input_file=input_file, data=data, batches=batches, seed=seed
        ),
        asked=asked | {"init": init.value if init else default},
        plan=given,
        device=device or config.device or "cpu",
        verify=verify,
        output=place,
        failed=failed,
        force=force,
        onnx=onnx,
        opset=config.opset,
        k=config.k,
    )
    with session.work():
        if dry_run:
            if output is not None:
                session.note(f"--dry-run writes nothing: -o {output} is left alone")
            shown = {}
            if diff or print_code:
                planned, rewritten = rewrite_only(request, session)
                shown = _shown(rewritten, diff=diff, print_code=print_code)
            else:
                planned = plan_only(request, session)
            made = made_with(planned, request)
            session.emit(planned, environment=made, dry_run=True, shown=shown)
            return
        result, saved = insert_and_save(request, session)
        shown = _shown(result, diff=diff, print_code=print_code)
    session.emit(
        result,
        files=saved.files if saved else None,
        export=saved.export if saved else None,
        environment=saved.report["environment"] if saved else made_with(result, request),
        shown=shown,
    )


def _shown(result: Result, *, diff: bool, print_code: bool) -> dict[str, str]:
    """The code and the difference that were asked for."""
    shown = {"code": rewritten_forward(result)} if print_code else {}
    return shown | ({"diff": tree_difference(result)} if diff else {})
