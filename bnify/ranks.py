"""Several processes under ``torchrun``: what one does for all, and what all measure together.

Both are collectives: every rank has to come there, as to ``DistributedDataParallel`` itself. A
rank that fails takes part all the same, so that no other waits for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import distributed, nn
from torch.utils.data.distributed import DistributedSampler

from bnify.errors import BnifyError, PlanError
from bnify.pooled import Pooled

T = TypeVar("T")
Pools: TypeAlias = dict[str, tuple[Pooled, ...]]


def world_size() -> int:
    """Number of processes; 1 where no process group is up."""
    return distributed.get_world_size() if _grouped() else 1


def several_ranks() -> bool:
    """Whether a process group of more than one process is up."""
    return world_size() > 1


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()


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

    Whatever can fail on one rank alone belongs into the work: what fails outside of it leaves the
    other ranks waiting.

    Args:
        work: What to do on every rank; its result must be picklable.
        device: Of the model; it carries the exchange where the backend has no CPU.

    Raises:
        PlanError: Another rank failed; it is named. In that rank, whatever it raised.
    """
    if not _grouped():
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


# -- what ranks must have in common ---------------------------------------------------------------


def refuse_other_structure(structures: Sequence[object]) -> None:
    """Refuse ranks that do not have the same model: statistics go from norm to norm by name.

    Args:
        structures: What describes the model of each rank, in the order of ranks.

    Raises:
        PlanError: They differ; the first rank that has another one than rank 0 is named.
    """
    for rank, structure in enumerate(structures):
        if structure != structures[0]:
            raise PlanError(
                f"rank {rank} has another model than rank 0, or other norms in it; nothing was "
                "changed on any rank",
                hint="build the same model with the same options on every rank",
            )


def weights_of(model: nn.Module) -> str:
    """A digest of all parameters, to compare those of several ranks; empty without other ranks.

    Statistics are no part of it: each rank's follow its own batches.
    """
    if not several_ranks():
        return ""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        if type(parameter) is nn.Parameter:  # a subclass need not have bytes of its own
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def other_weights(weights: Sequence[str]) -> str:
    """Whose weights are not those of rank 0, in words; empty where all ranks have the same."""
    others = [str(rank) for rank, digest in enumerate(weights) if digest != weights[0]]
    if not others:
        return ""
    ranks = f"rank {others[0]} has" if len(others) == 1 else f"ranks {', '.join(others)} have"
    return f"{ranks} other weights than rank 0"


# -- samples that a sampler repeats ---------------------------------------------------------------


def repeats_of(data: Any, samples: int) -> tuple[int, int]:
    """How many samples of this rank's share were there already, and of how many in all.

    A ``DistributedSampler`` deals position r, r + W, r + 2W ... to rank r of W; those behind the
    end of the data set are its beginning once more, so that every rank has as many.

    Args:
        data: What the user passed.
        samples: How many samples of it were read.
    """
    samplers = (getattr(data, "sampler", None), getattr(data, "batch_sampler", None))
    for sampler in (*samplers, getattr(samplers[1], "sampler", None)):
        if isinstance(sampler, DistributedSampler):
            read = min(samples, len(sampler))
            size = len(sampler.dataset)  # type: ignore[arg-type]  # it has asked for it itself
            dealt = range(sampler.rank, sampler.total_size, sampler.num_replicas)[:read]
            return sum(position >= size for position in dealt), size
    return 0, 0


def repeats_note(found: Iterable[tuple[int, int]]) -> str:
    """A sentence on the samples that are repeated on all ranks together; empty without any."""
    counts, sizes = zip(*found, strict=True)
    if not sum(counts):
        return ""
    return (
        f"DistributedSampler repeats {sum(counts)} of {max(sizes)} samples, which count twice: "
        "drop_last=True, or a shard of your own (indices[rank::world_size]), avoids it"
    )


# -- the statistics of an insertion ---------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank measures for an insertion.

    Attributes:
        pools: Statistics of each point, by path.
        batches: How many batches it has read.
        given: Whether it was given data.
        structure: What describes its model and where it is measured.
        weights: Digest of its parameters.
        repeats: What :func:`repeats_of` says of its data.
    """

    pools: Pools
    batches: int
    given: bool
    structure: object
    weights: str
    repeats: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Whole:
    """The shares of all ranks, merged.

    Attributes:
        pools: Statistics of each point, by path: the same bits on every rank.
        notes: What a reader has to know of the shares.
    """

    pools: Pools
    notes: tuple[str, ...]


def pooled_over_ranks(run: Callable[[], Share], device: torch.device) -> Whole:
    """Measure on every rank its share of the data, and merge in the order of ranks.

    Every rank ends with the same bits. A rank may have no batch, if another has one.

    Args:
        run: Measures the share of this rank.
        device: Of the model; it carries the exchange where the backend has no CPU.

    Raises:
        PlanError: Another rank failed or has another model, some have no ``data``, or none has a
            batch. In a rank that failed, whatever it raised.
    """
    shares = shares_of_ranks(run, device)
    refuse_other_structure([share.structure for share in shares])
    given = [share.given for share in shares]
    if any(given) and not all(given):
        raise PlanError(
            f"rank {given.index(False)} was given no data, others were",
            hint="data=[] where a rank has no share of it",
        )
    if not any(share.batches for share in shares):
        raise PlanError("the data holds no batch", hint="pass a loader that yields batches")
    whole = shares[0].pools
    for share in shares[1:]:
        for path, calls in whole.items():
            for mine, theirs in zip(calls, share.pools[path], strict=True):
                mine.merge(theirs)
    return Whole(whole, tuple(_notes(shares)))


def _notes(shares: Sequence[Share]) -> Iterator[str]:
    repeated = repeats_note(share.repeats for share in shares)
    if repeated:
        yield repeated
    others = other_weights([share.weights for share in shares])
    if others:
        yield (
            f"{others}, so the statistics are of several networks, and none has them alone: load "
            "or broadcast the weights before"
        )
