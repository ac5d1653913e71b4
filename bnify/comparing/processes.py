"""Trials in processes of this machine, which end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import connection, resource_tracker
from typing import Any, Final

from bnify.comparing.trial import Outcome, Trial
from bnify.comparing.worker import Failure, attempt, prepared
from bnify.errors import BnifyError, UsageError
from bnify.spec.silence import user_output_to_stderr

_PROCESS: Final = "bnify-trials"
_UNGUARDED: Final = 78
_GUARD: Final = 'put the call under `if __name__ == "__main__":`, or use jobs=1 (--jobs)'


def refuse_reimport() -> None:
    """End a worker that is importing the user's script, where that begins a comparison.

    A new process imports the script it was started from; one without the usual guard would
    begin its whole work again there. Worth calling before any work is done.

    Raises:
        SystemExit: In a worker of ours, whose parent says what is wrong.
        UsageError: In a process that somebody else started in that way.
    """
    process = multiprocessing.current_process()
    # multiprocessing has no public word for this; it refuses to start processes by the same one.
    if getattr(process, "_inheriting", False):
        if process.name.startswith(_PROCESS):
            sys.exit(_UNGUARDED)
        raise UsageError("this script is being imported by a new process", hint=_GUARD)


class Pool:
    """Trials in processes of this machine, one at a time in each.

    Not concurrent.futures: before Python 3.14 its processes cannot be killed by public means,
    and it does not tell a worker that never started from one that died at work.
    """

    def __init__(self, job: bytes, jobs: int) -> None:
        self.name = f"{jobs} processes"
        self._job = job
        self.workers = jobs
        self._workers: list[_Worker] = []

    def run(self, trials: Sequence[Trial]) -> Generator[Outcome, None, None]:
        """Start the trials in the order given; outcomes come as they finish."""
        queue = deque(trials)
        finished: list[Outcome] = []
        try:
            while len(self._workers) < min(self.workers, len(queue)):
                with _interrupts_held():
                    self._workers.append(_Worker(self._job, self.workers))
            while True:
                for worker in self._workers:
                    if queue and worker.ready and worker.trial is None:
                        worker.start(queue.popleft())
                yield from finished  # only now, so that no worker waits for the caller
                if not queue and all(worker.trial is None for worker in self._workers):
                    return
                heard = connection.wait([worker.connection for worker in self._workers])
                answers = [w.receive() for w in self._workers if w.connection in heard]
                finished = [answer for answer in answers if answer is not None]
        except BaseException:  # a cut, Ctrl-C, an error: what is running is given up
            self.close()
            raise

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        with _interrupts_held():  # a second Ctrl-C must not leave any of them behind
            for worker in self._workers:
                worker.process.kill()
            for worker in self._workers:
                worker.process.join(5)
                worker.connection.close()
            self._workers = []


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end of the block, and a process started inside never gets it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # the first start of it would let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """The parent's side of a worker process."""

    def __init__(self, job: bytes, jobs: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Not a daemon: user code may start processes of its own, as DataLoader does.
        self.process = context.Process(target=_work, args=(theirs,), name=_PROCESS)
        self.process.start()
        theirs.close()
        self.ready = False
        self.trial: Trial | None = None
        self._job: bytes | None = job
        self.workers = jobs

    def start(self, trial: Trial) -> None:
        """Hand over a trial."""
        self.trial = trial
        self._send(trial)

    def _send(self, what: Trial | bytes) -> None:
        with suppress(OSError):  # it has just died, which receive() is about to find
            self.connection.send(what)

    def receive(self) -> Outcome | None:
        """An outcome, or None when the worker has come one step further towards its first."""
        try:
            message: Outcome | Failure | None = self.connection.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if isinstance(message, Failure):
            raise message.error()
        if self._job is not None:  # only now does it read: a large job would block the pipe
            self._send(self._job)
            self._job = None
            return None
        self.ready, self.trial = True, None
        return message

    def _lost(self) -> BnifyError:
        self.process.join(1)
        code = self.process.exitcode
        if code == _UNGUARDED:
            return UsageError(
                "worker processes import this script, which begins a comparison each time",
                hint=_GUARD,
            )
        killed = code is not None and code < 0
        how = f"was killed by {signal.Signals(-code).name}" if code and killed else "ended"
        if self._job is not None and not killed:
            return BnifyError(
                f"a worker process ended while it was starting (exit code {code})",
                hint=f"in a script, {_GUARD}",
            )
        when = "between trials" if self.ready else "while it was loading model and data"
        return BnifyError(
            f"a worker process {how} {f'during {self.trial.key}' if self.trial else when}",
            hint="go on with resume=True (--resume); if memory ran out, "
            f"lower jobs={self.workers} (--jobs)",
        )


def _work(parent: Any) -> None:
    """A worker's life: prepare, then run trials until the parent has no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    _end_with_parent()
    with user_output_to_stderr(), suppress(EOFError, OSError):  # the parent closed the pipe
        parent.send(None)
        job = parent.recv()
        run = attempt(lambda: prepared(job))
        parent.send(run if isinstance(run, Failure) else None)
        while not isinstance(run, Failure):
            trial = parent.recv()
            parent.send(attempt(partial(run, trial)))


def _end_with_parent() -> None:
    """Leave no worker computing for nobody when the parent is killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
