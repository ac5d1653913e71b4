"""What recording leaves behind: nothing, on the model, in torch or in the random state."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnify.capture import record
from bnify.errors import CaptureError
from replaying import assert_untouched, fingerprint_of, same_bits

X = torch.Generator().manual_seed(10)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=X)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.bn = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("average", torch.zeros(6))
        self.cache: dict[str, Tensor] = {}
        self.seen: Tensor | None = None
        self.calls = 0
        self.fails = False

    def forward(self, x):
        self.calls += 1
        y = self.drop(self.bn(self.fc(x))) + np.random.rand() + random.random()  # noqa: NPY002
        self.cache.setdefault("first", y)
        self.seen = y
        self.average = self.average * 0.9 + y.mean(0)
        if self.fails:
            raise RuntimeError("on purpose")
        return y + self.average


def half_trained() -> Net:
    net = Net()
    net.train()
    net.bn.eval()
    net.fc.weight.grad = torch.ones(6, 6)
    net.fc.register_forward_hook(lambda module, args, output: output * 1.5)
    return net


def global_state() -> tuple:
    hooks = torch.nn.modules.module
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.backends.mha.get_fastpath_enabled(),
        torch.get_default_dtype(),
        len(hooks._global_forward_hooks),
        len(hooks._global_forward_pre_hooks),
        len(hooks._global_forward_hooks_always_called),
        torch._C._len_torch_dispatch_stack(),
        torch._C._dispatch_tls_local_exclude_set().raw_repr(),
        bytes(torch.get_rng_state().numpy().tobytes()),
        random.getstate(),
        str(np.random.get_state()),  # noqa: NPY002
    )


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("fails", [False, True], ids=["runs", "raises"])
def test_the_model_and_torch_are_as_before(train, fails, fake):
    net = half_trained()
    net.fails = fails
    before, state = fingerprint_of(net), global_state()
    if fails:
        with pytest.raises(
            CaptureError, match=r"raised RuntimeError at test_untouched.py:.*purpose"
        ):
            record(net, draw(4, 6), train=train, fake=fake)
    else:
        record(net, draw(4, 6), train=train, fake=fake)
    assert_untouched(before, fingerprint_of(net))
    assert global_state() == state
    net.fails = False
    net(draw(4, 6)).sum().backward()  # nothing it holds became an inference tensor


def test_switches_that_the_user_has_set_come_back():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            net = Net()
            state = global_state()
            captured = record(net, draw(4, 6))
            assert global_state() == state
        assert all(n.meta.get("dtype") is not torch.bfloat16 for n in captured.graph.nodes)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_the_fused_attention_path_is_off_while_recording_and_back_after():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert torch.backends.mha.get_fastpath_enabled()
    names = {str(node.target) for node in record(layer, draw(2, 3, 8)).graph.nodes}
    assert not any("_transformer_encoder_layer_fwd" in name for name in names)
    assert torch.backends.mha.get_fastpath_enabled()


def test_keyboard_interrupts_pass_through_and_leave_nothing():
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    state = global_state()
    with pytest.raises(KeyboardInterrupt):
        record(Interrupted(), draw(2, 3))
    assert global_state() == state


def test_a_model_with_non_leaf_caches_is_recorded():
    net = half_trained()
    net(draw(4, 6))
    assert not net.cache["first"].is_leaf
    for fake in (False, True):
        record(net, draw(4, 6), fake=fake)
    assert not net.cache["first"].is_leaf


def test_a_model_that_cannot_be_copied_is_refused_with_its_reason():
    import threading

    net = Net()
    net.lock = threading.Lock()
    for fake in (False, True):
        with pytest.raises(CaptureError, match="cannot be copied"):
            record(net, draw(4, 6), fake=fake)


def test_the_same_seed_gives_the_same_recording_twice():
    class Chance(nn.Module):
        def forward(self, x):
            if random.random() < 0.5:
                x = x * 2
            if np.random.rand() < 0.5:  # noqa: NPY002
                x = x + 1
            return F.dropout(x, 0.5) + torch.rand(3)

    net = Chance()
    first = [str(record(net, draw(2, 3), seed=s).graph) for s in range(8)]
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert first == [str(record(net, draw(2, 3), seed=s).graph) for s in range(8)]
    assert len(set(first)) > 1


def test_the_recording_is_the_users_tensors_and_the_graph_has_copies():
    net = Net()
    captured = record(net, draw(4, 6))
    assert captured.model is net
    assert captured.tensors()["fc.weight"] is net.fc.weight
    module = captured.module()
    module.double()
    assert net.fc.weight.dtype == torch.float32
    with torch.no_grad():
        for parameter in captured.module().parameters():
            parameter.zero_()
    assert net.fc.weight.any()


def test_two_graph_modules_do_not_share_constants():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = [torch.zeros(3)]

        def forward(self, x):
            self.tables[0].add_(1)
            return x + self.tables[0]

    captured = record(Table(), torch.zeros(2, 3))
    for _ in range(2):
        module = captured.module()
        assert [float(module(torch.zeros(2, 3)).max()) for _ in range(2)] == [1.0, 2.0]


def test_activations_are_freed_while_recording():
    import weakref

    alive: list[int] = []

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            refs = []
            for _ in range(20):
                x = self.fc(x).tanh()
                refs.append(weakref.ref(x))
            alive.append(sum(ref() is not None for ref in refs))
            return x

    record(Deep(), draw(4, 6))
    assert alive == [1]


def test_bit_equality_of_this_test_sees_a_flipped_sign():
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))


@pytest.mark.parametrize("train", [False, True])
def test_a_forward_that_holds_the_model_is_refused_before_it_writes(train):
    """The copy would run the user's own modules, in their mode and into their statistics."""
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    inner = net[1].forward
    net[1].forward = lambda x: inner(x) * 2
    before = fingerprint_of(net)
    del before["1:attributes"]  # holds the function
    with pytest.raises(CaptureError, match=r"reads 1\..* of the model itself"):
        record(net, draw(4, 6), train=train)
    after = fingerprint_of(net)
    del after["1:attributes"]
    assert after["1.running_mean"][1] == before["1.running_mean"][1]
    with pytest.raises(CaptureError, match="of the model itself"):
        other = nn.Linear(6, 6)
        other.register_forward_hook(lambda module, args, output: output * other.bias)
        record(other, draw(4, 6))


def test_a_replaced_forward_that_is_bound_is_copied_with_the_model():
    import functools
    import types

    def forward(self, x):
        return torch.relu(F.linear(x, self.weight))

    bound, partial = nn.Linear(6, 6), nn.Linear(6, 6)
    bound.forward = types.MethodType(forward, bound)
    partial.forward = functools.partial(forward, partial)
    for net in (bound, partial):
        captured = record(net, draw(4, 6))
        assert list(captured.tensors()) == ["weight"]
