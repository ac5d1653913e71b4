"""What an insertion measures on the user's data before it changes anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnify.borrow import copy_model, seeded
from bnify.capture import Captured
from bnify.errors import PlanError
from bnify.plan import Plan
from bnify.pooled import Point, Pooled, pool
from bnify.ranks import Pools, pooled_over_ranks
from bnify.rewrite import Statistics, points
from bnify.staged import Pooling, Site, measure_staged, stages
from bnify.structure import Call, match_batch

_FEW = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured for a plan.

    Attributes:
        statistics: By carrier, those of its calls; None when the plan wants none.
        notes: What a reader has to know of them.
        batch: The first batch of the data; None without data.
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
    iterator is then kept in memory.

    Args:
        model: The original model; a copy of it runs.
        plan: The plan.
        captured: The recording it was made on.
        example: The example inputs, as the user passed them.
        data: Batches, or None.
        progress: Called with a few words.

    Raises:
        PlanError: The data yields no batch that fits, or the model fails on one.
    """
    wanted = points(plan)
    if not wanted:
        if not _reusable(data):
            return Measured()
        with seeded(0):  # a shuffling loader draws its order from the global random state
            batch = next(batches_of(data, example, model), None)
        note = "data measures the train-mode drift only: init='reset' starts anew"
        return Measured(notes=(note,), batch=batch)
    first: list[Call] = []
    source: Any = [example] if data is None else data
    notes = []
    order: list[list[Site]] = []
    if any(edit.init == "stats" for edit in plan.edits):
        order = stages(captured, plan)
        if isinstance(source, Iterator):
            source = list(source)
            notes.append(f"all {len(source)} batches were kept in memory: the data is an iterator")

    def batches() -> Iterator[Call]:
        for batch in batches_of(source, example, model):
            if not first:
                first.append(batch)
            yield batch

    def together(working: nn.Module, sites: Sequence[Point]) -> Pools:
        def own() -> Pools:
            return pool(working, batches(), sites)

        return own() if data is None else pooled_over_ranks(own, device_of(model))

    if order:
        statistics = measure_staged(model, plan, order, together, progress)
    else:
        progress("measuring statistics")
        # On a copy: a model may count its calls or keep caches, and the user's stays as it is.
        statistics = together(copy_model(model), wanted)
    return Measured(
        statistics=statistics,
        notes=(*notes, *_notes(statistics, data, plan)),
        batch=None if data is None else first[0],
        order=order,
        pool=together,
    )


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
    yield from _advice(plan)


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

    Raises:
        PlanError: The data is not iterable, or a batch does not fit the example.
    """
    batches: Iterable[Any] = [data] if isinstance(data, (Tensor, Mapping, Call)) else data
    try:
        iterator = iter(batches)
    except TypeError:
        raise PlanError(
            f"data is a {type(data).__name__}, which yields no batches",
            hint="pass a loader, a list of batches, or one tensor",
        ) from None
    device = device_of(model)
    for batch in iterator:
        matched = batch if isinstance(batch, Call) else match_batch(batch, example, model)
        yield matched.to(device=device)


def device_of(model: nn.Module) -> torch.device:
    """Where the model is: the device of its first parameter, else the CPU."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
