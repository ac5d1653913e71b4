"""``bnify export``: a model as an ONNX file, verified against it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from bnify.atomic import check_output
from bnify.cli import options as o
from bnify.cli.config import read_config
from bnify.cli.session import Session
from bnify.cli.source import InputOptions, ModelOptions, load_batches, load_inputs, load_source
from bnify.errors import UsageError


def export(
    ctx: typer.Context,
    spec: o.Spec,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="ONNX file to write.", rich_help_panel=o.OUTPUT
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
    input_items: o.InputItems = None,
    input_file: o.InputFile = None,
    data: o.Data = None,
    batches: o.Batches = 8,
    seed: o.Seed = 0,
    opset: Annotated[
        Optional[int],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option(metavar="N", help="Opset; torch's own by default.", rich_help_panel=o.OUTPUT),
    ] = None,
    dynamic_batch: Annotated[
        bool,
        typer.Option(
            "--dynamic-batch/--no-dynamic-batch",
            " /--static-batch",
            help="Take any batch size, or the input's only.",
            show_default=False,
            rich_help_panel=o.OUTPUT,
        ),
    ] = True,
    optimize: Annotated[
        bool,
        typer.Option(
            "--optimize/--no-optimize",
            help="Optimise the graph, or leave it as traced.",
            show_default=False,
            rich_help_panel=o.OUTPUT,
        ),
    ] = True,
    force: o.Force = False,
    keep_failed: Annotated[
        bool,
        typer.Option(
            "--keep-failed",
            help="Keep a file that fails, as NAME.failed.onnx.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = False,
    k: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            metavar="X",
            help="Times the float32 model's own error allowed (10).",
            rich_help_panel=o.CHECKS,
        ),
    ] = None,
    device: o.Device = None,
    fmt: o.FormatOption = o.Form.RICH,
    color: o.ColorOption = o.Color.AUTO,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,  # noqa: ARG001 - read before parsing, so that it holds for usage errors
) -> int:
    """Write a model as an ONNX file and verify the file against it.

    The model is exported in eval mode.

    Example: bnify export out/ -o model.onnx
    """
    session = Session(ctx, fmt=fmt, color=color, quiet=quiet, verbose=verbose)
    if output.suffix != ".onnx":
        raise UsageError(f"-o {output} is no .onnx file", hint=f"-o {output}.onnx")
    check_output(output, force=force)
    config = read_config(Path.cwd())
    where = device or config.device or "cpu"
    factor = k if k is not None else config.k
    chosen: dict[str, Any] = {"k": factor} if factor is not None else {}
    with session.work():
        from bnify import api
        from bnify.devices import resolve
        from bnify.environment import environment
        from bnify.verification.cases import redrawn_seeds

        resolve(where)
        source = load_source(
            ModelOptions(
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
            session,
        )
        inputs = InputOptions(
            input=input_items or (), input_file=input_file, data=data, batches=batches, seed=seed
        )
        call = load_inputs(inputs, model=source.model, own=source.call)
        with session.step("exporting"):
            written = api.export(
                source.model.eval(),
                call,
                output,
                dynamic_batch=dynamic_batch,
                opset=opset if opset is not None else config.opset,
                optimize=optimize,
                device=where,
                data=load_batches(inputs),
                batches=batches,
                seeds=redrawn_seeds(seed),
                force=force,
                keep_failed=keep_failed,
                **chosen,
            )
        session.detail(written.log)
    made = environment(device=where, seed=seed)
    session.emit(written, target=spec, environment=made)
    return 0 if written.verification is None or written.verification.passed else 1
