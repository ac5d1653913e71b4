"""It works with what models come wrapped in."""

from __future__ import annotations

import pytest
import torch
from loops import EVERY, batch, hooks_of, loss_of, network, passes, sgd, train
from torch import nn

import bnify
from bnify.watching import Watcher, watch


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def planted(model: nn.Module, plain: nn.Module, watcher: Watcher, name: str = "1") -> set[str]:
    """Train, plant three faults in the norm of this name, train, and say what was found."""
    norm = plain.get_submodule(name)
    optimizer = sgd(plain)
    with watcher:
        train(model, optimizer, EVERY)
        assert watcher.findings == ()
        norm.momentum = 0.9
        passes(model, 12)
        train(model, optimizer, 4)
        norm.running_var[0] = float("nan")
        train(model, optimizer, EVERY - 4)
        found = {f.code for f in watcher.findings if f.module == name}
    assert hooks_of(plain) == 0
    return found


THREE = {"BN101", "BN203", "BN309"}


def test_ddp(one_process):
    plain = network()
    model = nn.parallel.DistributedDataParallel(plain)
    assert planted(model, plain, watch(model, every=EVERY)) == THREE


def test_ddp_accumulating_without_synchronisation(one_process):
    plain = network()
    model = nn.parallel.DistributedDataParallel(plain)
    optimizer = sgd(plain)
    with watch(model, every=EVERY) as watcher:
        for _ in range(2 * EVERY):
            with model.no_sync():
                for _ in range(3):
                    loss_of(model).backward()
            train(model, optimizer)
    assert watcher.findings == ()


def test_synchronised_norms():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    assert planted(model, model, watch(model, every=EVERY)) == THREE


def test_norms_that_bnify_put_there():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    model = bnify.insert(net, batch(), verify=False).model
    assert planted(model, model, watch(model, every=EVERY), "0.norm") == THREE


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
@pytest.mark.parametrize("when", ["before", "inside"])
def test_compiled(when):
    torch._dynamo.reset()
    plain = network()
    model = torch.compile(plain, backend="aot_eager")
    watcher = watch(model if when == "before" else plain, every=EVERY)
    assert planted(model, plain, watcher) == THREE
    assert "BN205" in watcher.unchecked


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
def test_a_model_compiles_as_before():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = network()
    compiled = torch.compile(model, backend=counter)
    with watch(compiled):
        train(compiled, sgd(model), 5)
    train(compiled, sgd(model), 2)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_lazy_norms():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(4))
    with watch(model, every=EVERY) as watcher:
        model(batch())
        optimizer = sgd(model)
        train(model, optimizer, EVERY)
        model[1].running_mean[0] = float("nan")
        train(model, optimizer, EVERY)
        assert [f.code for f in watcher.findings] == ["BN101"]
        assert watcher.restore() == ("1",)


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 4), nn.BatchNorm2d(3), nn.Sequential(nn.InstanceNorm2d(3, affine=True))],
    ids=["no norm", "a norm", "no statistics"],
)
def test_odd_models(model):
    with watch(model, every=2) as watcher:
        optimizer = sgd(model)
        for _ in range(6):
            model(torch.randn(64, 3, 3, 3)).sum().backward()
            optimizer.step()
    assert watcher.findings == ()
    assert watcher.steps == 6


def test_tracked_instance_norms_are_counted_by_their_running_mean():
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    model = network()
    model[1] = norm
    optimizer = sgd(model)
    with watch(model, every=EVERY) as watcher:
        train(model, optimizer, EVERY)
        passes(model, 12)
        train(model, optimizer, EVERY)
    assert {(f.code, f.module) for f in watcher.findings} == {("BN309", "1"), ("BN309", "5")}
