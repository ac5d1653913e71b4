"""BN401 to BN403: each fires on its fault, in a model and in a file, and is silent on its traps."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch import nn

import bnify
import laws
from bnify.auditing.rules.bn403_fold_range import narrow_share
from bnify.audits import audit
from bnify.ranges import narrow_share as share_in_torch
from foldnets import random_fold_network
from onnxfiles import (
    PAIR,
    X,
    conv,
    conv_norm,
    exported,
    file_with,
    found,
    kernel,
    model_of,
    norm,
    saved,
    statistics,
    stored,
)


def small(*between):
    """Conv, what stands between, norm; then a head."""
    layers = (nn.Conv2d(3, 6, 3), *between, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    return laws.hostile_(nn.Sequential(*layers).eval(), 3)


# -- BN401 -----------------------------------------------------------------------------------------


def test_a_norm_that_fold_removes():
    (finding,) = found(small(), "BN401", X).values()
    assert (finding.module, finding.severity, finding.safety) == ("1", "info", "safe")
    assert finding.values["into"] == ["0"]
    assert finding.fix == "bnify fold"


def test_a_model_in_train_mode_is_not_checked():
    report = audit(small().train(), X, select=["BN401"])
    assert not report.findings
    assert "eval mode" in report.unchecked["BN401"]


def test_what_fold_leaves_is_not_called_foldable():
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU()).eval()
    assert not found(net, "BN401", torch.randn(2, 5, 6)), "trap 5: the axes have one length"
    assert found(net, "BN401", torch.randn(2, 6))


LAYERS = {
    "conv": (nn.Conv2d(3, 6, 3, groups=3, bias=False), X),
    "transposed": (nn.ConvTranspose2d(3, 6, 3), X),
    "grouped transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)),
    "linear": (nn.Linear(5, 6), torch.randn(4, 5)),
    "linear without bias": (nn.Linear(5, 6, bias=False), torch.randn(4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_a_file_that_take_a_norm(tmp_path, name):
    layer, x = LAYERS[name]
    norm_of = nn.BatchNorm2d if x.ndim == 4 else nn.BatchNorm1d
    net = laws.hostile_(nn.Sequential(layer, norm_of(6), nn.ReLU()).eval(), 3)
    path = exported(net, x, tmp_path)
    (finding,) = found(path, "BN401").values()
    assert (finding.module, finding.values["into"], finding.values["channels"]) == ("1", ["0"], 6)
    for target in ("int8", "fp16"):
        live = found(net, "BN403", x, precision=target)
        filed = found(path, "BN403", precision=target)
        assert {m: f.severity for m, f in live.items()} == {m: f.severity for m, f in filed.items()}
        for module, one in live.items():
            for key, number in one.values.items():
                assert filed[module].values[key] == pytest.approx(number, rel=1e-5)


def relu(x, y):
    return helper.make_node("Relu", [x], [y])


def tokens(shape):
    nodes = [helper.make_node("MatMul", ["x", "w.weight"], ["h"]), norm("h", "bn", "y")]
    return file_with(nodes, kernel("w", 4, 4), shape=shape, rank=len(shape))


def flattened(outputs, sizes):
    """Tokens go into the batch (trap 4), or the axes are cut anew."""
    shape = numpy_helper.from_array(np.array(sizes), "sizes")
    nodes = [helper.make_node("MatMul", ["x", "w.weight"], ["t"]),
             helper.make_node("Reshape", ["t", "sizes"], ["h"]), norm("h", "bn", "y")]  # fmt: skip
    model = file_with(nodes, kernel("w", 4, outputs), shape, shape=[2, 6, 4], rank=2)
    model.graph.value_info.append(helper.make_tensor_value_info("h", 1, sizes))
    return model


def in_a_branch():
    out = helper.make_tensor_value_info("b", 1, [None] * 4)
    body = helper.make_graph([norm("h", "bn", "b")], "body", [], [out])
    value = numpy_helper.from_array(np.array(True))
    on = helper.make_node("Constant", [], ["on"], value=value)
    both = helper.make_node("If", ["on"], ["y"], then_branch=body, else_branch=body)
    return file_with([conv("x", "conv", "h"), on, both])


FILES = {
    "plain": (lambda: file_with(PAIR), True),
    "matmul on rows": (lambda: tokens([2, 4]), True),
    "matmul on tokens, one length": (lambda: tokens([2, 4, 4]), False),
    "tokens in the batch": (lambda: flattened(4, [12, 4]), True),
    "tokens cut anew": (lambda: flattened(2, [6, 4]), False),
    "another reader": (lambda: file_with([*PAIR, relu("h", "z")], outputs=("y", "z")), False),
    "an output": (lambda: file_with(PAIR, outputs=("y", "h")), False),
    "relu between": (lambda: file_with([conv("x", "conv", "a"), relu("a", "h"), PAIR[1]]), False),
    "a branch": (in_a_branch, False),
    "training": (lambda: file_with([PAIR[0], norm("h", "bn", "y", training_mode=1)]), False),
    "variance": (lambda: conv_norm(running_var=np.float32([1, -1, 1, 1])), False),
    "nan": (lambda: conv_norm(weight=np.float32([1, np.nan, 1, 1])), False),
    "channels": (lambda: model_of(PAIR, [kernel("conv", 5, 3, 3, 3),
                                         *stored("bn", statistics())]), False),
    "two layers, one weight": (
        lambda: file_with([*PAIR, conv("x", "conv", "z")], outputs=("y", "z")), False),
    "one norm, one of two places": (
        lambda: file_with([*PAIR, relu("y", "a"), norm("a", "bn", "z")], outputs=("z",)), False),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_which_norms_of_a_file_are_foldable(tmp_path, name):
    build, foldable = FILES[name]
    assert bool(found(saved(tmp_path / "net.onnx", build()), "BN401")) == foldable


class RandomConvNet(nn.Module):
    """Blocks in which norms are, and are not, behind the layer that makes their input."""

    def __init__(self, seed):
        super().__init__()
        rng = random.Random(seed)
        self.kinds = [rng.choice(list(self.KINDS)) for _ in range(4)]
        self.blocks = nn.ModuleList()
        for _ in self.kinds:
            first = rng.choice((nn.Conv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 1),
                                nn.Conv2d(4, 4, 1, groups=2, bias=False)))  # fmt: skip
            parts = {"a": first, "b": nn.Conv2d(4, 4, 1), "n": nn.BatchNorm2d(4)}
            self.blocks.append(nn.ModuleDict({**parts, "m": nn.BatchNorm2d(4)}))
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 4)
        self.last = nn.BatchNorm1d(4)

    KINDS = {
        "post": lambda p, x: F.relu(p["n"](p["a"](x))),
        "pre": lambda p, x: p["a"](F.relu(p["n"](x))),
        "residual": lambda p, x: x + p["n"](p["a"](x)),
        "identity": lambda p, x: F.relu(p["n"](p["a"](x)) + p["m"](x)),
        "after": lambda p, x: p["n"](F.relu(p["a"](x))),
        "twice": lambda p, x: p["n"](p["a"](x)) + p["n"](p["b"](x)),
        "read": lambda p, x: (y := p["a"](x)) + F.relu(p["n"](y)),
        "shared": lambda p, x: p["n"](p["a"](x)) + p["m"](p["a"](x + 1)),
    }

    def forward(self, x):
        x = self.stem(x)
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            x = self.KINDS[kind](block, x)
        return self.last(self.head(x.mean((2, 3))))


@pytest.mark.parametrize("seed", range(8))
def test_what_a_file_calls_foldable_is_folded(tmp_path, seed):
    net = laws.hostile_(RandomConvNet(seed).eval(), seed)
    edits = {edit.layer for edit in bnify.fold(net, X, verify=False).plan.edits}
    modules = {module.partition("#")[0] for module in found(exported(net, X, tmp_path), "BN401")}
    assert "last" in modules
    assert modules <= edits


@pytest.mark.parametrize("seed", [2, 13, 18, 46])
def test_random_networks_and_their_files_agree(tmp_path, seed):
    """Every spelling of a norm: what the file says of it is what the model says."""
    net, x = random_fold_network(seed)
    path = exported(net, x, tmp_path)
    edits = {e.layer for e in bnify.fold(net, x, verify=False, emit="graph").plan.edits}
    assert {m.partition("#")[0] for m in found(path, "BN401")} <= edits
    assert set(found(path, "BN404")) == set(found(net, "BN404", x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_good_models_in_eval_mode_stay_at_info(name):
    torchvision = pytest.importorskip("torchvision")
    net = getattr(torchvision.models, name)(weights=None).eval()
    for precision in ("int8", "fp16"):
        report = audit(net, torch.randn(2, 3, 64, 64), select=["BN4"], precision=precision)
        assert {f.code for f in report.findings} == {"BN401"}
        assert len(report.findings) == report.norms
        assert report.exit_code("warning") == 0


# -- BN402 -----------------------------------------------------------------------------------------


class RepBlock(nn.Module):
    """Three branches, each with a norm; the identity has no layer of its own (trap 7)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.wide, self.wide_norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.thin, self.thin_norm = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.identity = nn.BatchNorm2d(4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.wide_norm(self.wide(x)) + self.thin_norm(self.thin(x)) + self.identity(x)
        return F.relu(y)


def test_branches_are_unfoldable_until_they_are_merged():
    net = laws.hostile_(RepBlock().eval(), 1)
    (finding,) = found(net, "BN402", X).values()
    assert (finding.module, finding.severity) == ("identity", "info")
    assert "merging" in finding.message
    assert finding.values["merge"] is True
    assert set(found(net, "BN401", X)) == {"wide_norm", "thin_norm"}
    assert not audit(net, X, select=["BN402"], ignore=["BN402"]).findings
    assert "BN402" not in {f.code for f in audit(net, X).findings}, "it runs where it is selected"


def test_a_reason_without_a_remedy_and_no_reason():
    between = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Sigmoid())
    net = nn.Sequential(nn.Conv2d(3, 4, 3), between, nn.BatchNorm2d(4), nn.Sigmoid()).eval()
    (finding,) = found(net, "BN402", X).values()
    assert finding.module == "2"
    assert "merging" not in finding.message
    assert not found(small(), "BN402", X)
    assert not found(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)).eval(), "BN402", X)


# -- BN403 -----------------------------------------------------------------------------------------


def spread(gammas, var=1.0):
    """A foldable pair whose norm scales its channels so."""
    net = nn.Sequential(nn.Conv2d(3, len(gammas), 1), nn.BatchNorm2d(len(gammas))).eval()
    with torch.no_grad():
        net[0].weight.fill_(0.5)
        net[0].bias.zero_()
        net[1].weight.copy_(torch.tensor(gammas))
        net[1].running_var.fill_(var)
    return net


RANGES = {
    "even": ([1.0, 2.0, 4.0], 1.0, "int8", None),
    "spread": ([1.0, 1.0, 100.0], 1.0, "int8", "warning"),
    "spread, but for fp16": ([1.0, 1.0, 100.0], 1.0, "fp16", None),
    "zero channels": ([0.0, 1.0, 2.0], 1.0, "int8", None),
    "all zero": ([0.0, 0.0, 0.0], 1.0, "int8", None),
    "just 4 steps": ([1.0, 1.0, 31.7], 1.0, "int8", None),
    "below 4 steps": ([1.0, 1.0, 31.8], 1.0, "int8", "warning"),
    "overflow": ([500.0, 1.0, 500.0], 0.0, "fp16", "error"),
    "large": ([100.0, 1.0, 100.0], 0.0, "fp16", None),
}


@pytest.mark.parametrize("name", RANGES)
def test_the_range_after_folding(tmp_path, name):
    gammas, var, target, severity = RANGES[name]
    net = spread(gammas, var)
    path = exported(net, X, tmp_path)
    for findings in (found(net, "BN403", X, precision=target),
                     found(path, "BN403", precision=target)):  # fmt: skip
        assert {m: f.severity for m, f in findings.items()} == ({"0": severity} if severity else {})


def test_without_a_target_the_range_is_not_checked():
    report = audit(spread([1.0, 1.0, 100.0]), X, select=["BN403"])
    assert not report.findings
    assert "--target int8" in report.unchecked["BN403"]


@given(st.lists(st.sampled_from([0.0, 1e-3, 0.03, 0.0315, 0.5, 1.0, -2.0]), min_size=1))
def test_both_judges_of_the_range_agree(rows):
    weight = torch.tensor(rows, dtype=torch.float64).reshape(-1, 1)
    assert narrow_share(np.abs(rows)) == share_in_torch(weight)
