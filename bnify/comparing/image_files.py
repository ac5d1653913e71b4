"""Image files that people have: MNIST's idx files and both versions of CIFAR-10.

Formats: http://yann.lecun.com/exdb/mnist/ and https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bnify.comparing.cifar_pickle import read_batch
from bnify.errors import SpecError

CLASSES: Final = 10
_BLOCK: Final = 1 << 20
_CIFAR_SHAPE: Final = (3, 32, 32)
#: Where torchvision puts idx files below its root, besides the folder itself.
_IDX_FOLDERS: Final = (".", "raw", "MNIST/raw", "FashionMNIST/raw")


@dataclass(frozen=True, slots=True)
class Labelled:
    """Images (N, C, H, W) of uint8 with their labels (N,) of int64."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, indices: Tensor) -> Labelled:
        """Some of them."""
        return Labelled(self.images[indices], self.labels[indices])


# -- idx -----------------------------------------------------------------------------------------


def read_mnist(folder: Path) -> tuple[Labelled, Labelled]:
    """Training and test images of MNIST, Fashion-MNIST, or what else is kept in these files.

    Raises:
        SpecError: A file is missing or damaged.
    """
    return _read_idx_pair(folder, "train"), _read_idx_pair(folder, "t10k")


def _read_idx_pair(folder: Path, part: str) -> Labelled:
    paths = [_find_idx(folder, part, kind) for kind in ("images-idx3", "labels-idx1")]
    images, labels = (read_idx(path) for path in paths)
    if images.ndim != 3 or labels.ndim != 1:
        raise SpecError(
            f"{paths[0].parent}: {part} images have {images.ndim} axes and labels {labels.ndim}, "
            "not 3 and 1",
            hint="check whether files were renamed",
        )
    if len(images) != len(labels):
        raise SpecError(f"{paths[0]} holds {len(images)} images, {paths[1]} {len(labels)} labels")
    if len(labels) and labels.max() >= CLASSES:
        raise SpecError(f"{paths[1]} holds the label {labels.max()}, not 0 to {CLASSES - 1}")
    return Labelled(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())


def _find_idx(folder: Path, part: str, kind: str) -> Path:
    """``train-images-idx3-ubyte`` or ``train-images.idx3-ubyte``, plain or with ``.gz``."""
    names = [f"{part}-{kind}-ubyte", f"{part}-{kind.replace('-idx', '.idx')}-ubyte"]
    for below in _IDX_FOLDERS:
        for name in (*names, *(f"{name}.gz" for name in names)):
            if (path := folder / below / name).is_file():
                return path
    raise SpecError(
        f"{folder} has no {names[0]}, nor the same with '.' or .gz",
        hint="name the folder that holds MNIST's four idx files",
    )


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The array of unsigned bytes that an idx file holds; ``.gz`` is unpacked.

    Two zero bytes, the type (8), the number of axes, each axis as a big-endian uint32, the data.

    Raises:
        SpecError: It cannot be read, is no such file, or its length is not what it says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            if head[:3] != b"\0\0\x08" or head[3:] not in (b"\1", b"\2", b"\3"):
                raise SpecError(f"{path} is no idx file of unsigned bytes", hint="check the file")
            sizes = file.read(4 * head[3])
            if len(sizes) < 4 * head[3]:
                raise _truncated(path)
            shape = struct.unpack(f">{head[3]}I", sizes)
            expected = math.prod(shape)
            data = bytearray()  # read in blocks: a damaged header may ask for any size
            while len(data) <= expected and (block := file.read(_BLOCK)):
                data += block
    except (OSError, EOFError, zlib.error) as error:
        raise SpecError(f"{path} cannot be read: {error}", hint="fetch it again") from error
    if len(data) < expected:
        raise _truncated(path, f": {len(data):,} of {expected:,} bytes of data")
    if len(data) > expected:
        raise SpecError(f"{path} is longer than its {expected:,} bytes of data", hint="check it")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _truncated(path: Path, details: str = "") -> SpecError:
    return SpecError(f"{path} is cut short{details}", hint="fetch it again")


# -- CIFAR-10 ------------------------------------------------------------------------------------


def read_cifar10(folder: Path) -> tuple[Labelled, Labelled, tuple[str, ...]]:
    """Training and test images of CIFAR-10, and notes; the Python or the binary version.

    Raises:
        SpecError: Files are missing or damaged, or a pickle wants more than arrays.
    """
    places = (folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin")
    for place in places:
        files = sorted(place.glob("data_batch_*"))
        for suffix, read in (("", _read_python), (".bin", _read_binary)):
            training = [path for path in files if path.suffix == suffix]
            test = place / f"test_batch{suffix}"
            if training and test.is_file():
                count = len(training)
                notes = (f"{count} of the 5 training files were found",) if count != 5 else ()
                return _joined(training, read), _joined([test], read), notes
    raise SpecError(
        f"{folder} has no data_batch_* with a test_batch, nor the same as .bin",
        hint="name the folder that holds CIFAR-10's batches",
    )


def _joined(
    paths: Sequence[Path], read: Callable[[Path], tuple[npt.NDArray[np.uint8], Sequence[int]]]
) -> Labelled:
    images, labels = [], []
    for path in paths:
        pixels, numbers = read(path)
        if not all(0 <= label < CLASSES for label in numbers):
            raise SpecError(f"{path} holds labels other than 0 to 9", hint="is it CIFAR-10?")
        images.append(torch.from_numpy(pixels.reshape(len(pixels), *_CIFAR_SHAPE)))
        labels.append(torch.tensor(numbers, dtype=torch.int64))
    return Labelled(torch.cat(images), torch.cat(labels))


def _read_python(path: Path) -> tuple[npt.NDArray[np.uint8], Sequence[int]]:
    pixels, labels = read_batch(path)
    if pixels.ndim != 2 or pixels.shape[1] != math.prod(_CIFAR_SHAPE):
        raise SpecError(f"{path} holds data of shape {pixels.shape}, not (N, 3072)")
    if len(pixels) != len(labels):
        raise SpecError(f"{path} holds {len(pixels)} images and {len(labels)} labels")
    return pixels, labels


def _read_binary(path: Path) -> tuple[npt.NDArray[np.uint8], Sequence[int]]:
    """Records of one byte of label and 3,072 bytes of pixels."""
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error}", hint="check the file") from error
    record = 1 + math.prod(_CIFAR_SHAPE)
    if len(data) == 0 or len(data) % record:
        raise SpecError(
            f"{path} has {len(data):,} bytes, no multiple of {record:,}", hint="fetch it again"
        )
    records = data.reshape(-1, record)
    return records[:, 1:].copy(), records[:, 0].tolist()
