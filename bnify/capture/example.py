"""Recordings of the user's example: eval mode, train mode, and the same at other batch sizes."""

from __future__ import annotations

from torch import nn

from bnify.capture.captured import Captured
from bnify.capture.record import record
from bnify.capture.symbolic import make_symbolic
from bnify.errors import CaptureError
from bnify.structure import Call


def record_example(model: nn.Module, call: Call, *, borrow: bool = False) -> Captured:
    """Record eval mode at batch 2 or more: at 1, axes cannot be told apart.

    A single sample gets a second one, drawn at random where the model takes that. ``borrow`` as in
    :func:`record`.

    Raises:
        CaptureError: forward() raised.
    """
    if call.batch != 1:
        return record(model, call, borrow=borrow)
    for grown in (call.grown(2, seed=1), call.resized(2)):
        try:
            return record(model, grown, borrow=borrow)
        except CaptureError:  # perhaps a random sample is no valid one
            continue
    captured = record(model, call, borrow=borrow)
    captured.notes.append("the model runs at batch size 1 only: recorded at 1")
    return captured


def record_train(model: nn.Module, call: Call) -> tuple[Captured | None, list[str]]:
    """Record train mode; where that is not possible None, and why."""
    try:
        return record(model, call, train=True), []
    except CaptureError as error:
        return None, [f"train mode could not be recorded: {error.message}"]


def free_batch(captured: Captured) -> list[str]:
    """Let the graph run at any batch size, in place; where it does not, the reason as a note.

    Two more recordings: two sizes give the line q·B + r, the third checks it.
    """
    size = captured.call.batch
    if size is None:
        return []
    try:
        others = [
            record(captured.model, captured.call.resized(size + n), borrow=True) for n in (1, 3)
        ]
    except CaptureError:
        why: str | None = f"the model runs at batch size {size} only"
    else:
        why = make_symbolic(captured, *others)
    return [] if why is None else [f"result.graph runs at the recorded batch size: {why}"]
