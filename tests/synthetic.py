"""Runs of a comparison whose truth is known: learning curves that are made up, seed by seed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bnify.comparing.analysis import analyse
from bnify.comparing.comparison import Arm, Comparison
from bnify.comparing.question import Question
from bnify.comparing.schedule import Schedule, Selection, select
from bnify.comparing.trial import Outcome, Trial

STEPS = 400
#: The constant answer: 10 % of the classes, or the loss of the mean.
CONSTANT = {True: 0.1, False: 2.0}


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a norm does.

    Attributes:
        metric: Test and validation metric at the best learning rate.
        speed: The run reaches its metric at this step, at a bound.
        gap: Training metric over validation metric, as overfitting has it.
        spread: Gradient spread in training, and at the start.
        best: The best learning rate.
        limit: Above it every run diverges.
        noise: Standard deviation of metric and of the logarithms of speed and spread.
        change: Last word on an outcome: ``change(outcome) -> outcome``, or None for a missing one.
        tested: Metric on the test data for other batch sizes and scales, by trial.
        left_out: Why the arm was left out before any run.
    """

    metric: float = 0.9
    speed: float = 100
    gap: float = 0.03
    spread: float = 50.0
    best: float = 0.1
    limit: float = 1.0
    noise: float = 0.005
    change: Callable[[Outcome], Outcome | None] = lambda outcome: outcome
    tested: Callable[[Trial], float] | None = None
    left_out: str = ""


@dataclass(frozen=True, kw_only=True)
class World:
    """A comparison of norms with known truths."""

    truths: Mapping[str, Truth]
    seeds: int = 8
    sweeps: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    higher: bool = True
    reference: str = "none"
    lrs: tuple[float, ...] = (0.01, 0.1, 1.0, 3.0)
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    target: float | None = None
    first_seed: int = 0

    @property
    def schedule(self) -> Schedule:
        return Schedule(
            steps=STEPS,
            batch_size=32,
            lrs=self.lrs,
            tuning_seeds=(10_000, 10_001),
            seeds=tuple(range(self.first_seed, self.first_seed + self.seeds)),
            sweeps=self.sweeps,
        )

    @property
    def usable(self) -> list[str]:
        return [norm for norm, truth in self.truths.items() if not truth.left_out]

    def select(self, outcomes: Mapping[Trial, Outcome]) -> Selection:
        return select(
            self.schedule,
            self.usable,
            outcomes,
            reference=self.reference,
            higher=self.higher,
            target=self.target,
        )

    def outcomes(self) -> dict[Trial, Outcome]:
        """All runs, tuned as the real ones are."""
        found: dict[Trial, Outcome] = {}
        self._run(found, list(self.schedule.tuning(self.usable)))
        self._run(found, list(self.schedule.figures(self.usable, self.select(found))))
        return found

    def _run(self, found: dict[Trial, Outcome], trials: list[Trial]) -> None:
        for trial in trials:
            outcome = self.truths[trial.norm].change(self._outcome(trial))
            if outcome is not None:
                found[trial] = outcome

    def _outcome(self, trial: Trial) -> Outcome:
        truth = self.truths[trial.norm]
        common = np.random.default_rng(trial.seed).normal(size=3)
        own = np.random.default_rng([trial.seed, zlib.crc32(trial.key.encode())]).normal(size=3)
        shift = truth.noise * (common + own)
        side = 1 if self.higher else -1
        off = abs(np.log10(trial.lr / truth.best)) * 0.03 * (trial.batch_size == 32)
        metric = truth.metric - side * off + shift[0]
        if truth.tested is not None and (trial.batch_size != 32 or trial.init_scale != 1):
            metric = truth.tested(trial) + shift[0]
        speed = truth.speed * np.exp(10 * shift[1])
        spread = truth.spread * np.exp(10 * shift[2])
        constant = CONSTANT[self.higher]
        looks = tuple(range(0, trial.steps + 1, 10))
        diverged = 25 if trial.lr > truth.limit * 1.0001 else None
        if diverged is not None:
            looks = tuple(look for look in looks if look < diverged)
        validation = tuple(float(metric) if look >= speed else constant for look in looks)
        train = tuple(float(v + side * truth.gap) for v in validation)
        return Outcome(
            trial=trial,
            steps=looks,
            train=train,
            train_loss=tuple(2.0 - v for v in train) if self.higher else train,
            validation=validation,
            validation_loss=tuple(2.0 - v for v in validation) if self.higher else validation,
            spread=tuple(float(spread) for _ in looks),
            final_validation=constant if diverged else validation[-1],
            test=constant if diverged else float(metric),
            test_loss=float("inf") if diverged else float(2.0 - metric if self.higher else metric),
            diverged=diverged,
            seconds=1.0,
        )

    def compare(
        self, outcomes: Mapping[Trial, Outcome] | None = None, **options: Any
    ) -> Comparison:
        """The analysis of all runs, or of those given."""
        found = self.outcomes() if outcomes is None else outcomes
        return analyse(
            Question(target=self.target),
            self.schedule,
            self.select(found),
            [self._arm(norm, truth) for norm, truth in self.truths.items()],
            found,
            **{
                "data": "made up",
                "model": "none at all",
                "task": "classification" if self.higher else "regression",
                "metric": "accuracy" if self.higher else "loss",
                "higher": self.higher,
                "reference": self.reference,
                "optimizer": "SGD",
                **options,
            },
        )

    def _arm(self, norm: str, truth: Truth) -> Arm:
        arm = Arm(
            norm=norm,
            norms=0 if norm == "none" else 4,
            parameters=1000 if norm in ("none", "batch-noaffine") else 1064,
            step_ms=1.0 if norm == "none" else 1.3,
            step_ratio=1.0 if norm == "none" else 1.3,
        )
        if truth.left_out:
            arm = replace(arm, step_ms=None, step_ratio=None, left_out=truth.left_out)
        return replace(arm, **self.arms.get(norm, {}))


def without(*seeds: int) -> Callable[[Outcome], Outcome | None]:
    """The runs of these seeds are missing."""
    return lambda outcome: None if outcome.trial.seed in seeds else outcome


def failed(*seeds: int, error: str = "ValueError: no") -> Callable[[Outcome], Outcome | None]:
    """The user's code raised at these seeds."""

    def change(outcome: Outcome) -> Outcome:
        bad = outcome.trial.seed in seeds
        return Outcome(trial=outcome.trial, error=error) if bad else outcome

    return change


def diverging(*seeds: int, higher: bool = True) -> Callable[[Outcome], Outcome | None]:
    """The runs of these seeds diverge at step 25, with a last look whose loss is infinite."""

    def change(outcome: Outcome) -> Outcome:
        if outcome.trial.seed not in seeds:
            return outcome
        constant, inf = CONSTANT[higher], float("inf")
        return replace(
            outcome,
            steps=(0, 10, 20),
            train=(*outcome.train[:2], constant),
            train_loss=(*outcome.train_loss[:2], inf),
            validation=(constant, constant, constant),
            validation_loss=(*outcome.validation_loss[:2], inf),
            spread=outcome.spread[:3],
            final_validation=constant,
            test=constant,
            test_loss=inf,
            diverged=25,
        )

    return change
