"""Trees of tensors: what goes into a forward pass and what comes out of it.

Inputs are a tensor, a tuple of positional inputs or a dict of keyword inputs; each may nest
tensors in tuples, lists, dicts and dataclasses. Outputs may nest in the same ways.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from bnify.errors import CaptureError, PlanError
from bnify.plan import InputSpec

Inputs: TypeAlias = "Tensor | Sequence[Any] | Mapping[str, Any] | Call"


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same tree with every tensor replaced by ``function(tensor)``."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in tree.items()}
        if isinstance(tree, defaultdict):
            return type(tree)(tree.default_factory, mapped)
        return mapped if type(tree) is dict else type(tree)(mapped)  # type: ignore[call-arg]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, value) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(function, value) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        values = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree) if f.init}
        return dataclasses.replace(tree, **map_tensors(function, values))
    return tree


def named_tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the tree with its path, ``"logits"`` or ``"states.0.hidden"``."""
    if isinstance(tree, Tensor):
        yield name, tree
        return
    children: Any = ()
    if isinstance(tree, Mapping):
        children = tree.items()
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        children = zip(tree._fields, tree, strict=True)
    elif isinstance(tree, (list, tuple)):
        children = enumerate(tree)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        children = ((f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree))
    for key, value in children:
        yield from named_tensors(value, f"{name}.{key}" if name else str(key))


def outputs_of(value: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a model's return value by name; a single tensor is called ``"output"``."""
    return [(name or "output", tensor) for name, tensor in named_tensors(value)]


def run_graph(module: fx.GraphModule, call: Call) -> list[Tensor]:
    """The output tensors of a recorded (or rewritten) graph on the tensors of a call."""
    return [t for _, t in outputs_of(module(*(t for _, t in call.clone().tensors())))]


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one forward pass: ``model(*args, **kwargs)``."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, model: Callable[..., Any]) -> Any:
        """Run the model on these arguments."""
        return model(*self.args, **self.kwargs)

    def tensors(self, model: nn.Module | None = None) -> list[tuple[str, Tensor]]:
        """Every tensor with its name; positional ones are named after ``forward``'s parameters."""
        names = _positional_names(model, len(self.args))
        found: list[tuple[str, Tensor]] = []
        for name, value in zip(names, self.args, strict=True):
            found.extend(named_tensors(value, name))
        for name, value in self.kwargs.items():
            found.extend(named_tensors(value, name))
        return found

    def map(self, function: Callable[[Tensor], Any]) -> Call:
        """The same call with every tensor replaced."""
        return Call(
            tuple(map_tensors(function, value) for value in self.args),
            {name: map_tensors(function, value) for name, value in self.kwargs.items()},
        )

    def clone(self) -> Call:
        """The same call with a distinct copy of every tensor, free of any gradient history."""
        return self.map(lambda tensor: tensor.detach().clone())

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> Call:
        """On another device; floating-point tensors in another dtype."""

        def move(tensor: Tensor) -> Tensor:
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            return tensor.to(device=device or tensor.device, dtype=wanted)

        return self.map(move)

    @property
    def batch(self) -> int | None:
        """Length of the first axis of the first tensor that has one: the batch size."""
        return next((t.shape[0] for _, t in self.tensors() if t.ndim), None)

    def resized(self, batch: int) -> Call:
        """The same call at another batch size: samples repeated or left out.

        Tensors whose first axis is not as long as the batch stay as they are.

        Raises:
            CaptureError: There is no sample to repeat.
        """
        size = self.batch
        if size == 0 < batch:
            raise CaptureError("the inputs hold no sample", hint="pass a batch of 1 or more")

        def resize(tensor: Tensor) -> Tensor:
            if not tensor.ndim or tensor.shape[0] != size:
                return tensor
            return tensor[torch.arange(batch, device=tensor.device) % size]

        return self.map(resize)

    def grown(self, batch: int, seed: int) -> Call:
        """The same call at a larger batch size: the new samples are redrawn, as below."""
        size, resized = self.batch, self.resized(batch)
        fresh = iter([tensor for _, tensor in resized.redrawn(seed).tensors()])

        def mix(tensor: Tensor) -> Tensor:
            other = next(fresh)
            if not tensor.ndim or tensor.shape[0] != batch or size is None:
                return tensor
            return torch.cat([tensor[:size], other[size:]])

        return resized.map(mix)

    def redrawn(self, seed: int, scale: float = 1.0) -> Call:
        """A call of the same shapes: floats N(0, 1)·scale, integers uniform in the range seen.

        Bool tensors and integer tensors of one value are masks and stay as they are.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(tensor: Tensor) -> Tensor:
            spec = _spec_of("", tensor)
            return _draw(spec, generator, scale).to(tensor.device) if _free(spec) else tensor

        return self.map(draw)


def as_call(inputs: Inputs) -> Call:
    """Normalize what a user passes: a tensor, a sequence of arguments, or a dict of keywords.

    Raises:
        CaptureError: It is none of these, or holds no tensor.
    """
    if isinstance(inputs, Call):
        return inputs
    if isinstance(inputs, Tensor):
        return Call((inputs,))
    if isinstance(inputs, Mapping):
        call = Call((), dict(inputs))
    elif isinstance(inputs, (tuple, list)):
        call = Call(tuple(inputs))
    else:
        raise CaptureError(
            f"inputs are a {type(inputs).__name__}, not a tensor, a tuple or a dict",
            hint="pass a tensor, a tuple of positional inputs, or a dict of keyword inputs",
        )
    if not call.tensors():
        raise CaptureError(
            "the inputs hold no tensor", hint="pass what forward() takes, for example torch.randn"
        )
    return call


def _positional_names(model: nn.Module | None, count: int) -> list[str]:
    """Names of the first ``count`` positional parameters of forward."""
    names: list[str] = []
    if model is not None:
        try:
            parameters = inspect.signature(model.forward).parameters.values()
        except (TypeError, ValueError):
            return [f"input_{i}" for i in range(count)]
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    return (names + [f"input_{i}" for i in range(len(names), count)])[:count]


# -- inputs as data: what a plan keeps of them --------------------------------------------------


def describe(call: Call, model: nn.Module) -> tuple[dict[str, Any], tuple[InputSpec, ...]]:
    """The call's structure and tensors as JSON-ready data; :func:`draw` makes a call of it.

    Leaves that are neither tensors nor JSON values are written as None.
    """
    specs = tuple(_spec_of(name, tensor) for name, tensor in call.tensors(model))
    counter = iter(range(len(specs)))

    def skeleton(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return {"$": next(counter)}
        if isinstance(tree, Mapping):
            return {str(key): skeleton(value) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return [skeleton(value) for value in tree]
        return tree if tree is None or isinstance(tree, (bool, int, float, str)) else None

    args = [skeleton(value) for value in call.args]
    kwargs = {name: skeleton(value) for name, value in call.kwargs.items()}
    return {"args": args, "kwargs": kwargs}, specs


def draw(skeleton: Mapping[str, Any], specs: Sequence[InputSpec], seed: int = 0) -> Call:
    """A random call with the structure and tensors that :func:`describe` wrote down.

    Raises:
        PlanError: The plan holds no inputs, or they do not fit each other.
    """
    if not specs:
        raise PlanError("the plan holds no inputs to draw from", hint="pass inputs=")
    generator = torch.Generator().manual_seed(seed)
    try:
        tensors = [_draw(spec, generator, 1.0) for spec in specs]
    except (AttributeError, RuntimeError, TypeError) as error:
        raise PlanError(f"the plan's inputs cannot be drawn: {error}") from None

    def build(tree: Any) -> Any:
        if isinstance(tree, Mapping):
            if set(tree) == {"$"}:
                return tensors[tree["$"]]
            return {key: build(value) for key, value in tree.items()}
        return [build(value) for value in tree] if isinstance(tree, list) else tree

    try:
        return Call(
            tuple(build(value) for value in skeleton.get("args", [])),
            {name: build(value) for name, value in skeleton.get("kwargs", {}).items()},
        )
    except (AttributeError, IndexError, TypeError) as error:
        raise PlanError(f"the plan's call does not fit its inputs: {error}") from None


def _spec_of(name: str, tensor: Tensor) -> InputSpec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.numel() == 0:
        return InputSpec(name=name, shape=shape, dtype=dtype)
    low, high = int(tensor.min()), int(tensor.max())
    if low == high:
        return InputSpec(name=name, shape=shape, dtype=dtype, value=low)
    return InputSpec(name=name, shape=shape, dtype=dtype, low=low, high=high)


def _free(spec: InputSpec) -> bool:
    """Whether redrawing this tensor makes a valid input: not for masks."""
    return spec.value is None and spec.dtype != "bool"


def _draw(spec: InputSpec, generator: torch.Generator, scale: float) -> Tensor:
    dtype = getattr(torch, spec.dtype)
    if spec.value is not None:
        return torch.full(spec.shape, spec.value, dtype=dtype)
    if spec.low is not None and spec.high is not None:
        end = min(spec.high, 2**63 - 2) + 1  # randint's bound is an int64 itself
        return torch.randint(min(spec.low, end - 1), end, spec.shape, generator=generator).to(dtype)
    return (torch.randn(spec.shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is: the device of its first parameter, else the CPU."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


# -- batches of data -----------------------------------------------------------------------------


def started(data: Any) -> Iterator[Any]:
    """An iterator over the batches of what a user passes as data.

    Raises:
        PlanError: The data is not iterable.
    """
    try:
        return iter([data] if isinstance(data, (Tensor, Mapping, Call)) else data)
    except TypeError:
        raise PlanError(
            f"data is a {type(data).__name__}, which yields no batches",
            hint="pass a loader, a list of batches, or one tensor",
        ) from None


def match_batch(batch: Any, call: Call, model: nn.Module, *, any_length: bool = False) -> Call:
    """The part of a batch that is the model's input.

    A batch with the structure of the example inputs is the input. Otherwise a sequence whose
    first element, or first n elements, have it (the rest are labels); a dict: the keys that
    forward accepts.

    Args:
        batch: The batch.
        call: The example inputs.
        model: The model.
        any_length: Whether a list of samples, all alike, may be longer or shorter than that of the
            example: the last batch of detection data. A recording of the example takes no other.

    Raises:
        PlanError: Nothing in the batch has the structure of the example; both are shown.
    """
    example = _shape_of([*call.args, *([dict(call.kwargs)] if call.kwargs else [])])
    if isinstance(batch, Tensor) and not call.kwargs and len(call.args) == 1:
        if _shape_of(batch) == _shape_of(call.args[0]):
            return Call((batch,))
    elif isinstance(batch, Mapping):
        if call.kwargs and not call.args:
            accepted = _accepted(batch, call, model)
            if set(call.kwargs) <= set(accepted):
                return Call((), accepted)
        elif len(call.args) == 1 and _shape_of(call.args[0]) == _shape_of(batch):
            return Call((batch,))
        elif not call.kwargs and (accepted := _accepted(batch, call, model)):
            return Call((), accepted)
    elif isinstance(batch, (list, tuple)):
        count = len(call.args)
        pairs = zip(batch, call.args, strict=False)
        if 0 < count <= len(batch) and all(_fits(*pair, any_length) for pair in pairs):
            return Call(tuple(batch[:count]), dict(call.kwargs))
        if batch and isinstance(batch[0], (list, tuple, Mapping)):
            return match_batch(batch[0], call, model, any_length=any_length)
    raise PlanError(
        f"a batch of the data is {_shape_of(batch)}, the example inputs are {example}",
        hint="let the data yield the inputs, or (inputs, labels)",
    )


def first_call(batch: Any, model: nn.Module) -> Call | None:
    """Example inputs out of a batch of data: as many values as forward needs, labels left out.

    None where the batch is nothing that forward takes.
    """
    if isinstance(batch, Call):
        return batch
    if isinstance(batch, Tensor):
        return Call((batch,))
    parameters = inspect.signature(model.forward).parameters
    if isinstance(batch, Mapping):
        accepted = {key: value for key, value in batch.items() if key in parameters}
        return Call((), accepted) if accepted else None
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], Mapping):
        named = first_call(batch[0], model)  # ({"pixels": ...}, labels)
        if named is not None:
            return named
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = sum(p.default is p.empty and p.kind in kinds for p in parameters.values())
    count = max(needed, 1)
    if isinstance(batch, (list, tuple)) and len(batch) >= count:
        return Call(tuple(batch[:count]))
    return None


def _accepted(batch: Mapping[str, Any], call: Call, model: nn.Module) -> dict[str, Any]:
    """The entries of a dict batch that forward takes by name."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    wanted = set(call.kwargs) if takes_any else set(parameters)
    return {key: value for key, value in batch.items() if key in wanted}


def _fits(value: Any, example: Any, any_length: bool) -> bool:
    found, wanted = _shape_of(value), _shape_of(example)
    if any_length and isinstance(value, list) and isinstance(example, list) and value and example:
        return all(sample == wanted[0] for sample in (*found, *wanted)) or found == wanted
    return bool(found == wanted)


def _shape_of(tree: Any) -> Any:
    """The structure of a tree as readable text: tensors by dtype family and rank."""
    if isinstance(tree, Tensor):
        family = "float" if tree.is_floating_point() else str(tree.dtype).removeprefix("torch.")
        return f"{family} tensor of {tree.ndim} dims"
    if isinstance(tree, Mapping):
        return {str(key): _shape_of(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_shape_of(value) for value in tree]
    return type(tree).__name__
