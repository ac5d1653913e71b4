"""Which trials are run: the design of the experiment, and what a budget leaves of it."""

from __future__ import annotations

import statistics
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Self

from bnify.comparing.trial import Outcome, Trial

#: Seeds from here on tune learning rates; those of the figures start at 0.
FIRST_TUNING_SEED: Final = 1000
#: A small batch takes more steps through the same samples, up to so many times the usual.
MOST_STEPS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The trials of a comparison, decided once and kept in the run folder.

    Attributes:
        steps: Optimizer steps at the usual batch size.
        batch_size: The usual batch size.
        lrs: Learning rates that every norm is tuned over, ascending.
        tuning_seeds: Seeds of the tuning runs.
        seeds: Seeds of the figures.
        sweeps: Axis (``"lr"``, ``"batch"``, ``"init"``) → its values, ascending.
        dropped: Norms that are not run for the budget.
        cuts: What the budget took away, one sentence each.
    """

    steps: int
    batch_size: int
    lrs: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    sweeps: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    cuts: tuple[str, ...] = ()

    def norms(self, usable: Sequence[str]) -> list[str]:
        """Those of the usable norms that are run."""
        return [norm for norm in usable if norm not in self.dropped]

    def trial(self, norm: str, lr: float, seed: int) -> Trial:
        """The run of a norm at a learning rate, all else as usual."""
        return Trial(norm=norm, lr=lr, batch_size=self.batch_size, steps=self.steps, seed=seed)

    def batch_trial(self, norm: str, size: int, seed: int, best: float) -> Trial:
        """The run of a norm at another batch size.

        Smaller batches take as many samples in more steps, up to :data:`MOST_STEPS` times the
        usual, larger ones as many steps. The norm's best learning rate is scaled down in
        proportion (Goyal et al., Accurate, Large Minibatch SGD, 2017), and never up.
        """
        share = size / self.batch_size
        steps = round(self.steps * min(MOST_STEPS, max(1.0, 1 / share)))
        return Trial(norm=norm, lr=best * min(1.0, share), batch_size=size, steps=steps, seed=seed)

    def init_trial(self, norm: str, scale: float, seed: int, best: float) -> Trial:
        """The run of a norm from scaled initial weights, at its best learning rate."""
        return replace(self.trial(norm, best, seed), init_scale=scale)

    def tuning(self, norms: Sequence[str]) -> Iterator[Trial]:
        """The runs that learning rates are chosen by.

        All norms at one learning rate after the other, from the middle outwards, so that a cut
        leaves every norm with the same ones.
        """
        middle = (len(self.lrs) - 1) / 2
        outwards = sorted(range(len(self.lrs)), key=lambda index: (abs(index - middle), index))
        for seed in self.tuning_seeds:
            for index in outwards:
                for norm in norms:
                    yield self.trial(norm, self.lrs[index], seed)

    def as_far_as(self, done: Container[Trial], norms: Sequence[str]) -> Self | None:
        """The schedule without the tuning that was not done; None where nothing is whole."""
        whole = [
            [lr for lr in self.lrs if all(self.trial(n, lr, seed) in done for n in norms)]
            for seed in self.tuning_seeds
        ]
        seeds = [
            s for s, lrs in zip(self.tuning_seeds, whole, strict=True) if len(lrs) == len(self.lrs)
        ]
        if seeds:
            return replace(self, tuning_seeds=tuple(seeds))
        if not whole[0]:
            return None
        lrs = tuple(whole[0])
        sweeps = {**self.sweeps, "lr": lrs} if "lr" in self.sweeps else self.sweeps
        return replace(self, lrs=lrs, tuning_seeds=self.tuning_seeds[:1], sweeps=sweeps)

    def figures(self, norms: Sequence[str], selection: Selection) -> Iterator[Trial]:
        """All other runs, seed by seed so that a cut leaves whole pairs; none comes twice."""
        seen: set[Trial] = set()
        for seed in self.seeds:
            for norm in norms:
                best = selection.best.get(norm)
                if best is None:
                    continue
                for trial in self._of_seed(norm, seed, best, selection.equal_lr):
                    if trial not in seen:
                        seen.add(trial)
                        yield trial

    def _of_seed(self, norm: str, seed: int, best: float, equal: float) -> Iterator[Trial]:
        yield self.trial(norm, best, seed)
        yield self.trial(norm, equal, seed)
        for lr in self.sweeps.get("lr", ()):
            yield self.trial(norm, lr, seed)
        for size in self.sweeps.get("batch", ()):
            yield self.batch_trial(norm, int(size), seed, best)
        for scale in self.sweeps.get("init", ()):
            yield self.init_trial(norm, scale, seed, best)

    def to_dict(self) -> dict[str, Any]:
        """The schedule as JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_dict` wrote.

        Raises:
            KeyError: An entry is missing.
        """
        sweeps = {axis: tuple(values) for axis, values in data["sweeps"].items()}
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**{**plain, "sweeps": sweeps})


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What the tuning runs decide.

    Attributes:
        best: Norm → its learning rate; None where every run diverged or failed.
        equal_lr: The learning rate for all norms alike: the reference's best.
        target: The validation metric that runs are timed to; None where nothing trained.
    """

    best: Mapping[str, float | None]
    equal_lr: float
    target: float | None

    def to_dict(self) -> dict[str, Any]:
        """The selection as JSON-ready data, and the arguments of another one like it."""
        return {"best": dict(self.best), "equal_lr": self.equal_lr, "target": self.target}


def select(
    schedule: Schedule,
    norms: Sequence[str],
    outcomes: Mapping[Trial, Outcome],
    *,
    reference: str,
    higher: bool,
    target: float | None = None,
) -> Selection:
    """Choose each norm's learning rate by the mean validation metric of its tuning runs.

    Equal means go to the smaller mean loss, then to the smaller learning rate. The target is 95 %
    of the validation accuracy there, or 110 % of the loss, in the median over the arms and to three
    digits: what a reference reaches that hardly trains would be no target.

    Args:
        schedule: Whose tuning runs are done.
        norms: The arms.
        outcomes: By trial; missing ones count as failed.
        reference: The arm that the others are compared with.
        higher: Whether a larger metric is better.
        target: What the user asked for; None to choose.
    """
    best: dict[str, float | None] = {}
    reached: dict[str, float] = {}
    for norm in norms:
        scores = []
        for lr in schedule.lrs:
            found = [outcomes.get(schedule.trial(norm, lr, s)) for s in schedule.tuning_seeds]
            runs = [run for run in found if run is not None and not run.error]
            if len(runs) < len(found) or all(run.diverged is not None for run in runs):
                continue
            metric = sum(run.final_validation for run in runs) / len(runs)
            loss = sum(run.validation_loss[-1] for run in runs) / len(runs)
            scores.append((-metric if higher else metric, loss, lr))
        best[norm] = min(scores)[2] if scores else None
        if scores:
            reached[norm] = -min(scores)[0] if higher else min(scores)[0]
    alive = [norm for norm in (reference, *norms) if best.get(norm) is not None]
    if target is None and alive:
        middle = statistics.median(reached.values())
        target = float(f"{middle * (0.95 if higher else 1.1):.3g}")
    chosen = best.get(alive[0]) if alive else None
    equal = schedule.lrs[0] if chosen is None else chosen
    return Selection(best=best, equal_lr=equal, target=target)
