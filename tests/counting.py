"""Counts the norms that a forward pass really executes, operator by operator.

Nothing here knows bnify: it is the ruler that bnify and every other tool are measured with. It
runs whatever can be called with the inputs: modules, GraphModules, scripted and frozen modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

#: Batch norm in every spelling that the dispatcher shows.
BATCH = frozenset(
    {
        "batch_norm",
        "_batch_norm_impl_index",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_batch_norm_no_update",
        "_batch_norm_with_update",
        "cudnn_batch_norm",
        "miopen_batch_norm",
    }
)
OTHER = frozenset(
    {
        "layer_norm",
        "native_layer_norm",
        "group_norm",
        "native_group_norm",
        "instance_norm",
        "rms_norm",
        "_fused_rms_norm",
    }
)
CONVOLUTIONS = frozenset(
    {"convolution", "_convolution", "mkldnn_convolution"}
    | {f"conv{n}d" for n in (1, 2, 3)}
    | {f"conv_transpose{n}d" for n in (1, 2, 3)}
)
#: They read the shape of a value, not the value.
_SHAPE_ONLY = frozenset(
    {f"{what}_like" for what in ("zeros", "ones", "empty", "full")}
    | {f"new_{what}" for what in ("zeros", "ones", "empty", "full", "empty_strided")}
)
_MULTIPLICATIONS = frozenset({"mul", "div", "true_divide", "multiply", "divide"})
_ROOTS = frozenset({"sqrt", "rsqrt"})


@dataclass(frozen=True)
class NormCount:
    """Operators of one eval forward on values that depend on the input.

    Attributes:
        batch: Batch norms, and instance norms that use running statistics; norms of weights
            (weight standardisation) are not counted.
        other: Layer, group, RMS and instance norms, as one operator each; norms written by hand
            are not seen.
        scales: Multiplications by, or divisions through, one static number per channel (not one
            for all): frozen batch norms, LayerScale, and what an unfinished fold leaves.
        frozen: Those of ``scales`` whose numbers come through a square root: frozen batch norms.
        convolutions: Convolutions, transposed ones included.
        neutral: Those of ``scales`` that are 1 in every channel: they cost time and do nothing.
    """

    batch: int
    other: int
    scales: int
    frozen: int = 0
    convolutions: int = 0
    neutral: int = 0

    @property
    def affine(self) -> int:
        """Norms that are an affine map in eval mode, batch norm in any spelling."""
        return self.batch + self.frozen

    def left(self, before: NormCount) -> int:
        """Of the norms ``before``, how many are left here; a scale left in their place is one.

        Scales that were no norm before (LayerScale) are expected to stay and are taken off.
        """
        return self.batch + max(0, self.scales - (before.scales - before.frozen))


def count_norms(model: Callable[..., Any], inputs: Any) -> NormCount:
    """Run the model once in eval mode without gradients and count.

    The mode of every module is restored; buffers do not change in eval. Run a copy of a model
    that keeps caches.

    Args:
        model: What is called; made eval where it has that.
        inputs: A tensor, a tuple of positional inputs, a dict of keywords, or an object with
            ``args`` and ``kwargs``.
    """
    args, kwargs = arguments(inputs)
    args, kwargs = map_tree(_clone, args), map_tree(_clone, kwargs)
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        for _ in range(3):  # scripts are optimised while they run first, by operators too
            call(model, inputs)
    counter = None
    for below in (True, False):
        counter = _Counter([*tensors_of(args), *tensors_of(kwargs)])
        try:
            with _evaluating(model), torch.no_grad(), _unfused(), ExitStack() as stack:
                if below:  # composite operators arrive whole: instance_norm is no batch norm
                    stack.enter_context(torch._C._AutoDispatchBelowAutograd())
                with counter:
                    model(*args, **kwargs)
        except RuntimeError:  # a model that needs autograd in its forward
            if not below:
                raise
            continue
        break
    return counter.count


class _Counter(TorchDispatchMode):
    """Follows what depends on the input through memory, and counts on the way."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.batch = self.other = self.scales = self.frozen = 0
        self.convolutions = self.neutral = 0
        # Weak references free the memory but keep its address from being used again.
        self._memories: dict[int, StorageWeakRef] = {}
        self._dynamic = {self._memory(tensor) for tensor in inputs}
        self._rooted: set[int] = set()

    @property
    def count(self) -> NormCount:
        return NormCount(
            batch=self.batch,
            other=self.other,
            scales=self.scales,
            frozen=self.frozen,
            convolutions=self.convolutions,
            neutral=self.neutral,
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2].rstrip("_")
        sources = list(tensors_of((args, kwargs)))
        if name in ("item", "_local_scalar_dense") and not sources:
            return args[0]  # the interpreter of scripts hands over numbers as numbers
        dynamic = [t for t in sources if self._memory(t) in self._dynamic]
        self._tally(name, args, kwargs, sources)
        result = func(*args, **kwargs)
        if dynamic and name not in _SHAPE_ONLY:
            reached = self._dynamic
        elif self._is_root(name, args) or any(self._memory(t) in self._rooted for t in sources):
            reached = self._rooted
        else:
            return result
        reached.update(self._memory(t) for t in tensors_of(result))
        reached.update(self._memory(t) for t in self._written(func, args, kwargs))
        return result

    def _tally(self, name, args, kwargs, sources) -> None:
        x = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input")
        depends = isinstance(x, Tensor) and self._memory(x) in self._dynamic
        if name in BATCH:
            self.batch += depends
        elif name == "instance_norm" and depends and not args[5]:  # use_input_stats
            self.batch += 1
        elif name in OTHER:
            self.other += depends
        elif name in CONVOLUTIONS:
            self.convolutions += depends
        elif name in _MULTIPLICATIONS and len(sources) == 2:
            self._multiplication(*sources, commutes=name.startswith("mul"))
        elif name == "addcmul" and len(sources) == 3:  # shift + x · scale
            self._multiplication(sources[1], sources[2])

    def _multiplication(self, left: Tensor, right: Tensor, *, commutes: bool = True) -> None:
        for value, scale in ((left, right), (right, left)) if commutes else ((left, right),):
            if self._memory(value) not in self._dynamic or self._memory(scale) in self._dynamic:
                continue
            if _per_channel(value, scale):
                self.scales += 1
                self.frozen += self._memory(scale) in self._rooted
                self.neutral += bool((scale == 1).all())

    def _is_root(self, name, args) -> bool:
        if name == "pow":  # (var + eps) ** -0.5
            return isinstance(args[1], float) and abs(args[1]) == 0.5
        return name in _ROOTS

    def _written(self, func, args, kwargs) -> Iterator[Tensor]:
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                yield from tensors_of(value)

    def _memory(self, tensor: Tensor) -> int:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse tensors have none
            return id(tensor)
        memory = int(storage._cdata)
        if memory not in self._memories:
            self._memories[memory] = StorageWeakRef(storage)
        return memory


def _per_channel(value: Tensor, scale: Tensor) -> bool:
    """Whether ``scale`` has one number for each index of one axis of ``value``, not the batch's."""
    if scale.numel() < 2 or scale.numel() != max(scale.shape):
        return False
    axis = next(i for i, size in enumerate(scale.shape) if size > 1) - scale.ndim  # from the end
    if -axis > value.ndim or value.shape[axis] != scale.shape[axis]:
        return False
    return value.ndim == 1 or value.ndim + axis > 0


# -- trees of tensors --------------------------------------------------------------------------


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of what stands for the inputs of a forward."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if hasattr(inputs, "args") and hasattr(inputs, "kwargs"):
        return tuple(inputs.args), dict(inputs.kwargs)
    return tuple(inputs), {}


def call(model: Callable[..., Any], inputs: Any) -> list[Tensor]:
    """The output tensors of a model on clones of the inputs, without gradients."""
    args, kwargs = arguments(inputs)
    with torch.no_grad():
        return list(tensors_of(model(*map_tree(_clone, args), **map_tree(_clone, kwargs))))


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Every tensor in tuples, lists, mappings and dataclasses, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_of(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors_of(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from tensors_of(getattr(tree, field.name))


def map_tree(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same tuples, lists and dicts with every tensor replaced."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tree(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tree(function, value) for value in tree)
    return tree


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    modes: list[tuple[nn.Module, bool]] = []
    # A frozen script module has no mode any more.
    if isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _unfused() -> Iterator[None]:
    """Without the one operator that stands for a whole ``nn.TransformerEncoderLayer``."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
