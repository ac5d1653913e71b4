"""Which trials are run, and what a budget leaves of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnify.comparing.budget import Costs, cut_words, fitted, refitted, wanted
from bnify.comparing.pilot import Pilot
from bnify.comparing.question import LEARNING_RATES, NORMS, Question
from bnify.comparing.schedule import Schedule, Selection, select
from bnify.comparing.trial import Outcome, Trial
from bnify.errors import UsageError
from bnify.strict_json import dumps

SIX = ("none", "batch", "batch-noaffine", "group", "layer", "rms")


class Part:
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size


class Sizes:
    """The sizes of digits, without the data."""

    train, validation, test = Part(1077), Part(360), Part(360)


def costs(ms=1.0, norms=SIX):
    pilot = Pilot(
        step_ms=dict.fromkeys(norms, ms),
        ratio=dict.fromkeys(norms, 1.0),
        size_ms={2: ms / 2, 8: ms / 2, 32: ms, 128: 4 * ms},
    )
    return Costs.of(pilot, Question(), Sizes)


def full(**options):
    return wanted(Question(**options), Sizes)[0]


def test_the_wanted_schedule_is_the_question():
    schedule = full(sweep=("lr", "batch", "init"))
    assert schedule.steps == 15 * (1077 // 32)
    assert schedule.lrs == LEARNING_RATES["sgd"]
    assert schedule.seeds == tuple(range(10))
    assert not set(schedule.seeds) & set(schedule.tuning_seeds)
    assert list(schedule.sweeps) == ["lr", "batch", "init"]
    assert Schedule.from_dict(json.loads(dumps(schedule.to_dict()))) == schedule


def test_batch_sizes_beyond_the_data_are_refused_with_words():
    schedule, notes = wanted(Question(sweep=("batch",), batch_sizes=(2, 4096)), Sizes)
    assert schedule.sweeps["batch"] == (2.0,)
    assert notes == ["no run at batch size 4096: there are 1077 training samples"]


def test_a_sweep_without_a_size_that_fits_is_no_cut():
    wants, notes = wanted(Question(sweep=("batch",), batch_sizes=(4096,)), Sizes)
    assert wants.sweeps == {}
    assert notes
    assert not list(cut_words(wants, fitted(wants, SIX, costs(0.1), seconds=1e4, workers=1)))


def test_no_trial_of_the_figures_comes_twice_and_seeds_come_in_blocks():
    schedule = full(sweep=("lr", "batch", "init"))
    best = dict.fromkeys(SIX, 0.1)
    trials = list(schedule.figures(SIX, Selection(best=best, equal_lr=0.1, target=0.9)))
    assert len(trials) == len(set(trials))
    seeds = [trial.seed for trial in trials]
    assert seeds == sorted(seeds)
    # 7 learning rates (the best and equal one among them), 3 other sizes, 4 other scales.
    assert len(trials) == 10 * 6 * (7 + 3 + 4)


def test_a_norm_that_never_trained_has_no_figures():
    selection = Selection(best={"none": 0.1, "batch": None}, equal_lr=0.1, target=0.9)
    norms = {t.norm for t in full().figures(("none", "batch"), selection)}
    assert norms == {"none"}


def test_small_batches_see_as_many_samples_up_to_a_limit():
    schedule = replace(full(), steps=100)
    assert schedule.batch_trial("none", 8, 0, 0.4).steps == 400
    assert schedule.batch_trial("none", 2, 0, 0.4).steps == 400
    assert schedule.batch_trial("none", 128, 0, 0.4).steps == 100
    assert schedule.batch_trial("none", 8, 0, 0.4).lr == pytest.approx(0.1)
    assert schedule.batch_trial("none", 128, 0, 0.4).lr == 0.4


@settings(deadline=None, max_examples=40)
@given(ms=st.floats(0.05, 500), seconds=st.floats(1, 1e4), workers=st.integers(1, 8))
def test_what_is_kept_fits_or_is_the_smallest_there_is(ms, seconds, workers):
    wants = full(sweep=("lr", "batch", "init"))
    schedule = fitted(wants, SIX, costs(ms), seconds=seconds, workers=workers)
    everything = Selection(best=dict.fromkeys(SIX, wants.lrs[-1]), equal_lr=wants.lrs[0], target=0)
    needed = costs(ms).seconds(schedule.tuning(SIX)) + costs(ms).seconds(
        schedule.figures(SIX, everything)
    )
    smallest = len(schedule.seeds) == 2 and not schedule.sweeps
    assert smallest or needed <= max(0, seconds) * workers
    assert set(schedule.lrs) <= set(wants.lrs)
    assert set(schedule.sweeps.get("lr", ())) <= set(schedule.lrs)
    assert bool(list(cut_words(wants, schedule))) == (schedule != wants)


def test_a_budget_that_is_enough_cuts_nothing():
    wants = full()
    assert fitted(wants, SIX, costs(0.5), seconds=120, workers=2) == wants
    assert fitted(wants, SIX, costs(50), seconds=float("inf"), workers=1) == wants


def test_cuts_go_from_the_least_to_the_most_harmful():
    wants = full()
    a_bit = fitted(wants, SIX, costs(1.4), seconds=120, workers=2)
    assert len(a_bit.seeds) == 10
    assert len(a_bit.tuning_seeds) == 1
    much = fitted(wants, SIX, costs(5), seconds=120, workers=2)
    assert len(much.seeds) >= 6
    assert much.steps < wants.steps
    words = list(cut_words(wants, much))
    assert f"{much.steps} steps a run instead of {wants.steps}" in words


def test_after_tuning_only_seeds_and_sweeps_are_cut():
    wants = full(sweep=("init",))
    selection = Selection(best=dict.fromkeys(SIX, 0.1), equal_lr=0.1, target=0.9)
    less = refitted(wants, wants, SIX, selection, costs(10), seconds=60, workers=2)
    assert (less.steps, less.lrs, less.tuning_seeds) == (wants.steps, wants.lrs, wants.tuning_seeds)
    assert less.seeds != wants.seeds


def test_after_a_quick_tuning_seeds_and_sweeps_come_back():
    wants = full(sweep=("lr", "init"))
    selection = Selection(best=dict.fromkeys(SIX, 0.1), equal_lr=0.1, target=0.9)
    tuned = replace(wants, lrs=wants.lrs[::2], seeds=(0, 1), sweeps={})
    more = refitted(wants, tuned, SIX, selection, costs(0.1), seconds=600, workers=2)
    assert (more.seeds, more.sweeps["lr"]) == (wants.seeds, tuned.lrs)


def test_norms_are_dropped_before_seeds_that_are_needed_but_never_below_five_arms():
    wants = full()
    less = fitted(wants, SIX, costs(4), seconds=120, workers=2, droppable=("rms", "layer"))
    assert less.dropped == ("rms",)
    assert less.norms(SIX) == ["none", "batch", "batch-noaffine", "group", "layer"]
    assert len(less.seeds) >= 8
    assert "no runs with rms norm" in list(cut_words(wants, less))
    assert fitted(wants, SIX, costs(4), seconds=120, workers=2).dropped == ()


def test_an_unfinished_tuning_keeps_what_every_norm_has():
    schedule = full()
    trials = list(schedule.tuning(SIX))
    first = set(trials[: len(SIX) * 3 + 2])
    kept = schedule.as_far_as(first, SIX)
    assert kept.lrs == (0.03, 0.1, 0.3)  # from the middle outwards
    assert kept.tuning_seeds == schedule.tuning_seeds[:1]
    one_seed = schedule.as_far_as(set(trials[: len(trials) // 2 + 5]), SIX)
    assert one_seed.lrs == schedule.lrs
    assert one_seed.tuning_seeds == schedule.tuning_seeds[:1]
    assert schedule.as_far_as(set(trials[:3]), SIX) is None


def outcome(trial, metric, loss=1.0, diverged=None, error=""):
    return Outcome(
        trial=trial,
        steps=(0,),
        validation_loss=(loss,),
        final_validation=metric,
        diverged=diverged,
        error=error,
    )


def tuned(scores, *, schedule=None):
    """Outcomes from norm → lr → metric; None for a diverged run."""
    schedule = schedule or replace(full(), lrs=(0.01, 0.1, 1.0))
    found = {}
    for norm, by_lr in scores.items():
        for lr, metric in zip(schedule.lrs, by_lr, strict=True):
            for seed in schedule.tuning_seeds:
                trial = schedule.trial(norm, lr, seed)
                gone = metric is None
                found[trial] = outcome(trial, 0.1 if gone else metric, diverged=1 if gone else None)
    return schedule, found


def test_the_best_learning_rate_is_chosen_by_validation():
    schedule, found = tuned({"none": (0.7, 0.9, None), "batch": (0.8, 0.85, 0.95)})
    chosen = select(schedule, ("none", "batch"), found, reference="none", higher=True)
    assert chosen.best == {"none": 0.1, "batch": 1.0}
    assert chosen.equal_lr == 0.1
    assert chosen.target == 0.879  # 95 % of .925


def test_the_target_is_what_the_median_arm_nearly_reaches():
    names = ("none", "batch", "layer")
    schedule, found = tuned(dict(zip(names, ((0.1,) * 3, (0.8,) * 3, (0.9,) * 3), strict=True)))
    assert select(schedule, names, found, reference="none", higher=True).target == 0.76
    asked = select(schedule, names, found, reference="none", higher=True, target=0.5)
    assert asked.target == 0.5


def test_equal_scores_go_to_the_smaller_loss_then_to_the_smaller_rate():
    schedule, found = tuned({"none": (0.9, 0.9, 0.9)})
    assert select(schedule, ("none",), found, reference="none", higher=True).best == {"none": 0.01}
    for trial in [t for t in found if t.lr == 1.0]:
        found[trial] = outcome(trial, 0.9, loss=0.5)
    assert select(schedule, ("none",), found, reference="none", higher=True).best == {"none": 1.0}


def test_a_loss_is_minimised_and_its_target_is_above():
    schedule, found = tuned({"none": (0.7, 0.2, 0.5)})
    chosen = select(schedule, ("none",), found, reference="none", higher=False)
    assert (chosen.best["none"], chosen.target) == (0.1, 0.22)


def test_a_norm_that_diverged_or_failed_everywhere_has_no_learning_rate():
    schedule, found = tuned({"none": (None, None, None), "batch": (0.5, 0.6, None)})
    chosen = select(schedule, ("none", "batch"), found, reference="none", higher=True)
    assert chosen.best == {"none": None, "batch": 0.1}
    assert chosen.equal_lr == 0.1  # of the first that trained
    for trial in list(found):
        found[trial] = outcome(trial, 0.5, error="it raised")
    nothing = select(schedule, ("none", "batch"), found, reference="none", higher=True)
    assert nothing.best == {"none": None, "batch": None}
    assert nothing.target is None


@given(
    st.builds(
        Outcome,
        trial=st.builds(
            Trial,
            norm=st.sampled_from(NORMS),
            lr=st.floats(1e-9, 1e3),
            batch_size=st.integers(1, 1024),
            steps=st.integers(1, 10**6),
            seed=st.integers(0, 10**6),
            init_scale=st.floats(1e-6, 1e6),
        ),
        steps=st.lists(st.integers(0, 10**6), max_size=4).map(tuple),
        train=st.lists(st.floats(), max_size=4).map(tuple),
        spread=st.lists(st.floats(), max_size=4).map(tuple),
        test=st.floats(),
        test_loss=st.floats(),
        diverged=st.none() | st.integers(1, 100),
        error=st.text(max_size=20) | st.just("inf"),
    )
)
def test_outcomes_survive_json_bit_for_bit(made):
    back = Outcome.from_dict(json.loads(dumps(made.to_dict())))
    assert repr(back) == repr(made)  # NaN is not equal to itself


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norms": ("batch", "weird")}, "unknown norm 'weird'"),
        ({"norms": ("auto",)}, "unknown norm 'auto'"),
        ({"norms": ()}, "no norms"),
        ({"sweep": ("lrs",)}, "unknown sweep 'lrs'"),
        ({"optimizer": "lion"}, "unknown optimizer"),
        ({"task": "ranking"}, "unknown task"),
        ({"seeds": 1}, "seeds=1 is out of range"),
        ({"budget": -1.0}, "budget=-1"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lrs": (0.1, 0.0)}, "lrs are numbers above 0"),
        ({"epochs": 0.0}, "epochs=0"),
        ({"epochs": float("nan")}, "epochs=nan"),
        ({"epochs": float("inf")}, "epochs=inf"),
        ({"lrs": (float("nan"),)}, "lrs are numbers above 0"),
        ({"lrs": (float("inf"),)}, "lrs are numbers above 0"),
        ({"target": float("nan")}, "target=nan"),
        ({"seed": 10**20}, "seed=1"),
        ({"tuning_seeds": 0}, "tuning_seeds=0"),
    ],
)
def test_a_question_that_cannot_be_right_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        Question(**options).check()
