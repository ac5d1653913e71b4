"""The straight line of a comparison: load, plan the arms, time, schedule, tune, run, analyse.

What depends on the clock (step times, the schedule, a cut) is decided once and kept in the run
folder: a resumed run repeats none of it, so that it ends in the same figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from bnify.accept import accept, example_call
from bnify.comparing.analysis import analyse
from bnify.comparing.arms import ArmPlan, plan_arms
from bnify.comparing.budget import Costs, cut_words, fitted, refitted, wanted
from bnify.comparing.clock import Clock
from bnify.comparing.comparison import Arm, Comparison
from bnify.comparing.data import Data
from bnify.comparing.engine import Engine, open_engine
from bnify.comparing.job import Job
from bnify.comparing.pilot import Pilot, measure_steps
from bnify.comparing.question import DROPPED_FIRST, NORMS
from bnify.comparing.run_folder import RunFolder
from bnify.comparing.schedule import Schedule, Selection, select
from bnify.comparing.trial import Outcome, Trial
from bnify.environment import environment
from bnify.errors import SpecError

#: Share of the budget that timing steps may take.
_PILOT_SHARE: Final = 0.05
_PILOT_SECONDS: Final = 6.0
#: Share of the budget after which what is not tuned yet is not tuned any more.
_TUNING_SHARE: Final = 0.7
#: Kept for analysis and report.
_REPORT_SECONDS: Final = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a comparison is.

    Attributes:
        doing: In words.
        done: Training runs done.
        total: Of so many in this phase.
        left: Seconds until the end of this phase, about; None where that is not known yet.
    """

    doing: str
    done: int = 0
    total: int = 0
    left: float | None = None


Tell = Callable[[Progress], None]


@dataclass(slots=True, kw_only=True)
class _Run:
    """The state of one comparison."""

    job: Job
    folder: RunFolder
    tell: Tell
    clock: Clock
    outcomes: dict[Trial, Outcome] = field(default_factory=dict)

    def trials(
        self, engine: Engine, trials: Sequence[Trial], doing: str, costs: Costs, until: float
    ) -> bool:
        """Run what is not done yet; False where the clock was at ``until`` before.

        Every finished trial is in the run folder before the next one is waited for.
        """
        todo = [trial for trial in trials if trial not in self.outcomes]
        done, began = len(trials) - len(todo), self.clock.now()
        missing = set(todo)
        self.tell(Progress(doing=doing, done=done, total=len(trials)))
        with closing(engine.run(todo)) as finished:
            for outcome in finished:
                kept = replace(outcome, elapsed=self.clock.now())
                self.folder.keep(kept)
                self.outcomes[kept.trial] = kept
                missing.discard(kept.trial)
                rest, spent = costs.seconds(sorted_of(missing)), self.clock.now() - began
                past = costs.seconds([t for t in todo if t not in missing])
                left = rest * spent / past if past else None
                count = len(trials) - len(missing)
                self.tell(Progress(doing=doing, done=count, total=len(trials), left=left))
                if missing and self.clock.now() >= until:
                    return False
        return True


def sorted_of(trials: Iterable[Trial]) -> list[Trial]:
    """In an order that does not depend on hashes: sums of floats are then the same each time."""
    return sorted(trials, key=lambda trial: trial.key)


def run_job(
    job: Job, folder: RunFolder, *, engine: str, jobs: int, tell: Tell, model: str, data: str
) -> Comparison:
    """Run a comparison, or what is left of it.

    Args:
        job: Model, data, loss and question; its arms are planned here.
        folder: Where finished trials and decisions are kept.
        engine: ``"local"``, ``"ray"`` or ``"ray://host:port"``.
        jobs: Processes.
        tell: Called with the progress.
        model: The model in words.
        data: The data in words, for errors.

    Returns:
        The comparison; with :attr:`Comparison.partial` where it was interrupted.

    Raises:
        BnifyError: The model or the data cannot be compared with, or a process was killed.
    """
    clock = Clock(folder.elapsed, job.question.budget)
    run = _Run(
        job=job,
        folder=folder,
        tell=tell,
        clock=clock,
        outcomes=dict(folder.outcomes()),
    )
    tell(Progress(doing=f"loading {model} and {data}"))
    build, loaded = job.load()
    question, setup = job.question, job.setup(loaded)
    if question.batch_size > len(loaded.train):
        raise SpecError(
            f"a batch of {question.batch_size} is more than the {len(loaded.train)} training "
            f"samples of {loaded.name}",
            hint=f"--batch-size {max(1, len(loaded.train) // 4)}",
        )
    loading = clock.now() - folder.elapsed
    tell(Progress(doing="inserting and verifying each norm"))
    example = loaded.train.batch(torch.arange(question.batch_size))[0]
    fresh = build(0)
    accept(fresh, verb="compare")
    reference, arms = plan_arms(
        fresh, example_call(fresh, example), question.norms, batch_size=question.batch_size
    )
    job = run.job = replace(job, arms=arms)
    usable = [arm for arm in arms if not arm.left_out]
    found = folder.read("pilot")
    if found is None:
        tell(Progress(doing="timing a training step with each norm"))
        pilot = measure_steps(
            build,
            usable,
            setup,
            reference=reference,
            sizes=question.batch_sizes if "batch" in question.sweep else (),
            seconds=min(_PILOT_SECONDS, question.budget * _PILOT_SHARE or _PILOT_SECONDS),
            loading=loading,
        )
        folder.write("pilot", pilot.to_dict())
    else:
        pilot = Pilot.from_dict(found)
    norms = [arm.norm for arm in usable if arm.norm not in pilot.failed]
    if reference not in norms:
        left_out = next(arm.left_out for arm in arms if arm.norm == reference)
        raise SpecError(
            pilot.failed.get(reference) or f"{model} cannot be trained as it is: {left_out}",
            hint="mend the model, the data or the loss",
        )
    full, notes = wanted(question, loaded)
    schedule, selection, name, partial = _run_all(
        run, full, norms, Costs.of(pilot, question, loaded), reference, engine, jobs, loaded
    )
    return analyse(
        question,
        schedule,
        selection,
        tuple(_arm(arm, pilot, schedule) for arm in arms),
        run.outcomes,
        data=loaded.words,
        model=model,
        task=loaded.task,
        metric="accuracy" if setup.classifies else "loss",
        higher=setup.classifies,
        reference=reference,
        optimizer=_optimizer(job),
        notes=(*_notes(job, loaded), *notes, *folder.notes),
        partial=partial,
        seconds=clock.now(),
        environment={
            **environment(device=str(setup.device), seed=question.seed),
            "threads": 1,
            "engine": name,
        },
    )


def _run_all(
    run: _Run,
    full: Schedule,
    norms: Sequence[str],
    costs: Costs,
    reference: str,
    engine: str,
    jobs: int,
    data: Data,
) -> tuple[Schedule, Selection, str, str]:
    """Tune and run; the schedule that was kept, the choice, the engine's name, what is missing."""
    folder, clock = run.folder, run.clock
    nothing = Selection(best=dict.fromkeys(norms), equal_lr=full.lrs[0], target=None)
    schedule, selection, name = full, nothing, engine
    try:
        run.tell(Progress(doing="starting"))
        with open_engine(engine, run.job, jobs) as opened:
            name = opened.name
            found = folder.read("schedule")
            if found is None:
                left, workers = clock.left, opened.workers
                droppable = DROPPED_FIRST if run.job.question.norms == NORMS else ()
                schedule = fitted(
                    full, norms, costs, seconds=left, workers=workers, droppable=droppable
                )
                schedule = replace(schedule, cuts=tuple(cut_words(full, schedule)))
                folder.write("schedule", schedule.to_dict())
            else:
                schedule = Schedule.from_dict(found)
            norms = schedule.norms(norms)
            schedule, selection = _tuned(run, opened, full, schedule, norms, costs, reference, data)
            schedule = _with_figures(run, opened, schedule, norms, selection, costs)
    except KeyboardInterrupt:
        done = len(run.outcomes)
        return schedule, selection, name, f"interrupted after {done} training runs"
    return schedule, selection, name, ""


def _tuned(
    run: _Run,
    engine: Engine,
    full: Schedule,
    schedule: Schedule,
    norms: Sequence[str],
    costs: Costs,
    reference: str,
    data: Data,
) -> tuple[Schedule, Selection]:
    """Run the tuning trials, choose the learning rates, and decide what else there is time for."""
    found = run.folder.read("selection")
    if found is not None:
        return Schedule.from_dict(found["schedule"]), Selection(**found["selection"])
    trials = list(schedule.tuning(norms))
    began, before = run.clock.now(), len(run.outcomes)
    until = run.clock.budget * _TUNING_SHARE
    if not run.trials(engine, trials, "tuning learning rates", costs, until):
        tuned = schedule.as_far_as(run.outcomes, norms)
        if tuned is None:
            per_run = (run.clock.now() - began) / max(1, len(run.outcomes) - before)
            raise SpecError(
                f"the budget of {run.clock.budget:.0f} s is too small to tune one learning rate: "
                f"a training run takes about {per_run * engine.workers:.1f} s",
                hint=f"--budget {4 * run.clock.budget:.0f}, fewer --norms, or fewer --epochs",
            )
        schedule = tuned
    selection = select(
        schedule,
        norms,
        run.outcomes,
        reference=reference,
        higher=data.task == "classification",
        target=run.job.question.target,
    )
    _refuse_nothing_trained(schedule, norms, selection, run.outcomes)
    fresh = len(run.outcomes) - before
    if fresh == len(trials):  # all of them ran here: what they took is what the others will take
        spent = (run.clock.now() - began) * engine.workers
        costs = replace(costs, factor=spent / max(costs.seconds(trials), 1e-9))
    left, workers = run.clock.left, engine.workers
    schedule = refitted(full, schedule, norms, selection, costs, seconds=left, workers=workers)
    schedule = replace(schedule, cuts=tuple(cut_words(full, schedule)))
    run.folder.write(
        "selection",
        {
            "selection": {
                "best": dict(selection.best),
                "equal_lr": selection.equal_lr,
                "target": selection.target,
            },
            "schedule": schedule.to_dict(),
        },
    )
    return schedule, selection


def _refuse_nothing_trained(
    schedule: Schedule,
    norms: Sequence[str],
    selection: Selection,
    outcomes: Mapping[Trial, Outcome],
) -> None:
    """Refuse to go on where no norm trained at any learning rate.

    Raises:
        SpecError: With the first error of the user's code, or where the loss stopped being finite.
    """
    if any(best is not None for best in selection.best.values()):
        return
    tried = [outcomes[t] for t in schedule.tuning(norms) if t in outcomes]
    failed = next((run.error for run in tried if run.error), "")
    if failed:
        raise SpecError(failed, hint="mend the model, the data or the loss")
    if all(run.diverged == 1 for run in tried):
        raise SpecError(
            "the loss is not finite at the first step, with any norm",
            hint="look at the data, the loss and the initial weights",
        )
    raise SpecError(
        f"every run diverged, with every norm and learning rate from {schedule.lrs[0]:g} to "
        f"{schedule.lrs[-1]:g}",
        hint=f"--lrs {schedule.lrs[0] / 100:g},{schedule.lrs[0] / 10:g}",
    )


def _with_figures(
    run: _Run,
    engine: Engine,
    schedule: Schedule,
    norms: Sequence[str],
    selection: Selection,
    costs: Costs,
) -> Schedule:
    """Run the trials of the figures; the schedule of what the budget let be done."""
    found = run.folder.read("cut")
    if found is not None:
        return _cut_at(schedule, found["seeds"])
    trials = list(schedule.figures(norms, selection))
    if run.trials(engine, trials, "training", costs, run.clock.budget - _REPORT_SECONDS):
        return schedule
    missing = {trial.seed for trial in trials if trial not in run.outcomes}
    whole = [seed for seed in schedule.seeds if seed not in missing]
    run.folder.write("cut", {"seeds": whole})
    return _cut_at(schedule, whole)


def _cut_at(schedule: Schedule, seeds: Sequence[int]) -> Schedule:
    """The schedule with the seeds that were finished when the budget ended."""
    said = f"the budget ended after {len(seeds)} of {len(schedule.seeds)} seeds"
    return replace(schedule, seeds=tuple(seeds), cuts=(*schedule.cuts, said))


def _arm(arm: ArmPlan, pilot: Pilot, schedule: Schedule) -> Arm:
    """An arm's figures before anything was run."""
    dropped = "left out for the budget" if arm.norm in schedule.dropped else ""
    return Arm(
        norm=arm.norm,
        norms=arm.norms,
        parameters=arm.parameters,
        step_ms=pilot.step_ms.get(arm.norm),
        step_ratio=pilot.ratio.get(arm.norm),
        left_out=arm.left_out or pilot.failed.get(arm.norm, "") or dropped,
        same_as=arm.same_as,
        notes=() if dropped else arm.notes,
    )


def _optimizer(job: Job) -> str:
    """The optimizer in words."""
    question = job.question
    words = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}[question.optimizer]
    if question.optimizer == "sgd" and question.momentum:
        words += f" with momentum {question.momentum:g}"
    if question.weight_decay:
        words += f", weight decay {question.weight_decay:g} (not of norms and biases)"
    return f"{words}, constant learning rate"


def _notes(job: Job, data: Data) -> list[str]:
    """What a reader should know of model and data."""
    notes: list[Any] = list(data.notes)
    if job.recipe.fixed():
        notes.append(
            "every seed starts from the same weights, those of the network as given: seeds differ "
            "in the order of the batches only"
        )
    return notes
