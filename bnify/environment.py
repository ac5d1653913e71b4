"""What a result was made with: versions and the machine, for reports. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import bnify

_PACKAGES = ("torch", "numpy", "safetensors", "onnx", "onnxscript", "onnxruntime")
_CHUNK = 1 << 20


def versions() -> dict[str, str]:
    """Versions of bnify, Python and every package that has a part in the numbers."""
    found = {"bnify": bnify.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def environment(*, device: str, seed: int | None) -> dict[str, Any]:
    """The reproducible part of how a result came about: no host name, no path, no time."""
    return {
        "versions": versions(),
        "platform": f"{sys.platform} {platform.machine()}",
        "device": device,
        "seed": seed,
    }


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
