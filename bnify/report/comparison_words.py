"""The numbers and sentences that every report on a comparison shares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bnify.comparing.comparison import Arm, Cell, Comparison, Difference, Measure, Verdict
from bnify.report.numbers import count, ratio, seconds

MISSING = "–"


def listed(words: Iterable[str], last: str = "and") -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *most, end = words
    return f"{', '.join(most)} {last} {end}" if most else end


def places(comparison: Comparison) -> int:
    """Decimals of the metric: three for an accuracy, three digits of the largest mean loss."""
    if comparison.metric == "accuracy":
        return 3
    centers = [m.center for m in comparison.measures if m.name == "metric"]
    sizes = [abs(c) for c in centers if c is not None and math.isfinite(c) and c]
    return min(9, max(0, 2 - math.floor(math.log10(max(sizes))))) if sizes else 3


def number(value: float | None, decimals: int) -> str:
    """``0.953``; a dash for None, ``nan`` and ``inf`` as they are."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value).replace("-", "−")
    digits = f"{value:.{decimals}f}" if abs(value) < 1e7 else f"{value:.3g}"
    return digits.replace("-", "−")


def signed(value: float | None, decimals: int) -> str:
    """``+0.012`` or ``−0.003``."""
    text = number(value, decimals)
    return text if value is None or value < 0 or math.isnan(value) else f"+{text}"


def plus_minus(center: float | None, deviation: float | None, decimals: int) -> str:
    """``0.953 ± 0.008``, mean and standard deviation."""
    spread = "" if deviation is None else f" ± {number(deviation, decimals)}"
    return f"{number(center, decimals)}{spread if center is not None else ''}"


def interval(difference: Difference, decimals: int) -> str:
    """``+0.012 [−0.003, +0.027]``, mean and 95 % interval."""
    low, high = signed(difference.low, decimals), signed(difference.high, decimals)
    return f"{signed(difference.mean, decimals)} [{low}, {high}]"


def chance(p: float) -> str:
    """``p = 0.031``, ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {number(p, 3)}"


def rate(lr: float | None) -> str:
    """A learning rate, a scale or a size: ``0.03``."""
    return MISSING if lr is None else f"{lr:g}"


def reached(measure: Measure | None, horizon: int) -> str:
    """Median steps to the target: ``120``; ``> 500`` where most runs did not get there."""
    if measure is None:
        return MISSING
    if measure.censored and measure.censored == len(measure.values):
        return "never"
    if measure.center is None:
        return f"> {horizon}" if measure.censored else MISSING
    return number(measure.center, 0 if measure.center >= 100 else 1).removesuffix(".0")


def duration(measure: Measure | None) -> str:
    """Median time to the target."""
    known = measure is not None and measure.center is not None and math.isfinite(measure.center)
    return seconds(measure.center) if known and measure and measure.center is not None else MISSING


def times(value: float | None) -> str:
    """``0.35×``; a dash for None."""
    if value is None:
        return MISSING
    return f"{value:.2f}×" if 0.1 <= value < 9.995 else f"{ratio(value)}×"


def share(some: int, every: int) -> str:
    """``2 of 8``; empty for 0."""
    return f"{some} of {every}" if some else ""


def seeds_in_words(seeds: Sequence[int]) -> str:
    """``8 seeds (0–7)``."""
    if not seeds:
        return "no seeds"
    whole = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))) and len(seeds) > 2
    named = f"{seeds[0]}–{seeds[-1]}" if whole else ", ".join(map(str, seeds))
    return f"{count(len(seeds), 'seed')} ({named})"


def machine(environment: Mapping[str, Any] | None) -> str:
    """Device, threads and versions in one line: ``cpu, 1 thread; bnify 0.5.0, torch 2.9.1``."""
    known = environment or {}
    versions = known.get("versions") or {}
    threads = known.get("threads")
    where = [str(known.get("device") or "device unknown")]
    where += [count(threads, "thread")] if isinstance(threads, int) else []
    named = [f"{name} {versions[name]}" for name in ("bnify", "torch") if name in versions]
    return "; ".join(filter(None, (", ".join(where), ", ".join(named))))


def trained(comparison: Comparison) -> list[Arm]:
    """The arms that have a learning rate at which they train, in order."""
    return [arm for arm in comparison.arms if not arm.left_out and arm.best_lr is not None]


def without_figures(comparison: Comparison) -> tuple[str, ...]:
    """The arms that there is nothing to say of, each with its reason."""
    told = []
    for arm in comparison.arms:
        if arm.left_out:
            told.append(f"{arm.norm}: {arm.left_out}")
        elif arm.best_lr is None:
            told.append(f"{arm.norm}: at no learning rate did a run train to its end")
    return tuple(told)


def better(comparison: Comparison, verdict: Verdict) -> bool:
    """Whether the verdict on the metric is an improvement."""
    return verdict is (Verdict.HIGHER if comparison.higher_is_better else Verdict.LOWER)


def _incomparable(comparison: Comparison) -> str:
    """Why there is nothing to compare; empty where there may be something."""
    arms = [arm.norm for arm in trained(comparison)]
    if not arms and comparison.partial:
        return "Stopped before learning rates were chosen, so there is nothing to compare yet."
    if not arms:
        return "No arm trained at any learning rate, so there is nothing to compare."
    reference = comparison.reference
    if arms == [reference]:
        return f"Of {reference} alone there are figures: no norm is there to be compared with it."
    if reference not in arms:
        alone = listed(arms)
        return f"There are no figures of {reference} to compare with; those of {alone} stand alone."
    return ""


def headline(comparison: Comparison) -> str:
    """How many norms do better than the reference, in a sentence."""
    metric, reference = f"test {comparison.metric}", comparison.reference
    if unsaid := _incomparable(comparison):
        return unsaid
    found: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
    for arm in trained(comparison):
        measure = comparison.measure(arm.norm, "metric")
        if measure is None or measure.difference is None:
            continue
        verdict = measure.difference.verdict
        side = "better" if better(comparison, verdict) else "worse"
        found["open" if verdict is Verdict.UNDISTINGUISHED else side].append(arm.norm)
    if not any(found.values()):
        return f"No norm could be compared with {reference}."
    high, low = ("higher", "lower") if comparison.higher_is_better else ("lower", "higher")
    parts = [
        f"{listed(found[side])} {'reaches' if len(found[side]) == 1 else 'reach'} "
        f"a {word} {metric} than {reference}"
        for side, word in (("better", high), ("worse", low))
        if found[side]
    ]
    if not parts:
        from bnify.comparing.statistics import too_few  # numpy, which no other report needs

        few = too_few(len(comparison.seeds), len(found["open"]), "norm")
        words = (f"{reference}: {listed(found['open'])}", *few)
        return (
            f"At its own best learning rate, no norm's {metric} is distinguished from that of "
            f"{'. '.join(words)}."
        )
    if found["open"]:
        verb = "is" if len(found["open"]) == 1 else "are"
        parts.append(f"{listed(found['open'])} {verb} not distinguished from {reference}")
    return f"Each at its own best learning rate, {'; '.join(parts)}."


def answer(comparison: Comparison, arm: Arm) -> str:
    """What was found of one norm, in a sentence or two."""
    decimals = places(comparison)
    metric = comparison.measure(arm.norm, "metric")
    if metric is None:
        return "no figures."
    n = len(metric.values)
    text = (
        f"{comparison.metric} {plus_minus(metric.center, metric.deviation, decimals)} "
        f"(sd over {count(n, 'seed')}) at learning rate {rate(metric.lr)}"
    )
    difference = metric.difference
    if arm.norm == comparison.reference:
        text += ", what the others are compared with"
    elif difference is not None:
        text += f", {_against(comparison, difference, decimals)}"
    if metric.diverged:
        text += f"; {share(metric.diverged, n)} diverged"
    return f"{text}. {_speed(comparison, arm)}".rstrip()


def _against(comparison: Comparison, difference: Difference, decimals: int) -> str:
    reference = comparison.reference
    verdict = difference.verdict
    said = f"{interval(difference, decimals)}, {chance(difference.p_holm)}"
    if verdict is Verdict.UNDISTINGUISHED:
        return f"not distinguished from {reference}: {said}"
    good = "better" if better(comparison, verdict) else "worse"
    return f"{verdict.value} than {reference}, that is {good}: {said}"


def _speed(comparison: Comparison, arm: Arm) -> str:
    """Steps to the target, and what a step costs."""
    steps = comparison.measure(arm.norm, "steps")
    parts = []
    if steps is not None and comparison.target is not None:
        goal = number(comparison.target, places(comparison))
        some = share(steps.censored, len(steps.values))
        if some and steps.censored == len(steps.values):
            parts.append(f"It never reached {goal} within {comparison.steps} steps")
        else:
            never = f" ({some} never got there)" if some else ""
            median = reached(steps, comparison.steps)
            parts.append(f"It took {median} steps to {goal}{never}{_fewer(steps)}")
    if arm.step_ratio is not None and arm.norm != comparison.reference:
        parts.append(f"{'a' if parts else 'A'} step takes {times(arm.step_ratio)} the time")
    return f"{'; '.join(parts)}." if parts else ""


def _fewer(steps: Measure) -> str:
    """How the steps compare with the reference's: ``, 0.35× as many: fewer, p = 0.008``."""
    if steps.difference is None:
        return ""
    words = {Verdict.HIGHER: "more", Verdict.LOWER: "fewer"}
    said = words.get(steps.difference.verdict, steps.difference.verdict.value)
    many = "" if steps.ratio is None else f"{times(steps.ratio)} as many: "
    return f", {many}{said}, {chance(steps.difference.p_holm)}"


def swept(comparison: Comparison, axis: str) -> list[Cell]:
    """The cells of one axis, in order of the norms and along the axis."""
    order = {arm.norm: place for place, arm in enumerate(comparison.arms)}
    cells = [cell for cell in comparison.grid if cell.axis == axis]
    return sorted(cells, key=lambda cell: (order.get(cell.norm, len(order)), cell.at))
