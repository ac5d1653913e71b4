"""Tensors in a checkpoint file: names, shapes and dtypes at once, values only when asked for.

A .safetensors file is read without torch: its header, which the safetensors library has checked,
and then slices of it. A pickle is read by torch, with ``weights_only=True``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from bnify.auditing.state import Vector
from bnify.errors import WeightsError
from bnify.spec.formats import Format, format_of, printable, unreadable

if TYPE_CHECKING:
    from torch import Tensor

#: Name → shape and dtype (``"float32"``).
Tensors: TypeAlias = Mapping[str, tuple[tuple[int, ...], str]]

# What safetensors calls a dtype → what torch and numpy call it. The rest keep their own name: no
# norm has such statistics.
_DTYPES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_NUMBERS: Final = frozenset(_DTYPES.values()) - {"bool"}
#: More channels than any norm has: what claims them is read by no one.
_MOST_CHANNELS: Final = 2**22


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stored:
    """One state dict of a file.

    Attributes:
        key: Its dotted key in the file; ``""`` for the whole.
        tensors: Shape and dtype by name.
        vector: Reads the values of a tensor as float64, flat.
    """

    key: str
    tensors: Tensors
    vector: Callable[[str], Vector]

    def is_vector(self, name: str) -> bool:
        """Whether there is such a tensor, real numbers along one axis (or a single one)."""
        shape, dtype = self.tensors.get(name, ((), ""))
        size = prod(shape)
        return dtype in _NUMBERS and 0 < size <= _MOST_CHANNELS and size == max(shape, default=1)


def read_stored(path: Path, key: str | None = None) -> tuple[Stored, ...]:
    """Every state dict in a checkpoint, or under a key; optimizer states are none.

    Args:
        path: A .safetensors file, or one that ``torch.save`` wrote.
        key: Dotted key of what to read.

    Raises:
        WeightsError: It cannot be read, is a part of a distributed checkpoint or a pickle that
            wants more than weights, or has nothing under the key.
    """
    if format_of(path) is Format.SAFETENSORS:
        return (_safetensors(path, key),)
    return _pickled(path, key)


# -- safetensors ---------------------------------------------------------------------------------


def _safetensors(path: Path, key: str | None) -> Stored:
    header, start = _header(path)
    inside = f"{key}." if key else ""
    entries = {
        name.removeprefix(inside): e for name, e in header.items() if name.startswith(inside)
    }
    if inside and not entries:
        raise WeightsError(
            f"{path} has nothing under {key!r}: there is {printable(', '.join(list(header)[:5]))}",
            hint="leave --weights-key out",
        )

    def vector(name: str) -> Vector:
        shape, dtype = tensors[name]
        first, end = entries[name]["data_offsets"]
        with path.open("rb") as stream:
            stream.seek(start + first)
            data = stream.read(end - first)
        values = np.frombuffer(data, dtype=_numpy_dtype(dtype))
        if values.size != prod(shape):
            raise WeightsError(f"{path} was cut short while it was read", hint="try again")
        result: Vector = values.astype(np.float64)
        return result

    tensors = {
        name: (tuple(entry["shape"]), _DTYPES.get(entry["dtype"], str(entry["dtype"]).lower()))
        for name, entry in entries.items()
    }
    return Stored(key=key or "", tensors=tensors, vector=vector)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a .safetensors file without its metadata, and where the data starts.

    The library checks it first: sizes against the file, offsets against shapes, no overlap.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length), object_pairs_hook=_without_duplicates)
    except (SafetensorError, OSError, ValueError, struct.error, RecursionError) as error:
        raise unreadable(path, error) from error
    header.pop("__metadata__", None)
    return header, 8 + length


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in result if names.count(name) > 1)
        raise ValueError(f"the header has {twice!r} twice")
    return result


def _numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype as it lies in the file, little-endian; what numpy lacks comes from ml_dtypes."""
    if name.startswith(("bfloat", "float8")):
        import ml_dtypes

        own: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return own
    return np.dtype(name).newbyteorder("<")


# -- pickles -------------------------------------------------------------------------------------


def _pickled(path: Path, key: str | None) -> tuple[Stored, ...]:
    from bnify.spec.checkpoint import read_checkpoint
    from bnify.spec.choose import state_dicts

    found = state_dicts(read_checkpoint(path), key, path)
    return tuple(
        _of_state(".".join(part for part in (key or "", at) if part), state)
        for at, state in found.items()
    )


def _of_state(key: str, state: Mapping[str, Any]) -> Stored:
    from torch import Tensor

    found = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return Stored(
        key=key,
        tensors={
            name: (tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in found.items()
        },
        vector=lambda name: _values(found[name]),
    )


def _values(tensor: Tensor) -> Vector:
    if tensor.is_meta:
        raise WeightsError(
            "the checkpoint has tensors without values: they were on the meta device",
            hint="save it from a model that was materialised",
        )
    plain = tensor.detach()
    # float8 has no cast to float64 of its own.
    plain = plain.float() if plain.element_size() == 1 and plain.is_floating_point() else plain
    result: Vector = plain.to_dense().double().cpu().reshape(-1).numpy()
    return result
