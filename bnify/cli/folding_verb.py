"""What ``bnify fold`` does beyond folding: its figures, and its benchmark."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnify.cli.rewriting import Request
from bnify.cli.session import Session
from bnify.errors import BnifyError, ExportError, OptionsError

if TYPE_CHECKING:
    from torch import nn

    from bnify.changes import Change
    from bnify.figures import Figures
    from bnify.latency import Latency
    from bnify.onnx_sizes import OnnxSizes
    from bnify.plan import Plan
    from bnify.result import Result
    from bnify.saved import Saved
    from bnify.structure import Call
    from bnify.verdict import Verification


@dataclass(slots=True, kw_only=True)
class FoldReport:
    """A fold with its figures, in the form of a Result: it is written and reported as one.

    Attributes:
        figures: What it saves, and what it does to the weights.
        latency: What was timed before and after.
        onnx: The ONNX files before and after.
        notes: What could not be timed, and why.
    """

    result: Result
    figures: Figures
    latency: list[Latency] = field(default_factory=list)
    onnx: OnnxSizes | None = None
    notes: list[str] = field(default_factory=list)
    model: nn.Module = field(init=False)
    plan: Plan = field(init=False)
    verification: Verification | None = field(init=False)
    source: Mapping[str, Any] = field(init=False)
    structure: tuple[Change, ...] = field(init=False)
    reference: nn.Module | None = field(init=False)
    files: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("model", "plan", "verification", "source", "structure", "reference", "files"):
            setattr(self, name, getattr(self.result, name))

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready data, with its figures; None for what was not measured."""
        return {
            **self.result.to_dict(),
            **self.figures.to_dict(),
            "latency": [latency.to_dict() for latency in self.latency] or None,
            "onnx": None if self.onnx is None else self.onnx.to_dict(),
        }


def check_emit(emit: str, output: Path | None) -> None:
    """Refuse to write a graph to a folder.

    Raises:
        OptionsError: That was asked for.
    """
    if emit == "graph" and output is not None:
        raise OptionsError(
            f"-o {output} would hold a module tree, and --emit graph gives a graph",
            hint="--emit module; or leave -o out, and see the graph with --print-code",
        )


def completed(result: Result) -> FoldReport:
    """A fold with its figures."""
    from bnify.figures import figures_of

    return FoldReport(result=result, figures=figures_of(result))


def timed(request: Request, session: Session) -> Callable[[FoldReport, Call, Saved | None], None]:
    """What times a fold when it is done and written."""

    def time(report: FoldReport, call: Call, saved: Saved | None) -> None:
        with session.step("timing"):
            _time_eager(report, call, request.device)
        try:
            with session.step("exporting both"), tempfile.TemporaryDirectory() as folder:
                _time_onnx(report, call, request, saved, Path(folder))
        except BnifyError as error:  # not every model can be exported, nor need it be
            report.notes.append(f"not timed as ONNX files: {error.message}")

    return time


def _original(report: FoldReport) -> nn.Module:
    """An eval copy of the original."""
    from bnify.borrow import copy_model

    captured = report.result.captured
    if captured is None:
        raise ExportError("the original is gone")
    return copy_model(captured.model).eval()


def _time_eager(report: FoldReport, call: Call, device: str) -> None:
    from torch import fx

    from bnify.latency import eager_latency, measure_pair

    before, after = _original(report), report.model
    if not isinstance(after, fx.GraphModule):
        report.latency.append(eager_latency(before, after, call, device=device))
        return
    flat = [tensor for _, tensor in call.tensors()]  # a graph takes tensors, flat and in order
    report.latency.append(measure_pair(lambda: call(before), lambda: after(*flat), name="eager"))


def _time_onnx(
    report: FoldReport, call: Call, request: Request, saved: Saved | None, folder: Path
) -> None:
    """Our file against the one that the exporter makes of the original, with its own folding."""
    from torch import fx

    from bnify.latency import onnx_latency
    from bnify.onnx_sizes import OnnxSizes, onnx_size
    from bnify.structure import Call

    original = _original(report)
    if saved is not None and saved.export is not None:
        ours, dynamic = saved.export.path, saved.export.dynamic_batch
    else:
        model = report.model
        as_graph = isinstance(model, fx.GraphModule)
        given = Call(tuple(tensor for _, tensor in call.tensors())) if as_graph else call
        ours, dynamic = _exported(model, given, folder / "folded.onnx", request.opset, True)
    theirs, _ = _exported(original, call, folder / "original.onnx", request.opset, dynamic)
    report.onnx = OnnxSizes(onnx_size(theirs), onnx_size(ours))
    report.latency.append(onnx_latency(theirs, ours, call, model=original, device=request.device))


def _exported(
    model: nn.Module, call: Call, path: Path, opset: int | None, dynamic: bool
) -> tuple[Path, bool]:
    """The exporter's optimised file, for any batch size where that works."""
    from bnify.exporting import export_onnx

    try:
        export_onnx(model, call, path, opset=opset, dynamic_batch=dynamic, verify=False)
    except ExportError:
        if not dynamic:
            raise
        export_onnx(model, call, path, opset=opset, dynamic_batch=False, verify=False)
        dynamic = False
    return path, dynamic
