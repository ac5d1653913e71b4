"""How far batches are apart, and so how sure pooled statistics are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnify.pooled import PerInstance, Pooled


@dataclass(slots=True)
class Spread:
    """The means and variances of single batches, and how much they vary.

    Values of one image resemble each other, so their number says little; batches drawn at random
    do not. With B batches of n_b values, N in all, the variance of the pooled mean is estimated by
    Σ n_b (m_b − m)² / ((B − 1) N), and likewise that of the pooled variance: weighted estimates of
    a between-batch variance, as in one-way analysis of variance.

    Attributes:
        calls: Number of batches (of calls of the norm).
        means: Their means, each weighing as many values as it rests on.
        variances: Their variances likewise.
    """

    calls: int
    means: Pooled
    variances: Pooled

    @classmethod
    def empty(cls, channels: int) -> Spread:
        """Nothing seen yet."""
        return cls(0, Pooled.empty(channels), Pooled.empty(channels))

    def add(self, batch: Pooled | PerInstance) -> None:
        """Add one batch; a single value says nothing of a variance and is left out."""
        if batch.count < 2:
            return
        nothing = torch.zeros_like(batch.mean)
        self.merge(
            Spread(
                1,
                Pooled(batch.count, batch.mean, nothing),
                Pooled(batch.count, batch.var, nothing),
            )
        )

    def merge(self, other: Spread) -> None:
        """Merge other batches."""
        self.calls += other.calls
        self.means.merge(other.means)
        self.variances.merge(other.variances)

    def error(self, pooled: Pooled | PerInstance) -> float:
        """Standard error of the mean and of the standard deviation, whichever is larger.

        Both are in units of the standard deviation; the largest of all channels that vary counts.
        Infinite for fewer than two batches.

        Args:
            pooled: The statistics of all batches.
        """
        if self.calls < 2:
            return float("inf")
        varying = ~pooled.still
        var = pooled.var[varying]
        mean_error = (self._variance(self.means)[varying] / var).sqrt()
        # The derivative of sqrt(v) is 1 / (2 sqrt(v)).
        deviation_error = 0.5 * self._variance(self.variances)[varying].sqrt() / var
        worst = torch.maximum(mean_error, deviation_error)
        return float(worst.max()) if worst.numel() else 0.0

    def _variance(self, of_batches: Pooled) -> Tensor:
        return of_batches.m2 / ((self.calls - 1) * max(of_batches.count, 1))
