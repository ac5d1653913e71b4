"""The result of a comparison: plain, frozen, JSON-ready data, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

SCHEMA: Final = 1


class Verdict(StrEnum):
    """What a paired difference to the reference says, after Holm's correction at 5 %."""

    HIGHER = "higher"
    LOWER = "lower"
    UNDISTINGUISHED = "not distinguished"


class Answer(StrEnum):
    """What the figures say of a claim."""

    SUPPORTED = "supported"
    UNDISTINGUISHED = "not distinguished"
    CONTRADICTED = "contradicted"
    UNTESTED = "not tested"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One kind of norm in the comparison.

    Attributes:
        norm: Its name.
        norms: How many norms the model has with it.
        parameters: All parameters of the model.
        step_ms: Median milliseconds of a training step at the usual batch size; None if left out.
        step_ratio: Median over interleaved pairs of its step time to the reference's.
        best_lr: The learning rate with the best mean validation metric; None if none trained.
        at_edge: ``"lowest"`` or ``"highest"`` where that is the end of what was tried, else "".
        left_out: Why there are no figures for it, one line; empty where there are.
        same_as: The arm that has the same norms and stands for this one; else empty.
        notes: What a reader should know of it.
    """

    norm: str
    norms: int = 0
    parameters: int = 0
    step_ms: float | None = None
    step_ratio: float | None = None
    best_lr: float | None = None
    at_edge: str = ""
    left_out: str = ""
    same_as: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A paired comparison over seeds.

    Attributes:
        mean: Mean of (value - reference's value). Of spreads the mean of log ratios. Of what can be
            censored (steps, time, spreads among which one is infinite) the mean of orders: +1 for
            a pair in which the value is the larger one, -1 for the opposite, 0 for a tie.
        low: Lower end of the 95 % interval of the mean (t, n - 1 degrees of freedom); -inf with
            one seed.
        high: Upper end; inf with one seed.
        p: Two-sided sign-flip permutation test.
        p_holm: The same after Holm's step-down over the norms of one measure.
        verdict: By ``p_holm`` at 5 %, and the sign.
    """

    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One quantity of one norm in one setting, over the seeds.

    Attributes:
        norm: The arm.
        setting: ``"best-lr"`` (each norm at its own best) or ``"equal-lr"`` (the reference's best).
        name: ``"metric"`` (test accuracy, or loss), ``"steps"`` (to the target), ``"time"``
            (seconds to the target: steps times the median time of a step), ``"gap"`` (final
            training accuracy minus validation's, for a loss the reverse: overfitting is positive),
            ``"spread-start"``, ``"spread"`` (gradient spread, median over training).
        lr: The learning rate.
        seeds: Those that count: this norm and the reference have a run of them.
        values: One a seed; None where the target was never reached.
        center: Mean of ``metric`` and ``gap``, median of the others; None when half of the runs or
            more never reached the target.
        deviation: Standard deviation over seeds (n - 1); None for medians.
        censored: How many never reached the target, or have an infinite spread.
        diverged: How many diverged.
        difference: To the reference; None for the reference itself.
        ratio: Median over pairs of value / reference's, of ``steps``, ``time`` and spreads; None
            where it cannot be known.
    """

    norm: str
    setting: str
    name: str
    lr: float
    seeds: tuple[int, ...]
    values: tuple[float | None, ...]
    center: float | None
    deviation: float | None = None
    censored: int = 0
    diverged: int = 0
    difference: Difference | None = None
    ratio: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Learning curve at the best learning rate: mean over seeds, and the 95 % interval's ends.

    Attributes:
        norm: The arm.
        name: ``"validation"`` or ``"train"`` (metric), ``"validation-loss"``, ``"train-loss"``, or
            ``"spread"``. Mean and interval are geometric for the spread, and for a loss that is
            always above 0.
        steps: Along the axis.
        mean: At each step.
        low: At each step.
        high: At each step.
    """

    norm: str
    name: str
    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One point of a grid: a norm at one learning rate, batch size or initial scale.

    Attributes:
        norm: The arm.
        axis: ``"lr"``, ``"batch"`` or ``"init"``.
        at: The learning rate, batch size or scale.
        metric: Mean of the metric over the runs (validation for ``lr``, test for the others).
        low: Lower end of the 95 % interval; the mean itself for one run.
        high: Upper end.
        runs: How many.
        diverged: How many of them diverged.
        lr: The learning rate that was used there.
    """

    norm: str
    axis: str
    at: float
    metric: float
    low: float
    high: float
    runs: int
    diverged: int
    lr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim about normalization, answered for the case at hand.

    Attributes:
        name: A short name for JSON, ``"fewer-steps"``.
        claim: The claim in words.
        answer: What the figures say.
        figure: The figures in words; for an untested claim, what would test it.
        p: After Holm over all tested claims; None where nothing was tested.
    """

    name: str
    claim: str
    answer: Answer
    figure: str
    p: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Which normalization helps this model on this data, with what certainty.

    Attributes:
        model: The SPEC, or the class of a live model.
        data: What was trained on, in words: ``"digits: 1,077 / 360 / 360 samples of (784,)"``.
        task: ``"classification"`` or ``"regression"``.
        metric: ``"accuracy"`` or ``"loss"``; what "metric" means everywhere here.
        higher_is_better: Of the metric.
        reference: The arm that the others are compared with: ``"none"`` or ``"as-is"``.
        arms: All arms, in order, those left out too.
        seeds: The seeds of the figures.
        target: The metric that ``steps`` and ``time`` run to; None where no arm trained.
        steps: Training steps of a run.
        batch_size: Samples per step.
        optimizer: In words.
        measures: By arm, setting and name.
        curves: By arm.
        grid: Cells of all axes.
        claims: One a claim, in order.
        cuts: What the budget cut, one sentence each; empty where nothing was.
        notes: Whatever else a reader should know, one sentence each.
        partial: Why some runs are missing (interrupted, failed); empty where none is.
        seconds: Wall clock of the whole comparison.
        environment: Versions, device, threads, seed, hashes.
    """

    model: str
    data: str
    task: str
    metric: str
    higher_is_better: bool
    reference: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    target: float | None
    steps: int
    batch_size: int
    optimizer: str
    measures: tuple[Measure, ...] = ()
    curves: tuple[Curve, ...] = ()
    grid: tuple[Cell, ...] = ()
    claims: tuple[Claim, ...] = ()
    cuts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    partial: str = ""
    seconds: float = 0.0
    environment: Mapping[str, Any] | None = None

    def measure(self, norm: str, name: str, setting: str = "best-lr") -> Measure | None:
        """One quantity of one norm, or None."""
        for found in self.measures:
            if (found.norm, found.name, found.setting) == (norm, name, setting):
                return found
        return None

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON-ready data."""
        return {"schema": SCHEMA, "verb": "compare", **asdict(self)}
