"""ONNX files for the tests of the audit, most written with onnx.helper, and what rules find."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import bnify
from bnify.auditing.finding import Finding
from bnify.audits import audit

CHANNELS = 4
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def statistics(channels: int = CHANNELS, seed: int = 0) -> dict[str, np.ndarray]:
    """γ, β, mean and variance of a trained norm, by the names that PyTorch gives them."""
    rng = np.random.default_rng(seed)
    return {
        "weight": rng.normal(1, 0.5, channels).astype(np.float32),
        "bias": rng.normal(0, 1, channels).astype(np.float32),
        "running_mean": rng.normal(0, 1, channels).astype(np.float32),
        "running_var": rng.uniform(0.1, 2, channels).astype(np.float32),
    }


def stored(prefix: str, vectors: dict[str, np.ndarray]) -> list[TensorProto]:
    """Vectors as initializers ``prefix.weight`` and so on."""
    return [numpy_helper.from_array(v, f"{prefix}.{name}") for name, v in vectors.items()]


def norm(x: str, prefix: str, y: str, *more: str, **attributes: Any) -> onnx.NodeProto:
    """A BatchNormalization that reads ``prefix.weight`` and so on."""
    names = ["weight", "bias", "running_mean", "running_var"]
    inputs = [x, *(f"{prefix}.{name}" for name in names)]
    return helper.make_node(
        "BatchNormalization", inputs, [y, *more], name=f"node_{prefix}", **attributes
    )


def conv(x: str, prefix: str, y: str, **attributes: Any) -> onnx.NodeProto:
    """A Conv that reads ``prefix.weight``."""
    return helper.make_node("Conv", [x, f"{prefix}.weight"], [y], name=f"node_{y}", **attributes)


def kernel(prefix: str, *shape: int, seed: int = 1) -> TensorProto:
    """A random weight ``prefix.weight``."""
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return numpy_helper.from_array(values, f"{prefix}.weight")


def model_of(
    nodes: Sequence[onnx.NodeProto],
    tensors: Sequence[TensorProto] = (),
    *,
    shape: Sequence[Any] = ("n", 3, 8, 8),
    outputs: Sequence[str] = ("y",),
    rank: int = 4,
    opset: int = 20,
    functions: Sequence[onnx.FunctionProto] = (),
    inputs: Sequence[str] = ("x",),
) -> onnx.ModelProto:
    """A model that reads ``x``."""
    graph = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name in outputs],
        list(tensors),
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=10)


def saved(path: Path, model: onnx.ModelProto) -> Path:
    """The model in a file."""
    path.write_bytes(model.SerializeToString())
    return path


def external(name: str, location: str, **entries: str) -> TensorProto:
    """A vector of 4 numbers that lies in a file beside the model."""
    tensor = TensorProto(name=name, data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def conv_norm(**vectors: np.ndarray) -> onnx.ModelProto:
    """Conv, then norm ``bn``; vectors of the norm may be given."""
    tensors = [kernel("conv", CHANNELS, 3, 3, 3), *stored("bn", statistics() | vectors)]
    return model_of([conv("x", "conv", "h"), norm("h", "bn", "y")], tensors)


PAIR = [conv("x", "conv", "h"), norm("h", "bn", "y")]


def file_with(
    nodes: Sequence[onnx.NodeProto], *tensors: TensorProto, **options: Any
) -> onnx.ModelProto:
    """Nodes with a kernel ``conv`` and the vectors of a norm ``bn``."""
    given_ = [kernel("conv", 4, 3, 3, 3), *stored("bn", statistics()), *tensors]
    return model_of(nodes, given_, **options)


def found(target: Any, code: str, inputs: Any = None, **options: Any) -> dict[str, Finding]:
    """Module → finding of one rule."""
    report = audit(target, inputs, select=[code], **options)
    assert code not in report.unchecked, report.unchecked
    findings = {f.module: f for f in report.findings}
    assert len(findings) == len(report.findings), "two findings of one module"
    assert all("\n" not in f.message for f in report.findings)
    return findings


def exported(net: nn.Module, x: torch.Tensor, folder: Path) -> Path:
    """The model as torch's exporter writes it, unoptimised."""
    path = folder / "net.onnx"
    bnify.export(net, x, path, optimize=False, verify=False, dynamic_batch=False)
    return path
