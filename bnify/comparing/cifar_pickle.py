"""CIFAR-10's pickled batches, read without running anything that the pickle names.

The names that a pickled NumPy array needs are answered by stand-ins that only keep what they are
given; bytes become an array here, after they were checked.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bnify.errors import SpecError


class _Type:
    """Stands for ``numpy.dtype``; its state (byte order and so on) is not needed for bytes."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        """Pickle's BUILD."""


class _Array:
    """Stands for ``numpy.ndarray``."""

    def __setstate__(self, state: Any) -> None:
        """Pickle's BUILD: version, shape, dtype, whether the order is Fortran's, bytes."""
        _, self.shape, self.dtype, self.fortran, self.data = state

    def value(self) -> npt.NDArray[np.uint8]:
        """The array, if it is one of bytes."""
        if not isinstance(self.dtype, _Type) or self.dtype.code not in ("u1", "|u1"):
            raise ValueError("the data are not unsigned bytes")
        shape = tuple(int(size) for size in self.shape)
        if not isinstance(self.data, (bytes, bytearray)) or min(shape, default=0) < 0:
            raise ValueError("the array is damaged")
        if len(self.data) != math.prod(shape):
            raise ValueError(f"{len(self.data)} bytes of data for the shape {shape}")
        flat = np.frombuffer(bytearray(self.data), dtype=np.uint8)
        return flat.reshape(shape, order="F" if self.fortran else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _encode(text: str, _: str) -> bytes:
    return text.encode("latin1")


_STAND_INS: Final = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,  # how Python 3 writes bytes in the protocols 0 to 2
}


class _Refused(pickle.UnpicklingError):
    """The pickle names something that no array needs."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None


def read_batch(path: Path) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """Pixels as they are stored, and labels, of one file of the Python version.

    Raises:
        SpecError: It cannot be read, wants anything but arrays, or lacks data or labels.
    """
    try:
        batch = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        if not isinstance(batch, dict):
            raise ValueError("it holds no dict")
        entries = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        data, labels = entries["data"], entries["labels"]
        if not isinstance(data, _Array):
            raise ValueError("its data are no array")
        pixels = data.value()
        if not isinstance(labels, list) or not all(type(label) is int for label in labels):
            raise ValueError("its labels are no list of integers")
    except _Refused as error:
        raise SpecError(
            f"{path} was not unpickled: it wants {error}, which no batch of CIFAR-10 needs",
            hint="take the file from https://www.cs.toronto.edu/~kriz/cifar.html",
        ) from None
    except Exception as error:  # a damaged pickle fails in any way
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        missing = f"it has no {reason}" if isinstance(error, KeyError) else reason
        raise SpecError(f"{path} is no batch of CIFAR-10: {missing}", hint="fetch it again") from (
            error
        )
    return pixels, labels
