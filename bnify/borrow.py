"""Borrowed state is given back: copies of models, train and eval mode, random numbers."""

from __future__ import annotations

import copy
import gc
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bnify.errors import CaptureError

M = TypeVar("M", bound=nn.Module)
_CONTAINERS = frozenset({dict, OrderedDict, set})


def copy_model(model: M, replaced: Mapping[int, Any] | None = None) -> M:
    """A deep copy of the model, hooks and tying included.

    A forward in grad mode may have left non-leaf tensors on the model (caches), which deepcopy
    refuses; those are copied detached.

    Args:
        model: Any module.
        replaced: What stands for objects of the model in the copy, by their id.

    Raises:
        CaptureError: The model holds something that cannot be copied (a lock, an open file), or a
            module whose ``__deepcopy__`` gives itself: a copy with it in would not leave the
            model alone.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in _CONTAINERS and not value:
                memo[id(value)] = type(value)()  # a dozen for each module: most of deepcopy's time
            for tensor in _non_leaves(value):
                memo[id(tensor)] = tensor.detach().clone()
    memo.update(replaced or {})
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # deepcopy runs user code: anything can come out of it
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}",
            hint="keep locks, files and generators out of the module, or define a __deepcopy__ "
            "that makes a new module without them",
        ) from error
    own = {id(module) for module in model.modules()}
    for path, module in copied.named_modules():
        if id(module) in own:
            raise CaptureError(
                f"{type(model).__name__} cannot be copied: the copy of "
                f"{path or 'the model'} ({type(module).__name__}) is the module itself",
                hint="let its __deepcopy__ return a new module, or take it out of the class",
            )
        if nn.utils.parametrize.is_parametrized(module):
            own_generated_class(module, type(module).__bases__[0])
    return copied


def sharing_copy(model: M) -> M:
    """A copy whose parameters are other objects on the same memory.

    Exchanging their memory (``p.data = ...``) does not reach the original; writing to it does.
    """
    replaced = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad)
        for p in model.parameters()
        if type(p) is nn.Parameter and not p.is_inference()
    }
    return copy_model(model, replaced)


def own_generated_class(module: nn.Module, base: type[nn.Module]) -> None:
    """Give a parametrized module a generated class of its own, on this base, in place.

    ``deepcopy`` shares the class, and ``remove_parametrizations`` deletes properties from it:
    removing them on a copy would break the original.
    """
    generated = type(module)
    body = {k: v for k, v in vars(generated).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(generated.__name__, (base,), body)


def _non_leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _non_leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _non_leaves(item)


@contextmanager
def in_mode(model: M, *, train: bool) -> Iterator[M]:
    """The model in train or eval mode; every module's own mode is restored at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.train(train)
    finally:
        for module, mode in modes:
            if module.training is not mode:
                module.training = mode


def evaluating(model: M) -> Any:
    """The model in eval mode; every module's own mode is restored at the end."""
    return in_mode(model, train=False)


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A known state of the random numbers of torch, Python and NumPy; restored at the end."""
    devices = list(range(torch.cuda.device_count())) if _cuda_in_use() else []
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would also leave the seed for a CUDA that starts later, in place of the
        # one that the caller has left there.
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        with _seeded_python(seed), _seeded_numpy(seed):
            yield


@contextmanager
def without_cyclic_collection() -> Iterator[None]:
    """Python's cycle collector is off for a while.

    Copies of a model are many objects, which make it walk all objects of the process (400,000
    with torch loaded) for nothing: they are freed by reference counting.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _seeded_python(seed: int) -> Iterator[None]:
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)


@contextmanager
def _seeded_numpy(seed: int) -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    if numpy is None:  # then no model draws from it
        yield
        return
    before = numpy.random.get_state()
    numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        numpy.random.set_state(before)


@contextmanager
def training_possible() -> Iterator[None]:
    """Out of the caller's ``inference_mode`` and ``no_grad``: tensors made here can be trained."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def fused_attention(enabled: bool) -> Iterator[None]:
    """Switch the fused path of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
