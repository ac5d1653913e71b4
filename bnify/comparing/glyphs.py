"""Procedural images of the ten digits: a bitmap font, bent, shifted, faded and noisy.

They need no download and no package but NumPy, and are hard enough that networks differ on them.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

SIDE: Final = 28
SAMPLES: Final = 3_000
CLASSES: Final = 10

#: Five columns, seven rows a digit.
_FONT: Final = (
    (".###.", "#...#", "#...#", "#...#", "#...#", "#...#", ".###."),
    ("..#..", ".##..", "#.#..", "..#..", "..#..", "..#..", "#####"),
    (".###.", "#...#", "....#", "..##.", ".#...", "#....", "#####"),
    ("####.", "....#", "....#", ".###.", "....#", "....#", "####."),
    ("#..#.", "#..#.", "#..#.", "#####", "...#.", "...#.", "...#."),
    ("#####", "#....", "#....", "####.", "....#", "....#", "####."),
    (".###.", "#....", "#....", "####.", "#...#", "#...#", ".###."),
    ("#####", "....#", "....#", "...#.", "..#..", "..#..", "..#.."),
    (".###.", "#...#", "#...#", ".###.", "#...#", "#...#", ".###."),
    (".###.", "#...#", "#...#", ".####", "....#", "....#", ".###."),
)
_CELL: Final = 2.6  # pixels a font cell, before scaling
_ROTATION: Final = np.deg2rad(18)
_SCALE: Final = (0.75, 1.2)
_SHEAR: Final = 0.3
_SHIFT: Final = 3.0  # pixels
_INK: Final = (0.35, 1.0)  # brightness of a stroke
_PAPER: Final = (0.0, 0.25)
_EDGE: Final = (1.5, 4.0)  # how steeply a stroke ends
_WEIGHT: Final = (0.3, 0.55)  # the level that counts as ink: low is bold
_NOISE: Final = 0.12  # standard deviation, of a range of 1


def draw_glyphs(
    samples: int = SAMPLES, seed: int = 0
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images and labels in random order, as many of each class as of any other (to within one).

    Each pixel is looked up in the font by the inverse of the sample's affine map
    ``rotation · shear · scale + shift``, with bilinear interpolation.

    Args:
        samples: How many.
        seed: Other images for another seed, the same bits for the same.

    Returns:
        Grey images (N, 28, 28), strokes bright on dark, and labels 0 to 9 (N,).
    """
    random = np.random.default_rng(seed % 2**32)

    def draw(low: float, high: float) -> npt.NDArray[np.float64]:
        return low + (high - low) * random.random(samples)

    labels = random.permutation(np.arange(samples, dtype=np.int64) % CLASSES)
    columns, rows = _font_positions(
        angle=draw(-_ROTATION, _ROTATION),
        shear=draw(-_SHEAR, _SHEAR),
        scale=(draw(*_SCALE), draw(*_SCALE)),
        shift=(draw(-_SHIFT, _SHIFT), draw(-_SHIFT, _SHIFT)),
    )
    level = _bilinear(_font(), labels, columns, rows)
    edge, weight, paper, ink = (
        draw(*span).astype(np.float32)[:, None, None] for span in (_EDGE, _WEIGHT, _PAPER, _INK)
    )
    stroke = np.clip((level - weight) * edge + 0.5, 0, 1)
    noise = random.standard_normal((samples, SIDE, SIDE), dtype=np.float32) * np.float32(_NOISE)
    grey = np.clip(paper + (1 - paper) * ink * stroke + noise, 0, 1)
    return np.rint(grey * 255).astype(np.uint8), labels


def _font() -> npt.NDArray[np.float32]:
    """The font (10, 11, 9) as 0 and 1, with two empty cells around each glyph."""
    cells = [[[cell == "#" for cell in row] for row in glyph] for glyph in _FONT]
    return np.pad(np.array(cells, dtype=np.float32), ((0, 0), (2, 2), (2, 2)))


def _font_positions(
    *,
    angle: npt.NDArray[np.float64],
    shear: npt.NDArray[np.float64],
    scale: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
    shift: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Column and row of the padded font under each pixel, each (N, 28, 28).

    The inverse of ``R(angle) · [[1, shear], [0, 1]] · diag(scale)`` is
    ``diag(1/scale) · [[1, -shear], [0, 1]] · R(-angle)``.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    inverse = (
        ((cos + shear * sin) / scale[0], (sin - shear * cos) / scale[0]),
        (-sin / scale[1], cos / scale[1]),
    )
    centered = np.arange(SIDE) - (SIDE - 1) / 2
    across = (centered - shift[0][:, None])[:, None, :]
    down = (centered - shift[1][:, None])[:, :, None]
    _, height, width = _font().shape
    middle = ((width - 1) / 2, (height - 1) / 2)
    column, row = (
        (a[:, None, None] * across + b[:, None, None] * down) / _CELL + m
        for (a, b), m in zip(inverse, middle, strict=True)
    )
    return column.astype(np.float32), row.astype(np.float32)


def _bilinear(
    font: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    column: npt.NDArray[np.float32],
    row: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """The glyph of each sample at fractional positions; what lies outside is empty."""
    _, height, width = font.shape
    column, row = np.clip(column, 0, width - 1.001), np.clip(row, 0, height - 1.001)
    left, top = column.astype(np.int32), row.astype(np.int32)
    right_share, lower_share = column - left, row - top
    flat = font.ravel()
    first = labels.astype(np.int32)[:, None, None] * (height * width) + top * width + left
    upper = flat[first] * (1 - right_share) + flat[first + 1] * right_share
    first += width
    lower = flat[first] * (1 - right_share) + flat[first + 1] * right_share
    level: npt.NDArray[np.float32] = upper * (1 - lower_share) + lower * lower_share
    return level
