"""The analysis: what was planted is found, and what is missing is said."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from synthetic import STEPS, Truth, World, diverging, failed, without

from bnify.comparing.comparison import Verdict
from bnify.comparing.curves import CURVES
from bnify.comparing.measures import MEASURES, SETTINGS, pair
from bnify.comparing.trial import Outcome
from bnify.strict_json import dumps

PLAIN = Truth()


def _world(**truths):
    return World(truths={"none": PLAIN, **truths})


def _verdicts(comparison, setting="best-lr"):
    return {
        (m.norm, m.name): m.difference.verdict
        for m in comparison.measures
        if m.setting == setting and m.difference is not None
    }


# -- measures --------------------------------------------------------------------------------------


def test_a_planted_effect_is_found_and_no_other():
    fast = Truth(metric=0.95, speed=40, gap=0.0, spread=5.0)
    found = _verdicts(_world(batch=fast, layer=PLAIN).compare())
    assert {name: found["batch", name] for name in MEASURES} == {
        "metric": Verdict.HIGHER,
        "steps": Verdict.LOWER,
        "time": Verdict.LOWER,
        "gap": Verdict.LOWER,
        "spread-start": Verdict.LOWER,
        "spread": Verdict.LOWER,
    }
    # A step of layer takes 1.3 of none's time, which is known and no matter of chance.
    others = {name for name in MEASURES if name != "time"}
    assert {found["layer", name] for name in others} == {Verdict.UNDISTINGUISHED}


def test_of_a_loss_lower_is_better_and_overfitting_is_positive():
    better = Truth(metric=0.3, gap=0.01)
    truths = {"none": Truth(metric=0.5, gap=0.1), "batch": better}
    world = World(truths=truths, higher=False, target=0.55)
    comparison = world.compare()
    found = _verdicts(comparison)
    assert found["batch", "metric"] is Verdict.LOWER
    assert found["batch", "gap"] is Verdict.LOWER
    assert comparison.measure("none", "gap").center == pytest.approx(0.1)
    steps = comparison.measure("none", "steps")
    assert steps.censored == 0, "0.5 is below 0.55"
    assert min(steps.values) > 50, "the loss of 2 that a run starts from is no target reached"
    assert World(truths={"none": PLAIN}).compare().measure("none", "gap").center == pytest.approx(
        0.03
    )


def test_the_numbers_of_a_measure():
    world = _world(batch=Truth(metric=0.93, speed=50))
    comparison, outcomes = world.compare(), world.outcomes()
    trials = {n: [world.schedule.trial(n, 0.1, s) for s in range(8)] for n in ("none", "batch")}
    ours, theirs = (np.array([outcomes[t].test for t in trials[n]]) for n in ("batch", "none"))
    metric = comparison.measure("batch", "metric")
    assert metric.values == tuple(ours)
    assert metric.center == pytest.approx(ours.mean(), rel=1e-12)
    assert metric.deviation == pytest.approx(ours.std(ddof=1), rel=1e-12)
    known = stats.ttest_1samp(ours - theirs, 0).confidence_interval(0.95)
    assert (metric.difference.low, metric.difference.high) == pytest.approx(tuple(known), rel=1e-9)
    assert metric.ratio is None
    steps = comparison.measure("batch", "steps")
    first = [
        next(s for s, v in zip(outcomes[t].steps, outcomes[t].validation, strict=True) if v > 0.8)
        for t in trials["batch"]
    ]
    assert steps.values == tuple(first)
    assert steps.center == np.median(first)
    assert steps.deviation is None
    assert steps.difference.mean == -1.0
    time = comparison.measure("batch", "time")
    assert time.values == pytest.approx([1.3 * step / 1000 for step in first])
    assert time.ratio == pytest.approx(1.3 * steps.ratio)
    spread = comparison.measure("batch", "spread")
    logs = np.log(spread.values) - np.log(comparison.measure("none", "spread").values)
    assert spread.difference.mean == pytest.approx(logs.mean(), rel=1e-9)
    assert comparison.measure("none", "metric").difference is None


def test_holm_counts_the_norms_of_one_measure_in_one_setting():
    good = Truth(metric=0.95, speed=50)
    comparison = _world(batch=good, group=good, layer=good).compare()
    for setting in SETTINGS:
        for norm in ("batch", "group", "layer"):
            difference = comparison.measure(norm, "metric", setting).difference
            assert difference.p == 2 / 2**8
            assert difference.p_holm == 3 * 2 / 2**8


def test_equal_lr_is_the_learning_rate_of_the_reference():
    world = _world(batch=Truth(metric=0.93, best=1.0, limit=3.0))
    comparison = world.compare()
    assert [a.best_lr for a in comparison.arms] == [0.1, 1.0]
    assert comparison.measure("batch", "metric").lr == 1.0
    equal = comparison.measure("batch", "metric", "equal-lr")
    assert equal.lr == 0.1
    assert equal.center < comparison.measure("batch", "metric").center


def test_edges_of_the_grid():
    world = World(
        truths={
            "none": Truth(best=0.01, noise=0),
            "batch": Truth(best=3.0, limit=3.0, noise=0),
            "rms": Truth(noise=0),
        }
    )
    assert [arm.at_edge for arm in world.compare().arms] == ["lowest", "highest", ""]
    alone = replace(world, truths={"none": PLAIN, "rms": PLAIN}, lrs=(0.1,))
    assert [arm.at_edge for arm in alone.compare().arms] == ["", ""]


# -- censoring and divergence ----------------------------------------------------------------------


def _never(*seeds):
    """These seeds stay at the constant until the end."""

    def change(outcome: Outcome) -> Outcome:
        if outcome.trial.seed not in seeds:
            return outcome
        return replace(outcome, validation=tuple(0.1 for _ in outcome.validation))

    return change


def test_never_reached_is_counted_as_more_steps():
    world = _world(batch=Truth(speed=50))
    some = replace(world, truths={**world.truths, "none": Truth(change=_never(1, 2))}).compare()
    steps = some.measure("none", "steps")
    assert (steps.censored, steps.values[1], steps.values[2]) == (2, None, None)
    assert steps.center == np.median([v or math.inf for v in steps.values])
    batch = some.measure("batch", "steps")
    assert batch.difference.mean == -1.0
    assert (batch.difference.low, batch.difference.high) == (-1.0, -1.0)
    assert batch.difference.verdict is Verdict.LOWER
    assert batch.ratio is not None, "two of eight ratios are below all others"
    none = replace(world, truths={**world.truths, "none": Truth(change=_never(*range(8)))})
    lost = none.compare()
    assert lost.measure("none", "steps").center is None
    assert lost.measure("none", "steps").censored == 8
    assert lost.measure("batch", "steps").ratio is None
    assert lost.measure("batch", "steps").difference.verdict is Verdict.LOWER
    both = _world(batch=Truth(change=_never(*range(8))))
    both = replace(both, truths={**both.truths, "none": Truth(change=_never(*range(8)))}).compare()
    assert both.measure("batch", "steps").difference.p == 1.0


def test_a_mean_of_orders_is_not_said_to_be_beyond_one():
    ours = dict.fromkeys(range(8), 10.0)
    paired = pair(ours, {**dict.fromkeys(range(7), 20.0), 7: 10.0}, "steps", (400.0, 400.0))
    assert paired.mean == -7 / 8
    assert (paired.low, paired.high < 0) == (-1.0, True)
    one = pair({0: 10.0}, {0: 20.0}, "steps", (400.0, 400.0))
    assert (one.low, one.mean, one.high, one.p) == (-1.0, -1.0, 1.0, 1.0)
    assert pair({0: 10.0}, {1: 20.0}, "steps") is None


def test_a_dear_step_is_not_beaten_by_what_was_never_reached_in_less_time():
    """none was watched for 0.4 s; batch got there after 0.39 · 5 s: nobody knows who is faster."""
    late = Truth(speed=380, noise=0.0001)
    world = _world(batch=late)
    world = replace(
        world,
        truths={"none": Truth(change=_never(*range(8))), "batch": late},
        arms={"batch": {"step_ms": 5.0}},
    )
    comparison = world.compare()
    assert comparison.measure("batch", "steps").difference.verdict is Verdict.LOWER
    assert comparison.measure("batch", "time").difference.mean == 0.0


def test_a_diverged_run_keeps_its_score_and_has_no_gap():
    world = World(truths={"none": Truth(change=diverging(0, 3)), "batch": PLAIN})
    comparison = world.compare()
    none = comparison.measure("none", "metric")
    assert (none.diverged, none.values[0], none.values[3]) == (2, 0.1, 0.1)
    assert len(comparison.measure("none", "gap").values) == 6
    assert len(comparison.measure("batch", "gap").values) == 6, "in pairs"
    assert any("2 of 8 runs diverged; they have no gap" in note for note in comparison.notes)
    assert comparison.measure("none", "steps").censored == 2


def test_a_dead_layer_is_the_worst_spread():
    def dead(outcome: Outcome) -> Outcome:
        spread = (0.0, *(math.inf for _ in outcome.spread[1:]))
        return replace(outcome, spread=spread) if outcome.trial.seed < 3 else outcome

    comparison = World(truths={"none": Truth(change=dead), "batch": Truth(spread=5)}).compare()
    none, batch = (comparison.measure(norm, "spread") for norm in ("none", "batch"))
    assert none.censored == 3
    assert math.isfinite(none.center)
    assert comparison.measure("none", "spread-start").censored == 3
    assert batch.difference.mean == -1.0, "by order, where a logarithm would be infinite"
    assert batch.difference.verdict is Verdict.LOWER
    curve = next(c for c in comparison.curves if (c.norm, c.name) == ("none", "spread"))
    assert all(map(math.isfinite, curve.mean))
    assert any("not finite are left out of its spread curve" in note for note in comparison.notes)


def test_an_unknown_spread_is_missing_and_not_the_worst():
    def unknown(outcome: Outcome) -> Outcome:
        return replace(outcome, spread=tuple(math.nan for _ in outcome.spread))

    comparison = World(truths={"none": PLAIN, "batch": Truth(change=unknown)}).compare()
    assert comparison.measure("batch", "spread") is None
    assert comparison.measure("batch", "metric") is not None
    json.loads(dumps(comparison.to_dict()))


# -- what is missing -------------------------------------------------------------------------------


def test_missing_seeds_are_left_out_in_pairs_and_told():
    world = World(
        truths={"none": Truth(change=without(7)), "batch": Truth(change=without(0)), "rms": PLAIN}
    )
    comparison = world.compare(partial="interrupted after 40 training runs")
    sizes = {n: len(comparison.measure(n, "metric").values) for n in ("none", "batch", "rms")}
    assert sizes == {"none": 7, "batch": 6, "rms": 7}
    everything = world.outcomes()
    batch = [everything[world.schedule.trial("batch", 0.1, seed)].test for seed in range(1, 7)]
    assert comparison.measure("batch", "metric").values == tuple(batch)
    assert any(note.startswith("6 of 8 seeds count for batch:") for note in comparison.notes)
    assert any(note.startswith("7 of 8 seeds count for none, rms:") for note in comparison.notes)
    assert comparison.partial == "interrupted after 40 training runs"


def test_an_arm_that_failed_is_left_out_with_its_error():
    error = "RuntimeError: shapes differ"
    everywhere = tuple(range(8))
    comparison = World(
        truths={
            "none": PLAIN,
            "batch": Truth(change=failed(*everywhere, error=error)),
            "group": Truth(change=failed(10_000, error=error)),
            "layer": Truth(change=failed(2, error=error)),
            "rms": Truth(limit=0.0),
            "instance": Truth(left_out="no layer takes an instance norm"),
        }
    ).compare()
    arms = {arm.norm: arm for arm in comparison.arms}
    assert list(arms) == ["none", "batch", "group", "layer", "rms", "instance"]
    assert arms["batch"].left_out == arms["group"].left_out == error
    assert arms["group"].best_lr is None
    assert not arms["layer"].left_out
    assert arms["layer"].notes == (f"1 of 8 runs failed: {error}",)
    assert "every run diverged" in arms["rms"].left_out
    assert "0.01 to 3" in arms["rms"].left_out
    assert arms["instance"].left_out == "no layer takes an instance norm"
    assert {m.norm for m in comparison.measures} == {"none", "layer"}
    assert {c.norm for c in comparison.curves} == {"none", "layer"}
    assert {c.norm for c in comparison.grid} == {"none", "batch", "group", "layer", "rms"}
    assert len(comparison.measure("layer", "metric").values) == 7


def test_without_a_reference_the_others_have_figures_and_no_difference():
    comparison = World(truths={"none": Truth(limit=0.0), "batch": PLAIN}).compare()
    batch = comparison.measure("batch", "metric")
    assert len(batch.values) == 8
    assert batch.difference is None
    assert comparison.target is not None
    assert any("that the median arm has" in note for note in comparison.notes)


def test_where_nothing_trained_nothing_is_compared():
    world = World(truths={"none": Truth(limit=0.0), "batch": Truth(limit=0.0)})
    comparison = world.compare()
    assert comparison.measures == comparison.curves == ()
    assert comparison.target is None
    assert all(arm.left_out for arm in comparison.arms)
    assert {cell.diverged for cell in comparison.grid} == {2}
    assert any("no arm trained" in note for note in comparison.notes)
    json.loads(dumps(comparison.to_dict()))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_an_interrupted_comparison_is_analysed_as_far_as_it_goes(share):
    world = _world(batch=PLAIN, group=PLAIN)
    outcomes = world.outcomes()
    kept = dict(list(outcomes.items())[: int(share * len(outcomes))])
    comparison = world.compare(kept, partial="interrupted")
    json.loads(dumps(comparison.to_dict()))
    said = " ".join(comparison.notes)
    assert "no arm trained" not in said
    assert ("no learning rate was chosen" in said) == (share == 0)
    if share == 0:
        assert {arm.left_out for arm in comparison.arms} == {
            "its learning rate was not tuned: runs are missing"
        }


def test_no_seed_in_common_is_told():
    world = World(
        truths={
            "none": Truth(change=without(0, 1, 2, 3)),
            "batch": Truth(change=without(4, 5, 6, 7)),
        }
    )
    comparison = world.compare()
    assert comparison.measure("batch", "metric") is None
    assert any(note.startswith("no seed counts for batch") for note in comparison.notes)


def test_one_seed_has_figures_and_no_verdict():
    comparison = World(
        truths={"none": PLAIN, "batch": Truth(metric=0.99, speed=20)}, seeds=1
    ).compare()
    difference = comparison.measure("batch", "metric").difference
    assert (difference.low, difference.high, difference.p) == (-math.inf, math.inf, 1.0)
    assert comparison.measure("batch", "metric").deviation is None
    assert {m.difference.verdict for m in comparison.measures if m.difference} == {
        Verdict.UNDISTINGUISHED
    }
    assert any(
        "1 seed over 1 norm cannot reach p < 0.05: 6 seeds can" in n for n in comparison.notes
    )
    json.loads(dumps(comparison.to_dict()))


def test_too_few_seeds_for_so_many_norms_are_told():
    five = dict.fromkeys(("batch", "group", "layer", "rms", "instance"), PLAIN)
    notes = World(truths={"none": PLAIN, **five}, seeds=6).compare().notes
    assert "6 seeds over 5 norms cannot reach p < 0.05: 8 seeds can" in notes
    notes = World(truths={"none": PLAIN, **five}, seeds=8).compare().notes
    assert not any("over 5 norms" in note for note in notes)


# -- curves and grids ------------------------------------------------------------------------------


def test_curves_are_means_with_intervals():
    world = _world(batch=Truth(metric=0.95))
    comparison, outcomes = world.compare(), world.outcomes()
    assert [(c.norm, c.name) for c in comparison.curves] == [
        (norm, name) for norm in ("none", "batch") for name in CURVES
    ]
    curve = next(c for c in comparison.curves if (c.norm, c.name) == ("batch", "validation"))
    last = [outcomes[world.schedule.trial("batch", 0.1, s)].validation[-1] for s in range(8)]
    assert curve.steps == tuple(range(0, STEPS + 1, 10))
    assert curve.mean[-1] == pytest.approx(np.mean(last))
    known = stats.t.interval(0.95, 7, np.mean(last), stats.sem(last))
    assert (curve.low[-1], curve.high[-1]) == pytest.approx(known)
    spread = next(c for c in comparison.curves if (c.norm, c.name) == ("batch", "spread"))
    every = [outcomes[world.schedule.trial("batch", 0.1, s)].spread[-1] for s in range(8)]
    assert spread.mean[-1] == pytest.approx(stats.gmean(every))
    assert 0 < spread.low[-1] < spread.mean[-1] < spread.high[-1]


def test_curves_of_diverged_runs_go_on_at_the_constant():
    comparison = World(truths={"none": Truth(change=diverging(0, 1), noise=0)}).compare()
    curves = {c.name: c for c in comparison.curves}
    assert curves["validation"].mean[-1] == pytest.approx((6 * 0.9 + 2 * 0.1) / 8)
    assert curves["validation-loss"].mean[-1] == pytest.approx(2.0 - 0.9), "of those that went on"
    assert all(map(math.isfinite, curves["train-loss"].high))
    assert any("2 of 8 runs diverged" in note for note in comparison.notes)
    assert any("left out of its train-loss curve" in note for note in comparison.notes)


def test_the_grid_of_learning_rates_has_tuning_runs_and_swept_seeds():
    world = _world(batch=Truth(limit=3.0))
    cells = {(c.norm, c.at): c for c in world.compare().grid if c.axis == "lr"}
    assert set(cells) == {(n, lr) for n in ("none", "batch") for lr in world.lrs}
    assert {cell.runs for cell in cells.values()} == {2}
    assert (cells["none", 3.0].diverged, cells["batch", 3.0].diverged) == (2, 0)
    assert cells["none", 3.0].metric == pytest.approx(0.1)
    other_test = World(truths={"none": Truth(change=lambda o: replace(o, test=0.2))}).compare()
    best = next(c for c in other_test.grid if c.at == 0.1)
    assert best.metric == pytest.approx(0.9, abs=0.02), "of the validation data"
    swept = replace(world, sweeps={"lr": (0.1, 3.0)}).compare()
    runs = {(c.norm, c.at): c.runs for c in swept.grid if c.axis == "lr"}
    assert (runs["none", 0.1], runs["none", 3.0], runs["none", 1.0]) == (10, 10, 2)


def test_the_grids_of_batch_sizes_and_scales():
    def tested(trial):
        return 0.5 if trial.batch_size == 2 else 0.9 if trial.batch_size > 2 else 0.7

    world = _world(batch=Truth(tested=tested))
    world = replace(world, sweeps={"batch": (2, 32, 128), "init": (0.1, 1.0)})
    comparison = world.compare()
    cells = {(c.norm, c.axis, c.at): c for c in comparison.grid}
    small = cells["batch", "batch", 2]
    assert small.metric == pytest.approx(0.5, abs=0.01)
    assert small.low < small.metric < small.high
    assert small.lr == pytest.approx(0.1 * 2 / 32)
    assert (small.runs, small.diverged) == (8, 0)
    assert cells["batch", "init", 1.0].metric == comparison.measure("batch", "metric").center
    assert cells["batch", "batch", 32].metric == comparison.measure("batch", "metric").center
    alone = replace(world, seeds=1).compare()
    cell = next(c for c in alone.grid if (c.norm, c.axis, c.at) == ("batch", "init", 0.1))
    assert cell.low == cell.metric == cell.high


# -- the whole -------------------------------------------------------------------------------------


def test_what_is_given_is_handed_on():
    comparison = _world(batch=PLAIN).compare(
        notes=("a note",), seconds=12.5, environment={"device": "cpu"}
    )
    assert comparison.notes[0] == "a note"
    assert (comparison.seconds, comparison.environment) == (12.5, {"device": "cpu"})
    assert (comparison.steps, comparison.batch_size) == (STEPS, 32)
    assert comparison.seeds == tuple(range(8))
    read = json.loads(dumps(comparison.to_dict()))
    assert read["measures"][0]["name"] == "metric"
    assert len(read["claims"]) == 10


@given(st.randoms(use_true_random=False))
@settings(max_examples=5, deadline=None)
def test_the_order_of_the_runs_does_not_matter(random):
    world = World(
        truths={
            "none": Truth(change=diverging(1)),
            "batch": Truth(metric=0.93, change=without(2)),
            "group": Truth(change=failed(3)),
        },
        sweeps={"batch": (2,), "init": (0.1, 1.0), "lr": (0.01, 0.1, 1.0, 3.0)},
    )
    outcomes = world.outcomes()
    shuffled = list(outcomes.items())
    random.shuffle(shuffled)
    assert world.compare(dict(shuffled)) == world.compare(outcomes)


def test_numbers_from_json_give_the_same_comparison():
    world = _world(batch=Truth(metric=0.93, change=diverging(1)))
    outcomes = world.outcomes()
    read = [Outcome.from_dict(json.loads(dumps(o.to_dict()))) for o in outcomes.values()]
    assert world.compare({o.trial: o for o in read}) == world.compare(outcomes)


@given(
    st.lists(
        st.sampled_from([PLAIN, Truth(limit=0.0), Truth(change=failed(1)), Truth(best=0.01)]),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 3),
    st.booleans(),
    st.sets(st.integers(0, 3)),
)
@settings(max_examples=25, deadline=None)
def test_every_comparison_is_whole(truths, seeds, higher, missing):
    """Whatever is missing: pairs fit, ends enclose the mean, and the JSON can be read."""
    norms = ("batch", "group", "batch-noaffine")
    world = World(
        truths={"none": Truth(change=without(*missing)), **dict(zip(norms, truths, strict=False))},
        seeds=seeds,
        higher=higher,
        sweeps={"lr": (0.01, 0.1), "init": (0.1, 1.0)},
    )
    comparison = world.compare()
    json.loads(dumps(comparison.to_dict()))
    for measure in comparison.measures:
        assert 1 <= len(measure.values) <= seeds
        assert measure.censored == measure.values.count(None)
        difference = measure.difference
        if difference is not None:
            assert difference.low <= difference.mean <= difference.high
            assert difference.p <= difference.p_holm <= 1
    for curve in comparison.curves:
        columns = (curve.steps, curve.mean, curve.low, curve.high)
        assert len({len(column) for column in columns}) == 1
        assert all(a <= b <= c for b, a, c in zip(*columns[1:], strict=True))
    for cell in comparison.grid:
        assert cell.low <= cell.metric <= cell.high


def test_a_loss_above_zero_has_a_geometric_mean_and_another_one_an_arithmetic():
    world = World(truths={"none": PLAIN, "batch": replace(PLAIN, change=_below_zero)})
    curves = {(c.norm, c.name): c for c in world.compare().curves}
    for norm, mean in (("none", statistics.geometric_mean), ("batch", statistics.fmean)):
        runs = [o for t, o in world.outcomes().items() if t.norm == norm and t.lr == 0.1]
        last = [o.train_loss[-1] for o in runs if o.trial.seed in world.schedule.seeds]
        assert curves[norm, "train-loss"].mean[-1] == pytest.approx(mean(last))


def _below_zero(outcome):
    return replace(outcome, train_loss=tuple(loss - 10 for loss in outcome.train_loss))


def test_a_target_that_an_untrained_model_has_is_told():
    usual = _world(batch=PLAIN).compare()
    assert not any("before their first step" in note for note in usual.notes)
    easy = replace(_world(batch=PLAIN), target=0.05).compare()
    assert any("16 of 16 runs are at the target before" in note for note in easy.notes)


def test_tuning_runs_that_raised_are_told():
    def raising(run):
        high = run.trial.lr == 3.0
        return Outcome(trial=run.trial, error="batch at learning rate 3 raised") if high else run

    comparison = _world(batch=Truth(limit=3.0, change=raising)).compare()
    notes = {arm.norm: arm.notes for arm in comparison.arms}
    assert notes["batch"] == ("2 of 8 tuning runs failed: batch at learning rate 3 raised",)
    assert notes["none"] == ()


def test_noise_in_the_time_of_a_step_is_no_finding():
    """A step is timed once: 2 % more is there in every seed, and would have the smallest p."""
    exact = Truth(noise=0.0)
    near, far = (
        World(truths={"none": exact, "batch": exact}, arms={"batch": {"step_ms": ms}})
        for ms in (1.02, 1.2)
    )
    assert near.compare().measure("batch", "time").difference.p == 1.0
    assert far.compare().measure("batch", "time").difference.verdict is Verdict.HIGHER
