"""The whole line on a GPU: the same decisions and verdicts as on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bnify
import laws
from mlp import MyNetwork
from zoo import ZOO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
SMALL = [entry for entry in ZOO if entry.small]


def to_cuda(inputs: object) -> object:
    from bnify.structure import as_call

    return as_call(inputs).to(device="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize("entry", SMALL, ids=lambda entry: entry.name)
def test_insert_on_cuda_decides_and_passes_as_on_cpu(entry) -> None:
    inputs = entry.inputs()
    planned = bnify.insert(entry.build(), inputs, verify=False).plan

    result = bnify.insert(entry.build().cuda(), to_cuda(inputs))

    assert result.verification is not None
    assert result.verification.passed
    assert result.verification.device == "cuda:0"
    assert result.plan.edits == planned.edits
    assert {(s.layer, s.reason) for s in result.plan.skips} == {
        (s.layer, s.reason) for s in planned.skips
    }
    assert {p.device.type for p in result.model.parameters()} == {"cuda"}


@pytest.mark.parametrize("entry", SMALL, ids=lambda entry: entry.name)
@pytest.mark.parametrize("merge", [False, True])
def test_fold_on_cuda_decides_and_passes_as_on_cpu(entry, merge: bool) -> None:
    inputs = entry.inputs()
    planned = bnify.fold(laws.hostile_(entry.build()), inputs, merge=merge, verify=False).plan

    result = bnify.fold(laws.hostile_(entry.build()).cuda(), to_cuda(inputs), merge=merge)

    assert result.verification is not None
    assert result.verification.passed
    assert result.plan.edits == planned.edits
    assert {t.device.type for t in result.model.state_dict().values()} <= {"cuda"}
    assert {t.device.type for t in result.graph.state_dict().values()} <= {"cuda"}


@pytest.mark.parametrize("norm", ["batch", "sync", "group", "layer", "instance", "rms"])
def test_every_kind_trains_on_cuda(norm: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(576, 32),
        nn.ReLU(),
        nn.Linear(32, 4),
    ).cuda()
    result = bnify.insert(model, torch.randn(8, 3, 8, 8, device="cuda"), norm=norm)
    optimizer = torch.optim.SGD(result.model.parameters(), lr=0.1)

    result.model.train()(torch.randn(8, 3, 8, 8, device="cuda")).square().mean().backward()
    optimizer.step()

    assert result.verification is not None
    assert result.verification.passed
    new = [p for n, p in result.model.named_parameters() if ".norm." in n]
    assert new
    assert all(p.grad is not None and p.is_cuda for p in new)


def test_preserve_keeps_the_function_on_cuda() -> None:
    torch.manual_seed(0)
    model = MyNetwork().cuda().eval()
    batch = torch.randn(256, 784, device="cuda")

    result = bnify.insert(model, batch, init="preserve", drop_bias=True)

    assert result.verification is not None
    assert result.verification.passed
    torch.testing.assert_close(result.model.eval()(batch), model(batch), rtol=1e-4, atol=1e-5)


def test_half_precision_model_on_cuda() -> None:
    model = MyNetwork().cuda().bfloat16()
    result = bnify.insert(model, torch.randn(32, 784, device="cuda", dtype=torch.bfloat16))
    assert result.verification is not None
    assert result.verification.passed
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}


def test_saved_from_cuda_and_loaded_on_cpu(tmp_path: Path) -> None:
    model = MyNetwork().cuda()
    result = bnify.insert(model, torch.randn(32, 784, device="cuda"))
    result.save(tmp_path / "out")

    loaded = bnify.load(tmp_path / "out", model=MyNetwork())

    batch = torch.randn(4, 784)
    torch.testing.assert_close(
        loaded(batch), result.model.eval().cpu()(batch), rtol=1e-5, atol=1e-5
    )


def test_apply_draws_its_inputs_on_the_models_device() -> None:
    plan = bnify.insert(MyNetwork(), torch.randn(32, 784)).plan
    result = bnify.apply(MyNetwork().cuda(), plan)
    assert result.verification is not None
    assert result.verification.passed
