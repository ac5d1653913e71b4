"""Train-mode drift: how far the result's outputs in train mode are from the original's.

Equal outputs in eval mode say nothing about training: batch norm uses the batch's own statistics
there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from bnify.borrow import copy_model, fused_attention, in_mode, seeded
from bnify.insertion import training_batch
from bnify.layers import without_synchronisation
from bnify.plan import Plan
from bnify.structure import Call, outputs_of
from bnify.verdict import Drift
from bnify.verification.measures import mismatch, relative_l2

#: The drift is measured at the training batch size while inputs of that size hold fewer values.
_MOST_VALUES = 4_000_000
#: Batch sizes at which it is measured besides, where trained weights are at stake.
_SIZES = (2, 8, 32)


class FirstSamples:
    """The first samples of the data, as many as the drift is measured on.

    Args:
        plan: The plan.
        example: The example inputs, as the user passed them.
    """

    def __init__(self, plan: Plan, example: Call) -> None:
        self._size = _size(plan, example)
        self._wanted = max(self._size, *_SIZES) if _trained(plan) else self._size
        self._batches: list[Call] = []
        self.full = False

    def add(self, batch: Call) -> None:
        """Take a batch while there are too few samples."""
        if not self.full:
            self._batches.append(batch)
            samples = [one.batch for one in self._batches]
            values = sum(t.numel() for one in self._batches for _, t in one.tensors())
            enough = None in samples or sum(filter(None, samples)) >= self._wanted
            self.full = enough or values > _MOST_VALUES

    def joined(self) -> Call | None:
        """The samples as one batch, or the largest batch where their shapes differ."""
        if not self._batches:
            return None
        largest = max(self._batches, key=lambda one: one.batch or 0)
        return _joined(self._batches) or largest

    def notes(self) -> Iterator[str]:
        """What a reader has to know where they are fewer than a training batch."""
        joined = self.joined()
        found = self._size if joined is None or joined.batch is None else joined.batch
        if found < min(2, self._size):
            yield "the data has one sample: train mode is compared on the example inputs"
        elif found < self._size:
            yield (
                f"train mode is compared at up to {found} samples, not {self._size}: the data has "
                "no more that fit together"
            )


def _joined(batches: Sequence[Call]) -> Call | None:
    """Several batches as one; None where their shapes do not allow it."""
    columns = [[tensor for _, tensor in one.tensors()] for one in batches]
    if len({len(column) for column in columns}) > 1:
        return None
    joined = []
    for tensors in zip(*columns, strict=True):
        sizes = zip(tensors, (one.batch for one in batches), strict=True)
        if all(tensor.ndim and tensor.shape[0] == size for tensor, size in sizes):
            if len({(tensor.shape[1:], tensor.dtype) for tensor in tensors}) > 1:
                return None
            joined.append(torch.cat(tensors))
        elif all(torch.equal(tensor, tensors[0]) for tensor in tensors):
            joined.append(tensors[0])
        else:
            return None
    tensors_of = iter(joined)
    return batches[0].map(lambda _: next(tensors_of))


def drift_calls(plan: Plan, call: Call, example: Call, batch: Call | None) -> list[Call]:
    """Inputs for the train-mode drift, by size: the user's own, as far as they go.

    At the training batch size; where norms start from statistics, so that trained weights are at
    stake, at smaller sizes too. One sample says nothing: then it is measured on the example.

    Args:
        plan: The plan.
        call: The inputs of the recording.
        example: The example inputs, as the user passed them.
        batch: Samples of the data; None without data.
    """
    size = _size(plan, example)
    if batch is not None and batch.batch is not None and batch.batch > 1:
        source, largest = batch, batch.resized(min(size, batch.batch))
    else:
        source = largest = _at(call, size)
    if not _trained(plan):
        return [largest]
    smaller = [n for n in _SIZES if n <= (source.batch or 0) and n != largest.batch]
    calls = [largest, *(source.resized(n) for n in smaller)]
    return sorted(calls, key=lambda one: one.batch or 0)


def _size(plan: Plan, example: Call) -> int:
    return training_batch(plan.options.get("batch_size"), example.batch)


def _trained(plan: Plan) -> bool:
    return any(edit.init != "reset" for edit in plan.edits)


def _at(call: Call, size: int) -> Call:
    """The example at another batch size, grown by fresh samples unless that is a lot of values."""
    values = sum(t.numel() for _, t in call.tensors()) / max(call.batch or 1, 1)
    if call.batch is None or size == call.batch or size * values > _MOST_VALUES:
        return call
    return call.resized(size) if size < call.batch else call.grown(size, seed=3)


def train_drift(original: nn.Module, result: nn.Module, call: Call) -> Drift | None:
    """Relative L2 distance of the train-mode outputs, both on copies and with the same dropout.

    None where the outputs cannot be compared.
    """
    with fused_attention(enabled=False):
        try:
            want, got = _train_outputs(original, call), _train_outputs(result, call)
        except Exception:  # forward() is user code
            return None  # the user's model may be made for one batch size, or for eval mode only
    pairs = [
        (a, b)
        for a, b in zip(got, want, strict=False)
        if b.is_floating_point() and mismatch(a, b) is None and bool(b.isfinite().all())
    ]
    if not pairs or len(got) != len(want):
        return None
    worst = max(relative_l2(a, b) for a, b in pairs)
    return Drift(batch_size=call.batch or 1, rel_l2=worst)


def _train_outputs(model: nn.Module, call: Call) -> list[Tensor]:
    working = without_synchronisation(copy_model(model))
    with torch.no_grad(), seeded(0), in_mode(working, train=True):
        return [tensor for _, tensor in outputs_of(call.clone()(working))]
