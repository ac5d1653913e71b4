"""The user's own data: ``pkg.mod:datasets``, or what such a function returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bnify.comparing.parts import DatasetPart, OwnPart, Raw, TensorPart, Version, part_name
from bnify.comparing.splits import fifth, hold_out
from bnify.errors import SpecError, UsageError
from bnify.spec.kinds import SpecKind, parse_spec
from bnify.spec.objects import import_folder, load_object
from bnify.spec.usercode import a_type, article, call_factory, user_code
from bnify.structure import Call

_RETURNS: Final = "return (train, validation, test), each a Dataset of (x, y) or tensors (X, Y)"
_KEYS: Final = ("train", "validation", "test")


def read_user_data(source: Any, seed: int) -> Raw:
    """Load the user's data, from its words or as an object.

    Raises:
        UsageError: The words name no Python object.
        SpecError: It cannot be loaded, or is no data of this form.
    """
    if not isinstance(source, str):
        name = getattr(source, "__name__", "your data")
        return _raw(_made(source, name), name, seed)
    target = parse_spec(source)
    if target.kind not in (SpecKind.FILE, SpecKind.MODULE):
        kind = target.kind.value
        raise UsageError(
            f"--data {source} is {article(kind)} {kind}, not a Python object",
            hint="write pkg.mod:datasets or file.py:datasets",
        )
    with import_folder(target):
        value = load_object(target, batches=True).value
        return _raw(_made(value, source), source, seed)


def _made(value: Any, name: str) -> Any:
    """What a function or class gives; anything else is the data."""
    if inspect.isclass(value) or (callable(value) and not _is_dataset(value)):
        return call_factory(value, {}, name)
    return value


def _raw(value: Any, name: str, seed: int) -> Raw:
    given = _named_parts(value, name)
    parts = {key: _part(part, part_name(_KEYS.index(key), name)) for key, part in given.items()}
    train, test = parts["train"], parts["test"]
    notes: tuple[str, ...] = ()
    if "validation" in parts:
        validation = parts["validation"]
    else:
        rest, held = hold_out(len(train), fifth(len(train)), seed)
        train, validation = train.subset(rest), train.subset(held)
        notes = (f"validation data are a fifth of the training part of {name}, at random",)
    splits = (train, validation, test)
    return Raw(name=name, versions=_versions(splits), notes=notes)


def _named_parts(value: Any, name: str) -> Mapping[str, Any]:
    """The parts by their names; validation may be missing."""
    if isinstance(value, Mapping):
        given = {"validation" if key == "val" else key: part for key, part in value.items()}
        if set(given) in ({*_KEYS}, {"train", "test"}):
            return given
        listed = ", ".join(map(str, value)) or "none"
        raise SpecError(
            f"{name} gives a dict with the keys {listed}", hint="its keys are " + ", ".join(_KEYS)
        )
    if isinstance(value, (tuple, list)) and len(value) in (2, 3):
        keys = _KEYS if len(value) == 3 else ("train", "test")
        if len(value) == 2 and all(_is_array(part) for part in value):
            raise SpecError(
                f"{name} gives two arrays, one (X, Y), without test data",
                hint="return ((X, Y), (X_test, Y_test))",
            )
        return dict(zip(keys, value, strict=True))
    size = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    raise SpecError(f"{name} gives {a_type(value)}{size}, not its parts", hint=_RETURNS)


def _part(value: Any, where: str) -> OwnPart:
    if isinstance(value, IterableDataset):
        raise SpecError(
            f"{where} is {a_type(value)}, which cannot be read by index",
            hint="stack its items into tensors, and return (X, Y)",
        )
    if isinstance(value, DataLoader):
        raise SpecError(
            f"{where} is a DataLoader; batches are drawn by bnify, the same for every norm",
            hint="return its dataset: loader.dataset",
        )
    if type(value) is TensorDataset:
        *inputs, targets = value.tensors
        value = (tuple(inputs) if len(inputs) != 1 else inputs[0], targets)
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return _tensor_part(value[0], value[1], where)
    if not _is_dataset(value):
        raise SpecError(f"{where} is {a_type(value)}", hint=_RETURNS)
    with user_code(where):
        samples = len(value)
    if not samples:
        raise SpecError(f"{where} is empty", hint="check where its data come from")
    return DatasetPart(dataset=value, name=where, on_inputs=(partial(_finite, where=where),))


def _tensor_part(inputs: Any, targets: Any, where: str) -> TensorPart:
    if isinstance(inputs, tuple):
        call = Call(tuple(_tensor(value, "x", where) for value in inputs))
    elif isinstance(inputs, Mapping):
        call = Call((), {key: _tensor(value, "x", where) for key, value in inputs.items()})
    else:
        call = Call((_tensor(inputs, "x", where),))
    y = _tensor(targets, "y", where)
    lengths = {len(tensor) for _, tensor in call.tensors()}
    if not lengths:
        raise SpecError(f"{where} has no inputs", hint=_RETURNS)
    if lengths != {len(y)}:
        listed = " and ".join(f"{length:,}" for length in sorted(lengths))
        raise SpecError(
            f"{where} has {listed} inputs for {len(y):,} targets", hint="they must be as many"
        )
    if not len(y):
        raise SpecError(f"{where} is empty", hint="check where its data come from")
    return TensorPart(inputs=call.map(partial(_finite, where=where)), targets=y)


def _tensor(value: Any, which: str, where: str) -> Tensor:
    """A tensor of samples from a tensor, an array, or a sequence of numbers."""
    try:
        if isinstance(value, Tensor):
            tensor = value.detach()
            if tensor.layout is not torch.strided:
                raise TypeError(f"a tensor of layout {tensor.layout}; pass {which}.to_dense()")
        else:
            array = np.asarray(value)
            native = array.dtype.newbyteorder("=")  # torch reads no other
            tensor = torch.from_numpy(np.array(array, dtype=native))
    except (TypeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise SpecError(
            f"{which} of {where} ({a_type(value)}) is no array of numbers: {reason}", hint=_RETURNS
        ) from error
    if not tensor.ndim:
        raise SpecError(f"{which} of {where} is a single number", hint=_RETURNS)
    return tensor


def _finite(tensor: Tensor, where: str) -> Tensor:
    if (tensor.is_floating_point() or tensor.is_complex()) and not bool(tensor.isfinite().all()):
        raise SpecError(
            f"the inputs of {where} hold NaN or infinity", hint="remove or fill those samples"
        )
    return tensor


def _versions(splits: tuple[OwnPart, OwnPart, OwnPart]) -> tuple[Version, ...]:
    """The data as they are, and in float32 where NumPy left them in float64."""
    call, _ = splits[0].batch(torch.zeros(1, dtype=torch.int64))
    if all(tensor.dtype is not torch.float64 for _, tensor in call.tensors()):
        return (Version(splits),)
    train, validation, test = (part.with_inputs(_single) for part in splits)
    note = "inputs of float64 were cast to float32, as the model takes no float64"
    return (Version(splits), Version((train, validation, test), note))


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype is torch.float64 else tensor


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _is_dataset(value: Any) -> bool:
    """Whether it can be read by index; structures that hold arrays are something else."""
    indexed = hasattr(value, "__getitem__") and hasattr(value, "__len__")
    structure = _is_array(value) or isinstance(value, (str, bytes, tuple, list, Mapping))
    return (indexed and not structure) or isinstance(value, IterableDataset)
