"""Costs by hand, against torch's own counter, and through what folding does to a model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from bnify.capture import record
from bnify.cost import Cost, cost_of, parameter_count
from bnify.errors import PlanError
from bnify.structure import as_call


def cost(model: nn.Module, *inputs: torch.Tensor) -> Cost:
    return cost_of(model, record(model, inputs).graph)


class Of(nn.Module):
    """A module that runs a function with itself as the first argument."""

    def __init__(self, function, **children) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args):
        return self.function(self, *args)


IMAGE = torch.randn(2, 4, 6, 6)
VALUES = 2 * 4 * 6 * 6

BY_HAND = {
    "linear": (nn.Linear(5, 3), torch.randn(2, 7, 5), 2 * (2 * 7) * 5 * 3),
    "conv": (nn.Conv2d(4, 8, 3, stride=2, padding=1), IMAGE, 2 * (2 * 8 * 9) * 4 * 9),
    "grouped conv": (nn.Conv2d(4, 8, 3, groups=2), IMAGE, 2 * (2 * 8 * 16) * 2 * 9),
    "conv1d": (nn.Conv1d(4, 6, 5), torch.randn(2, 4, 9), 2 * (2 * 6 * 5) * 4 * 5),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, 2, groups=2), IMAGE, 2 * VALUES * 3 * 4),
    "batch norm": (nn.BatchNorm2d(4), IMAGE, 2 * VALUES),
    "batch norm, of the batch": (nn.BatchNorm2d(4, track_running_stats=False), IMAGE, 8 * VALUES),
    "instance norm": (nn.InstanceNorm2d(4), IMAGE, 8 * VALUES),
    "instance, running": (nn.InstanceNorm2d(4, track_running_stats=True), IMAGE, 2 * VALUES),
    "group norm": (nn.GroupNorm(2, 4), IMAGE, 8 * VALUES),
    "layer norm": (nn.LayerNorm(6), IMAGE, 8 * VALUES),
    "rms norm": (nn.RMSNorm(6), IMAGE, 4 * VALUES),
    "relu": (nn.ReLU(), IMAGE, 0),
    "max pool": (nn.MaxPool2d(2), IMAGE, 0),
    "add": (Of(lambda m, x: x + x.relu()), IMAGE, VALUES),
    "matmul": (Of(lambda m, x: x @ x.mT), IMAGE, 2 * (2 * 4 * 6 * 6) * 6),
    "einsum": (
        Of(lambda m, x: torch.einsum("nchw,ncwd->nchd", x, x)),
        IMAGE,
        2 * (2 * 4 * 6 * 6) * 6,
    ),
    "einsum with dots": (
        Of(lambda m, x: torch.einsum("...hw,...wd->...hd", x, x)),
        IMAGE,
        2 * (2 * 4 * 6 * 6) * 6,
    ),
    "attention": (
        Of(lambda m, x: F.scaled_dot_product_attention(x, x[:, :, :5], x[:, :, :5])),
        IMAGE,
        2 * (2 * 4) * 6 * 5 * (6 + 6),
    ),
    "lstm": (
        nn.LSTM(3, 5, bidirectional=True, batch_first=True),
        torch.randn(2, 7, 3),
        2 * (2 * 7) * 2 * (4 * 5 * 3 + 4 * 5 * 5),
    ),
    "gru cell": (nn.GRUCell(3, 5), torch.randn(2, 3), 2 * 2 * (3 * 5 * 3 + 3 * 5 * 5)),
    "of weights": (
        Of(lambda m, x: F.linear(x, m.w * 2 + m.w), w=nn.Parameter(torch.randn(3, 6))),
        IMAGE,
        2 * (2 * 4 * 6) * 6 * 3,
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_flops_by_hand(name: str) -> None:
    model, inputs, want = BY_HAND[name]
    assert cost(model.eval(), inputs).flops == want


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1", "GptLike"])
def test_products_agree_with_the_counter_of_torch(name: str) -> None:
    """torch counts products only, so ours may be above it by norms and sums, never below."""
    entry = zoo.entry(name)
    model, call = entry.build(), as_call(entry.inputs())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(model)
    graph = record(model, call).graph
    ours = cost_of(model, graph)
    small = sum(
        8 * torch.Size(n.meta["shape"]).numel()
        for n in graph.nodes
        if n.op == "call_function" and n.meta.get("shape")
    )
    products = counter.get_total_flops()
    assert products <= ours.flops <= products + small
    assert ours.parameters == sum(p.numel() for p in model.parameters())


def test_a_folded_pair_costs_two_operations_an_element_less_and_one_vector() -> None:
    pair = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    folded = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Identity())
    before, after = cost(pair, IMAGE), cost(folded, IMAGE)
    assert (before.norms, after.norms) == (1, 0)
    assert before.weighted == after.weighted == 1
    assert before.flops - after.flops == 2 * (2 * 8 * 16)
    assert before.parameters - after.parameters == 8


class Frozen(nn.Module):
    """x · w·rsqrt(var + eps) + shift, as Hugging Face writes it."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(4) + 0.5)

    def forward(self, x):
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).view(1, -1, 1, 1)
        shift = self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale
        return x * scale + shift


def rms(_, x):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def standardised(m, x):
    weight = F.batch_norm(m.c.weight.reshape(1, 4, -1), None, None, training=True)
    return F.conv2d(x, weight.reshape_as(m.c.weight))


NORMS = {
    "two in a row": (nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), 2),
    "frozen": (nn.Sequential(Frozen(), Frozen()), 2),
    "hand-written rms": (Of(rms), 1),
    "rms with weight": (Of(lambda m, x: rms(m, x) * m.g, g=nn.Parameter(torch.ones(6))), 1),
    "weight standardisation": (Of(standardised, c=nn.Conv2d(4, 4, 3)), 0),
    "layer scale": (Of(lambda m, x: x * m.g, g=nn.Parameter(torch.ones(6))), 0),
    "never called": (Of(lambda m, x: x + 1, n=nn.BatchNorm2d(4)), 0),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_counted_by_what_runs(name: str) -> None:
    model, want = NORMS[name]
    assert cost(model.eval(), IMAGE).norms == want


def test_tied_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert parameter_count(model) == 16
    model[1].weight = nn.Parameter(model[0].weight.detach())  # another object on the same memory
    assert parameter_count(model) == 16
    model[1].weight = nn.Parameter(model[0].weight.detach().clone())
    assert parameter_count(model) == 32


def test_flops_are_those_of_the_whole_batch() -> None:
    model = zoo.entry("resnet18").build()
    one, three = (cost(model, torch.randn(n, 3, 64, 64)) for n in (2, 6))
    assert three.flops == 3 * one.flops


def test_split_up_operators_cost_the_same() -> None:
    """A model that needs autograd in its forward is recorded operator by operator."""

    def forward(m, x):
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            torch.autograd.grad(y.square().sum(), y)
        return m.net(x)

    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 3))
    model = Of(forward, net=net).eval()
    captured = record(model, IMAGE)
    assert not captured.composite
    split, whole = cost_of(model, captured.graph), cost(net, IMAGE)
    assert (split.norms, split.weighted) == (whole.norms, whole.weighted) == (1, 2)
    assert whole.flops <= split.flops <= whole.flops + 6 * VALUES  # its own sum of squares


def test_a_graph_without_shapes_is_refused() -> None:
    model = nn.Linear(4, 4)
    graph = record(model, torch.randn(2, 4)).graph
    for node in graph.nodes:
        node.meta.clear()
    with pytest.raises(PlanError, match="no recorded shape"):
        cost_of(model, graph)
