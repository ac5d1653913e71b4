"""Processes under torchrun: every rank pools its share, and all merge in the order of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from bnify.calibrating.shard import Shard
from bnify.errors import PlanError
from bnify.ranks import (
    other_weights,
    refuse_other_structure,
    repeats_note,
    shares_of_ranks,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one process gives to the others.

    Attributes:
        shard: What reached its norms.
        constant: Paths of look-alikes that hold constants.
        tracked: How many batches each norm has counted before, by path.
        structure: Digest of the names and shapes of its tensors.
        weights: Digest of its parameters.
        repeats: How many of its samples a sampler repeats, and of how many in all.
    """

    shard: Shard
    constant: frozenset[str]
    tracked: Mapping[str, int]
    structure: str
    weights: str
    repeats: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The shares of all processes, merged: the same on every rank.

    Attributes:
        shard: What reached the norms.
        constant: Paths of look-alikes that hold constants.
        tracked: The most batches that a rank has counted before, by path.
        longest: The number of batches of the longest share.
        stopped: How many ranks stopped early.
        repeated: A sentence on samples that a sampler repeats; empty without any.
    """

    shard: Shard
    constant: frozenset[str]
    tracked: Mapping[str, int]
    longest: int
    stopped: int
    repeated: str


def over_ranks(run: Callable[[], Share], device: torch.device) -> Whole:
    """Run a share on every rank and merge them in the order of ranks: the same bits everywhere.

    A rank that fails takes part all the same, so that no other waits for it.

    Args:
        run: Pools the share of this process, and checks whatever can be wrong on it alone.
        device: Of the model; it carries the exchange where the backend has no CPU.

    Raises:
        PlanError: Another rank failed (it is named), or has another model or other weights. On a
            rank that failed, whatever it raised.
    """
    shares = shares_of_ranks(run, device)
    refuse_other_structure([(share.structure, share.constant) for share in shares])
    others = other_weights([share.weights for share in shares])
    if others:
        raise PlanError(
            f"{others}: statistics of different networks are those of none; nothing was changed on "
            "any rank",
            hint="load the same checkpoint on every rank, or wrap the model in "
            "DistributedDataParallel first, which sends the weights of rank 0 to all",
        )
    tracked: dict[str, int] = {}
    for share in shares:
        for path, count in share.tracked.items():
            tracked[path] = max(count, tracked.get(path, 0))
    longest = max(share.shard.batches for share in shares)
    stopped = sum(share.shard.stopped for share in shares)
    whole = shares[0].shard
    for share in shares[1:]:
        whole.merge(share.shard)
    return Whole(
        shard=whole,
        constant=shares[0].constant,
        tracked=tracked,
        longest=longest,
        stopped=stopped,
        repeated=repeats_note(share.repeats for share in shares),
    )
