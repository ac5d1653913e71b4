"""Reading checkpoint files: what they hold, and why one cannot be read.

The format is told from the first bytes, not from the suffix. Pickles are read with
``weights_only=True``: nothing in the file runs.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from bnify.errors import WeightsError
from bnify.spec.formats import Format, format_of, unreadable
from bnify.spec.pickles import refused, trusted, wanted_globals
from bnify.spec.silence import user_output_to_stderr
from bnify.spec.usercode import first_line

_SHOWN = 5
_DEEPEST = 100


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        content: The tree in the file: a flat dict of tensors, or anything with some inside.
        sha256: Of the file, hexadecimal.
    """

    content: Any
    sha256: str


def read_checkpoint(
    path: Path, *, trust_globals: Sequence[str] = (), unsafe_pickle: bool = False
) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Args:
        path: A .safetensors file, or one that ``torch.save`` wrote.
        trust_globals: Full names of classes and functions that the pickle may use.
        unsafe_pickle: Run the pickle, whatever it does.

    Raises:
        WeightsError: It cannot be read, or is a pickle that wants more than weights.
    """
    form = format_of(path)
    if form is Format.SAFETENSORS:
        data = path.read_bytes()
        try:
            return Checkpoint(load_safetensors(data), hashlib.sha256(data).hexdigest())
        except (SafetensorError, ValueError, KeyError) as error:
            raise unreadable(path, error) from error
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if unsafe_pickle:
        return Checkpoint(_unpickle_unsafely(path), digest)
    allowed = [trusted(name) for name in trust_globals]
    try:
        with torch.serialization.safe_globals(allowed):
            return Checkpoint(_torch_load(path, weights_only=True), digest)
    except Exception as error:  # on damaged bytes torch's unpickler raises whatever it meets
        wanted = wanted_globals(path, trust_globals)
        if wanted and (isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)):
            raise refused(path, wanted, trust_globals, error) from error
        raise unreadable(path, error) from error


def describe_checkpoint(path: str | Path) -> str:
    """What a checkpoint holds in one line: tensors, values, where they are, the first names.

    Raises:
        WeightsError: It cannot be read.
    """
    found = find_state_dicts(read_checkpoint(Path(path)).content)
    if not found:
        return "no tensors"
    return "; ".join(_describe_state(key, state) for key, state in found.items())


def find_state_dicts(tree: Any) -> dict[str, Mapping[str, Any]]:
    """Every state dict in a checkpoint by its dotted key, ``""`` for the whole.

    A state dict is a mapping from names to tensors, perhaps with a few other values, that holds
    no state dict itself. Optimizer states are none. One that appears twice counts once.
    """
    return dict(_state_dicts(tree, "", 0, {}))


def _state_dicts(
    tree: Any, path: str, depth: int, visited: dict[int, bool]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Walk each container once: one that holds itself, or is shared many times over, ends too.

    Args:
        tree: A container, or anything else.
        path: Its dotted key.
        depth: How many containers it is in.
        visited: Containers by id, and whether a state dict is in them.
    """
    if isinstance(tree, nn.Module):  # of a file that the user let run
        if id(tree) not in visited:
            visited[id(tree)] = True
            yield path, tree.state_dict()
        return
    if not isinstance(tree, (list, tuple, Mapping)) or id(tree) in visited or depth > _DEEPEST:
        return
    visited[id(tree)] = False
    items: Mapping[Any, Any] = tree if isinstance(tree, Mapping) else {}
    if isinstance(tree, (list, tuple)) and len(tree) <= 1000:
        items = dict(enumerate(tree))
    if {"state", "param_groups"} <= set(items):
        return
    inside = False
    for key, value in items.items():
        if not isinstance(value, Tensor):
            yield from _state_dicts(
                value, f"{path}.{key}" if path else str(key), depth + 1, visited
            )
            inside = inside or visited.get(id(value), False)
    own = isinstance(tree, Mapping) and all(isinstance(key, str) for key in items)
    if not inside and own and any(isinstance(value, Tensor) for value in items.values()):
        inside = True
        yield path, items
    visited[id(tree)] = inside


def _describe_state(key: str, state: Mapping[str, Any]) -> str:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    values = sum(tensor.numel() for tensor in tensors.values())
    first = ", ".join(f"{name} {list(t.shape)}" for name, t in list(tensors.items())[:_SHOWN])
    more = ", …" if len(tensors) > _SHOWN else ""
    where = f" under {key!r}" if key else ""
    plural = "tensor" if len(tensors) == 1 else "tensors"
    return f"{len(tensors)} {plural}{where}, {values:,} values: {first}{more}"


# -- reading ---------------------------------------------------------------------------------------


def _torch_load(path: Path, *, weights_only: bool) -> Any:
    # A stream, not the path: torch.load takes the suffix .safetensors at its word.
    with path.open("rb") as stream, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
        return torch.load(stream, map_location="cpu", weights_only=weights_only)


def _unpickle_unsafely(path: Path) -> Any:
    try:
        with user_output_to_stderr():
            return _torch_load(path, weights_only=False)
    except Exception as error:  # the file is a program that the user asked to run
        if isinstance(error, (ModuleNotFoundError, AttributeError)):
            raise WeightsError(
                f"{path} needs code that is not there: {first_line(error)}",
                hint="run where that code can be imported, or save a state_dict instead",
            ) from error
        raise unreadable(path, error) from error
