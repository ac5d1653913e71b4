"""How often models are right on the batches that one is calibrated with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from bnify.auditing.batches import labels_for
from bnify.auditing.passes import run_probed
from bnify.auditing.scores import Tally, predictions, why_no_classes
from bnify.borrow import copy_model, seeded
from bnify.calibrating.loaders import rewound
from bnify.calibrating.shard import stream
from bnify.layers import without_synchronisation
from bnify.structure import Call


def accuracies(
    models: Sequence[nn.Module],
    data: Any,
    batches: int | None = None,
    *,
    example: Call | None = None,
) -> tuple[float, ...] | None:
    """Share of right predictions of each model in eval mode; copies of them run.

    One pass over the data: each batch is given to every model, so that all are judged on the same
    values, random augmentation included.

    Args:
        models: Models that take the same inputs, on one device.
        data: Batches of inputs and labels.
        batches: How many at most; None for all.
        example: Inputs of the kind to look for in a batch.

    Returns:
        None where a batch has no labels of classes, integers of shape (N,) beside outputs of shape
        (N, K): then not all can be judged.

    Raises:
        PlanError: A batch cannot be run.
    """
    working = [without_synchronisation(copy_model(model)).eval() for model in models]
    tallies = [Tally() for _ in models]
    with rewound(data), seeded(0):  # as the calibration: a shuffling loader gives the same batches
        for batch in stream(data, batches, models[0], example):
            for model, tally in zip(working, tallies, strict=True):
                got = run_probed(model, None, batch)
                if got is None or why_no_classes(got, batch):
                    return None
                labels = labels_for(batch, tuple(got.shape))
                if labels is None:
                    return None
                tally.add(predictions(got), labels, None)
    found = [tally.accuracy.value for tally in tallies]
    return tuple(value for value in found if value is not None) or None


def accuracy(
    model: nn.Module, data: Any, batches: int | None = None, *, example: Call | None = None
) -> float | None:
    """As :func:`accuracies`, of one model."""
    found = accuracies((model,), data, batches, example=example)
    return None if found is None else found[0]
