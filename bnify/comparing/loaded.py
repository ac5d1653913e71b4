"""What a comparison loaded, as digests: a resumed run must go on with the same.

The words of the question do not tell: behind the same name there may be other images, other
weights or another helper module.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnify.borrow import seeded
from bnify.comparing.data import Data, Part
from bnify.comparing.parts import DatasetPart, ImagePart, TensorPart
from bnify.environment import file_sha256
from bnify.errors import UsageError

#: Samples of each part of a Dataset that are read; tensors are hashed whole.
_LOOK: Final = 256
#: Files below these folders are no code of the user's: their versions are part of the question.
_INSTALLED: Final = tuple(
    Path(place).resolve()
    for place in (
        str(Path(__file__).parents[1]),
        *(sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")),
    )
)


def digests(model: nn.Module, data: Data, loss: Any, code: tuple[Any, ...]) -> dict[str, str]:
    """What is compared when a run goes on: name in words → SHA-256, hexadecimal.

    Of a Dataset only 256 samples a part are read; where two readings differ, only its length
    counts. Source files are those that define the model's modules, the loss and ``code``, and what
    they import, outside of the standard library and of installed packages.

    Args:
        model: Built from seed 0.
        data: The three parts.
        loss: The function; a module's weights and numbers count too.
        code: Functions, classes and SPECs whose source files count too; of other objects those of
            their type.
    """
    parts = {"training": data.train, "validation": data.validation, "test": data.test}
    found = {"the network": _of_model(model)}
    found |= {f"the {name} data": _of_part(part) for name, part in parts.items()}
    if isinstance(loss, nn.Module):
        found["the loss"] = _of_model(loss)
    modules = [*model.modules(), *(loss.modules() if isinstance(loss, nn.Module) else ())]
    sets = [part.dataset for part in parts.values() if isinstance(part, DatasetPart)]
    for name, digest in _sources([*modules, *sets, loss, *code]).items():
        found[f"the file {name}"] = digest
    return found


def refuse_other(
    place: Path, there: dict[str, Any] | None, here: dict[str, str], *, began: bool
) -> None:
    """Refuse to go on with other data, another network or changed code.

    Args:
        place: The run folder, for the error.
        there: The digests that the run folder has; None where it has none.
        here: Those of now.
        began: Whether anything was measured there.

    Raises:
        UsageError: They differ, or the folder does not say what it was made with.
    """
    if there is None and not began:
        return
    if there is None:
        what = "it does not say which data and network it was made with"
    else:
        names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        if not names:
            return
        what = (
            f"{names[0]} {'are others' if names[0].endswith('data') else 'is another'} than before"
        )
        if names[0].startswith("the file "):
            what = f"{names[0]} has changed since"
    raise UsageError(
        f"the run in {place} is of another question: {what}",
        hint="ask the same again, or choose another folder with -o",
    )


class _Digest:
    """SHA-256 of words and tensors, each preceded by what it is."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, *words: Any) -> None:
        self._hash.update(f"{words!r}\n".encode())

    def tensor(self, name: str, tensor: Tensor) -> None:
        self.add(name, str(tensor.dtype), tuple(tensor.shape))
        if tensor.layout is not torch.strided:
            tensor = tensor.to_dense()
        whole = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten()
        self._hash.update(whole.view(torch.uint8).numpy().data)

    def hex(self) -> str:
        return self._hash.hexdigest()


def _of_model(model: nn.Module) -> str:
    """Of its modules, their plain attributes, and all parameters and buffers."""
    digest = _Digest()
    for path, module in model.named_modules(remove_duplicate=False):
        plain = {k: v for k, v in vars(module).items() if k[0] != "_" and _is_plain(v)}
        digest.add(path, type(module).__qualname__, sorted(plain.items()))
    for tensors in (model.named_parameters, model.named_buffers):
        for name, tensor in tensors(remove_duplicate=False):
            digest.tensor(name, tensor)
    return digest.hex()


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _of_part(part: Part) -> str:
    if isinstance(part, DatasetPart):
        first, second = (_of_samples(part) for _ in range(2))
        return first if first == second else f"{len(part)} samples, others each time"
    digest = _Digest()
    if isinstance(part, ImagePart):
        digest.add(str(part.layout))
        for name in ("images", "scale", "shift"):
            digest.tensor(name, getattr(part, name))
        digest.tensor("targets", part.targets)
    elif isinstance(part, TensorPart):
        for name, tensor in part.inputs.tensors():
            digest.tensor(name, tensor)
        digest.tensor("targets", part.targets)
    return digest.hex()


def _of_samples(part: DatasetPart) -> str:
    """Of samples that lie evenly over a Dataset, drawn from one random state."""
    digest = _Digest()
    digest.add(len(part))
    spread = torch.linspace(0, len(part) - 1, min(len(part), _LOOK), dtype=torch.float64).long()
    with seeded(0):
        call, targets = part.batch(spread)
    for name, tensor in call.tensors():
        digest.tensor(name, tensor)
    digest.tensor("targets", targets)
    return digest.hex()


# -- source files ----------------------------------------------------------------------------------


def _sources(objects: list[Any]) -> dict[str, str]:
    """File name → SHA-256 of the user's files that define the objects, and of what they import."""
    found: dict[Path, str] = {}
    waiting = [where for value in objects if (where := _defined_in(value)) is not None]
    while waiting:
        file, package = waiting.pop()
        if file not in found and not _is_installed(file):
            found[file] = file_sha256(file)
            waiting += _imported(file, package)
    names: dict[str, list[str]] = {}
    for file, digest in found.items():
        names.setdefault(file.name, []).append(digest)
    return {name: " ".join(sorted(each)) for name, each in sorted(names.items())}


def _is_installed(file: Path) -> bool:
    return any(file.is_relative_to(folder) for folder in _INSTALLED)


def _defined_in(value: Any) -> tuple[Path, str] | None:
    """The file that a SPEC names, or of a function's, a class's or a type's module; its package."""
    if isinstance(value, str):
        place = value.rpartition(":")[0]
        if place.endswith(".py"):
            return (Path(place).resolve(), "") if Path(place).is_file() else None
        return _of_module(place)
    name = getattr(getattr(value, "func", value), "__module__", None) or type(value).__module__
    return _of_module(name) if isinstance(name, str) else None


def _of_module(name: str) -> tuple[Path, str] | None:
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if not file or not Path(file).is_file():
        return None
    return Path(file).resolve(), getattr(module, "__package__", None) or ""


def _imported(file: Path, package: str) -> Iterator[tuple[Path, str]]:
    """The files of the modules that a Python file imports, as far as they can be found."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # a compiled extension
        return
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            try:
                base = resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:
                continue
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            beside = _beside(file, name) or _of_module(name)
            if beside is not None:
                yield beside


def _beside(file: Path, name: str) -> tuple[Path, str] | None:
    """A module in the folder of the file: those of two SPECs may share a name in sys.modules."""
    stem = file.parent.joinpath(*name.split("."))
    if (place := stem.with_name(f"{stem.name}.py")).is_file():
        return place.resolve(), name.rpartition(".")[0]
    place = stem / "__init__.py"
    return (place.resolve(), name) if place.is_file() else None
