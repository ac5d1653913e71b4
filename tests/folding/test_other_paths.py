"""What one recording cannot know: other sizes, and paths that the example did not take."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bnify
import laws


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
    assert "result = original, another size" in names
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4))
    result = bnify.fold(laws.hostile_(fixed.eval()), torch.randn(2, 3, 4))
    assert result.verification.passed
    assert "result = original, another size" not in [c.name for c in result.verification.checks]


def test_norms_that_never_ran_are_named():
    model = laws.hostile_(ByDomain().eval())
    notes = bnify.fold(model, torch.randn(2, 3, 8, 8)).plan.notes
    assert any(note.startswith("norms.1, norms.2 never ran") for note in notes)
    plain = laws.hostile_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    assert not bnify.fold(plain, torch.randn(2, 3, 8, 8)).plan.notes
