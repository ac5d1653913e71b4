"""What two processes do in the tests of a distributed insertion: ``python two_ranks.py TASK ...``.

The rank is an argument, and a file is the meeting point: no port, no network.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import bnify
from bnify.layers import TokenNorm
from bnify.ranks import on_first_rank
from bnify.synced import sync_norms, unsync_norms


def net(seed: int = 0) -> nn.Sequential:
    """A small network without norms."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 4),
    )


def images(seed: int, count: int = 16) -> Tensor:
    """Inputs (count, 3, 8, 8) whose mean depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=generator) + seed


def gathered(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Tensors of each rank."""
    found: list[list[Tensor]] = [[], []]
    distributed.all_gather_object(found, [t.detach().clone() for t in tensors])
    return found


def same(tensors: list[Tensor]) -> bool:
    """Whether both ranks hold the same bits."""
    first, second = gathered(tensors)
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def trains(rank: int, folder: Path) -> None:
    """Insert before DDP; the ranks have other weights and other data."""
    del folder
    x = images(rank)
    for options in ({}, {"init": "preserve", "data": [x]}, {"drop_bias": True}):
        model = net(rank)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        bnify.insert(model, x, optimizer=optimizer, inplace=True, verify=False, **options)
        parallel = DistributedDataParallel(model)
        assert same(list(parallel.state_dict().values())), "DDP begins with the weights of rank 0"
        start = model[0].norm.weight.detach().clone()
        for _ in range(4):
            optimizer.zero_grad()
            parallel(x).square().mean().backward()
            optimizer.step()
        assert same(list(model.parameters()))
        assert not torch.equal(start, model[0].norm.weight)
        # Each rank's last batch moved its own statistics: what bnify.calibrate merges.
        assert not same([model[0].norm.running_mean])


def merges(rank: int, folder: Path) -> None:
    """Each rank has a share of the data, of another size; the statistics are those of all of it."""
    del folder
    shares = [[images(0, 5), images(1, 1)], [images(2, 7)]]
    whole = torch.cat([batch for share in shares for batch in share]).double()
    for init in ("preserve", "stats"):
        model = net().double()
        data = [batch.double() for batch in shares[rank]]
        result = bnify.insert(model, whole[:4], init=init, data=data)
        assert result.verification.passed
        assert same(list(result.model.state_dict().values()))
        with torch.no_grad():
            first = model[0](whole)
        var, mean = torch.var_mean(first, (0, 2, 3))
        assert torch.allclose(result.model[0].norm.running_mean, mean, rtol=1e-12, atol=1e-12)
        assert torch.allclose(result.model[0].norm.running_var, var, rtol=1e-12)


def fails(rank: int, folder: Path) -> None:
    """A share that cannot be run on one rank is an error on both, and nobody waits for ever."""
    del folder
    data = [images(0)] if rank == 0 else [torch.zeros(2, 5, 8, 8)]
    wanted = "rank 1 failed" if rank == 0 else "raised RuntimeError on batch"
    with pytest.raises(bnify.PlanError, match=wanted):
        bnify.insert(net(), images(0), init="preserve", data=data, verify=False)


def falls_back(rank: int, folder: Path) -> None:
    """Synchronized norms do not run on gloo: plain batch norm, and a message."""
    del folder
    x = images(rank)
    result = bnify.insert(net(), x, norm="sync")
    assert {edit.norm for edit in result.plan.edits} == {"batch"}
    assert any("batch norm in place of sync" in note for note in result.plan.notes)
    assert type(result.model[0].norm) is nn.BatchNorm2d
    auto = bnify.insert(net(), x, norm="auto", batch_size=8, verify=False)
    assert {edit.norm for edit in auto.plan.edits} == {"batch"}
    DistributedDataParallel(result.model)(x).sum().backward()


class WithActivation(nn.BatchNorm2d):
    """Its own call of ``F.batch_norm``."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        y = torch.nn.functional.batch_norm(
            *(input, self.running_mean, self.running_var, self.weight, self.bias, self.training)
        )
        return y.relu()


def synchronises(rank: int, folder: Path) -> None:
    """A subclass's own ``F.batch_norm`` is reached: it refuses the CPU, as that of torch does."""
    del folder
    x = images(rank)
    for norm in (nn.BatchNorm2d(3), WithActivation(3)):
        model = nn.Sequential(norm)
        assert sync_norms(model) == ("0",)
        model.eval()(x)
        with pytest.raises(ValueError, match=r"on CPU|on GPU"):
            model.train()(x)
        assert unsync_norms(model) == ("0",)
        DistributedDataParallel(model)(x).sum().backward()
    tokens = nn.Sequential(TokenNorm(nn.BatchNorm1d(8)))
    assert sync_norms(tokens) == ("0.inner",)


def saves(rank: int, folder: Path) -> None:
    """Rank 0 writes, and the folder is whole as soon as any rank goes on."""
    x = images(0)
    result = bnify.insert(net(), x, verify=False)
    place = result.save(folder / "out", onnx=False)
    assert place == folder / "out"
    assert set(result.files) == {"weights", "recipe", "report"}
    loaded = bnify.load(place, model=net())
    assert torch.equal(loaded(x), result.model.eval()(x))
    wanted = "rank 0 failed: UsageError" if rank else "exists already"
    with pytest.raises(bnify.BnifyError, match=wanted):
        result.save(folder / "out", onnx=False)
    (folder / f"{rank}").write_text("done")


def once(rank: int, folder: Path) -> None:
    """Work is done once, and its result is everywhere."""
    done = on_first_rank(lambda: (folder / "log").open("a").write(f"{rank}\n") and {"rank": rank})
    assert done == {"rank": 0}
    assert (folder / "log").read_text() == "0\n"


TASKS: dict[str, Callable[[int, Path], None]] = {
    task.__name__: task for task in (trains, merges, fails, falls_back, synchronises, saves, once)
}

if __name__ == "__main__":
    name, number, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    meeting = f"file://{directory / 'meeting'}"
    distributed.init_process_group("gloo", init_method=meeting, rank=number, world_size=2)
    TASKS[name](number, directory)
    distributed.barrier()  # gloo aborts where its peer has gone already
    distributed.destroy_process_group()
    # DDP keeps the group and with it gloo's threads beyond this (torch 2.13, without bnify too);
    # one that still lets go of its last work while Python shuts down aborts the process.
    sys.stderr.flush()
    os._exit(0)
