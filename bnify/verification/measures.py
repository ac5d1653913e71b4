"""Distances between one output and what it should be: tensors in, numbers out, float64 inside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Distance:
    """How far one output is from the truth on one input; see ``OutputVerdict`` for the fields."""

    rel_l2: float
    max_abs: float
    max_abs_over_rms: float
    tolerance: float
    top1: float | None


UNCOMPARABLE = Distance(float("inf"), float("inf"), float("inf"), float("inf"), None)


def mismatch(got: Tensor, want: Tensor) -> str | None:
    """What keeps two outputs from being compared: shape, dtype or non-finite values; else None."""
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if got.dtype != want.dtype:
        return f"dtype {_name(got)}, expected {_name(want)}"
    for kind, test in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        if not got.is_floating_point():
            continue  # integers are always finite
        if not torch.equal(test(got), test(want)):
            return f"{int(test(got).sum())} values are {kind}, expected {int(test(want).sum())}"
    return None


def is_exact(tensor: Tensor) -> bool:
    """Whether outputs of this dtype have to be equal: integers and booleans."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def relative_l2(got: Tensor, want: Tensor, scale: float = 0.0) -> float:
    """``‖got - want‖₂ / ‖want‖₂``.

    Args:
        got: The output.
        want: What it should be.
        scale: Root mean square below which ``want`` counts as zero up to rounding: an output that
            cancels to nothing on one input is measured in the unit it has on others.
    """
    a, b = _wide(got), _wide(want)
    difference = float((a - b).norm())
    if difference == 0.0:
        return 0.0
    size = max(float(b.norm()), scale * b.numel() ** 0.5)
    return difference / size if size else float("inf")


def distance(got: Tensor, want: Tensor, scale: float = 0.0) -> Distance:
    """All distances of two outputs of equal shape and finite values."""
    a, b = _wide(got), _wide(want)
    if not a.numel():
        return Distance(0.0, 0.0, 0.0, 0.0, None)
    gap = (a - b).abs()
    max_abs = float(gap.max())
    size = max(rms(want), scale)
    return Distance(
        rel_l2=relative_l2(got, want, scale),
        max_abs=max_abs,
        max_abs_over_rms=0.0 if max_abs == 0 else max_abs / size if size else float("inf"),
        tolerance=float((gap / (1 + b.abs())).max()),
        top1=top1_agreement(got, want),
    )


def rms(tensor: Tensor) -> float:
    """Root mean square; 0 for an empty tensor."""
    return float(_wide(tensor).norm()) / tensor.numel() ** 0.5 if tensor.numel() else 0.0


def top1_agreement(got: Tensor, want: Tensor) -> float | None:
    """Share of rows with the same arg max over the classes; None where there are none.

    Classes are axis 1 of images (N, C, H, W) and volumes, else the last axis.
    """
    if want.ndim < 2 or not want.is_floating_point():
        return None
    axis = 1 if want.ndim >= 4 else want.ndim - 1
    if want.shape[axis] < 2 or not want.numel():
        return None
    return float((got.argmax(axis) == want.argmax(axis)).double().mean())


def _wide(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.to(torch.float64)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
