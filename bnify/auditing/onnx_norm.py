"""One norm of an ONNX file, as rules see it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bnify.auditing.onnx_graph import Op, Value
from bnify.auditing.state import NormState


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnnxNorm:
    """One norm of a file.

    Attributes:
        path: Its name, no other norm has it.
        base: The module it comes from; calls of one module share it.
        kind: ``"batch"``, ``"frozen"`` or ``"written"``.
        op: The operator; of a norm that is written out, the last one.
        value: What is normalized.
        result: The normalized value.
        training: Whether the operator is in training mode.
        results: How many results it declares; an inference norm has 1.
        axes: Axes of the means that a hand-written norm takes; None for all others.
        computed: Whether its statistics are computed from the values at hand.
        per_sample: Whether batch and channels are one axis: instance norm spelled as batch norm.
        state: Its vectors; None where they are computed or not known.
    """

    path: str
    base: str
    kind: str
    op: Op
    value: Value
    result: Value
    training: bool = False
    results: int = 1
    axes: tuple[int, ...] | None = None
    computed: bool = False
    per_sample: bool = False
    state: NormState | None = None


def short(number: float) -> float:
    """A float32 of a file as it was written: 1e-05, not 9.999999747378752e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(number)))
