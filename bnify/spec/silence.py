"""What user code prints goes to stderr, at file-descriptor level too: stdout is for results."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def user_output_to_stderr() -> Iterator[None]:
    """Send stdout to stderr while user code runs; stdout is restored whatever happens.

    Covers ``print``, C code that writes to file descriptor 1, and child processes.
    """
    _flush()
    saved = _swap_descriptor()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _flush()
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def _swap_descriptor() -> int | None:
    """Point descriptor 1 at stderr; a copy of what it was, or None where it is closed."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        stderr_is_open = _is_open(2) and nowhere != 2
        saved = os.dup(1) if _is_open(1) and nowhere != 1 else None
        if saved is not None:
            # What was meant for a closed stderr goes nowhere.
            os.dup2(2 if stderr_is_open else nowhere, 1)
        return saved
    finally:
        os.close(nowhere)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _flush() -> None:
    """Write out what Python's and C's stdout still hold, so that it lands on the right side."""
    for stream in (sys.stdout, sys.__stdout__):
        # None under pythonw, closed or a broken pipe: nothing of it can be written any more.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.flush()  # type: ignore[union-attr]
    # printf of an extension waits in libc's buffer when stdout is no terminal.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).fflush(None)
