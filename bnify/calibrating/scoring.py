"""How often a model is right on the batches that it is calibrated with."""

from __future__ import annotations

from typing import Any

from torch import nn

from bnify.auditing.batches import labels_for
from bnify.auditing.passes import run_probed
from bnify.auditing.scores import Tally, predictions, why_no_classes
from bnify.borrow import copy_model, seeded
from bnify.calibrating.shard import stream
from bnify.layers import without_synchronisation
from bnify.structure import Call


def accuracy(
    model: nn.Module, data: Any, batches: int | None = None, *, example: Call | None = None
) -> float | None:
    """Share of right predictions in eval mode; a copy of the model runs.

    Args:
        model: The model.
        data: Batches of inputs and labels that can be read again and again.
        batches: How many at most; None for all.
        example: Inputs of the kind to look for in a batch.

    Returns:
        None where a batch has no labels of classes, integers of shape (N,) beside outputs of shape
        (N, K): then not all can be judged.

    Raises:
        PlanError: A batch cannot be run.
    """
    working = without_synchronisation(copy_model(model)).eval()
    tally = Tally()
    with seeded(0):  # as the calibration: a shuffling loader gives the same batches
        for batch in stream(data, batches, model, example):
            got = run_probed(working, None, batch)
            if got is None or why_no_classes(got, batch):
                return None
            labels = labels_for(batch, tuple(got.shape))
            if labels is None:
                return None
            tally.add(predictions(got), labels, None)
    return tally.accuracy.value
