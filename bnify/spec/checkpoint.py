"""Reading checkpoint files: what they hold, and why one cannot be read.

The format is told from the first bytes, not from the suffix. Pickles are read with
``weights_only=True``: nothing in the file runs.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from bnify.errors import WeightsError
from bnify.spec.pickles import refused, trusted, wanted_globals
from bnify.spec.silence import user_output_to_stderr
from bnify.spec.usercode import first_line

_SHOWN = 5


class Format(StrEnum):
    """Formats of checkpoint files."""

    SAFETENSORS = "safetensors"
    ZIP = "zip"
    PICKLE = "pickle"


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
    form = _format_of(path)
    if form is Format.SAFETENSORS:
        data = path.read_bytes()
        try:
            return Checkpoint(load_safetensors(data), hashlib.sha256(data).hexdigest())
        except (SafetensorError, ValueError, KeyError) as error:
            raise _unreadable(path, error) from error
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if unsafe_pickle:
        return Checkpoint(_unpickle_unsafely(path), digest)
    allowed = [trusted(name) for name in trust_globals]
    try:
        with torch.serialization.safe_globals(allowed):
            return Checkpoint(_torch_load(path, weights_only=True), digest)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError,
            AttributeError, TypeError, ImportError, struct.error) as error:  # fmt: skip
        wanted = wanted_globals(path, trust_globals)
        if wanted and (isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)):
            raise refused(path, wanted, trust_globals, error) from error
        raise _unreadable(path, error) from error


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
    found: dict[str, Mapping[str, Any]] = {}
    seen: set[int] = set()
    for key, state in _state_dicts(tree, ""):
        if id(state) not in seen:
            seen.add(id(state))
            found[key] = state
    return found


def _state_dicts(tree: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(tree, nn.Module):  # of a file that the user let run
        yield path, tree.state_dict()
        return
    if isinstance(tree, (list, tuple)):
        tree = dict(enumerate(tree)) if len(tree) <= 1000 else {}
    if not isinstance(tree, Mapping) or {"state", "param_groups"} <= set(tree):
        return
    inner = [
        hit
        for key, value in tree.items()
        if not isinstance(value, Tensor)
        for hit in _state_dicts(value, f"{path}.{key}" if path else str(key))
    ]
    if inner:
        yield from inner
    elif all(isinstance(key, str) for key in tree) and any(
        isinstance(value, Tensor) for value in tree.values()
    ):
        yield path, tree


def _describe_state(key: str, state: Mapping[str, Any]) -> str:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    values = sum(tensor.numel() for tensor in tensors.values())
    first = ", ".join(f"{name} {list(t.shape)}" for name, t in list(tensors.items())[:_SHOWN])
    more = ", …" if len(tensors) > _SHOWN else ""
    where = f" under {key!r}" if key else ""
    plural = "tensor" if len(tensors) == 1 else "tensors"
    return f"{len(tensors)} {plural}{where}, {values:,} values: {first}{more}"


# -- what a file is --------------------------------------------------------------------------------


def _format_of(path: Path) -> Format:
    """The format by the file's first bytes.

    Raises:
        WeightsError: It is no checkpoint; says what it is, where that can be told.
    """
    if path.is_dir():
        raise _folder(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise WeightsError(f"{path} cannot be read: {reason}", hint="check the path") from error
    if not head:
        raise WeightsError(f"{path} is empty", hint="copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path} is a Git LFS pointer, not the weights themselves",
            hint=f"git lfs pull --include {path.name}",
        )
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(f"{path} is a web page, not a checkpoint", hint="download it again")
    if head.startswith(b"\x89HDF"):
        raise WeightsError(f"{path} is an HDF5 file: Keras wrote it", hint="bnify reads PyTorch's")
    if head.startswith(b"PK\x03\x04"):
        _refuse_other_archives(path)
        return Format.ZIP
    if path.name.endswith(".index.json"):
        raise _index(path)
    if head[8:9] == b"{" or path.suffix.lower() == ".safetensors":
        return Format.SAFETENSORS
    if start.startswith((b"{", b"[")):
        raise WeightsError(f"{path} is a JSON file, not a checkpoint", hint="pass the weights file")
    return Format.PICKLE


def _folder(path: Path) -> WeightsError:
    names = {entry.name for entry in path.iterdir()}
    if "model.safetensors" in names:
        hint = f"pass {path / 'model.safetensors'}"
        return WeightsError(f"{path} is a folder, not a checkpoint file", hint=hint)
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return WeightsError(
            f"{path} is a distributed checkpoint (FSDP) in {len(names)} files",
            hint="python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{path} weights.pt",
        )
    parts = {"latest", "zero_to_fp32.py"} & names
    if parts or any(
        name.startswith(("mp_rank_", "zero_pp_rank_", "global_step")) for name in names
    ):
        return WeightsError(
            f"{path} is a DeepSpeed checkpoint in several files",
            hint=f"python {path / 'zero_to_fp32.py'} {path} weights.pt",
        )
    index = next((name for name in sorted(names) if name.endswith(".index.json")), None)
    if index is not None:
        return _index(path / index)
    return WeightsError(f"{path} is a folder, not a checkpoint file", hint="pass one file")


def _index(path: Path) -> WeightsError:
    try:
        files = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        count = f"{len(files)} files"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        count = "several files"
    return WeightsError(
        f"{path} is the index of a checkpoint split into {count}",
        hint="load the parts in Python and save them as one file with safetensors' save_file",
    )


def _refuse_other_archives(path: Path) -> None:
    """Refuse zip files that ``torch.save`` did not write; a damaged one is told by reading it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return
    if any(name.endswith("constants.pkl") for name in names):
        raise WeightsError(
            f"{path} is a TorchScript archive, a whole program",
            hint="torch.save(torch.jit.load(path).state_dict(), 'weights.pt')",
        )
    if not any(name.endswith("data.pkl") for name in names):
        inside = ", ".join(names[:3]) or "nothing"
        raise WeightsError(
            f"{path} is a zip file, but no checkpoint: it holds {inside}",
            hint="pass a .safetensors file, or one that torch.save wrote",
        )


def _unreadable(path: Path, error: Exception) -> WeightsError:
    return WeightsError(
        f"{path} cannot be read as a checkpoint: it is damaged, cut short, or none "
        f"({first_line(error)})",
        hint="copy or download it again",
    )


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
        raise _unreadable(path, error) from error
