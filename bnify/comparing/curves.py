"""Learning curves over seeds, and the grids of the sweeps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from bnify.comparing.comparison import Cell, Curve
from bnify.comparing.measures import Runs
from bnify.comparing.statistics import interval
from bnify.comparing.trial import Outcome, Trial

CURVES: Final = ("validation", "train", "validation-loss", "train-loss", "spread")


def band(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval; the mean alone of one value."""
    mean, low, high = interval(values)
    return (mean, low, high) if len(values) > 1 else (mean, mean, mean)


def curves(runs: Runs) -> tuple[tuple[Curve, ...], tuple[str, ...]]:
    """The curves of each arm at its best learning rate, and what a reader should know of them.

    After a run diverged its metric is that of the best constant answer on the validation data, and
    it has no loss and no spread. Numbers that are not finite are left out of the mean.
    """
    drawn: list[Curve] = []
    notes: list[str] = []
    for norm in runs.arms:
        of_seeds = list(runs.at(norm, "best-lr").values())
        ended = [run for run in of_seeds if run.diverged is not None]
        if ended:
            notes.append(
                f"{norm}: curves of the metric go on at that of the best constant answer where "
                f"{len(ended)} of {len(of_seeds)} runs diverged, those of loss and spread go on "
                "without them"
            )
        for name in CURVES:
            curve, dropped = _curve(norm, name, of_seeds)
            if curve is not None:
                drawn.append(curve)
            if dropped:
                notes.append(
                    f"{norm}: {dropped} values that are not finite are left out of its {name} curve"
                )
    return tuple(drawn), tuple(notes)


def _curve(norm: str, name: str, of_seeds: Sequence[Outcome]) -> tuple[Curve | None, int]:
    """The curve, and how many numbers were not finite; None where no number was."""
    points: list[tuple[int, float, float, float]] = []
    dropped = 0
    # On a logarithmic axis the interval of an arithmetic mean would end below the axis.
    losses = {"validation-loss": "validation_loss", "train-loss": "train_loss"}
    geometric = name == "spread" or (
        name in losses and all(v > 0 for run in of_seeds for v in getattr(run, losses[name]))
    )
    for step in sorted({step for run in of_seeds for step in run.steps}):
        there = [value for run in of_seeds if (value := _at(run, name, step)) is not None]
        known = [value for value in there if math.isfinite(value)]
        dropped += len(there) - len(known)
        if not known:
            continue  # the curve has a gap here, which the count tells
        if geometric:
            of_logs = band([math.log(value) for value in known])
            points.append((step, _exp(of_logs[0]), _exp(of_logs[1]), _exp(of_logs[2])))
        else:
            points.append((step, *band(known)))
    if not points:
        return None, dropped
    steps, mean, low, high = zip(*points, strict=True)
    return Curve(norm=norm, name=name, steps=steps, mean=mean, low=low, high=high), dropped


def _at(run: Outcome, name: str, step: int) -> float | None:
    """A run's number at a step; None where it has none there."""
    series = {
        "validation": run.validation,
        "train": run.train,
        "validation-loss": run.validation_loss,
        "train-loss": run.train_loss,
        "spread": run.spread,
    }[name]
    if run.diverged is not None and step >= run.diverged:
        return run.final_validation if name in ("validation", "train") else None
    value = dict(zip(run.steps, series, strict=True)).get(step)
    if name == "spread" and value is not None and not value > 0:
        return math.nan
    return value


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def grid(runs: Runs) -> Iterator[Cell]:
    """The cells of the learning rates, batch sizes and initial scales that were run.

    Those of the learning rates are means over the tuning runs, and over the seeds of the figures
    where these were swept, of the validation metric; also of arms that were left out.
    """
    schedule = runs.schedule
    swept = schedule.sweeps.get("lr", ())
    for norm in runs.arms:
        for lr in sorted({*schedule.lrs, *swept}):
            seeds = [*schedule.tuning_seeds] if lr in schedule.lrs else []
            seeds += schedule.seeds if lr in swept else ()
            trials = [schedule.trial(norm, lr, seed) for seed in seeds]
            yield from _cell(runs, "lr", lr, trials)
    for axis in ("batch", "init"):
        for norm in runs.arms:
            for at in schedule.sweeps.get(axis, ()):
                yield from _cell(runs, axis, at, sweep_trials(runs, norm, axis, at))


def sweep_trials(runs: Runs, norm: str, axis: str, at: float) -> list[Trial]:
    """The trials of one batch size or initial scale; none for an arm that was left out."""
    best, schedule = runs.lr(norm, "best-lr"), runs.schedule
    if best is None:
        return []
    if axis == "batch":
        return [schedule.batch_trial(norm, int(at), seed, best) for seed in schedule.seeds]
    return [schedule.init_trial(norm, at, seed, best) for seed in schedule.seeds]


def _cell(runs: Runs, axis: str, at: float, trials: Sequence[Trial]) -> Iterator[Cell]:
    """The cell of these trials; none where no run has a finite metric."""
    found = [outcome for trial in trials if (outcome := runs.usable(trial)) is not None]
    scored = [(run.final_validation if axis == "lr" else run.test, run) for run in found]
    scored = [(metric, run) for metric, run in scored if math.isfinite(metric)]
    if not scored:
        return
    mean, low, high = band([metric for metric, _ in scored])
    yield Cell(
        norm=trials[0].norm,
        axis=axis,
        at=at,
        metric=mean,
        low=low,
        high=high,
        runs=len(scored),
        diverged=sum(run.diverged is not None for _, run in scored),
        lr=trials[0].lr,
    )
