"""What verification found, as plain data: numbers first, then the verdict.

Free of torch, like :mod:`bnify.plan`: these objects print, compare and go into JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputVerdict:
    """How far one output of the candidate is from the reference, worst over all inputs tried.

    Attributes:
        name: Path of the output in the model's return value, ``"output"`` for a single tensor.
        rel_l2: ``‖candidate − truth‖₂ / ‖truth‖₂``; ``inf`` when shape, dtype or the pattern of
            non-finite values differ.
        max_abs: Largest absolute difference, in the output's own unit.
        max_abs_over_rms: ``max_abs`` divided by the root mean square of the truth.
        budget_ratio: ``rel_l2`` divided by the float32 reference's own error against float64
            (at least the absolute floor); None where no budget could be measured.
        tolerance: Smallest ``t`` for which ``allclose(rtol=t, atol=t)`` holds.
        top1: Share of rows with the same arg max; None for outputs with fewer than 2 columns.
        passed: The verdict on this output.
        detail: Why it failed, or how it was judged when no budget was available.
    """

    name: str
    rel_l2: float
    max_abs: float
    max_abs_over_rms: float
    budget_ratio: float | None
    tolerance: float
    top1: float | None
    passed: bool
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One measured comparison: its error, the threshold it was held to, and the verdict.

    ``passed`` is None where the check could not be decided; ``detail`` then says why.
    """

    name: str
    passed: bool | None
    error: float | None = None
    threshold: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How far train mode moves from the original, relative L2, at one batch size."""

    batch_size: int
    rel_l2: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The verdict on an edit or a file.

    Attributes:
        passed: True only if every check and every output passed.
        algebra: Worst relative error in float64 over all algebra checks; None where algebra does
            not apply (files, rounded weights).
        outputs: One verdict per output, by error budget; empty where only algebra was checked.
        device: Where it ran: ``"cpu"``, ``"cuda:0"``, with the provider for ONNX files.
        first_divergent: Name of the first node over its budget when the check failed.
        checks: Everything that was measured, in order.
        drift: How far train mode moves, per batch size; empty where it does not apply.
        inputs: The inputs that were tried: ``"example"``, ``"normal (seed 1)"``, ...
        notes: What a reader has to know to judge the numbers.
    """

    passed: bool
    algebra: float | None = None
    outputs: tuple[OutputVerdict, ...] = ()
    device: str = "cpu"
    first_divergent: str | None = None
    checks: tuple[Check, ...] = ()
    drift: tuple[Drift, ...] = ()
    inputs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The verification as JSON-ready data."""
        return asdict(self)
