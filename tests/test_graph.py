"""Facts that planning reads off a graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnify import ops
from bnify.capture import record
from bnify.graph import Facts

X = torch.Generator().manual_seed(14)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=X)


def facts_of(forward, inputs, **layers) -> Facts:
    net = type("Custom", (nn.Module,), {"forward": forward})()
    for name, layer in layers.items():
        if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
            net.register_buffer(name, layer)
        else:
            setattr(net, name, layer)
    return Facts(record(net, inputs).graph)


def weights(facts: Facts, nodes) -> set[str]:
    """Names of the weights whose operators are among the nodes."""
    return {op.roots[0] for node, op in facts.weighted.items() if node in nodes}


def linears(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(6, 6) for name in names}


def test_weighted_operators_and_their_roots():
    def forward(self, x):
        y = F.linear(self.a(x), self.b.weight * self.gain)
        z = y @ self.matrix + torch.matmul(x, x.t()) @ y
        return torch.einsum("nc,dc->nd", z, self.c.weight) + self.table.sum()

    facts = facts_of(
        forward,
        draw(4, 6),
        **linears("a", "b", "c"),
        gain=nn.Parameter(draw(6)),
        matrix=nn.Parameter(draw(6, 6)),
        table=draw(3),
    )
    found = {" ".join(sorted(op.roots)): op.computed for op in facts.weighted.values()}
    assert found == {
        "a.weight": False,
        "b.weight gain": True,
        "matrix": False,
        "c.weight": False,
    }


def test_products_of_values_are_not_weighted():
    facts = facts_of(lambda self, x: torch.softmax(x @ x.t(), -1) @ x, draw(4, 6))
    assert not facts.weighted


def test_static_values_depend_on_no_input():
    def forward(self, x):
        return self.a(x) * (self.gain * 2).exp()

    facts = facts_of(forward, draw(4, 6), **linears("a"), gain=nn.Parameter(draw(6)))
    assert {facts.name[n] for n in facts.static} >= {"get_attr", "mul", "exp"}
    assert not any(facts.name[n] == "linear" for n in facts.static)


def test_heads_are_the_last_weighted_layers_on_every_path():
    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.b(y).softmax(-1), self.c(y)[:, 0], self.d(torch.relu(self.e(y)))

    facts = facts_of(forward, draw(4, 6), **linears(*"abcde"))
    assert weights(facts, facts.heads) == {"b.weight", "c.weight", "d.weight"}


def test_a_layer_that_is_output_and_read_again_is_a_head():
    def forward(self, x):
        y = self.a(x)
        return self.b(y), y.relu()

    facts = facts_of(forward, draw(4, 6), **linears("a", "b"))
    assert weights(facts, facts.heads) == {"a.weight", "b.weight"}


def test_gates_multiply_and_activations_do_not():
    def forward(self, x):
        gate = torch.sigmoid(self.a(x))
        hard = F.relu6(self.b(x) + 3) / 6
        y = x * gate * hard
        z = self.c(y)
        return self.e(z * torch.sigmoid(z)) + torch.sigmoid(self.d(x))

    facts = facts_of(forward, draw(4, 6), **linears(*"abcde"))
    assert weights(facts, facts.gates) == {"a.weight", "b.weight"}


def test_attention_projections():
    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = (q @ k.transpose(1, 2) / 6**0.5 + self.mask).softmax(-1)
        y = self.out(F.dropout(scores, 0.1, False) @ v)
        return self.down(torch.relu(self.up(y)))

    facts = facts_of(
        forward, draw(2, 3, 6), **linears("q", "k", "v", "out", "up", "down"), mask=draw(3, 3)
    )
    expected = {"q.weight", "k.weight", "v.weight", "out.weight"}
    assert weights(facts, facts.attention) == expected
    fused = facts_of(
        lambda self, x: self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))),
        draw(2, 3, 6),
        **linears("q", "k", "v", "out"),
    )
    assert weights(fused, fused.attention) == expected


def test_norms_of_torch_and_by_hand():
    def forward(self, x):
        y = self.norm(self.a(x))
        z = self.b(y)
        centred = z - z.mean(-1, keepdim=True)
        z = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * self.gain
        return self.c(z)

    facts = facts_of(
        forward,
        draw(4, 6),
        **linears("a", "b", "c"),
        norm=nn.LayerNorm(6),
        gain=nn.Parameter(draw(6)),
    )
    names = [facts.name[n] for n in facts.nodes if n in facts.normed]
    assert "layer_norm" in names
    assert names.count("mul") == 2
    assert not facts.normed & set(facts.weighted)


def test_weight_standardisation_is_no_norm_of_a_value():
    def forward(self, x):
        w = self.a.weight
        w = (w - w.mean(1, keepdim=True)) * torch.rsqrt(w.var(1, keepdim=True) + 1e-5)
        return F.linear(x, w, self.a.bias).relu()

    facts = facts_of(forward, draw(4, 6), **linears("a"))
    assert not facts.normed
    (op,) = facts.weighted.values()
    assert op.computed


def test_names_of_operators_lose_the_mark_of_in_place():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    assert ops.name_of(graph.call_function(torch.ops.aten.relu_.default, (x,))) == "relu"
    assert ops.name_of(graph.call_function(torch.ops.aten.relu.default, (x,))) == "relu"
    assert ops.name_of(x) == "placeholder"
    twice = graph.call_function(torch.ops.aten.add.Tensor, (x, x))
    assert ops.sources(twice) == [x]
    assert ops.first(twice) is x
