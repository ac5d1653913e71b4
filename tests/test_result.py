"""What comes back: model, graph, plan, numbers; and a form that needs no bnify."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import bnify
import laws
import zoo
from bnify.layers import carries_norm
from bnify.structure import run_graph

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 49, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


def trained(result: bnify.Result, x: Tensor) -> bnify.Result:
    laws.training_step(result.model, x, lr=0.05)
    laws.hostile_(result.model)
    result.model.eval()
    return result


def test_to_dict_is_json_and_complete():
    result = bnify.insert(cnn(), X)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (data["schema"], data["verb"], data["files"]) == (1, "insert", {})
    assert [e["layer"] for e in data["plan"]["edits"]] == ["0", "2", "5"]
    assert data["plan"]["edits"][0]["kind"] == "insert-after"
    assert data["plan"]["edits"][0]["norm"] == "batch"
    assert data["plan"]["skips"][0]["reason"] == "output-head"
    assert data["verification"]["passed"] is True
    assert bnify.insert(cnn(), X, verify=False).to_dict()["verification"] is None


def test_passed():
    assert bnify.insert(cnn(), X).passed is True
    assert bnify.insert(cnn(), X, verify=False).passed is None


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_graph_is_the_model_at_other_batch_sizes(batch):
    result = bnify.insert(cnn(), X, norm="group")
    x = torch.randn(batch, 3, 8, 8)
    assert torch.equal(result.graph(x), result.model.eval()(x))


@pytest.mark.parametrize(
    "entry", [e for e in zoo.small() if e.name.startswith("own:")], ids=lambda e: e.name
)
def test_the_graph_shares_nothing_with_the_model(entry):
    inputs = entry.inputs(batch=4)
    result = bnify.insert(entry.build(), inputs, verify=False, per_call=True)
    before = run_graph(copy.deepcopy(result.graph), result.call)
    for tensor in (*result.model.parameters(), *result.model.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(0.5)
    assert all(
        torch.equal(a, b) for a, b in zip(before, run_graph(result.graph, result.call), strict=True)
    )


# -- strip -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "instance", "sync"])
def test_strip(norm):
    result = trained(bnify.insert(cnn(), X, norm=norm, exclude="5"), X)
    plain = result.strip()
    assert torch.equal(plain(X), result.model(X))
    assert not any(carries_norm(m) for m in plain.modules())
    assert any(carries_norm(m) for m in result.model.modules())  # the result keeps its own
    assert isinstance(plain[0], nn.Sequential)
    assert type(plain[0][0]) is nn.Conv2d
    assert "0.1.weight" in plain.state_dict()
    homes = {type(m).__module__.partition(".")[0] for m in plain.modules()}
    assert homes == {"torch"}


def test_strip_after_act_and_drop_bias():
    for options in ({"position": "after-act"}, {"drop_bias": True}):
        result = trained(bnify.insert(cnn(), X, **options), X)
        assert torch.equal(result.strip()(X), result.model(X))


def test_a_folded_norm_leaves_the_plain_class():
    result = trained(bnify.insert(cnn(), X, per_call=True), X)
    result.model[0].norm = nn.Identity()
    plain = result.strip()
    assert type(plain[0]) is nn.Conv2d
    assert sorted(plain[0].state_dict()) == ["bias", "weight"]
    assert isinstance(plain[2], nn.Sequential)
    assert torch.equal(plain(X), result.model(X))


def test_strip_of_parametrized_layers():
    from torch.nn.utils.parametrizations import weight_norm

    x = torch.randn(4, 6)
    model = nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 2))
    result = bnify.insert(model, x)
    result.model[0].norm = nn.Identity()
    plain = result.strip()
    result.model.eval()
    assert torch.equal(plain.eval()(x), result.model(x))
    assert not carries_norm(plain[0])
    nn.utils.parametrize.remove_parametrizations(plain[0], "weight")
    assert type(plain[0]) is nn.Linear


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.relu(self.a(torch.relu(self.a(x))[..., :1].expand(-1, -1, 6))))


class ReadsTheLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.relu(self.a(x)) * self.a.in_features)


def test_what_cannot_be_stripped():
    tokens = torch.randn(4, 3, 6)
    once = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Flatten(), nn.Linear(15, 2))
    cases = [
        (bnify.insert(once, tokens, include="0"), "TokenNorm"),
        (bnify.insert(Tokens(), tokens, include="a", per_call=True, norm="layer"), "CallNorms"),
        (bnify.insert(cnn(), X, norm="rms"), "ChannelRMSNorm"),
        (bnify.insert(nn.Linear(6, 8), torch.randn(4, 6), include="*"), "root"),
        (bnify.insert(ReadsTheLayer(), torch.randn(4, 6)), "in_features"),
    ]
    for result, words in cases:
        with pytest.raises(bnify.PlanError, match=words):
            result.strip()


def test_a_stripped_model_is_unpickled_without_bnify(tmp_path, run_python):
    result = trained(bnify.insert(cnn(), X, drop_bias=True), X)
    torch.save({"model": result.strip(), "x": X, "y": result.model(X)}, tmp_path / "plain.pt")
    script = """
import sys
sys.modules["bnify"] = None  # any import of it fails
import torch
saved = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(saved["model"](saved["x"]), saved["y"])
print("same")
"""
    ran = run_python("-c", script, tmp_path / "plain.pt")
    assert (ran.code, ran.stdout.strip()) == (0, "same"), ran.stderr
    torch.save({"model": result.model, "x": X, "y": 0}, tmp_path / "ours.pt")
    assert run_python("-c", script, tmp_path / "ours.pt").code != 0  # the check can fail


def test_folded_calls_leave_no_hook_of_ours(tmp_path, run_python):
    class_free = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    shared = class_free[0]
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(8, 6)
    result = bnify.insert(model, x, per_call=True)
    result.model[0].norm = nn.Identity()
    torch.save(result.strip(), tmp_path / "plain.pt")
    script = """
import sys
sys.modules["bnify"] = None
import torch
torch.load(sys.argv[1], weights_only=False)
"""
    ran = run_python("-c", script, tmp_path / "plain.pt")
    assert ran.code == 0, ran.stderr


def test_a_layer_registered_twice_is_stripped_at_both_places():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.net = nn.Sequential(self.first, nn.ReLU(), nn.Linear(6, 2))

        def forward(self, x):
            return self.net(x)

    result = bnify.insert(Net(), torch.randn(8, 6))
    plain = result.strip()
    assert type(plain.first) is nn.Sequential
    assert plain.first is plain.net[0]


def test_its_repr_is_one_line():
    result = bnify.insert(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)), X6)
    assert repr(result) == "Result(Sequential: 1 edited, 1 left alone, PASS)"


X6 = torch.randn(8, 6)
