"""Axes whose ticks are plain numbers: 0, 1, 3, 10; never 10 to a power."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from bnify.report.comparison_style import INK, RULE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

#: Below this ratio of largest to smallest, a logarithmic axis has too few round numbers.
_NARROW = 4.0
_MOST_TICKS = 8


def finite(values: Iterable[float | None]) -> list[float]:
    """The values, those that are no finite number as NaN, which is not drawn."""
    return [v if v is not None and math.isfinite(v) else math.nan for v in values]


def known(values: Iterable[float | None]) -> list[float]:
    """The finite values."""
    return [v for v in values if v is not None and math.isfinite(v)]


def plain(value: float) -> str:
    """A tick's label: ``0.003``, ``500``, ``20 k``."""
    for least, unit, letter in ((1e9, 1e9, " G"), (1e6, 1e6, " M"), (1e4, 1e3, " k")):
        if abs(value) >= least:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def steps_axis(axes: Axes, last: float) -> None:
    """A logarithmic x axis of training steps that has a place for step 0."""
    axes.set_xscale("symlog", linthresh=1, linscale=0.45)
    ticks = [0.0, *round_numbers(1, max(last, 1))]
    axes.set_xticks(ticks, [plain(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(-0.08, max(last, 1) * 1.12)


def ratio_axis(axes: Axes, which: Literal["x", "y"], values: Iterable[float | None]) -> None:
    """A logarithmic axis with plain numbers; linear where values are close, or not above 0."""
    numbers = known(values)
    if not numbers or min(numbers) <= 0 or max(numbers) / min(numbers) < _NARROW:
        return
    low, high = min(numbers), max(numbers)
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis: Axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(round_numbers(low, high))
    axis.set_ticks([], minor=True)
    axis.set_major_formatter(lambda value, _: plain(value))


def round_numbers(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high``, both above 0, at even ratios; few enough to read."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for mantissas in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**e for e in range(first, last + 1) for m in mantissas]
        found = [float(f"{v:.6g}") for v in found if low * 0.999 <= v <= high * 1.001]
        if len(found) <= _MOST_TICKS:
            return found
    return found[:: math.ceil(len(found) / _MOST_TICKS)]


def quiet(axes: Axes, *, grid: Literal["x", "y", "both"] = "y") -> None:
    """Two spines, a light grid behind the data, no ticks."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
        axes.spines[side].set_linewidth(0.6)
    axes.grid(True, axis=grid, color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=4)
