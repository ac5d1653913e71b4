"""Models whose state and gradients go their own ways pass the verification of an insertion."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnify


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(8, 6)
        self.register_buffer("average", torch.zeros(6))
        self.u = nn.Parameter(torch.randn(6), requires_grad=False)

    def body(self, x):
        return self.b(torch.relu(self.a(x)))


class WithoutGradient(Base):
    def forward(self, x):
        y = self.body(x)
        with torch.no_grad():
            scale, target = y.abs().max(), torch.relu(y) * 2
        return y / scale + target


class ReplacesBuffer(Base):
    def forward(self, x):
        y = self.body(x)
        self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
        return y - self.average


class ReplacesData(Base):
    def forward(self, x):
        y = self.body(x)
        self.u.data = torch.tanh(self.u.data + y.data.mean(0))
        return y * self.u


class Rounds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class StraightThrough(Base):
    def forward(self, x):
        return Rounds.apply(self.body(x) * 4) * self.u + x


class Checkpointed(Base):
    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False) + x


class CheckpointedAgain(Base):
    def forward(self, x):
        return checkpoint(self.body, x.requires_grad_(), use_reentrant=True) + x


class Transposed(Base):
    def forward(self, x):
        y = self.body(x)
        keep = torch.empty_like(y.t()).bernoulli_(0.5).t() if self.training else 1
        return y * keep


MODELS = [
    WithoutGradient,
    ReplacesBuffer,
    ReplacesData,
    StraightThrough,
    Checkpointed,
    CheckpointedAgain,
    Transposed,
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)
def test_insertion_is_verified(make):
    result = bnify.insert(make(), torch.randn(8, 6))
    assert [edit.layer for edit in result.plan.edits] == ["a"]
    assert result.verification.passed


def test_gradients_of_a_functions_own_are_said_to_be_undecided():
    result = bnify.insert(StraightThrough(), torch.randn(8, 6))
    text = str(result.verification.to_dict())
    assert "autograd.Function" in text
    assert "autograd.Function" not in str(
        bnify.insert(Checkpointed(), torch.randn(8, 6)).verification.to_dict()
    )
