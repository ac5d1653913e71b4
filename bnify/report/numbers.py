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
