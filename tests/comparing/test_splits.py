"""Splits are disjoint, complete and repeatable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnify.comparing.splits import by_class, hold_out, split_three
from bnify.errors import SpecError


@given(samples=st.integers(3, 300), seed=st.integers(0, 2**60))
def test_three_parts_are_disjoint_complete_and_repeatable(samples: int, seed: int):
    chosen = split_three(samples, seed)
    assert sorted(torch.cat(chosen).tolist()) == list(range(samples))
    assert len(chosen[1]) == len(chosen[2]) == -(-samples // 5)
    assert len(chosen[0]) >= 1
    for one, other in zip(chosen, split_three(samples, seed), strict=True):
        assert torch.equal(one, other)


@given(samples=st.integers(2, 300), share=st.floats(0, 1), seed=st.integers(0, 2**60))
def test_what_is_held_out_is_not_left(samples: int, share: float, seed: int):
    count = 1 + int(share * (samples - 2))
    rest, held = hold_out(samples, count, seed)
    assert sorted([*rest.tolist(), *held.tolist()]) == list(range(samples))
    assert len(held) == count


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=60), seed=st.integers(0, 99))
def test_a_split_by_class_has_every_class_in_every_part(labels: list[int], seed: int):
    rows = torch.tensor([label for label in labels for _ in range(3)])
    chosen = by_class(rows, lambda count: split_three(count, seed))
    assert sorted(torch.cat(chosen).tolist()) == list(range(len(rows)))
    for indices in chosen:
        assert set(rows[indices].tolist()) == set(labels)


@pytest.mark.parametrize("samples", [0, 1, 2])
def test_too_few_samples_are_not_split(samples: int):
    with pytest.raises(SpecError, match="cannot be split"):
        split_three(samples, 0)


@pytest.mark.parametrize(("samples", "count"), [(1, 1), (0, 0), (5, 5), (5, 0)])
def test_nothing_is_not_held_out_and_not_left(samples: int, count: int):
    with pytest.raises(SpecError, match="cannot be split further"):
        hold_out(samples, count, 0)
