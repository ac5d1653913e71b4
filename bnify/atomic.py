"""Output that is there whole or not at all, whatever kills the process or fills the disk.

A folder is written beside its final place, every file of it is fsynced, and it is renamed. The
writer holds a lock on what it writes, which the kernel drops with the process: so the next
writer can tell work in progress from what a killed one left, removes the latter, and puts an
old version back that was moved aside when its replacement never arrived.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bnify.errors import BnifyError, UsageError

try:
    import fcntl
except ImportError:  # Windows: leftovers of a killed writer stay until somebody removes them
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = ".bnify-tmp-"
_ASIDE = ".bnify-old-"
_UNWRITABLE = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ENAMETOOLONG,
    }
)


class OutputError(BnifyError):
    """What was to be written cannot be: read-only, full, or not a place to write to."""


def check_output(target: Path, *, force: bool = False, ours: Collection[str] | None = None) -> None:
    """Refuse an output that exists or cannot be created, before any work is done for it.

    Args:
        target: The file or folder to be written.
        force: Accept an existing one, if replacing it loses nothing but bnify's own files.
        ours: Names that a folder written by bnify holds; None when the target is a file.

    Raises:
        UsageError: The target exists and ``force`` is False, or holds something else.
        OutputError: Nothing can be written there.
    """
    with _readable_errors(target):
        place = Path(os.path.realpath(target))
        if place.exists():
            if not force:
                raise UsageError(
                    f"the output {target} exists already",
                    hint="choose another -o, or replace it with --force",
                )
            _check_replaceable(target, place, ours)
        parent = next(folder for folder in place.parents if folder.exists())
        if not parent.is_dir():
            raise OutputError(f"cannot write {target}: {parent} is not a folder", hint=_PLACE_HINT)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write {target}: {parent} is read-only", hint=_PLACE_HINT)


_PLACE_HINT = "choose another place with -o"


def _check_replaceable(target: Path, place: Path, ours: Collection[str] | None) -> None:
    """--force replaces what bnify wrote, and never deletes anything else."""
    if ours is None:
        if place.is_dir():
            raise UsageError(f"{target} is a folder, not a file", hint="name a file with -o")
        return
    if not place.is_dir():
        raise UsageError(f"{target} is a file, not a folder", hint="name a folder with -o")
    foreign = sorted(entry.name for entry in place.iterdir() if entry.name not in ours)
    if foreign:
        raise UsageError(
            f"{target} holds {foreign[0]!r}, which bnify did not write, so it is not replaced",
            hint="choose another -o, or move that file away",
        )


@contextmanager
def written_folder(target: Path, *, force: bool, ours: Collection[str]) -> Iterator[Path]:
    """A folder to write into that becomes ``target`` when the block ends without an error.

    Args:
        target: Where the folder will be.
        force: Replace an existing one that holds nothing but the files named in ``ours``.
        ours: Names of the files that may be replaced.

    Yields:
        An empty folder beside the target.

    Raises:
        UsageError: The target exists and may not be replaced.
        OutputError: The disk is full, read-only or refuses for another reason.
    """
    place = Path(os.path.realpath(target))
    with _readable_errors(target):
        place.parent.mkdir(parents=True, exist_ok=True)
        recover(place)
        check_output(target, force=force, ours=ours)
        folder, lock = _locked_folder(place)
    try:
        with _readable_errors(target):
            yield folder
            _sync_tree(folder)
            _swap(folder, place, target=target, force=force, ours=ours)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextmanager
def written_file(target: Path, *, force: bool) -> Iterator[Path]:
    """A folder to write into whose files are put in place when the block ends without an error.

    The file named like ``target`` comes last, so that what it refers to (external data) is there
    before it. Subfolders are thrown away.

    Args:
        target: Where the file will be.
        force: Replace an existing one.

    Yields:
        An empty folder beside the target.

    Raises:
        UsageError: The target exists and may not be replaced.
        OutputError: The disk is full, read-only or refuses for another reason.
    """
    place = Path(os.path.realpath(target))
    with _readable_errors(target):
        recover(place)
        check_output(target, force=force)
        place.parent.mkdir(parents=True, exist_ok=True)
        folder, lock = _locked_folder(place)
    try:
        with _readable_errors(target):
            yield folder
            check_output(target, force=force)  # somebody may have been faster
            written = [path for path in folder.iterdir() if path.is_file()]
            for path in sorted(written, key=lambda path: path.name == target.name):
                _sync(path)
                path.replace(place.parent / (place.name if path.name == target.name else path.name))
            _sync(place.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def recover(target: Path) -> None:
    """Clear what killed writers of ``target`` left, and restore a version that they moved away."""
    if fcntl is None:
        return
    for left in (*_siblings(target, _ASIDE), *_siblings(target, _TEMPORARY)):
        lock = _lock(left)
        if lock is None:  # its writer is alive
            continue
        try:
            if _ASIDE in left.name and not target.exists():
                left.rename(target)
            else:
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(lock)


def moved_aside(target: Path) -> Path | None:
    """The old version that a killed writer of ``target`` moved away and did not replace."""
    return next(iter(_siblings(target, _ASIDE)), None)


def _siblings(target: Path, kind: str) -> list[Path]:
    prefix = f".{target.name}{kind}"
    with suppress(OSError):
        return sorted(path for path in target.parent.iterdir() if path.name.startswith(prefix))
    return []


def _locked_folder(place: Path) -> tuple[Path, int]:
    """A new folder beside ``place``, and the descriptor that holds the lock on it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}{_TEMPORARY}", dir=place.parent))
        folder.chmod(0o777 & ~_umask())
        lock = _lock(folder)
        if lock is not None and folder.exists():
            return folder, lock
        if lock is not None:  # another writer took it for a leftover before the lock was ours
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock on ``folder``; None when somebody else has it."""
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _swap(folder: Path, place: Path, *, target: Path, force: bool, ours: Collection[str]) -> None:
    """Put the folder in its place; an old version is moved aside first and deleted last."""
    check_output(target, force=force, ours=ours)  # somebody may have been faster
    if not place.exists():
        folder.rename(place)
        _sync(place.parent)
        return
    lock = _lock(place)  # it moves with the folder, so nobody takes the old version for a leftover
    if lock is None:
        raise OutputError(f"cannot write {target}: another process is replacing it")
    aside = place.with_name(f".{place.name}{_ASIDE}{folder.name.rpartition('-')[2]}")
    try:
        place.rename(aside)
        try:
            folder.rename(place)
        except OSError:
            aside.rename(place)
            raise
        _sync(place.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        os.close(lock)


def write_text(path: Path, text: str) -> None:
    """Write a file of a folder that is not in its place yet."""
    path.write_text(text, encoding="utf-8", newline="\n")


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _readable_errors(target: Path) -> Iterator[None]:
    """What the disk refuses as one line; any other OSError is not about the output."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE or not _concerns(error, target):
            raise
        reason = os.strerror(error.errno or 0)
        raise OutputError(
            f"cannot write {target}: {reason.lower()}; nothing was left behind", hint=_PLACE_HINT
        ) from error


def _concerns(error: OSError, target: Path) -> bool:
    """Whether the error is about the target, its folder or what is written beside it."""
    if not isinstance(error.filename, str):
        return error.errno != errno.ENOENT
    path, parent = Path(error.filename), Path(os.path.realpath(target)).parent
    return path.is_relative_to(parent) or parent.is_relative_to(path)
