"""From a saved folder back to a model: the SPEC's code, the plan's norms, the folder's weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from bnify.changes import Change
from bnify.environment import file_sha256
from bnify.errors import SpecError
from bnify.plan import Plan
from bnify.saved.folder import WEIGHTS, SavedFolder, read
from bnify.saved.state import restore

Rebuild: TypeAlias = Callable[[nn.Module, Plan, Sequence[Change]], nn.Module]


def load(
    directory: str | Path,
    model: nn.Module | None = None,
    *,
    apply: Rebuild,
) -> nn.Module:
    """Rebuild a saved model: the SPEC gives the code, the plan the norms, the folder the weights.

    What a reader should know (changed code, changed weights) comes as a warning.

    Args:
        directory: A folder written by :func:`save`.
        model: A fresh instance of the model; needed when it was saved from a live one.
        apply: Applies a plan, and the structural changes of a fold, to a model and gives the
            rewritten model.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        SpecError: The model's code cannot be found or run, or there is no SPEC and no ``model``.
        PlanError: The plan does not fit the model.
        WeightsError: The weights do not fit the model.
    """
    folder = read(directory)
    if folder.verified is False:
        warnings.warn(f"{folder.directory} failed its verification when it was kept", stacklevel=3)
    if model is None:
        model = _build(folder, apply)
    rewritten = apply(model, folder.plan, folder.structure)
    state = folder.state()
    if file_sha256(folder.directory / WEIGHTS) != folder.hashes.get("weights"):
        warnings.warn(
            f"{WEIGHTS} in {folder.directory} has changed since it was saved", stacklevel=3
        )
    restore(rewritten, state, where=str(folder.directory))
    return rewritten.eval()


def _build(folder: SavedFolder, apply: Rebuild) -> nn.Module:
    """A fresh instance of the model that a folder's SPEC names."""
    spec = folder.spec
    if not spec:
        raise SpecError(
            f"{folder.directory} was saved from a live model and holds no SPEC",
            hint=f'pass a fresh instance: bnify.load("{folder.directory}", model=MyNetwork())',
        )
    if spec["kind"] == "folder":
        return load(_find(folder, spec), apply=apply)
    from bnify.spec import load_model

    target = spec["target"]
    if spec.get("path"):
        target = f"{_find(folder, spec)}:{spec['attribute']}"
    return load_model(target, arguments=spec.get("arguments") or {}).model


def _find(folder: SavedFolder, spec: Mapping[str, Any]) -> Path:
    """The SPEC's file or folder, seen from the saved folder, then from the current one."""
    places = (folder.directory / spec["path"], Path(spec["path"]))
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise SpecError(
            f"{folder.directory} was made from {spec['target']}, and {spec['path']} is not there",
            hint="run where the code is, or pass a fresh instance: bnify.load(dir, model=...)",
        )
    known = spec.get("sha256")
    if known and found.is_file() and file_sha256(found) != known:
        warnings.warn(
            f"{found} has changed since {folder.directory} was saved from it", stacklevel=5
        )
    return found
