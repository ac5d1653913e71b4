"""What is read off the runs of a comparison, one number a seed, and how two arms are paired."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from bnify.comparing.comparison import Arm, Difference, Measure
from bnify.comparing.schedule import Schedule, Selection
from bnify.comparing.statistics import (
    INFINITE,
    Censored,
    Horizons,
    deviation,
    holm,
    interval,
    median,
    median_ratio,
    order,
    sign_flip,
    verdict,
)
from bnify.comparing.trial import Outcome, Trial

SETTINGS: Final = ("best-lr", "equal-lr")
#: Measures whose differences are those of the values.
MEANS: Final = ("metric", "gap")
#: Measures that grow by factors: their differences are those of logarithms, base e.
SPREADS: Final = ("spread-start", "spread")
#: Measures up to a horizon: their differences are orders, +1 where the norm takes more.
TARGETS: Final = ("steps", "time")
MEASURES: Final = ("metric", *TARGETS, "gap", *SPREADS)
#: Times up to this factor apart are equal: what a step takes is measured once, for all seeds, and
#: its noise must not count as a finding of each of them.
SAME_TIME: Final = 1.05

#: Seed → its value, None where it is beyond the horizon. A seed without a run is not there.
Values = Mapping[int, Censored]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """A norm against another over the seeds that both have.

    Attributes:
        seeds: Which.
        values: The norm's, one a seed; None where censored.
        references: The other's.
        differences: What was tested, one a seed: see :func:`differences_of`.
        mean: Of the differences.
        low: Lower end of its 95 % t interval.
        high: Upper end.
        p: Two-sided sign-flip test, not corrected.
        ratio: Median of value / reference where it is known, of all but metric and gap.
    """

    seeds: tuple[int, ...]
    values: tuple[Censored, ...]
    references: tuple[Censored, ...]
    differences: tuple[float, ...]
    mean: float
    low: float
    high: float
    p: float
    ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """The runs of a comparison.

    Attributes:
        schedule: Which there should be.
        selection: Learning rates and target.
        arms: By name, in order.
        outcomes: Those that there are, by trial.
        metric: ``"accuracy"`` or ``"loss"``.
        higher: Whether a larger metric is better.
    """

    schedule: Schedule
    selection: Selection
    arms: Mapping[str, Arm]
    outcomes: Mapping[Trial, Outcome]
    metric: str
    higher: bool

    def stand_in(self, norm: str) -> str:
        """The arm with these norms: ``"as-is"`` or ``"layer"``, say, where it has the same."""
        arm = self.arms.get(norm)
        return norm if arm is None else arm.same_as or norm

    def usable(self, trial: Trial) -> Outcome | None:
        """What came of a trial; None where it was not run, or the user's code raised."""
        outcome = self.outcomes.get(trial)
        return None if outcome is None or outcome.error else outcome

    def lr(self, norm: str, setting: str) -> float | None:
        """The learning rate of a norm in a setting; None for an arm that was left out."""
        best = self.selection.best.get(norm)
        if norm not in self.arms or self.arms[norm].left_out or best is None:
            return None
        return best if setting == "best-lr" else self.selection.equal_lr

    def at(self, norm: str, setting: str) -> dict[int, Outcome]:
        """The runs of a norm in a setting, by seed."""
        lr = self.lr(norm, setting)
        if lr is None:
            return {}
        trials = [self.schedule.trial(norm, lr, seed) for seed in self.schedule.seeds]
        found = {trial.seed: self.usable(trial) for trial in trials}
        return {seed: outcome for seed, outcome in found.items() if outcome is not None}

    def values(self, norm: str, name: str, setting: str = "best-lr") -> dict[int, Censored]:
        """One quantity of a norm, by seed; see :class:`~.comparison.Measure` for the names."""
        found = {}
        for seed, run in self.at(norm, setting).items():
            value = self._value(run, name)
            if value is None or not math.isnan(value):  # NaN: this run has no such quantity
                dead = name in SPREADS and value in (0.0, math.inf)  # a layer without a gradient
                found[seed] = None if dead else value
        return found

    def _value(self, run: Outcome, name: str) -> Censored:
        side = 1.0 if self.higher else -1.0
        match name:
            case "metric":
                return run.test if math.isfinite(run.test) else math.nan
            case "gap":  # a run that diverged is scored as a constant: it has not fitted anything
                gap = math.nan if run.diverged is not None else run.train[-1] - run.final_validation
                return side * gap if math.isfinite(gap) else math.nan
            case "steps":
                return self._steps(run)
            case "time":
                steps, step_ms = self._steps(run), self.arms[run.trial.norm].step_ms
                if self.selection.target is None or step_ms is None:
                    return math.nan
                return None if steps is None else steps * step_ms / 1000
            case "spread-start":
                return run.spread[0] if run.spread else math.nan
            case "spread":
                known = [spread for spread in run.spread[1:] if not math.isnan(spread)]
                return (median(known) or math.inf) if known else math.nan
            case _:
                raise ValueError(f"no measure {name!r}")

    def _steps(self, run: Outcome) -> Censored:
        if self.selection.target is None:
            return math.nan
        looks = zip(run.steps, run.validation, strict=True)
        return next((float(steps) for steps, metric in looks if self.reached(metric)), None)

    def reached(self, metric: float) -> bool:
        """Whether a validation metric is as good as the target, or better."""
        target = self.selection.target
        return target is not None and (metric >= target if self.higher else metric <= target)

    def horizon(self, norm: str, name: str) -> float:
        """What a censored value of a norm is above."""
        match name:
            case "steps":
                return float(self.schedule.steps)
            case "time":
                return self.schedule.steps * (self.arms[norm].step_ms or 0.0) / 1000
            case _:
                return math.inf

    def compare(self, norm: str, other: str, name: str, setting: str = "best-lr") -> Paired | None:
        """A norm against another in one quantity; None without a seed that both have."""
        return pair(
            self.values(norm, name, setting),
            self.values(other, name, setting),
            name,
            (self.horizon(norm, name), self.horizon(other, name)),
        )


def pair(values: Values, others: Values, name: str, horizons: Horizons = INFINITE) -> Paired | None:
    """Compare over the seeds that both have; None without one.

    Args:
        values: Of the norm.
        others: Of what it is compared with.
        name: The measure.
        horizons: What censored ones of either are above.
    """
    seeds = sorted(values.keys() & others.keys())
    if not seeds:
        return None
    ours, theirs = tuple(values[s] for s in seeds), tuple(others[s] for s in seeds)
    differences = differences_of(ours, theirs, name, horizons)
    mean, low, high = interval(differences)
    if by_order(ours, theirs, name):
        low, high = max(low, -1.0), min(high, 1.0)  # a mean of orders is never beyond
    return Paired(
        seeds=tuple(seeds),
        values=ours,
        references=theirs,
        differences=differences,
        mean=mean,
        low=low,
        high=high,
        p=sign_flip(differences),
        ratio=None if name in MEANS else median_ratio(ours, theirs, horizons),
    )


def by_order(values: Sequence[Censored], others: Sequence[Censored], name: str) -> bool:
    """Whether pairs are compared by who has more: always up to a target, and where infinite."""
    return name in TARGETS or None in values or None in others


def differences_of(
    values: Sequence[Censored], others: Sequence[Censored], name: str, horizons: Horizons
) -> tuple[float, ...]:
    """What is tested of each pair.

    value - other for ``metric`` and ``gap``; log(value / other) for spreads; the order (+1, 0, -1)
    for ``steps`` and ``time``, and for spreads too where one of them is infinite. Times within
    :data:`SAME_TIME` are equal.
    """
    pairs = list(zip(values, others, strict=True))
    if by_order(values, others, name):
        same = SAME_TIME if name == "time" else 1.0
        return tuple(float(order(v, o, horizons, same)) for v, o in pairs)
    known = [(v, o) for v, o in pairs if v is not None and o is not None]
    if name in SPREADS:
        return tuple(math.log(v) - math.log(o) for v, o in known)
    return tuple(v - o for v, o in known)


def measures(runs: Runs, reference: str) -> Iterator[Measure]:
    """All measures of all arms, by arm, setting and name; Holm over the norms of each."""
    drafts = {
        (norm, setting, name): _drafted(runs, norm, reference, setting, name)
        for norm in runs.arms
        for setting in SETTINGS
        for name in MEASURES
    }
    adjusted: dict[tuple[str, str, str], float] = {}
    for setting in SETTINGS:
        for name in MEASURES:
            found = {
                key: paired.p
                for key, (_, paired) in drafts.items()
                if paired is not None and key[1:] == (setting, name)
            }
            adjusted |= zip(found, holm(list(found.values())), strict=True)
    for key, (measure, paired) in drafts.items():
        if measure is None:
            continue  # an arm that was left out, or a quantity that it has not
        if paired is None:
            yield measure
            continue
        difference = Difference(
            mean=paired.mean,
            low=paired.low,
            high=paired.high,
            p=paired.p,
            p_holm=adjusted[key],
            verdict=verdict(paired.mean, adjusted[key]),
        )
        yield replace(measure, difference=difference, ratio=paired.ratio)


def _drafted(
    runs: Runs, norm: str, reference: str, setting: str, name: str
) -> tuple[Measure | None, Paired | None]:
    """A measure without its difference, and what that is made of."""
    values, lr = runs.values(norm, name, setting), runs.lr(norm, setting)
    paired = None if norm == reference else runs.compare(norm, reference, name, setting)
    if norm != reference and runs.lr(reference, setting) is not None:
        values = {seed: values[seed] for seed in (paired.seeds if paired else ())}
    if not values or lr is None:
        return None, None
    known = [value for value in values.values() if value is not None]
    center = interval(known)[0] if name in MEANS else median(list(values.values()))
    measure = Measure(
        norm=norm,
        setting=setting,
        name=name,
        lr=lr,
        seeds=tuple(values),
        values=tuple(values.values()),
        center=center,
        deviation=deviation(known) if name in MEANS and len(known) > 1 else None,
        censored=len(values) - len(known),
        diverged=sum(runs.at(norm, setting)[seed].diverged is not None for seed in values),
    )
    return measure, paired
