"""Which value an operator reads: identity, views, writes in place, constants, shared memory."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnify.capture import record
from replaying import check_replay, run_model

X = torch.Generator().manual_seed(7)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=X)


class Net(nn.Module):
    """Three layers that forwards below use as they like; the same weights every time."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.fc = nn.Linear(6, 6)
            self.other = nn.Linear(6, 6)
            self.bn = nn.BatchNorm1d(6)
            self.drop = nn.Dropout(0.4)
            self.scale = nn.Parameter(torch.randn(6))
            self.register_buffer("state", torch.randn(6))
            self.table = torch.randn(4, 6)
            self.caches = {"a": torch.randn(4, 6), "b": [torch.randn(6)]}
        self.box = SimpleNamespace(value=torch.arange(6.0))


def net(forward, **attributes):
    """A factory of nets with this forward."""

    def make() -> nn.Module:
        model = type("Custom", (Net,), {"forward": forward})()
        for name, value in attributes.items():
            setattr(model, name, value)
        return model

    return make


def same_object_three_times(self, q, k, v):
    return self.fc(q) - 2 * self.other(k) * v


def test_one_tensor_passed_three_times_is_three_inputs():
    make, q = net(same_object_three_times), draw(4, 6)
    captured = record(make(), (q, q, q))
    assert sum(node.op == "placeholder" for node in captured.graph.nodes) == 3
    check_replay(make, (q, q, q))
    different = (draw(4, 6), draw(4, 6), draw(4, 6))
    want = run_model(make(), captured.call.__class__(different), train=False, gradients=False)
    got = captured.replay(captured.call.__class__(different))
    assert torch.equal(want.outputs[0][1], got[0])


# Each of these reads a value in a way that a careless recorder gets wrong.


def same_object_back(self, x):
    y = self.drop(self.fc(x)).contiguous().to(torch.float32)
    return y * 2 + y.view(4, 6)


def relu_on_view(self, x):
    y = self.fc(x)
    y.view(2, 12).relu_()
    return y


def relu_on_view_then_layer(self, x):
    y = self.fc(x)
    F.relu_(y.view(4, 2, 3).transpose(1, 2))
    return self.other(y)


def write_first_column(self, x):
    y = self.fc(x)
    y[:, 0] = 0
    y[1] = x[0]
    return self.other(y) + y


def write_through_detach(self, x):
    y = self.fc(x)
    with torch.no_grad():
        y.detach().mul_(2)
    return y + 1


def write_through_data(self, x):
    y = self.fc(x)
    y.data.clamp_(min=0)
    return y + 1


def read_through_data(self, x):
    y = self.fc(x)
    return y + y.data * 3


def data_of_a_view(self, x):
    y = self.fc(x)
    return self.other(y[:, ::2].data.repeat(1, 2)) + y


def add_to_itself(self, x):
    y = self.fc(x)
    y += y
    return torch.cat([y, y]) + torch.cat([y, x + y])


def in_place_chain(self, x):
    y = self.fc(x).mul_(2).add_(1).relu_()
    z = y * 1
    z.sub_(0.5).mul_(x)
    return y, z


def in_place_with_later_reader(self, x):
    y = self.fc(x)
    kept = y[1:]
    y.relu_()
    return kept + 1, y


def in_place_on_an_alias_of_an_alias(self, x):
    y = self.fc(x)
    a = y.view(2, 12)
    b = a.t()
    y.sigmoid_()
    return self.other(y), b


def write_into_input(self, x):
    x.mul_(2)
    x[:, 1] = 5
    return self.fc(x)


def write_into_slice_of_cat(self, x):
    out = torch.zeros(4, 12)
    out[:, :6] = self.fc(x)
    out[:, 6:].copy_(self.other(x))
    return out


def out_argument(self, x):
    result = torch.empty(4, 6)
    torch.add(self.fc(x).detach(), x.detach(), out=result)
    return result * self.scale


def foreach(self, x):
    a, b = self.fc(x).detach(), self.other(x).detach()
    torch._foreach_mul_([a, b], 2.0)
    torch._foreach_add_([a], [b])
    return a * self.scale, b


def chunk_split_unbind(self, x):
    y = self.fc(x)
    a, b, c = y.chunk(3, dim=1)
    d, e = y.split([1, 5], dim=1)
    rows = y.unbind(0)
    return a * 3 + b + c, d, e, rows[0] + rows[-1], y


def chunk_written_in_place(self, x):
    y = self.fc(x).detach()
    a, b = y.chunk(2, dim=1)
    a.mul_(b)
    y.unbind(0)[1].add_(7)
    return y * self.scale, a


def strided_slice_written_in_place(self, x):
    z = self.fc(x).detach()[:, ::2].relu_()
    return torch.as_strided(z, (4, 3), (6, 2), 1) * 2


def top_k_and_max(self, x):
    y = self.fc(x)
    values, where = y.topk(2, dim=1)
    return values, where, y.max(dim=0).values, torch.sort(y).indices


def weight_as_value(self, x):
    return F.linear(x, self.fc.weight.t() * self.scale) + self.fc.weight.sum() + self.fc.bias


def weight_data(self, x):
    return F.linear(x, self.fc.weight.data, self.fc.bias) + self.fc.weight.detach()[0]


def weight_slices(self, x):
    w = self.fc.weight
    return torch.cat([F.linear(x, w[:3]), F.linear(x, w.data[3:])], dim=1)


def plain_attributes(self, x):
    return self.fc(x) + self.table + self.caches["a"] * self.caches["b"][0] + self.box.value


def state_written_after_read(self, x):
    y = self.fc(x) * self.state
    self.state.mul_(0.5).add_(x.detach().mean(0))
    return y + self.state


def state_written_through_data(self, x):
    y = self.fc(x) * self.state
    self.state.data.lerp_(x.detach().mean(0), 0.25)
    return y - self.state


def state_written_through_slice(self, x):
    self.state[1:3] = x.detach()[0, 1:3]
    return self.fc(x) * self.state


def cache_written_later(self, x):
    y = self.fc(x) + self.caches["a"]
    self.caches["a"].zero_()
    return y + self.caches["a"]


def cache_filled_on_first_call(self, x):
    if "bias" not in self.caches:
        self.caches["bias"] = self.scale * 2
    return self.fc(x) + self.caches["bias"]


def made_in_forward(self, x):
    ramp = torch.arange(6.0) / 6 + torch.tensor([1.0, 2, 3, 4, 5, 6])
    return self.fc(x) * ramp + torch.linspace(0, 1, 6) + torch.eye(4, 6)


def from_numpy(self, x):
    ramp = torch.from_numpy(np.linspace(0, 1, 6, dtype=np.float32))
    return self.fc(x) + ramp.mul_(2)


def numpy_after_frees(self, x):
    # Memory of dead values is reused: by its address alone a new tensor passes for an old one.
    y = x
    for i in range(12):
        y = self.fc(y).tanh()
        y = y + torch.from_numpy(np.full((4, 6), i, dtype=np.float32))
    return y


def parameter_made_in_forward(self, x):
    weight = nn.Parameter(self.fc.weight.detach() * 2)
    return F.linear(x, weight)


def promotes_in_place(self, x):
    y = self.fc(x).bfloat16()
    y.mul_(self.scale)
    y.add_(torch.ones(6, dtype=torch.float64))
    return y * 2


def compares_in_place(self, x):
    y = self.fc(x).detach()
    y.gt_(x)
    return y + 0.5


def strided(self, x):
    y = self.fc(x)
    z = y[:, ::2].relu_()
    return torch.as_strided(z, (4, 6), (6, 1)) + y.as_strided((2, 2), (3, 1), 1).sum()


def like_of_a_transposed_value(self, x):
    y = self.fc(x).t()
    keep = torch.empty_like(y).bernoulli_(0.5)
    return y * keep + torch.rand_like(y) + torch.randn_like(y), torch.zeros_like(y).uniform_()


def masks_with_infinity(self, x):
    y = self.fc(x).masked_fill(torch.ones(4, 6).tril().bool(), float("-inf"))
    return y.softmax(-1), torch.where(x > 0, y, float("nan"))


def complex_values(self, x):
    y = torch.fft.rfft(self.fc(x))
    return torch.fft.irfft(y * (1 + 2j), n=6), y.abs(), torch.view_as_real(y.conj().resolve_conj())


def records_profile(self, x):
    with torch.profiler.record_function("block"):
        return self.fc(x)


def einsum_and_norms(self, x):
    y = torch.einsum("nc,dc->nd", x, self.fc.weight)
    return F.layer_norm(y, (6,), self.scale), F.normalize(y), torch.linalg.vector_norm(y)


VALUES = [
    same_object_back,
    relu_on_view,
    relu_on_view_then_layer,
    write_first_column,
    add_to_itself,
    in_place_chain,
    in_place_with_later_reader,
    in_place_on_an_alias_of_an_alias,
    write_into_input,
    write_into_slice_of_cat,
    chunk_split_unbind,
    top_k_and_max,
    weight_as_value,
    weight_slices,
    plain_attributes,
    cache_written_later,
    cache_filled_on_first_call,
    made_in_forward,
    from_numpy,
    numpy_after_frees,
    promotes_in_place,
    strided,
    like_of_a_transposed_value,
    masks_with_infinity,
    complex_values,
    records_profile,
    einsum_and_norms,
]
#: Their values are exact; gradients stop at a detach that no operator shows.
WITHOUT_GRADIENTS = [
    write_through_detach,
    write_through_data,
    read_through_data,
    data_of_a_view,
    out_argument,
    foreach,
    weight_data,
    parameter_made_in_forward,
    compares_in_place,
    state_written_after_read,
    state_written_through_data,
    state_written_through_slice,
    chunk_written_in_place,
    strided_slice_written_in_place,
]


@pytest.mark.parametrize("forward", VALUES, ids=lambda f: f.__name__)
def test_replay_is_the_model(forward):
    check_replay(net(forward), draw(4, 6), gradients=False)
    check_replay(net(forward), draw(4, 6), gradients=True, fresh=1)


@pytest.mark.parametrize("forward", WITHOUT_GRADIENTS, ids=lambda f: f.__name__)
def test_replay_is_the_model_without_gradients(forward):
    check_replay(net(forward), draw(4, 6), gradients=False)
