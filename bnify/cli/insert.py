"""``bnify insert``: norms into a model, verified, written as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from bnify.cli import options as o
from bnify.cli.config import read_config
from bnify.cli.keeping import Keeping
from bnify.cli.rewriting import Request, perform, read_plan
from bnify.cli.session import Session
from bnify.cli.source import InputOptions, ModelOptions


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
            help="How norms start: from scratch, as the old function (default with weights, for "
            "batch and sync), or with the data's statistics.",
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
    output: o.Output = None,
    force: o.Force = False,
    onnx: o.Onnx = True,
    keep_failed: o.KeepFailed = False,
    dry_run: o.DryRun = False,
    plan: o.PlanFile = None,
    diff: o.Diff = False,
    print_code: o.PrintCode = False,
    verify: o.Verify = True,
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
    keeping = Keeping.checked(
        output, force=force, onnx=onnx, keep_failed=keep_failed, verify=verify, dry_run=dry_run
    )
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
    given = read_plan(plan, asked | {"init": init}, verb="insert") if plan is not None else None
    keeps = given is None and (weights is not None or pretrained)  # a plan says itself
    default = default_init(norm, zero_gamma=zero_gamma, has_weights=keeps)
    request = Request(
        verb="insert",
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
        keeping=keeping,
        dry_run=dry_run,
        diff=diff,
        print_code=print_code,
        opset=config.opset,
        k=config.k,
    )
    perform(request, session)


def default_init(norm: o.Norm, *, zero_gamma: bool, has_weights: bool) -> str:
    """Trained weights are worth keeping, where a norm can start as the old function."""
    able = norm in (o.Norm.BATCH, o.Norm.SYNC) and not zero_gamma
    return "preserve" if has_weights and able else "reset"
