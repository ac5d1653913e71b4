"""Glyphs: balanced, the same bits every time, and learnable but not trivial."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnify.borrow import seeded
from bnify.comparing.glyphs import CLASSES, SIDE, _bilinear, _font, _font_positions, draw_glyphs


def linear_accuracy(images: np.ndarray, labels: np.ndarray, train: int) -> float:
    """Of a softmax regression on the samples after the first ``train``."""
    x = torch.tensor(images, dtype=torch.float32).flatten(1) / 255
    x, y = (x - x[:train].mean()) / x[:train].std(), torch.tensor(labels)
    model = nn.Linear(SIDE * SIDE, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    for _ in range(10):
        for batch in torch.randperm(train).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return float((model(x[train:]).argmax(1) == y[train:]).float().mean())


def test_a_linear_classifier_learns_them_but_not_perfectly():
    images, labels = draw_glyphs()
    accuracy = linear_accuracy(images, labels, train=2000)
    assert 0.6 < accuracy < 0.95, accuracy
    shuffled = np.random.default_rng(0).permutation(labels)  # the labels carry it, not a leak
    assert linear_accuracy(images, shuffled, train=2000) < 0.2


@settings(max_examples=20, deadline=None)
@given(samples=st.integers(0, 60), seed=st.integers(-(2**40), 2**40))
def test_the_same_seed_gives_the_same_bits_and_balanced_classes(samples: int, seed: int):
    images, labels = draw_glyphs(samples, seed)
    again = draw_glyphs(samples, seed)
    assert images.tobytes() == again[0].tobytes()
    assert labels.tobytes() == again[1].tobytes()
    assert (images.shape, images.dtype) == ((samples, SIDE, SIDE), np.uint8)
    assert (labels.shape, labels.dtype) == ((samples,), np.int64)
    counts = np.bincount(labels, minlength=CLASSES)
    assert counts.max() - counts.min() <= 1
    assert len(counts) == CLASSES


def test_another_seed_draws_other_images_in_another_order():
    one, other = draw_glyphs(50, 0), draw_glyphs(50, 1)
    assert (one[0] != other[0]).any()
    assert (one[1] != other[1]).any()


def test_random_numbers_of_the_caller_are_neither_used_nor_moved():
    drawn = set()
    for seed in (0, 1):
        with seeded(seed):
            drawn.add(draw_glyphs(20)[0].tobytes())
            after = torch.rand(()).item(), random.random(), np.random.random()  # noqa: NPY002
        with seeded(seed):
            assert after == (torch.rand(()).item(), random.random(), np.random.random())  # noqa: NPY002
    assert len(drawn) == 1


def test_three_thousand_take_less_than_a_second():
    began = time.process_time()
    draw_glyphs()
    assert time.process_time() - began < 1.0


def test_the_inverse_map_undoes_rotation_shear_and_scale():
    angle, shear, across, down = 0.3, -0.2, 1.1, 0.8
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = rotation @ np.array([[1, shear], [0, 1]]) @ np.diag([across, down])
    columns, rows = _font_positions(
        angle=np.array([angle]),
        shear=np.array([shear]),
        scale=(np.array([across]), np.array([down])),
        shift=(np.array([1.5]), np.array([-2.0])),
    )
    _, height, width = _font().shape
    cells = np.stack([columns[0] - (width - 1) / 2, rows[0] - (height - 1) / 2])
    pixels = np.einsum("ij,jyx->iyx", forward, cells * 2.6)
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    np.testing.assert_allclose(pixels, np.stack([x - 1.5, y + 2.0]), atol=1e-4)


@pytest.mark.parametrize("label", range(CLASSES))
def test_the_font_is_read_exactly_at_its_cells_and_is_empty_outside(label: int):
    font = _font()
    _, height, width = font.shape
    row, column = np.mgrid[-5 : height + 5, -5 : width + 5].astype(np.float32)
    level = _bilinear(font, np.array([label]), column[None], row[None])[0]
    np.testing.assert_allclose(level[5:-5, 5:-5], font[label], atol=2e-3)
    level[5:-5, 5:-5] = 0
    assert not level.any()


def test_the_ten_glyphs_differ_in_several_cells():
    flat = _font().reshape(CLASSES, -1)
    differing = (flat[:, None] != flat[None]).sum(-1)
    assert (differing + 99 * np.eye(CLASSES)).min() >= 2
