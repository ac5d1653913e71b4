"""What onnxruntime means when it cannot load a file: an operator has no kernel, or worse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from bnify.errors import ExportError

_HALF_TYPES: Final = {10: "float16", 16: "bfloat16"}  # of onnx.TensorProto

# What onnxruntime says of an operator that it has not for the types in the file.
_LOADING: Final = re.compile(r"^Load model from .*? failed: ?")
_NO_KERNEL: Final = re.compile(
    r"Could not find an implementation for (?P<operator>\w+)\(\d+\) node with name '(?P<node>.*?)'"
)
_NOT_ALLOWED: Final = re.compile(
    r"of operator \((?P<operator>\w+)\) in node \((?P<node>.*?)\) is invalid"
)


def load_error(source: str | Path | bytes, name: str, said: str, *, cuda: bool) -> ExportError:
    """Why there is no session, in words that lead on.

    Args:
        source: The file, or a serialized model.
        name: What to call it.
        said: The first line of onnxruntime's error.
        cuda: The session was to run on CUDA.
    """
    said = _LOADING.sub("", said)
    missing = _NO_KERNEL.search(said) or _NOT_ALLOWED.search(said)
    half = _half_type(source, missing["node"]) if missing else None
    if missing is None or half is None:
        return ExportError(
            f"onnxruntime cannot load {name}: {said}",
            hint="run `bnify doctor` to see what is installed",
        )
    return ExportError(
        f"onnxruntime on {'CUDA' if cuda else 'CPU'} has no {half} {missing['operator']}: "
        f"{name} cannot be run there",
        hint="export a float32 copy (model.float())",
    )


def _half_type(source: str | Path | bytes, node: str) -> str | None:
    """The 16-bit floating-point type that a node of a file computes in; None for others."""
    import onnx

    if isinstance(source, bytes):
        graph = onnx.load_from_string(source).graph
    else:
        graph = onnx.load(str(source), load_external_data=False).graph
    types = {value.name: value.data_type for value in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        types[value.name] = value.type.tensor_type.elem_type
    read = [name for one in graph.node if one.name == node for name in one.input]
    return next((_HALF_TYPES[types[n]] for n in read if types.get(n) in _HALF_TYPES), None)
