"""PyTorch to ONNX: exported from an eval copy, checked in onnxruntime, put in place whole.

The unoptimised file is verified first, so that a fault found there is the model's or the
exporter's and not a fusion's; then the optimised file is verified and shipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnify import devices
from bnify.atomic import written_file
from bnify.borrow import copy_model
from bnify.errors import UsageError, VerificationError
from bnify.exporting.program import (
    EXTERNAL_ABOVE,
    check_opset,
    check_symbolic,
    data_name,
    exported,
    refuse_train_mode,
    saved,
)
from bnify.quiet import captured_streams
from bnify.structure import Call, Inputs, as_call
from bnify.verdict import Check, Verification
from bnify.verification.budget import judge
from bnify.verification.cases import Measured, Origin, measure
from bnify.verification.localise import first_divergent
from bnify.verification.runners import OnnxRunner, TorchRunner, as_runner, first_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """An ONNX file and what is known of it.

    Attributes:
        path: The file.
        opset: Version of the standard operators in it.
        norms_before: Normalization operators as the exporter wrote them.
        norms_after: Normalization operators in the shipped file.
        verification: The verdict by budget; None if ``verify=False``.
        notes: What a reader has to know.
        dynamic_batch: Whether the file takes any batch size.
        external_data: Name of the file with the weights beside it; None where they are inside.
        log: What the exporter wrote to the terminal, for ``-v``.
    """

    path: Path
    opset: int
    norms_before: int
    norms_after: int
    verification: Verification | None = None
    notes: tuple[str, ...] = ()
    dynamic_batch: bool = True
    external_data: str | None = None
    log: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The export as JSON-ready data."""
        data = asdict(self)
        del data["log"]
        return {**data, "path": str(self.path)}


def export_onnx(
    model: nn.Module,
    inputs: Inputs,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    opset: int | None = None,
    optimize: bool = True,
    k: float = 10.0,
    verify: bool = True,
    device: str = "cpu",
    data: Iterable[Any] | None = None,
    batches: int = 8,
    seeds: Sequence[int] = (1, 2),
    force: bool = True,
    keep_failed: bool = False,
    external_above: int = EXTERNAL_ABOVE,
    reference: nn.Module | None = None,
) -> Export:
    """Write a model to an ONNX file that was run in onnxruntime before it is put in place.

    Args:
        model: The model, in eval mode; a copy is exported.
        inputs: Example inputs.
        path: The ``.onnx`` file to write.
        dynamic_batch: Make the first axis symbolic wherever it is as long as the batch.
        opset: Version of the standard operators; None is torch's choice.
        optimize: Ship the exporter's optimised graph.
        k: How many times the model's own float32 error the file may be off.
        verify: Run the file, at two more batch sizes too, and compare.
        device: Where the file is run.
        data: The user's batches to verify on, instead of the example and redrawn inputs.
        batches: How many of them at most.
        seeds: Seeds of the redrawn inputs.
        force: Replace an existing file.
        keep_failed: Keep a file that failed verification, as ``NAME.failed.onnx``.
        external_above: Bytes of weights above which they go into a file of their own.
        reference: What the file is verified against; the model itself by default.

    Raises:
        ExportError: A norm is in train mode, the export fails, the opset is not the one asked
            for, or onnxruntime cannot run the file.
        VerificationError: The file computes something else; nothing is left at ``path``.
        UsageError: The file exists and ``force`` is False, the path is no ``.onnx``, or torch
            cannot write the opset.
        DeviceError: The device is not there.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise UsageError(f"{path} does not end in .onnx", hint="for example -o model.onnx")
    check_opset(opset)
    refuse_train_mode(model)
    where = devices.resolve(device)
    eval_copy = copy_model(model).eval().to("cpu")
    call = as_call(inputs).to(device="cpu")
    notes: list[str] = []
    if dynamic_batch and call.batch is None:
        dynamic_batch = False
        notes.append("no input has a batch axis: the file is static")
    elif not dynamic_batch and call.batch is not None:
        notes.append(f"the file takes batches of {call.batch} only")
    with captured_streams() as said, written_file(path, force=force) as folder:
        program = exported(eval_copy, call, dynamic_batch=dynamic_batch, opset=opset)
        plain = folder / "unoptimised" / path.name
        plain.parent.mkdir()
        before = saved(program, plain, opset, external_above)
        if dynamic_batch:
            check_symbolic(program)
        if optimize:
            program.optimize()
            after = saved(program, folder / path.name, opset, external_above)
        else:
            after = saved(program, folder / path.name, opset, external_above)
        verification = None
        export = Export(
            path=path,
            opset=int(program.model.opset_imports[""]),
            norms_before=before,
            norms_after=after,
            notes=tuple(notes),
            dynamic_batch=dynamic_batch,
            external_data=data_name(folder / path.name),
        )
        if verify:
            with devices.full_precision():
                truth = eval_copy if reference is None else copy_model(reference).eval().to("cpu")
                measured = measure(
                    TorchRunner(truth), call, data=data, batches=batches, seeds=seeds
                )
                verification = _verified(
                    eval_copy, measured, plain, folder / path.name, program, where, k
                )
            export = replace(export, verification=verification)
            if not verification.passed:
                kept = _keep(program, path, external_above) if keep_failed else None
                raise _failure(replace(export, path=kept or path), kept)
    return replace(export, log=said.text)


def _verified(
    model: nn.Module,
    measured: Measured,
    plain: Path,
    shipped: Path,
    program: torch.onnx.ONNXProgram,
    device: torch.device,
    k: float,
) -> Verification:
    """The shipped file's verdict, with the unoptimised file's as its first check."""
    # The first two inputs and the other batch sizes are enough to tell a fault of the exporter
    # from one of the optimiser.
    few = replace(measured, cases=_few(measured))
    first = judge(few, OnnxRunner(plain, optimize=False, model=model), k=k, localise=False)
    last = judge(
        measured, as_runner(shipped, device, model=model), device=device, k=k, localise=False
    )
    check = Check(
        name="unoptimised file",
        passed=first.passed,
        error=first.checks[0].error,
        threshold=first.checks[0].threshold,
        detail=next((output.detail for output in first.outputs if not output.passed), ""),
    )
    passed = first.passed and last.passed
    where, notes = None, last.notes
    if not passed and not measured.failure:
        file = shipped if first.passed else plain
        where = _first_divergent(model, file, measured.call, k, program)
        if first.passed:
            notes = (
                *notes,
                "only the optimised file fails: export with optimize=False (--no-optimize)",
            )
    return replace(
        last, passed=passed, checks=(check, *last.checks), first_divergent=where, notes=notes
    )


def _few(measured: Measured) -> tuple[Any, ...]:
    resized = [case for case in measured.cases if case.origin is Origin.RESIZED]
    return (*[case for case in measured.cases if case.origin is not Origin.RESIZED][:2], *resized)


def _first_divergent(
    model: nn.Module, file: Path, call: Call, k: float, program: torch.onnx.ONNXProgram
) -> str | None:
    try:
        return first_divergent(model, file, call, k, program.exported_program)
    except Exception as error:  # the verdict has fallen already; this only explains it
        return f"not localised: {first_line(error)}"


def _keep(program: torch.onnx.ONNXProgram, path: Path, external_above: int) -> Path:
    kept = path.with_name(f"{path.stem}.failed.onnx")
    with written_file(kept, force=True) as folder:
        saved(program, folder / kept.name, None, external_above)
    return kept


def _failure(export: Export, kept: Path | None) -> VerificationError:
    verification = export.verification
    where = verification.first_divergent if verification is not None else None
    at = f", first at {where}" if where else ""
    left = f"it was kept as {kept.name}" if kept else "nothing was written"
    return VerificationError(
        f"the exported file does not compute what the model computes{at}; {left}",
        hint="keep it for inspection with keep_failed=True (--keep-failed)" if not kept else "",
        result=export,
    )
