"""The phases of a comparison: schedule, tune, run. What is decided in one is kept in its folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Final

from bnify.comparing.budget import REPORT, Costs, all_figures, cut_words, fitted, refitted
from bnify.comparing.clock import Clock
from bnify.comparing.engine import Engine
from bnify.comparing.question import DROPPED_FIRST, NORMS, Question
from bnify.comparing.run_folder import RunFolder
from bnify.comparing.schedule import Schedule, Selection, select
from bnify.comparing.trial import Outcome, Trial
from bnify.errors import SpecError

#: Share of the budget after which what is not tuned yet is not tuned any more.
_TUNING_SHARE: Final = 0.7
#: A budget that is suggested is this many times what the smallest comparison is expected to take.
_MARGIN: Final = 2.0


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
class Phases:
    """A comparison on its way.

    Attributes:
        question: What is asked.
        folder: Where outcomes and decisions are kept.
        clock: Counts from before an interruption.
        tell: Called with the progress.
        outcomes: Of the trials that are done.
        norms: The arms that can be run.
        costs: Of trials on this machine.
        reference: The arm that the others are compared with.
        higher: Whether a larger metric is better.
        full: What would be run without a budget.
        report: Seconds to keep for analysis and report.
        schedule: What is run, as far as that is decided.
        selection: Learning rates and target, once they are chosen.
    """

    question: Question
    folder: RunFolder
    clock: Clock
    tell: Tell
    outcomes: dict[Trial, Outcome]
    norms: Sequence[str]
    costs: Costs
    reference: str
    higher: bool
    full: Schedule
    report: float = REPORT
    schedule: Schedule = field(init=False)
    selection: Selection = field(init=False)
    _fresh: list[Outcome] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.schedule = self.full
        nothing = dict.fromkeys(self.norms)
        self.selection = Selection(best=nothing, equal_lr=self.full.lrs[0], target=None)

    def run(self, engine: Engine) -> None:
        """All phases, or what is left of them.

        Raises:
            SpecError: The budget ended before there was one figure, or no arm trained.
        """
        self._fit(engine)
        self._tune(engine)
        self._finish(engine)

    def _fit(self, engine: Engine) -> None:
        """Decide what there is time for, by the measured times of steps."""
        found = self.folder.read("schedule")
        if found is not None:
            self.schedule = Schedule.from_dict(found)
        else:
            self.schedule = self._with_cuts(
                fitted(
                    self.full,
                    self.norms,
                    self.costs,
                    seconds=self.clock.left,
                    workers=engine.workers,
                    report=self.report,
                    droppable=self._droppable(),
                )
            )
            self.folder.write("schedule", self.schedule.to_dict())
        self.norms = self.schedule.norms(self.norms)

    def _tune(self, engine: Engine) -> None:
        """Choose the learning rates, and decide once more what there is time for."""
        found = self.folder.read("selection")
        if found is not None:
            self.schedule = Schedule.from_dict(found["schedule"])
            self.selection = Selection(**found["selection"])
            return
        trials = list(self.schedule.tuning(self.norms))
        began, before = self.clock.now(), len(self.outcomes)
        whole = self._trials(
            engine, trials, "tuning learning rates", self.clock.budget * _TUNING_SHARE
        )
        spent, fresh = (self.clock.now() - began) * engine.workers, len(self.outcomes) - before
        if not whole:
            tuned = self.schedule.as_far_as(self.outcomes, self.norms)
            if tuned is None:
                raise self._too_small("to tune one learning rate", engine)
            self.schedule = tuned
        chosen = select(
            self.schedule,
            self.norms,
            self.outcomes,
            reference=self.reference,
            higher=self.higher,
            target=self.question.target,
        )
        if all(best is None for best in chosen.best.values()):
            raise _nothing_trained(self.schedule, [self.outcomes[t] for t in trials])
        costs = self.costs
        if whole and fresh == len(trials):  # all ran here: the others will take as long
            costs = replace(costs, factor=spent / max(costs.seconds(trials), 1e-9))
        self.schedule = self._with_cuts(
            refitted(
                self.full,
                self.schedule,
                self.norms,
                chosen,
                costs,
                seconds=self.clock.left,
                workers=engine.workers,
                report=self.report,
            )
        )
        self.selection = chosen
        kept = {"selection": chosen.to_dict(), "schedule": self.schedule.to_dict()}
        self.folder.write("selection", kept)

    def _finish(self, engine: Engine) -> None:
        """Run the trials of the figures; where the budget ends before, whole seeds stay."""
        found = self.folder.read("cut")
        if found is None:
            trials = list(self.schedule.figures(self.norms, self.selection))
            if self._trials(engine, trials, "training", self.clock.budget - self.report):
                return
            missing = {trial.seed for trial in trials if trial not in self.outcomes}
            found = {"seeds": [seed for seed in self.schedule.seeds if seed not in missing]}
            if not found["seeds"]:
                raise self._too_small("to train one seed of every norm", engine)
            self.folder.write("cut", found)
        left, planned = tuple(found["seeds"]), len(self.schedule.seeds)
        said = f"the budget ended after {len(left)} of {planned} seeds"
        self.schedule = replace(self.schedule, seeds=left, cuts=(*self.schedule.cuts, said))

    def _droppable(self) -> Sequence[str]:
        return DROPPED_FIRST if self.question.norms == NORMS else ()

    def _too_small(self, what: str, engine: Engine) -> SpecError:
        """The budget ended before there was one figure: where it went, and what is enough."""
        first, timed = self._fresh[0], self._fresh[engine.workers :]
        spent = (self._fresh[-1].elapsed - first.elapsed) * engine.workers
        if not timed:  # the first ones' time holds that of workers, or of Ray, to start
            timed, spent = self._fresh, sum(run.seconds for run in self._fresh)
        each = spent / len(timed)
        began = max(0.0, first.elapsed - each)
        factor = spent / max(self.costs.seconds([run.trial for run in timed]), 1e-9)
        least = fitted(
            self.full,
            self.norms,
            self.costs,
            seconds=-math.inf,
            workers=engine.workers,
            droppable=self._droppable(),
        )
        run = least.norms(self.norms)
        trials = [*least.tuning(run), *all_figures(least, run)]
        training = self.costs.seconds(trials) * factor / engine.workers
        needed = _MARGIN * (began + training) + self.report
        place = 10 ** max(0, math.floor(math.log10(needed)) - 1)
        return SpecError(
            f"the budget of {self.clock.budget:g} s is too small {what}: {began:.1f} s went into "
            f"loading, timing and starting, a training run takes about "
            f"{each:.2g} s, and the smallest comparison has {len(trials)}",
            hint=f"--budget {math.ceil(needed / place) * place:g}, fewer --norms or --epochs",
        )

    def _with_cuts(self, schedule: Schedule) -> Schedule:
        return replace(schedule, cuts=tuple(cut_words(self.full, schedule)))

    def _trials(self, engine: Engine, trials: Sequence[Trial], doing: str, until: float) -> bool:
        """Run what is not done yet; False where the clock was at ``until`` before.

        Every finished trial is in the run folder before the next one is waited for.
        """
        todo = [trial for trial in trials if trial not in self.outcomes]
        price = {trial: self.costs.seconds([trial]) for trial in todo}
        count, began, rest, paid = (
            len(trials) - len(todo),
            self.clock.now(),
            sum(price.values()),
            0.0,
        )
        self.tell(Progress(doing=doing, done=count, total=len(trials)))
        with closing(engine.run(todo)) as finished:
            for outcome in finished:
                kept = replace(outcome, elapsed=self.clock.now())
                self.folder.keep(kept)
                self.outcomes[kept.trial] = kept
                self._fresh.append(kept)
                count, paid = count + 1, paid + price[kept.trial]
                left = (rest - paid) * (kept.elapsed - began) / paid
                self.tell(Progress(doing=doing, done=count, total=len(trials), left=max(left, 0.0)))
                if count < len(trials) and self.clock.now() >= until:
                    return False
        return True


def _nothing_trained(schedule: Schedule, tried: Sequence[Outcome]) -> SpecError:
    """No arm trained at any learning rate: the first error of the user's code, or what diverged."""
    failed = next((run.error for run in tried if run.error), "")
    if failed:
        return SpecError(failed, hint="mend the model, the data or the loss")
    if all(run.diverged == 1 for run in tried):
        return SpecError(
            "the loss is not finite at the first step, with any norm",
            hint="look at the data, the loss and the initial weights",
        )
    least, most = schedule.lrs[0], schedule.lrs[-1]
    return SpecError(
        f"every run diverged, with every norm and learning rate from {least:g} to {most:g}",
        hint=f"--lrs {least / 100:g},{least / 10:g}",
    )
