"""Targets of a task: class indices (N,) of int64, or numbers (N, ...) of float32."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from bnify.errors import SpecError

CLASSIFICATION: Final = "classification"
REGRESSION: Final = "regression"
TASKS: Final = ("auto", CLASSIFICATION, REGRESSION)


def task_of(targets: Tensor, task: str) -> str:
    """The task: integers are classes, floats are a regression, unless it is given."""
    if task != "auto":
        return task
    return REGRESSION if targets.is_floating_point() else CLASSIFICATION


def prepared(targets: Tensor, task: str, part: str) -> Tensor:
    """Targets as the task has them.

    Args:
        targets: As the data have them; the first axis runs over samples.
        task: ``"classification"`` or ``"regression"``.
        part: Whose they are, for errors: ``"the test part of digits"``.

    Raises:
        SpecError: They are no class indices, or not finite.
    """
    if targets.is_complex():
        raise SpecError(f"the targets of {part} are complex numbers", hint="split them in two")
    if targets.is_floating_point() and not bool(targets.isfinite().all()):
        raise SpecError(f"the targets of {part} hold NaN or infinity", hint="remove those samples")
    if task == REGRESSION:
        numbers = targets.to(torch.float32)
        if not bool(numbers.isfinite().all()):
            raise SpecError(f"targets of {part} are too large for float32", hint="rescale them")
        return numbers
    return _class_indices(targets, part)


def _class_indices(targets: Tensor, part: str) -> Tensor:
    indices = targets.to(torch.int64)
    if targets.is_floating_point() and not torch.equal(indices.to(targets.dtype), targets):
        raise SpecError(
            f"the targets of {part} are not whole numbers, so they are no classes",
            hint="ask for task=regression",
        )
    if indices.ndim == 2 and indices.shape[1] == 1:
        indices = indices[:, 0]
    if indices.ndim != 1:
        raise SpecError(
            f"the targets of {part} have the shape {tuple(indices.shape[1:])} a sample, "
            "not one class each",
            hint="for one-hot rows pass y.argmax(1)",
        )
    if len(indices) and int(indices.min()) < 0:
        raise SpecError(
            f"the targets of {part} hold the class {int(indices.min())}",
            hint="number the classes from 0",
        )
    return indices
