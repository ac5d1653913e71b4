"""Timing in turns: the order, the figures, and that nothing is disturbed by it."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn

from bnify.errors import ExportError
from bnify.exporting import export_onnx
from bnify.latency import Latency, eager_latency, measure_pair, onnx_latency
from laws import hostile_


def test_the_faster_side_is_known_by_its_ratio() -> None:
    slow, fast = (lambda: time.sleep(0.006)), (lambda: time.sleep(0.002))
    latency = measure_pair(slow, fast, name="sleep", seconds=0.0, least=7)
    assert latency.rounds == 7
    assert latency.before >= 0.006
    assert latency.after >= 0.002
    assert latency.ratio < 0.8
    assert measure_pair(fast, slow, seconds=0.0).ratio > 1.25


def test_sides_alternate_and_neither_always_goes_first() -> None:
    order: list[str] = []
    measure_pair(lambda: order.append("A"), lambda: order.append("B"), seconds=0.0, least=4)
    assert "".join(order) == "ABAB" + "ABBA" * 2  # warm-up, then in turns


def test_a_machine_that_slows_down_favours_neither_side() -> None:
    calls = 0

    def tiring() -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.0004 * calls)

    ratio = measure_pair(tiring, tiring, seconds=0.0, least=12).ratio
    assert 0.9 < ratio < 1.1  # one after the other it would be about 2


def test_more_rounds_are_run_while_there_is_time() -> None:
    assert measure_pair(lambda: None, lambda: None, seconds=0.02, least=3).rounds > 3


def test_no_gradients_while_timing_and_as_before_afterwards() -> None:
    seen: set[bool] = set()
    measure_pair(*[lambda: seen.add(torch.is_grad_enabled())] * 2, seconds=0.0)
    assert seen == {False}
    assert torch.is_grad_enabled()


def test_a_latency_is_plain_data() -> None:
    assert Latency("eager", 0.2, 0.1, 9).to_dict() == {
        "name": "eager",
        "before": 0.2,
        "after": 0.1,
        "rounds": 9,
        "ratio": 0.5,
    }


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return hostile_(net).eval()


def test_models_run_in_eval_mode_on_copies(model: nn.Module) -> None:
    model.train()
    before = copy.deepcopy(model.state_dict())
    inputs = torch.randn(2, 3, 8, 8)
    kept = inputs.clone()
    latency = eager_latency(model, model, inputs, seconds=0.0)
    assert latency.name == "eager"
    assert latency.before > 0
    assert latency.after > 0
    assert model.training
    assert model[1].training
    assert torch.equal(inputs, kept)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.fixture
def file(model: nn.Module, tmp_path) -> str:
    path = tmp_path / "net.onnx"
    export_onnx(model, torch.randn(2, 3, 8, 8), path, verify=False)
    return str(path)


@pytest.mark.parametrize("threads", [0, 1])
def test_files_run_in_onnxruntime(model: nn.Module, file: str, threads: int) -> None:
    with open(file, "rb") as stream:
        content = stream.read()
    inputs = torch.randn(2, 3, 8, 8)
    latency = onnx_latency(file, content, inputs, model=model, threads=threads, seconds=0.0)
    assert latency.name == "onnxruntime"
    assert latency.before > 0
    assert latency.after > 0
    assert latency.rounds == 5


def test_inputs_are_matched_by_name_else_by_order(file: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    assert onnx_latency(file, file, {"whatever": x}, seconds=0.0).rounds == 5
    assert onnx_latency(file, file, {"other": x[0], "input": x}, seconds=0.0).rounds == 5


def test_what_cannot_be_run_is_an_error_of_ours(file: str, tmp_path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ExportError, match=r"broken\.onnx cannot be timed"):
        onnx_latency(broken, file, x)
    with pytest.raises(ExportError, match="takes input, given a, b"):
        onnx_latency(file, file, {"a": x, "b": x})
    with pytest.raises(ExportError, match=r"net\.onnx cannot be timed"):
        onnx_latency(file, file, torch.randn(2, 5, 8, 8))
    with pytest.raises(ExportError, match="bfloat16"):
        onnx_latency(file, file, x.bfloat16())


@pytest.mark.gpu
def test_on_cuda_a_call_lasts_until_the_device_has_finished() -> None:
    x = torch.randn(4096, 4096, device="cuda")

    def products(count: int):
        def call() -> torch.Tensor:
            y = x
            for _ in range(count):
                y = y @ x
            return y

        return call

    assert measure_pair(products(20), products(2), seconds=0.5).ratio < 0.5
