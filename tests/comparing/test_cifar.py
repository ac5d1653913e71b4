"""CIFAR-10: every version is read, and a hostile pickle runs nothing."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnify.comparing.cifar_pickle import read_batch
from bnify.comparing.image_files import read_cifar10
from bnify.errors import SpecError


def noise(*shape: int) -> np.ndarray:
    """Random bytes, the same in every test."""
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def cifar_batch(samples: int = 10) -> dict:
    return {
        b"batch_label": b"training batch 1 of 5",
        b"labels": [int(i) % 10 for i in range(samples)],
        b"data": noise(samples, 3072),
        b"filenames": [b"leptodactylus_%d.png" % i for i in range(samples)],
    }


def python2_pickle(batch: dict) -> bytes:
    """The bytes that Python 2's NumPy wrote: str for bytes, and the old module names."""
    data = batch[b"data"]

    def text(value: bytes) -> bytes:  # Python 2's str
        return b"T" + struct.pack("<I", len(value)) + value

    parts = [b"\x80\x02}("]
    parts += [text(b"data"), b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"]
    parts += [b"(K\0t", text(b"b"), b"tR(K\1(", struct.pack("<cI", b"J", len(data)), b"M\0\x0ct"]
    parts += [
        b"cnumpy\ndtype\n(",
        text(b"u1"),
        b"K\0K\1tR(K\3",
        text(b"|"),
        b"NNNJ\xff\xff\xff\xff",
    ]
    parts += [b"J\xff\xff\xff\xffK\0tb\x89", text(data.tobytes()), b"tb"]
    parts += [text(b"labels"), b"](", *(b"K" + bytes([label]) for label in batch[b"labels"]), b"e"]
    return b"".join([*parts, b"u."])


@pytest.mark.parametrize("below", [".", "cifar-10-batches-py"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_python_version_is_read_in_every_protocol(tmp_path: Path, below: str, protocol: int):
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    batches = {name: cifar_batch() for name in ("data_batch_1", "data_batch_2", "test_batch")}
    batches["data_batch_2"][b"data"] ^= 255
    for name, batch in batches.items():
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    (folder / "batches.meta").write_bytes(b"not read")
    train, test, notes = read_cifar10(tmp_path)
    pixels = np.concatenate([batches[f"data_batch_{i}"][b"data"] for i in (1, 2)])
    np.testing.assert_array_equal(train.images.numpy().reshape(20, -1), pixels)
    assert train.images.shape == (20, 3, 32, 32)
    assert train.labels.tolist() == [*range(10), *range(10)]
    np.testing.assert_array_equal(
        test.images.numpy().reshape(10, -1), batches["test_batch"][b"data"]
    )
    assert notes == ("2 of the 5 training files were found",)


def test_a_pickle_as_python_2_wrote_it_is_read(tmp_path: Path):
    batch = cifar_batch()
    data = python2_pickle(batch)
    restored = pickle.loads(  # the same to the real unpickler
        data.replace(b"numpy.core", b"numpy._core"), encoding="bytes"
    )
    np.testing.assert_array_equal(restored[b"data"], batch[b"data"])
    path = tmp_path / "data_batch_1"
    path.write_bytes(data)
    pixels, labels = read_batch(path)
    np.testing.assert_array_equal(pixels, batch[b"data"])
    assert labels == batch[b"labels"]


def test_columns_first_arrays_are_read_too(tmp_path: Path):
    batch = cifar_batch()
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({**batch, b"data": np.asfortranarray(batch[b"data"])}))
    np.testing.assert_array_equal(read_batch(path)[0], batch[b"data"])


@pytest.mark.parametrize("below", [".", "cifar-10-batches-bin"])
def test_the_binary_version_is_read(tmp_path: Path, below: str):
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    batch = cifar_batch(7)
    labels = np.array(batch[b"labels"], dtype=np.uint8)[:, None]
    records = np.hstack([labels, batch[b"data"]])
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        (folder / name).write_bytes(records.tobytes())
    train, test, notes = read_cifar10(tmp_path)
    assert notes == ()
    assert len(train.labels) == 35
    assert test.labels.tolist() == list(range(7))
    np.testing.assert_array_equal(test.images.numpy().reshape(7, -1), batch[b"data"])


class Runs:
    """Unpickling this runs a command."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("at", ["data", "labels", "filenames", "whole"])
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, protocol: int, at: str):
    ran = tmp_path / "ran"
    hostile = Runs(os.system, f"touch {ran}")
    content = hostile if at == "whole" else {**cifar_batch(), at.encode(): hostile}
    data = pickle.dumps(content, protocol)
    pickle.loads(data)
    assert ran.exists()  # the fault is real
    ran.unlink()
    (tmp_path / "data_batch_1").write_bytes(data)
    (tmp_path / "test_batch").write_bytes(data)
    with pytest.raises(SpecError, match=r"was not unpickled: it wants (posix|nt)\.system"):
        read_cifar10(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize(
    "function",
    [eval, exec, getattr, np.load, np.memmap, np.dtype("O").type, sys.exit, open],
)
def test_only_what_an_array_needs_can_be_named(tmp_path: Path, function: Callable):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({**cifar_batch(), b"x": function}))
    with pytest.raises(SpecError, match="was not unpickled: it wants "):
        read_batch(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({b"data": np.zeros((10, 3072), dtype=np.float32)}, "the data are not unsigned bytes"),
        ({b"data": np.array([[object] * 3], dtype=object)}, "was not unpickled: it wants builtins"),
        ({b"data": [1, 2]}, "its data are no array"),
        ({b"labels": ["cat"] * 10}, "its labels are no list of integers"),
        ({b"labels": "cat"}, "its labels are no list of integers"),
    ],
)
def test_a_batch_of_something_else_is_refused(tmp_path: Path, change: dict, says: str):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({**cifar_batch(), **change}))
    with pytest.raises(SpecError, match=says):
        read_batch(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({b"data": np.zeros((10, 5), dtype=np.uint8)}, r"shape \(10, 5\), not \(N, 3072\)"),
        ({b"labels": [1, 2]}, "10 images and 2 labels"),
        ({b"labels": [-1] * 10}, "labels other than 0 to 9"),
        ({b"labels": [10**30] * 10}, "labels other than 0 to 9"),
    ],
)
def test_a_batch_that_is_not_cifar10s_is_refused(tmp_path: Path, change: dict, says: str):
    for name in ("data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(pickle.dumps({**cifar_batch(), **change}))
    with pytest.raises(SpecError, match=says):
        read_cifar10(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_pickles_are_refused_or_read_but_never_crash(tmp_path_factory, data):
    good = bytearray(pickle.dumps(cifar_batch(1), 2))
    path = tmp_path_factory.mktemp("cifar") / "data_batch_1"
    at = data.draw(st.integers(0, len(good) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(good[:at])
        with pytest.raises(SpecError):
            read_batch(path)
        return
    near_an_end = at % 200 if data.draw(st.booleans()) else -1 - at % 200
    good[near_an_end] = data.draw(st.integers(0, 255))
    path.write_bytes(good)
    with contextlib.suppress(SpecError):
        pixels, labels = read_batch(path)
        assert pixels.dtype == np.uint8
        assert all(type(label) is int for label in labels)


def test_a_pickle_without_data_and_no_dict_are_refused(tmp_path: Path):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({b"labels": []}))
    with pytest.raises(SpecError, match="it has no 'data'"):
        read_batch(path)
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(SpecError, match="it holds no dict"):
        read_batch(path)


@pytest.mark.parametrize("size", [0, 3072, 3074])
def test_a_binary_file_of_another_length_is_refused(tmp_path: Path, size: int):
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (tmp_path / name).write_bytes(b"\0" * size)
    with pytest.raises(SpecError, match=r"no multiple of 3,073"):
        read_cifar10(tmp_path)


def test_a_folder_without_cifar_is_refused(tmp_path: Path):
    (tmp_path / "data_batch_1").write_bytes(b"")
    with pytest.raises(SpecError, match=r"has no data_batch_\* with a test_batch"):
        read_cifar10(tmp_path)
