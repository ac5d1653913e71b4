"""Paired statistics over a few seeds: intervals, sign-flip tests, Holm, censored values.

A seed gives one difference between a norm and the reference. Where neither is better, each
difference is as likely as its negative, whatever its distribution: that is all the test assumes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Final, TypeAlias

import numpy as np

from bnify.comparing.comparison import Verdict

#: An adjusted p below it is a finding.
LEVEL: Final = 0.05
#: All 2ⁿ flips are counted up to so many differences, and so many random ones beyond.
EXACT: Final = 16
FLIPS: Final = 100_000
#: Sums closer than this share of Σ|d| are equal: they differ by rounding alone.
_TIE: Final = 1e-9
_CHUNK: Final = 10_000

#: A quantity that may be censored: None is "beyond the horizon".
Censored: TypeAlias = float | None
#: The horizons of a value and of the reference's. Infinite ones say that None is infinity itself.
Horizons: TypeAlias = tuple[float, float]
INFINITE: Final[Horizons] = (math.inf, math.inf)


@cache
def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t.

    With t = √n·tan θ, the density integrates to a finite sum of powers of cos θ for whole n
    (Abramowitz & Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4).

    Args:
        freedom: Degrees of freedom n.

    Raises:
        ValueError: ``freedom`` is below 1.
    """
    if freedom < 1:
        raise ValueError(f"{freedom} degrees of freedom: the t distribution has 1 or more")
    low, high = 0.0, math.pi / 2
    for _ in range(64):
        middle = (low + high) / 2
        if _central(middle, freedom) < 1 - LEVEL:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _central(theta: float, freedom: int) -> float:
    """P(|T| < √n·tan θ)."""
    sine, cosine, odd = math.sin(theta), math.cos(theta), freedom % 2
    terms, term = [], cosine if odd else 1.0
    for j in range(1, freedom // 2 + 1):
        terms.append(term)
        term *= cosine * cosine * ((2 * j) / (2 * j + 1) if odd else (2 * j - 1) / (2 * j))
    total = sine * math.fsum(terms)
    return 2 / math.pi * (theta + total) if odd else total


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and the ends of its 95 % t interval, which one value alone leaves infinite.

    A mean that rounding alone keeps from 0 is 0.

    Args:
        values: Finite, one a seed.

    Raises:
        ValueError: There is none, or one is not finite.
    """
    scaled, size = _scaled(values)
    mean = math.fsum(scaled) / len(scaled)
    if abs(mean) * len(scaled) <= _TIE * math.fsum(np.abs(scaled)):
        mean = 0.0
    if len(scaled) == 1:
        return mean * size, -math.inf, math.inf
    half = t_quantile(len(scaled) - 1) * deviation(scaled.tolist()) / math.sqrt(len(scaled))
    return mean * size, (mean - half) * size, (mean + half) * size


def deviation(values: Sequence[float]) -> float:
    """Standard deviation with n - 1 below the root.

    Args:
        values: Finite, two or more.

    Raises:
        ValueError: There are fewer, or one is not finite.
    """
    if len(values) < 2:
        raise ValueError("a deviation wants two values or more")
    scaled, size = _scaled(values)
    mean = math.fsum(scaled) / len(scaled)
    return size * math.sqrt(math.fsum((scaled - mean) ** 2) / (len(scaled) - 1))


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of the mean: the share of sign flips whose |sum| is at least the observed one.

    All 2ⁿ flips up to :data:`EXACT` differences; beyond, b of m random ones reach it and
    p = (b + 1) / (m + 1), which counts the observed one (Phipson & Smyth, Permutation P-values
    should never be zero, 2010). The random flips are the same in every call.

    Args:
        differences: Finite, one a seed. Their order does not matter.

    Raises:
        ValueError: There is none, or one is not finite.
    """
    scaled, _ = _scaled(differences)
    observed = abs(math.fsum(scaled))
    sizes = np.sort(np.abs(scaled))  # flips of sizes are flips of differences, in any order
    least = observed - _TIE * math.fsum(sizes)
    if len(sizes) <= EXACT:
        sums = sizes[:1]  # flipping every sign leaves |sum|: one sign may stay
        for size in sizes[1:]:
            sums = np.concatenate([sums + size, sums - size])
        return float(np.count_nonzero(np.abs(sums) >= least) / len(sums))
    draw, reached = np.random.default_rng(0), 0
    for _ in range(FLIPS // _CHUNK):
        signs = draw.integers(0, 2, size=(_CHUNK, len(sizes)), dtype=np.int8) * 2.0 - 1.0
        reached += int(np.count_nonzero(np.abs(signs @ sizes) >= least))
    return (reached + 1) / (FLIPS + 1)


def _scaled(values: Sequence[float]) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], float]:
    """The values over the largest of them, so that no sum or square overflows, and that one."""
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError("statistics want at least one value, and finite ones")
    size = float(np.abs(numbers).max()) or 1.0
    return numbers / size, size


def holm(ps: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down: p adjusted for testing all of them, in the order given.

    The i-th smallest of k becomes the largest of (k - j + 1)·p of the j-th smallest, j ≤ i, and 1
    at most (Holm, A simple sequentially rejective multiple test procedure, 1979).
    """
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = largest
    return tuple(adjusted)


def verdict(mean: float, p: float) -> Verdict:
    """What a mean difference and its adjusted p say at 5 %."""
    if p >= LEVEL or mean == 0:
        return Verdict.UNDISTINGUISHED
    return Verdict.HIGHER if mean > 0 else Verdict.LOWER


def smallest_p(seeds: int, tests: int) -> float:
    """The smallest p that Holm leaves of so many seeds, where one of so many tests stands out."""
    return min(1.0, tests * 2.0 ** (1 - seeds))


def seeds_needed(tests: int) -> int:
    """The fewest seeds that can reach 5 % over so many tests."""
    return next(n for n in range(1, 1000) if smallest_p(n, tests) < LEVEL)


def too_few(seeds: int, tests: int, noun: str) -> Iterator[str]:
    """A sentence where so many seeds cannot reach 5 % over so many norms or claims."""
    if smallest_p(seeds, tests) >= LEVEL:
        ours, theirs = (
            f"{n} {word}{'s' * (n != 1)}" for n, word in ((seeds, "seed"), (tests, noun))
        )
        yield f"{ours} over {theirs} cannot reach p < {LEVEL}: {seeds_needed(tests)} seeds can"


def order(
    value: Censored, reference: Censored, horizons: Horizons = INFINITE, same: float = 1.0
) -> int:
    """1 where the value is the larger, -1 where the reference is, 0 where equal or unknown.

    A value that is censored is known to be above its horizon and no more (Gehan, A generalized
    Wilcoxon test for comparing arbitrarily singly-censored samples, 1965).

    Args:
        value: 0 or above.
        reference: 0 or above.
        horizons: What a censored value, and a censored reference, are above.
        same: Values up to this factor apart are equal.
    """
    own, other = horizons
    if value is None and reference is None:
        return 0
    if value is None:
        return int(reference is not None and reference * same <= own)
    if reference is None:
        return -int(value * same <= other)
    return (value > reference * same) - (value * same < reference)


def median(values: Sequence[Censored]) -> float | None:
    """The median; None where it is censored, or there is no value."""
    if not values:
        return None
    found = statistics.median(math.inf if value is None else value for value in values)
    return found if math.isfinite(found) else None


def median_ratio(
    values: Sequence[Censored], references: Sequence[Censored], horizons: Horizons = INFINITE
) -> float | None:
    """Median over pairs of value / reference; None where the censored pairs could move it.

    Each ratio lies between two bounds. The median is known where that of the lower bounds is that
    of the upper ones.

    Args:
        values: One a seed, 0 or above.
        references: Of the same seeds.
        horizons: What a censored value, and a censored reference, are above.
    """
    if not values:
        return None
    bounds = [_ratio(v, r, horizons) for v, r in zip(values, references, strict=True)]
    low, high = (statistics.median(ends) for ends in zip(*bounds, strict=True))
    return low if low == high and math.isfinite(low) else None


def _ratio(value: Censored, reference: Censored, horizons: Horizons) -> tuple[float, float]:
    own, other = horizons
    if value is None and reference is None:
        return 0.0, math.inf
    if value is None:
        return _over(own, reference or 0.0), math.inf
    if reference is None:
        return 0.0, _over(value, other)
    known = _over(value, reference)
    return known, known


def _over(value: float, reference: float) -> float:
    if reference == 0:
        return 1.0 if value == 0 else math.inf
    return value / reference
