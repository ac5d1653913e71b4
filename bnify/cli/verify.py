"""``bnify verify``: two models, or a model and a file, against each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from bnify.cli import options as o
from bnify.cli.config import read_config
from bnify.cli.session import Session
from bnify.cli.source import InputOptions, ModelOptions, load_batches, load_inputs, load_source

if TYPE_CHECKING:
    from bnify.structure import Call

_SIDE = "a SPEC, a bnify folder, or an .onnx file"


def verify(
    ctx: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="A", help=f"What is right: {_SIDE}.")],
    candidate: Annotated[str, typer.Argument(metavar="B", help=f"What is judged: {_SIDE}.")],
    weights: o.Weights = None,
    weights_key: o.WeightsKey = None,
    candidate_weights: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option(metavar="FILE", help="Checkpoint of B.", rich_help_panel=o.MODEL),
    ] = None,
    allow_missing: o.AllowMissing = None,
    allow_unexpected: o.AllowUnexpected = None,
    trust_global: o.TrustGlobal = None,
    unsafe_pickle: o.UnsafePickle = False,
    arg: o.Arg = None,
    arg_json: o.ArgJson = None,
    candidate_arg: Annotated[
        o.Texts,
        typer.Option(
            metavar="NAME=VALUE",
            help="Argument of B; A's where both are the same SPEC.",
            rich_help_panel=o.MODEL,
        ),
    ] = None,
    pretrained: o.Pretrained = False,
    allow_download: o.AllowDownload = False,
    input_items: o.InputItems = None,
    input_file: o.InputFile = None,
    data: o.Data = None,
    batches: o.Batches = 8,
    seed: o.Seed = 0,
    k: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            metavar="X", help="Times A's own float32 error allowed (10).", rich_help_panel=o.CHECKS
        ),
    ] = None,
    rtol: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            metavar="X",
            help="Relative tolerance where float64 is impossible.",
            rich_help_panel=o.CHECKS,
        ),
    ] = None,
    atol: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            metavar="X",
            help="Absolute tolerance where float64 is impossible.",
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
    """Judge B by how far it is from A, measured against A's own rounding error.

    The weights of A are --weights, those of B --candidate-weights.

    Example: bnify verify net.py:Net model.onnx --weights net.safetensors
    """
    session = Session(ctx, fmt=fmt, color=color, quiet=quiet, verbose=verbose)
    config = read_config(Path.cwd())
    where = device or config.device or "cpu"
    chosen: dict[str, Any] = {
        "k": k if k is not None else config.k,
        "rtol": rtol if rtol is not None else config.rtol,
        "atol": atol if atol is not None else config.atol,
    }
    first = ModelOptions(
        spec=reference,
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
    same = candidate == reference
    second = replace(
        first,
        spec=candidate,
        weights=candidate_weights,
        **({} if candidate_weights is not None else _WITHOUT_WEIGHTS),
        arg=candidate_arg or (first.arg if same else ()),
        arg_json=arg_json if same and not candidate_arg else None,
        pretrained=pretrained and same,
        allow_download=allow_download and same,
    )
    inputs = InputOptions(
        input=input_items or (), input_file=input_file, data=data, batches=batches, seed=seed
    )
    with session.work():
        from bnify import api
        from bnify.devices import resolve
        from bnify.environment import environment
        from bnify.verification.cases import redrawn_seeds

        resolve(where)
        left, left_call = _side(first, session)
        right, right_call = _side(second, session)
        models = [side for side in (left, right) if not isinstance(side, str)]
        own = left_call if left_call is not None else right_call
        files = [side for side in (left, right) if isinstance(side, str)]
        drawn = not (inputs.input or inputs.input_file) and (data is None or not models)
        if own is None and files and drawn:
            own = _declared(files[0], models[0] if models else None, seed, session)
        call = load_inputs(inputs, model=models[0] if models else None, own=own)
        batches_given = load_batches(inputs)
        with session.step("verifying"):
            verification = api.verify(
                left,
                right,
                call,
                device=where,
                data=batches_given,
                batches=batches,
                seeds=redrawn_seeds(seed),
                **{name: value for name, value in chosen.items() if value is not None},
            )
    made = environment(device=where, seed=seed)
    session.emit(verification, target=f"{reference} {candidate}", environment=made)
    return 0 if verification.passed else 1


def _declared(file: str, model: Any, seed: int, session: Session) -> Call:
    """Inputs drawn from what an ONNX file declares, and said."""
    from bnify.spec import draw_onnx_inputs

    call, note = draw_onnx_inputs(file, model=model, seed=seed)
    session.note(note)
    return call


_WITHOUT_WEIGHTS: dict[str, Any] = {
    "weights_key": None,
    "allow_missing": (),
    "allow_unexpected": (),
    "trust_global": (),
    "unsafe_pickle": False,
}


def _side(options: ModelOptions, session: Session) -> tuple[Any, Call | None]:
    """A model and its inputs, or the path of an ONNX file."""
    from bnify.errors import SpecError, UsageError
    from bnify.spec import SpecKind, classify

    if classify(options.spec) is not SpecKind.ONNX:
        source = load_source(options, session)
        return source.model.eval(), source.call
    if options.weights is not None:
        raise UsageError(f"{options.spec} has its weights inside", hint="leave the weights out")
    if not Path(options.spec).is_file():
        raise SpecError(f"there is no file {options.spec}", hint="check the path")
    return options.spec, None
