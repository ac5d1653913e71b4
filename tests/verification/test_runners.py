from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bnify.errors import DeviceError, ExportError, SpecError, UsageError
from bnify.quiet import captured_streams
from bnify.structure import Call, as_call
from bnify.verification import OnnxRunner, Runner, TorchRunner, as_runner, verify_budget


class Two(nn.Module):
    """Inputs that must not change places."""

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"difference": left - 2 * right, "twice": left * 2}


def written(model: nn.Module, call: Call, path: Path, **options) -> Path:
    program = torch.onnx.export(
        model.eval(), call.args, kwargs=dict(call.kwargs), dynamo=True, verbose=False, **options
    )
    program.save(str(path))
    return path


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    call = Call((torch.randn(2, 3), torch.randn(2, 3)))
    with captured_streams():
        return written(Two(), call, tmp_path_factory.mktemp("two") / "two.onnx")


LEFT, RIGHT = torch.ones(2, 3), torch.full((2, 3), 5.0)


@pytest.mark.parametrize(
    "call",
    [
        Call((LEFT, RIGHT)),
        Call((), {"right": RIGHT, "left": LEFT}),
        Call((LEFT,), {"right": RIGHT}),
        Call((), {"right": RIGHT, "something": LEFT}),
    ],
)
def test_inputs_go_by_name_then_by_order(two: Path, call: Call) -> None:
    outputs = OnnxRunner(two).run(call)
    assert torch.equal(outputs[0][1], LEFT - 2 * RIGHT)
    assert torch.equal(outputs[1][1], LEFT * 2)


def test_positional_inputs_take_the_names_of_forward(two: Path) -> None:
    class Swapped(nn.Module):
        def forward(self, right: Tensor, left: Tensor) -> Tensor:
            return left - right

    outputs = OnnxRunner(two, model=Swapped()).run(Call((RIGHT, LEFT)))
    assert torch.equal(outputs[0][1], LEFT - 2 * RIGHT)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (Call((LEFT,)), r"two.onnx takes 2 inputs \(left, right\), 1 given"),
        (Call((LEFT, RIGHT, RIGHT)), r"takes 2 inputs \(left, right\), 3 given"),
        (Call((LEFT, RIGHT.double())), r"input right is tensor\(float\), given torch.float64"),
        (
            Call((LEFT[:, :2], RIGHT)),
            "fails in onnxruntime: Got invalid dimensions for input: left",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(two: Path, call: Call, says: str) -> None:
    with pytest.raises(ExportError, match=says) as caught:
        OnnxRunner(two).run(call)
    assert "\n" not in caught.value.message


def test_more_inputs_than_the_file_has_are_fine_when_all_of_its_names_are_there(two: Path) -> None:
    call = Call((), {"left": LEFT, "right": RIGHT, "unused": RIGHT})
    assert torch.equal(OnnxRunner(two).run(call)[0][1], LEFT - 2 * RIGHT)


def test_the_provider_is_part_of_the_device(two: Path) -> None:
    runner = OnnxRunner(two)
    assert runner.device == "cpu (CPUExecutionProvider)"
    assert runner.static_batch == 2
    assert isinstance(runner, Runner)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"not a model at all")
    with pytest.raises(ExportError, match=r"onnxruntime cannot load junk\.onnx: "):
        OnnxRunner(tmp_path / "junk.onnx")
    with pytest.raises(SpecError, match="does not exist"):
        OnnxRunner(tmp_path / "missing.onnx")
    with pytest.raises(SpecError, match=r"is no \.onnx file"):
        as_runner(tmp_path / "weights.pt")
    with pytest.raises(SpecError, match="cannot run int objects"):
        as_runner(3)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_never_replaced_by_the_cpu(two: Path) -> None:
    with pytest.raises(DeviceError, match="CUDA"):
        OnnxRunner(two, "cuda")
    with pytest.raises(DeviceError, match="CUDA"):
        TorchRunner(nn.Linear(2, 2), "cuda:1")
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        as_runner(two, "gpu")


def test_bfloat16_goes_in_and_comes_out(tmp_path: Path) -> None:
    class Pass(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(3, 2)

    x = torch.randn(2, 3).bfloat16()
    with captured_streams():
        path = written(Pass(), Call((x,)), tmp_path / "b.onnx")
    got = OnnxRunner(path).run(Call((x,)))[0][1]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, x.reshape(3, 2))


def test_a_torch_runner_works_on_a_copy_in_eval_mode() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    x = torch.randn(4, 3)
    got = TorchRunner(model).run(as_call(x))[0][1]
    assert model.training
    assert model[0].num_batches_tracked == 0
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)
    assert not got.requires_grad


def test_a_float64_runner_restores_the_default_dtype() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError(str(torch.zeros(1).dtype))

    with pytest.raises(ValueError, match=r"torch\.float64"):
        TorchRunner(Fails(), dtype=torch.float64).run(as_call(torch.ones(1)))
    assert torch.get_default_dtype() == torch.float32


def test_the_fused_attention_path_stays_as_it_is() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    seen = []
    kept = torch._transformer_encoder_layer_fwd

    def spy(*args, **kwargs):
        seen.append(1)
        return kept(*args, **kwargs)

    torch._transformer_encoder_layer_fwd = spy
    try:
        TorchRunner(layer).run(as_call(torch.randn(2, 3, 8)))
    finally:
        torch._transformer_encoder_layer_fwd = kept
    assert seen


def test_a_static_file_is_noted_not_failed(two: Path) -> None:
    verdict = verify_budget(Two(), two, Call((torch.randn(2, 3), torch.randn(2, 3))))
    assert verdict.passed
    check = verdict.checks[-1]
    assert (check.passed, check.detail) == (None, "the file is fixed at batch 2")
    other = verify_budget(Two(), two, Call((torch.randn(3, 3), torch.randn(3, 3))))
    assert not other.passed


def test_file_against_file_says_that_there_is_no_budget(two: Path) -> None:
    verdict = verify_budget(two, two, Call((torch.randn(2, 3), torch.randn(2, 3))))
    assert verdict.passed
    assert verdict.outputs[0].budget_ratio is None
    assert verdict.notes[0].startswith("budget: unavailable: the reference is an ONNX file")


@pytest.mark.gpu
def test_torch_on_cuda_is_a_row_of_its_own(two: Path) -> None:
    verdict = verify_budget(Two(), two, Call((torch.randn(2, 3), torch.randn(2, 3))), device="cuda")
    assert verdict.passed
    names = [check.name for check in verdict.checks]
    assert "torch on cuda:0 against float64" in names
    assert any("with your settings" in name for name in names)
    judged = {check.name: check.passed for check in verdict.checks}
    assert judged["torch on cuda:0 against float64"] is True
    assert all(check.passed is None for check in verdict.checks if "your settings" in check.name)


@pytest.mark.gpu
def test_a_model_on_cuda_is_within_the_budget_of_the_cpu() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3))
    verdict = verify_budget(model, model, as_call(torch.randn(2, 3, 16, 16)), device="cuda")
    assert verdict.passed
    assert verdict.device == "cuda:0"
