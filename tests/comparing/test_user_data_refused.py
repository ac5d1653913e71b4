"""The user's own data that cannot be used: one clear line each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bnify.comparing.data import load_data
from bnify.errors import SpecError
from tests.datasets import Items, net, pair


class Endless(IterableDataset):
    def __iter__(self) -> Iterator:
        yield from ()


X, Y = pair()
BAD_X = X.clone()
BAD_X[11, 2] = float("nan")
BAD_Y = X.sum(1)
BAD_Y[11] = float("inf")


@pytest.mark.parametrize("wrap", [lambda x, y: (x, y), Items])
@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize(
    ("x", "y", "outputs", "says"),
    [
        (BAD_X, Y, 3, "inputs of the {part} part of your data hold NaN or infinity"),
        (X, BAD_Y, 1, "targets of the {part} part of your data hold NaN or infinity"),
        (X, Y - 1, 3, "targets of the {part} part of your data hold the class -1"),
        (X[:0], Y[:0], 3, "the {part} part of your data is empty"),
    ],
)
def test_what_is_wrong_in_any_part_is_found(wrap, at: int, x, y, outputs: int, says: str):
    good = (X, X.sum(1)) if y.is_floating_point() else (X, Y)
    source = [wrap(*good)] * 3
    source[at] = wrap(x, y)
    with pytest.raises(SpecError) as caught:
        load_data(source, net(outputs))
    part = ("training", "validation", "test")[at]
    assert says.format(part=part) in caught.value.message


def three(part: object) -> tuple:
    return (part, part, part)


@pytest.mark.parametrize(
    ("source", "says", "hint"),
    [
        (three((X, Y[:-1])), "has 20 inputs for 19 targets", "as many"),
        (three(((X, X[:3]), Y)), "has 3 and 20 inputs for 20 targets", "as many"),
        (three((X, Y * 0)), "has a single class, 0: nothing to learn", "two classes"),
        (three(Items(X, Y * 0)), "has a single class, 0: nothing to learn", "two classes"),
        (three((X, torch.eye(20).long())), "have the shape (20,) a sample", "y.argmax(1)"),
        (three((X, X.sum(1) + 1j)), "are complex numbers", ""),
        (three((X, ["cat"] * 20)), "y of the training part of your data (a list) is no", ""),
        (three((np.array([object()] * 20), Y)), "is no array of numbers", ""),
        (three(([[1.0, 2.0], [3.0]], Y)), "x of the training part of your data (a list)", ""),
        (three((X.to_sparse(), Y)), "pass x.to_dense()", ""),
        (three((3.0, Y)), "is a single number", ""),
        (three(((), Y)), "has no inputs", ""),
        (three(Endless()), "is an Endless, which cannot be read by index", "stack its items"),
        (Endless(), "gives an Endless, not its parts", "return (train, validation, test)"),
        (three(DataLoader(TensorDataset(X, Y))), "is a DataLoader", "loader.dataset"),
        (three(5), "is an int", "return (train, validation, test)"),
        (three([(X, Y)] * 4), "is a list", "return (train, validation, test)"),
        ((X, Y), "gives two arrays, one (X, Y), without test data", "((X, Y), (X_test, Y_test))"),
        (X, "gives a Tensor, not its parts", "return (train, validation, test)"),
        (three((X, Y)) * 2, "gives a tuple of 6, not its parts", "return (train"),
        ((), "gives a tuple of 0, not its parts", "return (train"),
        ({"train": (X, Y)}, "gives a dict with the keys train", "train, validation, test"),
        (
            {"train": (X, Y), "test": (X, Y), "dev": (X, Y)},
            "gives a dict with the keys train, test, dev",
            "train, validation, test",
        ),
        ({}, "gives a dict with the keys none", "train, validation, test"),
        (None, "gives a NoneType", "return (train"),
        (three(Items(X, Y, lambda x, _: x)), "yields a Tensor, not a pair (x, y)", "__getitem__"),
        (three(Items(X, Y, lambda x, y: (x, y, 1))), "yields a tuple of 3, not a pair", ""),
        (three(Items(X, Y, lambda x, y: {"x": x, "y": y})), "yields a dict, not a pair", ""),
        (three(Items(X, Y, lambda x, _: (x, "cat"))), "targets of the training part", ""),
        (three(Items(X, Y, lambda x, y: (x[:y], y))), "collating items of the training", ""),
        (three(Items(X, Y, lambda x, y: (object(), y))), "collating items of the training", ""),
        (three(Items(X, Y, lambda x, y: 1 / 0)), "raised ZeroDivisionError", ""),
        (((X[:1], Y[:1]), (X, Y)), "1 training samples cannot be split further", ""),
        (lambda size: size, "missing a required argument: 'size'", ""),
        (lambda: 1 / 0, "raised ZeroDivisionError", ""),
    ],
)
def test_data_that_cannot_be_used_are_refused_in_one_line(source, says: str, hint: str):
    with pytest.raises(SpecError) as caught:
        load_data(source, net())
    assert says in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("y", "model", "says"),
    [
        (X.sum(1), net(2), r"output is \(2, 2\) for targets of \(2,\)"),
        (X, net(1), r"output is \(2, 1\) for targets of \(2, 4\)"),
        (X[:, :2], nn.Sequential(net(2), nn.Flatten(0)), r"output is \(4,\) for targets"),
    ],
)
def test_an_output_that_is_not_of_the_targets_shape_is_refused(y: Tensor, model, says: str):
    with pytest.raises(SpecError, match=says):
        load_data(three((X, y)), model)


def test_fractions_are_no_classes():
    with pytest.raises(SpecError, match="are not whole numbers, so they are no classes"):
        load_data(three((X, X.sum(1))), net(), task="classification")


def test_numbers_beyond_float32_are_refused():
    with pytest.raises(SpecError, match="too large for float32"):
        load_data(three((X, X.sum(1).double() * 1e300)), net(1))


def test_an_error_of_the_model_is_one_line_with_the_users_place():
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError(f"I want 5 features\nnot {x.shape[1]}")

    with pytest.raises(SpecError) as caught:
        load_data(three((X, Y)), Wrong())
    message = caught.value.message
    assert message.startswith("the model on inputs of (4,) raised ValueError: I want 5 features (")
    assert "test_user_data_refused.py" in message
    assert "\n" not in message


def test_a_dataset_that_goes_bad_later_is_caught_when_it_does():
    x, y = pair(5_000)
    spread = set(torch.linspace(0, 4_999, 2_000, dtype=torch.float64).long().tolist())
    unseen = next(i for i in range(2, 5_000) if i not in spread)
    y[unseen] = -100  # cross-entropy would leave it out without a word
    data = load_data((Items(x, y), pair(9), pair(9)), net())
    with pytest.raises(SpecError, match="hold the class -100"):
        data.train.batch(torch.tensor([unseen]))
