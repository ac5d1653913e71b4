"""Models nobody prepared: fixed batches, branches, guards, checkpoints, odd dtypes and outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnify
import zoo
from bnify import api, inserts
from bnify.realise import Realisations
from mlp import MyNetwork

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


# -- odd models ------------------------------------------------------------------------------------


def test_models_made_for_one_batch_size():
    class Fixed(nn.Module):
        def __init__(self, batch):
            super().__init__()
            self.batch, self.a, self.head = batch, nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(F.relu(self.a(x)).reshape(self.batch, 8))

    result = bnify.insert(Fixed(4), torch.randn(4, 6), batch_size=32)
    assert result.verification.passed
    assert any("batch size 4 only" in note for note in result.plan.notes)
    # Batch norm cannot train on one row, and this model takes no more.
    with pytest.raises(bnify.VerificationError, match="more than 1 value per channel"):
        bnify.insert(Fixed(1), torch.randn(1, 6))
    assert bnify.insert(Fixed(1), torch.randn(1, 6), norm="layer").verification.passed


def test_a_model_with_nothing_to_insert():
    for model, x in ((nn.ReLU(), X), (nn.Sequential(nn.Flatten(), nn.Linear(6, 2)), X)):
        result = bnify.insert(model, x)
        assert result.plan.edits == ()
        assert result.verification.passed
        assert any("nothing to insert" in note for note in result.plan.notes)


def test_a_plan_in_place_of_options():
    plan = api.plan(mlp(), X, norm="group")
    result = bnify.insert(mlp(), X, plan=plan)
    assert [e.norm for e in result.plan.edits] == ["layer", "layer"]
    with pytest.raises(bnify.PlanError, match="does not fit this model"):
        bnify.insert(MyNetwork(), torch.randn(4, 784), plan=plan)


def test_shapes_other_than_tensor():
    entry = zoo.entry("TwoInputs")
    assert bnify.insert(entry.build(), entry.inputs(batch=4)).verification.passed
    x = torch.randn(4, 3, 16, 16)
    inputs = {"image": x, "table": torch.randn(4, 5)}
    assert bnify.insert(entry.build(), inputs).verification.passed


def test_progress_is_told():
    said: list[str] = []
    bnify.insert(mlp(), X, init="preserve", data=X, progress=said.append)
    assert said == ["recording", "planning", "measuring statistics", "rewriting", "verifying"]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointed_layers():
    """A checkpoint runs its part again in the backward pass; a reentrant one may learn nothing."""
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.reentrant, self.a, self.head = reentrant, nn.Linear(6, 6), nn.Linear(6, 2)

        def part(self, x):
            return F.relu(self.a(F.relu(self.a(x))))

        def forward(self, x):
            return self.head(checkpoint(self.part, x, use_reentrant=self.reentrant))

    for reentrant in (False, True):
        x = X.clone().requires_grad_()
        result = bnify.insert(Net(reentrant), x, per_call=True)
        assert [e.calls for e in result.plan.edits] == [2]
        assert result.verification.passed


class Odd(nn.Module):
    """Two layers around something unusual."""

    def __init__(self, program) -> None:
        super().__init__()
        self.a, self.head, self.program = nn.Linear(6, 6), nn.Linear(6, 2), program

    def forward(self, x):
        return self.program(self, x)


@pytest.mark.parametrize(
    "program",
    [
        lambda m, x: m.head(F.relu(m.a(x))).argmax(1),
        lambda m, x: [m.head(F.relu(m.a(x))), None, 3],
        lambda m, x: m.head(F.relu(m.a(x)) if float(x.detach().sum()) > -1e9 else m.a(x)),
        torch.no_grad()(lambda m, x: m.head(F.relu(m.a(x)))),
        torch.inference_mode()(lambda m, x: m.head(F.relu(m.a(x)))),
        torch.autocast("cpu", dtype=torch.bfloat16)(lambda m, x: m.head(F.relu(m.a(x))).float()),
        lambda m, x: m.head(F.relu(m.a(x))) if not m.training else m.head(F.relu(m.a(x))).sum(),
        lambda m, x: m.head(F.relu(m.a(x))) if not m.training else {}["targets"],
    ],
    ids=["integers", "list", "item", "no-grad", "inference", "autocast", "loss", "needs-targets"],
)
def test_odd_models(program):
    result = bnify.insert(Odd(program), X)
    assert [e.layer for e in result.plan.edits] == ["a"]
    assert result.verification.passed


def test_a_model_for_some_values_only():
    model = Odd(lambda m, x: m.head(F.relu(m.a(x))) if bool((x >= 0).all()) else 1 / 0)
    verification = bnify.insert(model, X.abs()).verification
    assert verification.passed
    (undecided,) = [c for c in verification.checks if c.passed is None]
    assert undecided.detail == "the original does not run on it"


def test_a_branch_on_a_value():
    """Both sides of the branch get the norm; the recording knows one of them only."""
    model = Odd(lambda m, x: m.head(F.relu(m.a(x)) if x.sum() > 0 else torch.tanh(m.a(x))))
    for sign in (1, -1):
        result = bnify.insert(model, sign * X.abs())
        assert [e.layer for e in result.plan.edits] == ["a"]
        assert any("branches on a tensor's value" in note for note in result.plan.notes)
        undecided = [c.detail for c in result.verification.checks if c.passed is None]
        assert all("another path" in detail for detail in undecided)
        assert result.verification.passed


def test_complex_parameters_beside_real_layers():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
            self.scale = nn.Parameter(torch.randn(4, dtype=torch.complex64))

        def forward(self, x):
            y = torch.fft.irfft(torch.fft.rfft(self.a(x)) * self.scale, n=6)
            return self.head(F.gelu(y))

    result = bnify.insert(Spectral(), X, init="preserve", data=X)
    assert [e.layer for e in result.plan.edits] == ["a"]
    assert result.verification.passed
    assert result.verification.algebra < 1e-12


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_called_under_a_guard(guard):
    with guard():
        result = bnify.insert(mlp(), X)
    assert result.verification.passed


class Values(nn.Module):
    """Takes a value of its first layer to Python, in a way that a recording bakes in."""

    def __init__(self, how) -> None:
        super().__init__()
        self.a, self.b, self.head, self.how = (
            *(nn.Linear(6, 6) for _ in range(2)),
            nn.Linear(6, 2),
            how,
        )

    def forward(self, x):
        y = self.a(x)
        away = y.mean().item() if self.how == "item" else torch.from_numpy(y.detach().numpy())
        return self.head(F.relu(self.b(y * away)))


@pytest.mark.parametrize("how", ["item", "numpy"])
def test_values_in_python_make_the_recording_undecided_and_not_the_result_wrong(how):
    result = bnify.insert(Values(how), X)
    assert result.verification.passed
    undecided = [c for c in result.verification.checks if c.passed is None]
    assert any("bakes in" in check.detail for check in undecided)
    ran = next(c for c in result.verification.checks if "runs and learns" in c.name)
    assert ran.passed


def test_insert_inside_inference_mode_gives_a_model_that_trains():
    with torch.inference_mode():
        result = bnify.insert(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)), X)
    assert result.verification.passed
    result.model.train()(X.clone()).sum().backward()
    assert result.model[0].norm.weight.grad is not None


def test_nan_inputs_are_blamed_on_the_inputs():
    with pytest.raises(bnify.CaptureError, match="the input input holds 96 NaN"):
        bnify.insert(
            nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), torch.full((16, 6), torch.nan)
        )


def test_layers_behind_no_grad_are_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            with torch.no_grad():
                x = F.relu(self.a(x))
            return self.head(F.relu(self.b(x)))

    for frozen in (False, True):
        model = Net()
        model.a.requires_grad_(not frozen)
        result = bnify.insert(model, X)
        ran = next(c for c in result.verification.checks if "runs and learns" in c.name)
        assert "no gradient reaches a (in the original neither)" in ran.detail
        assert any("never learn" in note for note in result.verification.notes)


class Momentum(nn.Module):
    """One layer runs twice; its second call makes a target, which takes no gradient."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        y = F.relu(self.a(x))
        if self.how == "no_grad":
            with torch.no_grad():
                target = F.relu(self.a(x + 1))
        else:
            target = F.relu(self.a(x + 1)).detach()
        return self.head(F.relu(self.b(y - target)))


@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_a_call_that_takes_no_gradient_in_the_original_needs_none(how):
    result = bnify.insert(Momentum(how), X, per_call=True)
    assert [edit.calls for edit in result.plan.edits] == [2, 1]
    ran = next(c for c in result.verification.checks if "runs and learns" in c.name)
    assert "no gradient reaches call 2 of a (in the original neither)" in ran.detail
    result.model.train()(X).sum().backward()
    norms = result.model.a.norm.norms()
    assert [norm.weight.grad is None for norm in norms] == [False, True]


def test_a_call_that_loses_its_gradient_is_still_found(monkeypatch):
    class Faulty(Realisations):
        def tree(self):
            tree = super().tree()
            tree.a.norm.norms()[0].register_forward_hook(lambda _m, _a, out: out.detach())
            return tree

    monkeypatch.setattr(inserts, "Realisations", Faulty)
    with pytest.raises(bnify.VerificationError, match="a: no gradient for weight"):
        bnify.insert(Momentum("no_grad"), X, per_call=True)


def test_complex_layers_are_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(6, 6, dtype=torch.complex64), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.a(x.to(torch.complex64)).abs())

    result = bnify.insert(Net(), X)
    assert {s.layer: str(s.reason) for s in result.plan.skips} == {
        "a": "complex-values",
        "head": "output-head",
    }
