"""Running code that is not ours: its errors told by the user's frames, its wrong calls up front."""

from __future__ import annotations

import inspect
import os
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bnify.errors import BnifyError, SpecError

# Frames below these folders are not the user's.
_NOT_THE_USERS = (
    str(Path(__file__).resolve().parents[1]) + os.sep,
    *(sysconfig.get_path(key) + os.sep for key in ("stdlib", "purelib", "platlib")),
)
_SHOWN_FRAMES = 4


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Turn anything that escapes from user code into a SpecError with the user's frames only.

    The original stays attached as the cause, for ``--debug``.

    Args:
        what: Subject of the sentence, ``"net.py:MyNetwork"``.
    """
    try:
        yield
    except BnifyError:
        raise
    except SyntaxError as error:
        line = (error.text or "").strip()
        where = f"{_short(error.filename or '?')}" + (f":{error.lineno}" if error.lineno else "")
        raise SpecError(
            f"{what}: syntax error at {where}: {error.msg}" + (f": {line}" if line else ""),
            hint=f"correct {where}",
        ) from error
    except SystemExit as error:
        raise SpecError(
            f"{what} ended the program with SystemExit({error.code!r}){_where(error)}",
            hint="put what should run only as a script under if __name__ == '__main__':",
        ) from error
    except Exception as error:  # the boundary to user code: anything can come out of it
        raise SpecError(
            f"{what} raised {first_line(error)}{_where(error)}", hint=_hint_for(error)
        ) from error


def user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of an exception that lie in the user's own files, outermost first."""
    return [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame)]


def article(word: str) -> str:
    """``"a"`` or ``"an"``, by the word's first letter."""
    return "an" if word[:1].lower() in "aeiou" else "a"


def a_type(value: Any) -> str:
    """The type of a value with its article: ``"an int"``, ``"a list"``."""
    name = type(value).__name__
    return f"{article(name)} {name}"


def first_line(error: BaseException) -> str:
    """``"ValueError: what it says"``: class and first line of an exception."""
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    return f"{name}: {lines[0]}" if lines else name


def call_factory(factory: Callable[..., Any], arguments: Mapping[str, Any], what: str) -> Any:
    """Call a class or function; wrong argument names are told before it runs, with the signature.

    Raises:
        SpecError: The arguments do not fit, or the call raised.
    """
    try:
        signature: inspect.Signature | None = inspect.signature(factory)
    except (TypeError, ValueError):  # C functions have none
        signature = None
    if signature is not None:
        try:
            signature.bind(**arguments)
        except TypeError as error:
            name = getattr(factory, "__name__", type(factory).__name__)
            raise SpecError(
                f"{what}: {error}; the signature is {name}{signature}",
                hint="pass arguments as --arg NAME=VALUE",
            ) from error
    with user_code(what):
        return factory(**arguments)


def _is_users(frame: traceback.FrameSummary) -> bool:
    # "<" opens <frozen importlib._bootstrap> and <string>.
    return not frame.filename.startswith(("<", *_NOT_THE_USERS))


def _where(error: BaseException) -> str:
    """`` (net.py:12 in build, called from net.py:3)``, innermost first."""
    frames = [frame for frame in user_frames(error) if frame.lineno is not None]
    if not frames:
        return ""
    places = [f"{_short(frame.filename)}:{frame.lineno} in {frame.name}" for frame in frames]
    inner, *outer = reversed(places[-_SHOWN_FRAMES:])
    text = "".join(f", called from {place}" for place in outer)
    return f" ({inner}{text})"


def _short(file: str) -> str:
    """The path relative to the current folder where it lies inside."""
    try:
        return str(Path(file).resolve().relative_to(Path.cwd()))
    except (OSError, ValueError):
        return file


def _hint_for(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"install {error.name.partition('.')[0]}, or run where it can be imported"
    if isinstance(error, ImportError) and "relative import" in str(error):
        return "the file is part of a package: run where it is importable and write pkg.mod:NAME"
    frames = [frame for frame in user_frames(error) if frame.lineno is not None]
    if frames:
        return f"correct {_short(frames[-1].filename)}:{frames[-1].lineno}, or see it with --debug"
    return "the same command with --debug shows where"
