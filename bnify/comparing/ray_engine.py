"""Trials on Ray (https://docs.ray.io), for more than one machine: ``pip install 'bnify[ray]'``.

``ray`` uses the cluster that ``RAY_ADDRESS`` names, or starts Ray on this machine for as long as
it is needed; ``ray://host:port`` connects to a cluster through its client server. Where the
cluster was started with tokens, as Ray 2.60 does by itself, ``RAY_AUTH_MODE=token`` is wanted here.

A trial gets one CPU and no GPU. bnify and the user's own modules must be importable on every
machine of the cluster: installed there, or at the same path as here (the module search path of
this process is handed over). Ray must have the same version everywhere, and so must torch for
equal bits. What user code prints there goes to Ray's log files.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from bnify.comparing.trial import Outcome, Trial
from bnify.comparing.worker import Failure, Job, attempt, pickled, prepared
from bnify.errors import BnifyError


@contextmanager
def open_ray(address: str, job: Job, jobs: int) -> Iterator[RayEngine]:
    """An engine on Ray; what was started for it is stopped when the block ends.

    Args:
        address: ``"ray"`` or ``"ray://host:port"``.
        job: What each worker prepares once.
        jobs: CPUs of a Ray that is started here; a cluster is used whole.

    Yields:
        The engine.

    Raises:
        UsageError: The job cannot be pickled.
        BnifyError: Ray is not installed, or cannot be started or reached.
    """
    try:
        import ray
    except ImportError as error:
        raise BnifyError(
            "the engine ray needs the package ray, which is not installed",
            hint="pip install 'bnify[ray]', or engine='local' (--engine local)",
        ) from error
    packed = pickled(job, ray.cloudpickle.dumps)  # by value where a module cannot be imported
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address, jobs)
    try:
        engine = RayEngine(ray, packed)
        try:
            yield engine
        finally:
            engine.close()
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str, jobs: int) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # processes that Ray starts read it
    where = os.environ.get("RAY_ADDRESS", "local") if address == "ray" else address
    started_here = {"num_cpus": jobs, "include_dashboard": False} if where == "local" else {}
    try:
        # Workers' output would be printed to our stdout.
        ray.init(where, log_to_driver=False, logging_level=logging.ERROR, **started_here)
    except Exception as error:  # its many kinds have no common base
        reason = " ".join(str(error).split())
        raise BnifyError(
            f"cannot reach Ray at {where}: {reason}",
            hint="check the address, RAY_AUTH_MODE, and that Ray has the same version there",
        ) from error


class RayEngine:
    """Trials in Ray actors of one CPU each, one at a time in each."""

    def __init__(self, ray: Any, job: bytes) -> None:
        self._ray = ray
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.name = f"ray: {self.workers} CPU{'s' if self.workers > 1 else ''}"
        self._job = ray.put(job)
        self._actors: list[Any] = []

    def run(self, trials: Sequence[Trial]) -> Generator[Outcome, None, None]:
        """Start the trials in the order given; outcomes come as they finish."""
        queue = deque(trials)
        busy: dict[Any, Any] = {}
        finished: list[Outcome] = []
        try:
            start = self._ray.remote(num_cpus=1)(_Actor).remote
            while len(self._actors) < min(self.workers, len(queue)):
                self._actors.append(start(self._job, sys.path))
            idle = list(self._actors)
            while True:
                while queue and idle:
                    actor = idle.pop()
                    busy[actor.run.remote(queue.popleft())] = actor
                yield from finished  # only now, so that no worker waits for the caller
                if not busy:
                    return
                done, _ = self._ray.wait(list(busy))
                idle += [busy.pop(answer) for answer in done]
                finished = [self._outcome(answer) for answer in done]
        except BaseException:  # a cut, Ctrl-C, an error: what is running is given up
            self.close()
            raise

    def close(self) -> None:
        """End the workers."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []

    def _outcome(self, answer: Any) -> Outcome:
        try:
            message: Outcome | Failure = self._ray.get(answer)
        except self._ray.exceptions.RayError as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise BnifyError(
                f"Ray lost a trial: {reason}", hint="go on with resume=True (--resume)"
            ) from error
        if isinstance(message, Failure):
            raise message.error()
        return message


class _Actor:
    """A worker on some machine of the cluster."""

    def __init__(self, job: bytes, path: Sequence[str]) -> None:
        sys.path.extend(entry for entry in path if entry not in sys.path)
        self._job = job
        self._run: Callable[[Trial], Outcome] | Failure | None = None

    def run(self, trial: Trial) -> Outcome | Failure:
        if self._run is None:
            self._run = attempt(lambda: prepared(self._job))
        return self._run if isinstance(self._run, Failure) else attempt(partial(self._run, trial))
