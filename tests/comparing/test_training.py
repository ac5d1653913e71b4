"""One training run: reproducible, looked at honestly, and scored when it diverges."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnify.borrow import copy_model
from bnify.comparing.gradients import gradient_spread
from bnify.comparing.question import Question
from bnify.comparing.recipe import Recipe, scale_weights
from bnify.comparing.training import (
    Setup,
    batch_order,
    default_loss,
    frequent_score,
    looks,
    sample,
    train,
)
from bnify.comparing.trial import Trial
from bnify.structure import Call


@dataclass
class Part:
    x: torch.Tensor
    y: torch.Tensor

    def __len__(self):
        return len(self.x)

    def batch(self, indices):
        return Call((self.x[indices],)), self.y[indices]


@dataclass
class Data:
    train: Part
    validation: Part
    test: Part
    task: str = "classification"


def blobs(samples=200, classes=3, seed=0):
    """Points around the corners of a triangle: easy to learn."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (samples,), generator=generator)
    x = F.one_hot(y, classes).float() * 2 + 0.5 * torch.randn(samples, classes, generator=generator)
    return Part(x, y)


def setup(task="classification", loss=None, **options):
    if task == "classification":
        data = Data(blobs(), blobs(90, seed=1), blobs(60, seed=2))
    else:
        parts = [blobs(n, seed=s) for n, s in ((200, 0), (90, 1), (60, 2))]
        data = Data(*(Part(p.x, p.x.sum(1, keepdim=True)) for p in parts), task=task)
    question = Question(batch_size=16, **options)
    return Setup(
        data=data,
        loss=loss or default_loss(task),
        question=question,
        device=torch.device("cpu"),
    )


def net(seed=0, outputs=3, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, outputs)
    )


def trial(**options):
    return Trial(**{"norm": "none", "lr": 0.05, "batch_size": 16, "steps": 60, "seed": 0} | options)


def same(a, b):
    return repr(replace(a, seconds=0.0)) == repr(replace(b, seconds=0.0))


def test_a_run_learns_and_is_reported_step_by_step():
    outcome = train(net(), trial(), setup())
    assert outcome.error == ""
    assert outcome.steps == looks(60)
    for name in ("train", "train_loss", "validation", "validation_loss", "spread"):
        assert len(getattr(outcome, name)) == len(outcome.steps)
    assert outcome.test > 0.9
    assert outcome.validation[0] < 0.7 < outcome.validation[-1]
    assert outcome.diverged is None
    assert outcome.final_validation == outcome.validation[-1]  # 90 samples: all are in the sample
    assert outcome.spread[0] == outcome.spread[1] > 1  # step 1 has the gradient of the beginning


def test_the_final_figures_are_those_of_the_trained_model():
    model, made = net(), setup()
    outcome = train(model, trial(), made)
    model.eval()
    logits = model(made.data.test.x)
    assert outcome.test == (logits.argmax(1) == made.data.test.y).double().mean().item()
    assert outcome.test_loss == pytest.approx(
        F.cross_entropy(logits, made.data.test.y).item(), 1e-5
    )


def test_equal_seeds_give_equal_bits_whatever_ran_before():
    first = train(net(dropout=0.5), trial(), setup())
    torch.rand(100)
    assert same(first, train(net(dropout=0.5), trial(), setup()))
    assert not same(first, train(net(dropout=0.5), trial(seed=1), setup()))


def test_looking_changes_nothing():
    """The weights at the end are those of a plain loop without evaluations between."""
    made, plain, looked = setup(), net(), net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    batches = batch_order(200, 16, 0)
    for _ in range(60):
        call, targets = made.data.train.batch(next(batches))
        optimizer.zero_grad()
        F.cross_entropy(call(plain), targets).backward()
        optimizer.step()
    train(looked, trial(), made)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, looked.state_dict()[name]), name


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.05), ("adam", 0.01), ("adamw", 0.01)])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_every_optimizer_learns(optimizer, lr, decay):
    made = setup(optimizer=optimizer, weight_decay=decay)
    assert train(net(), trial(lr=lr), made).test > 0.9


def test_a_regression_is_scored_by_its_loss():
    outcome = train(net(outputs=1), trial(steps=120, lr=0.01), setup("regression"))
    assert outcome.test == outcome.test_loss < 1.0
    assert outcome.validation == outcome.validation_loss


class Exploding(nn.Module):
    """Finite for a while, then not."""

    def __init__(self, calls):
        super().__init__()
        self.layer, self.left = nn.Linear(3, 3), calls

    def forward(self, x):
        if self.training:
            self.left -= 1
        return self.layer(x) * (math.inf if self.left < 0 else 1.0)


@pytest.mark.parametrize("calls", [0, 1, 25])
def test_a_diverged_run_is_worth_a_constant_answer(calls):
    made = setup()
    outcome = train(Exploding(calls), trial(), made)
    assert outcome.diverged == calls + 1
    assert max(outcome.steps) <= calls
    frequent = made.data.train.y.mode().values
    assert outcome.test == (made.data.test.y == frequent).double().mean().item()
    assert outcome.test_loss == math.inf


def test_a_diverged_regression_is_worth_the_untrained_model():
    made, model = setup("regression"), net(outputs=1)
    with torch.no_grad():
        before = F.mse_loss(copy_model(model).eval()(made.data.test.x), made.data.test.y).item()
    outcome = train(model, trial(lr=1e30), made)
    assert outcome.diverged is not None
    assert outcome.test == pytest.approx(before, rel=1e-6)
    assert outcome.test_loss == math.inf


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda output, targets: (output - targets) ** 2, "of shape (128, 1), not a tensor"),
        (lambda output, targets: 1.0, "is a float, not a tensor of one number"),
    ],
)
def test_a_loss_that_is_not_one_number_is_told(loss, said):
    assert said in train(net(outputs=1), trial(), setup("regression", loss=loss)).error


class NanInEval(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x) if self.training else self.layer(x) * math.nan


def test_a_model_that_is_not_finite_in_eval_has_diverged_too():
    made = setup()
    outcome = train(NanInEval(), trial(), made)
    assert outcome.diverged == 60
    assert outcome.test == frequent_score(made.data.test, torch.arange(60), made)


class Raising(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        if self.training:
            raise ValueError("not\nthis way")
        return self.layer(x)


def test_an_exception_is_one_line_and_no_crash():
    outcome = train(Raising(), trial(norm="group"), setup())
    assert "group at learning rate 0.05 raised ValueError: not" in outcome.error
    assert "\n" not in outcome.error
    assert outcome.steps == ()


def test_a_loss_of_the_users_own():
    def hinge(output, targets):
        return F.multi_margin_loss(output, targets)

    assert train(net(), trial(), setup(loss=hinge)).test > 0.9


@settings(deadline=None)
@given(st.integers(1, 20_000))
def test_looks_start_at_zero_end_at_the_end_and_leave_no_long_gap(steps):
    when = looks(steps)
    gaps = [b - a for a, b in itertools.pairwise(when)]
    assert when[0] == 0
    assert when[-1] == steps
    assert min(gaps) >= 1
    assert max(gaps) <= max(1, steps // 12)
    assert len(when) <= 80


@settings(deadline=None)
@given(samples=st.integers(1, 50), size=st.integers(1, 50), seed=st.integers(0, 99))
def test_an_epoch_shows_no_sample_twice_and_batches_are_whole(samples, size, seed):
    if size > samples:
        return
    batches = batch_order(samples, size, seed)
    epoch = torch.cat([next(batches) for _ in range(samples // size)])
    assert len(epoch) == len(set(epoch.tolist())) == samples // size * size
    again = batch_order(samples, size, seed)
    assert torch.equal(epoch[:size], next(again))


def test_the_sample_for_looks_is_always_the_same():
    part = blobs(100)
    assert torch.equal(sample(part, 10), sample(part, 10))
    assert len(set(sample(part, 10).tolist())) == 10
    assert sample(part, 100).tolist() == list(range(100))


def test_gradient_spread_is_the_ratio_of_the_extremes():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        for layer, ratio in ((model[0], 0.5), (model[2], 4.0)):
            layer.weight.fill_(3.0)
            layer.weight.grad.fill_(3.0 * ratio)
    model[1].weight.grad.fill_(1e9)  # a scale is no weight
    assert gradient_spread(model) == pytest.approx(8.0)
    model[0].weight.grad.zero_()
    assert gradient_spread(model) == math.inf
    model[2].weight.grad[0, 0] = math.nan
    assert math.isnan(gradient_spread(model))
    assert math.isnan(gradient_spread(nn.Linear(2, 2)))


def test_weights_are_scaled_and_nothing_else():
    model, plain = net(), net()
    scale_weights(model, 3.0)
    for (name, value), before in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(value, before * 3 if value.ndim > 1 else before), name


def test_a_recipe_builds_equal_models_from_equal_seeds(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "def make(width=4):\n    print('noise')\n    return nn.Linear(3, width)\n"
        "ready = make()\n"
    )
    for source, arguments in (
        (f"{file}:make", {"width": 5}),
        (nn.Linear, {"in_features": 3, "out_features": 5}),
    ):
        build = Recipe(source=source, arguments=arguments).factory()
        first, again, other = build(0), build(0), build(1)
        assert first.weight.shape == (5, 3)
        assert torch.equal(first.weight, again.weight)
        assert not torch.equal(first.weight, other.weight)
    for source in (f"{file}:ready", nn.Linear(3, 3)):
        recipe = Recipe(source=source)
        build = recipe.factory()
        first = build(0)
        weight = first.weight.detach().clone()
        with torch.no_grad():
            first.weight.zero_()
        assert torch.equal(build(1).weight, weight)
        assert recipe.fixed()
