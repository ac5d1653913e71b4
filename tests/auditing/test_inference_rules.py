"""BN404 and BN405: each fires on its fault, in models and in files, and is silent on its traps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import nn

from onnxfiles import PAIR, X, conv, exported, file_with, found, norm, saved

# -- BN404 -----------------------------------------------------------------------------------------


class Uses(nn.Module):
    """A conv net with one statement in the middle."""

    def __init__(self, statement):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.bn = nn.BatchNorm2d(4, track_running_stats=False)
        self.statement = statement

    def forward(self, x):
        return F.relu(self.second(F.relu(self.statement(self, self.first(x)))))


def by_hand(_, x):
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(var + 1e-5)


def standardised(net, x):
    """Weight standardisation by a batch norm of the weight (trap 3)."""
    w = net.second.weight
    w = F.batch_norm(w.reshape(1, 4, -1), None, None, training=True).reshape_as(w)
    return F.conv2d(x, w)


def per_sample(_, x):
    b, c, h, w = x.shape
    return F.batch_norm(x.reshape(1, b * c, h, w), None, None, training=True).reshape(b, c, h, w)


def layer_by_hand(_, x):
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean((1, 2, 3), keepdim=True) + 1e-5)


BATCH = {
    "untracked": (lambda net, x: net.bn(x), True, True),
    "functional": (lambda _, x: F.batch_norm(x, None, None, training=True), True, True),
    "by hand": (by_hand, False, True),  # a model shows operators, no norm; a file is judged by them
    "weight standardised": (standardised, False, False),
    "per sample": (per_sample, False, False),
    "layer norm by hand": (layer_by_hand, False, False),
    "instance": (lambda _, x: F.instance_norm(x), False, False),
    "group": (lambda _, x: F.group_norm(x, 2), False, False),
}


@pytest.mark.parametrize("name", BATCH)
def test_batch_statistics_at_inference(tmp_path, name):
    statement, in_model, in_file = BATCH[name]
    net = Uses(statement).eval()
    live = found(net, "BN404", X)
    filed = found(exported(net, X, tmp_path), "BN404")
    assert (bool(live), bool(filed)) == (in_model, in_file)
    for finding in (*live.values(), *filed.values()):
        assert (finding.severity, finding.safety) == ("warning", "advice")


# -- BN405 -----------------------------------------------------------------------------------------


def dropout(training, opset=20):
    nodes = [conv("x", "conv", "h"), helper.make_node("Dropout", ["h", "p", "on"], ["y"])]
    tensors = [numpy_helper.from_array(np.float32(0.25), "p"),
               numpy_helper.from_array(np.array(training), "on")]  # fmt: skip
    return file_with(nodes, *tensors, opset=opset)


TRAINING = {
    "inference": (lambda: file_with(PAIR), 0, 0),
    "training mode": (lambda: file_with([PAIR[0], norm("h", "bn", "y", training_mode=1)]), 1, 1),
    "three results": (lambda: file_with(
        [PAIR[0], norm("h", "bn", "y", "m", "v", training_mode=1)]), 1, 1),
    "five results": (lambda: file_with(
        [PAIR[0], norm("h", "bn", "y", "m", "v", "sm", "sv")], opset=9), 1, 0),
    "results without a name": (lambda: file_with([PAIR[0], norm("h", "bn", "y", "", "")]), 0, 0),
    "live dropout": (lambda: dropout(training=True), 1, 0),
    "dropout": (lambda: dropout(training=False), 0, 0),
    "is_test": (lambda: file_with([PAIR[0], norm("h", "bn", "y", is_test=1)], opset=6), 0, 0),
    "no is_test": (lambda: file_with(PAIR, opset=6), 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINING)
def test_files_exported_in_training(tmp_path, name):
    build, errors, warnings = TRAINING[name]
    path = saved(tmp_path / "net.onnx", build())
    findings = found(path, "BN405")
    assert len(findings) == errors
    assert {f.severity for f in findings.values()} <= {"error"}
    assert len(found(path, "BN404")) == warnings


@pytest.mark.filterwarnings("ignore")  # of the legacy exporter
def test_exporters_in_and_out_of_train_mode(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3),
                        nn.BatchNorm2d(4, track_running_stats=False))  # fmt: skip
    modes = torch.onnx.TrainingMode
    for mode, modules in ((modes.TRAINING, {"1", "2"}), (modes.EVAL, set())):
        path = tmp_path / "net.onnx"
        torch.onnx.export(net, (X,), path, dynamo=False, do_constant_folding=False,
                          training=mode)  # fmt: skip
        assert set(found(path, "BN405")) == modules
        assert "3" in found(path, "BN404")
