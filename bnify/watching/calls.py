"""What norms are called with in the first steps: forward hooks, which are gone after them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnify.auditing.live import NormModule
from bnify.auditing.observed import Calls

_BATCH = nn.modules.batchnorm._BatchNorm
_INSTANCE = nn.modules.instancenorm._InstanceNorm


class _Hook:
    """A hook of one model: copies and pickles of that get one that goes by itself.

    Torch's hooks on all modules would leave nothing in copies, but make every compiled module of
    the process warn.
    """

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        # What is compiled must not take the hook in: it would be called for good.
        if not torch.compiler.is_compiling():
            self.call(*args)

    def __reduce__(self) -> tuple[type[_Copied], tuple[()]]:
        return _Copied, ()


class _Copied:
    """What the copy of a hooked model has: it takes itself away at the first pass."""

    __slots__ = ()

    def __call__(self, module: Any, *_args: Any) -> None:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it is compiled: hooks in there would compile it anew."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None
        or isinstance(getattr(module, "_orig_mod", None), nn.Module)
        for module in model.modules()
    )


def _nothing(_passes: int) -> None:
    """Before there are hooks."""


#: A tensor that a norm was given, and its version then.
_Given: TypeAlias = "tuple[weakref.ref[Tensor], int]"


class _Norm:
    """One norm and its calls."""

    __slots__ = ("calls", "module", "repeated", "ungraded", "updates")

    def __init__(self, norm: NormModule) -> None:
        self.module = norm.module
        self.calls = Calls(batch=not isinstance(norm.module, _INSTANCE))
        self.calls.synchronised = isinstance(norm.module, nn.SyncBatchNorm)
        self.updates = norm.tracked
        self.ungraded = self.repeated = 0

    def add(self, given: Tensor, samples: int) -> None:
        """Count one call in train mode."""
        calls = self.calls
        if torch._C._current_graph_task_id() != -1:
            self.repeated += 1  # in the backward pass a checkpoint repeats its calls
            return
        calls.total += 1
        self.ungraded += not torch.is_grad_enabled()
        if given.dim() > 1 and given.shape[1]:
            values = given.numel() // given.shape[1]
            if calls.synchronised and dist.is_available() and dist.is_initialized():
                values *= dist.get_world_size(self.module.process_group)
            if calls.values is None or values < calls.values:
                # Tokens may be flattened into the batch; a list of images is no batch of 3.
                flattened = samples and given.shape[0] % samples == 0
                calls.values, calls.samples = values, samples if flattened else given.shape[0]

    def settle(self) -> None:
        """At the end of a step: calls without gradients are no fault where they were repeated."""
        if self.updates:
            self.calls.without_gradient += max(self.ungraded - self.repeated, 0)
        self.ungraded = self.repeated = 0

    def leave(self, given: Sequence[_Given]) -> None:
        """At the end of a forward pass of the model, in which it was given these."""
        if self.updates:
            different = sum(
                not any(_same(one, other) for other in given[:i]) for i, one in enumerate(given)
            )
            self.calls.per_pass = max(self.calls.per_pass, len(given))
            self.calls.different = max(self.calls.different, different)


def _same(one: _Given, other: _Given) -> bool:
    """Whether two calls got the same value; a tensor that is gone was another one."""
    return one[0]() is not None and one[0]() is other[0]() and one[1] == other[1]


class _Pass(threading.local):
    """The forward pass of the model that a thread is in.

    Attributes:
        given: What each norm was given in it; None outside of one.
        samples: Size of the first axis of its first input.
    """

    given: dict[_Norm, list[_Given]] | None = None
    samples: int = 0


class CallRecorder:
    """Forward hooks that look at the calls of a model and its norms.

    Attributes:
        passes: Forward passes of the model in train mode.
        norms: The norms by their path.
    """

    def __init__(self, norms: Sequence[NormModule]) -> None:
        self.passes = 0
        self.norms = {norm.path: _Norm(norm) for norm in norms if not norm.frozen}
        self._by_module = {id(norm.module): norm for norm in self.norms.values()}
        self._pass = _Pass()
        self._passed: Callable[[int], None] = _nothing
        self._handles: list[Any] = []

    def hook(self, model: nn.Module, passed: Callable[[int], None]) -> None:
        """Put the hooks in place; ``passed`` gets the number of passes in train mode so far."""
        self._passed = passed
        self._handles = [
            *(
                seen.module.register_forward_pre_hook(_Hook(self._called(seen)), with_kwargs=True)
                for seen in self.norms.values()
            ),
            # Around those, so that a model that is a norm itself is seen within its own pass.
            model.register_forward_pre_hook(_Hook(self._enter), prepend=True, with_kwargs=True),
            model.register_forward_hook(_Hook(self._leave), always_call=True),
        ]

    @property
    def calls(self) -> dict[str, Calls]:
        """The calls of each norm that was called in train mode."""
        return {path: norm.calls for path, norm in self.norms.items() if norm.calls.total}

    @property
    def hooked(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def settle(self) -> None:
        """An optimizer step is over."""
        for norm in self.norms.values():
            norm.settle()

    def remove(self) -> None:
        """Take the hooks away; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def raised(self, error: BaseException | None) -> None:
        """Note the norm in which torch refused one value a channel, as its traceback shows it.

        Args:
            error: What ended the training; what caused it is looked at as well.
        """
        while error is not None:
            if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
                self._refused(error.__traceback__)
            error = error.__cause__ or error.__context__

    def _refused(self, traceback: TracebackType | None) -> None:
        while traceback is not None:
            norm = self._by_module.get(id(traceback.tb_frame.f_locals.get("self")))
            if norm is not None:
                calls = norm.calls
                calls.total, calls.values, calls.samples = calls.total or 1, 1, 1
            traceback = traceback.tb_next

    # -- hooks -----------------------------------------------------------------------------------

    def _called(self, seen: _Norm) -> Callable[..., None]:
        def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else next(iter(kwargs.values()), None)
            if not module.training or not isinstance(value, Tensor):
                return
            given = self._pass.given
            seen.add(value, 0 if given is None else self._pass.samples)
            if given is not None and torch._C._current_graph_task_id() == -1:
                version = 0 if value.is_inference() else value._version
                given.setdefault(seen, []).append((weakref.ref(value), version))

        return called

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pass.given, self._pass.samples = {}, _samples((args, kwargs))
        if module.training:
            self.passes += 1
            self._passed(self.passes)

    def _leave(self, *_: Any) -> None:
        for norm, given in (self._pass.given or {}).items():
            norm.leave(given)
        self._pass.given = None


def _samples(inputs: Any) -> int:
    """Size of the first axis of the first tensor; 0 where there is none."""
    for leaf in torch.utils._pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    return 0
