"""Devices and execution providers: what was asked for, or a refusal; never a quiet substitute."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

import torch

from bnify.errors import DeviceError, UsageError

CPU_PROVIDER: Final = "CPUExecutionProvider"
CUDA_PROVIDER: Final = "CUDAExecutionProvider"

_backends: Any = torch.backends  # torch ships no types for these
_NAMES: Final = re.compile(r"cpu|auto|cuda(:(\d+))?")

# Both packages install the folder onnxruntime/; whichever came last wins, in pieces.
_SWAP_TO_CUDA: Final = (
    "pip uninstall -y onnxruntime onnxruntime-gpu\npip install --force-reinstall onnxruntime-gpu"
)


def resolve(device: str | torch.device) -> torch.device:
    """The torch device a name stands for: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.

    ``auto`` is the first CUDA device where there is one, else the CPU. ``cuda`` never becomes the
    CPU.

    Raises:
        UsageError: The name is none of these.
        DeviceError: CUDA was asked for and is not there; the message says what is missing.
    """
    name = str(device)
    match = _NAMES.fullmatch(name)
    if match is None:
        raise UsageError(
            f"unknown device {name!r}: expected cpu, cuda, cuda:N or auto",
            hint="for example --device cpu or --device cuda:0",
        )
    if name == "cpu":
        return torch.device("cpu")
    missing = missing_cuda()
    if name == "auto":
        return torch.device("cpu") if missing else torch.device("cuda", 0)
    if missing:
        raise DeviceError(
            f"--device {name}: {missing}", hint="use --device cpu, or see `bnify doctor`"
        )
    index, count = int(match[2] or 0), torch.cuda.device_count()
    if index >= count:
        raise DeviceError(
            f"--device {name}: this machine has "
            + (f"{count} CUDA devices" if count > 1 else "one CUDA device, cuda:0"),
            hint=f"use cuda:0 to cuda:{count - 1}" if count > 1 else "use --device cuda:0",
        )
    return torch.device("cuda", index)


def missing_cuda() -> str | None:
    """Why torch cannot compute on CUDA here; None where it can."""
    if not _backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device (no GPU, or no working driver)"
    return None


def onnx_providers(
    device: str | torch.device, *, tf32: bool = False
) -> list[str | tuple[str, dict[str, Any]]]:
    """The execution providers for an onnxruntime session on this device, the wanted one first.

    The CUDA provider is followed by the CPU's, for the few operators that have no CUDA kernel.

    Args:
        device: As for :func:`resolve`; ``auto`` takes CUDA only where onnxruntime has it too.
        tf32: Let the CUDA provider round inputs of convolutions and products to 10 bits of
            mantissa, which is its own default.

    Raises:
        UsageError: The name is no device.
        DeviceError: onnxruntime has no such provider, or two of its packages overwrite each other.
    """
    import onnxruntime as ort

    refuse_two_runtimes()
    wanted = resolve(device)
    available = ort.get_available_providers()
    if wanted.type == "cuda" and CUDA_PROVIDER in available:
        return [(CUDA_PROVIDER, {"device_id": wanted.index, "use_tf32": int(tf32)}), CPU_PROVIDER]
    if wanted.type == "cpu" or str(device) == "auto":
        return [CPU_PROVIDER]
    raise DeviceError(
        f"--device {device}: onnxruntime {ort.__version__} has no {CUDA_PROVIDER} "
        f"(it has {', '.join(available)})",
        hint=f"replace the CPU package by the GPU package:\n{_SWAP_TO_CUDA}",
    )


def has_onnx_cuda() -> bool:
    """Whether the installed onnxruntime can run files on CUDA."""
    import onnxruntime as ort

    return CUDA_PROVIDER in ort.get_available_providers()


def installed_runtimes() -> tuple[str, ...]:
    """The installed packages that bring the module ``onnxruntime``, by name."""
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # not installed: that is the answer, not an error
        found.append(name)
    return tuple(found)


def refuse_two_runtimes() -> None:
    """Stop where onnxruntime and onnxruntime-gpu are both installed.

    Raises:
        DeviceError: Both are, so which of them runs is an accident of the order of installation.
    """
    if len(installed_runtimes()) > 1:
        raise DeviceError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files",
            hint=f"keep one of them, for CUDA:\n{_SWAP_TO_CUDA}",
        )


@dataclass(frozen=True, slots=True)
class _Precision:
    """torch's float32 settings: the current switches, and the older ones that shadow some.

    Both are set, or each refuses to be read while the other says something else. ``older`` is
    None where the user has left them so already.
    """

    current: tuple[str, ...]
    older: tuple[str, bool] | None

    @classmethod
    def now(cls) -> _Precision:
        older: tuple[str, bool] | None
        try:
            older = (torch.get_float32_matmul_precision(), _backends.cudnn.allow_tf32)
        except RuntimeError:
            older = None
        return cls(tuple(place.fp32_precision for place in _places()), older)

    def set(self) -> None:
        if self.older is not None:
            torch.set_float32_matmul_precision(self.older[0])
            _backends.cudnn.allow_tf32 = self.older[1]
        for place, value in zip(_places(), self.current, strict=True):
            place.fp32_precision = value


def _places() -> tuple[Any, ...]:
    return (
        _backends.cuda.matmul,
        _backends.cudnn.conv,
        _backends.cudnn.rnn,
        # torch.set_float32_matmul_precision reaches the CPU too, where bfloat16 units exist.
        _backends.mkldnn.matmul,
        _backends.mkldnn.conv,
        _backends.mkldnn.rnn,
    )


# The user's own settings while full_precision() is in force.
_own: ContextVar[_Precision | None] = ContextVar("own precision", default=None)


@contextmanager
def full_precision() -> Iterator[None]:
    """Products and convolutions of float32 in float32: no TF32, no bfloat16; restored at the end.

    torch's default is TF32 off for matrix products but on for cuDNN's convolutions.
    """
    before = _Precision.now()
    token = _own.set(_own.get() or before)
    exact = ("ieee",) * len(before.current)
    try:
        _Precision(exact, None if before.older is None else ("highest", False)).set()
        yield
    finally:
        _own.reset(token)
        before.set()


@contextmanager
def own_precision() -> Iterator[None]:
    """Inside :func:`full_precision`: the settings that the user had before it."""
    before = _Precision.now()
    try:
        (_own.get() or before).set()
        yield
    finally:
        before.set()


def precision_settings() -> str:
    """The user's own float32 settings on CUDA in words: ``"matmul ieee, conv tf32"``."""
    matmul = _backends.cuda.matmul.fp32_precision
    conv = _backends.cudnn.conv.fp32_precision
    return f"matmul {_word(matmul)}, convolution {_word(conv)}"


def _word(precision: str) -> str:
    return "float32" if precision in ("ieee", "none") else precision
