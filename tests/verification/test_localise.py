"""A fault planted in an ONNX file is caught, and the node named is the planted one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from bnify.exporting import export_onnx
from bnify.structure import Call
from bnify.verification import OnnxRunner, first_divergent, first_divergent_module, verify_budget
from laws import hostile_


class Net(nn.Module):
    """Three norms of two kinds, a residual, and channels that a swap would show on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.ModuleDict(
            {
                "conv": nn.Conv2d(8, 8, 3, padding=1, bias=False),
                "norm": nn.BatchNorm2d(8),
                "squeeze": nn.Conv2d(8, 8, 1),
            }
        )
        self.group = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.block["norm"](self.block["conv"](x)))
        x = x + self.block["squeeze"](y)
        return self.head(self.group(x.mean((2, 3))))


CALL = Call((torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5)),))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return hostile_(Net(), seed=1).eval()


@pytest.fixture(scope="module")
def file(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export = export_onnx(net, CALL, path, optimize=False)
    assert export.verification is not None
    assert export.verification.passed
    return path


def norm_node(model: onnx.ModelProto, number: int) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == "BatchNormalization"][number]


def rewrite(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], None]) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def dropped_eps(model: onnx.ModelProto) -> str:
    node = norm_node(model, 1)
    next(a for a in node.attribute if a.name == "epsilon").f = 0.0
    return node.output[0]


def changed_eps(model: onnx.ModelProto) -> str:
    node = norm_node(model, 0)
    next(a for a in node.attribute if a.name == "epsilon").f = 1e-3
    return node.output[0]


def beta_off_by_one_percent(model: onnx.ModelProto) -> str:
    node = norm_node(model, 1)

    def change(beta: np.ndarray) -> None:
        beta[3] *= 1.01

    rewrite(model, node.input[2], change)
    return node.output[0]


def swapped_channel(model: onnx.ModelProto) -> str:
    def change(weight: np.ndarray) -> None:
        weight[[1, 6]] = weight[[6, 1]]

    rewrite(model, "block.squeeze.weight", change)
    return next(n for n in model.graph.node if "block.squeeze.weight" in n.input).output[0]


def norm_left_out(model: onnx.ModelProto) -> str:
    node = norm_node(model, 1)
    before, after = node.input[0], node.output[0]
    model.graph.node.remove(node)
    for other in model.graph.node:
        for i, name in enumerate(other.input):
            if name == after:
                other.input[i] = before
    return after


def norm_replaced_by_identity(model: onnx.ModelProto) -> str:
    node = norm_node(model, 0)
    identity = onnx.helper.make_node("Identity", [node.input[0]], [node.output[0]])
    index = list(model.graph.node).index(node)
    model.graph.node.remove(node)
    model.graph.node.insert(index, identity)
    return identity.output[0]


FAULTS = [
    dropped_eps,
    changed_eps,
    beta_off_by_one_percent,
    swapped_channel,
    norm_left_out,
    norm_replaced_by_identity,
]


@pytest.mark.parametrize("plant", FAULTS)
def test_a_planted_fault_is_caught_and_its_node_named(
    net: nn.Module, file: Path, tmp_path: Path, plant
) -> None:
    model = onnx.load(file)
    planted = plant(model)
    onnx.save(model, tmp_path / "broken.onnx")
    verdict = verify_budget(net, tmp_path / "broken.onnx", CALL)
    assert not verdict.passed
    assert verdict.first_divergent is not None
    words = verdict.first_divergent.replace("(", " ").replace(",", " ").split()
    assert planted in words
    if plant is not norm_left_out:
        assert words[0] == planted


def test_the_name_says_operator_and_module(net: nn.Module, file: Path) -> None:
    model = onnx.load(file)
    planted = beta_off_by_one_percent(model)
    named = first_divergent(net, model.SerializeToString(), CALL)
    assert named == f"{planted} (BatchNormalization, block.norm)"


def test_a_norm_that_was_left_out_is_named_with_its_module(net: nn.Module, file: Path) -> None:
    model = onnx.load(file)
    planted = norm_left_out(model)
    named = first_divergent(net, model.SerializeToString(), CALL)
    assert named is not None
    assert f"; the file has no {planted} (block.norm) before it" in named


def test_a_sound_file_has_no_divergent_node(net: nn.Module, file: Path) -> None:
    assert first_divergent(net, file, CALL) is None


def test_a_fault_in_the_optimised_file_is_named_too(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export = export_onnx(net, CALL, path)
    assert (export.norms_before, export.norms_after) == (3, 1)
    model = onnx.load(path)
    swapped_channel(model)
    onnx.save(model, path)
    verdict = verify_budget(net, path, CALL)
    assert not verdict.passed
    assert verdict.first_divergent is not None
    assert "block.squeeze" in verdict.first_divergent


def test_module_against_module_names_the_innermost(net: nn.Module) -> None:
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.block["squeeze"].bias[0] += 0.01
    assert first_divergent_module(net, broken, CALL) == "block.squeeze"
    assert first_divergent_module(net, copy.deepcopy(net), CALL) is None


def test_a_module_called_twice_is_named_with_its_call() -> None:
    class Twice(nn.Module):
        def __init__(self, second: float) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.second = second

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x) * self.second)

    one, two = Twice(1.0), Twice(1.1)
    two.load_state_dict(one.state_dict())
    assert first_divergent_module(one, two, Call((torch.randn(2, 4),))) == "fc (call 2)"


def test_what_cannot_be_localised_is_said(net: nn.Module, file: Path, tmp_path: Path) -> None:
    model = onnx.load(file)
    beta_off_by_one_percent(model)
    onnx.save(model, tmp_path / "broken.onnx")
    verdict = verify_budget(file, OnnxRunner(tmp_path / "broken.onnx"), CALL)
    assert not verdict.passed
    assert verdict.first_divergent is None
    assert "not localised: the reference is an ONNX file" in verdict.notes
