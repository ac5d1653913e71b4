"""From the options to a model with its weights, its inputs and its data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnify.errors import SpecError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from bnify.cli.session import Session
    from bnify.structure import Call


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How a SPEC is to be turned into a model; fields are the options' names.

    ``as_found`` is no option: an audit takes running statistics that a checkpoint lacks, and
    values that are not finite, as they are, to report them.
    """

    spec: str
    weights: Path | None = None
    weights_key: str | None = None
    allow_missing: Sequence[str] = ()
    allow_unexpected: Sequence[str] = ()
    trust_global: Sequence[str] = ()
    unsafe_pickle: bool = False
    arg: Sequence[str] = ()
    arg_json: Path | None = None
    pretrained: bool = False
    allow_download: bool = False
    seed: int = 0
    as_found: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InputOptions:
    """Where example inputs come from; fields are the options' names."""

    input: Sequence[str] = ()
    input_file: Path | None = None
    data: str | None = None
    batches: int = 8
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model, where it came from, and the inputs that come with it."""

    model: nn.Module
    source: dict[str, Any] = field(default_factory=dict)
    call: Call | None = None


def load_source(options: ModelOptions, session: Session) -> Source:
    """Build the model of a SPEC, with its weights; notes go to stderr.

    Raises:
        UsageError: The SPEC or an option of it cannot be right.
        SpecError: It names no model, or building it failed.
        WeightsError: The checkpoint cannot be read or does not fit.
    """
    from bnify import spec

    if options.allow_download and not options.pretrained:
        raise UsageError(
            "--allow-download has nothing to load", hint="add --pretrained for the weights"
        )
    _check_weight_options(options)
    if spec.classify(options.spec) is spec.SpecKind.FOLDER:
        loaded = _load_folder(options)
    else:
        arguments = spec.parse_arguments(options.arg, options.arg_json)
        with session.step(f"loading {options.spec}"):
            found = spec.load_model(
                options.spec,
                arguments=arguments,
                pretrained=options.pretrained,
                allow_download=options.allow_download,
                seed=options.seed,
            )
        for note in found.notes:
            session.note(note)
        from bnify.saved import source_of

        described = source_of(found, arguments=arguments, pretrained=options.pretrained)
        loaded = Source(model=found.model, source=described, call=found.call)
    loaded.source["seed"] = options.seed
    if options.weights is not None:
        with session.step(f"loading {options.weights}"):
            report = spec.load_weights(
                loaded.model,
                options.weights,
                key=options.weights_key,
                allow_missing=options.allow_missing,
                allow_unexpected=options.allow_unexpected,
                trust_globals=options.trust_global,
                unsafe_pickle=options.unsafe_pickle,
                as_found=options.as_found,
            )
        for note in report.notes:
            session.note(note)
        loaded.source["checkpoint"] = {"name": options.weights.name, "sha256": report.sha256}
    return loaded


def _check_weight_options(options: ModelOptions) -> None:
    """Options that say how to read --weights mean nothing without it."""
    if options.weights is not None:
        return
    given = {
        "--weights-key": options.weights_key,
        "--allow-missing": options.allow_missing,
        "--allow-unexpected": options.allow_unexpected,
        "--trust-global": options.trust_global,
        "--unsafe-pickle": options.unsafe_pickle,
    }
    for name, value in given.items():
        if value:
            raise UsageError(f"{name} says how to read --weights, which is missing")


def _load_folder(options: ModelOptions) -> Source:
    """The model of a folder that bnify wrote."""
    from bnify import api
    from bnify.saved import read
    from bnify.structure import draw

    if options.arg or options.arg_json or options.pretrained:
        raise UsageError(
            f"{options.spec} is a bnify folder, which has its arguments and weights",
            hint="leave --arg, --arg-json and --pretrained out",
        )
    folder = read(options.spec)
    described = {
        "target": options.spec,
        "kind": "folder",
        "path": str(Path(options.spec).resolve()),
    }
    call = draw(folder.plan.call, folder.plan.inputs, options.seed) if folder.plan.inputs else None
    return Source(model=api.load(options.spec), source=described, call=call)


def load_inputs(options: InputOptions, *, model: nn.Module | None, own: Call | None) -> Call:
    """The example inputs: given, read from a file, the first batch of the data, or the model's own.

    Args:
        options: What the user asked for.
        model: Whose forward the first batch is for; None where only files are compared.
        own: Inputs that the SPEC brings.

    Raises:
        UsageError: There are none, or they are given twice or malformed.
        SpecError: The file cannot be read.
    """
    call = find_inputs(options, model=model, own=own)
    if call is None:
        raise UsageError(
            "no example inputs", hint="say what forward() takes, for example --input 2,3,224,224"
        )
    return call


def find_inputs(options: InputOptions, *, model: nn.Module | None, own: Call | None) -> Call | None:
    """As :func:`load_inputs`; None where there are no inputs."""
    from bnify import spec

    if options.input and options.input_file is not None:
        raise UsageError("--input and --input-file both give the inputs", hint="give one of them")
    if options.input:
        return spec.parse_inputs(options.input, options.seed)
    if options.input_file is not None:
        return spec.read_input_file(options.input_file)
    if own is not None:
        return own
    if options.data is not None and model is not None:
        return _first_batch(options, model)
    return None


def load_batches(options: InputOptions) -> Iterable[Any] | None:
    """The batches of ``--data``, or None."""
    from bnify import spec

    if options.data is None:
        return None
    return spec.load_data(options.data, batches=options.batches)


def _first_batch(options: InputOptions, model: nn.Module) -> Call:
    """The inputs in the first batch of the data: as many values as forward needs, labels left out.

    Raises:
        SpecError: The batch is nothing that forward takes.
    """
    from bnify.spec.usercode import a_type
    from bnify.structure import first_call

    batch = next(iter(load_batches(options) or ()))
    call = first_call(batch, model)
    if call is not None:
        return call
    raise SpecError(
        f"the first batch of {options.data} is {a_type(batch)} that forward() cannot take",
        hint="give the example inputs with --input",
    )
