"""The user's own data: tensors, arrays and Datasets in, or one clear line."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from bnify.comparing.data import load_data
from bnify.errors import SpecError
from tests.datasets import FEATURES, Items, everything, net, pair, parts

# -- what a function may return ------------------------------------------------------------------

THREE = (pair(20, 0), pair(6, 1), pair(7, 2))


@pytest.mark.parametrize(
    "source",
    [
        THREE,
        list(THREE),
        {"train": THREE[0], "validation": THREE[1], "test": THREE[2]},
        {"test": THREE[2], "val": THREE[1], "train": THREE[0]},
        tuple([*part] for part in THREE),
        tuple(tuple(tensor.numpy() for tensor in part) for part in THREE),
        tuple((x, y.tolist()) for x, y in THREE),
        tuple((x, y[:, None]) for x, y in THREE),
        tuple((x, y.to(torch.uint8)) for x, y in THREE),
        tuple((x.numpy().astype(">f4"), y) for x, y in THREE),
        tuple((x.numpy()[::-1].copy()[::-1], y) for x, y in THREE),
        tuple(TensorDataset(*part) for part in THREE),
        tuple(Items(*part) for part in THREE),
        tuple(Items(*part, lambda x, y: [x.numpy(), int(y)]) for part in THREE),
        tuple(Subset(TensorDataset(*part), range(len(part[0]))) for part in THREE),
        lambda: THREE,
    ],
)
def test_the_parts_are_what_was_returned(source):
    data = load_data(source, net())
    assert (data.task, data.classes, data.notes) == ("classification", 3, ())
    assert data.words.endswith(": 20 / 6 / 7 samples of (4,), 3 classes")
    for part, (x, y) in zip(parts(data), THREE, strict=True):
        inputs, targets = everything(part)
        assert torch.equal(inputs, x)
        assert torch.equal(targets, y)
        assert targets.dtype == torch.int64
        some = torch.tensor([3, 0, 3])
        call, chosen = part.batch(some)
        assert torch.equal(call.args[0], x[some])
        assert torch.equal(chosen, y[some])


@pytest.mark.parametrize("wrap", [lambda x, y: (x, y), TensorDataset, Items])
@pytest.mark.parametrize("keys", [False, True])
def test_without_validation_data_a_fifth_of_train_is_held_out(wrap: Callable, keys: bool):
    train, test = wrap(*pair(21)), wrap(*pair(7, 2))
    source = {"train": train, "test": test} if keys else (train, test)
    data = load_data(source, net(), seed=3)
    assert [len(part) for part in parts(data)] == [16, 5, 7]
    assert data.notes == (
        "validation data are a fifth of the training part of your data, at random",
    )
    together = torch.cat([everything(data.train)[0], everything(data.validation)[0]])
    order = lambda rows: rows[rows[:, 0].argsort()]  # noqa: E731
    assert torch.equal(order(together), order(pair(21)[0]))
    again, other = (load_data(source, net(), seed=seed) for seed in (3, 4))
    assert torch.equal(everything(again.validation)[0], everything(data.validation)[0])
    assert not torch.equal(everything(other.validation)[0], everything(data.validation)[0])


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x * mask)[:, :3]


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("form", ["tensors", "items"])
def test_several_inputs_by_position_and_by_name(as_dict: bool, form: str):
    x, y = pair()
    mask = torch.ones(20, FEATURES)
    mask[::2] = 0
    whole = {"mask": mask, "x": x} if as_dict else (x, mask)
    if form == "items":
        rows = [{"mask": mask[i], "x": x[i]} if as_dict else (x[i], mask[i]) for i in range(len(x))]
        part = Items(rows, y)
    else:
        part = (whole, y)
    data = load_data((part, part, part), TwoInputs())
    call, _ = data.test.batch(torch.tensor([1, 2]))
    assert torch.equal(call(TwoInputs()), (x * mask)[1:3, :3])
    assert "x (4,)" in data.words
    assert "mask (4,)" in data.words


def test_a_tensor_dataset_of_three_is_two_inputs_and_targets():
    x, y = pair()
    part = TensorDataset(x, torch.ones_like(x), y)
    data = load_data((part, part), TwoInputs())
    assert len(data.train.batch(torch.tensor([0]))[0].args) == 2


def test_a_file_is_run_with_the_seed_and_its_output_goes_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "sizes.py").write_text("TRAIN = 15")
    path = tmp_path / "mine.py"
    path.write_text(
        textwrap.dedent(
            """
            import torch
            import sizes

            def datasets():
                print("loading")
                x = torch.randn(sizes.TRAIN + 5, 4)
                y = torch.arange(len(x)) % 2
                return (x[:15], y[:15]), (x[15:], y[15:])
            """
        )
    )
    source = f"{path}:datasets"
    model = net()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    data = load_data(source, model, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert data.words == f"{source}: 12 / 3 / 5 samples of (4,), 2 classes"
    assert capsys.readouterr().out == ""
    torch.manual_seed(8)  # another process would have another state too
    again, other = (load_data(source, net(), seed=seed) for seed in (1, 2))
    assert torch.equal(everything(again.test)[0], everything(data.test)[0])
    assert not torch.equal(everything(other.test)[0], everything(data.test)[0])


def test_items_are_drawn_under_the_callers_random_numbers():
    noisy = Items(*pair(), lambda x, y: (x + torch.randn(4), y))
    data = load_data((noisy, noisy), net())
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(data.train.batch(torch.arange(4))[0].args[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_large_dataset_is_looked_at_in_part_and_that_is_said():
    large = Items(*pair(5_000))
    data = load_data((large, pair(9), pair(9)), net())
    assert len(set(large.drawn)) in (2_000, 2_001)  # the fit draws the samples 0 and 1
    assert {0, 4_999} <= set(large.drawn)
    assert data.notes == (
        "of the training part of your data 2,000 of 5,000 samples were looked at before training",
    )


# -- tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda x, y: (x, y), Items])
@pytest.mark.parametrize(
    ("targets", "outputs", "shape", "note"),
    [
        ((), 1, (1,), "targets were reshaped to (N, 1), the model's output"),
        ((1,), 1, (1,), None),
        ((2,), 2, (2,), None),
        ((1,), 0, (), "targets lost their last axis of length 1"),
        ((), 0, (), None),
    ],
)
def test_targets_of_a_regression_get_the_shape_of_the_output(
    wrap: Callable, targets: tuple, outputs: int, shape: tuple, note: str | None
):
    model = net(outputs) if outputs else nn.Sequential(net(1), nn.Flatten(0))
    part = wrap(pair()[0], torch.randn(20, *targets, dtype=torch.float64))
    data = load_data((part, part, part), model)
    assert (data.task, data.classes) == ("regression", None)
    for each in parts(data):
        _, found = everything(each)
        assert found.dtype == torch.float32
        assert tuple(found.shape) == (20, *shape)
    assert (note is None) == (not data.notes)
    if note is not None:
        assert note in data.notes[0]
    assert data.words == "your data: 20 / 20 / 20 samples of (4,), regression"


def test_the_task_can_be_given():
    x, y = pair()
    given = load_data(((x, y.double()),) * 3, net(), task="classification")
    assert (given.task, given.classes, everything(given.test)[1].dtype) == (
        "classification",
        3,
        torch.int64,
    )
    given = load_data(((x, y),) * 3, net(1), task="regression")
    assert (given.task, everything(given.test)[1].dtype) == ("regression", torch.float32)


def test_a_class_that_only_the_test_part_has_counts():
    x, y = pair()
    test = (x, torch.full_like(y, 7))
    assert load_data(((x, y), (x, y), test), net(8)).classes == 8
    with pytest.raises(SpecError, match="the model has 3 outputs for 8 classes"):
        load_data(((x, y), (x, y), test), net(3))


def test_float64_is_kept_for_a_model_of_float64_and_cast_for_others():
    x, y = pair()
    for wrap in (lambda x, y: (x, y), Items):
        part = wrap(x.double(), y)
        kept = load_data((part, part), net().double())
        assert everything(kept.train)[0].dtype == torch.float64
        assert "float32" not in kept.notes[-1]
        cast = load_data((part, part), net())
        assert everything(cast.train)[0].dtype == torch.float32
        assert "inputs of float64 were cast to float32" in cast.notes[-1]


def test_a_class_that_was_never_trained_on_is_told():
    (x, y), (x_test, y_test) = pair(20), pair(20, 2)
    seen = (x[y != 2], y[y != 2])
    data = load_data((seen, seen, (x_test, y_test)), net())
    assert data.classes == 3
    assert data.notes == ("no training sample is of class 2, which validation or test data have",)
