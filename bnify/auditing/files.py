"""Files as subjects of an audit, told apart by suffix and first bytes; torch only where needed."""

from __future__ import annotations

from pathlib import Path

from bnify.auditing.subject import Subject
from bnify.errors import SpecError
from bnify.spec.kinds import FOLDER_FILE


def subject_of_file(path: Path, name: str, *, key: str | None = None) -> Subject:
    """What is known of a checkpoint or an ONNX file.

    Args:
        path: A .safetensors, .pt, .pth, .bin, .ckpt or .onnx file.
        name: What the report calls it.
        key: Where in a checkpoint the weights are.

    Raises:
        SpecError: There is no such file.
        WeightsError: It cannot be read as what it is.
    """
    if not _exists(path):
        raise SpecError(f"there is no file {path}", hint="check the path")
    if path.suffix.lower() == ".onnx":
        from bnify.auditing.onnx_file import onnx_subject

        return onnx_subject(path, name)
    from bnify.auditing.checkpoint import checkpoint_subject

    return checkpoint_subject(path, name, key=key)


def is_saved_folder(path: Path) -> bool:
    """Whether it is a folder that bnify wrote."""
    return _exists(path / FOLDER_FILE)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False
