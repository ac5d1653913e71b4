"""How good outputs are, and how much two modes of a model agree: running sums over batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bnify.auditing.batches import Batch, has_numbers, labels_for
from bnify.structure import outputs_of


def main_output(value: Any) -> Tensor | None:
    """The output that says what the model says: the logits, or the first floating-point one."""
    found = [(n, t) for n, t in outputs_of(value) if t.is_floating_point() and t.ndim]
    for wanted in ("logits", "out"):
        for name, tensor in found:
            if name.rpartition(".")[2] == wanted:
                return tensor
    return found[0][1] if found else None


def why_no_classes(output: Tensor | None, batch: Batch) -> str:
    """Why an output holds no scores of classes; empty where it may.

    Scores of classes are (N, K) or (N, K, H, W) with K ≥ 2.
    """
    if output is None:
        return "the model has no floating-point output"
    shape = tuple(output.shape)
    if len(shape) not in (2, 4) or shape[1] < 2 or not output.numel():
        return f"the output is of shape {shape}: no scores of classes, (N, K) or (N, K, H, W)"
    if len(shape) == 4 and any(tuple(t.shape) == shape for _, t in batch.call.tensors()):
        return "the output has the shape of the input: an image, no classes"
    if labels_for(batch, shape) is None and has_numbers(batch, shape):
        return "the labels are numbers, no classes: a regression"
    return ""


def predictions(output: Tensor) -> Tensor:
    """The class with the highest score, (N,) or (N, H, W); -1 where scores are not finite.

    A score of -inf excludes a class by right.
    """
    best = output.argmax(1)
    bad = (output.isnan() | output.isposinf()).any(1) | output.isneginf().all(1)
    return best.masked_fill(bad, -1).to(torch.int32).cpu()


def nonfinite(output: Tensor | None) -> int:
    """Number of values that are NaN or +infinite."""
    return 0 if output is None else int((output.isnan() | output.isposinf()).sum())


@dataclass(slots=True)
class Share:
    """A share of things that are so."""

    hits: int = 0
    total: int = 0

    def add(self, hit: Tensor) -> None:
        """Count a mask."""
        self.hits += int(hit.sum())
        self.total += hit.numel()

    @property
    def value(self) -> float | None:
        """The share; None of nothing."""
        return self.hits / self.total if self.total else None


@dataclass(slots=True)
class Distance:
    """``‖got − want‖₂ / ‖want‖₂`` over all batches."""

    gap: float = 0.0
    size: float = 0.0

    def add(self, got: Tensor, want: Tensor) -> None:
        """Add one output; outputs of different shapes are infinitely far apart."""
        if got.shape != want.shape:
            self.gap = float("inf")
            return
        self.gap += float((got.double() - want.double()).square().sum())
        self.size += float(want.double().square().sum())

    @property
    def value(self) -> float | None:
        """The distance; None where it is not finite."""
        ratio = (self.gap / self.size) ** 0.5 if self.size else float("nan")
        return ratio if ratio == ratio and ratio != float("inf") else None


@dataclass(slots=True)
class Tally:
    """What one mode of the model says, against labels and against another mode.

    Attributes:
        accuracy: Against the labels.
        agreement: With the other mode.
    """

    accuracy: Share = field(default_factory=Share)
    agreement: Share = field(default_factory=Share)

    def add(self, said: Tensor, labels: Tensor | None, other: Tensor | None) -> None:
        """Count one batch of predictions; scores that are not finite are wrong."""
        if labels is not None:
            asked = labels >= 0
            self.accuracy.add((said == labels)[asked])
        if other is not None:
            self.agreement.add((said == other) & (said >= 0))
