"""Example inputs of an ONNX file that nobody gave any: drawn from what the file declares."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bnify.errors import SpecError, UsageError
from bnify.spec.inputs import DTYPES, parse_inputs
from bnify.structure import Call

if TYPE_CHECKING:
    from torch import nn

_BATCH: Final = 2  # of a first axis that the file leaves open
# onnx's names of element types where they differ from torch's.
_ELEMENTS: Final = {"float": "float32", "double": "float64"}


@dataclass(frozen=True, slots=True)
class Declared:
    """One input of a file.

    Attributes:
        name: As in the file.
        sizes: The axes; a symbolic first one is a batch of 2.
        dtype: torch's name of it.
    """

    name: str
    sizes: tuple[int, ...]
    dtype: str

    @property
    def item(self) -> str:
        """As ``--input`` takes it, without the name."""
        sizes = ",".join(map(str, self.sizes)) or "()"
        return f"{sizes}:{self.dtype}"


def draw_onnx_inputs(
    path: str | Path, *, model: nn.Module | None = None, seed: int = 0
) -> tuple[Call, str]:
    """Inputs of the names, types and shapes that the file declares, and a note that says which.

    They are keyword arguments, by the file's names, where there is no model to disagree or where
    its forward knows them all; else positional, in the file's order.

    Args:
        path: The ONNX file.
        model: A model that is to take the same inputs.
        seed: Of the random values.

    Raises:
        SpecError: The file cannot be read.
        UsageError: An axis other than the first is symbolic, or an input is no plain tensor.
    """
    found = declared_inputs(path)
    names = [one.name for one in found]
    by_name = all(name.isidentifier() for name in names)
    if model is not None:
        by_name = by_name and set(names) <= set(inspect.signature(model.forward).parameters)
    items = [f"{one.name}={one.item}" if by_name else one.item for one in found]
    shown = " ".join(f"--input {one.name}={one.item}" for one in found)
    return parse_inputs(items, seed), f"inputs drawn from what {path} declares: {shown}"


def declared_inputs(path: str | Path) -> list[Declared]:
    """The inputs that a file declares; raises as :func:`draw_onnx_inputs`."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except (OSError, DecodeError, ValueError) as error:
        raise SpecError(f"{path} cannot be read as an ONNX file", hint="write it again") from error
    stored = {tensor.name for tensor in graph.initializer}  # before IR 4 weights were inputs too
    found = []
    for value in graph.input:
        if value.name in stored:
            continue
        tensor = value.type.tensor_type
        element = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        dtype = _ELEMENTS.get(element, element)
        if not value.type.HasField("tensor_type") or dtype not in DTYPES:
            raise UsageError(
                f"input {value.name} of {path} is no tensor that can be drawn ({element})",
                hint="give the inputs with --input-file",
            )
        if not tensor.HasField("shape"):
            raise _open(path, value.name, "its shape")
        sizes = []
        for axis, dim in enumerate(tensor.shape.dim):
            fixed = dim.HasField("dim_value") and dim.dim_value > 0
            if not fixed and axis:
                raise _open(path, value.name, f"axis {axis} ({dim.dim_param or 'unnamed'})")
            sizes.append(dim.dim_value if fixed else _BATCH)
        found.append(Declared(value.name, tuple(sizes), dtype))
    if not found:
        raise UsageError(f"{path} declares no input", hint="there is nothing to verify it on")
    return found


def _open(path: str | Path, name: str, what: str) -> UsageError:
    return UsageError(
        f"input {name} of {path} leaves {what} open",
        hint=f"give the sizes, as in --input {name}=2,3,224,224",
    )
