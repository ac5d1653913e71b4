"""Silence for libraries that write to the terminal, from Python and from C++."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO


@dataclass
class Captured:
    """What was written while the streams were captured; complete once the block has ended."""

    text: str = ""


@contextlib.contextmanager
def captured_streams() -> Iterator[Captured]:
    """Keep file descriptors 1 and 2, ``sys.stdout``, ``sys.stderr`` and warnings to ourselves.

    The exporter and onnxruntime also write from C++, which only the descriptors catch. Whatever
    happens inside, the streams are given back, and the text is there for ``-v``.
    """
    captured = Captured()
    written = io.StringIO()
    try:
        with (
            _descriptors(captured),
            contextlib.redirect_stdout(written),
            contextlib.redirect_stderr(written),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            yield captured
    finally:
        said = [f"{item.category.__name__}: {item.message}" for item in caught]
        captured.text = "\n".join(
            part for part in (written.getvalue(), captured.text, *said) if part
        )


@contextlib.contextmanager
def _descriptors(captured: Captured) -> Iterator[None]:
    _flush()
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(tempfile.TemporaryFile())
        for descriptor in (1, 2):
            try:
                stack.enter_context(_redirected(descriptor, sink))
            except OSError:  # a service may run with its standard streams closed
                continue
        try:
            yield
        finally:
            _flush()
            sink.seek(0)
            captured.text = sink.read().decode(errors="replace")
            sink.seek(0, os.SEEK_END)


@contextlib.contextmanager
def _redirected(descriptor: int, sink: IO[bytes]) -> Iterator[None]:
    saved = os.dup(descriptor)
    try:
        os.dup2(sink.fileno(), descriptor)
        yield
    finally:
        os.dup2(saved, descriptor)
        os.close(saved)


def _flush() -> None:
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)  # what C++ printed sits in a buffer that Python cannot see
    for stream in (sys.__stdout__, sys.__stderr__, sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed streams have nothing left to flush
            if stream is not None:
                stream.flush()
