"""Facts beside the graph: escapes to Python, module calls and paths, names, aliases, writes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnify.capture import Captured, attribute_name, record
from bnify.errors import CaptureError

X = torch.Generator().manual_seed(11)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=X)


class Leaver(nn.Module):
    """A child that lets a value leave for Python."""

    def __init__(self, leave) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.leave = leave

    def forward(self, x):
        y = self.fc(x)
        self.leave(y)
        return y * 2


ESCAPES = {
    "item": ("item", lambda y: y.sum().item()),
    "int": ("item", lambda y: int(y[0, 0])),
    "float": ("item", lambda y: float(y.mean())),
    "format": ("item", lambda y: f"{y.max():.2f}"),
    "index": ("item", lambda y: list(range(y.argmax() + 1))),
    "bool": ("branch", lambda y: bool(y.sum() > 0)),
    "if": ("branch", lambda y: 1 if (y > 0).any() else 2),
    "assert": ("branch", lambda y: bool(y.sum() != 3)),
    "equal": ("branch", lambda y: torch.equal(y, y + 1)),
    "allclose": ("branch", lambda y: torch.allclose(y, y)),
    "in": ("branch", lambda y: 3.0 in y),
    "tolist": ("numpy", lambda y: y[0].tolist()),
    "numpy": ("numpy", lambda y: y.numpy()),
    "detach numpy": ("numpy", lambda y: y.detach().cpu().numpy()),
    "array": ("numpy", lambda y: __import__("numpy").asarray(y)),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_value_that_leaves_for_python_is_noted(name):
    how, leave = ESCAPES[name]
    captured = record(nn.Sequential(nn.ReLU(), Leaver(leave)), draw(4, 6))
    assert captured.escapes, captured.graph
    assert {e.how for e in captured.escapes} <= {how, "item", "branch"}
    assert how in {e.how for e in captured.escapes} or name == "in"
    assert {e.module for e in captured.escapes} == {"1"}
    assert all(e.node is not None for e in captured.escapes)
    assert any(note.startswith("1 ") and "other inputs" in note for note in captured.notes)
    assert captured.composite


@pytest.mark.parametrize(
    "leave",
    [
        lambda y: y.shape,
        lambda y: y.size(0) + y.numel() + len(y),
        lambda y: y.resolve_conj(),
        lambda y: y.cpu().contiguous(),
        lambda y: y.dtype.is_floating_point and y.device.type,
        lambda y: y.tril(),
    ],
)
def test_nothing_is_noted_where_no_value_leaves(leave):
    captured = record(nn.Sequential(nn.ReLU(), Leaver(leave)), draw(4, 6))
    assert captured.escapes == ()
    assert captured.notes == []


def test_an_escape_of_a_parameter_has_no_node():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return x * self.gain.item()

    (escape,) = record(Reads(), draw(2, 3)).escapes
    assert (escape.how, escape.module, escape.node) == ("item", "", None)


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        generator = torch.Generator().manual_seed(3)
        return self.fc(x) + torch.rand(6, generator=generator)


@pytest.mark.parametrize("train", [False, True])
def test_a_generator_is_recorded_and_not_replayed(train):
    captured = record(Drawing(), draw(4, 6), train=train)
    assert "torch.Generator" in captured.unreplayable
    assert any("torch.Generator" in note for note in captured.notes)
    with pytest.raises(CaptureError, match=r"cannot be run again.*Generator"):
        captured.module()


# -- modules ---------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.fc(x)) + 1


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.alias = self.block
        self.unused = nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        x = self.block(self.alias(x))
        made = nn.Softplus()(x)
        return self.attention(made, made, made, need_weights=False)[0]


def nodes_of(captured: Captured, name: str) -> list:
    return [n for n in captured.graph.nodes if n.op == "call_function" and name in str(n.target)]


def test_paths_and_calls():
    captured = record(Tree(), draw(2, 3, 6))
    first, second = (n for n in nodes_of(captured, "linear") if n.meta["module"] == "block.fc")
    assert (first.meta["call"], second.meta["call"]) == (0, 1)
    assert {n.meta["module"] for n in nodes_of(captured, "relu")} == {"block.act"}
    assert {n.meta["module"] for n in nodes_of(captured, "softplus")} == {""}
    paths = [(c.path, c.number, c.depth) for c in captured.calls]
    assert paths == [
        ("block.fc", 0, 2),
        ("block.act", 0, 2),
        ("block", 0, 1),
        ("block.fc", 1, 2),
        ("block.act", 1, 2),
        ("block", 1, 1),
        ("attention", 0, 1),
        ("", 0, 0),
    ]
    call = captured.calls[3]
    assert call.inputs == captured.calls[2].outputs
    assert call.outputs == (second,)


def test_the_owner_of_a_weight_need_not_be_the_layer():
    captured = record(Tree(), draw(2, 3, 6))
    by_weight = {
        str(n.args[1].target): n.meta["module"]
        for n in nodes_of(captured, "linear")
        if n.args[1].op == "get_attr"
    }
    assert by_weight["attention.in_proj_weight"] == "attention"
    assert by_weight["attention.out_proj.weight"] == "attention"


def test_outputs_of_a_call_are_those_before_hooks():
    tree = Block()
    tree.fc.register_forward_hook(lambda module, args, output: output * 2)
    tree.fc.register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    captured = record(tree, draw(4, 6))
    call = captured.calls[0]
    assert call.outputs == tuple(nodes_of(captured, "linear"))
    assert call.inputs == tuple(n for n in captured.graph.nodes if n.op == "placeholder")


def test_a_caught_exception_leaves_the_paths_right():
    class Fallback(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrong = nn.Sequential(nn.Linear(5, 5))
            self.right = nn.Linear(6, 6)

        def forward(self, x):
            try:
                return self.wrong(x)
            except RuntimeError:
                return torch.relu(self.right(x))

    captured = record(Fallback(), draw(4, 6))
    assert [(c.path, c.depth) for c in captured.calls][-2:] == [("right", 1), ("", 0)]
    assert nodes_of(captured, "relu")[0].meta["module"] == ""


def test_forward_that_raises_is_named_with_its_line():
    class Wrong(nn.Module):
        def forward(self, x):
            return x @ torch.ones(5, 5)

    with pytest.raises(CaptureError) as error:
        record(Wrong(), draw(4, 6))
    assert "Wrong.forward raised RuntimeError at test_facts.py:" in str(error.value)
    assert "\n" not in error.value.message
    assert error.value.hint


# -- tensors ---------------------------------------------------------------------------------------


def test_tied_parameters_are_one_get_attr_with_all_names():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 6)
            self.out = nn.Linear(6, 9, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids):
            return self.out(self.embed(ids))

    captured = record(Tied(), torch.tensor([[1, 2], [3, 4]]))
    names = [n.target for n in captured.graph.nodes if n.op == "get_attr"]
    assert names == ["embed.weight"]
    assert captured.aliases == {"embed.weight": ("embed.weight", "out.weight")}


def test_views_share_an_alias_number_and_values_do_not():
    def forward(self, x):
        y = self.fc(x)
        a, b = y.chunk(2, dim=1)
        return y.view(-1) + 1, a.t(), b + 0, y.contiguous(), F.dropout(y, 0.5, False)

    net = type("Views", (nn.Module,), {"forward": forward})()
    net.fc = nn.Linear(6, 6)
    captured = record(net, draw(4, 6))
    linear = nodes_of(captured, "linear")[0]
    same = {n.meta["alias"] for n in nodes_of(captured, "view")}
    same |= {n.meta["alias"] for n in captured.graph.nodes if "getitem" in str(n.target)}
    same |= {n.meta["alias"] for name in ("aten.t.", "dropout") for n in nodes_of(captured, name)}
    assert same == {linear.meta["alias"]}
    weights = {n.meta["alias"] for n in captured.graph.nodes if n.op in ("placeholder", "get_attr")}
    assert linear.meta["alias"] not in weights
    assert not {n.meta["alias"] for n in nodes_of(captured, "add")} & (same | weights)


def test_memory_that_is_used_again_is_no_alias():
    class Deep(nn.Module):
        def forward(self, x):
            for _ in range(40):
                x = x * 1.01
            return x

    captured = record(Deep(), draw(64, 64))
    groups = [n.meta["alias"] for n in captured.graph.nodes if n.op != "output"]
    assert len(set(groups)) == len(groups)


def test_writes_name_what_they_write():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(6)
            self.register_buffer("count", torch.zeros(6))

        def forward(self, x):
            self.count.add_(1)
            return self.bn(x) + self.count

    captured = record(Writes(), draw(4, 6), train=True)
    written = {
        str(target.target)
        for node in captured.graph.nodes
        for target in node.meta.get("writes", ())
        if target.op == "get_attr"
    }
    assert written == {"count", "bn.num_batches_tracked", "bn.running_mean", "bn.running_var"}
    eval_writes = {
        str(target.target)
        for node in record(Writes(), draw(4, 6)).graph.nodes
        for target in node.meta.get("writes", ())
    }
    assert eval_writes == {"count"}


def test_constants_are_listed_when_they_hide_a_cache():
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(6))
            self.cache = {"bias": self.bias.detach().clone()}
            self.table = torch.randn(6)

        def forward(self, x):
            return x + self.cache["bias"] + self.table

    captured = record(Cached(), draw(4, 6))
    assert list(captured.constants) == ["_const0"]
    assert any(
        "1 tensor that is no parameter" in note and "constants" in note for note in captured.notes
    )
    assert "table" in captured.tensors()


def test_names_of_the_graph_module_never_meet():
    names = ["code", "code_", "code__", "a.code", "a.class.b", "a.class_.b", "a.b", "_", "forward"]
    assert len({attribute_name(name) for name in names}) == len(names)
    assert attribute_name("a.b") == "a.b"
    assert attribute_name("a.code") == "a.code"
    taken = dir(torch.fx.GraphModule({}, torch.fx.Graph()))
    renamed = [attribute_name(name) for name in taken]
    assert not set(renamed) & set(taken)
    assert len(set(renamed)) == len(taken)


def test_batch_sizes_and_replay():
    net = nn.Linear(6, 3)
    captured = record(net, draw(4, 6))
    (again,) = captured.replay()
    assert torch.equal(again, net(captured.call.args[0]))
    assert captured.call.batch == 4
    assert record(net, {"input": draw(2, 6)}).call.batch == 2


def test_values_kept_on_the_model_are_noted():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.layer.last = None

        def forward(self, x):
            y = self.layer(x)
            self.layer.last = y
            self.seen = x
            return y.relu()

    captured = record(Keeps(), torch.randn(2, 4))
    kept = [note for note in captured.notes if "keeps" in note]
    assert kept == [
        "the model keeps layer.last of its forward pass: who reads it elsewhere is not seen"
    ]
