"""Pickles without running them: which classes and functions one wants, and which are trusted."""

from __future__ import annotations

import importlib
import pickle
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bnify.errors import WeightsError
from bnify.spec.formats import printable


def wanted_globals(path: Path, allowed: Sequence[str]) -> list[str]:
    """The globals that a pickle uses beyond those that weights need; read, never imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of escapes in damaged strings
        return _wanted_globals(path, allowed)


def _wanted_globals(path: Path, allowed: Sequence[str]) -> list[str]:
    try:
        wanted = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # no zip of torch's, a protocol it does not disassemble, or damaged bytes
        wanted = {name for name in _globals_in(_pickle_bytes(path)) if not _is_weights_own(name)}
    return sorted(wanted - set(allowed))


def _pickle_bytes(path: Path) -> bytes:
    try:
        if not zipfile.is_zipfile(path):
            return path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
            return archive.read(name) if name is not None else b""
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError):
        return b""  # damaged, or encrypted


def _globals_in(data: bytes) -> set[str]:
    """``module.name`` of every global of a pickle, or of several written one after the other."""
    names: set[str] = set()
    strings: list[str] = []
    memo: dict[Any, str] = {}
    position = 0
    try:
        while position == 0 or data[position : position + 1] == pickle.PROTO:
            for code, argument, at in pickletools.genops(data[position:]):
                if code.name in ("GLOBAL", "INST"):
                    names.add(str(argument).replace(" ", "."))
                elif code.name == "STACK_GLOBAL" and len(strings) >= 2:
                    names.add(".".join(strings[-2:]))
                elif code.name == "MEMOIZE" or code.name.endswith("BINPUT"):
                    memo[len(memo) if argument is None else argument] = "".join(strings[-1:])
                elif code.name.endswith("BINGET"):
                    strings.append(memo.get(argument, ""))
                elif "UNICODE" in code.name:
                    strings.append(str(argument))
                if code.name == "STOP":
                    position += (at or 0) + 1
    except (ValueError, LookupError, ArithmeticError, struct.error, MemoryError):
        pass  # what follows the pickles is raw tensor data, or the file is cut short
    return names


def _is_weights_own(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    return name == "collections.OrderedDict" or (
        module in ("torch", "torch.storage", "torch._utils", "torch.serialization")
        and (attribute.endswith("Storage") or attribute.startswith(("_rebuild_", "_get_layout")))
    )


def refused(
    path: Path, wanted: Sequence[str], allowed: Sequence[str], error: Exception
) -> WeightsError:
    """The refusal of a pickle that wants more than weights: what it wants, and what to do."""
    wanted = [printable(name) for name in wanted]
    listed = ", ".join(wanted)
    if any(name.startswith("torch.nn.modules.") for name in wanted):
        return WeightsError(
            f"{path} is a whole pickled model, not weights: it wants {listed}",
            hint="where it was made: torch.save(model.state_dict(), 'weights.pt'); "
            "--unsafe-pickle runs the file",
        )
    blocked = " (torch never allows that module)" if "blocked" in str(error) and allowed else ""
    return WeightsError(
        f"{path} was not unpickled: beyond weights it wants {listed}{blocked}",
        hint=" ".join(f"--trust-global {name}" for name in wanted)
        + " if you know them; --unsafe-pickle runs whatever the file says",
    )


def trusted(name: str) -> Any:
    """The object that a trusted name stands for, as ``safe_globals`` takes it.

    Raises:
        WeightsError: Nothing of that name can be imported.
    """
    module_name, _, attribute = name.rpartition(".")
    parts = [attribute]
    while module_name:
        try:
            value: Any = importlib.import_module(module_name)
            for part in parts:
                value = getattr(value, part)
        except ModuleNotFoundError:
            module_name, _, part = module_name.rpartition(".")
            parts.insert(0, part)
        except AttributeError as error:
            raise WeightsError(f"--trust-global {name}: {error}", hint="check the name") from error
        else:
            return (value, name)
    raise WeightsError(
        f"--trust-global {name}: no such module can be imported",
        hint="write package.module.Name, as the refusal lists it",
    )
