"""What a calibration found and did, norm by norm.

torch is not imported: reports know this module, and a report on an error must not wait for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)  # no slots: drift is computed once
class Calibrated:
    """One norm that keeps running statistics, before and after.

    Attributes:
        name: Module path; of a functional norm the name of its scale, or of its running mean.
        kind: Class name of the module; empty for a functional norm.
        count: Values a channel that were seen, on all ranks; samples, for an instance norm.
        mean_before: Running mean as it was, float64, shape (C,).
        var_before: Running variance as it was, likewise.
        mean: Running mean from now on: the pooled one, or the old one where it was not updated.
        var: Running variance likewise, unbiased.
        eps: What the norm adds to its variance.
        updated: Whether the data gave it new statistics.
        error: Largest standard error over the channels that vary, of the mean and of the standard
            deviation, both in units of the standard deviation; None where it was not asked for.
        notes: What a reader should know, in words.
    """

    name: str
    kind: str
    count: int
    mean_before: Tensor
    var_before: Tensor
    mean: Tensor
    var: Tensor
    eps: float
    updated: bool
    error: float | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        did = f"drift {self.drift:.3g}" if self.updated else "as it was"
        return f"Calibrated({self.name}: {self.channels} channels, {self.count} values, {did})"

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.mean.numel()

    @cached_property
    def shift(self) -> float:
        """How far the mean moved: the root mean square of (μ' − μ)/sqrt(σ'² + ε) over channels."""
        moved = (self.mean - self.mean_before) / (self.var + self.eps).sqrt()
        return _root_mean_square(moved)

    @cached_property
    def ratio(self) -> float:
        """What the variance was multiplied by: the geometric mean of (σ'² + ε)/(σ² + ε)."""
        return float(self._log_ratio.mean().exp()) if self.channels else 1.0

    @cached_property
    def drift(self) -> float:
        """Both in one number: the root of ``shift²`` plus the mean square of ln(variance ratio).

        0 where nothing moved; infinite where the old statistics were not finite.
        """
        both = math.hypot(self.shift, _root_mean_square(self._log_ratio))
        return both if math.isfinite(both) else math.inf

    @property
    def _log_ratio(self) -> Tensor:
        return ((self.var + self.eps) / (self.var_before + self.eps)).log()

    def to_dict(self) -> dict[str, Any]:
        """The norm as JSON-ready data; numbers that are not finite are strings in strict JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "updated": self.updated,
            "count": self.count,
            "drift": self.drift,
            "shift": self.shift,
            "ratio": self.ratio,
            "error": self.error,
            "notes": list(self.notes),
            "before": {"mean": self.mean_before.tolist(), "var": self.var_before.tolist()},
            "after": {"mean": self.mean.tolist(), "var": self.var.tolist()},
        }


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Calibration:
    """What :func:`bnify.calibrate` found and did.

    Attributes:
        norms: Every norm that keeps running statistics, in the order of execution; those that the
            data did not reach come last.
        batches: Batches that were run, on all ranks.
        samples: Samples in them.
        ranks: Processes that took part.
        stopped: Whether a rank stopped early because its error was small enough.
        accuracy_before: Share of right predictions on the same batches before; None where nobody
            asked, or there are no labels of classes.
        accuracy_after: The share after.
        notes: What a reader should know, in sentences.
    """

    norms: tuple[Calibrated, ...] = ()
    batches: int = 0
    samples: int = 0
    ranks: int = 1
    stopped: bool = False
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def updated(self) -> tuple[Calibrated, ...]:
        """The norms with new statistics, the one that drifted most first."""
        return tuple(sorted((n for n in self.norms if n.updated), key=lambda n: -n.drift))

    @property
    def left(self) -> tuple[Calibrated, ...]:
        """The norms that keep their old statistics; their notes say why."""
        return tuple(norm for norm in self.norms if not norm.updated)

    def __repr__(self) -> str:
        return (
            f"Calibration({len(self.updated)} of {len(self.norms)} norms, {self.batches} batches, "
            f"{self.samples} samples)"
        )

    def to_dict(self) -> dict[str, Any]:
        """The calibration as JSON-ready data."""
        return {
            "schema": 1,
            "verb": "calibrate",
            "batches": self.batches,
            "samples": self.samples,
            "ranks": self.ranks,
            "stopped": self.stopped,
            "accuracy": {"before": self.accuracy_before, "after": self.accuracy_after},
            "notes": list(self.notes),
            "norms": [norm.to_dict() for norm in self.norms],
        }


def _root_mean_square(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt()) if values.numel() else 0.0
