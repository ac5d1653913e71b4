"""What an insertion measures on the user's data before it changes anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnify.borrow import copy_model, seeded
from bnify.pooled import Pooled, pool
from bnify.errors import PlanError
from bnify.plan import Plan
from bnify.rewrite import Statistics, points
from bnify.structure import Call, match_batch

_FEW = 1000
#: A variance below this share of the channel's own size is none: the channel does not vary.
_STILL = 1e-10


def measure(
    model: nn.Module,
    plan: Plan,
    example: Call,
    data: Any,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Statistics | None, list[str], Call | None]:
    """Pooled statistics for ``init="preserve"``, on the data or on the example inputs.

    Args:
        model: The original model; a copy of it runs.
        plan: The plan.
        example: The example inputs, as the user passed them.
        data: Batches, or None.
        progress: Called with a few words.

    Returns:
        The statistics (None when the plan wants none), notes on them, and the first batch of the
        data (None without data).

    Raises:
        PlanError: The data yields no batch that fits, or the model fails on one.
    """
    wanted = points(plan)
    if not wanted:
        if not _reusable(data):
            return None, [], None
        with seeded(0):  # a shuffling loader draws its order from the global random state
            batch = next(batches_of(data, example, model), None)
        return None, ["data measures the train-mode drift only: init='reset' starts anew"], batch
    progress("measuring statistics")
    first: list[Call] = []

    def remembered() -> Iterator[Call]:
        for batch in batches_of([example] if data is None else data, example, model):
            if not first:
                first.append(batch)
            yield batch

    # On a copy: a model may count its calls or keep caches, and the user's stays as it is.
    statistics = pool(copy_model(model), remembered(), wanted)
    return statistics, list(_notes(statistics, data)), None if data is None else first[0]


def _notes(statistics: Mapping[str, tuple[Pooled, ...]], data: Any) -> Iterator[str]:
    if data is None:
        yield "statistics come from the example inputs: pass data for those of your own"
    few = min(one.count for pooled in statistics.values() for one in pooled)
    if few < _FEW:
        yield f"statistics rest on only {few} values a channel; {_FEW} or more are steadier"
    still = [path for path, pooled in statistics.items() if any(map(_has_still_channel, pooled))]
    if still:
        layers = "a layer has" if len(still) == 1 else f"{len(still)} layers have"
        yield f"{layers} channels that do not vary on this data, first {still[0]}"
    yield "preserve suits small learning rates: gradients of the old weights stay as they were"


def _has_still_channel(pooled: Pooled) -> bool:
    size = pooled.mean.square() + pooled.var.median()
    return bool((pooled.var <= _STILL * size).any())


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
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for batch in iterator:
        matched = batch if isinstance(batch, Call) else match_batch(batch, example, model)
        yield matched.to(device=device)
