"""A fold in numbers: counted on what really runs, judged on what really was written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bnify
from bnify.figures import figures_of
from bnify.onnx_sizes import OnnxSize, onnx_size


def _hostile(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        n = norm.num_features
        norm.running_mean.copy_(torch.randn(n))
        norm.running_var.copy_(torch.rand(n) + 0.5)
        norm.weight.copy_(torch.randn(n))
        norm.weight[0] = -1.5
        norm.bias.copy_(torch.randn(n))
    return norm


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


def test_what_runs_and_is_held_before_and_after():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), _hostile(nn.BatchNorm2d(8))).eval()
    figures = figures_of(bnify.fold(model, torch.randn(4, 3, 6, 6)))
    before, after = figures.before, figures.after
    assert (before.norms, after.norms) == (1, 0)
    assert before.parameters - after.parameters == 8, "two vectors go, a bias comes"
    assert before.flops - after.flops == 2 * 4 * 8 * 4 * 4
    assert figures.samples == 4
    assert figures.notes == ()


def test_only_tensors_that_were_written_are_judged():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), _hostile(nn.BatchNorm2d(8)), nn.ReLU(), nn.Conv2d(8, 2, 1)
    ).eval()
    with torch.no_grad():
        model[0].weight.fill_(0.01)
        model[1].weight.fill_(1)
        model[1].running_var.fill_(1)
        model[1].running_var[2] = 1e-4
        model[3].weight[0] = 1e-6  # narrow, and nobody's doing
    figures = figures_of(bnify.fold(model, torch.randn(2, 3, 4, 4)))
    name, ratio = figures.magnified
    assert name == "0.weight"
    assert ratio == pytest.approx((1e-4 + 1e-5) ** -0.5, rel=1e-4)
    assert {warning.layer for warning in figures.warnings} == {"0"}


def test_channels_of_a_grouped_transposed_convolution_are_its_own():
    """[in, out/groups, k]: along axis 0 no channel is narrow, along its own one in four is."""
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), _hostile(nn.BatchNorm2d(4))).eval()
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[1].weight.fill_(1)
        model[1].weight[1] = 1e-3
        model[1].running_var.fill_(1)
    figures = figures_of(bnify.fold(model, torch.randn(2, 4, 3, 3)))
    (warning,) = figures.warnings
    assert (warning.kind, warning.value) == ("int8", 0.25)


def test_a_weight_that_was_computed_is_compared_as_it_came_out():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    model = nn.Sequential(layer, _hostile(nn.BatchNorm2d(4))).eval()
    with torch.no_grad():
        model[1].weight.fill_(3)
        model[1].running_var.fill_(1)
    result = bnify.fold(model, torch.randn(2, 3, 4, 4))
    name, ratio = figures_of(result).magnified
    assert name == "0.weight"
    assert ratio == pytest.approx(3, rel=1e-3)


def test_nothing_folded_nothing_changed():
    figures = figures_of(bnify.fold(nn.Linear(3, 2).eval(), torch.randn(2, 3)))
    assert figures.before == figures.after
    assert figures.magnified is None
    assert figures.warnings == ()


def test_after_a_fold_in_place_the_original_is_gone():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), _hostile(nn.BatchNorm2d(8))).eval()
    figures = figures_of(bnify.fold(model, torch.randn(2, 3, 6, 6), inplace=True))
    assert figures.before is None
    assert figures.after is None
    assert figures.notes
    data = figures.to_dict()
    assert data["cost"] == {"before": None, "after": None, "samples": None}


def test_a_graph_counts_its_weights():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), _hostile(nn.BatchNorm2d(8))).eval()
    x = torch.randn(4, 3, 6, 6)
    trees, graphs = (figures_of(bnify.fold(model, x, emit=e)).after for e in ("module", "graph"))
    assert trees == graphs


def test_operators_of_branches_and_functions_are_counted_and_constants_are_not(tmp_path):
    from onnx import TensorProto, helper, save

    def graph(name, *nodes, inputs=()):
        value = helper.make_tensor_value_info
        return helper.make_graph(
            nodes, name, [value(i, TensorProto.FLOAT, [2]) for i in inputs],
            [value(nodes[-1].output[0], TensorProto.FLOAT, [2])],
        )  # fmt: skip

    zero = helper.make_tensor("v", TensorProto.BOOL, [1], [1])
    branch = {
        f"{word}_branch": graph(word, helper.make_node("Relu", ["x"], [word]))
        for word in ("then", "else")
    }
    nodes = (
        helper.make_node("Constant", [], ["c"], value=zero),
        helper.make_node("If", ["c"], ["y"], **branch),
        helper.make_node("LayerNormalization", ["y", "x"], ["z"]),
    )
    file = tmp_path / "m.onnx"
    save(helper.make_model(graph("g", *nodes, inputs=("x",))), file)
    assert onnx_size(file) == OnnxSize(nodes=4, norms=1)
