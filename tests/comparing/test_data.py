"""Data of a comparison: every form of ``--data``, its splits, and its fit to the model."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bnify.comparing.data import load_data
from bnify.comparing.sources import FORMS
from bnify.errors import SpecError, UsageError
from examples.mlp import MyNetwork
from tests.datasets import cnn, everything, parts, same

# -- built-in forms ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "sizes"),
    [("digits", "1,077 / 360 / 360"), ("glyphs", "1,800 / 600 / 600")],
)
def test_bundled_images_fit_the_articles_network(source: str, sizes: str):
    data = load_data(source, MyNetwork())
    assert data.words == f"{source}: {sizes} samples of (784,), 10 classes"
    assert (data.name, data.task, data.classes, data.notes) == (source, "classification", 10, ())
    images, labels = everything(data.train)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert abs(float(images.double().mean())) < 1e-4
    assert abs(float(images.double().std(correction=0)) - 1) < 1e-4
    for part in parts(data):
        assert set(everything(part)[1].tolist()) == set(range(10))


@pytest.mark.parametrize("source", ["digits", "glyphs"])
def test_the_seed_alone_decides_what_is_drawn(source: str):
    torch.manual_seed(5)
    one = load_data(source, MyNetwork(), seed=1)
    torch.manual_seed(6)
    assert same(one, load_data(source, cnn_to_flat(), seed=1))
    assert not same(one, load_data(source, MyNetwork(), seed=2))


def cnn_to_flat() -> nn.Module:
    return nn.Linear(784, 10)


def test_the_parts_of_digits_are_scikit_learns_images_each_once():
    from sklearn.datasets import load_digits

    raw = load_digits()
    data = load_data("digits", nn.Linear(64, 10))
    images = torch.cat([everything(part)[0] for part in parts(data)])
    labels = torch.cat([everything(part)[1] for part in parts(data)])
    low, high = float(images.min()), float(images.max())
    pixels = ((images - low) / (high - low) * 16).round().int().numpy()
    found = sorted(zip(map(tuple, pixels.tolist()), labels.tolist(), strict=True))
    want = sorted(zip(map(tuple, raw.data.astype(int).tolist()), raw.target.tolist(), strict=True))
    assert found == want


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (cnn(), "(1, 28, 28)"),
        (nn.Linear(784, 10), "(784,)"),
        (cnn(3), "(3, 28, 28)"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10)), "(1, 8, 8)"),
        (nn.Linear(64, 10), "(64,)"),
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 10)), "(3, 8, 8)"),
        (nn.Linear(784, 12), "(784,)"),  # more outputs than classes
    ],
)
def test_digits_come_in_the_shape_that_the_model_takes(model: nn.Module, shape: str):
    data = load_data("digits", model)
    assert f"samples of {shape}," in data.words
    for part in parts(data):
        images, _ = everything(part)
        assert str(tuple(images.shape[1:])) == shape
        if shape.startswith("(3"):
            assert torch.equal(images[:, :1].expand_as(images), images)


class OddlyEager(nn.Module):
    """Runs on everything, but only flat rows give logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :10] * 1.0


def test_a_shape_that_runs_without_logits_is_passed_over():
    assert "(784,)" in load_data("glyphs", OddlyEager()).words


def test_a_model_that_takes_none_of_the_shapes_is_told_which_were_tried():
    with pytest.raises(SpecError) as caught:
        load_data("digits", nn.Linear(500, 10))
    message = caught.value.message
    assert "(1, 28, 28), (784,), (3, 28, 28), (1, 8, 8), (64,), (3, 8, 8)" in message
    assert "mat1 and mat2 shapes cannot be multiplied" in message
    assert "\n" not in message


def test_too_few_outputs_and_outputs_of_another_shape_are_refused():
    with pytest.raises(SpecError, match="the model has 5 outputs for 10 classes"):
        load_data("digits", nn.Linear(784, 5))
    with pytest.raises(SpecError, match=r"output is \(2, 4, 26, 26\) for 2 samples"):
        load_data("digits", nn.Conv2d(1, 4, 3))
    with pytest.raises(SpecError, match="NoneType, which holds no tensor"):
        load_data("digits", Returns(lambda _: None))
    with pytest.raises(SpecError, match=r"output is \(2,\) for 2 samples"):
        load_data("digits", Returns(lambda x: x.flatten(1).argmax(1)))


class Returns(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def test_the_first_tensor_of_an_output_counts():
    model = nn.Linear(784, 10)
    data = load_data("digits", Returns(lambda x: {"logits": model(x), "features": x}))
    assert data.classes == 10


def test_the_model_and_random_numbers_are_left_as_they_were():
    model = nn.Sequential(cnn(), nn.Dropout()).train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = nn.Sequential(model, nn.Linear(3, 3))
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    load_data("glyphs", model)
    with pytest.raises(SpecError):
        load_data("glyphs", wrong)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_digits_as_numbers_are_a_regression():
    data = load_data("digits", nn.Linear(784, 1), task="regression")
    _, targets = everything(data.test)
    assert (targets.dtype, tuple(targets.shape)) == (torch.float32, (360, 1))
    assert (data.classes, data.words[-10:]) == (None, "regression")
    assert data.notes == ("targets were reshaped to (N, 1), the model's output",)
    assert set(targets.flatten().tolist()) == set(range(10))


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SpecError, match="scikit-learn, which is not installed") as caught:
        load_data("digits", MyNetwork())
    assert "pip install 'bnify[demo]'" in caught.value.hint


# -- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "says", "hint"),
    [
        ("", "'' is no known data", "one of: digits, glyphs, mnist:DIR"),
        ("digts", "'digts' is no known data", "did you mean digits?"),
        ("digits:", "takes nothing after its name", "write digits"),
        ("digits:loader", "takes nothing after its name", "write digits"),
        ("mnist", "names no folder", "write mnist:DIR"),
        ("folder:", "names no folder", "write folder:DIR"),
        ("torchvision:resnet18", "is a registry, not a Python object", "pkg.mod:datasets"),
        ("data.py:f(1)", "is no attribute name", ""),
    ],
)
def test_words_that_cannot_be_right(source: str, says: str, hint: str):
    with pytest.raises(UsageError) as caught:
        load_data(source, MyNetwork())
    assert says in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "form", [form for form in FORMS if form.takes_folder], ids=lambda form: form.word
)
def test_a_folder_that_is_not_there_or_empty_is_refused(tmp_path: Path, form):
    with pytest.raises(SpecError, match="there is no folder"):
        load_data(f"{form.word}:{tmp_path / 'none'}", MyNetwork())
    with pytest.raises(SpecError, match=str(tmp_path)):
        load_data(f"{form.word}:{tmp_path}", MyNetwork())


def test_options_that_cannot_be_right(tmp_path: Path):
    with pytest.raises(UsageError, match="unknown task 'ranking'"):
        load_data("digits", MyNetwork(), task="ranking")
    with pytest.raises(UsageError, match="only images of a folder have one"):
        load_data("digits", MyNetwork(), image_size=16)
    with pytest.raises(UsageError, match="only images of a folder have one"):
        load_data((), MyNetwork(), image_size=16)
    with pytest.raises(UsageError, match="at least 1 is needed"):
        load_data(f"folder:{tmp_path}", MyNetwork(), image_size=0)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_must_not_be_read_is_one_line(tmp_path: Path):
    tmp_path.chmod(0)
    with pytest.raises(SpecError, match="cannot be read"):
        load_data(f"folder:{tmp_path}", MyNetwork())
