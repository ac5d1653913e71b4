"""What is drawn of a comparison, on axes that somebody else made and will write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from bnify.comparing.comparison import Cell, Comparison, Curve, Measure
from bnify.report.comparison_scales import (
    finite,
    known,
    plain,
    quiet,
    ratio_axis,
    steps_axis,
)
from bnify.report.comparison_style import INK, RULE, style_of
from bnify.report.comparison_words import number, places, swept

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAND: Final = 0.13
_SMALL: Final = 8.0
#: Letters of a name beside an axis; all of ours are shorter.
_LONG: Final = 16


def _label(norm: str) -> str:
    """The norm's name, cut where it would leave no room to draw."""
    return norm if len(norm) <= _LONG else f"{norm[: _LONG - 1]}…"


def _line(norm: str) -> dict[str, Any]:
    style = style_of(norm)
    dashes = (0, style.dashes) if style.dashes else "-"
    return {"color": style.light, "linestyle": dashes, "linewidth": 1.5, **_marker(norm)}


def _marker(norm: str) -> dict[str, Any]:
    style = style_of(norm)
    return {
        "color": style.light,
        "marker": style.marker,
        "markersize": 5,
        "markeredgewidth": 0,
    }


def curves(axes: Axes, drawn: Sequence[Curve], *, label: str, top: float | None = None) -> None:
    """Means over the steps, with bands; logarithmic upwards where that is what tells them apart.

    Args:
        axes: Where to draw.
        drawn: At least one.
        label: Of the y axis.
        top: The largest value there can be; None for a quantity that has none, which is drawn on a
            logarithmic axis.
    """
    for place, curve in enumerate(drawn):
        steps, mean = list(curve.steps), finite(curve.mean)
        # Markers of different curves are at different steps, so that they hide each other less.
        every = max(1, len(steps) // 4)
        axes.plot(
            steps,
            mean,
            label=_label(curve.norm),
            markevery=(place % every, every),
            **_line(curve.norm),
        )
        low, high = finite(curve.low), finite(curve.high)
        axes.fill_between(
            steps, low, high, color=style_of(curve.norm).light, alpha=_BAND, linewidth=0
        )
    means = known(value for curve in drawn for value in curve.mean)
    steps_axis(axes, max((step for curve in drawn for step in curve.steps), default=1))
    if top is None:
        ratio_axis(axes, "y", means)
        _around(axes, means)
    else:
        axes.set_ylim(top=min(axes.get_ylim()[1], top * 1.01))
    axes.set_xlabel("training steps")
    axes.set_ylabel(label)
    quiet(axes)


def _around(axes: Axes, means: Sequence[float]) -> None:
    """Limits by the means: the band of few seeds may reach to nothing on a logarithmic axis."""
    if axes.get_yscale() == "log":
        axes.set_ylim(min(means) / 1.6, max(means) * 1.6)


def heat_map(axes: Axes, comparison: Comparison) -> None:
    """Norms × learning rates; a cell is hatched where runs diverged, and says how many."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    cells = swept(comparison, "lr")
    norms = list(dict.fromkeys(cell.norm for cell in cells))
    rates = sorted({cell.at for cell in cells})
    # Runs that diverged are scored like a guess: they would leave one shade to all that train.
    working = known(cell.metric for cell in cells if not cell.diverged)
    low, high = min(working, default=0.0), max(working, default=1.0)
    decimals = min(3, places(comparison))
    for cell in cells:
        x, y = rates.index(cell.at), norms.index(cell.norm)
        lost = bool(cell.runs) and cell.diverged >= cell.runs
        good = math.isfinite(cell.metric) and not lost
        shade = (cell.metric - low) / (high - low) if good and high > low else 0.5
        shade = min(1.0, max(0.0, shade if comparison.higher_is_better else 1 - shade))
        fill = colormaps["cividis"](0.1 + 0.9 * shade) if good else "none"
        ink = "#000000" if shade > 0.5 else "#ffffff"
        axes.add_patch(
            Rectangle(
                (x - 0.47, y - 0.46),
                0.94,
                0.92,
                facecolor=fill,
                edgecolor=(ink if good else RULE) if cell.diverged else "none",
                linewidth=0,
                hatch="////" if cell.diverged else None,
            )
        )
        told = [number(cell.metric, decimals)] if good else []
        told += [f"{cell.diverged}/{cell.runs}"] if cell.diverged else []
        box = (
            {"facecolor": fill, "edgecolor": "none", "pad": 0.8} if cell.diverged and good else None
        )
        axes.text(
            x,
            y,
            "\n".join(told),
            ha="center",
            va="center",
            fontsize=_SMALL,
            color=ink if good else INK,
            bbox=box,
            linespacing=1.05,
        )
    axes.set_xlim(-0.5, len(rates) - 0.5)
    axes.set_ylim(len(norms) - 0.5, -0.5)
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(norms)), [_label(norm) for norm in norms])
    axes.set_xlabel("learning rate")
    quiet(axes)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def sweep(axes: Axes, comparison: Comparison, axis: str, *, label: str, along: str) -> None:
    """The metric along batch sizes or initial scales, with intervals; a cross where runs diverged.

    Args:
        axes: Where to draw.
        comparison: Its grid has cells of the axis.
        axis: ``"batch"`` or ``"init"``.
        label: Of the y axis.
        along: Of the x axis.
    """
    cells = [cell for cell in swept(comparison, axis) if math.isfinite(cell.metric)]
    norms = list(dict.fromkeys(cell.norm for cell in cells))
    for place, norm in enumerate(norms):
        ours = [cell for cell in cells if cell.norm == norm]
        # Side by side: intervals of norms that do alike would hide each other.
        aside = 1.025 ** (place - (len(norms) - 1) / 2)
        at = [cell.at * aside for cell in ours]
        axes.plot(at, [cell.metric for cell in ours], label=_label(norm), **_line(norm))
        axes.vlines(at, *_ends(ours), color=style_of(norm).light, linewidth=1.0)
        crossed = [(x, cell.metric) for x, cell in zip(at, ours, strict=True) if cell.diverged]
        if crossed:
            axes.plot(*zip(*crossed, strict=True), "x", color=INK, markersize=9, linewidth=0)
    values = sorted({cell.at for cell in cells})
    axes.set_xscale("log")
    axes.set_xticks(values, [plain(value) for value in values])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(along)
    axes.set_ylabel(label)
    if comparison.metric == "accuracy":
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.01))
    else:
        ratio_axis(axes, "y", [cell.metric for cell in cells])
    quiet(axes)


def _ends(cells: Sequence[Cell]) -> tuple[list[float], list[float]]:
    return finite(cell.low for cell in cells), finite(cell.high for cell in cells)


def steps_to_target(axes: Axes, comparison: Comparison, measures: Sequence[Measure]) -> None:
    """A dot a seed, a triangle at the last step for a run that never got there, bars at medians."""
    horizon = float(comparison.steps)
    taken = known(value for measure in measures for value in measure.values)
    for row, measure in enumerate(measures):
        style = style_of(measure.norm)
        n = len(measure.values)
        for place, value in enumerate(measure.values):
            height = row + 0.46 * ((place + 0.5) / n - 0.5)
            if value is None:
                axes.plot(
                    [horizon], [height], ">", color=style.light, markersize=6,
                    markerfacecolor="none", markeredgewidth=1.1, clip_on=False,
                )  # fmt: skip
            else:
                axes.plot([value], [height], **{**_marker(measure.norm), "alpha": 0.85})
        if measure.center is not None and math.isfinite(measure.center):
            axes.vlines(measure.center, row - 0.34, row + 0.34, color=INK, linewidth=2.2)
        if measure.censored:
            beyond = axes.get_yaxis_transform()
            words = f"never ×{measure.censored}"
            axes.text(1.03, row, words, transform=beyond, va="center", fontsize=_SMALL)
    axes.axvline(horizon, color=INK, linewidth=0.7, linestyle=(0, (2, 2)), zorder=0.5)
    ratio_axis(axes, "x", [*taken, horizon])
    _rows(axes, [measure.norm for measure in measures])
    axes.set_xlabel("training steps to the target")


def forest(
    axes: Axes, comparison: Comparison, drawn: Sequence[tuple[Measure, Measure | None]]
) -> None:
    """Differences with 95 % intervals: filled at the best rate, open at the reference's.

    Args:
        axes: Where to draw.
        comparison: Whose measures they are.
        drawn: A norm's metric at its best learning rate, and at the reference's where that is
            another.
    """
    for row, (best, equal) in enumerate(drawn):
        style = style_of(best.norm)
        offset = 0.16 if equal is not None else 0.0
        for measure, y, face in ((best, row - offset, style.light), (equal, row + offset, "none")):
            if measure is None or measure.difference is None:
                continue
            found = measure.difference
            mean, low, high = finite((found.mean, found.low, found.high))
            axes.plot([low, high], [y, y], color=style.light, linewidth=1.4)
            axes.plot(
                [mean], [y], marker=style.marker, markersize=6.5, markeredgewidth=1.1,
                color=style.light, markerfacecolor=face, linestyle="none",
            )  # fmt: skip
    axes.axvline(0, color=INK, linewidth=0.8, zorder=0.5)
    _rows(axes, [best.norm for best, _ in drawn])
    metric, reference = comparison.metric, comparison.reference
    axes.set_xlabel(f"test {metric} minus that of {reference}")
    axes.xaxis.set_major_formatter(
        lambda value, _: f"{value:+g}".replace("-", "−") if value else "0"
    )
    axes.locator_params(axis="x", nbins=6)


def _rows(axes: Axes, norms: Sequence[str]) -> None:
    axes.set_yticks(range(len(norms)), [_label(norm) for norm in norms])
    axes.set_ylim(len(norms) - 0.5, -0.5)
    quiet(axes, grid="x")
    axes.spines["left"].set_visible(False)
