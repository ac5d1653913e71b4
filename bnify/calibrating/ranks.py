"""Processes under torchrun: every rank pools its share, and all merge in the order of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data.distributed import DistributedSampler

from bnify.calibrating.shard import Shard
from bnify.ranks import shares_of_ranks


def world_size() -> int:
    """Number of processes; 1 where no process group is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def over_ranks(run: Callable[[], Shard], model: nn.Module) -> Shard:
    """Run a share on every rank and merge them in the order of ranks: the same bits everywhere.

    A rank that fails takes part all the same, so that no other waits for it.

    Args:
        run: Pools the share of this process.
        model: The model, whose device carries the exchange where the backend has no CPU.

    Raises:
        PlanError: Another rank failed; it is named. On that rank, whatever it raised.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    whole, *others = shares_of_ranks(run, device)
    for share in others:
        whole.merge(share)
    return whole


def padding_of(data: Any) -> str:
    """A sentence on samples that a sampler repeats to give each rank as many; empty without any."""
    samplers = (getattr(data, "sampler", None), getattr(data, "batch_sampler", None))
    for sampler in (*samplers, getattr(samplers[1], "sampler", None)):
        if isinstance(sampler, DistributedSampler) and not sampler.drop_last:
            samples = len(sampler.dataset)  # type: ignore[arg-type]  # it has asked for it itself
            extra = sampler.total_size - samples
            if extra > 0:
                return (
                    f"DistributedSampler repeats {extra} of {samples} samples, which count twice: "
                    "drop_last=True, or a shard of your own (indices[rank::world_size]), avoids it"
                )
    return ""
