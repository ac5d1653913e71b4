"""Numbers as a person reads them."""

from __future__ import annotations

import math


def small(value: float | None) -> str:
    """An error or a threshold: two digits, ``1.2e-07``; empty for None."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    return f"{value:.1e}"


def ratio(value: float | None) -> str:
    """A ratio to a budget: three digits, ``0.97``; empty for None."""
    if value is None:
        return ""
    if not math.isfinite(value) or value >= 1e6:
        return "inf" if value == math.inf else small(value)
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def percent(value: float | None) -> str:
    """A share as a percentage, ``77 %``; empty for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    hundred = 100 * value
    if hundred and abs(hundred) < 0.1:
        return f"{hundred:.0e} %"
    return f"{hundred:.3g} %" if abs(hundred) < 1000 else f"{hundred:.0f} %"


def count(number: int, noun: str, plural: str = "") -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def short(value: float) -> str:
    """A large number with three digits: ``120``, ``11.7 M``, ``3.63 G``."""
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= power:
            return f"{_three_digits(value / power)} {letter}"
    return f"{value:,.0f}"


def change(before: float, after: float) -> str:
    """A relative change: ``−12.3 %``; empty without one, or from nothing."""
    if before == after or not before:
        return ""
    moved = 100 * (after - before) / before
    digits = f"{abs(moved):.2f}" if abs(moved) < 1 else f"{abs(moved):.1f}"
    return f"{'+' if moved > 0 else '−'}{digits} %"


def seconds(value: float) -> str:
    """A time with three digits: ``12.3 ms``, ``1.2 s``, ``450 µs``."""
    for least, factor, unit in ((1.0, 1.0, "s"), (1e-3, 1e3, "ms")):
        if value >= least:
            return f"{_three_digits(value * factor)} {unit}"
    return f"{_three_digits(value * 1e6)} µs"


def _three_digits(value: float) -> str:
    """Without an exponent, which three digits of 1000 and more would have."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
