"""A live model as rules see it: its norm modules, and one recorded forward pass in eval mode."""

from __future__ import annotations

import inspect
import linecache
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnify.auditing.state import EPS, NormState, Vector
from bnify.borrow import evaluating, fused_attention, seeded, sharing_copy
from bnify.capture import Captured, record_example
from bnify.errors import BnifyError
from bnify.folding.arguments import arguments
from bnify.folding.draft import Draft
from bnify.folding.engine import Folded, fold_graph
from bnify.folding.options import FoldOptions
from bnify.folding.sources import BATCH_NORMS, Source, find_sources
from bnify.layers import without_synchronisation
from bnify.reason import Reason
from bnify.structure import Call

_BATCH = (nn.modules.batchnorm._BatchNorm,)
_TRACKING = (*_BATCH, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True, slots=True, eq=False)
class NormModule:
    """A module that normalizes with statistics over the batch, or holds such statistics.

    Attributes:
        path: Module path, the first one.
        module: The module.
        tracked: Whether it keeps running statistics.
        frozen: Whether they are constants: no ``momentum``, no class of torch's own.
    """

    path: str
    module: Any
    tracked: bool
    frozen: bool


@dataclass(frozen=True, slots=True, eq=False)
class NormUse:
    """One call of one norm in the recorded pass.

    Attributes:
        source: What folding knows of it: nodes, tensors, owner.
        given: What its operator was called with, by name; empty for a written-out norm.
    """

    source: Source
    given: dict[str, Any]

    @property
    def kind(self) -> str:
        """``"batch"``, ``"instance"``, ``"frozen"``, ``"layer"``, ``"group"`` or ``"rms"``."""
        return self.source.kind

    @property
    def layer(self) -> str:
        """The norm's name, as ``bnify fold`` has it."""
        return self.source.layer

    @property
    def of_weight(self) -> bool:
        """Whether it normalizes a weight: weight standardisation, which is no norm."""
        return self.source.reason is Reason.WEIGHT_STANDARDISED

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is normalized, channels on axis 1."""
        return tuple(self.source.value.meta["shape"])

    @property
    def per_channel(self) -> int:
        """Number of values that share one channel, at the recorded batch size."""
        channels = self.shape[1] if len(self.shape) > 1 else 1
        return prod(self.shape) // max(channels, 1)

    @property
    def of_batch(self) -> bool:
        """Whether it has statistics over the batch: batch norm, tracked instance norm, look-alike.

        Layer, group and rms norms and untracked instance norms do not.
        """
        return not self.of_weight and (
            self.kind in ("batch", "frozen") or (self.kind == "instance" and self.tracked)
        )

    @property
    def tracked(self) -> bool:
        """Whether it reads running statistics."""
        return "mean" in self.source.tensors

    @property
    def batch_statistics(self) -> bool:
        """Whether it is batch norm with the statistics of the batch, in eval mode."""
        return self.kind == "batch" and self.source.reason is Reason.BATCH_STATISTICS


@dataclass(eq=False)  # no slots: facts are computed once, when they are asked for
class Live:
    """A model under audit.

    Attributes:
        model: The user's model; it is not touched.
        call: Example inputs; None without.
        captured: One forward pass in eval mode; None where there is none.
        why_not: Why there is none.
    """

    model: nn.Module
    call: Call | None = None
    captured: Captured | None = None
    why_not: str = ""
    _folded: Folded | None = field(default=None, repr=False)
    _places: dict[type, tuple[str, int] | None] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: nn.Module, call: Call | None) -> Live:
        """Record one forward pass, where there are inputs and the model runs."""
        live = cls(model, call)
        if live.lazy:
            live.why_not = "the model is lazy: run it once first"
        elif call is not None and any(p.is_meta for p in model.parameters()):
            live.why_not = "the model is on the meta device and has no values"
        elif call is not None:
            try:
                live.captured = record_example(model, call, borrow=True)
            except BnifyError as error:
                live.why_not = error.message
        return live

    # -- modules ---------------------------------------------------------------------------------

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module by its first path."""
        return dict(self.model.named_modules())

    @cached_property
    def lazy(self) -> dict[str, tuple[str, ...]]:
        """Modules with tensors that have no shape yet, and the names of those."""
        found = {}
        for path, module in self.modules.items():
            tensors = (*module._parameters.items(), *module._buffers.items())
            names = tuple(n for n, t in tensors if t is not None and nn.parameter.is_lazy(t))
            if names:
                found[path] = names
        return found

    @cached_property
    def norms(self) -> tuple[NormModule, ...]:
        """Norm modules with statistics over the batch, in the order of registration."""
        return tuple(_norm_modules(self.modules))

    def states(self, read: Callable[[Tensor], Vector] | None = None) -> Iterator[NormState]:
        """The vectors of every norm: of modules, then of functional norms that are recorded.

        Args:
            read: Reads a tensor of a norm module; by default each on its own, which waits for the
                device.
        """
        read = read or _vector
        seen: set[int] = set()
        for norm in self.norms:
            module = norm.module
            if not norm.tracked or any(_is_lazy(t) for t in _tensors(module)):
                continue
            seen.update(id(t) for t in (module.running_mean, module.running_var))
            if 0 < module.running_mean.numel() == module.running_var.numel():
                yield _state(norm, read)
        for use in self.uses:
            tensors = use.source.tensors
            if use.of_weight or not {"mean", "var"} <= set(tensors) or self.draft is None:
                continue
            if any(node.op != "get_attr" for node in tensors.values()):
                continue
            mean = self.draft.tensor(str(tensors["mean"].target))
            if id(mean) in seen:
                continue
            seen.add(id(mean))
            values = {r: _vector(self.draft.value(node)) for r, node in tensors.items()}
            yield NormState(
                path=use.layer,
                mean=values["mean"],
                var=values["var"],
                weight=values.get("weight"),
                bias=values.get("bias"),
                dtype=str(mean.dtype).removeprefix("torch."),
                eps=float(use.given.get("eps", EPS)),
                momentum=use.given.get("momentum"),
            )

    # -- the recording ---------------------------------------------------------------------------

    @cached_property
    def draft(self) -> Draft | None:
        """The recording with what folding knows of it; not to be changed."""
        return None if self.captured is None else Draft(self.captured)

    @cached_property
    def uses(self) -> tuple[NormUse, ...]:
        """Every norm that ran, in the order of execution."""
        if self.draft is None:
            return ()
        return tuple(
            NormUse(source, arguments(source.steps[0]) if source.kind != "frozen" else {})
            for source in find_sources(self.draft, affines=False)
        )

    @property
    def folded(self) -> Folded | None:
        """What ``bnify fold`` would do; nothing is done."""
        if self._folded is None and self.captured is not None:
            self._folded = fold_graph(self.captured, FoldOptions())
        return self._folded

    def values_alone(self) -> dict[str, int]:
        """Values a channel of each batch norm at batch size 1, by its name; the least of its calls.

        Empty where the model does not take one sample, or runs other norms then. Its size is not
        divided by the batch: tokens may be flattened into that.
        """
        if self.call is None or self.call.batch is None:
            return {}
        norms = [use for use in self.uses if use.kind == "batch"]
        shapes = _NormShapes()
        model = without_synchronisation(sharing_copy(self.model))
        try:
            with (
                torch.no_grad(),
                seeded(0),
                evaluating(model),
                fused_attention(enabled=False),
                shapes,
            ):
                self.call.resized(1).clone()(model)
        except Exception:  # forward() is user code, which need not take a single sample
            return {}
        if len(shapes.seen) != len(norms):
            return {}
        values: dict[str, int] = {}
        for use, shape in zip(norms, shapes.seen, strict=True):
            if not use.of_weight and len(shape) > 1:
                count = prod(shape) // max(shape[1], 1)
                values[use.layer] = min(count, values.get(use.layer, count))
        return values

    def owner(self, use: NormUse) -> nn.Module | None:
        """The module that owns the tensors of a norm."""
        return self.modules.get(use.layer)

    # -- places ----------------------------------------------------------------------------------

    def place(self, path: str) -> tuple[str, int] | None:
        """File and line of the class of a module, unless it is one of torch's own."""
        while True:
            module = self.modules.get(path)
            kind = type(module) if module is not None else type(self.model)
            if kind not in self._places:
                self._places[kind] = _defined_at(kind)
            found = self._places[kind]
            if found is not None or not path:
                return found
            path = path.rpartition(".")[0]


class _NormShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The shapes that batch norms get, in the order of execution."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[int, ...]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see Recorder: the wrapper costs an import of torch._dynamo

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        if func._schema.name.removeprefix("aten::") in BATCH_NORMS:
            self.seen.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def _norm_modules(modules: dict[str, nn.Module]) -> Iterator[NormModule]:
    for path, module in modules.items():
        own = {name: tensor for name, tensor in module._buffers.items() if tensor is not None}
        tracked = {"running_mean", "running_var"} <= set(own)
        if isinstance(module, _TRACKING):
            if tracked or isinstance(module, _BATCH):
                yield NormModule(path, module, tracked, frozen=False)
        elif tracked:
            yield NormModule(path, module, tracked, frozen=not hasattr(module, "momentum"))


def _tensors(module: nn.Module) -> list[Tensor]:
    found = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in found if tensor is not None]


def _is_lazy(tensor: Tensor) -> bool:
    return bool(nn.parameter.is_lazy(tensor)) or tensor.is_meta


def _state(norm: NormModule, read: Callable[[Tensor], Vector]) -> NormState:
    module = norm.module
    counter = getattr(module, "num_batches_tracked", None)
    momentum, eps = getattr(module, "momentum", None), getattr(module, "eps", EPS)
    weight, bias = (_affine(module, name) for name in ("weight", "bias"))
    if not isinstance(counter, Tensor) or counter.numel() != 1:
        counter = None
    return NormState(
        path=norm.path,
        mean=read(module.running_mean),
        var=read(module.running_var),
        weight=None if weight is None else read(weight),
        bias=None if bias is None else read(bias),
        batches=None if counter is None else int(read(counter)[0]),
        dtype=str(module.running_var.dtype).removeprefix("torch."),
        eps=float(eps) if isinstance(eps, (int, float)) else EPS,
        momentum=momentum if isinstance(momentum, (int, float)) else None,
        frozen=norm.frozen,
        training=module.training,
    )


def _affine(module: Any, name: str) -> Tensor | None:
    """γ or β; the weight of a look-alike that is a layer as well is no γ."""
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor) or tensor.numel() != module.running_mean.numel():
        return None
    return tensor


def _vector(tensor: Tensor) -> Vector:
    result: Vector = tensor.detach().double().cpu().reshape(-1).numpy()
    return result


def _defined_at(kind: type) -> tuple[str, int] | None:
    if kind.__module__.partition(".")[0] == "torch":
        return None
    try:
        file = inspect.getsourcefile(kind)
        if file is None or not Path(file).is_file():
            return None
        # inspect parses the whole file for one class: 10 ms in a file of timm's.
        start = re.compile(rf"\s*class {re.escape(kind.__name__)}\b")
        lines = [i for i, line in enumerate(linecache.getlines(file), 1) if start.match(line)]
        return file, lines[0] if len(lines) == 1 else inspect.findsource(kind)[1] + 1
    except (OSError, TypeError):
        return None
