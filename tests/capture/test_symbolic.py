"""A graph for any batch size, exact at sizes that were never recorded; or a reason why not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnify.capture import make_symbolic, record
from bnify.structure import as_call
from replaying import run_model, run_recording, same_bits
from zoo import small

X = torch.Generator().manual_seed(12)
SIZES = (1, 2, 5, 7)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=X)


def net(forward):
    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = type("Custom", (nn.Module,), {"forward": forward})()
            model.fc = nn.Linear(6, 6)
            model.lstm = nn.LSTM(6, 3, batch_first=True)
            model.conv = nn.Conv1d(2, 4, 3, padding=1)
            model.token = nn.Parameter(torch.randn(1, 1, 6))
        return model.eval()

    return make


def flattens(self, x):
    n, t, c = x.shape
    return self.fc(x.view(n * t, c)).view(n, t, c).reshape(t, n * c)


def windows(self, x):
    n, t, c = x.shape
    y = x.view(n, t // 2, 2, c).permute(0, 2, 1, 3).reshape(n * 2, t // 2, c)
    bias = torch.zeros(n * 2, 1, 1) + torch.arange(n * 2).view(-1, 1, 1)
    return self.fc(y) + bias


def expands_a_token(self, x):
    y = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
    return self.fc(y)[:, 0]


def counts(self, x):
    n = x.shape[0]
    rows = torch.arange(n).repeat_interleave(2)
    return self.fc(x)[rows % n], torch.eye(n + 1), x.new_ones(3 * n - 2)


def splits(self, x):
    a, b = torch.cat([x, x + 1]).split(x.shape[0])
    return self.fc(a) * b


def group_per_sample(self, x):
    n = x.shape[0]
    weight = self.fc(x).view(n * 4, 1, 6)
    return F.conv1d(x.reshape(1, n * 4, 6), weight, groups=n * 4, padding=2)


def state(self, x):
    h = x.new_zeros(1, x.shape[0], 3)
    y, (h, c) = self.lstm(x, (h, torch.zeros(1, x.shape[0], 3)))
    return y, h, c


def shaped_like_another(self, x):
    y = self.fc(x).flatten(1)
    return y.view_as(x) + torch.zeros_like(x) + torch.ones(x.shape) + x[:1].expand_as(x)


def nothing_baked(self, x):
    return self.fc(x).relu()


EXACT = [
    flattens,
    windows,
    expands_a_token,
    counts,
    splits,
    group_per_sample,
    state,
    shaped_like_another,
    nothing_baked,
]


def symbolic(make, call):
    captured = record(make(), call)
    others = [record(make(), call.resized(call.batch + more)) for more in (1, 3)]
    return captured, make_symbolic(captured, *others)


@pytest.mark.parametrize("forward", EXACT, ids=lambda f: f.__name__)
def test_any_batch_is_exact(forward):
    make, call = net(forward), as_call(draw(2, 4, 6))
    captured, reason = symbolic(make, call)
    assert reason is None
    for size in SIZES:
        arguments = call.resized(size).redrawn(size)
        want = run_model(make(), arguments, train=False, gradients=False)
        got = run_recording(captured, arguments, gradients=False)
        for (name, a), (_, b) in zip(want.outputs, got.outputs, strict=True):
            assert same_bits(a, b), f"{name} at batch {size}"


@pytest.mark.parametrize("entry", list(small()), ids=lambda e: e.name)
def test_the_zoo_at_any_batch(entry):
    call = as_call(entry.inputs())
    captured, reason = symbolic(entry.build, call)
    assert reason is None
    for size in (1, 5):
        arguments = call.resized(size)
        want = run_model(entry.build(), arguments, train=False, gradients=False)
        got = run_recording(captured, arguments, gradients=False)
        for (name, a), (_, b) in zip(want.outputs, got.outputs, strict=True):
            assert same_bits(a, b), f"{name} at batch {size}"


# -- refusals --------------------------------------------------------------------------------------


def loops_over_samples(self, x):
    return torch.stack([self.fc(row) for row in x])


def branches_on_the_batch(self, x):
    return self.fc(x) if x.shape[0] == 2 else self.fc(x).relu()


def other_operator(self, x):
    return self.fc(x).relu() if x.shape[0] == 2 else self.fc(x).tanh()


def mean_by_hand(self, x):
    return self.fc(x).sum(0) * (1 / x.shape[0])


def python_table(self, x):
    return self.fc(x) * torch.tensor([[[float(i)]] for i in range(x.shape[0])])


def python_scalar(self, x):
    return self.fc(x) / torch.tensor(float(x.shape[0]))


def squares(self, x):
    flat = self.fc(x).flatten(1)
    return (flat @ flat.t()).view(x.shape[0] ** 2)


def pairs(self, x):
    n = x.shape[0]
    return self.fc(x).sum() + torch.ones(n * (n - 1) // 2), torch.zeros(n * n + n)


def powers(self, x):
    return self.fc(x).sum() + torch.zeros(2 ** x.shape[0])


def halves(self, x):
    return self.fc(x)[: (x.shape[0] + 1) // 2]


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (loops_over_samples, "other operators at batch 3 than at 2"),
        (branches_on_the_batch, "other operators at batch 3 than at 2"),
        (other_operator, "differs between batch 2 and 3"),
        (mean_by_hand, "no q·B + r"),
        (python_table, "constant of shape"),
        (python_scalar, "constant"),
        (squares, "q·B + r"),
        (pairs, "q·B + r"),
        (powers, "q·B + r"),
        (halves, "q·B + r"),
    ],
)
def test_what_depends_on_the_batch_otherwise_is_refused(forward, reason):
    make, call = net(forward), as_call(draw(2, 4, 6))
    captured = record(make(), call)
    before = str(captured.graph)
    others = [record(make(), call.resized(size)) for size in (3, 5)]
    found = make_symbolic(captured, *others)
    assert found is not None
    assert reason in found
    assert str(captured.graph) == before


def test_inputs_without_a_batch_are_refused():
    class Scalar(nn.Module):
        def forward(self, x):
            return x * 2

    one, other = record(Scalar(), torch.tensor(2.0)), record(Scalar(), torch.tensor(2.0))
    assert "no batch axis" in make_symbolic(one, other)


def test_two_sizes_are_enough_for_what_is_a_line():
    make, call = net(counts), as_call(draw(2, 4, 6))
    captured = record(make(), call)
    assert make_symbolic(captured, record(make(), call.resized(3))) is None
    want = run_model(make(), call.resized(7), train=False, gradients=False)
    for (_, a), b in zip(want.outputs, captured.replay(call.resized(7)), strict=True):
        assert same_bits(a, b)
