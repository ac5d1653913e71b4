"""``bnify audit``: the linter, on a model, a checkpoint or an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from bnify.cli import options as o
from bnify.cli.auditing_options import Asked, Repairing
from bnify.cli.auditing_verb import perform
from bnify.cli.config import read_config
from bnify.cli.session import Session
from bnify.cli.source import InputOptions, ModelOptions


def audit(
    ctx: typer.Context,
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SPEC",
            help="weights.safetensors, model.pt, model.onnx, net.py:MyNetwork, pkg.mod:factory, "
            "torchvision:NAME, timm:NAME, hf:DIR, or a bnify folder",
            show_default=False,
        ),
    ],
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
    eval_mode: Annotated[
        bool,
        typer.Option(
            "--eval",
            help="Put the model in eval mode first: audited as it is deployed.",
            rich_help_panel=o.MODEL,
        ),
    ] = False,
    input_items: o.InputItems = None,
    input_file: o.InputFile = None,
    data: o.Data = None,
    batches: o.Batches = 8,
    reference: Annotated[
        Optional[str],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option(
            metavar="FILE|SPEC",
            help="The model that this one is an average of (EMA, SWA).",
            rich_help_panel=o.INPUTS,
        ),
    ] = None,
    seed: o.Seed = 0,
    select: Annotated[
        o.Texts,
        typer.Option(
            metavar="CODES",
            help="Run these only: BN1,BN203 (prefixes count); repeat.",
            rich_help_panel=o.RULES,
        ),
    ] = None,
    ignore: Annotated[
        o.Texts, typer.Option(metavar="CODES", help="Not these.", rich_help_panel=o.RULES)
    ] = None,
    extend_select: Annotated[
        o.Texts,
        typer.Option(
            metavar="CODES", help="These too, though off by default.", rich_help_panel=o.RULES
        ),
    ] = None,
    target: Annotated[
        Optional[o.Precision],  # noqa: UP045
        typer.Option(
            help="The precision of the deployment, for what folding does to it.",
            rich_help_panel=o.RULES,
        ),
    ] = None,
    fail_on: Annotated[
        Optional[o.FailOn],  # noqa: UP045
        typer.Option(
            help="Exit with 1 on a finding as bad or worse (error).", rich_help_panel=o.RULES
        ),
    ] = None,
    baseline: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE", help="Known findings, which do not count.", rich_help_panel=o.RULES
        ),
    ] = None,
    write_baseline: Annotated[
        bool,
        typer.Option(
            "--write-baseline",
            help="Write what is found to --baseline FILE.",
            rich_help_panel=o.RULES,
        ),
    ] = False,
    fix: Annotated[
        bool,
        typer.Option(
            "--fix",
            help="Repair what can be without changing the function; with -o or --diff.",
            rich_help_panel=o.FIXES,
        ),
    ] = False,
    unsafe_fixes: Annotated[
        bool,
        typer.Option(
            "--unsafe-fixes",
            help="Also what changes it; with --data, what is proved on them.",
            rich_help_panel=o.FIXES,
        ),
    ] = False,
    diff: o.Diff = False,
    output: o.Output = None,
    force: o.Force = False,
    onnx: o.Onnx = True,
    statistics: Annotated[
        bool,
        typer.Option(
            "--statistics", help="Count by rule instead of listing.", rich_help_panel=o.GENERAL
        ),
    ] = False,
    fmt: Annotated[
        o.AuditForm,
        typer.Option("--format", help="How the result is written.", rich_help_panel=o.GENERAL),
    ] = o.AuditForm.RICH,
    color: o.ColorOption = o.Color.AUTO,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,  # noqa: ARG001 - read before parsing, so that it holds for usage errors
) -> int:
    """Find what is wrong with the norms of a model, a checkpoint or an ONNX file.

    Ends with 1 if there is an error (--fail-on). What was not checked is listed with the input
    that would enable it.

    Example: bnify audit net.py:Net --weights net.pt --input 2,3,224,224
    """
    session = Session(ctx, fmt=fmt, color=color, quiet=quiet, verbose=verbose)
    config = read_config(Path.cwd())
    asked = Asked.of(
        config.audit,
        select=select,
        ignore=ignore,
        extend_select=extend_select,
        fail_on=fail_on,
        baseline=baseline,
        write_baseline=write_baseline,
        precision=target,
        reference=reference,
        eval_mode=eval_mode,
        statistics=statistics,
    )
    repairing = Repairing.checked(
        fix=fix,
        unsafe=unsafe_fixes,
        diff=diff,
        output=output,
        force=force,
        onnx=onnx,
        opset=config.opset,
        k=config.k,
    )
    model = ModelOptions(
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
        as_found=not (trust_global or unsafe_pickle),
    )
    inputs = InputOptions(
        input=input_items or (), input_file=input_file, data=data, batches=batches, seed=seed
    )
    return perform(asked, model, inputs, repairing, session)
