"""The algebra of folding, each law against torch itself in float64, on hostile numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from absorbing import CONVS, HOSTILE, Layer, assume_output, close, hostile, layers, randn, seeds
from bnify.algebra import (
    Affine,
    Kernel,
    chained_linear,
    embedding_rows,
    grouped_to,
    identity_kernel,
    magnification,
    norm_affine,
    padded_kernel,
    scaled,
)

law = settings(max_examples=100, deadline=None)


# -- affines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-3])
def test_a_norm_with_running_statistics_is_its_affine(affine: bool, eps: float) -> None:
    channels = 2 * len(HOSTILE)
    weight, bias = (HOSTILE.repeat(2), randn(channels)) if affine else (None, None)
    mean, var = randn(channels), torch.rand(channels).double()
    var[::3] = 1e-12
    x = randn(5, channels, 4)
    y = norm_affine(weight, bias, mean, var, eps)
    shift, scale = y.shift[:, None], y.scale[:, None]
    want = F.batch_norm(x, mean, var, weight, bias, eps=eps)
    assert close(x * scale + shift, want, (x * scale).abs() + shift.abs() + 1e-300, 1e-14)
    other = norm_affine(weight, bias, mean, var, eps + 1e-6)
    wrong = x * other.scale[:, None] + other.shift[:, None]
    assert not close(wrong, want, (x * scale).abs() + shift.abs() + 1e-300)


@pytest.mark.parametrize("weighted", [True, False])
def test_gamma_and_beta_may_each_be_absent(weighted: bool) -> None:
    mean, var, vector = randn(6), torch.rand(6).double(), randn(6)
    weight, bias = (vector, None) if weighted else (None, vector)
    y, x = norm_affine(weight, bias, mean, var, 1e-5), randn(3, 6)
    want = F.batch_norm(x, mean, var, weight, bias, eps=1e-5)
    assert close(x * y.scale + y.shift, want, (x * y.scale).abs() + y.shift.abs() + 1.0)


def test_statistics_of_any_shape_become_vectors() -> None:
    weight, bias, mean, var = randn(5), randn(5), randn(5), torch.rand(5).double()
    flat = norm_affine(weight, bias, mean, var, 1e-5)
    shaped = norm_affine(*[t.view(1, 5, 1, 1) for t in (weight, bias, mean, var)], 1e-5)
    assert torch.equal(flat.scale, shaped.scale)
    assert torch.equal(flat.shift, shaped.shift)


@law
@given(channels=st.integers(1, 6), seed=seeds)
def test_affines_compose_in_order(channels: int, seed: int) -> None:
    torch.manual_seed(seed)
    inner = Affine(hostile(channels), randn(channels))
    outer = Affine(hostile(channels), randn(channels))
    x, both = randn(4, channels), inner.then(outer)
    want = outer.scale * (inner.scale * x + inner.shift) + outer.shift
    magnitude = outer.scale.abs() * ((inner.scale * x).abs() + inner.shift.abs())
    assert close(both.scale * x + both.shift, want, magnitude + outer.shift.abs())
    for same in (inner.then(Affine.identity(channels)), Affine.identity(channels).then(inner)):
        assert torch.equal(same.scale, inner.scale)
        assert torch.equal(same.shift, inner.shift)


def test_order_of_composition_matters() -> None:
    double = Affine(torch.tensor([2.0]), torch.tensor([0.0]))
    plus = Affine(torch.tensor([1.0]), torch.tensor([1.0]))
    assert double.then(plus).shift.item() == 1.0
    assert plus.then(double).shift.item() == 2.0


def test_picked_channels_may_repeat_and_be_left_out() -> None:
    affine, index, x = Affine(randn(4), randn(4)), torch.tensor([3, 0, 0, 1, 3]), randn(2, 4)
    picked = affine.pick(index)
    want = (affine.scale * x + affine.shift)[:, index]
    assert torch.equal(picked.scale * x[:, index] + picked.shift, want)
    assert affine.pick(index[:0]).scale.shape == (0,)


def test_an_affine_keeps_its_values_when_their_parameters_are_written() -> None:
    gamma = torch.nn.Parameter(randn(3))
    affine = Affine(gamma, torch.zeros(3))
    before = gamma.detach().clone()
    with torch.no_grad():
        gamma.fill_(7.0)
    assert torch.equal(affine.scale, before)
    assert not affine.scale.requires_grad
    assert affine.shift.dtype == torch.float64


# -- layers take an affine -------------------------------------------------------------------------


@law
@given(layer=layers())
def test_an_affine_after_a_layer_is_absorbed(layer: Layer) -> None:
    assume_output(layer)
    affine, x = Affine(hostile(layer.outputs), randn(layer.outputs)), layer.sample()
    s, t = layer.along(affine.scale), layer.along(affine.shift)
    want = layer(x) * s + t
    assert close(layer.absorb_output(affine)(x), want, layer.magnitude(x) * s.abs() + t.abs())


@law
@given(layer=layers("linear matmul conv"))
def test_an_affine_before_a_layer_without_padding_is_absorbed(layer: Layer) -> None:
    layer = replace(layer, padding=0)
    affine, x = Affine(hostile(layer.inputs), randn(layer.inputs)), layer.sample()
    s, t = layer.along(affine.scale), layer.along(affine.shift)
    magnitude = layer.magnitude((x * s).abs() + t.abs())
    assert close(layer.absorb_input(affine)(x), layer(x * s + t), magnitude + 1e-300)


@law
@given(layer=layers("conv"), mode=st.sampled_from(["reflect", "replicate", "circular"]))
def test_an_affine_before_padding_with_its_own_values_is_absorbed(layer: Layer, mode: str) -> None:
    layer = replace(layer, padding=0)
    affine, x = Affine(hostile(layer.inputs), randn(layer.inputs)), layer.sample()
    s, t = layer.along(affine.scale), layer.along(affine.shift)

    def pad(value: Tensor) -> Tensor:
        return F.pad(value, [1, 1] * layer.space, mode=mode)

    magnitude = layer.magnitude(pad((x * s).abs() + t.abs()))
    got = layer.absorb_input(affine)(pad(x))
    assert close(got, layer(pad(x * s + t)), magnitude + 1e-300)


@law
@given(layer=layers())
def test_a_scale_before_a_layer_is_absorbed_whatever_the_padding(layer: Layer) -> None:
    assume_output(layer)
    scale, x = hostile(layer.inputs), layer.sample()
    s = layer.along(scale)
    got = replace(layer, weight=scaled(layer.weight, layer.kernel, inp=scale))(x)
    assert close(got, layer(x * s), layer.magnitude(x * s) + 1e-300)


@law
@given(layer=layers("conv_transpose"))
def test_a_shift_before_a_transposed_layer_of_one_tap_is_absorbed(layer: Layer) -> None:
    weight = layer.weight.flatten(2)[..., :1].unflatten(2, [1] * layer.space)
    layer = replace(layer, weight=weight, stride=1, padding=0)
    affine, x = Affine(hostile(layer.inputs), randn(layer.inputs)), layer.sample()
    s, t = layer.along(affine.scale), layer.along(affine.shift)
    magnitude = layer.magnitude((x * s).abs() + t.abs())
    assert close(layer.absorb_input(affine)(x), layer(x * s + t), magnitude + 1e-300)


@law
@given(layer=layers())
def test_both_sides_scale_at_once(layer: Layer) -> None:
    out, inp = hostile(layer.outputs), hostile(layer.inputs)
    once = scaled(layer.weight, layer.kernel, out, inp)
    twice = scaled(scaled(layer.weight, layer.kernel, inp=inp), layer.kernel, out=out)
    assert close(once, twice, twice.abs(), 1e-15)


def test_channels_of_grouped_layers_are_counted() -> None:
    assert (Kernel("conv", 3).outputs((6, 2, 5)), Kernel("conv", 3).inputs((6, 2, 5))) == (6, 6)
    transposed = Kernel("conv_transpose", 3)
    assert (transposed.outputs((6, 4, 5)), transposed.inputs((6, 4, 5))) == (12, 6)
    assert (Kernel("linear").outputs((7, 2)), Kernel("linear").inputs((7, 2))) == (7, 2)
    assert (Kernel("matmul").outputs((7, 2)), Kernel("matmul").inputs((7, 2))) == (2, 7)
    assert Kernel("embedding").outputs((7, 2)) == 2
    assert Kernel("vector").outputs((5, 1, 1)) == 5


@law
@given(num=st.integers(1, 6), dim=st.integers(1, 5), seed=seeds)
def test_embedding_rows_come_out_mapped(num: int, dim: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight, affine = randn(num, dim), Affine(hostile(dim), randn(dim))
    tokens = torch.randint(num, (2, 3))
    want = F.embedding(tokens, weight) * affine.scale + affine.shift
    got = F.embedding(tokens, embedding_rows(weight, affine))
    assert close(got, want, want.abs(), 1e-15)
    only = F.embedding(tokens, scaled(weight, Kernel("embedding"), affine.scale)) + affine.shift
    assert close(only, want, want.abs(), 1e-15)


@pytest.mark.parametrize("shape", [(5,), (5, 1, 1), (1, 5, 1, 1)])
def test_vectors_scale_in_their_own_shape(shape: tuple[int, ...]) -> None:
    gamma, factor = randn(*shape), hostile(5)
    assert torch.equal(scaled(gamma, Kernel("vector"), factor), gamma * factor.view_as(gamma))


# -- kernels written in another way ----------------------------------------------------------------


@law
@given(data=st.data(), space=st.integers(1, 3), scaling=st.booleans(), seed=seeds)
def test_the_identity_kernel_gives_its_input_scaled(
    data: st.DataObject, space: int, scaling: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    groups, each = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    taps = [data.draw(st.sampled_from([1, 3, 5])) for _ in range(space)]
    dilation = data.draw(st.integers(1, 2))
    scale = hostile(groups * each) if scaling else None
    weight = identity_kernel((groups * each, each, *taps), Kernel("conv", groups), scale)
    x = randn(2, groups * each, *[6 + i for i in range(space)])
    padding = [dilation * (k - 1) // 2 for k in taps]
    run: Any = CONVS[space]
    got = run(x, weight, dilation=dilation, padding=padding, groups=groups)
    assert torch.equal(got, x if scale is None else x * scale.view(-1, *[1] * space))


def test_the_identity_of_a_linear_layer_is_a_diagonal() -> None:
    scale = hostile(4)
    assert torch.equal(identity_kernel((4, 4), Kernel("linear"), scale), torch.diag(scale))


@law
@given(data=st.data(), space=st.integers(1, 3), dilation=st.integers(1, 2), seed=seeds)
def test_a_padded_kernel_computes_the_same(
    data: st.DataObject, space: int, dilation: int, seed: int
) -> None:
    torch.manual_seed(seed)
    small = [data.draw(st.integers(1, 3)) for _ in range(space)]
    more = [data.draw(st.integers(0, 1)) for _ in range(space)]
    layer = Layer("conv", randn(4, 2, *small), groups=2, dilation=dilation)
    x, run = randn(2, 4, *[6 + i for i in range(space)]), CONVS[space]
    large = padded_kernel(layer.weight, [k + 2 * m for k, m in zip(small, more, strict=True)])
    options: dict[str, Any] = {"dilation": dilation, "groups": 2, "stride": 2}
    padding = [dilation * m for m in more]
    got, want = run(x, large, padding=padding, **options), run(x, layer.weight, **options)
    assert close(got, want, run(x.abs(), layer.weight.abs(), **options))


@law
@given(data=st.data(), space=st.integers(1, 3), seed=seeds)
def test_fewer_groups_compute_the_same(data: st.DataObject, space: int, seed: int) -> None:
    torch.manual_seed(seed)
    groups_to, ratio = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    outs, ins = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    groups = groups_to * ratio
    weight = randn(groups * outs, ins, *[2] * space)
    x, run = randn(2, groups * ins, *[4] * space), CONVS[space]
    dense = grouped_to(weight, groups, groups_to)
    want = run(x, weight, groups=groups)
    assert close(run(x, dense, groups=groups_to), want, run(x.abs(), weight.abs(), groups=groups))
    assert int((dense != 0).sum()) == weight.numel()


@law
@given(
    data=st.data(), space=st.integers(0, 3), biases=st.tuples(st.booleans(), st.booleans()),
    seed=seeds,
)  # fmt: skip
def test_two_layers_in_a_row_are_one(
    data: st.DataObject, space: int, biases: tuple[bool, bool], seed: int
) -> None:
    torch.manual_seed(seed)
    few = st.integers(1, 4)
    ins, inner, outs = data.draw(few), data.draw(few), data.draw(few)
    kind = "conv" if space else "linear"
    taps = [data.draw(st.integers(1, 3)) for _ in range(space)]
    first = Layer(kind, randn(inner, ins, *[1] * space), randn(inner) if biases[0] else None)
    second = Layer(
        kind, randn(outs, inner, *taps), randn(outs) if biases[1] else None,
        stride=data.draw(st.integers(1, 2)), dilation=data.draw(st.integers(1, 2)),
        # A first layer without bias leaves padded zeros what they are.
        padding=0 if biases[0] else data.draw(st.integers(0, 1)),
    )  # fmt: skip
    x = first.sample()
    weight, bias = chained_linear(first.weight, first.bias, second.weight, second.bias)
    assert (bias is None) == (not any(biases))
    got = replace(second, weight=weight, bias=bias)(x)
    assert close(got, second(first(x)), second.magnitude(first.magnitude(x)))


def test_magnification_is_a_ratio_of_the_largest_magnitudes() -> None:
    before = torch.tensor([[0.5, -2.0]])
    assert magnification(before, torch.tensor([3.0, -5.0, 1.0])) == 2.5
    assert magnification(before.half(), before.bfloat16()) == 1.0
    assert magnification(torch.zeros(3), torch.ones(3)) == 1.0
    assert magnification(torch.empty(0), torch.empty(0)) == 1.0
    assert magnification(before, 0.0 * before) == 0.0
    assert magnification(before, torch.tensor([math.inf])) == math.inf
    assert math.isnan(magnification(before, torch.tensor([math.nan, 1.0])))


# -- faults that these laws must see ---------------------------------------------------------------


def transposed() -> tuple[Layer, Affine, Tensor, Tensor, Tensor]:
    """A grouped transposed convolution, an affine behind it, an input, the truth, its magnitude."""
    layer = Layer("conv_transpose", randn(4, 2, 3), randn(4), groups=2, stride=2)
    affine, x = Affine(torch.tensor([1.0, -2.0, 0.5, 3.0]), randn(4)), layer.sample()
    s, t = layer.along(affine.scale), layer.along(affine.shift)
    return layer, affine, x, layer(x) * s + t, layer.magnitude(x) * s.abs() + t.abs()


def test_a_transposed_fold_that_ignores_groups_is_seen() -> None:
    layer, affine, x, want, magnitude = transposed()
    right = layer.absorb_output(affine)
    assert close(right(x), want, magnitude)
    # What is left of the scale where the groups are forgotten: that of the first group, twice.
    tiled = layer.weight * affine.scale[:2].view(1, 2, 1)
    assert not close(replace(right, weight=tiled)(x), want, magnitude, 1e-3)
    # And where the layout is taken for that of an ordinary convolution.
    rows = layer.weight * affine.scale.view(4, 1, 1)
    assert not close(replace(right, weight=rows)(x), want, magnitude, 1e-3)


def test_a_fold_in_single_precision_is_seen() -> None:
    layer, affine, x, want, magnitude = transposed()
    right = layer.absorb_output(affine)
    single = scaled(layer.weight, layer.kernel, affine.scale).float().double()
    assert not close(replace(right, weight=single)(x), want, magnitude, 1e-10)


def test_a_forgotten_shift_of_the_old_bias_is_seen() -> None:
    layer, affine, x, want, magnitude = transposed()
    right = layer.absorb_output(affine)
    assert layer.bias is not None
    assert not close(replace(right, bias=layer.bias + affine.shift)(x), want, magnitude, 1e-3)


@pytest.mark.parametrize("fault", ["padded", "transposed-taps", "transposed-stride"])
def test_shifts_where_not_every_tap_sees_them_are_wrong(fault: str) -> None:
    layer = {
        "padded": Layer("conv", randn(4, 2, 3), randn(4), groups=2, padding=1),
        "transposed-taps": Layer("conv_transpose", randn(4, 2, 3), randn(4), groups=2),
        "transposed-stride": Layer("conv_transpose", randn(4, 2, 1), randn(4), 2, stride=2),
    }[fault]
    affine, x = Affine(randn(4), randn(4)), layer.sample()
    s, t = layer.along(affine.scale), layer.along(affine.shift)
    magnitude = layer.magnitude((x * s).abs() + t.abs())
    assert not close(layer.absorb_input(affine)(x), layer(x * s + t), magnitude, 1e-2)


def test_interleaved_groups_are_not_block_diagonal() -> None:
    weight, x = randn(4, 1, 3), randn(2, 4, 6)
    want, magnitude = F.conv1d(x, weight, groups=4), F.conv1d(x.abs(), weight.abs(), groups=4)
    assert close(F.conv1d(x, grouped_to(weight, 4, 2), groups=2), want, magnitude)
    interleaved = grouped_to(weight, 4, 2)[[0, 2, 1, 3]]
    assert not close(F.conv1d(x, interleaved, groups=2), want, magnitude, 1e-3)


def test_a_biased_layer_before_a_padded_one_is_not_one_layer() -> None:
    first = Layer("conv", randn(3, 2, 1), randn(3))
    second = Layer("conv", randn(4, 3, 3), randn(4), padding=1)
    weight, bias = chained_linear(first.weight, first.bias, second.weight, second.bias)
    x, one = first.sample(), replace(second, weight=weight, bias=bias)
    want, magnitude = second(first(x)), second.magnitude(first.magnitude(x))
    inside = (..., slice(1, -1))
    assert close(one(x)[inside], want[inside], magnitude[inside])
    assert not close(one(x), want, magnitude, 1e-2)
