"""The law of a recording: the graph is the model, bit for bit, and the model has not noticed.

``check_replay`` takes a factory, not a model: the truth comes from an instance of its own, so that
no copying code of bnify stands between the two sides.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnify.capture import Captured, attribute_name, record
from bnify.structure import Call, Inputs, as_call, outputs_of

SEED = 5
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Same shape, dtype and values; NaN equals NaN, and -0.0 is not 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.detach().contiguous(), b.detach().contiguous()
    if a.is_floating_point():
        both_nan = a.isnan() & b.isnan()
        return bool(((a == b) & (a.signbit() == b.signbit()) | both_nan).all())
    return torch.equal(a, b)


def fingerprint_of(model: nn.Module) -> dict[str, Any]:
    """Everything a recording must leave alone: values, identities, modes, hooks, attributes."""
    seen: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        seen[f"{path}:mode"] = module.training
        seen[f"{path}:class"] = type(module)
        seen[f"{path}:attributes"] = {k: id(v) for k, v in vars(module).items() if k != "training"}
        for kind in _HOOKS:
            seen[f"{path}:{kind}"] = {k: id(v) for k, v in getattr(module, kind).items()}
        for group in (module._parameters, module._buffers, vars(module)):
            for name, value in group.items():
                if isinstance(value, Tensor):
                    grad = None if not value.is_leaf else value.grad
                    seen[f"{path}.{name}"] = (
                        id(value),
                        value._version,
                        value.data_ptr(),
                        value.requires_grad,
                        value.detach().clone(),
                        None if grad is None else grad.clone(),
                    )
                elif isinstance(value, (dict, list)):
                    seen[f"{path}.{name}:size"] = len(value)
    return seen


def assert_untouched(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two fingerprints of one model are the same."""
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    for key, value in before.items():
        other = after[key]
        if isinstance(value, tuple):
            assert value[:4] == other[:4], f"{key}: {value[:4]} became {other[:4]}"
            assert same_bits(value[4], other[4]), f"{key} has other values"
            assert (value[5] is None) == (other[5] is None), f"{key} has another gradient"
        else:
            assert value == other, f"{key}: {value} became {other}"


@contextmanager
def unfused():
    """Without the fused attention path, which a recording leaves out as well."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Pass:
    """Outputs, gradients and state after one forward (and backward) pass."""

    def __init__(self, run: nn.Module, call: Callable[[], Any], *, gradients: bool) -> None:
        with unfused(), torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
            torch.manual_seed(SEED)
            self.outputs = outputs_of(call())
        # Before the backward pass: a checkpoint runs its norms a second time in it.
        self.state = {
            name: tensor.detach().clone()
            for name, tensor in (*run.named_buffers(), *run.named_parameters())
        }
        losses = []
        generator = torch.Generator().manual_seed(1)
        for _, output in self.outputs:
            draw = torch.randn(output.shape, generator=generator)
            if output.requires_grad and output.grad_fn is not None:
                losses.append((output * draw.to(output.dtype)).sum())
        if gradients and losses:
            torch.stack([loss.double() for loss in losses]).sum().backward()
        self.gradients = {name: p.grad for name, p in run.named_parameters() if p.grad is not None}


def run_model(model: nn.Module, call: Call, *, train: bool, gradients: bool) -> Pass:
    """One pass of a model in one mode."""
    model.train(train)
    arguments = call.clone()
    return Pass(model, lambda: arguments(model), gradients=gradients)


def run_recording(captured: Captured, call: Call, *, gradients: bool) -> Pass:
    """One pass of a recording's GraphModule."""
    module = captured.module()
    tensors = [tensor for _, tensor in call.clone().tensors()]
    return Pass(module, lambda: module(*tensors), gradients=gradients)


def assert_same_pass(want: Pass, got: Pass, *, gradients: bool) -> None:
    """Two passes agree bit for bit."""
    assert [name for name, _ in want.outputs] == [name for name, _ in got.outputs]
    for (name, a), (_, b) in zip(want.outputs, got.outputs, strict=True):
        assert same_bits(a, b), f"output {name} differs: {a} and {b}"
    renamed = {attribute_name(name): name for name in want.state}
    for name, value in got.state.items():
        original = renamed.get(name)
        if original is not None:
            assert same_bits(want.state[original], value), f"{original} is left in another state"
    if gradients:
        for name, gradient in got.gradients.items():
            original = renamed[name]
            expected = want.gradients.get(original)
            assert expected is not None, f"only the recording has a gradient for {original}"
            assert same_bits(expected, gradient), f"gradient of {original} differs"
        missing = {attribute_name(n) for n in want.gradients} - set(got.gradients)
        for name in missing:
            assert not want.gradients[renamed[name]].any(), f"no gradient for {name}"


def check_replay(
    make: Callable[[], nn.Module],
    inputs: Inputs,
    *,
    modes: tuple[bool, ...] = (False, True),
    gradients: bool = True,
    fresh: int = 2,
    composite: bool | None = True,
) -> Captured:
    """Record and replay in eval and in train mode, on the example and on fresh inputs.

    Returns:
        The recording of the first mode.
    """
    call = as_call(inputs)
    kept = [(tensor, tensor.detach().clone()) for _, tensor in call.tensors()]
    results = []
    for train in modes:
        model = make()
        before = fingerprint_of(model)
        state = torch.get_rng_state()
        captured = record(model, call, train=train, seed=SEED)
        assert torch.equal(state, torch.get_rng_state()), "the random state moved"
        assert_untouched(before, fingerprint_of(model))
        assert all(same_bits(t, copy) for t, copy in kept), "the inputs were written to"
        if composite is not None:
            assert captured.composite is composite
        for number in range(fresh + 1):
            arguments = call if number == 0 else call.redrawn(10 + number, 3.0**number)
            want = run_model(make(), arguments, train=train, gradients=gradients)
            got = run_recording(captured, arguments, gradients=gradients)
            assert_same_pass(want, got, gradients=gradients)
        results.append(captured)
    return results[0]
