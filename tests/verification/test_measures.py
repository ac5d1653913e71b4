from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnify.verification.measures import distance, mismatch, relative_l2, top1_agreement

finite = st.floats(-1e3, 1e3, allow_nan=False, width=32)
vectors = st.lists(finite, min_size=1, max_size=8).map(torch.tensor)


@given(vectors)
def test_equal_outputs_are_at_distance_zero(x: torch.Tensor) -> None:
    far = distance(x, x.clone())
    assert (far.rel_l2, far.max_abs, far.max_abs_over_rms, far.tolerance) == (0, 0, 0, 0)


@given(vectors, st.floats(1e-4, 1.0))
def test_the_tolerance_is_the_smallest_that_allclose_accepts(x: torch.Tensor, step: float) -> None:
    want = x.double()
    got = want + step * torch.linspace(-1, 1, len(x), dtype=torch.float64) - step / 3
    t = distance(got, want).tolerance
    assert torch.allclose(got, want, rtol=t * 1.001, atol=t * 1.001)
    assert not torch.allclose(got, want, rtol=t * 0.999, atol=t * 0.999)


@given(vectors, st.sampled_from([1e-6, 1.0, 1e6]))
def test_relative_error_has_no_unit(x: torch.Tensor, unit: float) -> None:
    want = x.double() + 2000.0
    got = want * 1.001
    assert relative_l2(got * unit, want * unit) == pytest.approx(1e-3, rel=1e-6)


def test_a_truth_of_zero_is_measured_in_the_unit_it_has_elsewhere() -> None:
    zero, dust = torch.zeros(4), torch.full((4,), 1e-9)
    assert relative_l2(dust, zero) == math.inf
    assert relative_l2(dust, zero, scale=1e-6) == pytest.approx(1e-3)
    assert relative_l2(zero, zero) == 0.0


@pytest.mark.parametrize(
    ("got", "says"),
    [
        (torch.zeros(2, 4), "shape (2, 4), expected (2, 3)"),
        (torch.zeros(2, 3).double(), "dtype float64, expected float32"),
        (torch.tensor([[0, math.nan, 0], [0, 0, 0]]), "1 values are NaN, expected 0"),
        (torch.tensor([[0, math.inf, 0], [0, 0, 0]]), "1 values are inf, expected 0"),
        (torch.tensor([[0, -math.inf, 0], [0, 0, 0]]), "1 values are -inf, expected 0"),
    ],
)
def test_what_cannot_be_compared_is_said(got: torch.Tensor, says: str) -> None:
    assert mismatch(got, torch.zeros(2, 3)) == says


def test_nan_matches_only_in_the_same_places() -> None:
    want = torch.tensor([math.nan, 1.0, math.inf])
    assert mismatch(want.clone(), want) is None
    assert mismatch(want.flip(0), want) is not None


def test_top1_counts_rows_over_the_class_axis() -> None:
    want = torch.eye(4)
    got = want.clone()
    got[0] = want[1]
    assert top1_agreement(got, want) == 0.75
    images = torch.randn(2, 5, 3, 3)
    assert top1_agreement(images + 1, images) == 1.0
    assert top1_agreement(torch.zeros(4), torch.zeros(4)) is None
    assert top1_agreement(torch.zeros(4, 1), torch.zeros(4, 1)) is None


def test_complex_outputs_are_measured_in_both_parts() -> None:
    want = torch.tensor([1 + 1j, 2 - 1j])
    assert distance(want * 1.01, want).rel_l2 == pytest.approx(0.01, rel=1e-4)
