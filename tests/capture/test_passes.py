"""The clean-up passes keep every value; and what they must leave alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnify.capture import record
from bnify.capture.passes import functionalise, shapes_to_constants
from replaying import check_replay

X = torch.Generator().manual_seed(13)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=X)


def net(forward):
    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = type("Custom", (nn.Module,), {"forward": forward})()
            model.fc = nn.Linear(6, 6)
            model.register_buffer("state", torch.randn(6))
        return model

    return make


def names(captured) -> list[str]:
    return [str(n.target).removeprefix("aten.") for n in captured.graph.nodes]


def readers(captured) -> int:
    (linear,) = (n for n in captured.graph.nodes if str(n.target) == "aten.linear.default")
    return len(linear.users)


SHAPES = {
    "view_as": lambda y, x: x.view_as(y),
    "reshape_as": lambda y, x: x.t().reshape_as(y),
    "expand_as": lambda y, x: x[:1].expand_as(y),
    "zeros_like": lambda y, x: x + torch.zeros_like(y),
    "ones_like": lambda y, x: x + torch.ones_like(y, dtype=torch.float64),
    "full_like": lambda y, x: x + torch.full_like(y, 3.5),
    "rand_like": lambda y, x: x + torch.rand_like(y),
    "randn_like": lambda y, x: x + torch.randn_like(y),
    "empty_like": lambda y, x: x + torch.empty_like(y).fill_(2),
    "bernoulli": lambda y, x: x + torch.empty_like(y).bernoulli_(0.5),
    "new_zeros": lambda y, x: x + y.new_zeros(6),
    "new_ones": lambda y, x: x + y.new_ones(4, 6, dtype=torch.bool),
    "new_full": lambda y, x: x + y.new_full((6,), -1.5),
    "new_empty": lambda y, x: x + y.new_empty(6).fill_(1),
    "type_as": lambda y, x: x.double().type_as(y),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_reader_of_the_shape_is_no_reader(name):
    def forward(self, x):
        y = self.fc(x)
        return SHAPES[name](y, x) + y.relu()

    captured = check_replay(net(forward), draw(4, 6))
    assert readers(captured) == 1
    assert readers(record(net(forward)(), draw(4, 6), clean=False)) == 2


def test_random_numbers_keep_their_places_on_transposed_values():
    """They are drawn in the order of memory, which a plain factory would not have."""

    def forward(self, x):
        y = self.fc(x).t()
        z = F.conv2d(
            x.view(1, 4, 2, 3).contiguous(memory_format=torch.channels_last), x.new_ones(2, 4, 1, 1)
        )
        return y * torch.rand_like(y), z + torch.empty_like(z).bernoulli_(0.5)

    check_replay(net(forward), draw(4, 6))


def test_the_shape_of_the_output_of_a_factory_on_another_layout():
    def forward(self, x):
        y = self.fc(x).view(1, 4, 2, 3)
        like = torch.empty_like(y, memory_format=torch.channels_last).uniform_()
        return like, torch.rand_like(y, memory_format=torch.contiguous_format)

    check_replay(net(forward), draw(4, 6))


# -- in place --------------------------------------------------------------------------------------

FUNCTIONAL = {
    "relu": lambda y, x: y.relu_(),
    "chain": lambda y, x: y.mul_(2).add_(x).clamp_(min=0).sigmoid_(),
    "functional": lambda y, x: F.leaky_relu(
        F.dropout(y, 0.3, True, inplace=True), 0.2, inplace=True
    ),
    "iadd": lambda y, x: y.__iadd__(x) * 2,
    "masked fill": lambda y, x: y.masked_fill_(x > 0, 1.0),
    "addcmul": lambda y, x: y.addcmul_(x, x, value=2),
    "half operand": lambda y, x: y.add_(x.bfloat16()),
    "through a view": lambda y, x: y.view(-1).tanh_(),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_in_place_becomes_functional_where_nobody_sees_it(name):
    captured = check_replay(net(lambda self, x: FUNCTIONAL[name](self.fc(x), x)), draw(4, 6))
    assert not any(n.partition(".")[0].endswith("_") for n in names(captured)), names(captured)
    raw = record(net(lambda self, x: FUNCTIONAL[name](self.fc(x), x))(), draw(4, 6), clean=False)
    assert any(n.partition(".")[0].endswith("_") for n in names(raw))


def seen_by_an_older_view(self, x):
    y = self.fc(x)
    older = y.view(2, 12)
    y.relu_()
    return older


def seen_by_the_value_itself(self, x):
    y = self.fc(x)
    y.t().mul_(2)
    return y


def on_the_input(self, x):
    x.mul_(2)
    return self.fc(x)


def on_a_buffer(self, x):
    self.state.mul_(0.5)
    return self.fc(x) + self.state


def on_a_view_of_a_buffer(self, x):
    self.state[:3].add_(1)
    return self.fc(x) + self.state


def changes_the_dtype(self, x):
    y = self.fc(x).bfloat16()
    return y.mul_(x) * 3


def compares(self, x):
    return self.fc(x).detach().gt_(0.1) * 2


def reads_the_memory(self, x):
    z = self.fc(x).detach()[:, ::2].relu_()
    return z.as_strided((2, 5), (6, 1), 1)


def into_a_slice(self, x):
    out = torch.zeros(4, 8)
    out[:, 1:7] = self.fc(x)
    out[:, 0].add_(5)
    return out


KEPT = [
    seen_by_an_older_view,
    seen_by_the_value_itself,
    on_the_input,
    on_a_buffer,
    on_a_view_of_a_buffer,
    changes_the_dtype,
    compares,
    reads_the_memory,
    into_a_slice,
]


@pytest.mark.parametrize("forward", KEPT, ids=lambda f: f.__name__)
def test_in_place_stays_where_somebody_sees_it(forward):
    captured = check_replay(net(forward), draw(4, 6), gradients=False)
    assert any(n.partition(".")[0].endswith("_") for n in names(captured)), names(captured)


def test_an_older_reader_in_front_is_no_obstacle():
    def forward(self, x):
        y = self.fc(x)
        kept = y + 1
        return y.relu_() + kept

    captured = check_replay(net(forward), draw(4, 6))
    assert "relu.default" in names(captured)
    relu = next(n for n in captured.graph.nodes if str(n.target) == "aten.relu.default")
    assert relu.meta["writes"] == ()
    assert relu.meta["alias"] != relu.args[0].meta["alias"]


def test_the_passes_find_nothing_a_second_time():
    forward = net(lambda self, x: self.fc(x).relu_() + torch.zeros_like(x))
    captured = record(forward(), draw(4, 6))
    assert shapes_to_constants(captured.graph) == 0
    assert functionalise(captured.graph) == 0


# -- gradients -------------------------------------------------------------------------------------


def straight_through(self, x):
    y = self.fc(x)
    with torch.no_grad():
        y.clamp_(-0.5, 0.5)
    return y * 2


def scaled_without_gradient(self, x):
    y = self.fc(x)
    with torch.no_grad():
        scale = y.abs().amax(1, keepdim=True).clamp_(min=1)
    return y / scale


@torch.no_grad()
def _codes(y):
    return y.round()


def decorated(self, x):
    y = self.fc(x)
    return y + (_codes(y) - y).detach() + _codes(y)


def moving_average(self, x):
    y = self.fc(x)
    with torch.no_grad():
        self.state.lerp_(y.mean(0), 0.1)
    return y - self.state


def view_without_gradient(self, x):
    y = self.fc(x)
    with torch.no_grad():
        half = y[:, :3]
    return torch.cat([y, half * 2], 1)


def gradient_on_again(self, x):
    with torch.no_grad():
        y = self.fc(x)
        with torch.enable_grad():
            z = self.fc(x) * y
    return z + y


@pytest.mark.parametrize(
    "forward",
    [
        straight_through,
        scaled_without_gradient,
        decorated,
        moving_average,
        view_without_gradient,
        gradient_on_again,
    ],
    ids=lambda f: f.__name__,
)
def test_gradients_stop_where_the_model_stops_them(forward):
    check_replay(net(forward), draw(4, 6), modes=(True,))
    check_replay(net(forward), draw(4, 6), modes=(False,), gradients=False)
