"""Faults planted in the ONNX files of models that bnify rewrote: each is caught and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

import bnify
from bnify.structure import Call, as_call
from bnify.verification import verify_budget
from laws import hostile_
from zoo import entry


class SmallConvNet(nn.Module):
    """Strided and plain convolutions and two linear layers, no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.fc = nn.Linear(16, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.relu(self.stem(x))).mean((2, 3))
        return self.head(F.relu(self.fc(x)))


class Sound(NamedTuple):
    """A rewritten model with its file, which passes."""

    model: nn.Module
    call: Call
    file: Path
    layers: list[str]


NAMES = ("small", "own:UNet", "own:PlainResidual", "torchvision:squeezenet1_1")


@pytest.fixture(scope="module", params=NAMES)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    torch.manual_seed(0)
    if request.param == "small":
        model: nn.Module = SmallConvNet()
        inputs = torch.randn(3, 3, 16, 16)
    else:
        found = entry(request.param)
        model, inputs = found.build(), found.inputs()
    result = bnify.insert(model, inputs, verify=False)
    rewritten = hostile_(result.model, seed=1).eval()
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export = bnify.export(rewritten, inputs, path, optimize=False)
    assert export.verification.passed
    layers = [edit.layer for edit in result.plan.edits]
    assert export.norms_before == len(layers) >= 4
    return Sound(rewritten, as_call(inputs), path, layers)


def set_eps(node: onnx.NodeProto, value: float) -> None:
    next(a for a in node.attribute if a.name == "epsilon").f = value


def change(proto: onnx.ModelProto, name: str, edit: Callable[[np.ndarray], None]) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    edit(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def no_eps(_: onnx.ModelProto, node: onnx.NodeProto) -> None:
    set_eps(node, 0.0)


def large_eps(_: onnx.ModelProto, node: onnx.NodeProto) -> None:
    set_eps(node, 1e-2)


def beta_off_by_one_percent(proto: onnx.ModelProto, node: onnx.NodeProto) -> None:
    def edit(beta: np.ndarray) -> None:
        beta[np.abs(beta).argmax()] *= 1.01

    change(proto, node.input[2], edit)


def gammas_swapped(proto: onnx.ModelProto, node: onnx.NodeProto) -> None:
    def edit(gamma: np.ndarray) -> None:
        pair = [gamma.argmin(), gamma.argmax()]
        gamma[pair] = gamma[pair[::-1]]

    change(proto, node.input[1], edit)


def left_out(proto: onnx.ModelProto, node: onnx.NodeProto) -> None:
    before, after = node.input[0], node.output[0]
    proto.graph.node.remove(node)
    for other in proto.graph.node:
        for i, name in enumerate(other.input):
            if name == after:
                other.input[i] = before


FAULTS = (no_eps, large_eps, beta_off_by_one_percent, gammas_swapped, left_out)


@pytest.mark.parametrize("plant", FAULTS)
def test_a_fault_in_a_norm_that_bnify_put_there_is_caught_and_named(
    sound: Sound, tmp_path: Path, plant
) -> None:
    proto = onnx.load(sound.file)
    norms = [node for node in proto.graph.node if node.op_type == "BatchNormalization"]
    at = FAULTS.index(plant) * len(norms) // len(FAULTS)  # all over the model
    value, scale = norms[at].output[0], norms[at].input[1]
    layer = scale.removesuffix(".norm.weight")
    assert layer in sound.layers

    plant(proto, norms[at])
    onnx.save(proto, tmp_path / "faulty.onnx")
    verdict = verify_budget(sound.model, tmp_path / "faulty.onnx", sound.call)

    assert not verdict.passed
    assert max(output.budget_ratio or 0.0 for output in verdict.outputs) > 10
    named = verdict.first_divergent or ""
    if plant is left_out:
        assert named.endswith(f"; the file has no {value} ({layer}.norm) before it")
    else:
        assert named == f"{value} (BatchNormalization, {layer}.norm)"


def test_the_file_without_a_fault_has_nothing_to_name(sound: Sound) -> None:
    verdict = verify_budget(sound.model, sound.file, sound.call)
    assert verdict.passed
    assert verdict.first_divergent is None
