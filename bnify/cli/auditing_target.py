"""What ``bnify audit`` audits: a model with its inputs and data, or a file without code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bnify.cli.auditing_options import Asked, Repairing
from bnify.cli.session import Session
from bnify.cli.source import (
    InputOptions,
    ModelOptions,
    Source,
    find_inputs,
    load_batches,
    load_source,
)
from bnify.errors import UsageError

if TYPE_CHECKING:
    from bnify.auditing.finding import AuditReport
    from bnify.structure import Call


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the SPEC names, and everything that an audit of it takes.

    Attributes:
        options: How the SPEC is read.
        model: The model, or the path of a file.
        source: The model with where it came from; None for a file.
        file: The file to show findings at; None where there is none.
        call: Example inputs; None without.
        data: Batches; None without.
        checkpoint: The file that the model's weights are from.
        arguments: Further keyword arguments of :func:`bnify.audit`.
    """

    options: ModelOptions
    inputs: InputOptions
    model: Any
    source: Source | None = None
    file: Path | None = None
    call: Call | None = None
    data: Iterable[Any] | None = None
    checkpoint: Path | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        asked: Asked,
        options: ModelOptions,
        inputs: InputOptions,
        repairing: Repairing,
        session: Session,
    ) -> Self:
        """From the options: nothing is loaded for a file, everything for a model.

        Raises:
            UsageError: An option that cannot be right.
            SpecError: The SPEC names no model, or building it failed.
            WeightsError: The checkpoint cannot be read or does not fit.
        """
        arguments: dict[str, Any] = {**asked.rules, "precision": asked.precision}
        file = _file_of(options.spec)
        if file is not None:
            _refuse_for_file(options, inputs, asked, repairing)
            arguments |= {"reference": _reference(asked, options, session)}
            return cls(options=options, inputs=inputs, model=file, file=file, arguments=arguments)
        source = load_source(options, session)
        if asked.eval_mode:
            source.model.eval()
        arguments |= {"reference": _reference(asked, options, session)}
        return cls(
            options=options,
            inputs=inputs,
            model=source.model,
            source=source,
            file=_python_file(source) or options.weights,
            call=find_inputs(inputs, model=source.model, own=source.call),
            data=load_batches(inputs),
            checkpoint=options.weights if options.as_found else None,
            arguments=arguments,
        )

    def audit(self, model: Any, *, repaired: bool = False) -> AuditReport:
        """Audit this model or file; a repaired model is no longer what the checkpoint has."""
        from bnify.audits import audit

        return audit(
            model,
            self.call,
            self.data,
            batches=self.inputs.batches,
            name=self.options.spec,
            checkpoint=None if repaired else self.checkpoint,
            weights_key=self.options.weights_key,
            **self.arguments,
        )


def _file_of(spec: str) -> Path | None:
    """The path, if the SPEC names a file without code (or what is only a part of one)."""
    from bnify.spec.kinds import FOLDER_FILE, SpecKind, classify

    path = Path(spec)
    try:
        a_folder = path.is_dir()
    except (OSError, ValueError):  # no name that a path can have: classify() says so
        a_folder = False
    if a_folder and not any((path / name).is_file() for name in (FOLDER_FILE, "config.json")):
        return path
    if path.name.endswith((".index.json", ".distcp")):
        return path
    return path if classify(spec) in (SpecKind.CHECKPOINT, SpecKind.ONNX) else None


def _refuse_for_file(
    options: ModelOptions, inputs: InputOptions, asked: Asked, repairing: Repairing
) -> None:
    """Refuse what a file without code cannot take.

    Raises:
        UsageError: Such an option was given.
    """
    spec = options.spec
    given = {
        "--weights": options.weights,
        "--allow-missing": options.allow_missing,
        "--allow-unexpected": options.allow_unexpected,
        "--trust-global": options.trust_global,
        "--unsafe-pickle": options.unsafe_pickle,
        "--arg": options.arg,
        "--arg-json": options.arg_json,
        "--pretrained": options.pretrained,
        "--allow-download": options.allow_download,
        "--eval": asked.eval_mode,
        "--input": inputs.input,
        "--input-file": inputs.input_file,
        "--data": inputs.data,
        "--fix": repairing.fix,
        "--weights-key": options.weights_key if spec.lower().endswith(".onnx") else None,
    }
    for name, value in given.items():
        if value:
            onnx = spec.lower().endswith(".onnx")
            hint = "name the model" if onnx else f"bnify audit SPEC --weights {spec} {name} ..."
            raise UsageError(f"{name} is for a model with code, and {spec} has none", hint=hint)


def _reference(asked: Asked, options: ModelOptions, session: Session) -> Any:
    """The model or the file that the audited one is an average of."""
    if asked.reference is None:
        return None
    file = _file_of(asked.reference)
    if file is not None:
        return file
    named = ModelOptions(
        spec=asked.reference, arg=options.arg, arg_json=options.arg_json, seed=options.seed
    )
    return load_source(named, session).model


def _python_file(source: Source) -> Path | None:
    path = source.source.get("path")
    file = Path(path) if path else None
    return file if file is not None and file.is_file() else None
