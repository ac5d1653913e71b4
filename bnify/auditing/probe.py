"""What reaches each norm while a copy of the model runs, and norms put in train mode alone.

A norm is known by its running mean (or by the module that calls it), never by the shape of its
input: tokens flattened into the batch, functional norms and look-alikes are measured like others.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnify.auditing.owners import Norms, Written
from bnify.borrow import fused_attention, seeded
from bnify.pooled import PerInstance, Pooled
from bnify.structure import Call

_NATIVE: Final = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum")
_FUNCTIONAL: Final = ("input", "running_mean", "running_var", "weight", "bias", "training")


@dataclass(slots=True)
class Seen:
    """What reached one norm.

    Attributes:
        path: The norm's path.
        instance: Whether it is an instance norm.
        pooled: Statistics of its input.
        sizes: How many calls had so many values that shared a channel.
    """

    path: str
    instance: bool
    pooled: Pooled | PerInstance
    sizes: Counter[int] = field(default_factory=Counter)


class Probe(TorchFunctionMode):
    """Pools the input of each norm that runs under it.

    Args:
        norms: Whose norms.
        train: Normalize with the statistics of each batch, whatever mode the modules are in; no
            running statistics are read or written.
        alone: Do so with a single value a channel, too, which gives the shift β; torch refuses it
            in train mode. Without, the running statistics are read there.

    Attributes:
        found: What reached each norm, in the order of execution.
        unclear: Look-alikes that were left out: their channels could be on two axes.
    """

    def __init__(self, norms: Norms, *, train: bool, alone: bool = False) -> None:
        super().__init__()
        self._norms = norms
        self._train = train
        self._least = 1 if alone else 2
        self._inside: list[str] = []
        self._order: dict[str, None] = {}
        self._called: dict[str, Seen] = {}
        self._hooked: dict[str, Seen] = {}
        self._saved: dict[str, tuple[Tensor, Tensor]] = {}
        self.unclear: set[str] = set()
        self._last: dict[str, bool | None] = {}
        self._trying = False

    @property
    def found(self) -> dict[str, Seen]:
        """A hook sees what a call inside it sees again: then the call counts."""
        return {path: self._called.get(path) or self._hooked[path] for path in self._order}

    # -- norms as one operator -------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function; a norm is measured first."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in _NAMES:
            return func(*args, **kwargs)
        given = _bound(func, name, args, kwargs)
        path = self._norms.owner(given, self._inside[-1] if self._inside else None)
        if path is None or not isinstance(given.get("input"), Tensor) or given["input"].ndim < 2:
            return func(*args, **kwargs)
        instance = name == "instance_norm"
        batch, count = self._add(self._called, path, given["input"], 1, instance=instance)
        if not self._replaces(path, count):
            return func(*args, **kwargs)
        return _with_batch_statistics(name, given, batch)

    def _replaces(self, path: str, count: int) -> bool:
        """Whether a norm is to run with the statistics of so many values a channel."""
        return self._train and path not in self._norms.constant and count >= self._least

    def _add(
        self, into: dict[str, Seen], path: str, values: Tensor, axis: int, *, instance: bool
    ) -> tuple[Pooled | PerInstance, int]:
        """Pool one activation; its own statistics, and how many values share a channel in it."""
        channels = values.shape[axis]
        self._order.setdefault(path)
        seen = into.get(path)
        kind: type[Pooled] | type[PerInstance] = PerInstance if instance else Pooled
        if seen is None:
            seen = into[path] = Seen(path, instance, kind.empty(channels))
        batch = kind.empty(channels)
        batch.add(values, axis)
        self.pooled(seen, batch)
        shared = values.numel() // max(channels, 1)
        shared = shared // max(values.shape[0], 1) if instance else shared
        seen.sizes[shared] += 1
        return batch, shared

    def pooled(self, seen: Seen, batch: Pooled | PerInstance) -> None:
        """Merge the statistics of one call."""
        seen.pooled.merge(batch)  # type: ignore[arg-type]  # both of the kind of the norm

    # -- norms that are written out --------------------------------------------------------------

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks are on the modules of the copy."""
        handles: list[Any] = []
        try:
            for norm in self._norms.modules:
                handles.append(
                    norm.module.register_forward_pre_hook(self._enter(norm), with_kwargs=True)
                )
                handles.append(
                    norm.module.register_forward_hook(self._leave(norm), always_call=True)
                )
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._inside.clear()

    def _enter(self, norm: Written) -> Callable[..., None]:
        own = type(norm.module).forward in _TORCH  # those always call a norm operator

        def hook(module: Any, args: Any, kwargs: Any) -> None:
            if self._trying:
                return
            self._inside.append(norm.path)
            value = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            held = module._buffers.get("running_mean")
            if own or value is None or held is None or norm.path in self._called:
                return
            with torch._C.DisableTorchFunction():
                axis = self._axis(norm, value, Call(args, kwargs))
                if axis is None:
                    return
                batch, count = self._add(self._hooked, norm.path, value, axis, instance=False)
                if self._replaces(norm.path, count):
                    self._put_statistics(norm, batch)

        return hook

    def _axis(self, norm: Written, value: Tensor, call: Call) -> int | None:
        """Channel axis of the input of a norm that does its arithmetic itself; None if unknown."""
        channels = norm.module.running_mean.numel()
        if value.ndim < 2:
            return None
        axes = [axis for axis in (1, value.ndim - 1) if value.shape[axis] == channels]
        if len(set(axes)) < 2 or channels == 1:
            return axes[0] if axes else None
        if norm.path not in self._last:
            self._trying = True
            self._last[norm.path] = _of_last_axis(norm.module, call)
            self._trying = False
        last = self._last[norm.path]
        if last is None:
            self.unclear.add(norm.path)
            return None
        return axes[last]

    def _put_statistics(self, norm: Written, batch: Pooled | PerInstance) -> None:
        """Let the norm's own arithmetic read the statistics of this batch."""
        statistics = (batch.mean, _population(batch))
        buffers = (norm.module.running_mean, norm.module.running_var)
        self._saved.setdefault(norm.path, (buffers[0].clone(), buffers[1].clone()))
        for buffer, statistic in zip(buffers, statistics, strict=True):
            buffer.copy_(statistic.reshape(buffer.shape))

    def _leave(self, norm: Written) -> Callable[..., None]:
        def hook(module: Any, *_: Any) -> None:
            if self._trying:
                return
            if self._inside and self._inside[-1] == norm.path:
                self._inside.pop()
            for buffer, saved in zip(
                (module._buffers.get("running_mean"), module._buffers.get("running_var")),
                self._saved.pop(norm.path, ()),
                strict=False,
            ):
                if buffer is not None:
                    with torch._C.DisableTorchFunction():
                        buffer.copy_(saved)

        return hook


_TORCH = (
    nn.BatchNorm2d.forward,
    nn.SyncBatchNorm.forward,
    nn.InstanceNorm2d.forward,
)
#: Where statistics can be handed over: in half precision they could overflow.
_SINGLE = ({torch.float32}, {torch.float64})
_NAMES = frozenset({"batch_norm", "native_batch_norm", "instance_norm"})
#: Nobody's own seed: data that were drawn at 0 would be what the model draws.
_SEED: Final = 0x5EED0000


def _bound(func: Any, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments by name; those of ``torch.nn.functional`` are in another order."""
    functional = func is F.batch_norm or func is F.instance_norm
    order = (*_FUNCTIONAL, "momentum", "eps") if functional else (*_NATIVE, "eps", "cudnn_enabled")
    given = {"training": False, "momentum": 0.1, "eps": 1e-5}
    if name == "instance_norm":
        given["training"] = True
    given.update(zip(order, args, strict=False))
    given.update(kwargs)
    if "use_input_stats" in given:
        given["training"] = given.pop("use_input_stats")
    return given


def _population(batch: Pooled | PerInstance) -> Tensor:
    """The variance that a norm divides by in training."""
    return batch.m2 / max(batch.count, 1) if isinstance(batch, Pooled) else batch.var


def _with_batch_statistics(name: str, given: dict[str, Any], batch: Pooled | PerInstance) -> Any:
    run = torch.instance_norm if name == "instance_norm" else torch.batch_norm
    value, weight, bias = given["input"], given.get("weight"), given.get("bias")
    mean, var, training = None, None, True
    dtypes = {t.dtype for t in (value, weight, bias) if t is not None}
    if isinstance(batch, Pooled) and dtypes in _SINGLE:  # they are known already
        mean, var, training = batch.mean.to(value), _population(batch).to(value), False
    enabled = torch.backends.cudnn.enabled
    result = run(value, weight, bias, mean, var, training, 0.0, given["eps"], enabled)
    if name != "native_batch_norm":
        return result
    empty = value.new_zeros(0)
    return result, empty, empty


def _of_last_axis(module: Any, call: Call) -> bool | None:
    """Whether a norm's channels are on the last axis, or on axis 1; None where neither shows.

    Other means in some channels change what comes out there, and nothing else.
    """
    buffers = module.running_mean, module.running_var
    saved = [buffer.clone() for buffer in buffers]
    half = buffers[0].numel() // 2  # one channel alone could have a scale of 0
    found: list[Tensor] = []
    try:
        buffers[1].fill_(1)
        for shift in (0, 1000):
            buffers[0].zero_().view(-1)[half:] = shift
            with seeded(0):
                found.append(call.clone()(module.forward).nan_to_num())
        changed = found[0] != found[1]
        kept = [not bool(changed.movedim(axis, 0)[:half].any()) for axis in (1, -1)]
    except Exception:  # forward() is user code
        return None
    finally:
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.copy_(value)
    return kept[1] if bool(changed.any()) and sum(kept) == 1 else None


@contextmanager
def quietly() -> Iterator[None]:
    """Passes for measuring: no gradients, no autocast, no compiled code, no fused attention."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(fused_attention(enabled=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="Using `torch.compile")
        yield


def run_once(model: nn.Module, call: Call, number: int = 0) -> Any:
    """One forward pass at a known random state, on tensors that the model may write to.

    Args:
        model: The model.
        call: Its inputs.
        number: Which random state: one of its own for each batch, or all would draw alike.
    """
    with quietly(), seeded(_SEED + number):
        return call.clone()(model)
