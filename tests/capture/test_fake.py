"""Fake recordings run on shapes alone, and have the operators of real ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bnify.capture import record
from bnify.errors import CaptureError
from zoo import small

FACTS = ("shape", "dtype", "module", "call")


def program(captured) -> list[tuple]:
    return [
        (n.op, str(n.target), *(n.meta.get(fact) for fact in FACTS)) for n in captured.graph.nodes
    ]


OWN = [entry for entry in small() if entry.name.startswith("own:")]


@pytest.mark.parametrize("entry", OWN, ids=lambda e: e.name)
def test_the_zoo_in_fake_tensors(entry):
    model, inputs = entry.build(), entry.inputs()
    assert program(record(model, inputs, fake=True)) == program(record(model, inputs))


def test_train_mode_in_fake_tensors():
    model = nn.Sequential(
        nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(inplace=True)
    )
    x = torch.randn(4, 6)
    real = record(model, x, train=True)
    assert program(record(model, x, train=True, fake=True)) == program(real)


def test_tied_and_repeated_tensors_in_fake_tensors():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, q, k):
            return self.a(q).add_(1) + self.b(k)

    model, x = Tied(), torch.randn(4, 6)
    fake, real = record(model, (x, x), fake=True), record(model, (x, x))
    assert program(fake) == program(real)
    assert fake.aliases == real.aliases
    groups = [n.meta["alias"] for n in fake.graph.nodes if n.op == "placeholder"]
    assert len(set(groups)) == 2


def test_values_cannot_be_followed_by_shapes():
    class Branches(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(CaptureError):
        record(Branches(), torch.randn(4, 6), fake=True)
