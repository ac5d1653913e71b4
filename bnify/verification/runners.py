"""What can be run and compared: a PyTorch model or an ONNX file, on one device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import torch
import torch.utils.dlpack
from torch import Tensor, nn

from bnify import devices
from bnify.borrow import copy_model, seeded
from bnify.double import StayInFloat64, double
from bnify.errors import BnifyError, DeviceError, ExportError, SpecError
from bnify.quiet import captured_streams
from bnify.structure import Call, map_tensors, outputs_of
from bnify.verification.kernels import load_error

Outputs = list[tuple[str, Tensor]]

# onnxruntime's names of element types, as torch dtypes.
_DTYPES: Final = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}
_CODE: Final = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_ONNX_BFLOAT16: Final = 16  # TensorProto.BFLOAT16


@runtime_checkable
class Runner(Protocol):
    """One side of a comparison."""

    @property
    def device(self) -> str:
        """Where it runs, with the provider for ONNX files: ``"cpu (CPUExecutionProvider)"``."""

    def run(self, call: Call) -> Outputs:
        """The outputs in order, detached, on the CPU, by name."""


class TorchRunner:
    """A model in eval mode, without gradients, on a copy of its own.

    The fused path of ``nn.MultiheadAttention`` stays as the user has it.

    Args:
        model: The model; it is not touched.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        dtype: Compute in this floating-point type; None is the model's own. With float64, casts
            inside the model to other floating-point types become casts to float64.
    """

    def __init__(
        self,
        model: nn.Module,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.where = devices.resolve(device)
        self.dtype = dtype
        copied = double(model) if dtype == torch.float64 else copy_model(model)
        # Not self.model.to(): people give their own methods that name.
        self.model = nn.Module.to(copied.eval(), device=self.where, dtype=dtype)

    @property
    def device(self) -> str:
        """The torch device."""
        return str(self.where)

    def run(self, call: Call) -> Outputs:
        """The model's outputs; random numbers start from the same seed at every run."""
        call = call.clone().to(device=self.where, dtype=self.dtype)
        with torch.no_grad(), seeded(0), in_float64(self.dtype == torch.float64):
            return [(name, _plain(tensor)) for name, tensor in outputs_of(call(self.model))]


class OnnxRunner:
    """An ONNX file in onnxruntime.

    Args:
        source: The file, or a serialized model.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``; never replaced by another one.
        optimize: Let onnxruntime rewrite the graph.
        model: Gives positional inputs the names of its forward's parameters.
        tf32: On CUDA, compute as onnxruntime does by default instead of in full float32.

    Raises:
        ExportError: onnxruntime cannot load the file.
        DeviceError: onnxruntime has no provider for this device, or starts without it.
    """

    def __init__(
        self,
        source: str | Path | bytes,
        device: str | torch.device = "cpu",
        *,
        optimize: bool = True,
        model: nn.Module | None = None,
        tf32: bool = False,
    ) -> None:
        import onnxruntime as ort

        self.source = source
        self.model = model
        self.log = ""
        self.asked_for = device
        self._name = "the model" if isinstance(source, bytes) else Path(source).name
        providers = devices.onnx_providers(device, tf32=tf32)
        first = providers[0] if isinstance(providers[0], str) else providers[0][0]
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if not isinstance(source, bytes) and not Path(source).is_file():
            raise SpecError(f"{source} does not exist or is no file", hint="check the path")
        data = source if isinstance(source, bytes) else str(source)
        with captured_streams() as said:
            try:
                self._session = ort.InferenceSession(data, options, providers=providers)
            except Exception as error:  # onnxruntime's exceptions share no base of their own
                raise load_error(
                    source, self._name, first_line(error), cuda=first == devices.CUDA_PROVIDER
                ) from error
        self.log = said.text
        self._session.disable_fallback()
        used = self._session.get_providers()[0]
        if used != first:
            raise DeviceError(
                f"onnxruntime runs {self._name} with {used} although {first} was asked for",
                hint="check the driver and CUDA libraries with `bnify doctor`, or use --device cpu",
            )
        where = providers[0][1]["device_id"] if isinstance(providers[0], tuple) else None
        self._device = f"{'cpu' if where is None else f'cuda:{where}'} ({used})"

    @property
    def device(self) -> str:
        """The device and the execution provider that really is first in the session."""
        return self._device

    @property
    def static_batch(self) -> int | None:
        """The batch size that is fixed in the file; None where the first axis is symbolic."""
        for value in self._session.get_inputs():
            if value.shape:
                return value.shape[0] if isinstance(value.shape[0], int) else None
        return None

    def run(self, call: Call) -> Outputs:
        """The outputs by the names that the file gives them.

        Raises:
            ExportError: The inputs do not fit the file, or an operator fails.
        """
        feeds = self._feeds(call)
        with captured_streams():
            try:
                values = self._session.run_with_ort_values(None, feeds)
            except Exception as error:  # onnxruntime's exceptions share no base of their own
                raise ExportError(
                    f"{self._name} fails in onnxruntime: {first_line(error)}",
                    hint="run it on the inputs that it was exported with",
                ) from error
        names = [output.name for output in self._session.get_outputs()]
        return list(zip(names, map(_from_ort, values), strict=True))

    def _feeds(self, call: Call) -> dict[str, Any]:
        given = dict(call.tensors(self.model))
        by_name = {name.replace(".", "_"): name for name in given}
        wanted = self._session.get_inputs()
        if len(given) < len(wanted) or (
            len(given) > len(wanted) and any(value.name not in by_name for value in wanted)
        ):
            raise ExportError(
                f"{self._name} takes {len(wanted)} input{'s' if len(wanted) != 1 else ''} "
                f"({', '.join(v.name for v in wanted)}), {len(given)} given ({', '.join(given)})",
                hint="name the inputs as the file does",
            )
        taken = {v.name: given.pop(by_name[v.name]) for v in wanted if v.name in by_name}
        rest = iter(given.values())
        feeds = {}
        for value in wanted:
            tensor = taken[value.name] if value.name in taken else next(rest)
            dtype = _DTYPES.get(value.type)
            if dtype != tensor.dtype:
                raise ExportError(
                    f"{self._name}: input {value.name} is {value.type}, given {tensor.dtype}",
                    hint="give inputs of the dtypes that the file was exported with",
                )
            feeds[value.name] = _to_ort(tensor)
        return feeds


def as_runner(
    side: nn.Module | Runner | str | Path,
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype | None = None,
    model: nn.Module | None = None,
) -> Runner:
    """The runner for one side of a comparison: a model, the path of an ONNX file, or a runner.

    On a machine where torch has CUDA and onnxruntime does not, a file runs on the CPU; the
    runner's ``device`` says so.

    Args:
        side: What to run. Folders written by bnify are loaded to a model by the caller.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        dtype: Floating-point type for models; None is the model's own.
        model: For files: gives positional inputs the names of its forward's parameters.

    Raises:
        SpecError: It is none of these.
        DeviceError: The device is not there.
    """
    if isinstance(side, nn.Module):
        return TorchRunner(side, device, dtype)
    if isinstance(side, (str, Path)):
        if Path(side).suffix != ".onnx":
            raise SpecError(
                f"{side} is no .onnx file", hint="give a model, a saved folder or an .onnx file"
            )
        where = devices.resolve(device)
        if where.type == "cuda" and not devices.has_onnx_cuda():
            where = torch.device("cpu")
        return OnnxRunner(side, where, model=model)
    if isinstance(side, Runner):
        return side
    raise SpecError(
        f"cannot run {type(side).__name__} objects",
        hint="give a model, a saved folder or an .onnx file",
    )


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, without colours and error codes."""
    if isinstance(error, BnifyError):
        return error.message
    text = _CODE.sub("", _COLOUR.sub("", str(error)))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # "Found the following conflicts:" says nothing without the line after it.
    return " ".join(lines[: 2 if lines[0].endswith((":", "following indices")) else 1])


def root_cause(error: BaseException) -> str:
    """The first line of the exception that started a chain, with its type where it says little."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = first_line(error)
    return line if line.startswith(type(error).__name__) else f"{type(error).__name__}: {line}"


@contextmanager
def in_float64(enabled: bool = True) -> Iterator[None]:
    """Tensors made, and casts to floating-point types, are float64 inside this block."""
    if not enabled:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with StayInFloat64():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(before)


def _plain(tensor: Tensor) -> Tensor:
    dense = map_tensors(lambda t: t.to_dense() if t.layout != torch.strided else t, tensor)
    # A copy: an output may be a view of an input or of the model's own memory.
    return dense.detach().to("cpu", copy=True)  # type: ignore[no-any-return]


def _to_ort(tensor: Tensor) -> Any:
    import onnxruntime as ort

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16
        bits = tensor.view(torch.uint16).numpy()
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _from_ort(value: Any) -> Tensor:
    if value.element_type() == _ONNX_BFLOAT16:
        return torch.utils.dlpack.from_dlpack(value._get_c_value()).clone()
    return torch.from_numpy(value.numpy().copy())
