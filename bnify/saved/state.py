"""A model's state as safetensors: every value once, and no pickle.

safetensors refuses tensors that share memory. Tied parameters are one tensor under several
names: it is stored under the first name and the others are kept as aliases. Tensors that merely
overlap are stored apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnify.atomic import OutputError
from bnify.errors import WeightsError

_EXTRA = "_extra_state"


@dataclass(frozen=True, slots=True)
class State:
    """A state dict taken apart into what safetensors holds and what it cannot.

    Attributes:
        tensors: Contiguous CPU tensors that share no memory.
        aliases: Further names of a stored tensor, name → stored name.
        extra: JSON values that modules keep with ``get_extra_state``.
    """

    tensors: dict[str, Tensor]
    aliases: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def state_of(model: nn.Module) -> State:
    """The model's ``state_dict`` as :class:`State`.

    Raises:
        WeightsError: A tensor has no storage to write (lazy, meta, sparse), or a module keeps
            an extra state that is neither a tensor nor JSON.
    """
    state = State({})
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            state.extra[name] = _json_value(name, value)
            continue
        _check_storable(name, value)
        storage = value.untyped_storage().data_ptr()
        identity = (storage, value.storage_offset(), value.shape, value.stride(), value.dtype)
        if value.numel() and identity in first:
            state.aliases[name] = first[identity]
            continue
        first[identity] = name
        tensor = value.detach().cpu().contiguous()
        overlaps = storage in storages and tensor.untyped_storage().data_ptr() == storage
        state.tensors[name] = tensor.clone() if overlaps else tensor
        storages.add(storage)
    return state


def _check_storable(name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        what = "is lazy and has no shape yet"
    elif tensor.is_meta:
        what = "is on the meta device and has no values"
    elif tensor.layout != torch.strided:
        what = f"has the layout {tensor.layout}, which safetensors cannot hold"
    else:
        return
    raise WeightsError(f"{name} cannot be saved: it {what}", hint="save a model that has run once")


def _json_value(name: str, value: Any) -> Any:
    try:
        if json.loads(json.dumps(value)) == value:
            return value
    except (TypeError, ValueError):
        pass  # falls through to the refusal: it is no JSON
    module = name.removesuffix(_EXTRA).rstrip(".") or "the model"
    raise WeightsError(
        f"{module} keeps an extra state of type {type(value).__name__}, which only pickle can hold",
        hint="let get_extra_state() return a tensor or JSON values",
    )


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OutputError: The disk refuses, or safetensors does not know a dtype.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        path.touch()  # with the user's own permissions: safetensors would make it private
        mode = path.stat().st_mode
        save_file(dict(tensors), path, metadata={"format": "pt"})
        path.chmod(mode)
    except (SafetensorError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OutputError(
            f"cannot write {path.name}: {reason}", hint="is the disk full?"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file into CPU tensors.

    Raises:
        WeightsError: It is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(
            f"{path} cannot be read: {error}", hint="write the folder again"
        ) from error


def restore(model: nn.Module, state: State, *, where: str) -> None:
    """Put a stored state into a model, strictly; the model takes the stored dtypes.

    Raises:
        WeightsError: A tensor is missing, left over or of another shape; the model is untouched.
    """
    stored = dict(state.tensors)
    stored.update({name: state.tensors[of] for name, of in state.aliases.items()})
    own = model.state_dict(keep_vars=True)
    wanted = {name for name, value in own.items() if isinstance(value, Tensor)}
    problems = [f"{name} is missing" for name in sorted(wanted - set(stored))]
    problems += [f"{name} is not in the model" for name in sorted(set(stored) - wanted)]
    for name in sorted(wanted & set(stored)):
        have, want = tuple(stored[name].shape), tuple(own[name].shape)
        if have != want:
            problems.append(f"{name} is {have}, the model's is {want}")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise WeightsError(
            f"the weights in {where} do not fit the model: {problems[0]}{more}",
            hint="pass the code and arguments that the folder was written with",
        )
    for name, tensor in stored.items():
        if own[name].dtype != tensor.dtype:  # in place, so that tied parameters stay tied
            own[name].data = own[name].data.to(tensor.dtype)
    model.load_state_dict({**stored, **state.extra}, strict=True)
