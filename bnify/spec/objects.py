"""Objects named ``file.py:attribute`` or ``pkg.mod:attribute``, for models and for data.

A file is run under a private name, so that no module of that name is shadowed and no
``if __name__ == "__main__"`` runs. It stays in ``sys.modules`` under it: its classes can be
copied, pickled and scripted.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from bnify.errors import SpecError
from bnify.spec.kinds import SpecKind, Target
from bnify.spec.usercode import user_code

_siblings: dict[str, Path] = {}  # top-level modules that a file spec brought in → their folder


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a spec names.

    Attributes:
        value: The object.
        file: The file that defines it; None for a module without one.
        sha256: Of that file, hexadecimal.
    """

    value: Any
    file: Path | None
    sha256: str | None


@contextmanager
def import_folder(target: Target) -> Iterator[None]:
    """The folder whose modules the target may import is on ``sys.path``, for the load only.

    That is the folder of the file, or the current folder for a module.
    """
    file = Path(target.place) if target.kind is SpecKind.FILE else None
    folder = (file.parent if file is not None else Path()).resolve()
    if file is not None:
        _forget_siblings_of_others(folder)
    before = set(sys.modules)
    entry = str(folder)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if entry in sys.path:  # the first one is ours, unless user code took it out
            sys.path.remove(entry)
        if file is not None:
            _remember_siblings(folder, set(sys.modules) - before)


def load_object(target: Target, *, batches: bool = False) -> Loaded:
    """Import the place and take the attribute; call it within :func:`import_folder`.

    Args:
        target: The place and the attribute.
        batches: Batches are looked for: a missing attribute lists what yields some, not networks.

    Raises:
        SpecError: No such file, module or attribute, or the user's code raised.
    """
    file: Path | None
    digest: str | None
    if target.kind is SpecKind.FILE:
        module, file, digest = _run_file(target)
    else:
        module = _import(target)
        file, digest = _source_of(module)
    return Loaded(_attribute(module, target, batches), file, digest)


def _source_of(module: ModuleType) -> tuple[Path | None, str | None]:
    source = getattr(module, "__file__", None)
    if source is None or not Path(source).is_file():  # built in, or a folder without __init__
        return None, None
    return Path(source), hashlib.sha256(Path(source).read_bytes()).hexdigest()


def _run_file(target: Target) -> tuple[ModuleType, Path, str]:
    path = Path(target.place)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise SpecError(
            f"{target.spec}: {path} cannot be read: {error.strerror or type(error).__name__}",
            hint=_near_files(path),
        ) from error
    path = path.resolve()
    name = _private_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise SpecError(
            f"{target.spec}: {path} cannot be imported as Python", hint="name a .py file"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look it up
    try:
        with user_code(target.place):
            # Compiled here: no __pycache__ in the user's folder, and never a stale one.
            exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module, path, hashlib.sha256(source).hexdigest()


def _private_name(path: Path) -> str:
    """A module name no one else uses; another one each time, so that a reload keeps the first."""
    stem = "".join(c if c.isalnum() else "_" for c in path.stem)
    name = f"_bnify_spec_{stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    tries = 1
    while (unique := name if tries == 1 else f"{name}_{tries}") in sys.modules:
        tries += 1
    return unique


def _import(target: Target) -> ModuleType:
    name = target.place
    try:
        with user_code(name):
            return importlib.import_module(name)
    except SpecError as error:
        cause = error.__cause__
        missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
        if missing and (name == missing or name.startswith(f"{missing}.")):
            raise SpecError(
                f"{target.spec}: there is no module {missing!r}",
                hint="write path/file.py:NAME for a file; registries are torchvision, timm and hf",
            ) from cause
        raise


def _attribute(module: ModuleType, target: Target, batches: bool) -> Any:
    value: Any = module
    path = ""
    for part in target.name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError as error:
            raise _no_attribute(value, part, path, target, batches) from error
        path = f"{path}.{part}" if path else part
    return value


def _no_attribute(owner: Any, part: str, path: str, target: Target, batches: bool) -> SpecError:
    if not isinstance(owner, ModuleType):
        names = [name for name in dir(owner) if not name.startswith("_")]
        where, listed = f"{target.place}:{path}", ""
    else:
        found = _sources(owner) if batches else _definitions(owner)
        names, where = list(found), target.place
        entries = ", ".join(f"{name} ({kind})" for name, kind in found.items())
        listed = f"; it defines {entries}" if found else "; it defines nothing of the kind"
    near = difflib.get_close_matches(part, names, n=1)
    dotted = f"{path}.{near[0]}" if path and near else (near[0] if near else "")
    hint = f"did you mean {target.place}:{dotted}?" if near else f"write {target.place}:NAME"
    return SpecError(f"{where} has no {part!r}{listed}", hint=hint)


def _definitions(module: ModuleType) -> dict[str, str]:
    """The public classes, functions and modules that a file itself defines, networks first."""
    networks: dict[str, str] = {}
    others: dict[str, str] = {}
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if isinstance(value, nn.Module):
            networks[name] = f"{type(value).__name__} instance"
        elif getattr(value, "__module__", None) != module.__name__:
            continue
        elif inspect.isclass(value):
            found = networks if issubclass(value, nn.Module) else others
            found[name] = "nn.Module" if found is networks else "class"
        elif inspect.isfunction(value):
            others[name] = "function"
    return networks | others


def _sources(module: ModuleType) -> dict[str, str]:
    """What a file has that may yield batches: loaders and iterables, functions, classes."""
    found = {}
    for name, value in vars(module).items():
        if name.startswith("_") or isinstance(value, (ModuleType, str, bytes)):
            continue
        own = getattr(value, "__module__", None) == module.__name__
        if inspect.isclass(value) or inspect.isfunction(value):
            if own and not (inspect.isclass(value) and issubclass(value, nn.Module)):
                found[name] = "class" if inspect.isclass(value) else "function"
        elif hasattr(value, "__iter__") and not isinstance(value, nn.Module):
            found[name] = type(value).__name__
    return found


def _near_files(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix == ".py"]
    except OSError:
        return f"there is no folder {path.parent}"
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.with_name(near[0])}?" if near else "check the path"


def _forget_siblings_of_others(folder: Path) -> None:
    """Two files in two folders may each import their own ``layers``: do not mix them up."""
    for name, owner in list(_siblings.items()):
        if owner != folder and ((folder / f"{name}.py").is_file() or (folder / name).is_dir()):
            del _siblings[name]
            for loaded in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
                del sys.modules[loaded]


def _remember_siblings(folder: Path, names: set[str]) -> None:
    for name in names:
        if "." in name:
            continue
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and not name.startswith("_bnify_spec_"):
            parent = Path(file).resolve().parent
            if folder in (parent, parent.parent):
                _siblings[name] = folder
