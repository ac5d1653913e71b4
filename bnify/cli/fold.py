"""``bnify fold``: norms into neighbouring weights, verified, written as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnify.cli import options as o
from bnify.cli.config import read_config
from bnify.cli.folding_verb import check_emit, completed, timed
from bnify.cli.keeping import Keeping
from bnify.cli.rewriting import Request, perform, read_plan
from bnify.cli.session import Session
from bnify.cli.source import InputOptions, ModelOptions
from bnify.errors import UsageError


def fold(
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
    affines: Annotated[
        bool,
        typer.Option(
            "--affines",
            help="Fold other scales and shifts by channel too: layer scale, input "
            "normalization, those of layer, group and rms norms.",
            rich_help_panel=o.FOLDING,
        ),
    ] = False,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            help="Make one layer of parallel linear branches that are summed, and of two "
            "linear layers in a row.",
            rich_help_panel=o.FOLDING,
        ),
    ] = False,
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            help="Let a scale and shift stay for the inputs of a concatenation that cannot take "
            "a norm.",
            rich_help_panel=o.FOLDING,
        ),
    ] = False,
    untie: Annotated[
        bool,
        typer.Option(
            "--untie",
            help="Give a layer that runs several times with different norms a weight for each.",
            rich_help_panel=o.FOLDING,
        ),
    ] = False,
    emit: Annotated[
        o.Emit,
        typer.Option(
            help="The model's own module tree, or a graph for inference.",
            rich_help_panel=o.FOLDING,
        ),
    ] = o.Emit.MODULE,
    output: o.Output = None,
    force: o.Force = False,
    onnx: o.Onnx = True,
    keep_failed: o.KeepFailed = False,
    dry_run: o.DryRun = False,
    plan: o.PlanFile = None,
    diff: o.Diff = False,
    print_code: o.PrintCode = False,
    verify: o.Verify = True,
    benchmark: Annotated[
        bool,
        typer.Option(
            "--benchmark",
            help="Time the model before and after, and as ONNX files.",
            rich_help_panel=o.CHECKS,
        ),
    ] = False,
    device: o.Device = None,
    fmt: o.FormatOption = o.Form.RICH,
    color: o.ColorOption = o.Color.AUTO,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,  # noqa: ARG001 - read before parsing, so that it holds for usage errors
) -> None:
    """Fold trained norms into neighbouring weights, wherever the algebra is exact.

    The model is folded as it runs in eval mode.

    Example: bnify fold net.py:Net --weights net.pt --input 2,3,224,224 -o out/
    """
    session = Session(ctx, fmt=fmt, color=color, quiet=quiet, verbose=verbose)
    config = read_config(Path.cwd())
    if benchmark and dry_run:
        raise UsageError("--dry-run makes nothing that --benchmark could time")
    asked = {
        "affines": affines,
        "merge": merge,
        "partial": partial,
        "untie": untie,
        "emit": emit.value,
    }
    check_emit(emit.value, output)
    keeping = Keeping.checked(
        output, force=force, onnx=onnx, keep_failed=keep_failed, verify=verify, dry_run=dry_run
    )
    given = read_plan(plan, asked, verb="fold") if plan is not None else None
    if given is not None:
        check_emit(given.options.get("emit", ""), output)
    request = Request(
        verb="fold",
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
        asked=asked,
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
    finish = timed(request, session) if benchmark else None
    perform(request, session, complete=completed, finish=finish)
