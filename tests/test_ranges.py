"""Ranges after a fold: each threshold from both sides, and against real quantization."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bnify.ranges import (
    MAGNIFICATION,
    largest_magnification,
    magnification,
    narrow_share,
    range_warnings,
)


def scaled(weight: Tensor, scales: Tensor) -> Tensor:
    return weight * scales.view(-1, *[1] * (weight.ndim - 1))


def kinds(before: Tensor, after: Tensor, **options) -> list[str]:
    return [w.kind for w in range_warnings({"a.weight": before}, {"a.weight": after}, **options)]


@pytest.fixture
def weight() -> Tensor:
    w = torch.randn(100, 8, 3, 3)
    return w / w.flatten(1).abs().amax(1).view(-1, 1, 1, 1)  # each channel's largest is 1


def test_a_fold_of_even_scales_is_silent(weight: Tensor) -> None:
    signs = torch.where(torch.rand(100) < 0.5, -1.0, 1.0)
    assert kinds(weight, scaled(weight, signs * (0.2 + torch.rand(100)))) == []


@pytest.mark.parametrize(("scale", "fires"), [(4.01 / 127, False), (3.99 / 127, True)])
def test_int8_fires_below_four_steps(weight: Tensor, scale: float, fires: bool) -> None:
    scales = torch.ones(100)
    scales[7] = -scale  # one channel in a hundred is the share that counts
    assert kinds(weight, scaled(weight, scales)) == ["int8"] * fires


def test_int8_needs_a_hundredth_of_the_channels_and_does_not_count_empty_ones(
    weight: Tensor,
) -> None:
    wide = torch.cat([weight, weight[:1].repeat(100, 1, 1, 1)])
    scales = torch.ones(200)
    scales[7] = 0.001
    assert kinds(wide, scaled(wide, scales)) == []  # 0.5 %
    scales[20:] = 0.0
    assert kinds(wide, scaled(wide, scales)) == ["int8"]  # 1 of 20
    assert narrow_share(scaled(wide, scales)) == pytest.approx(1 / 20)
    assert kinds(wide, torch.zeros_like(wide)) == []


def test_a_ruined_channel_is_ruined_by_real_quantization(weight: Tensor) -> None:
    """The rule's claim, measured: relative error of each channel after int8 with one scale."""
    scales = torch.ones(100)
    scales[:10] = 3.0 / 127
    folded = scaled(weight, scales)
    step = float(folded.abs().max()) / 127
    rounded = torch.fake_quantize_per_tensor_affine(folded, step, 0, -128, 127)
    error = (rounded - folded).flatten(1).norm(dim=1) / folded.flatten(1).norm(dim=1)
    assert narrow_share(folded) == pytest.approx(0.10)
    assert float(error[:10].min()) > 0.1
    assert float(error[10:].max()) < 0.02


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_channels_of_a_transposed_convolution_are_blocked_by_groups(groups: int) -> None:
    layer = nn.ConvTranspose2d(8, 12, 3, groups=groups)
    faint = 5  # output channel
    with torch.no_grad():
        layer.weight.fill_(1.0)
        group, index = divmod(faint, 12 // groups)
        layer.weight[group * (8 // groups) : (group + 1) * (8 // groups), index] = 1e-3
        layer.bias.zero_()
        # By definition: the channel that comes out faint.
        outputs = layer(torch.ones(1, 8, 4, 4)).abs().amax((0, 2, 3))
    assert int(outputs.argmin()) == faint
    assert narrow_share(layer.weight, groups) == pytest.approx(1 / 12)
    found = range_warnings(
        {}, {"up.weight": layer.weight}, transposed={"up.weight": groups}, targets=("int8",)
    )
    assert [(w.layer, w.kind, w.threshold) for w in found] == [("up", "int8", 0.01)]


@pytest.mark.parametrize(
    ("largest", "fires"), [(65504.0, False), (65600.0, True), (math.inf, True), (math.nan, True)]
)
def test_float16_overflow(largest: float, fires: bool) -> None:
    weight = torch.ones(1, 4)
    weight[0, 0] = largest
    if math.isfinite(largest):
        assert bool(weight.mul(1.001).half().isinf().any()) or largest == 65504.0
    found = [k for k in kinds(weight, weight) if k.startswith("fp16")]
    assert found == ["fp16-overflow"] * fires
    assert kinds(weight, weight, targets=("int8",)).count("fp16-overflow") == 0


def test_float16_overflow_of_a_bias_that_the_fold_added() -> None:
    found = range_warnings({}, {"net.0.bias": torch.tensor([1.0, -7e4])})
    assert [(w.layer, w.kind, w.value) for w in found] == [("net.0", "fp16-overflow", 7e4)]


def test_float16_underflow_is_a_share(weight: Tensor) -> None:
    scales = torch.ones(100)
    assert kinds(weight, weight.clone().fill_(1.0)) == []
    tiny = weight.clone()
    tiny[0, 0, 0, 0] = 1e-9  # one number in seven thousand
    assert kinds(weight, tiny, targets=("fp16",)) == []
    scales[3] = 1e-9
    assert kinds(weight, scaled(weight, scales), targets=("fp16",)) == ["fp16-underflow"]
    scales[3] = 0.0  # exactly nothing is held by float16
    assert kinds(weight, scaled(weight, scales), targets=("fp16",)) == []


@pytest.mark.parametrize("factor", [-0.5, 3.0, 200.0, 250.0])
def test_magnification(weight: Tensor, factor: float) -> None:
    assert magnification(weight, weight * factor) == pytest.approx(abs(factor))
    fires = abs(factor) > MAGNIFICATION
    assert kinds(weight, weight * factor, targets=()) == ["magnification"] * fires


def test_the_magnification_limit_is_a_channel_whose_variance_is_eps() -> None:
    norm = nn.BatchNorm2d(1)
    scale = float(1 / (torch.tensor(norm.eps, dtype=torch.float64) + norm.eps).sqrt())
    assert pytest.approx(scale) == MAGNIFICATION


def test_the_largest_magnification_is_named() -> None:
    w = torch.randn(4, 4)
    before = {"a.weight": w, "b.weight": w, "z.weight": torch.zeros(4, 4), "a.bias": w[0]}
    after = {
        "a.weight": w * 2,
        "b.weight": w * -5,
        "z.weight": torch.zeros(4, 4),
        "a.bias": w[0] * 100,
        "new.bias": w[0],
    }
    name, ratio = largest_magnification(before, after) or ("", 0.0)
    assert name == "b.weight"
    assert ratio == pytest.approx(5.0)
    assert largest_magnification(before, {"new.weight": w}) is None
    assert largest_magnification({}, {}) is None
    after["z.weight"] = torch.ones(4, 4)
    assert largest_magnification(before, after) == ("z.weight", math.inf)


def test_warnings_are_plain_data_in_the_order_of_the_tensors(weight: Tensor) -> None:
    scales = torch.ones(100)
    scales[:5] = 1e-4
    bad = scaled(weight, scales)
    found = range_warnings({"b.weight": weight}, {"b.weight": bad, "weight": bad, "count": bad > 0})
    assert [w.layer for w in found] == ["b", "weight"]
    data = found[0].to_dict()
    assert data["kind"] == "int8"
    assert data["value"] == pytest.approx(0.05)
    assert "5.0% of its channels (0.0% before)" in data["sentence"]


def test_half_and_integer_tensors_are_judged_as_what_they_are() -> None:
    half = torch.ones(2, 2, dtype=torch.bfloat16)
    assert range_warnings({}, {"a.weight": half * 1e9})[0].kind == "fp16-overflow"
    assert range_warnings({}, {"a.table": torch.full((2, 2), 10**6)}) == ()
