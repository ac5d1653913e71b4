"""What insert refuses before it starts, each with the lines to write instead."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn

import bnify


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


X = torch.zeros(4, 6)


@pytest.fixture
def gloo(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def refused(kind: type[bnify.BnifyError], net, inputs=X, **options) -> bnify.BnifyError:
    with pytest.raises(kind) as caught:
        bnify.insert(net, inputs, **options)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value


def test_a_class_and_things_that_are_no_module():
    class Net(nn.Module):
        pass

    assert refused(bnify.CaptureError, Net).hint == "pass an instance: MyNetwork(), not MyNetwork"
    assert "function" in refused(bnify.CaptureError, lambda x: x).message
    assert "OrderedDict" in refused(bnify.CaptureError, model().state_dict()).message
    refused(bnify.CaptureError, None)


def test_distributed_data_parallel(gloo):
    net = nn.parallel.DistributedDataParallel(model())
    error = refused(bnify.PlanError, net)
    assert error.hint.splitlines() == [
        "model = bnify.insert(model.module, inputs).model",
        "model = DistributedDataParallel(model)",
    ]
    inner = bnify.insert(net.module, torch.randn(4, 6)).model
    wrapped = nn.parallel.DistributedDataParallel(inner)
    wrapped(torch.randn(4, 6)).sum().backward()
    assert inner[0].norm.weight.grad is not None


def test_a_wrapped_part(gloo):
    net = nn.Sequential(nn.parallel.DistributedDataParallel(model()), nn.Linear(2, 2))
    assert "at 0" in refused(bnify.PlanError, net).message


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_fully_sharded(gloo):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    wrapped = FullyShardedDataParallel(model(), device_id=torch.device("cpu"))
    error = refused(bnify.PlanError, wrapped)
    assert "FullyShardedDataParallel" in error.message
    assert error.hint.splitlines()[1] == "model = FullyShardedDataParallel(model)"
    sharded = model()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    error = refused(bnify.PlanError, sharded)
    assert "fully_shard" in error.message
    assert error.hint.startswith("model = bnify.insert(plain_model, inputs).model\n")


def test_sync_falls_back_on_gloo(gloo):
    x = torch.randn(4, 6)
    result = bnify.insert(model(), x, norm="sync")
    assert [e.norm for e in result.plan.edits] == ["batch"]
    assert any("gloo" in note for note in result.plan.notes)
    result.model.train()(x)


def test_a_model_with_sync_batch_norm_of_its_own(gloo):
    """In train mode it refuses the CPU as soon as a process group is up."""
    net = nn.Sequential(
        nn.Linear(6, 8), nn.SyncBatchNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    )
    result = bnify.insert(net, torch.randn(4, 6))
    assert [e.layer for e in result.plan.edits] == ["3"]
    assert result.verification.passed
    assert type(result.model[1]) is type(net[1]) is nn.SyncBatchNorm


def test_sync_without_a_process_group_stays_sync():
    result = bnify.insert(model(), torch.randn(4, 6), norm="sync")
    assert type(result.model[0].norm) is nn.SyncBatchNorm
    assert any("until a process group is up" in note for note in result.plan.notes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_data_parallel():
    assert "DataParallel(model)" in refused(bnify.PlanError, nn.DataParallel(model())).hint


def test_compiled():
    compiled = torch.compile(model())
    error = refused(bnify.PlanError, compiled)
    assert "torch.compile" in error.message
    assert "model._orig_mod" in error.hint
    assert "model = torch.compile(model)" in error.hint


def test_a_compiled_part_runs_eagerly():
    net = nn.Sequential(torch.compile(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 2))
    result = bnify.insert(net, torch.randn(4, 6), verify=False)
    assert len(result.plan.edits) + len(result.plan.skips) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_and_traced():
    part = nn.Sequential(nn.Linear(6, 6), torch.jit.script(model()))
    for net in (torch.jit.script(model()), torch.jit.trace(model(), X), part):
        assert "TorchScript" in refused(bnify.PlanError, net).message


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lazy():
    error = refused(bnify.CaptureError, nn.Sequential(nn.LazyLinear(4), nn.ReLU()))
    assert "0.weight" in error.message
    assert "run one forward pass" in error.hint


def test_meta():
    with torch.device("meta"):
        net = model()
    error = refused(bnify.CaptureError, net)
    assert "0.weight is on the meta device" in error.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value):
    net = model()
    net[2].weight.data[1, 3:5] = value
    error = refused(bnify.WeightsError, net)
    assert error.message == "2.weight holds 2 non-finite values"
    net[0].bias.data[0] = value
    assert "0.bias holds 1 non-finite values and 1 more" in refused(bnify.WeightsError, net).message


def test_running_statistics_that_are_not_finite():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    net[1].running_var[3] = float("inf")
    assert "1.running_var" in refused(bnify.WeightsError, net).message


def test_a_mask_of_infinities_is_no_fault():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
            self.register_buffer("mask", torch.full((6, 6), float("-inf")).triu(1)[0])

        def forward(self, x):
            return self.head(torch.softmax(self.a(x).relu() + self.mask.clamp(min=-9), -1))

    assert bnify.insert(Masked(), torch.randn(4, 6)).verification.passed


@pytest.mark.parametrize("inputs", [3, None, (), {}, "x", (1, 2)])
def test_inputs_that_are_none(inputs):
    refused(bnify.CaptureError, model(), inputs)


def test_inputs_that_do_not_fit():
    error = refused(bnify.CaptureError, model(), torch.zeros(4, 5))
    assert "RuntimeError" in error.message
