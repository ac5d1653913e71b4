"""The result on stdout and nothing else there: all other words, the user's too, go to stderr."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
from collections.abc import Mapping
from typing import TextIO

from bnify.atomic import OutputError


class Streams:
    """The process's streams while a command runs.

    File descriptor 1 points at stderr from the start, so that not even C code or a child process
    of the user's model can write into the result; the real stdout is kept aside for it.
    """

    def __init__(self) -> None:
        self._python_stdout = sys.stdout
        self._fd_out = _taken_stdout()
        self.encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        self._parser_output = io.StringIO()
        sys.stdout = self._parser_output  # --help and --version print here
        self.error: TextIO = sys.stderr or io.StringIO()

    def emit(self, text: str) -> None:
        """Write the result; a reader that has gone away is no error.

        Raises:
            OutputError: stdout cannot take it: a full disk.
        """
        data = text.encode(self.encoding, errors="replace")
        try:
            while data:
                data = data[os.write(self._fd_out, data) :]
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EINVAL):
                reason = os.strerror(error.errno or 0).lower()
                raise OutputError(f"cannot write to stdout: {reason}") from error

    def say(self, text: str) -> None:
        """A line on stderr."""
        try:
            self.error.write(text if text.endswith("\n") else f"{text}\n")
            self.error.flush()
        except (OSError, ValueError):
            pass  # nobody reads stderr: the exit code still says how it ended

    def close(self, *, restore: bool) -> None:
        """Write what the command-line parser printed, and end.

        Args:
            restore: Give stdout back. Without it, what runs at exit still goes to stderr.
        """
        printed = self._parser_output.getvalue()
        if printed:
            self.emit(printed)
        if restore:
            os.dup2(self._fd_out, 1)
            sys.stdout = self._python_stdout
        else:
            sys.stdout = sys.stderr
        os.close(self._fd_out)

    def is_terminal(self) -> bool:
        """Whether a person sees the result."""
        return os.isatty(self._fd_out)

    def width(self) -> int:
        """Columns of the output: the terminal's, COLUMNS, or 80."""
        if os.environ.get("COLUMNS", "").isdigit() or not self.is_terminal():
            return max(shutil.get_terminal_size((80, 24)).columns, 40) if _columns_set() else 80
        return max(os.get_terminal_size(self._fd_out).columns, 40)


def _columns_set() -> bool:
    return os.environ.get("COLUMNS", "").isdigit() and int(os.environ["COLUMNS"]) > 0


def _taken_stdout() -> int:
    """A descriptor for the real stdout; descriptor 1 becomes another name of stderr."""
    if sys.stdout is not None:
        sys.stdout.flush()
    try:
        taken = os.dup(1)
    except OSError:  # started with stdout closed: there is nobody to tell
        return os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(2, 1)
    except OSError:  # started with stderr closed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
    return taken


def wants_color(choice: str, *, terminal: bool, environment: Mapping[str, str]) -> bool:
    """Whether to colour: ``--color`` first, then NO_COLOR, FORCE_COLOR, and the terminal."""
    if choice != "auto":
        return choice == "always"
    if environment.get("NO_COLOR"):
        return False
    if environment.get("FORCE_COLOR"):
        return True
    return terminal and environment.get("TERM") != "dumb"


def wants_progress(*, quiet: bool, stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether to show what is being done: on a terminal, unless told otherwise."""
    if quiet or environment.get("CI") or environment.get("TERM") == "dumb":
        return False
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False
