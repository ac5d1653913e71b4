"""Data from files: splits, standardising, sizes."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bnify.comparing.data import load_data
from bnify.errors import SpecError
from examples.mlp import MyNetwork
from tests.datasets import cnn, everything, parts, same


def write_mnist(folder: Path, train: int = 120, side: int = 28, test_side: int = 28) -> None:
    for part, count, size in (("train", train, side), ("t10k", 30, test_side)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.full((count, size, size), 100, dtype=np.uint8)
        images[:, 0, 0] = np.arange(count)  # which one it is
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            path = folder / f"{part}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(head + array.tobytes()))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_validation_data_of_mnist_come_from_its_training_part(tmp_path: Path, name: str):
    write_mnist(tmp_path)
    data = load_data(f"{name}:{tmp_path}", MyNetwork())
    assert data.words == f"{name}: 100 / 20 / 30 samples of (784,), 10 classes"
    (train, _), (validation, _), (test, labels) = map(everything, parts(data))
    marks = torch.cat([train[:, 0], validation[:, 0]])
    assert len(marks.unique()) == 120
    assert (test[:, 0].diff() > 0).all()
    assert labels.tolist() == [i % 10 for i in range(30)]
    other = load_data(f"{name}:{tmp_path}", MyNetwork(), seed=1)
    assert not same(data, other)
    assert same(data, load_data(f"{name}:{tmp_path}", MyNetwork()))


def test_images_are_standardised_by_the_training_part_alone(tmp_path: Path):
    batch = {
        b"labels": [0, 1] * 30,
        b"data": np.random.default_rng(0).integers(0, 99, (60, 3072), dtype=np.uint8),
    }
    batch[b"data"][:, :1024] //= 3
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch))
    far = {b"labels": [1, 0], b"data": np.full((2, 3072), 255, dtype=np.uint8)}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(far))
    data = load_data(f"cifar10:{tmp_path}", cnn(3))
    assert data.words == "cifar10: 50 / 10 / 2 samples of (3, 32, 32), 10 classes"
    assert data.notes == ("1 of the 5 training files were found",)
    train, _ = everything(data.train)
    torch.testing.assert_close(train.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(train.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    test, _ = everything(data.test)
    assert (test > 3).all()
    pixels = torch.from_numpy(batch[b"data"]).double().view(60, 3, 32, 32)
    both = torch.cat([train, everything(data.validation)[0]]).double()
    for channel in range(3):  # one pair of numbers a channel, for every part
        x, y = pixels[:, channel].flatten().sort().values, both[:, channel].flatten().sort().values
        slope = (y[-1] - y[0]) / (x[-1] - x[0])
        torch.testing.assert_close(y, y[0] + slope * (x - x[0]), atol=1e-4, rtol=0)


def test_images_of_one_value_are_finite(tmp_path: Path):
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">IIII", 0x803, 120, 28, 28) + b"\7" * 94080))
    images, _ = everything(load_data(f"mnist:{tmp_path}", cnn()).train)
    assert float(images.abs().max()) < 1e-6


def test_images_of_two_sizes_and_empty_parts_are_refused(tmp_path: Path):
    write_mnist(tmp_path, test_side=20)
    with pytest.raises(SpecError, match=r"\(1, 28, 28\) for training, but of \(1, 20, 20\) in the"):
        load_data(f"mnist:{tmp_path}", cnn())
    write_mnist(tmp_path, train=1)
    with pytest.raises(SpecError, match="1 training samples cannot be split further"):
        load_data(f"mnist:{tmp_path}", cnn())
    write_mnist(tmp_path)
    for kind, axes in (("images-idx3", (0, 28, 28)), ("labels-idx1", (0,))):
        head = b"\0\0\x08" + bytes([len(axes)]) + struct.pack(f">{len(axes)}I", *axes)
        (tmp_path / f"t10k-{kind}-ubyte").write_bytes(head)
    with pytest.raises(SpecError, match="the test part of mnist is empty"):
        load_data(f"mnist:{tmp_path}", cnn())


def write_folder(folder: Path, classes: str = "ab", count: int = 5) -> None:
    for at, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (9, 6), (50 * at + i, 10 * i, 0)).save(folder / name / f"{i}.png")


@pytest.mark.parametrize(("size", "side"), [(None, 32), (12, 12)])
def test_a_folder_is_read_at_the_size_that_is_asked_for(
    tmp_path: Path, size: int | None, side: int
):
    write_folder(tmp_path)
    data = load_data(f"folder:{tmp_path}", cnn(3, 2), image_size=size)
    assert data.words == (f"folder:{tmp_path}: 6 / 2 / 2 samples of (3, {side}, {side}), 2 classes")
    flat = load_data(f"folder:{tmp_path}", nn.Linear(3 * side * side, 2), image_size=size)
    assert torch.equal(everything(flat.train)[0], everything(data.train)[0].flatten(1))
