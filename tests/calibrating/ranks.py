"""One rank of a calibration over real processes: ``ranks.py RANK WORLD STORE OUT``,
with ``tests`` on the path.

Every scenario is run on every rank, and what came of it is written to OUT/RANK.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from normed import hostile, images
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from bnify.calibrations import calibrate
from bnify.errors import BnifyError

#: How the 61 images are dealt: batch sizes of each rank, by the number of ranks.
SHARES = {
    1: [[20, 20, 20, 1]],
    2: [[20, 1], [30, 7, 3]],
    3: [[20, 1], [30, 7, 2], [1]],
}


def shares(world: int) -> list[list[Tensor]]:
    """The batches of each rank."""
    dealt = iter(images().split([size for rank in SHARES[world] for size in rank]))
    return [[next(dealt) for _ in rank] for rank in SHARES[world]]


def uneven(rank: int, world: int, model: nn.Module) -> Any:
    """Shares of different length, with single samples."""
    return calibrate(model, shares(world)[rank])


def one_has_all(rank: int, world: int, model: nn.Module) -> Any:
    """Every other rank has nothing."""
    return calibrate(model, list(images().split(20)) if rank == world - 1 else [])


def nothing(rank: int, world: int, model: nn.Module) -> Any:
    """No rank has anything."""
    return calibrate(model, [])


def failing(rank: int, world: int, model: nn.Module) -> Any:
    """The last rank's second batch is of another shape."""
    bad = [torch.zeros(4, 7, 6, 6, dtype=torch.float64)] if rank == world - 1 else []
    return calibrate(model, [*images().split(20), *bad])


def padded(rank: int, world: int, model: nn.Module) -> Any:
    """A sampler that repeats samples, so that all ranks have as many."""
    dataset = TensorDataset(images(61))
    sampler = DistributedSampler(dataset, world, rank, shuffle=False)
    return calibrate(model, DataLoader(dataset, batch_size=10, sampler=sampler))


def in_parallel(rank: int, world: int, model: nn.Module) -> Any:
    """The usual script: a model in DistributedDataParallel, an early end."""
    model.bn5.__class__ = nn.BatchNorm1d  # DistributedDataParallel refuses SyncBatchNorm on CPUs
    parallel = nn.parallel.DistributedDataParallel(model)
    return calibrate(parallel, [images(20, seed) for seed in range(rank + 9)], tolerance=0.9)


def padded_and_cut(rank: int, world: int, model: nn.Module) -> Any:
    """The same, but the repeated samples, which come last, are never read."""
    dataset = TensorDataset(images(61))
    sampler = DistributedSampler(dataset, world, rank, shuffle=False)
    return calibrate(model, DataLoader(dataset, batch_size=10, sampler=sampler), batches=1)


def one_stops(rank: int, world: int, model: nn.Module) -> Any:
    """The last rank's batches are all alike; those of the others trend."""
    alike = [images(20)] * 9
    data = alike if rank == world - 1 else images(180).split(20)
    return calibrate(nn.Sequential(model.conv1, model.bn1), data, tolerance=1e-3)


def counted(rank: int, world: int, model: nn.Module) -> Any:
    """Each rank has seen another number of batches, as where ranks join and leave."""
    model.bn1.num_batches_tracked.fill_(1000 + 100 * rank)
    return calibrate(model, images().split(20))


def bad_arguments(rank: int, world: int, model: nn.Module) -> Any:
    """One rank asks for nothing."""
    return calibrate(model, images().split(20), batches=0 if rank == world - 1 else 1)


def no_module(rank: int, world: int, model: nn.Module) -> Any:
    """One rank passes a class."""
    return calibrate(type(model) if rank == world - 1 else model, images().split(20))


def expanded(rank: int, world: int, model: nn.Module) -> Any:
    """On one rank a running mean is one number for all channels."""
    if rank == world - 1:
        model.bn2.running_mean = model.bn2.running_mean[:1].expand(6)
    return calibrate(model, images().split(20))


def other_weights(rank: int, world: int, model: nn.Module) -> Any:
    """One rank has not loaded the checkpoint."""
    with torch.no_grad():
        model.conv1.weight[0] += float(rank == world - 1)
    return calibrate(model, images().split(20))


def other_model(rank: int, world: int, model: nn.Module) -> Any:
    """One rank has a norm in another precision."""
    if rank == world - 1:
        model.bn1.running_mean = model.bn1.running_mean.float()
    return calibrate(model, images().split(20))


class Noisy(nn.Module):
    """A model on inputs with noise."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + torch.randn_like(x))


def drawing(rank: int, world: int, model: nn.Module) -> Any:
    """Inputs of zeros and a forward that draws: no two batches get the same numbers."""
    return calibrate(Noisy(model), [0 * images(5)] * 4)


SCENARIOS: tuple[Callable[..., Any], ...] = (
    uneven,
    one_has_all,
    nothing,
    failing,
    padded,
    in_parallel,
    padded_and_cut,
    one_stops,
    counted,
    bad_arguments,
    no_module,
    expanded,
    other_weights,
    other_model,
    drawing,
)


def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{sys.argv[3]}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    found: dict[str, Any] = {}
    for run in SCENARIOS:
        model = hostile()
        try:
            said: Any = run(rank, world, model).to_dict()
        except BnifyError as error:
            said = f"{type(error).__name__}: {error}"
        found[run.__name__] = (said, model.state_dict())
    distributed.barrier()  # gloo aborts where its peer has gone already
    distributed.destroy_process_group()
    torch.save(found, Path(sys.argv[4]) / f"{rank}.pt")


if __name__ == "__main__":
    main()
