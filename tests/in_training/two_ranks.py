"""What processes do in the tests of distributed work: ``python two_ranks.py TASK RANK FOLDER
BACKEND SIZE``.

A file in the folder is the meeting point: no port, no network.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

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


def one_has_none(rank: int, folder: Path) -> None:
    """A rank without a share of the data gets the statistics of the others; without any, none."""
    del folder
    data = [images(0, 5), images(1, 3)]
    for init in ("preserve", "stats"):
        alone = [data[0], data[1]] if rank == 0 else []
        result = bnify.insert(net(), images(0), init=init, data=alone)
        assert result.verification.passed
        assert same(list(result.model.state_dict().values()))
        whole = torch.cat(data)
        mean = net()[0](whole).mean((0, 2, 3))
        assert torch.allclose(result.model[0].norm.running_mean, mean, rtol=1e-5, atol=1e-5)
        with pytest.raises(bnify.PlanError, match="the data holds no batch"):
            bnify.insert(net(), images(0), init=init, data=[])
        wanted = "rank 1 was given no data, others were"
        with pytest.raises(bnify.PlanError, match=wanted):
            bnify.insert(net(), images(0), init=init, data=None if rank else data)
        # Without data at all, the examples of all ranks are what is measured.
        result = bnify.insert(net(), images(rank), init=init)
        assert same(list(result.model.state_dict().values()))


def loader_fails(rank: int, folder: Path) -> None:
    """What the data itself raises on one rank, at its first reading too, is an error on both."""
    del folder

    def batches(error: Exception) -> Iterator[Tensor]:
        yield images(0)
        if rank == 1:
            raise error

    for init in ("preserve", "stats"):
        with pytest.raises((bnify.PlanError, OSError), match="the disk is gone"):
            bnify.insert(net(), images(0), init=init, data=batches(OSError("the disk is gone")))
        with pytest.raises(bnify.PlanError, match="data is a int"):
            bnify.insert(net(), images(0), init=init, data=3 if rank else [images(0)])


def unlike(rank: int, folder: Path) -> None:
    """Ranks with other models or plans are refused, other weights and repeated samples told of."""
    del folder
    x = images(0)
    other = net() if rank == 0 else nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3))
    for model, options in ((other, {}), (net(), {"exclude": ["2"] if rank else []})):
        with pytest.raises(bnify.PlanError, match="rank 1 has another model than rank 0"):
            bnify.insert(model, x, init="preserve", data=[x], **options)
    told = "rank 1 has other weights than rank 0, so the statistics are of several networks"
    for init in ("preserve", "stats"):
        notes = bnify.insert(net(rank), x, init=init, data=[x], verify=False).plan.notes
        assert [note for note in notes if note.startswith(told)] != []
        notes = bnify.insert(net(), x, init=init, data=[x], verify=False).plan.notes
        assert [note for note in notes if "other weights" in note] == []
    dataset = TensorDataset(images(0, 21))
    loader = DataLoader(dataset, 4, sampler=DistributedSampler(dataset, 2, rank, shuffle=False))
    notes = bnify.insert(net(), x, init="preserve", data=loader, verify=False).plan.notes
    assert sum(note.startswith("DistributedSampler repeats 1 of 21 samples") for note in notes) == 1


def calibrates(rank: int, folder: Path) -> None:
    """The exchange itself, on whatever device the backend has: also alone, in a world of one."""
    del folder
    place = torch.device("cuda", rank) if distributed.get_backend() == "nccl" else "cpu"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model = model.to(place)
    x = images(rank).to(place)
    found = bnify.calibrate(model, [x[:5], x[5:]])
    assert found.ranks == distributed.get_world_size()
    assert found.batches == 2 * found.ranks
    mean = model[0](images(0).to(place)).mean((0, 2, 3))
    if found.ranks == 1:
        assert torch.allclose(model[1].running_mean, mean, rtol=5e-3, atol=5e-3)
    plain = net().to(place)
    result = bnify.insert(plain, x, init="stats", data=iter([x[:5], x[5:]]))
    assert result.verification.passed
    with pytest.raises(bnify.PlanError, match="raised RuntimeError on batch 1"):
        bnify.calibrate(model, [x, torch.zeros(2, 5, 8, 8, device=place)])


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


class ByTorch(nn.BatchNorm2d):
    """Its own call of ``torch.batch_norm``."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        statistics = self.running_mean, self.running_var
        return torch.batch_norm(
            *(input, self.weight, self.bias, *statistics, self.training, 0.1, self.eps, False)
        )


class ByHand(nn.BatchNorm2d):
    """Its own statistics."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        var, mean = torch.var_mean(input, (0, 2, 3), keepdim=True)
        return (input - mean) / (var + self.eps).sqrt()


def synchronises(rank: int, folder: Path) -> None:
    """A subclass's own batch norm is reached: it refuses the CPU, as that of torch does."""
    del folder
    x = images(rank)
    by_hand = nn.Sequential(ByHand(3))
    assert sync_norms(by_hand) == ("0",)
    by_hand.eval()(x)
    with pytest.raises(RuntimeError, match="ByHand calls no batch norm"):
        by_hand.train()(x)
    for norm in (nn.BatchNorm2d(3), WithActivation(3), ByTorch(3)):
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
    task.__name__: task
    for task in (
        *(trains, merges, fails, one_has_none, loader_fails, unlike, calibrates, falls_back),
        *(synchronises, saves, once),
    )
}

if __name__ == "__main__":
    name, number, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    backend, size = sys.argv[4], int(sys.argv[5])
    meeting = f"file://{directory / 'meeting'}"
    distributed.init_process_group(backend, init_method=meeting, rank=number, world_size=size)
    TASKS[name](number, directory)
    distributed.barrier()  # gloo aborts where its peer has gone already
    distributed.destroy_process_group()
    # DDP keeps the group and with it gloo's threads beyond this (torch 2.13, without bnify too);
    # one that still lets go of its last work while Python shuts down aborts the process.
    sys.stderr.flush()
    os._exit(0)
