"""One function a claim, from the runs to its evidence.

A claim that cannot be tested says why, and what would test it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from bnify.comparing.claim_words import chance, ends, number, paired_words, rate, seeds, signed
from bnify.comparing.comparison import Answer, Arm
from bnify.comparing.curves import sweep_trials
from bnify.comparing.measures import Paired, Runs, Values, pair
from bnify.comparing.statistics import LEVEL, holm, median
from bnify.comparing.trial import Trial

#: What the claims are about: a model without norms, whatever the reference is.
PLAIN: Final = "none"
#: Claims on small batches are about batches up to so many samples.
SMALL_BATCH: Final = 4
#: The norms without which "all norms" says too much.
USUAL: Final = ("batch", "group", "layer")
#: A step that takes at least this share of another's time is not cheaper.
CHEAPER: Final = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the runs say of one claim, before Holm's correction over the claims.

    Attributes:
        figure: The figures in words; for an untested claim, why, and what would test it.
        p: Two-sided; None where nothing was tested, or a count decides.
        side: 1 where the figures are for the claim, -1 where they are against it, 0 for neither.
        seeds: How many the test rests on.
        answer: Where there is no p.
    """

    figure: str
    p: float | None = None
    side: int = 0
    seeds: int = 0
    answer: Answer = Answer.UNTESTED


def _absent(runs: Runs, *norms: str) -> Evidence | None:
    """Why these norms cannot be compared; None where they can."""
    for norm in norms:
        arm = runs.arms.get(runs.stand_in(norm))
        if arm is None:
            return Evidence(figure=f"there is no arm {norm!r}: add it to --norms")
        if arm.left_out:
            return Evidence(figure=f"{norm} was left out: {arm.left_out}")
    return None


def _judged(paired: Paired, figure: str, wanted: int) -> Evidence:
    """Evidence of a paired test; ``wanted`` is the sign of the mean that supports the claim."""
    sign = (paired.mean > 0) - (paired.mean < 0)
    return Evidence(figure=figure, p=paired.p, side=sign * wanted, seeds=len(paired.seeds))


def _measured(
    runs: Runs, norm: str, other: str, name: str, unit: str, wanted: int, extra: str = ""
) -> Evidence:
    """Evidence of one measure, each norm at its own best learning rate."""
    absent = _absent(runs, norm, other)
    if absent is not None:
        return absent
    if runs.stand_in(norm) == runs.stand_in(other):
        return Evidence(figure=f"{norm} and {other} are the same norms in this model")
    norm, other = runs.stand_in(norm), runs.stand_in(other)
    if runs.selection.target is None and name in ("steps", "time"):
        return Evidence(figure="there is no target: no arm trained")
    paired = runs.compare(norm, other, name)
    if paired is None:
        return Evidence(figure=f"no seed has this figure of both {norm} and {other}")
    figure = paired_words(norm, other, name, unit, paired)
    return _judged(paired, f"{figure}{extra}", wanted)


def _goal(runs: Runs) -> str:
    target = runs.selection.target
    return "" if target is None else f" to a validation {runs.metric} of {number(target)}"


def fewer_steps(runs: Runs) -> Evidence:
    """Batch norm against none, steps to the target."""
    return _measured(runs, "batch", PLAIN, "steps", f"steps{_goal(runs)}", -1)


def higher_learning_rates(runs: Runs) -> Evidence:
    """Per seed, the largest learning rate of the grid that reached the target and went on."""
    absent = _absent(runs, "batch", PLAIN)
    if absent is not None:
        return absent
    if runs.selection.target is None:
        return Evidence(figure="there is no target: no arm trained")
    schedule = runs.schedule
    swept = schedule.sweeps.get("lr", ())
    lrs, of_seeds = (swept, schedule.seeds) if swept else (schedule.lrs, schedule.tuning_seeds)
    norms = (runs.stand_in("batch"), PLAIN)
    ours, theirs = (_largest(runs, norm, lrs, of_seeds) for norm in norms)
    paired = pair(ours, theirs, "metric")
    if paired is None:
        return Evidence(figure="no seed has a run at every learning rate: add --sweep lr")
    words = (
        f"the largest learning rate that reached the target and did not diverge, of {lrs[0]:g} "
        f"to {lrs[-1]:g}: batch {rate(paired.values, lrs)}, none {rate(paired.references, lrs)}"
    )
    if not swept:
        tuned = f"{len(paired.seeds)} tuning run{'s' * (len(paired.seeds) != 1)}"
        return Evidence(figure=f"{words} in {tuned}; add --sweep lr")
    figure = f"{words} (medians); {chance(paired.p)}, {seeds(len(paired.seeds))}"
    return _judged(paired, figure, 1)


def _largest(
    runs: Runs, norm: str, lrs: tuple[float, ...], of_seeds: tuple[int, ...]
) -> dict[int, float | None]:
    """Seed → place in the grid of the largest learning rate that trained, -1 where none did."""
    found: dict[int, float | None] = {}
    for seed in of_seeds:
        outcomes = [runs.usable(runs.schedule.trial(norm, lr, seed)) for lr in lrs]
        if None in outcomes:
            continue  # a run is missing: the largest is not known, and the seed does not count
        trained = [
            place
            for place, run in enumerate(outcomes)
            if run is not None and run.diverged is None and any(map(runs.reached, run.validation))
        ]
        found[seed] = float(max(trained, default=-1))
    return found


def init_sensitivity(runs: Runs) -> Evidence:
    """Per seed, what the metric loses on average over the scales of the initial weights."""
    absent = _absent(runs, "batch", PLAIN)
    if absent is not None:
        return absent
    scales = runs.schedule.sweeps.get("init", ())
    if not any(scale != 1 for scale in scales):
        return Evidence(figure="the initial weights had one scale: add --sweep init")
    paired = pair(_lost(runs, runs.stand_in("batch")), _lost(runs, PLAIN), "metric")
    if paired is None:
        return Evidence(figure="no seed has a run of batch and of none at every scale")
    unit = (
        f"how much worse test {runs.metric} is on average over initial scales {scales[0]:g} to "
        f"{scales[-1]:g} than at 1"
    )
    return _judged(paired, paired_words("batch", PLAIN, "metric", unit, paired), -1)


def _lost(runs: Runs, norm: str) -> Values:
    """Seed → how much worse the metric is on average over the scales than at scale 1."""
    scales = runs.schedule.sweeps["init"]
    by_scale = [_tests(runs, sweep_trials(runs, norm, "init", scale)) for scale in scales]
    usual, side = runs.values(norm, "metric"), 1.0 if runs.higher else -1.0
    found: dict[int, float | None] = {}
    for seed, metric in usual.items():
        there = [tests[seed] for tests in by_scale if seed in tests]
        if metric is not None and len(there) == len(scales):
            found[seed] = side * (metric - math.fsum(there) / len(there))
    return found


def _tests(runs: Runs, trials: list[Trial]) -> dict[int, float]:
    """Seed → test metric."""
    found = {trial.seed: runs.usable(trial) for trial in trials}
    return {s: run.test for s, run in found.items() if run is not None and math.isfinite(run.test)}


def gradient_flow(runs: Runs) -> Evidence:
    """Batch norm against none, how unequal the layers' gradients are."""
    unit = "largest over smallest gradient per weight of the layers, in training"
    absent = _absent(runs, "batch", PLAIN)
    start = None if absent else runs.compare(runs.stand_in("batch"), PLAIN, "spread-start")
    extra = ""
    if start is not None:
        ours, theirs = (median(side) for side in (start.values, start.references))
        if ours is not None and theirs is not None:
            extra = f"; at the start {number(ours)} against {number(theirs)}"
    return _measured(runs, "batch", PLAIN, "spread", unit, -1, extra)


def small_batches(runs: Runs) -> Evidence:
    """Group norm against batch norm at the smallest batch."""
    absent = _absent(runs, "group", "batch")
    if absent is not None:
        return absent
    sizes = runs.schedule.sweeps.get("batch", ())
    if not sizes:
        return Evidence(figure="there was one batch size: add --sweep batch")
    size = min(sizes)
    if size > SMALL_BATCH:
        return Evidence(figure=f"the smallest batch was {size:g}: add --batch-sizes 2")
    norms = map(runs.stand_in, ("group", "batch"))
    group, batch = (_tests(runs, sweep_trials(runs, norm, "batch", size)) for norm in norms)
    paired = pair(group, batch, "metric")
    if paired is None:
        return Evidence(figure=f"no seed has a run of group and of batch at batch size {size:g}")
    unit = f"test {runs.metric} at batch size {size:g}"
    figure = paired_words("group", "batch", "metric", unit, paired)
    return _judged(paired, figure, 1 if runs.higher else -1)


def regularises(runs: Runs) -> Evidence:
    """Batch norm against none, the gap between training and validation."""
    unit = f"gap between training and validation {runs.metric}"
    return _measured(runs, "batch", PLAIN, "gap", unit, -1)


def all_improve(runs: Runs) -> Evidence:
    """Every norm against none, the test metric.

    "All are better" has the largest of their p (an intersection-union test: Berger, Multiparameter
    hypothesis testing and acceptance sampling, 1982); "one is worse" the smallest of those that
    are, after Holm over the norms. Where fewer than batch, group and layer norm were asked for, or
    only one could be run, that is not all norms.
    """
    if (absent := _absent(runs, PLAIN)) is not None:
        return absent
    unasked = [norm for norm in USUAL if norm not in runs.arms]
    if unasked:  # one that no layer takes says nothing: the others are all there are
        return Evidence(figure=f"there is no arm {unasked[0]!r}: add it to --norms")
    pairs = {
        norm: paired
        for norm in runs.arms
        if norm != PLAIN and (paired := runs.compare(norm, PLAIN, "metric")) is not None
    }
    if not pairs:
        return Evidence(figure="no norm has a run of a seed that none has a run of")
    adjusted = dict(zip(pairs, holm([paired.p for paired in pairs.values()]), strict=True))
    gain = {norm: paired.mean if runs.higher else -paired.mean for norm, paired in pairs.items()}
    worse = [norm for norm in pairs if gain[norm] < 0]
    stood_for = {norm: runs.stand_in(norm) for norm in runs.arms}
    absentees = [n for n, arm in stood_for.items() if n != PLAIN and arm not in pairs]
    sorts: dict[str, list[str]] = {"better": [], "worse": [], "not distinguished": []}
    for norm, paired in pairs.items():
        side = "better" if gain[norm] > 0 else "worse"
        words = f"{norm} {signed(paired.mean)}{ends(paired.low, paired.high)}"
        sorts[side if adjusted[norm] < LEVEL else "not distinguished"].append(words)
    parts = [f"{sort}: {', '.join(words)}" for sort, words in sorts.items() if words]
    if absentees:
        parts.append(f"without figures: {', '.join(absentees)}")
    p = min(adjusted[n] for n in worse) if worse else max(paired.p for paired in pairs.values())
    if len(pairs) == 1:
        return Evidence(figure=f"one norm alone has figures: {'; '.join(parts)}")
    # A norm that no layer takes says nothing; one that was tuned and did not train was no gain.
    unproved = min(gain.values()) == 0 or any(n in runs.selection.best for n in absentees)
    count = min(len(paired.seeds) for paired in pairs.values())
    return Evidence(
        figure=f"test {runs.metric} against none, {'; '.join((*parts, seeds(count)))}",
        p=p,
        side=-1 if worse else 0 if unproved else 1,
        seeds=count,
    )


def layer_slower_than_group(runs: Runs) -> Evidence:
    """Layer norm against group norm, steps to the target."""
    return _measured(runs, "layer", "group", "steps", f"steps{_goal(runs)}", 1)


def trains_faster(runs: Runs) -> Evidence:
    """Batch norm against none, seconds to the target."""
    extra = _step_words(runs, runs.stand_in("batch"))
    return _measured(runs, "batch", PLAIN, "time", f"seconds{_goal(runs)}", -1, extra)


def _step_words(runs: Runs, norm: str) -> str:
    ratio = _step_ratio(runs.arms.get(norm), runs.arms.get(PLAIN))
    return "" if ratio is None else f"; a step of {norm} takes {number(ratio)}× as long"


def _step_ratio(arm: Arm | None, other: Arm | None) -> float | None:
    """Time of a step over the other's: from pairs that ran interleaved where both have them."""
    if arm is None or other is None:
        return None
    if arm.step_ratio and other.step_ratio:
        return arm.step_ratio / other.step_ratio
    return arm.step_ms / other.step_ms if arm.step_ms and other.step_ms else None


def affine_reduces_cost(runs: Runs) -> Evidence:
    """Batch norm with scale and shift against one without: parameters and the time of a step.

    Both are counted and timed, not drawn per seed, so there is no p.
    """
    absent = _absent(runs, "batch", "batch-noaffine")
    if absent is not None:
        return absent
    norms = runs.stand_in("batch"), runs.stand_in("batch-noaffine")
    affine, plain = (runs.arms[norm] for norm in norms)
    added, ratio = affine.parameters - plain.parameters, _step_ratio(affine, plain)
    parts = [f"scale and shift add {added:,} parameters to {plain.parameters:,}"]
    if ratio is not None:
        parts.append(f"a step takes {number(ratio)}× as long")
    paired = runs.compare(*norms, "metric")
    if paired is not None:
        difference = f"{signed(paired.mean)}{ends(paired.low, paired.high)}"
        parts.append(f"test {runs.metric} {difference}, {chance(paired.p)}")
    cheaper = ratio is not None and ratio < CHEAPER
    if added > 0:
        answer = Answer.UNDISTINGUISHED if cheaper else Answer.CONTRADICTED
    else:
        answer = Answer.SUPPORTED if cheaper else Answer.UNDISTINGUISHED
    return Evidence(figure=f"batch against batch-noaffine: {'; '.join(parts)}", answer=answer)
