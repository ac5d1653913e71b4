"""``init="preserve"``: which data is taken, what it gives, and what is said about it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnify
import laws
import nets
import zoo

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


# -- data ------------------------------------------------------------------------------------------

DATA = torch.randn(37, 6, generator=torch.Generator().manual_seed(5)) * 2 + 1
LABELS = torch.arange(37)


def generator() -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(DATA.split(8), LABELS.split(8), strict=True)


@pytest.mark.parametrize(
    "data",
    [
        lambda: DATA,
        lambda: [DATA],
        lambda: list(DATA.split(9)),
        lambda: DataLoader(TensorDataset(DATA, LABELS), batch_size=6),
        lambda: [(DATA, LABELS)],
        lambda: [[DATA]],
        lambda: [{"input": DATA, "labels": LABELS}],
        lambda: {"input": DATA},
        generator,
    ],
    ids=["tensor", "list", "chunks", "loader", "pair", "nested", "dicts", "dict", "generator"],
)
def test_forms_of_data(data):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.a, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, input):
            return self.head(F.relu(self.a(input)))

    model = Net()
    result = bnify.insert(model, X, init="preserve", data=data())
    var, mean = torch.var_mean(model.a(DATA), 0)
    assert torch.allclose(result.model.a.norm.running_mean, mean, atol=1e-6)
    assert torch.allclose(result.model.a.norm.running_var, var, rtol=1e-5)
    assert result.verification.passed


def test_keyword_inputs_and_dict_batches():
    inputs = {
        "input_ids": torch.randint(1, 100, (4, 12)),
        "attention_mask": torch.ones(4, 12, dtype=torch.long),
    }
    batches = [{**inputs, "labels": torch.zeros(4)} for _ in range(2)]
    result = bnify.insert(nets.BertLike(), inputs, include="*.up", init="preserve", data=batches)
    assert result.verification.passed
    without_mask = [{"input_ids": inputs["input_ids"]}]
    with pytest.raises(bnify.PlanError):
        bnify.insert(nets.BertLike(), inputs, include="*.up", init="preserve", data=without_mask)


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ([LABELS], "int64 tensor of 1 dims"),
        ([torch.zeros(4, 6, 2)], "float tensor of 3 dims"),
        ([("text", LABELS)], "str"),
        ([{"other": DATA}], "other"),
        ([None], "NoneType"),
        (["ab"], "str"),
    ],
)
def test_a_batch_that_does_not_fit_shows_both_structures(data, shown):
    with pytest.raises(bnify.PlanError) as caught:
        bnify.insert(mlp(), X, init="preserve", data=data)
    assert shown in caught.value.message
    assert "float tensor of 2 dims" in caught.value.message
    assert caught.value.hint


def test_data_that_the_model_cannot_take():
    with pytest.raises(bnify.PlanError, match="on batch 1 of the data"):
        bnify.insert(mlp(), X, init="preserve", data=[X, torch.zeros(4, 5)])
    with pytest.raises(bnify.PlanError, match="no batch"):
        bnify.insert(mlp(), X, init="preserve", data=[])
    with pytest.raises(bnify.PlanError, match="not finite"):
        bnify.insert(mlp(), X, init="preserve", data=[X * float("inf")])
    with pytest.raises(bnify.BnifyError):
        bnify.insert(mlp(), X, init="preserve", data=3)


def test_what_preserve_says():
    def notes(data, x=X):
        return " ".join(bnify.insert(mlp(), x, init="preserve", data=data, verify=False).plan.notes)

    assert "pass data for" in notes(None)
    assert "only 16 values a channel" in notes(None)
    assert "pass data for" not in notes(X)
    assert "values a channel" not in notes(torch.randn(1000, 6)).replace("batch size 16", "")
    assert "do not vary" in notes(torch.ones(1000, 6))
    assert "small learning rates" in notes(X)


# -- preserve --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "squeezenet1_1",
        pytest.param("alexnet", marks=pytest.mark.slow),
        pytest.param("vgg11", marks=pytest.mark.slow),
    ],
)
def test_preserve_keeps_known_networks_the_same_function(name):
    entry = zoo.entry(name)
    model, x = entry.build().double(), entry.inputs(batch=2).double()
    result = bnify.insert(model, x, init="preserve", data=[x, x * 3 + 1], verify=False)
    assert len(result.plan.edits) >= 7
    laws.assert_same_function(model, result.model, x)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e6])
def test_preserve_with_any_statistics(scale):
    """Channels that do not vary, or vary a lot."""
    model = mlp().double()
    with torch.no_grad():
        model[0].weight[::2] *= scale
        model[2].bias.fill_(1e3)
    result = bnify.insert(model, X.double(), init="preserve", data=X.double())
    assert result.verification.passed
    laws.assert_same_function(model, result.model, X)


def test_statistics_too_large_for_half_precision_are_refused():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight.mul_(1000)
    with pytest.raises(bnify.PlanError, match="too large for float16"):
        bnify.insert(model.half(), torch.randn(64, 8).half(), init="preserve")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_function_is_kept_in_the_models_own_dtype(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    result = bnify.insert(model, torch.randn(64, 8).to(dtype), init="preserve")
    check = next(c for c in result.verification.checks if c.name == "result = original, own dtype")
    assert check.passed
    assert check.error < check.threshold
