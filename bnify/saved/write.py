"""Writing a saved folder: everything beside its place first, then all of it at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx, nn

from bnify.atomic import write_text, written_folder
from bnify.borrow import copy_model, seeded
from bnify.changes import Change
from bnify.environment import environment, file_sha256
from bnify.errors import ExportError, PlanError, VerificationError
from bnify.plan import Plan
from bnify.ranks import on_first_rank
from bnify.saved.folder import ONNX, OURS, RECIPE, REPORT, SCHEMA, WEIGHTS
from bnify.saved.state import state_of, write_tensors
from bnify.strict_json import dumps
from bnify.structure import Call, draw
from bnify.verdict import Verification
from bnify.verification.cases import redrawn_seeds

if TYPE_CHECKING:
    from bnify.exporting import Export


class Savable(Protocol):
    """What a result must have to be saved."""

    model: nn.Module
    plan: Plan
    verification: Verification | None
    source: Mapping[str, Any]
    structure: tuple[Change, ...]
    files: dict[str, str]

    @property
    def reference(self) -> nn.Module | None:
        """What an exported file has to compute; None for the model itself."""

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


def save(result: Savable, directory: str | Path, *, onnx: bool = True, force: bool = False) -> Path:
    """Write the four files and note them in ``result.files``; raises as :func:`write`.

    Under ``torchrun`` every rank calls it; rank 0 writes and the others wait.
    """
    result.files.update(
        on_first_rank(lambda: write(result, directory, onnx=onnx, force=force).files)
    )
    return Path(directory)


def write(
    result: Savable,
    directory: str | Path,
    *,
    onnx: bool = True,
    force: bool = False,
    call: Call | None = None,
    device: str = "cpu",
    seed: int | None = None,
    opset: int | None = None,
    k: float = 10.0,
    data: Iterable[Any] | None = None,
    batches: int = 8,
) -> Saved:
    """Write the four files beside ``directory`` and put them in place together.

    Args:
        result: What ``insert`` or ``apply`` gave.
        directory: The folder to write; an existing one is refused without ``force``.
        onnx: Export ``model.onnx`` too.
        force: Replace a folder that holds nothing but files of bnify.
        call: Inputs to export with; None draws them from the plan.
        device: Where the exported file is checked.
        seed: Of the inputs that the file is checked on; noted in the report.
        opset: Of the ONNX file; torch's own when None.
        k: How many times the float32 model's own error the ONNX file may be off.
        data: The user's batches to check the ONNX file on, instead of inputs at random.
        batches: How many of them at most.

    Raises:
        PlanError: The result is a graph, which a folder cannot hold.
        UsageError: The folder exists, or holds files that bnify did not write.
        ExportError: The export failed; nothing is written.
        VerificationError: The exported file does not compute what the model computes.
        OutputError: The disk is full or read-only.
    """
    target = Path(directory)
    if isinstance(result.model, fx.GraphModule):
        raise PlanError(
            "a folder holds a module tree, and emit='graph' gives a graph",
            hint="save result.model with bnify.export, or fold with emit='module'",
        )
    with written_folder(target, force=force, ours=OURS) as folder:
        state = state_of(result.model)
        write_tensors(state.tensors, folder / WEIGHTS)
        hashes = {
            "model": result.plan.fingerprint.digest,
            "weights": file_sha256(folder / WEIGHTS),
        }
        export = None
        if onnx:
            inputs = call if call is not None else draw(result.plan.call, result.plan.inputs)
            try:
                export = _export(
                    result.model,
                    inputs,
                    folder / ONNX,
                    reference=result.reference,
                    device=device,
                    opset=opset,
                    k=k,
                    data=data,
                    batches=batches,
                    seeds=redrawn_seeds(seed or 0),
                )
            except VerificationError as error:  # the user knows the folder, not its place till now
                error.export, error.result = replace(error.result, path=target / ONNX), result
                raise
            hashes["onnx"] = file_sha256(folder / ONNX)
        if result.source.get("checkpoint"):
            hashes["checkpoint"] = result.source["checkpoint"]["sha256"]
        made = environment(device=device, seed=seed)
        verdict = result.verification
        recipe = {
            "schema": SCHEMA,
            "spec": _portable(result.source, target),
            "plan": result.plan.to_dict(),
            "structure": [change.to_dict() for change in result.structure],
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
    if export is not None:  # it was made in the folder that has been renamed since
        export = replace(export, path=target / ONNX)
    result.files.update(files)
    return Saved(directory=target, files=files, report={**report, "files": files}, export=export)


def _export(model: nn.Module, inputs: Call, path: Path, **options: Any) -> Export:
    """The ONNX file of an eval copy, checked against it."""
    from bnify.exporting import STATIC_BATCH, export_onnx

    without = "leave the ONNX file out: onnx=False (--no-onnx)"
    try:
        alone = copy_model(model).eval()
        if inputs.batch is None or _takes_other_batches(alone, inputs):
            return export_onnx(alone, inputs, path, **options)
        fixed = export_onnx(alone, inputs, path, dynamic_batch=False, **options)
        note = f"the file takes batches of {inputs.batch} only, as the model does"
        others = (n for n in fixed.notes if not n.startswith("the file takes batches of"))
        return replace(fixed, notes=(note, *others))
    except ExportError as error:
        # A folder's file has no option for a static batch.
        kept = error.hint if STATIC_BATCH not in error.hint else ""
        hint = f"{kept}; or {without}" if kept else without
        raise ExportError(error.message, hint=hint) from error
    except VerificationError as error:
        raise VerificationError(error.message, hint=without, result=error.result) from error


def _takes_other_batches(model: nn.Module, call: Call) -> bool:
    """Whether the model runs at a batch size that is not the example's."""
    with torch.no_grad(), seeded(0):
        for size in (3, 5):
            if size == call.batch:
                continue
            try:
                call.resized(size)(model)
            except Exception:  # the user's forward: anything can come out of it
                return False
    return True


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
    if not source:
        return None
    spec = dict(source)
    if not spec.get("path"):
        return spec
    path = Path(spec["path"]).resolve()
    try:
        relative = Path(os.path.relpath(path, os.path.realpath(target))).as_posix()
    except ValueError:  # another drive on Windows: only the name can be found again
        relative = path.name
    spec["path"] = relative
    if Path(spec["target"].rpartition(":")[0] or spec["target"]).is_absolute():
        spec["target"] = ":".join(part for part in (path.name, spec.get("attribute")) if part)
    return spec


def source_of(source: Any, *, arguments: Mapping[str, Any], pretrained: bool) -> dict[str, Any]:
    """Where a model came from, for ``Result.source``, told from its ``ModelSource``."""
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
