"""Code that stands between a model and its operators: checkpoints, scripts, autograd, attention."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from replaying import check_replay

X = torch.Generator().manual_seed(8)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=X)


def seeded(make):
    """The same factory, with the same random weights at every call."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return make()

    return build


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.bn = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(8, 6)

    def body(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.relu(self.bn(self.first(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return 2 * x * weight * gradient, (x * x * gradient).sum(0)


class WithFunction(Mlp):
    def forward(self, x):
        return Square.apply(self.body(x), self.last.bias)


class Reentrant(Mlp):
    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=True) + x


class NonReentrant(Mlp):
    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False) + x


class Mapped(Mlp):
    def forward(self, x):
        return torch.vmap(lambda row: self.last(torch.relu(self.first(row))).tanh())(x)


class PerSampleNorm(Mlp):
    def forward(self, x):
        rows = torch.func.functional_call(
            self.last, dict(self.last.named_parameters()), (x @ self.first.weight.t(),)
        )
        return torch.vmap(lambda a, b: a * b.sum(), in_dims=(0, 1))(rows, x.t())


class Scripted(Mlp):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.inner = torch.jit.script(
                nn.Sequential(
                    nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.BatchNorm1d(6)
                )
            )

    def forward(self, x):
        return self.body(self.inner(x) + self.inner(x + 1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2)
        self.gru = nn.GRU(10, 4, batch_first=True)
        self.cell = nn.LSTMCell(4, 3)
        self.rnn = nn.RNN(3, 3)

    def forward(self, x):
        y, (h, c) = self.lstm(x)
        z, hidden = self.gru(y)
        state = None
        for step in z.unbind(1):
            state = self.cell(step, state)
        return self.rnn(state[0][None])[0], (h, c), hidden


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, [5, 4, 2, 1], batch_first=True)
        y, _ = self.lstm(packed)
        return nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)

    def forward(self, x, memory):
        y, weights = self.mha(x, x, x)
        return self.cross(y, memory, memory, need_weights=False)[0], weights


class Force(nn.Module):
    """An interatomic potential: the force is the gradient of the energy, in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            hidden = torch.tanh(self.first(x)) * torch.sigmoid(self.first(x))
            energy = self.last(hidden).sum()
            (force,) = torch.autograd.grad(energy, x)
        return {"energy": energy.detach(), "force": -force}


class Autocast(Mlp):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.last(torch.relu(self.first(x)))
            return self.last(torch.relu(self.first(y))).float() + x


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.out = nn.Linear(6, 9, bias=False)
        self.out.weight = self.embed.weight
        self.again = self.out

    def forward(self, ids):
        return self.again(torch.relu(self.embed(ids)))


class SharedStorage(nn.Module):
    """Different parameters and buffers on one piece of memory."""

    def __init__(self) -> None:
        super().__init__()
        memory = torch.randn(2, 6, 6)
        self.a = nn.Parameter(memory[0])
        self.b = nn.Parameter(memory[1])
        self.whole = nn.Parameter(memory)
        history = torch.zeros(3, 6)
        self.register_buffer("history", history)
        self.register_buffer("newest", history[0])

    def forward(self, x):
        if self.training:
            self.newest.add_(x.detach().mean(0))
        return F.linear(x, self.a) + F.linear(x, self.b) + self.whole.sum() + self.history.sum(0)


class SwapsData(nn.Module):
    """Spectral norm as many repositories have it: ``.data`` is replaced in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.u = nn.Parameter(torch.randn(4), requires_grad=False)
        self.v = nn.Parameter(torch.randn(6), requires_grad=False)

    def forward(self, x):
        w = self.fc.weight
        for _ in range(2):
            self.v.data = F.normalize(torch.mv(w.t().data, self.u.data), dim=0)
            self.u.data = F.normalize(torch.mv(w.data, self.v.data), dim=0)
        sigma = self.u.dot(w.mv(self.v))
        return F.linear(x, w / sigma, self.fc.bias) * self.u


class Reassigned(nn.Module):
    """A running mean that is replaced, not written."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_buffer("average", torch.zeros(6))
        self.last_seen = None

    def forward(self, x):
        y = self.fc(x)
        self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
        self.last_seen = y
        return y - self.average


class RootParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.register_buffer("shift", torch.randn(6))

    def forward(self, x):
        return F.linear(x, self.weight) + self.shift


class HostileNames(nn.Module):
    """Names that a GraphModule has itself, that Python cannot read, and that differ by a dash."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("code", "graph", "code_", "graph_", "meta", "print_readable", "_graph"):
            self.add_module(name, nn.Linear(6, 6))
        self.by_key = nn.ModuleDict(
            {"a-b": nn.Linear(6, 6), "a_b": nn.Linear(6, 6), "1": nn.Linear(6, 6)}
        )
        self.by_key["class"] = nn.Linear(6, 6)
        self.values = nn.ParameterDict(
            {"x-y": nn.Parameter(torch.randn(6)), "x": nn.Parameter(torch.randn(6))}
        )
        self.many = nn.ParameterList([torch.randn(6), torch.randn(6)])

    def forward(self, x):
        for layer in (self.code, self.graph, self.code_, self.graph_, self.meta, self._graph):
            x = torch.tanh(layer(x)) + x
        for layer in self.by_key.values():
            x = x + layer(x)
        return self.print_readable(x) * self.values["x-y"] + self.values["x"] + self.many[1]


class WeightNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.new = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(6, 6))

    def forward(self, x):
        return self.orthogonal(torch.relu(self.spectral(self.new(x))))


class OldWeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.old = nn.utils.weight_norm(nn.Linear(6, 6))
            self.spectral = nn.utils.spectral_norm(nn.Linear(6, 6))

    def forward(self, x):
        return self.spectral(torch.relu(self.old(x)))


class TriesAndFails(Mlp):
    """An exception in a submodule that the model itself catches."""

    def forward(self, x):
        try:
            x = self.last(x)
        except RuntimeError:
            x = self.first(x)
        return self.last(x)


class Gradless(Mlp):
    """A part without gradients, as momentum encoders and quantizers have it."""

    def forward(self, x):
        y = self.body(x)
        with torch.no_grad():
            scale = y.abs().max()
            target = self.body(x + 1)
        return y / scale + target


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4, momentum=None)
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.group = nn.GroupNorm(2, 4)
        self.stateless = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x):
        return self.stateless(self.group(self.instance(self.bn(self.conv(x)))))


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_forward_hook(lambda module, args, output: output * 2)
        self.fc.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        self.fc.register_forward_hook(self.remember)

    def remember(self, module, args, output):
        return torch.relu(output) + self.fc.bias

    def forward(self, x):
        return self.fc(x)


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def double_width() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)).bfloat16()


MODELS = {
    "mlp": (Mlp, lambda: draw(4, 6)),
    "checkpoint": (NonReentrant, lambda: draw(4, 6)),
    "vmap": (Mapped, lambda: draw(4, 6)),
    "functional call": (PerSampleNorm, lambda: draw(4, 6)),
    "transformer": (transformer, lambda: draw(2, 5, 8)),
    "attention": (Attention, lambda: (draw(2, 5, 8), draw(2, 3, 6))),
    "recurrent": (Recurrent, lambda: draw(4, 5, 6)),
    "packed": (Packed, lambda: draw(4, 5, 6)),
    "autocast": (Autocast, lambda: draw(4, 6)),
    "tied": (Tied, lambda: torch.randint(0, 9, (4, 5), generator=X)),
    "swaps data": (SwapsData, lambda: draw(4, 6)),
    "root parameter": (RootParameter, lambda: draw(4, 6)),
    "hostile names": (HostileNames, lambda: draw(4, 6)),
    "parametrized": (WeightNormed, lambda: draw(4, 6)),
    "old weight norm": (OldWeightNorm, lambda: draw(4, 6)),
    "tries and fails": (TriesAndFails, lambda: draw(4, 6)),
    "norms": (Norms, lambda: draw(4, 3, 5, 5)),
    "hooks": (Routed, lambda: draw(4, 6)),
    "shared storage": (SharedStorage, lambda: draw(4, 6)),
    "reassigned buffer": (Reassigned, lambda: draw(4, 6)),
    "scripted": (Scripted, lambda: draw(4, 6)),
    "gradless": (Gradless, lambda: draw(4, 6)),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", MODELS)
def test_replay_is_the_model(name):
    make, inputs = MODELS[name]
    check_replay(seeded(make), inputs(), gradients=False)


@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_of_the_replay_are_the_models(name):
    make, inputs = MODELS[name]
    # Only a recording in train mode shows where the model turns gradients off.
    modes = (True,) if make is Gradless else (False, True)
    check_replay(seeded(make), inputs(), fresh=1, modes=modes)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("make", [WithFunction, Reentrant], ids=["function", "reentrant"])
def test_autograd_functions_are_seen_through(make):
    captured = check_replay(seeded(make), draw(4, 6), gradients=False, modes=(True,))
    assert captured.custom_gradients is (make is WithFunction)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("make", [WithFunction, Reentrant], ids=["function", "reentrant"])
def test_autograd_functions_in_eval(make):
    check_replay(seeded(make), draw(4, 6), gradients=False, modes=(False,))


def test_autograd_in_forward_falls_back_to_plain_no_grad():
    captured = check_replay(seeded(Force), draw(4, 6), gradients=False, composite=None)
    assert not captured.composite


def test_bfloat16_models():
    check_replay(seeded(double_width), draw(4, 6).bfloat16())


def test_compiled_submodules_run_eagerly():
    def make() -> nn.Module:
        body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.2))
        return nn.Sequential(torch.compile(body, backend="eager"), nn.Linear(6, 2))

    captured = check_replay(seeded(make), draw(4, 6))
    names = [str(n.target) for n in captured.graph.nodes if n.op == "get_attr"]
    assert "0._orig_mod.0.weight" in names
