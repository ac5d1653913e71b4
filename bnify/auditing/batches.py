"""Batches of the user's data: what the model takes, and which of the rest are labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnify.borrow import seeded
from bnify.errors import PlanError
from bnify.structure import Call, device_of, match_batch, named_tensors, started

_LABELS: Final = ("labels", "label", "targets", "target", "y", "classes")
#: Labels that count for nothing: torch's own, and the border of segmentation data.
_IGNORED: Final = (-100, 255)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One batch of data.

    Attributes:
        number: 0 for the first.
        call: The model's inputs, on its device.
        rest: The other tensors, those that are called labels first.
    """

    number: int
    call: Call
    rest: tuple[Tensor, ...]

    @property
    def samples(self) -> int:
        """How many samples it has."""
        return self.call.batch or 0


def first_batches(data: Any, limit: int) -> list[Any]:
    """At most ``limit`` batches, read once; the caller's random numbers stay as they are.

    Raises:
        PlanError: The data is not iterable, or holds no batch.
    """
    with seeded(0):  # a loader draws seeds and order from the global random state, as it starts too
        batches = list(islice(started(data), limit))
    if not batches:
        raise PlanError("the data holds no batch", hint="pass a loader that yields batches")
    return batches


def read(batches: Iterable[Any], example: Call, model: nn.Module) -> Iterator[Batch]:
    """The batches as calls of the model.

    Raises:
        PlanError: One does not fit the example, or holds NaN; its number is named.
    """
    device = device_of(model)
    for number, batch in enumerate(batches):
        try:
            call = batch
            if not isinstance(batch, Call):
                call = match_batch(batch, example, model, any_length=True)
        except PlanError as error:
            raise PlanError(f"batch {number}: {error.message}", hint=error.hint) from None
        for name, tensor in call.tensors(model):
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                count = int(tensor.isnan().sum())
                raise PlanError(
                    f"batch {number} of the data holds {count} NaN values in {name}",
                    hint="pass finite data",
                )
        rest = () if isinstance(batch, Call) else tuple(_rest(batch, call))
        yield Batch(number, call.to(device=device), rest)


def _rest(batch: Any, call: Call) -> Iterator[Tensor]:
    """What of a batch is not the input; the same rules as ``match_batch``."""
    if isinstance(batch, Mapping):
        others = [key for key in batch if key not in call.kwargs and key not in _LABELS]
        for key in (*_LABELS, *others):
            if key in batch:
                yield from (tensor for _, tensor in named_tensors(batch[key]))
    elif isinstance(batch, (list, tuple)) and batch:
        nested = isinstance(batch[0], (list, tuple, Mapping)) and not (
            call.args and call.args[0] is batch[0]
        )
        taken = 1 if nested else len(call.args)
        yield from (tensor for _, tensor in named_tensors(list(batch[taken:])))
        if nested:
            yield from _rest(batch[0], call)


def labels_for(batch: Batch, shape: tuple[int, ...]) -> Tensor | None:
    """Class numbers for an output of shape (N, K) or (N, K, H, W); None where there are none.

    Args:
        batch: The batch.
        shape: Shape of the output.

    Returns:
        Integers of shape (N,) or (N, H, W), -1 where a label is to be ignored.
    """
    wanted, classes = (shape[0], *shape[2:]), shape[1]
    for tensor in batch.rest:
        if tensor.is_floating_point() and tuple(tensor.shape) == shape and _probabilities(tensor):
            return tensor.argmax(1).cpu()
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
            continue
        if tuple(tensor.shape) not in (wanted, (shape[0], 1, *shape[2:])):
            continue
        found = tensor.reshape(wanted).long().cpu()
        ignored = torch.zeros_like(found, dtype=torch.bool)
        for value in _IGNORED:
            ignored |= (found == value) if not 0 <= value < classes else False
        if bool(((found < 0) | (found >= classes))[~ignored].any()):
            continue  # numbers of samples, or of something else
        return found.masked_fill(ignored, -1)
    return None


def _probabilities(tensor: Tensor) -> bool:
    """Whether it is one-hot or soft labels: rows of shares."""
    sums = tensor.double().sum(1)
    return bool((tensor >= 0).all()) and bool((sums - 1).abs().max() < 1e-3)


def has_numbers(batch: Batch, shape: tuple[int, ...]) -> bool:
    """Whether what comes with the inputs are numbers for the output to reach: a regression."""
    return any(
        tensor.is_floating_point() and tuple(tensor.shape) == shape and not _probabilities(tensor)
        for tensor in batch.rest
    )
