"""Several processes under ``torchrun``: what one does for all, and what all measure together.

Both are collectives: every rank has to come there, as to ``DistributedDataParallel`` itself. A
rank that fails takes part all the same, so that no other waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeAlias, TypeVar

import torch
from torch import distributed

from bnify.errors import BnifyError, PlanError
from bnify.pooled import Pooled

T = TypeVar("T")
Pools: TypeAlias = dict[str, tuple[Pooled, ...]]


def several_ranks() -> bool:
    """Whether a process group of more than one process is up."""
    ready = distributed.is_available() and distributed.is_initialized()
    return ready and distributed.get_world_size() > 1


def on_first_rank(work: Callable[[], T]) -> T:
    """Do some work in rank 0 and give its result to every rank; the others wait for it.

    Args:
        work: What to do; its result must be picklable.

    Raises:
        BnifyError: In the other ranks, when the work failed in rank 0, which raises what it was.
    """
    if not several_ranks():
        return work()
    outcome: list[Any] = [None, ""]
    failure: Exception | None = None
    if distributed.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            failure = error
            outcome[1] = f"{type(error).__name__}: {error}"
    distributed.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1]:
        raise BnifyError(f"rank 0 failed: {outcome[1]}", hint="the output of rank 0 says more")
    result: T = outcome[0]
    return result


def shares_of_ranks(work: Callable[[], T], device: torch.device) -> list[T]:
    """What the work gives on each rank, in the order of ranks, on every rank.

    Args:
        work: What to do on every rank; its result must be picklable.
        device: Of the model; it carries the exchange where the backend has no CPU.

    Raises:
        PlanError: Another rank failed; it is named. In that rank, whatever it raised.
    """
    if not several_ranks():
        return [work()]
    failure: Exception | None = None
    own: list[Any] = [None, ""]
    try:
        own[0] = work()
    except Exception as error:  # forward() and loaders are user code
        failure = error
        said = error.message if isinstance(error, BnifyError) else str(error)
        own[1] = f"{type(error).__name__}: {said}"
    found: list[Any] = [None] * distributed.get_world_size()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        distributed.all_gather_object(found, own)
    if failure is not None:
        raise failure
    for rank, (_, failed) in enumerate(found):
        if failed:
            raise PlanError(
                f"rank {rank} failed: {failed}; nothing was changed on any rank",
                hint="the output of that rank says more",
            )
    return [share for share, _ in found]


def pooled_over_ranks(run: Callable[[], Pools], device: torch.device) -> Pools:
    """Pool on every rank its share of the data, and merge in the order of ranks.

    Every rank ends with the same bits.

    Args:
        run: Pools the share of this rank.
        device: Of the model; it carries the exchange where the backend has no CPU.

    Raises:
        PlanError: Another rank failed; it is named. In that rank, whatever it raised.
    """
    shares = shares_of_ranks(run, device)
    whole = shares[0]
    for share in shares[1:]:
        for path, calls in whole.items():
            for mine, theirs in zip(calls, share[path], strict=True):
                mine.merge(theirs)
    return whole
