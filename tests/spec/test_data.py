"""Batches from the user's code, by the same loading as models."""

from __future__ import annotations

import pytest

from bnify.errors import SpecError, UsageError
from bnify.spec import load_data

DATA = """
import torch
from torch.utils.data import DataLoader, TensorDataset

dataset = TensorDataset(torch.arange(20.0).view(10, 2))
loader = DataLoader(dataset, batch_size=2)
batches = [torch.full((2, 3), float(i)) for i in range(20)]
stream = iter(batches)

def build():
    print("building")
    return loader

def generate():
    print("generating")
    yield from batches

class Source:
    def __iter__(self):
        return iter(batches)

def bad():
    yield batches[0]
    raise ValueError("row 7 is broken")

def needs(path):
    return batches

empty = []
tensor = torch.ones(2, 3)
number = 3
"""


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.py").write_text(DATA)


@pytest.mark.parametrize(
    ("name", "count"),
    [("loader", 5), ("batches", 8), ("build", 5), ("generate", 8), ("Source", 8), ("stream", 8)],
)
def test_each_form_gives_at_most_so_many_batches_again_and_again(name, count, capfd):
    data = load_data(f"data.py:{name}")
    first = list(data)
    assert len(first) == count
    again = list(data)
    assert len(again) == count
    assert all(repr(a) == repr(b) for a, b in zip(first, again, strict=True))
    assert capfd.readouterr().out == ""


def test_the_limit():
    assert len(list(load_data("data.py:batches", batches=3))) == 3
    assert len(list(load_data("data.py:batches", batches=None))) == 20
    stream = load_data("data.py:stream", batches=3)
    assert len(list(stream)) == len(list(stream)) == 3
    with pytest.raises(UsageError, match="--batches 0"):
        load_data("data.py:batches", batches=0)


@pytest.mark.parametrize(
    ("spec", "error", "fragment"),
    [
        ("data.py:dataset", SpecError, "samples, not batches"),
        ("data.py:tensor", SpecError, "one Tensor"),
        ("data.py:number", SpecError, "is an int, which yields nothing"),
        ("data.py:needs", SpecError, "needs(path)"),
        ("data.py:gone", SpecError, "has no 'gone'"),
        ("gone.py:loader", SpecError, "No such file"),
        ("timm:resnet50", UsageError, "is a registry, not a Python object"),
        ("weights.pt", UsageError, "is a checkpoint"),
        ("nonsense", UsageError, "no colon"),
    ],
)
def test_what_yields_no_batches(spec, error, fragment):
    with pytest.raises(error) as caught:
        load_data(spec)
    assert fragment in caught.value.message


def test_failures_while_iterating_name_the_users_line():
    with pytest.raises(SpecError, match=r"ValueError: row 7 is broken \(data\.py:\d+ in bad\)"):
        list(load_data("data.py:bad"))
    assert len(list(load_data("data.py:bad", batches=1))) == 1
    with pytest.raises(SpecError, match="yields no batch"):
        list(load_data("data.py:empty"))
