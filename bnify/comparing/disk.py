"""Single files that are there whole or not at all, in a folder that one process has to itself.

A file is written beside its place, fsynced and renamed. What a killed process left beside is
named after the file, and the next one overwrites it: there is only one writer, by the lock.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bnify.atomic import OutputError

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not told apart
    fcntl = None  # type: ignore[assignment]

#: What the name of a file ends in while it is being written.
BESIDE: Final = ".tmp"


def put(file: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all.

    Raises:
        OutputError: The disk is full, read-only or refuses for another reason.
    """
    beside = file.with_name(file.name + BESIDE)
    with readable_errors(file, "finished trials are kept: go on with resume=True (--resume)"):
        try:
            with beside.open("wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(file)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        sync(file.parent)


def sync(folder: Path) -> None:
    """Make what was created or renamed in a folder outlive a power cut."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(folder: Path) -> int | None:
    """A descriptor that holds the lock on the folder; None when another process does."""
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


@contextmanager
def readable_errors(target: Path, hint: str) -> Iterator[None]:
    """What the disk refuses, as one line.

    Raises:
        OutputError: In place of an OSError of the block.
    """
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"cannot write {target}: {reason}", hint=hint) from error
