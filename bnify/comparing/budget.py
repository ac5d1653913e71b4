"""What of the wanted trials fits into the seconds there are; every cut is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from bnify.comparing.pilot import Pilot
from bnify.comparing.question import Question
from bnify.comparing.schedule import FIRST_TUNING_SEED, Schedule, Selection
from bnify.comparing.training import FINAL_SAMPLE, TRAINING_SAMPLE, VALIDATION_SAMPLE, looks
from bnify.comparing.trial import Trial

if TYPE_CHECKING:
    from bnify.comparing.data import Data

#: Seconds to build a model and to look at it once, beyond what scales with its steps.
_TRIAL_OVERHEAD: Final = 0.03
#: A forward pass in eval mode costs about this share of a training step on as many samples.
_FORWARD: Final = 0.35
#: Seconds for a worker process to import torch.
_WORKER_START: Final = 3.0
#: Seconds for the analysis, and with it to draw and write the report where one is wanted.
ANALYSIS: Final = 0.5
REPORT: Final = 5.0
#: Share of the time that is planned for: trials beside each other slow each other down.
_PLANNED: Final = 0.8
#: Arms that are kept, the reference among them, where norms are dropped for the budget.
_FEWEST_ARMS: Final = 5
#: Steps below which a training run says nothing.
_FEWEST_STEPS: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What trials cost on this machine.

    Attributes:
        pilot: Times of training steps.
        batch_size: The usual one.
        train: Training samples.
        validation: Validation samples.
        test: Test samples.
        factor: Measured over estimated time; 1 before anything was run.
    """

    pilot: Pilot
    batch_size: int
    train: int
    validation: int
    test: int
    factor: float = 1.0

    @classmethod
    def of(cls, pilot: Pilot, question: Question, data: Data) -> Costs:
        """Before anything was run."""
        return cls(
            pilot=pilot,
            batch_size=question.batch_size,
            train=len(data.train),
            validation=len(data.validation),
            test=len(data.test),
        )

    def seconds(self, trials: Iterator[Trial] | Sequence[Trial]) -> float:
        """Seconds of these trials, one after the other."""
        return self.factor * sum(map(self._of_one, trials))

    def _of_one(self, trial: Trial) -> float:
        step = self.pilot.seconds(trial.norm, trial.batch_size, self.batch_size)
        sample = self.pilot.seconds(trial.norm, self.batch_size, self.batch_size) / self.batch_size
        look = min(VALIDATION_SAMPLE, self.validation) + min(TRAINING_SAMPLE, self.train)
        final = min(FINAL_SAMPLE, self.train) + self.validation + self.test
        evaluated = len(looks(trial.steps)) * look + final
        return trial.steps * step + evaluated * sample * _FORWARD + _TRIAL_OVERHEAD


def wanted(question: Question, data: Data) -> tuple[Schedule, list[str]]:
    """The schedule without a budget, and what of the question the data do not allow."""
    train, size = len(data.train), question.batch_size
    sizes = tuple(s for s in sorted(set(question.batch_sizes)) if s <= train)
    refused = [s for s in question.batch_sizes if s > train]
    notes = []
    if refused and "batch" in question.sweep:
        named = " and ".join(map(str, refused))
        notes.append(f"no run at batch size {named}: there are {train} training samples")
    axes = {
        "lr": question.grid,
        "batch": tuple(map(float, sizes)),
        "init": tuple(sorted(set(question.init_scales))),
    }
    schedule = Schedule(
        steps=max(1, round(question.epochs * (train // size))),
        batch_size=size,
        lrs=question.grid,
        tuning_seeds=tuple(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + question.tuning_seeds)),
        seeds=tuple(range(question.seeds)),
        sweeps={axis: axes[axis] for axis in axes if axis in question.sweep and axes[axis]},
    )
    return schedule, notes


def fitted(
    full: Schedule,
    norms: Sequence[str],
    costs: Costs,
    *,
    seconds: float,
    workers: int,
    report: float = REPORT,
    droppable: Sequence[str] = (),
) -> Schedule:
    """The largest part of a schedule that is expected to fit.

    Args:
        full: What is wanted.
        norms: The arms.
        costs: Of trials on this machine.
        seconds: Wall clock that is left.
        workers: Processes.
        report: Seconds of these to keep for analysis and report.
        droppable: Norms that may be left out, the first one first.
    """
    started = _WORKER_START + costs.pilot.loading if workers > 1 else 0.0
    available = (seconds - report - started) * workers * _PLANNED

    def cost(schedule: Schedule) -> float:
        run = schedule.norms(norms)
        return costs.seconds(schedule.tuning(run)) + costs.seconds(all_figures(schedule, run))

    fewer = _without_a_norm(droppable, len(norms))
    return _cut(full, cost, available, (*_FIRST, fewer, *_THEN))


def refitted(
    full: Schedule,
    tuned: Schedule,
    norms: Sequence[str],
    selection: Selection,
    costs: Costs,
    *,
    seconds: float,
    workers: int,
    report: float = REPORT,
) -> Schedule:
    """The same once the tuning runs have shown what trials really cost: seeds and sweeps only.

    Args:
        full: What is wanted.
        tuned: What was tuned; its steps and learning rates stay.
        norms: The arms.
        selection: Their learning rates.
        costs: Of trials, as measured.
        seconds: Wall clock that is left.
        workers: Processes.
        report: Seconds of these to keep for analysis and report.
    """
    available = (seconds - report) * workers * (1 + _PLANNED) / 2
    sweeps = {axis: tuned.lrs if axis == "lr" else full.sweeps[axis] for axis in full.sweeps}
    start = replace(tuned, seeds=full.seeds, sweeps=sweeps)
    return _cut(
        start,
        lambda s: costs.seconds(s.figures(s.norms(norms), selection)),
        available,
        _AFTER_TUNING,
    )


def all_figures(schedule: Schedule, norms: Sequence[str]) -> Iterator[Trial]:
    """The runs beyond tuning, as if every norm's best learning rate were another than the equal."""
    lrs = schedule.lrs
    most = Selection(best=dict.fromkeys(norms, lrs[-1]), equal_lr=lrs[0], target=None)
    return schedule.figures(norms, most)


Reduction = Callable[[Schedule, Schedule], Schedule | None]


def _cut(
    full: Schedule,
    cost: Callable[[Schedule], float],
    available: float,
    reductions: Sequence[Reduction],
) -> Schedule:
    """Reduce step by step, each time in the first way that is still open."""
    schedule = full
    while cost(schedule) > available:
        smaller = next((s for r in reductions if (s := r(schedule, full)) is not None), None)
        if smaller is None:
            break  # the smallest there is: the clock decides
        schedule = smaller
    return schedule


def _fewer_tuning_seeds(s: Schedule, _: Schedule) -> Schedule | None:
    return replace(s, tuning_seeds=s.tuning_seeds[:-1]) if len(s.tuning_seeds) > 1 else None


def _fewer_lrs(least: int) -> Reduction:
    def reduce(s: Schedule, _: Schedule) -> Schedule | None:
        half = s.lrs[::2]  # the ends are among them where their number is odd
        swept = {**s.sweeps, "lr": half} if "lr" in s.sweeps else s.sweeps
        return replace(s, lrs=half, sweeps=swept) if least <= len(half) < len(s.lrs) else None

    return reduce


def _fewer_seeds(least: int) -> Reduction:
    def reduce(s: Schedule, _: Schedule) -> Schedule | None:
        return replace(s, seeds=s.seeds[:-1]) if len(s.seeds) > least else None

    return reduce


def _fewer_steps(share: float) -> Reduction:
    def reduce(s: Schedule, full: Schedule) -> Schedule | None:
        steps = round(s.steps * 0.9)
        fits = steps >= max(share * full.steps, _FEWEST_STEPS) and steps < s.steps
        return replace(s, steps=steps) if fits else None

    return reduce


def _thinner_sweeps(s: Schedule, full: Schedule) -> Schedule | None:
    thin = {axis: _thinned(axis, values, full) for axis, values in s.sweeps.items()}
    return replace(s, sweeps=thin) if thin != s.sweeps else None


def _thinned(axis: str, values: tuple[float, ...], full: Schedule) -> tuple[float, ...]:
    """The ends of an axis and its usual value."""
    usual = {"batch": float(full.batch_size), "init": 1.0}.get(axis)
    if axis == "lr" or len(values) <= 3:
        return values
    return tuple(v for v in values if v in (values[0], values[-1], usual))


def _without_a_sweep(s: Schedule, _: Schedule) -> Schedule | None:
    return replace(s, sweeps=dict(list(s.sweeps.items())[:-1])) if s.sweeps else None


def _without_a_norm(droppable: Sequence[str], arms: int) -> Reduction:
    def reduce(s: Schedule, _: Schedule) -> Schedule | None:
        left = [norm for norm in droppable if norm not in s.dropped]
        enough = arms - len(s.dropped) > _FEWEST_ARMS
        return replace(s, dropped=(*s.dropped, left[0])) if left and enough else None

    return reduce


def _no_more_seeds_than_needed(s: Schedule, full: Schedule) -> Schedule | None:
    """Below that, Holm's correction over norms and claims leaves nothing to be found."""
    return _fewer_seeds(9 if s.sweeps else 8)(s, full)


_FIRST: Final[tuple[Reduction, ...]] = (
    _fewer_tuning_seeds,
    _fewer_lrs(4),
    _thinner_sweeps,
    _fewer_steps(0.5),
)
_THEN: Final[tuple[Reduction, ...]] = (
    _no_more_seeds_than_needed,
    _fewer_steps(0.3),
    _without_a_sweep,
    _fewer_lrs(3),
    _fewer_steps(0.15),
    _fewer_seeds(6),
    _fewer_steps(0.05),
    _fewer_seeds(2),
)
_AFTER_TUNING: Final[tuple[Reduction, ...]] = (
    _thinner_sweeps,
    _no_more_seeds_than_needed,
    _without_a_sweep,
    _fewer_seeds(2),
)


def cut_words(full: Schedule, less: Schedule) -> Iterator[str]:
    """What a schedule lacks of the wanted one, as sentences."""
    for what, before, after in (
        ("steps a run", full.steps, less.steps),
        ("seeds to tune with", len(full.tuning_seeds), len(less.tuning_seeds)),
        ("learning rates", len(full.lrs), len(less.lrs)),
        ("seeds", len(full.seeds), len(less.seeds)),
    ):
        if after < before:
            word = what.replace("seeds", "seed", 1) if after == 1 else what
            yield f"{after} {word} instead of {before}"
    if less.dropped:
        yield f"no runs with {' and '.join(less.dropped)} norm"
    for axis, values in full.sweeps.items():
        left = less.sweeps.get(axis, ())
        if not left:
            yield f"no sweep over {_AXES[axis]}"
        elif len(left) < len(values):
            yield f"{len(left)} values instead of {len(values)} in the sweep over {_AXES[axis]}"


_AXES: Final = {"lr": "learning rates", "batch": "batch sizes", "init": "initial scales"}
