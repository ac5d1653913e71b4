"""The tables of a comparison; each is narrow enough for 80 columns with the usual norms."""

from __future__ import annotations

import math
from typing import Final

from bnify.comparing.comparison import Cell, Comparison, Difference, Measure, Verdict
from bnify.report.comparison_words import (
    MISSING,
    chance,
    duration,
    interval,
    number,
    places,
    plus_minus,
    rate,
    reached,
    share,
    swept,
    times,
    trained,
)
from bnify.report.document import Column, Table
from bnify.report.numbers import count, seconds

_NORM: Final = Column("Norm", short=True)
_AXES: Final = {
    "lr": "Validation {metric} by learning rate",
    "batch": "Test {metric} by batch size, with lower learning rates for small ones",
    "init": "Test {metric} by scale of the initial weights",
}


def metric_table(comparison: Comparison, setting: str = "best-lr") -> Table:
    """The test metric of each norm, and how it differs from the reference."""
    decimals = places(comparison)
    rows = []
    for arm in trained(comparison):
        measure = comparison.measure(arm.norm, "metric", setting)
        if measure is None:
            continue  # a setting that was not run for this arm has no row
        center = plus_minus(measure.center, measure.deviation, decimals)
        rows.append((arm.norm, center, *_difference(comparison, measure, decimals)))
    side = "" if comparison.higher_is_better else ", lower is better"
    own = "each norm at its own best learning rate"
    if setting == "equal-lr":
        lrs = {m.lr for m in comparison.measures if m.setting == setting}
        one = f" {rate(min(lrs))}" if len(lrs) == 1 else ""
        own = f"all at the learning rate{one}"
        if comparison.reference in (arm.norm for arm in trained(comparison)):
            own += f" that is best for {comparison.reference}"
    return Table(
        f"Test {comparison.metric}, {own} (mean ± sd over {_seeds(comparison, setting)}{side})",
        (
            _NORM,
            Column(comparison.metric.capitalize(), numeric=True),
            Column(f"Against {comparison.reference} [95 %]", numeric=True),
            Column("Verdict"),
        ),
        tuple(rows),
    )


def _seeds(comparison: Comparison, setting: str) -> str:
    """How many seeds the means are over: ``8 seeds``, or ``6–8 seeds`` where runs are missing."""
    counts = [
        len(one.values)
        for one in comparison.measures
        if (one.setting, one.name) == (setting, "metric")
    ]
    least, most = min(counts, default=0), max(counts, default=0)
    return count(most, "seed") if least == most else f"{least}–{most} seeds"


def _difference(comparison: Comparison, measure: Measure, decimals: int) -> tuple[str, str]:
    if measure.norm == comparison.reference:
        return "", "reference"
    difference = measure.difference
    return (
        ("", "") if difference is None else (interval(difference, decimals), _verdict(difference))
    )


def _verdict(difference: Difference) -> str:
    return difference.verdict.value


def training_table(comparison: Comparison) -> Table:
    """Steps and time to the target, and what a step costs."""
    rows = []
    for arm in trained(comparison):
        steps = comparison.measure(arm.norm, "steps")
        time = comparison.measure(arm.norm, "time")
        ours = arm.norm == comparison.reference
        rows.append(
            (
                arm.norm,
                rate(arm.best_lr) + {"lowest": " ≤", "highest": " ≥"}.get(arm.at_edge, ""),
                reached(steps, comparison.steps),
                share(steps.censored, len(steps.values)) if steps else "",
                "" if ours or steps is None or steps.ratio is None else times(steps.ratio),
                "" if arm.step_ms is None else seconds(arm.step_ms / 1000),
                "" if ours or arm.step_ratio is None else times(arm.step_ratio),
                duration(time),
            )
        )
    goal = MISSING if comparison.target is None else number(comparison.target, places(comparison))
    return Table(
        f"Training to a validation {comparison.metric} of {goal} (medians over seeds)",
        (
            _NORM,
            Column("Best lr", numeric=True),
            Column("Steps to target", numeric=True),
            Column("Never", numeric=True),
            Column("Steps ratio", numeric=True),
            Column("Step", numeric=True),
            Column("Step ratio", numeric=True),
            Column("Time to target", numeric=True),
        ),
        tuple(rows),
    ).without_empty_columns()


def fit_table(comparison: Comparison) -> Table:
    """Overfitting, and how unequal the layers' gradients are."""
    decimals = places(comparison)
    rows = []
    for arm in trained(comparison):
        gap = comparison.measure(arm.norm, "gap")
        start = comparison.measure(arm.norm, "spread-start")
        during = comparison.measure(arm.norm, "spread")
        rows.append(
            (
                arm.norm,
                "" if gap is None else _signed_gap(gap, decimals),
                _difference(comparison, gap, decimals)[1] if gap else "",
                _spread(start),
                _spread(during),
            )
        )
    gap_is = "training minus validation"
    if not comparison.higher_is_better:
        gap_is = "validation minus training"
    return Table(
        f"Overfitting ({gap_is} {comparison.metric}), gradient spread (median)",
        (
            _NORM,
            Column("Gap", numeric=True),
            Column("Gap's verdict"),
            Column("Spread at start", numeric=True),
            Column("Spread in training", numeric=True),
        ),
        tuple(rows),
    ).without_empty_columns()


def _spread(measure: Measure | None) -> str:
    """A median spread; infinite where most runs had a layer without a gradient."""
    if measure is None or (measure.center is None and not measure.censored):
        return ""
    return "infinite" if measure.center is None else times(measure.center)


def _signed_gap(gap: Measure, decimals: int) -> str:
    text = plus_minus(gap.center, gap.deviation, decimals)
    return f"+{text}" if gap.center is not None and gap.center >= 0 else text


def claims_table(comparison: Comparison) -> Table:
    """The claims and what the figures say of them."""
    return Table(
        "Claims, on this model and data",
        (Column("Claim"), Column("Answer", short=True), Column("Figures")),
        tuple(
            (
                claim.claim,
                claim.answer.value,
                claim.figure + ("" if claim.p is None else f" ({chance(claim.p)} after Holm)"),
            )
            for claim in comparison.claims
        ),
    )


def sweep_table(comparison: Comparison, axis: str) -> Table | None:
    """The metric along an axis; None where it was not swept. ``*`` marks runs that diverged."""
    cells = {(cell.norm, cell.at): cell for cell in swept(comparison, axis)}
    if not cells:
        return None
    along = sorted({at for _, at in cells})
    decimals = places(comparison)
    starred = any(0 < cell.diverged < cell.runs for cell in cells.values())
    words = ["“div.”: every run diverged"] if any(map(_lost, cells.values())) else []
    words += ["*: some diverged"] if starred else []
    note = f" ({'; '.join(words)})" if words else ""
    norms = dict.fromkeys(norm for norm, _ in cells)
    return Table(
        _AXES[axis].format(metric=comparison.metric) + note,
        (_NORM, *(Column(f"{at:g}", numeric=True) for at in along)),
        tuple((norm, *(_cell(cells.get((norm, at)), decimals) for at in along)) for norm in norms),
    )


def _lost(cell: Cell) -> bool:
    return bool(cell.runs) and cell.diverged >= cell.runs


def _cell(cell: Cell | None, decimals: int) -> str:
    if cell is None or not cell.runs:
        return MISSING
    if _lost(cell):
        return "div."
    star = "*" if cell.diverged else ""
    return number(cell.metric if not math.isnan(cell.metric) else None, decimals) + star


def diverged_in(comparison: Comparison, setting: str) -> str:
    """Which arms' runs diverged in a setting: ``none 2 of 8, layer 1 of 8``; empty without."""
    found = [
        f"{measure.norm} {share(measure.diverged, len(measure.values))}"
        for measure in comparison.measures
        if measure.setting == setting and measure.name == "metric" and measure.diverged
    ]
    return ", ".join(found)


def beyond_interval(comparison: Comparison, setting: str) -> list[str]:
    """Norms whose interval leaves out 0 although they are not distinguished from the reference."""
    return [
        measure.norm
        for measure in comparison.measures
        if measure.setting == setting
        and measure.name == "metric"
        and measure.difference is not None
        and measure.difference.verdict is Verdict.UNDISTINGUISHED
        and measure.difference.low * measure.difference.high > 0
    ]
