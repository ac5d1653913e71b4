"""From a model to an ONNX file: what torch's exporter has to be asked, and kept from."""

from __future__ import annotations

import keyword
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from bnify.errors import ExportError, UsageError
from bnify.structure import Call
from bnify.verification.program import dynamic_shapes, exportable, positional
from bnify.verification.runners import root_cause

STATIC_BATCH: Final = "export with a static batch: dynamic_batch=False (--static-batch)"
_FIRST_OPSET: Final = 14  # the lowest that onnx's converter reaches from torch's own 18
# Exceptions of torch's exporter about an operator that it has no translation for.
_NO_OPERATOR: Final = frozenset({"DispatchError", "UnsupportedOperatorError"})
EXTERNAL_ABOVE: Final = 1536 * 1024 * 1024  # bytes; protobuf itself ends at 2 GiB
NORM_OPERATORS: Final = frozenset(
    {
        "BatchNormalization",
        "InstanceNormalization",
        "GroupNormalization",
        "LayerNormalization",
        "SimplifiedLayerNormalization",
        "RMSNormalization",
    }
)
# Batch and instance norms of all kinds, synchronised and lazy ones too, have one base.
_NORMS: Final = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
_STACK_TRACE: Final = "pkg.torch.onnx.stack_trace"


def refuse_train_mode(model: nn.Module) -> None:
    """Stop at a norm in train mode: the exporter would write inference batch norm, silently.

    Raises:
        ExportError: The model or one of its norms is in train mode; the first one is named.
    """
    training = [
        name for name, module in model.named_modules() if _is_norm(module) and module.training
    ]
    if training:
        others = len(training) - 1
        more = f" (and {others} more norm{'s' if others > 1 else ''})" if others else ""
        raise ExportError(
            f"{training[0] or type(model).__name__} is in train mode{more}; "
            "the file would hold its inference form without saying so",
            hint="call model.eval() before exporting",
        )
    if model.training:
        raise ExportError(
            f"{type(model).__name__} is in train mode", hint="call model.eval() before exporting"
        )


def _is_norm(module: nn.Module) -> bool:
    """By class or by its statistics, never by name: a norm may be a subclass with children."""
    statistics = {"running_mean", "running_var"}
    return isinstance(module, _NORMS) or any(
        name in statistics for name, _ in module.named_buffers(recurse=False)
    )


def exported(
    model: nn.Module, call: Call, *, dynamic_batch: bool, opset: int | None
) -> torch.onnx.ONNXProgram:
    """Run torch's exporter, without its optimiser, on a model in eval mode.

    Raises:
        ExportError: It fails; the message is the first line of the cause, the hint is about it.
    """
    given = call
    if dynamic_batch and call.batch == 1:
        call = call.resized(2)  # axes of length 1 are taken for constants
    try:
        return _export(model, call, dynamic_batch=dynamic_batch, opset=opset)
    except ExportError:
        raise
    except Exception as error:  # the user's forward runs, inside torch's exporter
        what = f"{type(model).__name__} cannot be exported"
        odd = _odd_names(model)  # torch.export forgives some of them
        if odd and isinstance(_origin(error), SyntaxError):
            raise ExportError(
                f"{what}: torch.export makes code of the module name {odd[0]!r}, "
                "which is no Python name",
                hint=f"rename the module {odd[0]!r}",
            ) from error
        raise ExportError(
            f"{what}: {root_cause(error)}",
            hint=_hint(error, model, given if dynamic_batch else None, opset),
        ) from error


def _export(
    model: nn.Module, call: Call, *, dynamic_batch: bool, opset: int | None
) -> torch.onnx.ONNXProgram:
    with torch.no_grad():
        program = torch.onnx.export(
            exportable(model, call),
            positional(call),
            kwargs=dict(call.clone().kwargs),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=dynamic_shapes(model, call) if dynamic_batch else None,
        )
    if program is None:
        raise RuntimeError("the exporter returned nothing")
    return program


def _hint(error: Exception, model: nn.Module, call: Call | None, opset: int | None) -> str:
    """What to do about a failed export; ``call`` is None where the batch was static already."""
    cause = _origin(error)
    if type(cause).__name__ in _NO_OPERATOR:
        return "write this operator of forward() with others that ONNX has"
    if "data-dependent" in str(cause):
        return "forward() branches on values of a tensor: use torch.where, or torch.cond"
    if call is not None and not _runs(model, call):
        return "forward() itself fails on these inputs: give others"
    if call is not None and _exports_static(model, call, opset):
        return STATIC_BATCH
    if isinstance(cause, SyntaxError):
        return (
            "torch.export makes code of names in the model: rename those that are no Python names"
        )
    return "torch.export must be able to record forward(): rewrite the part that the error names"


def _runs(model: nn.Module, call: Call) -> bool:
    try:
        exportable(model, call)
    except Exception:  # the user's forward, as in exported()
        return False
    return True


def _exports_static(model: nn.Module, call: Call, opset: int | None) -> bool:
    """Whether the dynamic batch alone is at fault; a second export is the one way to tell."""
    try:
        _export(model, call, dynamic_batch=False, opset=opset)
    except Exception:  # as in exported(): the first failure is the one to report
        return False
    return True


def _origin(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _odd_names(model: nn.Module) -> list[str]:
    """Names of modules that no attribute of Python code can have; numbers are those of lists."""
    return [
        name
        for name, _ in model.named_modules()
        if name and not all(map(_is_python, name.split(".")))
    ]


def _is_python(part: str) -> bool:
    return part.isdecimal() or (part.isidentifier() and not keyword.iskeyword(part))


def check_opset(opset: int | None) -> None:
    """Refuse an opset that torch's exporter cannot write, before anything is exported.

    Raises:
        UsageError: It cannot.
    """
    from onnx.defs import onnx_opset_version

    last = onnx_opset_version()
    if opset is not None and not _FIRST_OPSET <= opset <= last:
        raise UsageError(
            f"opset {opset} cannot be written: torch's exporter makes 18 and up (to {last} "
            f"here), and can convert some models down to {_FIRST_OPSET}",
            hint="leave the opset to torch, or take 18",
        )


def check_symbolic(program: torch.onnx.ONNXProgram) -> None:
    """Stop at a batch that the exporter fixed without a word.

    Raises:
        ExportError: It did.
    """
    shapes = [value.shape for value in program.model.graph.inputs if value.shape]
    if shapes and isinstance(shapes[0][0], int):
        raise ExportError(
            f"the batch came out fixed at {shapes[0][0]} although it was to be dynamic",
            hint=f"forward() reads the batch size as a number; or {STATIC_BATCH}",
        )


def saved(
    program: torch.onnx.ONNXProgram, file: Path, opset: int | None, external_above: int
) -> int:
    """Write the program, without the user's source paths; returns the number of its norms.

    Raises:
        ExportError: The opset is not the one that was asked for.
    """
    got = program.model.opset_imports.get("")
    if opset is not None and got != opset:
        raise ExportError(
            f"opset {opset} was asked for and the exporter wrote opset {got}",
            hint=f"use --opset {got}, or another version that torch can convert to",
        )
    _strip_paths(program.model)
    weights = program.model.graph.initializers.values()
    size = sum(value.const_value.nbytes for value in weights if value.const_value is not None)
    program.save(str(file), external_data=size > external_above)
    return count_norms(program.model)


def count_norms(model: Any) -> int:
    """Normalization operators in an onnx_ir model, in subgraphs and functions too."""
    return sum(node.op_type in NORM_OPERATORS for node in _all_nodes(model))


def _all_nodes(model: Any) -> Iterator[Any]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _strip_paths(model: Any) -> None:
    """Drop stack traces: they hold absolute paths of the exporting machine. Scopes stay."""
    places = [model, *model.graphs(), *model.functions.values(), *_all_nodes(model)]
    places += [value for graph in model.graphs() for value in (*graph.inputs, *graph.outputs)]
    for place in places:
        for key, value in list(place.metadata_props.items()):
            if key == _STACK_TRACE or 'File "' in value:
                del place.metadata_props[key]
        if place.doc_string and 'File "' in place.doc_string:
            place.doc_string = None


def data_name(file: Path) -> str | None:
    """Name of the file beside this one that holds its weights; None where they are inside."""
    beside = file.with_name(file.name + ".data")
    return beside.name if beside.exists() else None
