"""What a worker is sent and what it sends back, wherever it runs."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch

from bnify.comparing.trial import Outcome, Trial
from bnify.errors import BnifyError, UsageError

Value = TypeVar("Value")


class Job(Protocol):
    """What every worker needs once, before its first trial; it must survive pickling."""

    def prepare(self) -> Callable[[Trial], Outcome]:
        """Load the model and the data, in the worker.

        Returns:
            The function that runs one trial.
        """
        ...


def pickled(job: Job, dumps: Callable[[Job], bytes]) -> bytes:
    """The job as bytes, once for all workers.

    Raises:
        UsageError: It holds something that cannot be pickled.
    """
    try:
        return dumps(job)
    except Exception as error:  # __reduce__ of user classes may raise anything
        raise _unsendable(error) from error


def _unsendable(error: Exception) -> UsageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UsageError(
        f"the model factory or the data cannot be sent to worker processes ({reason})",
        hint="jobs=1, or pass a SPEC such as 'net.py:MyNetwork'",
    )


def prepared(job: bytes) -> Callable[[Trial], Outcome]:
    """In a worker: the function that runs trials, with one thread.

    Raises:
        UsageError: The job refers to what a new process does not have.
        Exception: Whatever ``prepare`` raises.
    """
    torch.set_num_threads(1)
    try:
        unpickled: Job = pickle.loads(job)
    except Exception as error:  # __setstate__ of user classes may raise anything
        raise _unsendable(error) from error
    return unpickled.prepare()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What a worker sends instead of a result; it can be pickled whatever the exception holds.

    Attributes:
        text: Type and message, one line.
        trace: The worker's traceback.
        pickled: The exception itself; empty where that cannot be sent.
    """

    text: str
    trace: str
    pickled: bytes

    @classmethod
    def of(cls, error: Exception) -> Self:
        """Pack an exception that has just been caught."""
        what = " ".join(str(error).split())
        try:
            packed = pickle.dumps(error)
            pickle.loads(packed)
        except Exception:  # __reduce__ and __init__ of user classes may raise anything
            packed = b""
        return cls(
            text=f"{type(error).__name__}: {what}",
            trace="".join(traceback.format_exception(error)),
            pickled=packed,
        )

    def error(self) -> Exception:
        """The exception to raise: the same one, or a :class:`BnifyError` with its words."""
        try:
            error: Exception = pickle.loads(self.pickled)
        except Exception:  # empty, or of a module that only the worker could import
            error = BnifyError(f"a worker process failed: {self.text}")
        error.add_note(f"in a worker process:\n{self.trace}")
        return error


def attempt(call: Callable[[], Value]) -> Value | Failure:
    """What the call returns, or what it raised as a :class:`Failure`."""
    try:
        return call()
    except Exception as error:  # it belongs to the caller, whatever it is
        return Failure.of(error)
