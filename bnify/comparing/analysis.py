"""ANALYSIS: from finished runs to a Comparison. Pure: data in, data out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bnify.comparing.claims import answer_claims
from bnify.comparing.comparison import Arm, Comparison, Measure
from bnify.comparing.curves import curves, grid
from bnify.comparing.measures import Runs, measures
from bnify.comparing.question import Question
from bnify.comparing.schedule import Schedule, Selection
from bnify.comparing.statistics import too_few
from bnify.comparing.trial import Outcome, Trial


def analyse(
    question: Question,
    schedule: Schedule,
    selection: Selection,
    arms: Sequence[Arm],
    outcomes: Mapping[Trial, Outcome],
    *,
    data: str,
    model: str,
    task: str,
    metric: str,
    higher: bool,
    reference: str,
    optimizer: str,
    notes: Sequence[str] = (),
    partial: str = "",
    seconds: float = 0.0,
    environment: Mapping[str, Any] | None = None,
) -> Comparison:
    """What the runs say.

    A seed counts for a norm only where both it and the reference have a run of it.

    Args:
        question: What was asked.
        schedule: Which runs there should be.
        selection: What the tuning runs decided.
        arms: With their sizes and step times, and the reason where one was left out before any run.
        outcomes: By trial, in any order. Those that are missing were interrupted or cut.
        data: What was trained on, in words.
        model: The SPEC, or the class of a live model.
        task: ``"classification"`` or ``"regression"``.
        metric: ``"accuracy"`` or ``"loss"``.
        higher: Whether a larger metric is better.
        reference: The arm that the others are compared with.
        optimizer: In words.
        notes: What is known already.
        partial: Why runs are missing; empty where none is.
        seconds: Wall clock of the whole comparison.
        environment: Versions, device, threads, seed, hashes.
    """
    settled = tuple(_settled(arm, schedule, selection, outcomes) for arm in arms)
    runs = Runs(
        schedule=schedule,
        selection=selection,
        arms={arm.norm: arm for arm in settled},
        outcomes=outcomes,
        metric=metric,
        higher=higher,
    )
    found = tuple(measures(runs, reference))
    drawn, of_curves = curves(runs)
    claims, of_claims = answer_claims(runs)
    said = (
        *notes,
        *_tuning_words(question, selection, runs, partial),
        *_reached_untrained(runs),
        *_missing_seeds(runs, found, reference),
        *_without_gap(runs),
        *_too_few_seeds(found),
        *of_claims,
        *of_curves,
    )
    return Comparison(
        model=model,
        data=data,
        task=task,
        metric=metric,
        higher_is_better=higher,
        reference=reference,
        arms=settled,
        seeds=schedule.seeds,
        target=selection.target,
        steps=schedule.steps,
        batch_size=schedule.batch_size,
        optimizer=optimizer,
        measures=found,
        curves=drawn,
        grid=tuple(grid(runs)),
        claims=claims,
        cuts=schedule.cuts,
        notes=tuple(dict.fromkeys(said)),
        partial=partial,
        seconds=seconds,
        environment=environment,
    )


def _settled(
    arm: Arm, schedule: Schedule, selection: Selection, outcomes: Mapping[Trial, Outcome]
) -> Arm:
    """The arm with its learning rate, or with the reason why it has no figures."""
    if arm.left_out:
        return arm
    best = selection.best.get(arm.norm)
    if best is None:
        tuning = list(schedule.tuning([arm.norm]))
        return replace(arm, left_out=_untuned(schedule, [outcomes.get(t) for t in tuning]))
    tried = [outcomes[t] for t in schedule.tuning([arm.norm]) if t in outcomes]
    raised = [run.error for run in tried if run.error]
    if raised:
        note = f"{len(raised)} of {len(tried)} tuning runs failed: {raised[0]}"
        arm = replace(arm, notes=(*arm.notes, note))
    trials = [schedule.trial(arm.norm, best, seed) for seed in schedule.seeds]
    found = [outcomes[trial] for trial in trials if trial in outcomes]
    failed = [run for run in found if run.error]
    edge = {schedule.lrs[0]: "lowest", schedule.lrs[-1]: "highest"}.get(best, "")
    arm = replace(arm, best_lr=best, at_edge=edge if len(schedule.lrs) > 1 else "")
    if len(failed) == len(found):
        reason = failed[0].error if failed else "no run of it was finished"
        return replace(arm, left_out=reason)
    if failed:
        note = f"{len(failed)} of {len(trials)} runs failed: {failed[0].error}"
        return replace(arm, notes=(*arm.notes, note))
    return arm


def _untuned(schedule: Schedule, tuning: Sequence[Outcome | None]) -> str:
    """Why no learning rate was chosen."""
    for run in tuning:
        if run is not None and run.error:
            return run.error
    if not tuning or None in tuning:
        return "its learning rate was not tuned: runs are missing"
    tried = dict.fromkeys((f"{schedule.lrs[0]:g}", f"{schedule.lrs[-1]:g}"))
    return f"every run diverged, at every learning rate tried ({' to '.join(tried)})"


def _tuning_words(
    question: Question, selection: Selection, runs: Runs, partial: str
) -> Iterator[str]:
    """Where target and learning rates come from."""
    if selection.target is None and partial:
        yield "no learning rate was chosen before it ended: nothing is compared"
    elif selection.target is None:
        yield "no arm trained at any learning rate: there is no target, and nothing is compared"
    elif question.target is None:
        share = "95 %" if runs.higher else "110 %"
        yield (
            f"the target {selection.target:g} is {share} of the validation {runs.metric} that the "
            "median arm has in its best tuning runs"
        )
    if len(runs.schedule.lrs) > 1 and selection.target is not None:
        count = len(runs.schedule.tuning_seeds)
        yield (
            f"learning rates were chosen on {count} other seed{'s' * (count != 1)}; intervals and "
            "p take them as given, so a choice by chance is not in them"
        )


def _reached_untrained(runs: Runs) -> Iterator[str]:
    """A target that an untrained model has says nothing of training."""
    of_all = [run for norm in runs.arms for run in runs.at(norm, "best-lr").values()]
    early = sum(runs.reached(run.validation[0]) for run in of_all if run.validation)
    if early:
        yield (
            f"{early} of {len(of_all)} runs are at the target before their first step: it is too "
            "easy for steps and time to it to mean much; train for longer (--epochs), or set one "
            "(--target)"
        )


def _missing_seeds(runs: Runs, found: Sequence[Measure], reference: str) -> Iterator[str]:
    """Which norms have fewer seeds than there are."""
    every, counts = len(runs.schedule.seeds), dict[int, list[str]]()
    for measure in found:
        if (measure.setting, measure.name) == ("best-lr", "metric"):
            counts.setdefault(len(measure.values), []).append(measure.norm)
    for count, norms in sorted(counts.items()):
        if count < every:
            yield (
                f"{count} of {every} seeds count for {', '.join(norms)}: the others lack a "
                f"finished run with a finite metric, of it or of {reference}"
            )
    told = {norm for norms in counts.values() for norm in norms}
    for norm, arm in runs.arms.items():
        if not arm.left_out and norm not in told:
            yield f"no seed counts for {norm}: none has a finished run of it and of {reference}"


def _without_gap(runs: Runs) -> Iterator[str]:
    """Runs that are missing in the gaps."""
    for norm in runs.arms:
        of_seeds = runs.at(norm, "best-lr")
        ended = sum(run.diverged is not None for run in of_seeds.values())
        if ended:
            yield (
                f"{norm}: {ended} of {len(of_seeds)} runs diverged; they have no gap between "
                "training and validation, and their pairs are left out of it"
            )


def _too_few_seeds(found: Sequence[Measure]) -> Iterator[str]:
    """Whether a norm could have been distinguished at all."""
    compared = [
        len(measure.values)
        for measure in found
        if (measure.setting, measure.name) == ("best-lr", "metric") and measure.difference
    ]
    if compared:
        yield from too_few(max(compared), len(compared), "norm")
