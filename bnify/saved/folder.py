"""A saved folder as data: what it holds, read without running any of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bnify.atomic import moved_aside
from bnify.changes import Change
from bnify.errors import SpecError
from bnify.plan import Plan
from bnify.saved.state import State, read_tensors

SCHEMA: Final = 1
WEIGHTS: Final = "model.safetensors"
RECIPE: Final = "bnify.json"
ONNX: Final = "model.onnx"
REPORT: Final = "report.json"
#: Everything a folder may hold and still be replaced by --force.
OURS: Final = frozenset({WEIGHTS, RECIPE, ONNX, f"{ONNX}.data", REPORT})

_FOLDER_HINT = "name a folder that bnify wrote with -o or Result.save"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFolder:
    """A folder that bnify wrote, as data; nothing of it has been run.

    Attributes:
        directory: The folder.
        spec: Where the model came from; None when it was saved from a live model.
        plan: The plan.
        structure: How a fold changed the module tree.
        verified: True, False (kept with --keep-failed), None (never verified).
        versions: Versions it was written with.
        hashes: SHA-256 of weights, ONNX file and the checkpoint; the plan's model digest.
        aliases: Further names of stored tensors.
        extra: JSON values of modules with an extra state.
    """

    directory: Path
    spec: dict[str, Any] | None
    plan: Plan
    structure: tuple[Change, ...] = ()
    verified: bool | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def onnx(self) -> Path | None:
        """The exported file, if the folder has one."""
        path = self.directory / ONNX
        return path if path.is_file() else None

    def state(self) -> State:
        """The stored weights, read now."""
        tensors = read_tensors(self.directory / WEIGHTS)
        return State(tensors, dict(self.aliases), dict(self.extra))


def read(directory: str | Path) -> SavedFolder:
    """Read a folder's recipe; neither code nor weights are loaded.

    Raises:
        SpecError: There is no such folder, bnify did not write it, or it is damaged.
        PlanError: Its plan was edited into something that is no plan.
    """
    folder = Path(directory)
    path = folder / RECIPE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        left = moved_aside(Path(os.path.realpath(folder))) if not folder.exists() else None
        hint = f"an interrupted write left the old version: mv {left} {folder}" if left else ""
        raise SpecError(f"{folder} has no {RECIPE}", hint=hint or _FOLDER_HINT) from None
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} cannot be read: {error}", hint=_FOLDER_HINT) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise SpecError(
            f"{path} has schema {found!r}, this bnify reads {SCHEMA}",
            hint="read it with the version that wrote it",
        )
    return SavedFolder(
        directory=folder,
        spec=data.get("spec"),
        plan=Plan.from_dict(data.get("plan")),
        structure=tuple(Change.from_dict(change) for change in data.get("structure", ())),
        verified=data.get("verified"),
        versions=data.get("versions", {}),
        hashes=data.get("hashes", {}),
        aliases=data.get("aliases", {}),
        extra=data.get("extra", {}),
    )
