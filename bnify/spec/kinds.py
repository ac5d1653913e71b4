"""What a SPEC is, told from its text and what lies on disk. Nothing is loaded here.

    path/net.py:MyNetwork        FILE         a class, factory or module in a Python file
    pkg.mod:factory              MODULE       the same in an importable module
    torchvision:resnet50         REGISTRY     also timm:NAME, hf:DIR
    out/                         FOLDER       a folder that bnify wrote
    model.onnx                   ONNX
    weights.safetensors, a.pt    CHECKPOINT   weights without code

A text that fits two of these is an error, never a guess.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from bnify.errors import SpecError, UsageError

REGISTRIES = ("torchvision", "timm", "hf")
CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
FOLDER_FILE = "bnify.json"
_FORMS = (
    "a SPEC is net.py:MyNetwork, pkg.mod:factory, torchvision:NAME, timm:NAME, hf:DIR, "
    "a folder that bnify wrote, or a .onnx file"
)


class SpecKind(StrEnum):
    """The forms of a SPEC."""

    FILE = "file"
    MODULE = "module"
    REGISTRY = "registry"
    FOLDER = "folder"
    ONNX = "onnx"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True, slots=True)
class Target:
    """A SPEC taken apart.

    Attributes:
        spec: The SPEC as typed.
        kind: Its form.
        place: File, module name, registry name or path.
        name: What to take from there: a dotted attribute, or the name in the registry.
    """

    spec: str
    kind: SpecKind
    place: str
    name: str = ""


def classify(spec: str) -> SpecKind:
    """The form of a SPEC.

    Raises:
        UsageError: It cannot be right, or it can be read in two ways.
        SpecError: It names something on disk that bnify cannot take for a model.
    """
    return parse_spec(spec).kind


def parse_spec(spec: str) -> Target:
    """Take a SPEC apart; raises as :func:`classify`."""
    if not spec.strip():
        raise UsageError("the SPEC is empty", hint=_FORMS)
    path = Path(spec)
    prefix, colon, rest = spec.partition(":")
    if colon and _exists(path):
        raise UsageError(
            f"{spec} can be read in two ways: there is a file or folder of that very name",
            hint=f"write ./{spec} for the path, or rename it",
        )
    if colon and prefix in REGISTRIES:
        if not rest:
            raise UsageError(f"{spec} names no model", hint=f"write {prefix}:NAME")
        return Target(spec, SpecKind.REGISTRY, prefix, rest)
    if not colon:
        return _path_target(spec, path)
    place, _, name = spec.rpartition(":")
    return _attribute_target(spec, place, name)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # longer than a name can be, or with a null byte
        return False


def _path_target(spec: str, path: Path) -> Target:
    """A SPEC without a colon: a folder, an ONNX file or a checkpoint."""
    if _exists(path) and path.is_dir():
        if (path / FOLDER_FILE).is_file():
            return Target(spec, SpecKind.FOLDER, spec)
        hint = f"hf:{spec}" if (path / "config.json").is_file() else _FORMS
        raise SpecError(
            f"{spec} is a folder without {FOLDER_FILE}: not written by bnify", hint=hint
        )
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return Target(spec, SpecKind.ONNX, spec)
    if suffix in CHECKPOINT_SUFFIXES:
        return Target(spec, SpecKind.CHECKPOINT, spec)
    if not _exists(path):
        raise UsageError(
            f"{spec} is no SPEC: no colon, and nothing on disk has that name", hint=_FORMS
        )
    if suffix == ".py":
        raise UsageError(
            f"{spec} is a Python file, but not which network in it{_defined_in(path)}",
            hint=f"write {spec}:NAME",
        )
    raise SpecError(
        f"{spec} is no model that bnify can read: unknown suffix {suffix!r}", hint=_FORMS
    )


def _attribute_target(spec: str, place: str, name: str) -> Target:
    """A SPEC ``place:name`` that is no registry: a Python file or a module."""
    dotted = all(part.isidentifier() for part in name.split("."))
    if not place or not name or not dotted:
        what = "no place before the colon" if not place else f"{name!r} is no attribute name"
        hint = "arguments go to --arg, as in --arg num_classes=10" if "(" in name else _FORMS
        raise UsageError(f"{spec} is no SPEC: {what}", hint=hint)
    path = Path(place)
    if path.suffix == ".py":
        return Target(spec, SpecKind.FILE, place, name)
    if _exists(path) and path.is_file():
        raise UsageError(f"{spec} is no SPEC: {place} is not a Python file (.py)", hint=_FORMS)
    if not all(part.isidentifier() for part in place.split(".")):
        near = f"did you mean {place}.py:{name}?" if _exists(Path(f"{place}.py")) else _FORMS
        raise UsageError(
            f"{spec} is no SPEC: {place!r} is no .py file and no module name", hint=near
        )
    _refuse_two_modules(spec, place, name)
    return Target(spec, SpecKind.MODULE, place, name)


def _refuse_two_modules(spec: str, module: str, name: str) -> None:
    """Refuse a module name that both the current folder and the environment have."""
    top = module.partition(".")[0]
    here = Path.cwd()
    candidates = (here / f"{top}.py", here / top / "__init__.py")
    local = next((path for path in candidates if path.is_file()), None)
    if local is None:
        return
    elsewhere = [entry for entry in sys.path if entry and Path(entry).resolve() != here.resolve()]
    found = PathFinder.find_spec(top, elsewhere)
    if found is None or not found.origin or Path(found.origin).resolve() == local.resolve():
        return
    file = "/".join(module.split("."))
    raise UsageError(
        f"{spec} can be read in two ways: {local.relative_to(here)} here, and {found.origin}",
        hint=f"write ./{file}.py:{name} for the one here, or run from another folder",
    )


def _names_of(node: ast.stmt) -> list[str]:
    """The class or function of a statement, or the names it gives to an instance: Net(), nn.X()."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
        return []
    called = ast.unparse(node.value.func).rpartition(".")[2]
    is_class = called[:1].isupper()
    return [t.id for t in node.targets if is_class and isinstance(t, ast.Name)]


def _defined_in(path: Path) -> str:
    """What a Python file that was not run seems to define, as the end of a sentence."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ""
    names = [name for node in tree.body for name in _names_of(node)]
    public = [name for name in names if not name.startswith("_")]
    return f"; it defines {', '.join(public)}" if public else ""


# -- arguments -----------------------------------------------------------------------------------

_PYTHON_WORDS: Mapping[str, str] = {"True": "true", "False": "false", "None": "null"}


def parse_arguments(items: Sequence[str], json_file: str | Path | None = None) -> dict[str, Any]:
    """Arguments of a factory from ``NAME=VALUE`` texts and a JSON file; the texts win.

    A value is JSON if it can be read as JSON, else a string.

    Raises:
        UsageError: A malformed or repeated item, a file that holds no JSON object.
        SpecError: The file cannot be read.
    """
    arguments = _read_json_object(Path(json_file)) if json_file is not None else {}
    seen: set[str] = set()
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(
                f"--arg {item} is not NAME=VALUE", hint="for example --arg num_classes=10"
            )
        if name in seen:
            raise UsageError(f"--arg {item}: {name} is given twice", hint="give it once")
        if text in _PYTHON_WORDS:  # as a string, "False" would count as true
            word = _PYTHON_WORDS[text]
            raise UsageError(
                f"--arg {item} is Python spelling; values are JSON",
                hint=f"write {name}={word}, or '{name}=\"{text}\"' for the string",
            )
        seen.add(name)
        try:
            arguments[name] = json.loads(text)
        except ValueError:
            arguments[name] = text
    return arguments


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SpecError(f"--arg-json {path} cannot be read: {reason}") from error
    except ValueError as error:
        raise UsageError(f"--arg-json {path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(
            f"--arg-json {path} holds a JSON {type(value).__name__}, not an object",
            hint='for example {"num_classes": 10}',
        )
    return value
