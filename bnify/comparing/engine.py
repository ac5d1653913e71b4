"""Where trials run: in this process, in worker processes of this machine, or on Ray.

An engine starts trials in the order given and hands outcomes over as they finish. It never has
more trials in hand than workers, so that a cut or Ctrl-C takes effect at once: workers in the
middle of a trial are killed, and the trial counts as never begun.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from bnify.comparing.processes import Pool, refuse_reimport
from bnify.comparing.trial import Outcome, Trial
from bnify.comparing.worker import Job, pickled
from bnify.errors import UsageError
from bnify.spec.silence import user_output_to_stderr


class Engine(Protocol):
    """Runs trials.

    Attributes:
        name: In words: ``"this process"``, ``"2 processes"``, ``"ray: 8 CPUs"``.
        workers: How many trials run beside each other.
    """

    name: str
    workers: int

    def run(self, trials: Sequence[Trial]) -> Generator[Outcome, None, None]:
        """Start the trials in the order given; outcomes come as they finish, in any order.

        Closing the iterator gives up what is running. One iterator at a time.

        Raises:
            BnifyError: What ``prepare`` raised, or a worker was lost.
        """
        ...


@contextmanager
def open_engine(engine: str, job: Job, jobs: int) -> Iterator[Engine]:
    """An engine, whose workers are gone when the block ends, however it ends.

    torch computes with one thread in every worker, and in this process while it runs trials
    itself: the bits of a result may depend on the number of threads, and must not on ``jobs``.

    Args:
        engine: ``"local"``, ``"ray"`` or ``"ray://host:port"``; see :mod:`.ray_engine`.
        job: What workers prepare once.
        jobs: How many trials at a time; 1 runs them in this process. A Ray cluster that is there
            already runs as many as it has CPUs.

    Yields:
        The engine. Workers start with the first trial.

    Raises:
        UsageError: An unknown engine, less than one job, or a job that cannot be pickled.
        BnifyError: Ray is not installed or cannot be reached.
    """
    refuse_reimport()
    if jobs < 1:
        raise UsageError(f"jobs={jobs} runs nothing", hint="jobs=1 (--jobs) or more")
    if engine == "ray" or engine.startswith("ray://"):
        from bnify.comparing.ray_engine import open_ray

        with open_ray(engine, job, jobs) as ray:
            yield ray
    elif engine != "local":
        raise UsageError(f"unknown engine {engine!r}", hint="local, ray or ray://host:port")
    elif jobs == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield _Here(job)
        finally:
            torch.set_num_threads(threads)
    else:
        pool = Pool(pickled(job, pickle.dumps), jobs)
        try:
            yield pool
        finally:
            pool.close()


class _Here:
    """Trials in this process, one after the other."""

    name = "this process"
    workers = 1

    def __init__(self, job: Job) -> None:
        self._job = job
        self._run: Callable[[Trial], Outcome] | None = None

    def run(self, trials: Sequence[Trial]) -> Generator[Outcome, None, None]:
        for trial in trials:
            with user_output_to_stderr():
                if self._run is None:
                    self._run = self._job.prepare()
                outcome = self._run(trial)
            yield outcome
