"""A job that trains a tiny network in a blink, and trials that misbehave on demand."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bnify.comparing.trial import Outcome, Trial
from bnify.errors import SpecError


def trials(count: int, *, norm: str = "batch", lr: float = 0.1) -> list[Trial]:
    return [Trial(norm=norm, lr=lr, batch_size=8, steps=12, seed=seed) for seed in range(count)]


def train(trial: Trial) -> Outcome:
    """Real training: threads, oneDNN and the random generator all have their say."""
    generator = torch.Generator().manual_seed(trial.seed)
    torch.manual_seed(trial.seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 64, 32), nn.ReLU(), nn.Linear(32, 4),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=trial.lr, momentum=0.9)
    losses = []
    for _ in range(trial.steps):
        x = torch.randn(trial.batch_size, 1, 8, 8, generator=generator)
        y = x.mean((1, 2, 3)).gt(0).long() + 2 * x.std((1, 2, 3)).gt(1).long()
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return Outcome(
        trial=trial,
        steps=tuple(range(trial.steps)),
        train_loss=tuple(losses),
        test=weights.double().pow(2).sum().item(),
        test_loss=float("inf") if trial.seed % 5 == 4 else losses[-1],
    )


@dataclass(frozen=True)
class TinyJob:
    """Trains; leaves ``prepared-PID`` and ``began-SEED`` in a folder for tests to look at."""

    folder: Path | None = None

    def prepare(self) -> Callable[[Trial], Outcome]:
        print("prepare prints")
        os.system("echo a child of prepare prints")
        if self.folder is not None:
            (self.folder / f"prepared-{os.getpid()}").touch()

        def run(trial: Trial) -> Outcome:
            print("a trial prints")
            if self.folder is not None:
                (self.folder / f"began-{trial.seed}").touch()
            self.before(trial)
            return train(trial)

        return run

    def before(self, trial: Trial) -> None:
        pass


class SlowJob(TinyJob):
    """Every trial takes a minute and hides what interrupts it."""

    def before(self, trial: Trial) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with suppress(KeyboardInterrupt):
                time.sleep(0.05)


class UnevenJob(TinyJob):
    """The first trial takes longest."""

    def before(self, trial: Trial) -> None:
        time.sleep(0.5 if trial.seed == 0 else 0.0)


class DyingJob(TinyJob):
    """Trial 3 kills its process, as the kernel does when memory is short."""

    def before(self, trial: Trial) -> None:
        if trial.seed == 3:
            os.kill(os.getpid(), signal.SIGKILL)


class RaisingJob(TinyJob):
    def before(self, trial: Trial) -> None:
        if trial.seed == 2:
            raise ConnectionRefusedError("the trial's own")


class UnpreparedJob(TinyJob):
    def prepare(self) -> Callable[[Trial], Outcome]:
        raise SpecError("no network there", hint="look elsewhere")


class LeavingJob(TinyJob):
    """User code that leaves the process."""

    def prepare(self) -> Callable[[Trial], Outcome]:
        sys.exit(5)


class StubbornError(Exception):
    """Cannot be unpickled: its constructor wants more than pickle gives."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first}, {second}")


class StubbornJob(TinyJob):
    def prepare(self) -> Callable[[Trial], Outcome]:
        raise StubbornError("one", "two")


class UnpicklableJob(TinyJob):
    def __reduce__(self):
        raise TypeError("cannot pickle '_thread.lock' object")


class UnloadableJob(TinyJob):
    """Can be sent but not received, like a class of an interactive session."""

    def __reduce__(self):
        return _only_here, (os.getpid(),)


def _only_here(process: int) -> TinyJob:
    if process != os.getpid():
        raise AttributeError("can't get attribute 'Net' on <module '__main__'>")
    return TinyJob()


class LargeJob(TinyJob):
    """More than any pipe holds."""

    def __reduce__(self):
        return _of_bytes, (b"x" * (1 << 22),)


def _of_bytes(ballast: bytes) -> TinyJob:
    assert len(ballast) == 1 << 22
    return TinyJob()


class ParentJob(TinyJob):
    """Starts a process of its own, as a DataLoader with workers does."""

    def before(self, trial: Trial) -> None:
        import multiprocessing

        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
        child.start()
        child.join()


def processes_of(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in folder.glob("prepared-*")]


def alive(processes: Sequence[int]) -> list[int]:
    """Which of them run still; a zombie does not."""
    running = []
    for process in processes:
        with suppress(OSError):
            stat = Path(f"/proc/{process}/stat").read_text()
            if stat.rpartition(")")[2].split()[0] != "Z":
                running.append(process)
    return running


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def interrupted_at_work(running: Iterator[Outcome], folder: Path) -> None:
    """Drive an engine of two workers until both are at work, and press Ctrl-C."""

    def press() -> None:
        wait_for(lambda: len(list(folder.glob("began-*"))) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        next(running)
    except KeyboardInterrupt:
        return
    finally:
        thread.join()
    raise AssertionError("a trial of a minute ended")
