"""What an insertion measures on the user's data before it changes anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from bnify.borrow import copy_model, seeded
from bnify.capture import Captured
from bnify.errors import PlanError
from bnify.fingerprint import fingerprint
from bnify.norms import effective_eps
from bnify.plan import Plan
from bnify.pooled import Point, Pooled, pool
from bnify.ranks import Pools, Share, pooled_over_ranks, repeats_of, several_ranks, weights_of
from bnify.rewrite import Statistics, points
from bnify.staged import Pooling, Site, measure_staged, never_ran, stages
from bnify.structure import Call, device_of, match_batch, started
from bnify.verification.drift import FirstSamples

_FEW = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured for a plan.

    Attributes:
        statistics: By carrier, those of its calls; None when the plan wants none.
        notes: What a reader has to know of them.
        batch: The first samples of the data, joined; None without data.
        order: The stages of a plan with ``init="stats"``; else empty.
        pool: Runs a model over what was measured on once more, and pools its points.
    """

    statistics: Statistics | None = None
    notes: tuple[str, ...] = ()
    batch: Call | None = None
    order: Sequence[Sequence[Site]] = ()
    pool: Pooling | None = None


def measure(
    model: nn.Module,
    plan: Plan,
    captured: Captured,
    example: Call,
    data: Any,
    progress: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Pooled statistics for norms that start from them, on the data or on the example inputs.

    ``preserve`` needs one pass, ``stats`` one for each stage (:mod:`bnify.staged`): a one-shot
    iterator is then kept in memory. Under several ranks each pass is a collective.

    Args:
        model: The original model; a copy of it runs.
        plan: The plan.
        captured: The recording it was made on.
        example: The example inputs, as the user passed them.
        data: Batches, or None.
        progress: Called with a few words.

    Raises:
        PlanError: The data yields no batch that fits, the model fails on one, or a layer never
            runs on it.
    """
    wanted = points(plan)
    if not wanted:
        if not plan.edits or not _reusable(data):
            return Measured()
        first = FirstSamples(plan, example)
        with seeded(0):  # a shuffling loader draws its order from the global random state
            for batch in batches_of(data, example, model):
                first.add(batch)
                if first.full:
                    break
        note = "data measures the train-mode drift only: init='reset' starts anew"
        return Measured(notes=(note, *first.notes()), batch=first.joined())
    first = FirstSamples(plan, example)
    source = _Source([example] if data is None else data, example, model, first)
    identity = cache(lambda: (fingerprint(model).digest, weights_of(model)))
    notes: dict[str, None] = {}
    order: list[list[Site]] = []
    if any(edit.init == "stats" for edit in plan.edits):
        order = stages(captured, plan)

    def together(working: nn.Module, sites: Sequence[Point]) -> Pools:
        def own() -> Share:  # on every rank: what fails in it is told to the others
            if order:
                source.keep()
            structure, weights = identity()
            pools = source.pooled(working, sites)
            return Share(
                pools=pools,
                batches=source.batches,
                given=data is not None,
                structure=(structure, *sites),
                weights=weights,
                repeats=repeats_of(data, source.samples),
            )

        whole = pooled_over_ranks(own, device_of(model))
        notes.update(dict.fromkeys((*source.notes, *whole.notes)))
        return whole.pools

    if order:
        statistics = measure_staged(model, plan, order, together, progress)
    else:
        progress("measuring statistics")
        # On a copy: a model may count its calls or keep caches, and the user's stays as it is.
        statistics = together(copy_model(model), wanted)
    for path, pooled in statistics.items():
        if not all(one.count for one in pooled):
            raise never_ran(path)
    return Measured(
        statistics=statistics,
        notes=(
            *notes,
            *_notes(statistics, data, plan),
            *(first.notes() if data is not None else ()),
        ),
        batch=None if data is None else first.joined(),
        order=order,
        pool=together,
    )


class _Source:
    """The data of this rank, which every pass reads once.

    Attributes:
        batches: How many batches the last pass has read.
        samples: How many samples.
        notes: What was done to it.
    """

    def __init__(self, data: Any, example: Call, model: nn.Module, first: FirstSamples) -> None:
        self._data, self._example, self._model = data, example, model
        self._first = first
        self.batches = self.samples = 0
        self._empty = False
        self.notes: list[str] = []

    def keep(self) -> None:
        """Let there be several passes over a one-shot iterator."""
        if isinstance(self._data, Iterator):
            with seeded(0):
                self._data = list(self._data)
            count = len(self._data)
            self.notes = [f"all {count} batches were kept in memory: the data is an iterator"]

    def pooled(self, working: nn.Module, sites: Sequence[Point]) -> Pools:
        """One pass; a rank among several may have no batch, which pools nothing.

        Raises:
            PlanError: The data yields no batch that fits, or the model fails on one.
        """
        self.batches = self.samples = 0
        self._empty = False
        try:
            return pool(working, self._read(), sites)
        except PlanError:
            if self._empty and several_ranks():
                return {site.path: _nothing(site) for site in sites}
            raise

    def _read(self) -> Iterator[Call]:
        for batch in batches_of(self._data, self._example, self._model):
            self._first.add(batch)
            self.batches += 1
            self.samples += batch.batch or 0
            yield batch
        self._first.full = True  # another pass yields the same
        self._empty = not self.batches


def _nothing(site: Point) -> tuple[Pooled, ...]:
    return tuple(Pooled.empty(site.channels) for _ in range(site.calls))


def _notes(statistics: Mapping[str, Sequence[Pooled]], data: Any, plan: Plan) -> Iterator[str]:
    if data is None:
        yield "statistics come from the example inputs: pass data for those of your own"
    counts = {path: min(one.count for one in pooled) for path, pooled in statistics.items()}
    fewest = min(counts, key=lambda path: counts[path])
    name = fewest or "the model itself"
    few = [path for path, count in counts.items() if count < _FEW]
    if few:
        where = f"behind {len(few)} layers, fewest {name}" if len(few) > 1 else f"behind {name}"
        yield (
            f"statistics rest on only {counts[fewest]} values a channel ({where}); "
            f"{_FEW} or more are steadier"
        )
    still = {path: _still_channels(pooled) for path, pooled in statistics.items()}
    still = {path: count for path, count in still.items() if count}
    if still:
        layers = "a layer has" if len(still) == 1 else f"{len(still)} layers have"
        path = next(iter(still))
        yield (
            f"{layers} channels that do not vary on this data, first {path} "
            f"({still[path]} of {_channels(statistics[path])}): in train mode other data is "
            "scaled up there"
        )
    yield from _small(statistics, plan)
    yield from _advice(plan)


def _small(statistics: Mapping[str, Sequence[Pooled]], plan: Plan) -> Iterator[str]:
    """Where ε is most of what a norm divides by: it does not standardise there."""
    small = {}
    for edit in plan.edits:
        eps = effective_eps(edit)
        masks = [(one.var < eps) & ~one.still for one in statistics.get(edit.carrier, ())]
        if count := max((int(mask.sum()) for mask in masks), default=0):
            small[edit.carrier] = f"{count} of {edit.channels} below eps {eps:g}"
    if small:
        layers = "a layer has" if len(small) == 1 else f"{len(small)} layers have"
        path, counts = next(iter(small.items()))
        yield (
            f"{layers} channels that vary by less than the norm's eps, first "
            f"{path or 'the model itself'} ({counts}): the norm hardly scales them"
        )


def _advice(plan: Plan) -> Iterator[str]:
    """On the learning rate: what each start is good for."""
    inits = {edit.init for edit in plan.edits}
    if "preserve" in inits:
        yield (
            "preserve suits small learning rates and short fine-tuning: scale = standard "
            "deviation keeps the old gradients; for large rates init='reset' trains better"
        )
    if "stats" in inits:
        yield (
            "stats changes the function: train on, at the learning rate of a fresh network with "
            "norms, before using the model"
        )


def _still_channels(pooled: Sequence[Pooled]) -> int:
    return max(int(one.still.sum()) for one in pooled)


def _channels(pooled: Sequence[Pooled]) -> int:
    return len(pooled[0].mean)


def _reusable(data: Any) -> bool:
    """Whether looking at the first batch takes nothing away from the user."""
    return data is not None and not isinstance(data, Iterator)


def batches_of(data: Any, example: Call, model: nn.Module) -> Iterator[Call]:
    """Every batch of the data as a call of the model, on the model's device.

    Batches without a sample are left out.

    Raises:
        PlanError: The data is not iterable, or a batch does not fit the example.
    """
    device = device_of(model)
    for batch in started(data):
        matched = batch if isinstance(batch, Call) else match_batch(batch, example, model)
        if matched.batch != 0:
            yield matched.to(device=device)
