"""The folder that a verb writes with ``-o``: four files, no pickle, whole or not at all.

    model.safetensors   the weights
    bnify.json          SPEC, plan, versions, hashes: all that is needed to rebuild the model
    model.onnx          exported from an eval copy, checked in onnxruntime
    report.json         what the verb found, as --format json prints it
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from torch import nn

from bnify.atomic import moved_aside, write_text, written_folder
from bnify.environment import environment, file_sha256
from bnify.errors import ExportError, SpecError, UsageError, VerificationError
from bnify.plan import Plan
from bnify.stored import State, read_tensors, restore, state_of, write_tensors
from bnify.strict_json import dumps
from bnify.structure import Call
from bnify.verdict import Verification

if TYPE_CHECKING:
    from bnify.export import Export

SCHEMA: Final = 1
WEIGHTS: Final = "model.safetensors"
RECIPE: Final = "bnify.json"
ONNX: Final = "model.onnx"
REPORT: Final = "report.json"
#: Everything a folder may hold and still be replaced by --force.
OURS: Final = frozenset({WEIGHTS, RECIPE, ONNX, f"{ONNX}.data", REPORT})

_FOLDER_HINT = "name a folder that bnify wrote with -o or Result.save"


class Savable(Protocol):
    """What a result must have to be saved."""

    model: nn.Module
    plan: Plan
    verification: Verification | None
    source: Mapping[str, Any]
    files: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What :func:`write` wrote.

    Attributes:
        directory: The folder.
        files: Path of each file, by what it is: ``weights``, ``recipe``, ``onnx``, ``report``.
        report: The content of ``report.json``.
        export: The exported file's facts; None without one.
    """

    directory: Path
    files: dict[str, str]
    report: dict[str, Any]
    export: Export | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFolder:
    """A folder that bnify wrote, as data; nothing of it has been run.

    Attributes:
        directory: The folder.
        spec: Where the model came from; None when it was saved from a live model.
        plan: The plan.
        verified: True, False (kept with --keep-failed), None (never verified).
        versions: Versions it was written with.
        hashes: SHA-256 of weights, ONNX file and the checkpoint; the plan's model digest.
        aliases: Further names of stored tensors.
        extra: JSON values of modules with an extra state.
    """

    directory: Path
    spec: dict[str, Any] | None
    plan: Plan
    verified: bool | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def onnx(self) -> Path | None:
        """The exported file, if the folder has one."""
        path = self.directory / ONNX
        return path if path.is_file() else None

    def state(self) -> State:
        """The stored weights, read now."""
        tensors = read_tensors(self.directory / WEIGHTS)
        return State(tensors, dict(self.aliases), dict(self.extra))


def save(
    result: Savable, directory: str | Path, *, onnx: bool = True, force: bool = False
) -> Path:
    """Write the four files and note them in ``result.files``; raises as :func:`write`."""
    return write(result, directory, onnx=onnx, force=force).directory


def write(
    result: Savable,
    directory: str | Path,
    *,
    onnx: bool = True,
    force: bool = False,
    call: Call | None = None,
    device: str = "cpu",
    seed: int | None = None,
) -> Saved:
    """Write the four files beside ``directory`` and put them in place together.

    Args:
        result: What ``insert`` or ``apply`` gave.
        directory: The folder to write; an existing one is refused without ``force``.
        onnx: Export ``model.onnx`` too.
        force: Replace a folder that holds nothing but files of bnify.
        call: Inputs to export with; None draws them from the plan.
        device: Where the exported file is checked.
        seed: Noted in the report.

    Raises:
        UsageError: The folder exists, or holds files that bnify did not write.
        ExportError: The export failed; nothing is written.
        VerificationError: The exported file does not compute what the model computes.
        OutputError: The disk is full or read-only.
    """
    target = Path(directory)
    with written_folder(target, force=force, ours=OURS) as folder:
        state = state_of(result.model)
        write_tensors(state.tensors, folder / WEIGHTS)
        hashes = {
            "model": result.plan.fingerprint.digest,
            "weights": file_sha256(folder / WEIGHTS),
        }
        export = _export(result, folder / ONNX, call, device) if onnx else None
        if export is not None:
            hashes["onnx"] = file_sha256(folder / ONNX)
        if result.source.get("checkpoint"):
            hashes["checkpoint"] = result.source["checkpoint"]["sha256"]
        made = environment(device=device, seed=seed)
        verdict = result.verification
        recipe = {
            "schema": SCHEMA,
            "spec": _portable(result.source, target),
            "plan": result.plan.to_dict(),
            "verified": None if verdict is None else verdict.passed,
            "aliases": state.aliases,
            "extra": state.extra,
            "versions": made["versions"],
            "hashes": hashes,
        }
        names = {"weights": WEIGHTS, "recipe": RECIPE, "report": REPORT}
        if export is not None:
            names["onnx"] = ONNX
        report = {
            **result.to_dict(),
            "export": None if export is None else export_facts(export),
            "files": names,
            "environment": {**made, "hashes": hashes},
        }
        write_text(folder / RECIPE, dumps(recipe))
        write_text(folder / REPORT, dumps(report))
    files = {kind: str(target / name) for kind, name in names.items()}
    result.files.update(files)
    return Saved(directory=target, files=files, report={**report, "files": files}, export=export)


def _export(result: Savable, path: Path, call: Call | None, device: str) -> Export:
    """The ONNX file of an eval copy, checked against it."""
    from bnify.borrow import copy_model
    from bnify.export import export_onnx
    from bnify.structure import draw

    inputs = call if call is not None else draw(result.plan.call, result.plan.inputs)
    try:
        export = export_onnx(copy_model(result.model).eval(), inputs, path, device=device)
    except ExportError as error:
        without = "leave the ONNX file out with --no-onnx (onnx=False)"
        hint = f"{error.hint}; or {without}" if error.hint else without
        raise ExportError(error.message, hint=hint) from error
    if export.verification is not None and not export.verification.passed:
        raise VerificationError(
            "the exported ONNX file does not compute what the model computes; nothing was written",
            hint="leave the file out with --no-onnx, and report the model",
            result=export,
        )
    return export


def export_facts(export: Export) -> dict[str, Any]:
    """The facts of an exported file as JSON-ready data."""
    verification = export.verification
    return {
        "opset": export.opset,
        "norms_before": export.norms_before,
        "norms_after": export.norms_after,
        "verification": None if verification is None else verification.to_dict(),
        "notes": list(export.notes),
    }


def _portable(source: Mapping[str, Any], target: Path) -> dict[str, Any] | None:
    """The SPEC with its path relative to the folder: the two can be moved together.

    None for a live model, whose origin nobody knows.
    """
    spec = dict(source) or None
    if spec is None or not spec.get("path"):
        return spec
    path = Path(spec["path"]).resolve()
    try:
        relative = os.path.relpath(path, Path(os.path.realpath(target)))
    except ValueError:  # another drive on Windows: only the name can be found again
        relative = path.name
    return {**spec, "path": Path(relative).as_posix()}


def read(directory: str | Path) -> SavedFolder:
    """Read a folder's recipe; neither code nor weights are loaded.

    Raises:
        SpecError: There is no such folder, bnify did not write it, or it is damaged.
        PlanError: Its plan was edited into something that is no plan.
    """
    folder = Path(directory)
    path = folder / RECIPE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        left = moved_aside(Path(os.path.realpath(folder))) if not folder.exists() else None
        hint = f"an interrupted write left the old version: mv {left} {folder}" if left else ""
        raise SpecError(f"{folder} has no {RECIPE}", hint=hint or _FOLDER_HINT) from None
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} cannot be read: {error}", hint=_FOLDER_HINT) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise SpecError(
            f"{path} has schema {found!r}, this bnify reads {SCHEMA}",
            hint="read it with the version that wrote it",
        )
    return SavedFolder(
        directory=folder,
        spec=data.get("spec"),
        plan=Plan.from_dict(data.get("plan")),
        verified=data.get("verified"),
        versions=data.get("versions", {}),
        hashes=data.get("hashes", {}),
        aliases=data.get("aliases", {}),
        extra=data.get("extra", {}),
    )


def load(
    directory: str | Path,
    model: nn.Module | None = None,
    *,
    apply: Callable[[nn.Module, Plan], nn.Module],
) -> nn.Module:
    """Rebuild a saved model: the SPEC gives the code, the plan the norms, the folder the weights.

    What a reader should know (changed code, changed weights) comes as a warning.

    Args:
        directory: A folder written by :func:`save`.
        model: A fresh instance of the model; needed when it was saved from a live one.
        apply: Applies a plan to a model and gives the rewritten model.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        SpecError: The model's code cannot be found or run.
        UsageError: The folder holds no SPEC and no ``model`` was given.
        PlanError: The plan does not fit the model.
        WeightsError: The weights do not fit the model.
    """
    folder = read(directory)
    if folder.verified is False:
        warnings.warn(f"{folder.directory} failed its verification when it was kept", stacklevel=3)
    if model is None:
        model = _build(folder, apply)
    rewritten = apply(model, folder.plan)
    state = folder.state()
    if file_sha256(folder.directory / WEIGHTS) != folder.hashes.get("weights"):
        warnings.warn(f"{WEIGHTS} in {folder.directory} has changed since it was saved", stacklevel=3)
    restore(rewritten, state, where=str(folder.directory))
    return rewritten.eval()


def _build(folder: SavedFolder, apply: Callable[[nn.Module, Plan], nn.Module]) -> nn.Module:
    """A fresh instance of the model that a folder's SPEC names."""
    spec = folder.spec
    if not spec:
        raise UsageError(
            f"{folder.directory} was saved from a live model and holds no SPEC",
            hint=f'pass a fresh instance: bnify.load("{folder.directory}", model=MyNetwork())',
        )
    if spec["kind"] == "folder":
        return load(_find(folder, spec), apply=apply)
    from bnify.spec import load_model

    target = spec["target"]
    if spec.get("path"):
        target = f"{_find(folder, spec)}:{spec['attribute']}"
    return load_model(target, arguments=spec.get("arguments") or {}).model


def _find(folder: SavedFolder, spec: Mapping[str, Any]) -> Path:
    """The SPEC's file or folder, seen from the saved folder, then from the current one."""
    places = (folder.directory / spec["path"], Path(spec["path"]))
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise SpecError(
            f"{folder.directory} was made from {spec['target']}, and {spec['path']} is not there",
            hint="run where the code is, or pass a fresh instance: bnify.load(dir, model=...)",
        )
    known = spec.get("sha256")
    if known and found.is_file() and file_sha256(found) != known:
        warnings.warn(
            f"{found} has changed since {folder.directory} was saved from it", stacklevel=5
        )
    return found


def source_of(source: Any, *, arguments: Mapping[str, Any], pretrained: bool) -> dict[str, Any]:
    """Where a model came from, for ``Result.source``: a ``ModelSource`` and how it was asked for."""
    is_file = str(source.kind) in {"file", "folder"}
    return {
        "target": source.spec,
        "kind": str(source.kind),
        "path": str(source.file) if is_file and source.file else None,
        "attribute": source.spec.rpartition(":")[2] if is_file else None,
        "sha256": source.sha256,
        "arguments": dict(arguments),
        "pretrained": pretrained,
    }
