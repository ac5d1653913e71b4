"""What norms are called with in the first steps: forward hooks, which are gone after them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnify.auditing.live import NormModule
from bnify.auditing.observed import Calls

_BATCH = nn.modules.batchnorm._BatchNorm
_INSTANCE = nn.modules.instancenorm._InstanceNorm


class _Hook:
    """A hook of one model: copies and pickles of that get one that goes at the first pass."""

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
    """What the copy of a hooked model has: it takes itself away."""

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
        module._compiled_call_impl is not None
        or isinstance(module._modules.get("_orig_mod"), nn.Module)
        for module in model.modules()
    )


def _nothing(_passes: int) -> None:
    """Before there are hooks."""


class _Norm:
    """One norm and its calls."""

    __slots__ = ("calls", "channels", "given", "module", "repeated", "ungraded", "updates")

    def __init__(self, norm: NormModule) -> None:
        self.module = norm.module
        self.calls = Calls(batch=not isinstance(norm.module, _INSTANCE))
        self.calls.synchronised = isinstance(norm.module, nn.SyncBatchNorm)
        self.updates = norm.tracked
        self.ungraded = self.repeated = 0
        #: What it was given in this forward pass of the model, and in which version.
        self.given: list[tuple[weakref.ref[Tensor], int]] = []

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
                calls.values, calls.samples = values, samples or given.shape[0]

    def settle(self) -> None:
        """At the end of a step: calls without gradients are no fault where they were repeated."""
        if self.updates:
            self.calls.without_gradient += max(self.ungraded - self.repeated, 0)
        self.ungraded = self.repeated = 0

    def leave(self) -> None:
        """At the end of a forward pass of the model."""
        if self.updates and self.given:
            different = sum(
                not any(_same(one, other) for other in self.given[:i])
                for i, one in enumerate(self.given)
            )
            self.calls.per_pass = max(self.calls.per_pass, len(self.given))
            self.calls.different = max(self.calls.different, different)
        self.given.clear()


def _same(one: tuple[weakref.ref[Tensor], int], other: tuple[weakref.ref[Tensor], int]) -> bool:
    """Whether two calls got the same value; a tensor that is gone was another one."""
    return one[0]() is not None and one[0]() is other[0]() and one[1] == other[1]


class CallRecorder:
    """Forward hooks on a model and its norms, and what they saw.

    Attributes:
        passes: Forward passes of the model in train mode.
        norms: The norms by their path.
    """

    def __init__(self, norms: Sequence[NormModule]) -> None:
        self.passes = 0
        self.norms = {norm.path: _Norm(norm) for norm in norms if not norm.frozen}
        self._inside = False
        self._samples = 0
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

    def raised(self, error: BaseException) -> None:
        """Note the norm in which torch refused one value a channel, as its traceback shows it."""
        if not isinstance(error, ValueError) or "more than 1 value per channel" not in str(error):
            return
        paths = {id(norm.module): path for path, norm in self.norms.items()}
        traceback = error.__traceback__
        while traceback is not None:
            path = paths.get(id(traceback.tb_frame.f_locals.get("self")))
            if path is not None:
                calls = self.norms[path].calls
                calls.total, calls.values, calls.samples = calls.total or 1, 1, 1
            traceback = traceback.tb_next

    # -- hooks -----------------------------------------------------------------------------------

    def _called(self, seen: _Norm) -> Callable[..., None]:
        def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            if not module.training or not isinstance(given, Tensor):
                return
            seen.add(given, self._samples if self._inside else 0)
            if self._inside and torch._C._current_graph_task_id() == -1:
                version = 0 if given.is_inference() else given._version
                seen.given.append((weakref.ref(given), version))

        return called

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside = True
        self._samples = _samples((args, kwargs))
        if module.training:
            self.passes += 1
            self._passed(self.passes)

    def _leave(self, *_args: Any) -> None:
        self._inside = False
        for norm in self.norms.values():
            norm.leave()


def _samples(inputs: Any) -> int:
    """Size of the first axis of the first tensor; 0 where there is none."""
    for leaf in torch.utils._pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    return 0
