from __future__ import annotations

import pytest
import torch

from bnify import devices
from bnify.errors import DeviceError, UsageError

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "cpu:0", "mps", ""])
def test_a_name_that_is_no_device_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="expected cpu, cuda, cuda:N or auto") as caught:
        devices.resolve(name)
    assert caught.value.exit_code == 2


def test_the_cpu_is_always_there() -> None:
    assert devices.resolve("cpu") == torch.device("cpu")
    assert devices.resolve(torch.device("cpu")) == torch.device("cpu")
    assert devices.onnx_providers("cpu") == ["CPUExecutionProvider"]


@no_cuda
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:3"])
def test_cuda_never_becomes_the_cpu(name: str) -> None:
    with pytest.raises(DeviceError, match=r"--device cuda.*: torch .* CUDA") as caught:
        devices.resolve(name)
    assert caught.value.exit_code == 3
    assert caught.value.hint
    with pytest.raises(DeviceError):
        devices.onnx_providers(name)


@no_cuda
def test_auto_takes_what_there_is() -> None:
    assert devices.resolve("auto") == torch.device("cpu")
    assert devices.onnx_providers("auto") == ["CPUExecutionProvider"]


def test_two_runtimes_in_one_folder_are_refused(tmp_path, monkeypatch) -> None:
    for name in ("onnxruntime", "onnxruntime_gpu"):  # what pip leaves of the two packages
        info = tmp_path / f"{name}-1.20.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.20.0\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DeviceError, match="both installed and overwrite") as caught:
        devices.onnx_providers("cpu")
    lines = caught.value.hint.splitlines()
    assert lines[-2].startswith("pip uninstall -y onnxruntime onnxruntime-gpu")
    assert lines[-1].startswith("pip install")


def settings() -> tuple[str, ...]:
    return (torch.get_float32_matmul_precision(), *devices._Precision.now().current)


@pytest.mark.parametrize("own", ["highest", "high", "medium"])
def test_full_precision_is_full_and_restored(own: str) -> None:
    torch.set_float32_matmul_precision(own)
    try:
        before = settings()
        cudnn = torch.backends.cudnn.allow_tf32
        with devices.full_precision():
            assert set(settings()) == {"highest", "ieee"}
            assert torch.backends.cudnn.allow_tf32 is False
            assert torch.backends.cuda.matmul.allow_tf32 is False
            with devices.full_precision():
                pass
            with devices.own_precision():
                assert settings() == before
            assert set(settings()) == {"highest", "ieee"}
        assert settings() == before
        assert torch.backends.cudnn.allow_tf32 is cudnn
    finally:
        torch.set_float32_matmul_precision("highest")
        devices._backends.cuda.matmul.fp32_precision = "none"


def test_settings_made_with_the_new_switches_are_restored_too() -> None:
    conv = devices._backends.cudnn.conv
    before = conv.fp32_precision
    try:
        conv.fp32_precision = "ieee"  # from here the older switch refuses to be read
        with devices.full_precision():
            assert conv.fp32_precision == "ieee"
        assert conv.fp32_precision == "ieee"
    finally:
        conv.fp32_precision = before
    assert devices.precision_settings().startswith("matmul float32, convolution ")


@pytest.mark.gpu
def test_cuda_is_found_where_it_is() -> None:
    assert devices.resolve("cuda") == torch.device("cuda", 0)
    assert devices.resolve("auto") == torch.device("cuda", 0)
    with pytest.raises(DeviceError, match="CUDA device"):
        devices.resolve(f"cuda:{torch.cuda.device_count()}")


@pytest.mark.gpu
def test_tf32_is_off_for_convolutions_in_full_precision() -> None:
    conv = torch.nn.Conv2d(64, 64, 3).cuda()
    x = torch.randn(4, 64, 32, 32, device="cuda")
    with torch.no_grad():
        truth = conv.double()(x.double())
        conv.float()
        with devices.full_precision():
            exact = (conv(x).double() - truth).norm() / truth.norm()
    assert exact < 1e-6
