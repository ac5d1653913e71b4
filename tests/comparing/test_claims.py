"""The claims: supported, contradicted and open where that was planted, untested with a reason."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from synthetic import Truth, World, diverging, failed, without

from bnify.comparing.claims import CLAIMS
from bnify.comparing.comparison import Answer
from bnify.strict_json import dumps

PLAIN = Truth()
SWEEPS = {"lr": (0.01, 0.1, 1.0, 3.0), "batch": (2.0, 32.0), "init": (0.1, 1.0, 10.0)}
NAMES = (
    "fewer-steps",
    "higher-learning-rates",
    "init-sensitivity",
    "gradient-flow",
    "small-batches",
    "regularises",
    "all-improve",
    "layer-slower-than-group",
    "trains-faster",
    "affine-reduces-cost",
)


def _tested(small, scaled):
    """A metric at other batch sizes, and at other initial scales."""
    return lambda trial: small if trial.batch_size != 32 else scaled


def _world(seeds=10, target=None, **truths):
    """Ten seeds: eight cannot reach 5 % over ten claims."""
    norms = ("none", "batch", "batch-noaffine", "group", "layer")
    return World(
        truths={norm: truths.get(norm.replace("-", "_"), PLAIN) for norm in norms},
        seeds=seeds,
        sweeps=SWEEPS,
        target=target,
    )


def _claims(comparison):
    return {claim.name: claim for claim in comparison.claims}


def _answers(comparison):
    return {claim.name: claim.answer for claim in comparison.claims}


#: The world of the article, but for the cost of scale and shift.
AS_CLAIMED = _world(
    none=Truth(metric=0.9, speed=300, spread=500, gap=0.06, tested=_tested(0.3, 0.5)),
    batch=Truth(metric=0.95, speed=60, spread=5, gap=0.01, limit=3.0, tested=_tested(0.5, 0.9)),
    batch_noaffine=Truth(metric=0.95),
    group=Truth(metric=0.94, speed=60, tested=_tested(0.9, 0.9)),
    layer=Truth(metric=0.94, speed=150, tested=_tested(0.9, 0.9)),
    target=0.855,
)
#: And the one in which each of them is the wrong way round.
REVERSED = _world(
    none=Truth(metric=0.95, speed=60, spread=5, gap=0.01, limit=3.0, tested=_tested(0.5, 0.9)),
    batch=Truth(metric=0.92, speed=300, spread=500, gap=0.06, tested=_tested(0.9, 0.5)),
    batch_noaffine=Truth(metric=0.92),
    group=Truth(metric=0.92, speed=150, tested=_tested(0.3, 0.9)),
    layer=Truth(metric=0.92, speed=60),
)
#: No norm does anything, and a step of each takes as long.
SAME = replace(
    _world(), arms={n: {"step_ms": 1.0} for n in ("batch", "batch-noaffine", "group", "layer")}
)


def test_claims_come_in_the_order_of_the_table():
    assert tuple(test.name for test in CLAIMS) == NAMES
    assert tuple(claim.name for claim in SAME.compare().claims) == NAMES


def test_what_is_as_claimed_is_supported():
    answers = _answers(AS_CLAIMED.compare())
    assert answers.pop("affine-reduces-cost") is Answer.CONTRADICTED
    assert set(answers.values()) == {Answer.SUPPORTED}, answers


def test_what_is_the_other_way_round_is_contradicted():
    answers = _answers(REVERSED.compare())
    assert set(answers.values()) == {Answer.CONTRADICTED}, answers


def test_without_any_effect_nothing_is_claimed():
    answers = _answers(SAME.compare())
    assert answers.pop("affine-reduces-cost") is Answer.CONTRADICTED, "parameters are counted"
    assert set(answers.values()) == {Answer.UNDISTINGUISHED}, answers


def test_false_alarms_over_all_claims_stay_at_five_percent():
    """60 more worlds without an effect."""
    alarms = 0
    for shift in range(60):
        world = replace(SAME, truths=dict.fromkeys(SAME.truths, Truth(metric=0.8 + shift * 1e-3)))
        world = replace(world, first_seed=20 * shift)
        found = world.compare().claims
        alarms += any(
            claim.answer in (Answer.SUPPORTED, Answer.CONTRADICTED)
            for claim in found
            if claim.p is not None
        )
    assert alarms <= 8, "60 worlds at 5 %: 3 are expected, more than 8 come once in 300 times"


@pytest.mark.parametrize("world", [AS_CLAIMED, REVERSED, SAME], ids=["claimed", "reversed", "same"])
def test_claims_are_whole(world):
    comparison = world.compare()
    read = json.loads(dumps(comparison.to_dict()))["claims"]
    assert [claim["name"] for claim in read] == list(NAMES)
    tested = [claim for claim in comparison.claims if claim.p is not None]
    assert len(tested) == 9
    for claim in tested:
        assert 2 / 2**10 <= claim.p <= 1
        assert (claim.p < 0.05) == (claim.answer is not Answer.UNDISTINGUISHED)
    for claim in comparison.claims:
        assert claim.claim
        assert claim.figure
        assert "\n" not in claim.figure
        assert not any(word in claim.figure for word in ("nan", "None"))


def test_figures_have_the_numbers():
    figures = {name: claim.figure for name, claim in _claims(AS_CLAIMED.compare()).items()}
    words = figures["fewer-steps"]
    assert words.startswith("batch ")
    for part in (
        "against none",
        "medians",
        "ratio 0.2",
        "p = 0.002",
        "10 seeds",
        "accuracy of 0.8",
    ):
        assert part in words, words
    assert "batch 3, none 1 (medians)" in figures["higher-learning-rates"]
    assert "of 0.01 to 3" in figures["higher-learning-rates"]
    assert "scales 0.1 to 10" in figures["init-sensitivity"]
    assert "at the start" in figures["gradient-flow"]
    assert "batch size 2" in figures["small-batches"]
    assert "−0.05 [" in figures["regularises"]
    assert figures["all-improve"].endswith("; 10 seeds")
    assert "better: batch +0.05" in figures["all-improve"]
    assert "a step of batch takes 1.3× as long" in figures["trains-faster"]
    assert "add 64 parameters to 1,000" in figures["affine-reduces-cost"]


def test_holm_over_all_claims_that_were_tested():
    comparison = AS_CLAIMED.compare()
    claims = _claims(comparison)
    assert claims["fewer-steps"].p == pytest.approx(9 * 2 / 2**10)
    assert claims["affine-reduces-cost"].p is None
    fewer = replace(AS_CLAIMED, sweeps={}).compare()
    assert _claims(fewer)["fewer-steps"].p == pytest.approx(6 * 2 / 2**10)


def test_too_few_seeds_for_so_many_claims_are_told():
    eight = replace(AS_CLAIMED, seeds=8)
    comparison = eight.compare()
    assert "8 seeds over 9 claims cannot reach p < 0.05: 9 seeds can" in comparison.notes
    answers = {claim.answer for claim in comparison.claims if claim.p is not None}
    assert answers == {Answer.UNDISTINGUISHED}
    plain = replace(eight, sweeps={}).compare()
    assert not any("claims cannot reach" in note for note in plain.notes)
    assert _answers(plain)["fewer-steps"] is Answer.SUPPORTED


def test_one_seed_decides_nothing():
    comparison = replace(AS_CLAIMED, seeds=1).compare()
    tested = [claim for claim in comparison.claims if claim.p is not None]
    assert {claim.p for claim in tested} == {1.0}
    assert {claim.answer for claim in tested} == {Answer.UNDISTINGUISHED}
    assert all("inf" not in claim.figure for claim in tested), [c.figure for c in tested]


# -- untested --------------------------------------------------------------------------------------


def test_without_its_sweep_a_claim_says_which():
    claims = _claims(replace(AS_CLAIMED, sweeps={}).compare())
    for name, words in (
        ("higher-learning-rates", "in 2 tuning runs; add --sweep lr"),
        ("init-sensitivity", "add --sweep init"),
        ("small-batches", "add --sweep batch"),
    ):
        assert claims[name].answer is Answer.UNTESTED
        assert claims[name].figure.endswith(words)
        assert claims[name].p is None
    assert "batch 3, none 1 in 2 tuning" in claims["higher-learning-rates"].figure


def test_large_batches_say_nothing_of_small_ones():
    claims = _claims(replace(AS_CLAIMED, sweeps={"batch": (8.0, 32.0)}).compare())
    assert claims["small-batches"].answer is Answer.UNTESTED
    assert "the smallest batch was 8" in claims["small-batches"].figure


def test_one_initial_scale_says_nothing_of_scales():
    claims = _claims(replace(AS_CLAIMED, sweeps={"init": (1.0,)}).compare())
    assert claims["init-sensitivity"].answer is Answer.UNTESTED


def test_a_claim_without_its_arm_is_untested():
    alone = replace(AS_CLAIMED, truths={"none": PLAIN})
    claims = _claims(alone.compare())
    assert {claim.answer for claim in claims.values()} == {Answer.UNTESTED}
    assert claims["fewer-steps"].figure == "there is no arm 'batch': add it to --norms"
    assert claims["small-batches"].figure == "there is no arm 'group': add it to --norms"
    assert claims["all-improve"].p is None


@pytest.mark.parametrize(
    ("truth", "reason"),
    [
        (Truth(limit=0.0), "every run diverged"),
        (Truth(change=failed(*range(10), error="ValueError: no")), "ValueError: no"),
        (Truth(left_out="no layer takes a batch norm"), "no layer takes a batch norm"),
    ],
)
def test_a_claim_on_an_arm_that_was_left_out_gives_the_reason(truth, reason):
    world = replace(AS_CLAIMED, truths={**AS_CLAIMED.truths, "batch": truth})
    claims = _claims(world.compare())
    about_batch = set(NAMES) - {"all-improve", "layer-slower-than-group"}
    assert {claims[name].answer for name in about_batch} == {Answer.UNTESTED}
    assert all("batch was left out: " + reason in claims[name].figure for name in about_batch)
    assert claims["layer-slower-than-group"].answer is Answer.SUPPORTED
    assert "without figures: batch" in claims["all-improve"].figure


def test_where_nothing_trained_nothing_is_tested():
    world = replace(AS_CLAIMED, truths=dict.fromkeys(AS_CLAIMED.truths, Truth(limit=0.0)))
    assert set(_answers(world.compare()).values()) == {Answer.UNTESTED}


def test_a_model_with_norms_is_compared_with_its_own_arm_without():
    truths = {"as-is": Truth(metric=0.95), **AS_CLAIMED.truths}
    world = replace(AS_CLAIMED, truths=truths, reference="as-is", target=0.85)
    answers = _answers(world.compare())
    assert answers["fewer-steps"] is answers["all-improve"] is Answer.SUPPORTED
    del truths["none"]
    claims = _claims(replace(world, truths=truths).compare())
    assert claims["fewer-steps"].answer is claims["all-improve"].answer is Answer.UNTESTED
    assert "there is no arm 'none'" in claims["all-improve"].figure
    assert claims["small-batches"].answer is Answer.SUPPORTED, "about two norms"


def test_the_models_own_batch_norms_stand_for_batch():
    truths = {"as-is": AS_CLAIMED.truths["batch"], **AS_CLAIMED.truths}
    truths["batch"] = Truth(left_out="the model's own norms are batch norms: see as-is")
    arms = {**AS_CLAIMED.arms, "as-is": AS_CLAIMED.arms.get("batch", {})}
    arms["batch"] = {"same_as": "as-is"}
    world = replace(AS_CLAIMED, truths=truths, arms=arms, reference="as-is", target=0.85)
    before, claims = _claims(AS_CLAIMED.compare()), _claims(world.compare())
    for name in set(NAMES) - {"all-improve"}:
        assert claims[name].answer is before[name].answer, claims[name].figure
    assert "as-is 60 against none" in claims["fewer-steps"].figure
    assert "without figures" not in claims["all-improve"].figure, "as-is has those of batch"


def test_missing_seeds_count_for_no_claim():
    truths = {**AS_CLAIMED.truths, "none": replace(AS_CLAIMED.truths["none"], change=without(9))}
    world = replace(AS_CLAIMED, truths=truths)
    claims = _claims(world.compare())
    assert claims["fewer-steps"].figure.endswith("9 seeds")
    assert claims["layer-slower-than-group"].figure.endswith("10 seeds")
    outcomes = world.outcomes()
    cut = {t: o for t, o in outcomes.items() if not (t.lr == 3.0 and t.seed in (0, 1))}
    short = _claims(world.compare(cut))
    assert short["higher-learning-rates"].figure.endswith("7 seeds"), "whole grids only"
    none = {t: o for t, o in outcomes.items() if t.batch_size == 32 and t.init_scale == 1}
    none = {t: o for t, o in none.items() if t.lr != 3.0}
    cut_claims = _claims(world.compare(none))
    for name in ("higher-learning-rates", "init-sensitivity", "small-batches"):
        assert cut_claims[name].answer is Answer.UNTESTED, cut_claims[name].figure


# -- single claims ---------------------------------------------------------------------------------


def test_never_reached_is_said_and_counts_as_more():
    def never(outcome):
        if outcome.trial.seed not in (0, 1):
            return outcome
        return replace(outcome, validation=tuple(0.1 for _ in outcome.validation))

    truths = {**AS_CLAIMED.truths, "none": replace(AS_CLAIMED.truths["none"], change=never)}
    claim = _claims(replace(AS_CLAIMED, truths=truths).compare())["fewer-steps"]
    assert claim.answer is Answer.SUPPORTED
    assert "never reached: none 2 of 10" in claim.figure
    every = replace(
        AS_CLAIMED.truths["none"],
        change=lambda o: replace(o, validation=tuple(0.1 for _ in o.validation)),
    )
    world = replace(AS_CLAIMED, truths={**AS_CLAIMED.truths, "none": every}, target=0.8)
    claim = _claims(world.compare())["fewer-steps"]
    assert claim.answer is Answer.SUPPORTED
    assert "against none never reached" in claim.figure
    assert "ratio unknown" in claim.figure


def test_a_run_that_diverged_reaches_no_learning_rate():
    claim = _claims(SAME.compare())["higher-learning-rates"]
    assert "batch 1, none 1" in claim.figure
    truths = {
        **SAME.truths,
        "batch": Truth(limit=3.0),
        "none": Truth(change=diverging(*range(10))),
    }
    claim = _claims(replace(SAME, truths=truths).compare())["higher-learning-rates"]
    assert "batch 3, none at none" in claim.figure
    assert claim.answer is Answer.SUPPORTED
    late = Truth(change=lambda o: replace(o, diverged=390) if o.trial.lr == 1.0 else o)
    claim = _claims(replace(SAME, truths={**SAME.truths, "none": late}).compare())
    assert "batch 1, none 0.1 (medians)" in claim["higher-learning-rates"].figure


def test_an_infinite_spread_is_worse_than_any():
    dead = Truth(change=lambda o: replace(o, spread=tuple(math.inf for _ in o.spread)))
    truths = {**SAME.truths, "none": dead}
    claim = _claims(replace(SAME, truths=truths).compare())["gradient-flow"]
    assert claim.answer is Answer.SUPPORTED
    assert "infinite: none 10 of 10" in claim.figure


def test_a_lower_loss_is_an_improvement():
    truths = {
        "none": Truth(metric=0.5),
        "batch": Truth(metric=0.3, tested=_tested(1.5, 0.3)),
        "group": Truth(metric=0.3, tested=_tested(0.4, 0.3)),
        "layer": Truth(metric=0.3, tested=_tested(0.4, 0.3)),
    }
    world = replace(AS_CLAIMED, truths=truths, higher=False)
    answers = _answers(world.compare())
    assert answers["all-improve"] is answers["small-batches"] is Answer.SUPPORTED
    worse = {**truths, "group": Truth(metric=0.7, tested=_tested(1.9, 0.7))}
    answers = _answers(replace(world, truths=worse).compare())
    assert answers["all-improve"] is answers["small-batches"] is Answer.CONTRADICTED


def test_group_norm_that_is_layer_norm_is_not_compared_with_it():
    truths = {**AS_CLAIMED.truths, "group": Truth(left_out="group norm is layer norm: see layer")}
    world = replace(AS_CLAIMED, truths=truths, arms={"group": {"same_as": "layer"}})
    claims = _claims(world.compare())
    slower = claims["layer-slower-than-group"]
    assert slower.answer is Answer.UNTESTED
    assert "same norms" in slower.figure
    assert claims["small-batches"].answer is Answer.SUPPORTED, "layer norm stands for it"
    assert "without figures" not in claims["all-improve"].figure


@pytest.mark.parametrize("norms", [("batch",), ("batch", "group"), ("batch", "layer", "rms")])
def test_some_norms_are_not_all_norms(norms):
    truths = {norm: AS_CLAIMED.truths.get(norm, Truth(metric=0.95)) for norm in ("none", *norms)}
    claim = _claims(replace(AS_CLAIMED, truths=truths).compare())["all-improve"]
    assert claim.answer is Answer.UNTESTED
    assert "add it to --norms" in claim.figure
    refused = {norm: Truth(left_out="no layer takes it") for norm in ("group", "layer")}
    alone = {"none": AS_CLAIMED.truths["none"], "batch": AS_CLAIMED.truths["batch"], **refused}
    claim = _claims(replace(AS_CLAIMED, truths=alone).compare())["all-improve"]
    assert claim.answer is Answer.UNTESTED
    assert "one norm alone" in claim.figure


def test_one_norm_that_is_no_better_leaves_all_improve_open():
    truths = {**AS_CLAIMED.truths, "layer": Truth(metric=0.9)}
    claim = _claims(replace(AS_CLAIMED, truths=truths).compare())["all-improve"]
    assert claim.answer is Answer.UNDISTINGUISHED
    assert "not distinguished: layer" in claim.figure
    assert "better: batch" in claim.figure


def test_a_norm_that_did_not_train_is_no_gain_and_one_that_fits_nowhere_says_nothing():
    diverged = {**AS_CLAIMED.truths, "layer": Truth(limit=0.0)}
    claim = _claims(replace(AS_CLAIMED, truths=diverged).compare())["all-improve"]
    assert claim.answer is Answer.UNDISTINGUISHED
    refused = {**AS_CLAIMED.truths, "layer": Truth(left_out="no layer takes it")}
    claim = _claims(replace(AS_CLAIMED, truths=refused).compare())["all-improve"]
    assert claim.answer is Answer.SUPPORTED
    assert "without figures: layer" in claim.figure


@pytest.mark.parametrize(
    ("arm", "answer"),
    [
        ({"parameters": 1064, "step_ratio": 1.3}, Answer.CONTRADICTED),
        ({"parameters": 1064, "step_ratio": 1.0}, Answer.UNDISTINGUISHED),
        ({"parameters": 1000, "step_ratio": 1.0}, Answer.SUPPORTED),
        ({"parameters": 1000, "step_ratio": 1.3}, Answer.UNDISTINGUISHED),
        ({"parameters": 1064, "step_ratio": None, "step_ms": None}, Answer.CONTRADICTED),
        ({"parameters": 1064, "step_ratio": None, "step_ms": 1.0}, Answer.UNDISTINGUISHED),
    ],
)
def test_cost_is_counted_and_timed(arm, answer):
    claim = _claims(replace(AS_CLAIMED, arms={"batch": arm}).compare())["affine-reduces-cost"]
    assert claim.answer is answer
    assert claim.p is None


def test_dear_steps_can_eat_what_fewer_steps_save():
    world = replace(AS_CLAIMED, arms={"batch": {"step_ms": 9.0, "step_ratio": 9.0}})
    answers = _answers(world.compare())
    assert answers["fewer-steps"] is Answer.SUPPORTED
    assert answers["trains-faster"] is Answer.CONTRADICTED
