"""Paired statistics: against scipy, as laws, and on data whose truth is known."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bnify.comparing.comparison import Verdict
from bnify.comparing.statistics import (
    EXACT,
    FLIPS,
    deviation,
    holm,
    interval,
    median,
    median_ratio,
    order,
    seeds_needed,
    sign_flip,
    smallest_p,
    t_quantile,
    too_few,
    verdict,
)

#: No subnormal numbers: their few bits are lost by any scaling.
numbers = st.floats(-1e6, 1e6).filter(lambda x: x == 0 or abs(x) > 1e-6)
differences = st.lists(numbers, min_size=1, max_size=10)
ps = st.lists(st.floats(0, 1), min_size=1, max_size=12)
censored = st.none() | st.integers(0, 500).map(float)


# -- the t interval --------------------------------------------------------------------------------


def test_the_t_quantile_is_that_of_scipy():
    freedoms = range(1, 201)
    wanted = stats.t.ppf(0.975, freedoms)
    assert [t_quantile(freedom) for freedom in freedoms] == pytest.approx(wanted, rel=0, abs=1e-9)


def test_no_degree_of_freedom_has_no_quantile():
    with pytest.raises(ValueError, match="0 degrees of freedom"):
        t_quantile(0)


@given(st.lists(numbers, min_size=2, max_size=30).filter(lambda v: np.std(v) > 1e-3))
def test_the_interval_is_that_of_scipy(values):
    mean, low, high = interval(values)
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    size = max(map(abs, values))
    assert mean == pytest.approx(np.mean(values), abs=1e-9 * size)
    assert (low, high) == pytest.approx((wanted.low, wanted.high), abs=1e-9 * size)
    assert deviation(values) == pytest.approx(np.std(values, ddof=1), rel=1e-6)


def test_a_mean_of_rounding_errors_is_none():
    differences = [0.9 - 0.8, 0.7 - 0.8, 0.3 - 0.2, 0.2 - 0.3]
    assert sum(differences) != 0
    mean, low, high = interval(differences)
    assert (mean, low) == (0.0, -high)


def test_one_value_leaves_the_interval_infinite():
    assert interval([0.25]) == (0.25, -math.inf, math.inf)
    with pytest.raises(ValueError, match="two values"):
        deviation([0.25])


@pytest.mark.parametrize("size", [1e-300, 1.0, 1e300])
def test_squares_neither_overflow_nor_vanish(size):
    values = [1.0 * size, 2.0 * size, 4.0 * size]
    mean, low, high = interval(values)
    assert low < mean < high
    assert (high - low) / size == pytest.approx(2 * t_quantile(2) * math.sqrt(7 / 9), rel=1e-9)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], [1.0, -math.inf]])
def test_what_is_not_finite_has_no_statistics(values):
    for statistic in (interval, sign_flip):
        with pytest.raises(ValueError, match="finite"):
            statistic(values)


# -- the sign-flip test ----------------------------------------------------------------------------


def _scipy_p(values):
    return stats.permutation_test(
        (np.asarray(values, dtype=float),),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
        alternative="two-sided",
    ).pvalue


@pytest.mark.parametrize("n", [2, 3, 6, 8, 11])
@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_the_exact_p_is_that_of_scipy(n, shift):
    values = np.random.default_rng(n).normal(shift, 1, n)
    assert sign_flip(values) == pytest.approx(_scipy_p(values), abs=1e-12)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_p_of_ties_is_counted_by_hand(values):
    flips = [
        sum(v if bit >> i & 1 else -v for i, v in enumerate(values))
        for bit in range(2 ** len(values))
    ]
    share = sum(abs(flip) >= abs(sum(values)) for flip in flips) / len(flips)
    assert sign_flip(values) == share
    # The same differences with the rounding that accuracies out of 360 have.
    assert sign_flip([(200 + v) / 360 - 200 / 360 for v in values]) == share


@given(differences)
def test_p_lies_between_the_smallest_and_one(values):
    assert 2.0 ** (1 - len(values)) <= sign_flip(values) <= 1


@given(differences, st.randoms(use_true_random=False))
def test_p_knows_no_sign_scale_or_order(values, random):
    p = sign_flip(values)
    assert sign_flip([-v for v in values]) == p
    assert sign_flip([v * 1e-9 for v in values]) == p
    assert sign_flip([v * 3e5 for v in values]) == p
    random.shuffle(values)
    assert sign_flip(values) == p


@given(st.integers(1, 20))
def test_no_difference_at_all_has_p_one(n):
    assert sign_flip([0.0] * n) == 1.0


@pytest.mark.parametrize("n", range(1, EXACT + 1))
def test_one_sign_throughout_has_the_smallest_p(n):
    values = np.random.default_rng(n).uniform(0.1, 1, n)
    assert sign_flip(values) == 2.0 ** (1 - n) == smallest_p(n, 1)


def test_random_flips_agree_with_all_of_them():
    """Beyond EXACT; 2¹⁷ flips still can be counted here."""
    values = np.random.default_rng(5).normal(0.35, 1, EXACT + 1)
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    exact = float(np.mean(np.abs(sums) >= abs(values.sum()) - 1e-9))
    found = sign_flip(values)
    assert 0.02 < exact < 0.5, "the example is no test of anything"
    assert found == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / FLIPS))
    assert sign_flip(values) == found, "the same flips every time"
    assert sign_flip(-values[::-1]) == found
    assert sign_flip(np.ones(60)) == 1 / (FLIPS + 1), "never 0"


# -- Holm and verdicts -----------------------------------------------------------------------------


def _holm_by_definition(values):
    """The smallest level at which the step-down still rejects each hypothesis."""
    k = len(values)
    ranked = sorted(values)
    return [
        min(1.0, max((k - j) * ranked[j] for j in range(k) if ranked[j] <= value))
        for value in values
    ]


@given(ps)
def test_holm_is_its_definition(values):
    assert holm(values) == pytest.approx(_holm_by_definition(values), abs=1e-12)


@given(ps)
def test_holm_is_monotone_and_between_raw_and_bonferroni(values):
    adjusted = holm(values)
    for raw, one in zip(values, adjusted, strict=True):
        assert raw <= one <= min(1.0, len(values) * raw) + 1e-12
    ranked = sorted(range(len(values)), key=values.__getitem__)
    assert all(adjusted[a] <= adjusted[b] for a, b in pairwise(ranked))
    reverse = holm(values[::-1])
    assert reverse[::-1] == adjusted


def test_holm_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([]) == ()


def test_verdicts():
    assert verdict(0.1, 0.049) is Verdict.HIGHER
    assert verdict(-0.1, 0.049) is Verdict.LOWER
    assert verdict(0.1, 0.05) is Verdict.UNDISTINGUISHED
    assert verdict(0.0, 0.001) is Verdict.UNDISTINGUISHED


def test_what_so_many_seeds_can_reach():
    assert smallest_p(6, 5) == pytest.approx(0.15625)
    assert smallest_p(8, 6) == pytest.approx(0.046875)
    assert smallest_p(1, 3) == 1.0
    assert [seeds_needed(k) for k in (1, 2, 3, 5, 6, 7, 10)] == [6, 7, 7, 8, 8, 9, 9]
    assert list(too_few(6, 5, "norm")) == [
        "6 seeds over 5 norms cannot reach p < 0.05: 8 seeds can"
    ]
    assert list(too_few(1, 1, "claim")) == [
        "1 seed over 1 claim cannot reach p < 0.05: 6 seeds can"
    ]
    assert list(too_few(8, 6, "norm")) == []


@given(st.integers(1, 50))
def test_the_seeds_that_are_needed_are_the_fewest(k):
    n = seeds_needed(k)
    assert smallest_p(n, k) < 0.05 <= smallest_p(n - 1, k)
    assert holm([sign_flip(np.ones(n)), *[1.0] * (k - 1)])[0] == pytest.approx(smallest_p(n, k))


# -- censored values -------------------------------------------------------------------------------


@given(censored, censored)
def test_never_reached_is_more_than_any_step(value, other):
    horizons = (500.0, 500.0)
    found = order(value, other, horizons)
    ours, theirs = (501.0 if v is None else v for v in (value, other))
    assert found == (ours > theirs) - (ours < theirs)
    assert found == -order(other, value, horizons)


def test_unlike_horizons_leave_the_order_open():
    assert order(None, 5.0, (4.0, 9.0)) == 0, "above 4: before or after 5"
    assert order(None, 3.0, (4.0, 9.0)) == 1
    assert order(5.0, None, (9.0, 4.0)) == 0
    assert order(3.0, None, (9.0, 4.0)) == -1


def test_values_that_are_nearly_the_same_have_no_order():
    assert order(1.04, 1.0, same=1.05) == order(1.0, 1.04, same=1.05) == 0
    assert order(1.06, 1.0, same=1.05) == -order(1.0, 1.06, same=1.05) == 1
    assert order(0.0, 0.0, same=1.05) == 0
    assert order(None, 9.8, (10.0, 10.0), same=1.05) == 0, "it may be 10.1"
    assert order(None, 9.0, (10.0, 10.0), same=1.05) == 1


def test_medians_that_censoring_cannot_move():
    assert median([3.0, None, 1.0]) == 3.0
    assert median([None, 2.0, None]) is None
    assert median([1.0, None]) is None, "between 1 and anything"
    assert median([]) is None
    horizons = (500.0, 500.0)
    assert median_ratio([100.0, 100.0, 100.0], [400.0, 200.0, None], horizons) == 0.25
    assert median_ratio([None, 100.0, 100.0], [400.0, 200.0, 400.0], horizons) == 0.5
    assert median_ratio([450.0, 100.0, 100.0], [None, 200.0, 400.0], horizons) is None, (
        "below 0.9, which may be below 0.5 too"
    )
    assert median_ratio([None], [None], horizons) is None
    assert median_ratio([], [], horizons) is None
    assert median_ratio([0.0], [0.0], horizons) == 1.0
    assert median_ratio([2.0], [0.0], horizons) is None
    assert median_ratio([2.0, 4.0, 6.0], [1.0, 1.0, None]) == 2.0, "None is infinity itself"


@given(
    st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=9),
)
def test_a_ratio_is_known_only_where_it_is_that_of_the_uncensored_truth(truth):
    """Cut the truth at a horizon of 500: what is said to be known must still be true."""
    ours, theirs = (
        [float(side) if side <= 500 else None for side in s] for s in zip(*truth, strict=True)
    )
    found = median_ratio(ours, theirs, (500.0, 500.0))
    if found is not None:
        assert found == pytest.approx(float(np.median([a / b for a, b in truth])), rel=1e-12)
    if None not in (*ours, *theirs):
        assert found is not None


# -- known truth -----------------------------------------------------------------------------------

NOISE = {
    "normal": lambda draw, shape: draw.normal(size=shape),
    "heavy tails": lambda draw, shape: draw.standard_t(1.5, size=shape),
    # Skewed on both sides of a pair: the difference is symmetric, as the null hypothesis has it.
    "skewed": lambda draw, shape: draw.exponential(size=shape) ** 2,
}


def _comparisons(draw, noise, seeds, norms, count):
    """Differences (count, norms, seeds) to one reference, which the norms of a seed share."""
    values = noise(draw, (count, norms + 1, seeds))
    return values[:, 1:] - values[:, :1]


@pytest.mark.parametrize("noise", NOISE)
def test_false_alarms_stay_at_five_percent(noise):
    """8 seeds, 6 norms, none of which does anything: any verdict is a false alarm."""
    count = 1000
    alarms = 0
    for comparison in _comparisons(np.random.default_rng(1), NOISE[noise], 8, 6, count):
        adjusted = holm([sign_flip(norm) for norm in comparison])
        alarms += any(
            verdict(float(norm.mean()), p) is not Verdict.UNDISTINGUISHED
            for norm, p in zip(comparison, adjusted, strict=True)
        )
    assert alarms / count <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / count)


def test_power_rises_to_eighty_percent_at_two_deviations():
    """One of 6 norms differs, 8 seeds; two standard deviations of the paired difference."""
    power = []
    for effect in (0.5, 1.0, 2.0, 3.0):
        found = 0
        draw = np.random.default_rng(2)
        for comparison in draw.normal(size=(500, 6, 8)):
            comparison[0] += effect
            p = holm([sign_flip(norm) for norm in comparison])[0]
            found += verdict(float(comparison[0].mean()), p) is Verdict.HIGHER
        power.append(found / 500)
    assert power == sorted(power)
    assert power[0] < 0.3
    assert power[2] >= 0.8
    assert power[3] >= 0.95


@pytest.mark.parametrize("kept", [0.0, 0.25, 1.0])
def test_censored_scores_find_a_planted_speedup(kept):
    """Steps cut at a horizon: the fewer are left, the less is known, and never the opposite."""
    draw = np.random.default_rng(3)
    slow = draw.uniform(300, 490, 8) + (1 - kept) * 400
    ours = [float(step) for step in draw.uniform(50, 100, 8)]
    theirs = [float(step) if step <= 500 else None for step in slow]
    scores = [order(a, b, (500.0, 500.0)) for a, b in zip(ours, theirs, strict=True)]
    assert sign_flip(scores) == smallest_p(8, 1)
    assert interval(scores)[0] == -1
