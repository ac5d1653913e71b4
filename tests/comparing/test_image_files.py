"""MNIST's idx files: what is read is what was written; damaged files are refused."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnify.comparing.image_files import read_idx, read_mnist
from bnify.errors import SpecError


def noise(*shape: int) -> np.ndarray:
    """Random bytes, the same in every test."""
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    head = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def write_mnist(folder: Path, *, dot: bool = False, packed: bool = False, side: int = 28) -> dict:
    """The four files; what is in them by part."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for part, samples in (("train", 60), ("t10k", 20)):
        images = noise(samples, side, side)
        labels = (np.arange(samples) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            name = f"{part}-{kind.replace('-idx', '.idx') if dot else kind}-ubyte"
            data = idx(array)
            if packed:
                name, data = f"{name}.gz", gzip.compress(data)
            (folder / name).write_bytes(data)
        written[part] = (images, labels)
    return written


@pytest.mark.parametrize("below", [".", "raw", "MNIST/raw", "FashionMNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dot", [False, True])
def test_mnist_is_read_as_it_was_written(tmp_path: Path, below: str, packed: bool, dot: bool):
    written = write_mnist(tmp_path / below, dot=dot, packed=packed)
    for read, part in zip(read_mnist(tmp_path), ("train", "t10k"), strict=True):
        images, labels = written[part]
        np.testing.assert_array_equal(read.images.numpy(), images[:, None])
        np.testing.assert_array_equal(read.labels.numpy(), labels)


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 1000), packed=st.booleans())
def test_a_file_that_is_cut_short_anywhere_is_refused(tmp_path_factory, cut: int, packed: bool):
    data = idx(np.arange(120, dtype=np.uint8).reshape(5, 4, 6))
    data = gzip.compress(data) if packed else data
    path = tmp_path_factory.mktemp("idx") / ("x.gz" if packed else "x")
    path.write_bytes(data[: cut % len(data)])
    with pytest.raises(SpecError) as caught:
        read_idx(path)
    assert "\n" not in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data + b"\0", "is longer than its 120 bytes"),
        (lambda data: data[:-1], r"is cut short: 119 of 120 bytes"),
        (lambda data: b"\0\0\x0d" + data[3:], "is no idx file of unsigned bytes"),  # float32
        (lambda data: b"\0\0\x08\0" + data[4:], "is no idx file of unsigned bytes"),
        (lambda data: b"\0\0\x08\xff" + b"\xff" * 2000, "is no idx file of unsigned bytes"),
        # asks for 2^96 bytes, and must not get them
        (lambda data: data[:4] + b"\xff" * 12 + data[16:], "is cut short: 120 of"),
        (lambda data: b"PK\3\4" + data, "is no idx file of unsigned bytes"),
    ],
)
def test_a_damaged_idx_file_is_refused(tmp_path: Path, damage: Callable, says: str):
    path = tmp_path / "x"
    path.write_bytes(damage(idx(np.arange(120, dtype=np.uint8).reshape(5, 4, 6))))
    with pytest.raises(SpecError, match=says):
        read_idx(path)


def test_a_damaged_gz_file_is_refused(tmp_path: Path):
    path = tmp_path / "x.gz"
    path.write_bytes(idx(np.zeros(5, dtype=np.uint8)))
    with pytest.raises(SpecError, match=r"x\.gz cannot be read: Not a gzipped file"):
        read_idx(path)


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("train-labels-idx1-ubyte", np.zeros(59, dtype=np.uint8), "60 images, .* 59 labels"),
        ("train-labels-idx1-ubyte", np.full(60, 10, np.uint8), "holds the label 10, not 0 to 9"),
        ("t10k-images-idx3-ubyte", np.zeros(20, dtype=np.uint8), "images have 1 axes"),
    ],
)
def test_mnist_files_that_do_not_fit_each_other_are_refused(
    tmp_path: Path, name: str, array: np.ndarray, says: str
):
    write_mnist(tmp_path)
    (tmp_path / name).write_bytes(idx(array))
    with pytest.raises(SpecError, match=says):
        read_mnist(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(SpecError, match="has no t10k-labels-idx1-ubyte"):
        read_mnist(tmp_path)
