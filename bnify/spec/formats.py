"""What a checkpoint file is, by its name and first bytes; no torch, and nothing is unpickled."""

from __future__ import annotations

import json
import re
import zipfile
from enum import StrEnum
from pathlib import Path
from typing import Final

from bnify.errors import WeightsError
from bnify.spec.usercode import first_line

#: torch.save stores without compression; what unpacks to more than this is no checkpoint.
_UNPACKED: Final = 20
_SHARD: Final = re.compile(r"-(\d{3,})-of-(\d{3,})\.(?:safetensors|bin|pt|pth)$", re.IGNORECASE)
_DEEPSPEED: Final = re.compile(
    r"^(?:(?:bf16_)?zero_pp_rank_\d+_)?mp_rank_\d+\w*_(?:model|optim)_states\.pt$"
)


class Format(StrEnum):
    """Formats of checkpoint files."""

    SAFETENSORS = "safetensors"
    ZIP = "zip"
    PICKLE = "pickle"


def printable(text: str) -> str:
    """The text with what a terminal would obey written out: names in files come from anywhere."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shard_of(path: Path) -> tuple[int, int] | None:
    """``(1, 4)`` for ``model-00001-of-00004.safetensors``; None for a file that is a whole."""
    found = _SHARD.search(path.name)
    return (int(found[1]), int(found[2])) if found and int(found[2]) > 1 else None


def format_of(path: Path) -> Format:
    """The format by the file's first bytes.

    Raises:
        WeightsError: It is no checkpoint, or one part of a distributed one; says what it is,
            where that can be told.
    """
    if path.is_dir():
        raise _folder(path)
    if path.exists() and not path.is_file():
        raise WeightsError(f"{path} is no regular file", hint="pass the file itself")
    if path.name.endswith(".distcp"):
        raise WeightsError(
            f"{path} is one part of a distributed checkpoint (FSDP)",
            hint="python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{path.parent} weights.pt",
        )
    if _DEEPSPEED.match(path.name):
        raise WeightsError(
            f"{path} is one part of a DeepSpeed checkpoint",
            hint=f"python {path.parent / 'zero_to_fp32.py'} {path.parent} weights.pt",
        )
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise _closed(path, error) from error
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
    try:
        names = {entry.name for entry in path.iterdir()}
    except OSError as error:
        return _closed(path, error)
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
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return
    if any(name.endswith("constants.pkl") for name in names):
        raise WeightsError(
            f"{path} is a TorchScript archive, a whole program",
            hint="torch.save(torch.jit.load(path).state_dict(), 'weights.pt')",
        )
    if not any(name.endswith("data.pkl") for name in names):
        inside = ", ".join(printable(name)[:50] for name in names[:3]) or "nothing"
        raise WeightsError(
            f"{path} is a zip file, but no checkpoint: it holds {inside}",
            hint="pass a .safetensors file, or one that torch.save wrote",
        )
    if unpacked > _UNPACKED * path.stat().st_size + 2**20:
        raise WeightsError(
            f"{path} is compressed: {path.stat().st_size:,} bytes unpack to {unpacked:,}, "
            "and torch.save does not compress",
            hint="if you made it: load it in torch and save it again",
        )


def _closed(path: Path, error: OSError) -> WeightsError:
    reason = error.strerror or type(error).__name__
    return WeightsError(f"{path} cannot be read: {reason}", hint="check the path")


def unreadable(path: Path, error: Exception) -> WeightsError:
    """The refusal of a file that its reader could not make sense of.

    Torch's own advice, to load with ``weights_only=False``, is left out: it runs what is in there.
    """
    reason = first_line(error).partition(". In PyTorch")[0]
    return WeightsError(
        f"{path} cannot be read as a checkpoint: it is damaged, cut short, or none "
        f"({printable(reason)})",
        hint="copy or download it again",
    )
