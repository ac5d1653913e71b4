"""The figures of a claim, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bnify.comparing.measures import MEANS, TARGETS, Paired
from bnify.comparing.statistics import Censored, interval, median


def number(value: float) -> str:
    """Three digits: ``0.953``, ``96``, ``1.2e+04``, ``−0.01``."""
    text = f"{value:.0f}" if 999.5 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("-", "−")


def signed(value: float) -> str:
    """``+0.012``, ``−0.003``, ``0``."""
    return f"{'+' if value > 0 else ''}{number(value)}"


def chance(p: float) -> str:
    """``p = 0.008``, ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def ends(low: float, high: float) -> str:
    """``[−0.003, +0.027]``; empty for an interval that one seed leaves infinite."""
    finite = math.isfinite(low) and math.isfinite(high)
    return f" [{signed(low)}, {signed(high)}]" if finite else ""


def seeds(count: int) -> str:
    """``1 seed``, ``8 seeds``."""
    return f"{count} seed{'s' * (count != 1)}"


def paired_words(norm: str, other: str, name: str, unit: str, paired: Paired) -> str:
    """A paired comparison: centers, what the difference is, and its p.

    Args:
        norm: The norm.
        other: What it is compared with.
        name: The measure.
        unit: What the numbers are, ``"steps"``.
        paired: The comparison.
    """
    tail = f"{chance(paired.p)}, {seeds(len(paired.seeds))}"
    if name in MEANS:
        centers = (_mean(paired.values), _mean(paired.references))
        difference = f"{signed(paired.mean)}{ends(paired.low, paired.high)}"
        return f"{norm} {centers[0]} against {other} {centers[1]} ({unit}): {difference}; {tail}"
    lost = "never reached" if name in TARGETS else "infinite"
    beyond = [
        f"{who} {values.count(None)} of {len(values)}"
        for who, values in ((norm, paired.values), (other, paired.references))
        if None in values
    ]
    ratio = "ratio unknown" if paired.ratio is None else f"ratio {number(paired.ratio)}"
    medians = [_median(side, lost) for side in (paired.values, paired.references)]
    words = f"{norm} {medians[0]} against {other} {medians[1]} ({unit}, medians), {ratio}"
    return "; ".join((words, *([f"{lost}: {', '.join(beyond)}"] if beyond else []), tail))


def _mean(values: Sequence[Censored]) -> str:
    return number(interval([value for value in values if value is not None])[0])


def _median(values: Sequence[Censored], lost: str) -> str:
    found = median(values)
    return lost if found is None else number(found)


def rate(places: Sequence[Censored], lrs: Sequence[float]) -> str:
    """The lower median of places in a grid of learning rates, -1 of which is before it."""
    middle = sorted(place for place in places if place is not None)[(len(places) - 1) // 2]
    return "at none" if middle < 0 else f"{lrs[int(middle)]:g}"
