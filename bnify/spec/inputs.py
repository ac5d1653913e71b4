"""Example inputs from text (``--input``) and from files (``--input-file``).

    [NAME=]SIZES[:dtype][@values]      1,3,224,224    ids=1,128@int(0,30522)    x=4,8:float64@ones

SIZES are the axes, ``()`` a scalar. Without a dtype the values decide: int64 for ``int``, else
float32. Without values floats are normal, integers ``int(0,2)`` (0 or 1: valid as a mask and in
any vocabulary), booleans either. ``uniform(a,b)`` and ``int(a,b)`` exclude b.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bnify.errors import SpecError, UsageError
from bnify.structure import Call

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
    "complex64": torch.complex64,
}
_FORM = "write [NAME=]1,3,224,224[:dtype][@normal|uniform(0,1)|int(0,10)|ones|zeros]"
_ITEM = re.compile(
    r"(?:(?P<name>[^=@:,]*)=)?(?P<sizes>[^:@=]*)(?::(?P<dtype>[^@]*))?(?:@(?P<values>.*))?"
)
_VALUES = re.compile(r"(normal|ones|zeros)|(uniform|int)\(([^,()]+),([^,()]+)\)")
_MOST_VALUES = 2**48  # torch counts in 64 bits and fails in other words beyond them
_POSITIONAL = re.compile(r"(?:arr_)?(\d+)")


def parse_inputs(items: Sequence[str], seed: int = 0) -> Call:
    """Draw the inputs that texts describe: unnamed ones are positional, named ones keywords.

    Args:
        items: One text an input, ``"1,3,224,224"`` or ``"ids=1,128:int64@int(0,30522)"``.
        seed: Of the random values.

    Raises:
        UsageError: An item cannot be right; the message repeats it.
    """
    if not items:
        raise UsageError("no input given", hint=_FORM)
    generator = torch.Generator().manual_seed(seed)
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for item in items:
        name, tensor = _parse_input(item, generator)
        if name is None:
            args.append(tensor)
        elif name in kwargs:
            raise _wrong(item, f"{name} is given twice", "give it once")
        else:
            kwargs[name] = tensor
    return Call(tuple(args), kwargs)


def _parse_input(item: str, generator: torch.Generator) -> tuple[str | None, Tensor]:
    match = _ITEM.fullmatch(item.strip())
    if match is None:
        raise _wrong(item, "cannot be read")
    name = match["name"]
    if name is not None and not name.isidentifier():
        raise _wrong(item, f"{name!r} is no argument name")
    shape = _sizes(item, match["sizes"])
    values = _VALUES.fullmatch(match["values"].replace(" ", "")) if match["values"] else None
    if match["values"] is not None and values is None:
        raise _wrong(item, f"unknown values {match['values']!r}")
    kind = (values[1] or values[2]) if values else None
    dtype = _dtype(item, match["dtype"], kind)
    if kind is None:
        kind = "normal" if dtype.is_floating_point or dtype.is_complex else "int"
        low, high = 0.0, 2.0
    else:
        low, high = _range(item, kind, values) if values and values[2] else (0.0, 0.0)
    _check_range(item, kind, dtype, low, high)
    try:
        return name, _draw(kind, shape, dtype, low, high, generator)
    except (RuntimeError, MemoryError) as error:
        raise _wrong(item, f"{math.prod(shape):,} values do not fit in memory") from error


def _sizes(item: str, text: str) -> tuple[int, ...]:
    if text.strip() == "()":
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise _wrong(item, f"{text!r} is no list of sizes")
    sizes = tuple(int(part) for part in parts)
    if math.prod(sizes) > _MOST_VALUES:
        raise _wrong(item, f"{math.prod(sizes):,} values do not fit in memory")
    if 0 in sizes:
        raise _wrong(item, "a size of 0 leaves no values", "sizes are 1 or more")
    return sizes


def _dtype(item: str, text: str | None, kind: str | None) -> torch.dtype:
    if text is None:
        return torch.int64 if kind == "int" else torch.float32
    if text not in DTYPES:
        raise _wrong(item, f"unknown dtype {text!r}", f"known are {', '.join(DTYPES)}")
    return DTYPES[text]


def _range(item: str, kind: str, values: re.Match[str]) -> tuple[float, float]:
    convert = int if kind == "int" else float
    try:
        low, high = convert(values[3]), convert(values[4])
    except ValueError:
        raise _wrong(item, f"{values[0]} has no two numbers") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise _wrong(item, f"{values[0]} is an empty range", "the second number is the larger one")
    return low, high


def _check_range(item: str, kind: str, dtype: torch.dtype, low: float, high: float) -> None:
    """Refuse values that the dtype cannot hold."""
    inexact = dtype.is_floating_point or dtype.is_complex
    name = str(dtype).removeprefix("torch.")
    if kind in ("normal", "uniform") and not inexact:
        raise _wrong(item, f"{kind} values are no {name}", f"@int(0,10) draws {name}")
    if kind == "int" and not inexact:
        least, most = (0, 1) if dtype == torch.bool else _limits(dtype)
        if low < least or high - 1 > most:
            raise _wrong(item, f"{name} holds {least} to {most}")


def _limits(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return int(info.min), int(info.max)


def _draw(
    kind: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    low: float,
    high: float,
    generator: torch.Generator,
) -> Tensor:
    match kind:
        case "ones":
            return torch.ones(shape, dtype=dtype)
        case "zeros":
            return torch.zeros(shape, dtype=dtype)
        case "int":
            return torch.randint(int(low), int(high), shape, generator=generator).to(dtype)
        case "uniform":
            return (torch.rand(shape, generator=generator) * (high - low) + low).to(dtype)
        case _:
            drawn = torch.complex64 if dtype.is_complex else torch.float32
            return torch.randn(shape, generator=generator, dtype=drawn).to(dtype)


def _wrong(item: str, why: str, hint: str = _FORM) -> UsageError:
    return UsageError(f"--input {item}: {why}", hint=hint)


# -- files ---------------------------------------------------------------------------------------


def read_input_file(path: str | Path) -> Call:
    """Read inputs from a .npz or .safetensors file.

    Arrays named ``0``, ``1``, ... or ``arr_0``, ``arr_1``, ... are positional, others keywords.

    Raises:
        UsageError: The file has another suffix.
        SpecError: It cannot be read, or holds something that is no tensor.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".safetensors"):
        raise UsageError(
            f"--input-file {path}: unknown suffix {suffix!r}", hint="pass a .npz or .safetensors"
        )
    if not path.is_file():
        raise SpecError(f"--input-file {path}: there is no such file", hint="check the path")
    try:
        tensors = _read_npz(path) if suffix == ".npz" else load_file(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, SafetensorError, KeyError) as error:
        line = str(error).partition("\n")[0]
        raise SpecError(
            f"--input-file {path} cannot be read: {line}", hint="write it again"
        ) from error
    if not tensors:
        raise SpecError(f"--input-file {path} holds no array", hint="np.savez(path, x=array)")
    return _arranged(tensors, path)


def _read_npz(path: Path) -> dict[str, Tensor]:
    tensors = {}
    with (
        path.open("rb") as stream,  # np.load forgets to close a damaged file
        np.load(stream, allow_pickle=False) as arrays,  # an array of objects is a pickle
    ):
        for name in arrays.files:
            array: Any = arrays[name]
            try:
                native = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))
                tensors[name] = torch.from_numpy(native.reshape(array.shape))
            except TypeError:
                raise ValueError(f"{name} is an array of {array.dtype}, not of numbers") from None
    return tensors


def _arranged(tensors: Mapping[str, Tensor], path: Path) -> Call:
    positional: dict[int, Tensor] = {}
    kwargs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _POSITIONAL.fullmatch(name):
            if int(match[1]) in positional:
                raise SpecError(f"--input-file {path}: two arrays are number {match[1]}")
            positional[int(match[1])] = tensor
        elif name.isidentifier():
            kwargs[name] = tensor
        else:
            raise SpecError(
                f"--input-file {path}: {name!r} is no argument name", hint="rename the array"
            )
    if sorted(positional) != list(range(len(positional))):
        numbers = ", ".join(str(number) for number in sorted(positional))
        raise SpecError(
            f"--input-file {path}: positional arrays are {numbers}, with a gap",
            hint="number them from 0",
        )
    return Call(tuple(positional[index] for index in range(len(positional))), kwargs)
