"""What one recording cannot know: other sizes, and paths that the example did not take."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bnify
import bnify.folds
import laws
from bnify import Reason


class SizeInTheWeights(nn.Module):
    """The window of a table that it averages grows with the input; one element on the example."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("table", torch.randn(1, 4, 20, 20))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2] - 7, x.shape[3] - 7
        scale = self.table[:, :, :height, :width].exp().mean((2, 3), keepdim=True)
        return self.bn(self.conv(x) * scale).relu()


class ByDomain(nn.Module):
    """One norm for each domain, of which a call runs one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.norms[domain](self.conv(x)).relu()


def test_a_fold_that_holds_at_one_size_only_is_not_returned():
    model = laws.hostile_(SizeInTheWeights().eval())
    result = bnify.fold(model, torch.randn(2, 3, 8, 8))
    for size in (8, 9, 13):
        x = torch.randn(1, 3, size, size)
        assert torch.allclose(result.model(x), model(x), atol=1e-5)
    unchecked = bnify.fold(model, torch.randn(2, 3, 8, 8), verify=False)
    if unchecked.plan.edits:  # then it was the verification that saw it
        x = torch.randn(1, 3, 13, 13)
        assert not torch.allclose(unchecked.model(x), model(x), atol=1e-2)


def test_another_size_is_tried_where_the_model_takes_one():
    model = laws.hostile_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    names = [c.name for c in bnify.fold(model, torch.randn(2, 3, 8, 8)).verification.checks]
    assert "result = original, fresh input of another size" in names
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4))
    result = bnify.fold(laws.hostile_(fixed.eval()), torch.randn(2, 3, 4))
    assert result.verification.passed
    names = [c.name for c in result.verification.checks]
    assert names == [
        "result = original, float64",
        "recording = module",
        "result = original, fresh input",
    ]


def test_norms_that_never_ran_are_named():
    model = laws.hostile_(ByDomain().eval())
    notes = bnify.fold(model, torch.randn(2, 3, 8, 8)).plan.notes
    assert any(note.startswith("norms.1, norms.2 never ran") for note in notes)
    plain = laws.hostile_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    assert not bnify.fold(plain, torch.randn(2, 3, 8, 8)).plan.notes


class CastsInFloat64(nn.Module):
    """It casts to float32 whatever is not: a recording in float32 does not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y.sin() if y.dtype == torch.float32 else y.float().sin()


class SomeValuesOnly(nn.Module):
    """Probabilities are taken, nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x < 0).any()) or bool((x > 1).any()):
            raise ValueError("no probabilities")
        return self.bn(self.conv(x))


def test_a_cast_that_only_float64_shows_leaves_the_algebra_in_float64():
    model = laws.hostile_(CastsInFloat64().eval())
    verification = bnify.fold(model, torch.randn(2, 3, 8, 8)).verification
    assert verification.passed
    assert verification.algebra < 1e-12
    assert not verification.notes


def test_where_random_values_are_not_taken_another_size_of_the_example_is_tried():
    model = laws.hostile_(SomeValuesOnly().eval())
    verification = bnify.fold(model, torch.rand(2, 3, 8, 8)).verification
    assert verification.passed
    verdicts = {check.name: check.passed for check in verification.checks}
    assert verdicts["result = original, another size"] is True
    assert verdicts["result = original, fresh input"] is None


def test_a_result_that_fails_on_fresh_values_only_is_not_returned(monkeypatch):
    """The original takes them; the folded module, and it alone, does not."""
    real = bnify.folds.folded_copy

    def faulty(*arguments):
        folded = real(*arguments)
        folded.register_forward_pre_hook(_refuses_negative)
        return folded

    monkeypatch.setattr(bnify.folds, "folded_copy", faulty)
    model = laws.hostile_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    result = bnify.fold(model, torch.rand(2, 3, 8, 8))
    assert [skip.reason for skip in result.plan.skips] == [Reason.VERIFICATION_FAILED]


def _refuses_negative(module: nn.Module, inputs: tuple[Tensor]) -> None:
    if bool((inputs[0] < 0).any()):
        raise ValueError("negative")


def test_a_fault_at_another_size_alone_is_found(monkeypatch):
    real = bnify.folds.folded_copy

    def faulty(*arguments):
        folded = real(*arguments)
        folded.register_forward_hook(
            lambda m, inputs, output: output if inputs[0].shape[-1] == 8 else output * 1.01
        )
        return folded

    monkeypatch.setattr(bnify.folds, "folded_copy", faulty)
    model = laws.hostile_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    result = bnify.fold(model, torch.randn(2, 3, 8, 8))
    assert [skip.reason for skip in result.plan.skips] == [Reason.VERIFICATION_FAILED]
