"""Collapsed rows stand for exactly the layers they name."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnify.report.repeats import collapse, ranges


def _labels(paths: list[str]) -> list[tuple[str, str]]:
    rows = collapse(paths, lambda path: path, lambda _: None)
    return [(row.label, row.count) for row in rows]


def _expanded(label: str) -> set[str]:
    """Every path that a label stands for."""
    slots = [
        [str(n) for part in numbers.split(",") for n in _span(part)]
        if numbers[0].isdigit()
        else [numbers]
        for numbers in re.findall(r"\d+(?:[-,]\d+)*|\D+", label)
    ]
    return {"".join(combination) for combination in itertools.product(*slots)}


def _span(part: str) -> range:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["fc"], [("fc", "")]),
        (
            [f"layer1.{i}.conv{j}" for i in range(3) for j in (1, 2)],
            [("layer1.0-2.conv1-2", "×6")],
        ),
        (["a.0", "b.0", "a.1"], [("a.0-1", "×2"), ("b.0", "")]),
        (["f.0", "f.3", "f.4"], [("f.0,3-4", "×3")]),
        # Not a full product: 1.1 is missing, so no label may claim it.
        (["a.0.0", "a.0.1", "a.1.0"], [("a.0.0-1", "×2"), ("a.1.0", "")]),
        (["m.01", "m.02", "m.1"], [("m.01,1,02", "×3")]),
        (["", ""], [("", "×2")]),
    ],
)
def test_labels(paths, labels):
    assert _labels(paths) == labels


def test_rows_keep_the_order_in_which_they_begin():
    paths = ["b.1", "a.0", "b.0", "c", "a.1"]
    assert [label for label, _ in _labels(paths)] == ["b.0-1", "a.0-1", "c"]


def test_what_differs_in_substance_is_not_merged():
    rows = collapse([("a.0", "x"), ("a.1", "y")], lambda it: it[0], lambda it: it[1])
    assert [row.label for row in rows] == ["a.0", "a.1"]


@given(st.sets(st.tuples(*[st.integers(0, 4)] * 3), min_size=1))
@settings(max_examples=60, deadline=None)
def test_labels_stand_for_exactly_their_paths(numbers):
    paths = [f"s{a}.block.{b}.conv{c}" for a, b, c in sorted(numbers)]
    rows = collapse(paths, lambda path: path, lambda _: None)
    named = [path for row in rows for path in row.items]
    assert sorted(named) == sorted(paths), "each path in exactly one row"
    for row in rows:
        assert _expanded(row.label) == set(row.items)


def test_ranges():
    assert ranges(["3", "1", "2", "2", "7"]) == "1-3,7"
    assert ranges(["9", "10", "11"]) == "9-11"
