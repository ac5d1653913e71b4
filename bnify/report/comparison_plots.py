"""The figures of a comparison: which there are, and what they say in words.

matplotlib is an extra, ``bnify[compare]``; it is imported where a figure is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from bnify.comparing.comparison import Comparison, Curve, Measure
from bnify.report.comparison_scales import known
from bnify.report.comparison_words import (
    listed,
    machine,
    number,
    places,
    rate,
    reached,
    seeds_in_words,
    swept,
    trained,
)
from bnify.report.numbers import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Every figure there can be, in the order of a report.
NAMES: Final = (
    "learning-curves",
    "training-loss",
    "differences",
    "steps-to-target",
    "learning-rates",
    "batch-sizes",
    "initial-scales",
    "gradient-spread",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One figure.

    Attributes:
        name: Of its files, one of :data:`NAMES`.
        title: What it shows.
        caption: How to read it, and what it was made with.
        alt: The figure in words, for who does not see it.
        height: Points, without the legend.
        lines: How many lines a legend has to name; 0 where the axes name them.
        draw: Draws it on axes.
    """

    name: str
    title: str
    caption: str
    alt: str
    height: float
    lines: int
    draw: Callable[[Axes], None]


def plots(comparison: Comparison) -> tuple[Plot, ...]:
    """The figures that the comparison has data for; none of them is drawn yet."""
    made = (
        _curves(
            comparison,
            "validation",
            "learning-curves",
            f"Validation {comparison.metric} over training",
        ),
        _curves(comparison, "train-loss", "training-loss", "Training loss"),
        _differences(comparison),
        _steps(comparison),
        _heat_map(comparison),
        _sweep(comparison, "batch", "batch-sizes", "batch size"),
        _sweep(comparison, "init", "initial-scales", "factor on the initial weights"),
        _curves(comparison, "spread", "gradient-spread", "Gradient spread over layers"),
    )
    return tuple(plot for plot in made if plot is not None)


def _with(comparison: Comparison) -> str:
    """What every caption ends with."""
    made = machine(comparison.environment)
    return f"{seeds_in_words(comparison.seeds).capitalize()}; {made}."


_CURVES: Final = {
    "validation": "",
    "train-loss": " On a fixed sample of the training data.",
    "spread": " Largest over smallest gradient norm per weight norm, over the layers; 1 is even.",
}


def _curves(comparison: Comparison, kind: str, name: str, title: str) -> Plot | None:
    found = [c for c in comparison.curves if c.name == kind and known(c.mean)]
    if not found:
        return None
    accuracy = kind == "validation" and comparison.metric == "accuracy"
    positive = all(value > 0 for curve in found for value in curve.mean)
    mean = "Geometric mean" if kind != "validation" and positive else "Mean"

    def draw(axes: Axes) -> None:
        from bnify.report.comparison_drawings import curves

        label = {"train-loss": "training loss", "spread": "largest / smallest"}.get(
            kind, f"validation {comparison.metric}"
        )
        curves(axes, found, label=label, top=1.0 if accuracy else None)

    return Plot(
        name=name,
        title=title,
        caption=f"{mean} and 95 % interval, each norm at its own best learning rate."
        f"{_CURVES[kind]} {_with(comparison)}",
        alt=f"{title}, at the last step: {_last(found)}.",
        height=210,
        lines=len(found),
        draw=draw,
    )


def _last(curves: Sequence[Curve]) -> str:
    """Where curves end, in words."""
    ends = [(c.norm, (known(c.mean[-1:]) or [math.nan])[0]) for c in curves]
    return ", ".join(f"{norm} {value:.3g}" for norm, value in ends)


def _differences(comparison: Comparison) -> Plot | None:
    drawn: list[tuple[Measure, Measure | None]] = []
    for arm in trained(comparison):
        best = comparison.measure(arm.norm, "metric")
        equal = comparison.measure(arm.norm, "metric", "equal-lr")
        if best is None or best.difference is None or not known((best.difference.mean,)):
            continue  # the reference, or figures that are no numbers
        drawn.append((best, equal if equal is not None and equal.lr != best.lr else None))
    if not drawn:
        return None
    reference, decimals = comparison.reference, places(comparison)

    def draw(axes: Axes) -> None:
        from bnify.report.comparison_drawings import forest

        forest(axes, comparison, drawn)

    said = [
        f"{best.norm} {number(best.difference.mean, decimals)}, {best.difference.verdict.value}"
        for best, _ in drawn
        if best.difference is not None
    ]
    rates = sorted({equal.lr for _, equal in drawn if equal is not None})
    also = f"; open marks: at {listed(map(rate, rates))}, the best of {reference}" if rates else ""
    return Plot(
        name="differences",
        title=f"Test {comparison.metric} against {reference}",
        caption="Mean paired difference and its 95 % interval, each norm at its own best learning "
        f"rate{also}. {'Right' if comparison.higher_is_better else 'Left'} of 0 is better. "
        + _with(comparison),
        alt=f"Difference in test {comparison.metric} to {reference}: {'; '.join(said)}.",
        height=50 + 24.0 * len(drawn),
        lines=0,
        draw=draw,
    )


def _steps(comparison: Comparison) -> Plot | None:
    found = [comparison.measure(arm.norm, "steps") for arm in trained(comparison)]
    measures = [m for m in found if m is not None and (known(m.values) or m.censored)]
    if not measures or comparison.target is None:
        return None

    def draw(axes: Axes) -> None:
        from bnify.report.comparison_drawings import steps_to_target

        steps_to_target(axes, comparison, measures)

    goal = f"{number(comparison.target, places(comparison))} validation {comparison.metric}"
    said = ", ".join(f"{m.norm} {reached(m, comparison.steps)}" for m in measures)
    return Plot(
        name="steps-to-target",
        title=f"Training steps to {goal}",
        caption="A dot a seed, bars at the medians. A triangle at the dashed line is a run that "
        f"did not get there in {comparison.steps} steps. {_with(comparison)}",
        alt=f"Median steps to {goal}: {said}.",
        height=50 + 26.0 * len(measures),
        lines=0,
        draw=draw,
    )


def _heat_map(comparison: Comparison) -> Plot | None:
    cells = swept(comparison, "lr")
    if not cells:
        return None

    def draw(axes: Axes) -> None:
        from bnify.report.comparison_drawings import heat_map

        heat_map(axes, comparison)

    lost = sum(cell.diverged for cell in cells)
    runs = sum(cell.runs for cell in cells)
    norms = dict.fromkeys(cell.norm for cell in cells)
    least, most = min(cell.runs for cell in cells), max(cell.runs for cell in cells)
    mean = f"Mean of {most if least == most else f'{least}–{most}'} runs" if most > 1 else "One run"
    seeds = "of the search for learning rates, which has seeds of its own"
    if most > len(comparison.seeds):  # the figures' seeds are in it, where learning rates are swept
        seeds = "seeds of the search for learning rates and of the figures together"
    best = [f"{arm.norm} {rate(arm.best_lr)}" for arm in trained(comparison)]
    return Plot(
        name="learning-rates",
        title=f"Validation {comparison.metric} by learning rate",
        caption=f"{mean} a cell, {seeds}. Light is good. Hatched: runs diverged, as many as "
        "written. "
        f"On {machine(comparison.environment)}.",
        alt=f"{lost} of {runs} runs diverged. Best learning rates: {', '.join(best) or 'none'}.",
        height=42 + 27.0 * len(norms),
        lines=0,
        draw=draw,
    )


def _sweep(comparison: Comparison, axis: str, name: str, along: str) -> Plot | None:
    cells = [cell for cell in swept(comparison, axis) if math.isfinite(cell.metric)]
    if not cells:
        return None

    def draw(axes: Axes) -> None:
        from bnify.report.comparison_drawings import sweep

        sweep(axes, comparison, axis, label=f"test {comparison.metric}", along=along)

    lost = any(cell.diverged for cell in cells)
    least = min(cell.at for cell in cells)
    said = ", ".join(
        f"{c.norm} {number(c.metric, places(comparison))}" for c in cells if c.at == least
    )
    how = {"batch": "; learning rates are scaled down for small batches"}.get(axis, "")
    what = {"batch": "batch size", "init": "scale of the initial weights"}[axis]
    return Plot(
        name=name,
        title=f"Test {comparison.metric} by {what}",
        caption=f"Mean of {count(max(c.runs for c in cells), 'run')} and 95 % interval{how}."
        + (" × marks points where runs diverged." * lost)
        + f" {_with(comparison)}",
        alt=f"At {along} {rate(least)}: {said}.",
        height=210,
        lines=len({cell.norm for cell in cells}),
        draw=draw,
    )
