"""Pooled statistics: count, mean and sum of squared deviations per channel, in float64.

Chunks are merged exactly (Chan, Golub & LeVeque, 1979): the result does not depend on the order
or the sizes of the batches, as an average of per-batch variances would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnify.borrow import evaluating, fused_attention, seeded
from bnify.errors import PlanError
from bnify.structure import Call

#: Values that are pooled at a time on a CPU: 2 MiB as float64.
_CACHED = 1 << 18
#: Relative rounding of a mean over many values in float64.
_FLOAT64 = 64 * torch.finfo(torch.float64).eps


@dataclass(slots=True)
class Pooled:
    """Statistics of one channel axis over everything seen so far.

    Attributes:
        count: Number of values per channel.
        mean: Mean per channel, float64, shape (C,).
        m2: Sum of squared deviations from the mean per channel, float64, shape (C,).
        rounding: Relative rounding of the values, by the coarsest dtype that they came in.
    """

    count: int
    mean: Tensor
    m2: Tensor
    rounding: float = _FLOAT64

    @classmethod
    def empty(cls, channels: int) -> Pooled:
        """Nothing seen yet."""
        zeros = torch.zeros(channels, dtype=torch.float64)
        return cls(0, zeros, zeros.clone())

    def add(self, values: Tensor, axis: int) -> None:
        """Merge the values of one activation; ``axis`` is its channel axis."""
        if not values.numel():
            return
        if values.ndim == 1:  # a sample without a batch
            values, axis = values[None], 1
        others = [d for d in range(values.ndim) if d != axis % values.ndim]
        # A part at a time, so that its float64 copy stays in the cache; elsewhere the launch of a
        # kernel costs more than that.
        along = max(others, key=lambda d: values.shape[d])
        if values.numel() // values.shape[others[0]] <= _CACHED:
            along = others[0]
        slab = values.numel() // values.shape[along]
        size = max(1, _CACHED // slab) if values.device.type == "cpu" else values.numel()
        for part in torch.split(values.detach(), size, along):
            wide = part.to(torch.float64, copy=True)
            mean = wide.mean(others, keepdim=True)
            m2 = wide.sub_(mean).square_().sum(others)
            both = torch.stack([mean.flatten(), m2]).cpu()  # one transfer
            self.merge(Pooled(part.numel() // both.shape[1], both[0], both[1], _rounding(values)))

    def merge(self, other: Pooled) -> None:
        """Merge the statistics of a disjoint set of values."""
        self.rounding = max(self.rounding, other.rounding)
        if not self.count:  # most batches are pooled in one piece
            self.count, self.mean, self.m2 = other.count, other.mean, other.m2
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / total)
        self.count = total

    @property
    def var(self) -> Tensor:
        """Unbiased variance per channel, as batch norm's running variance; 0 for one value."""
        return self.m2 / max(self.count - 1, 1)

    @property
    def still(self) -> Tensor:
        """Mask of the channels that do not vary beyond rounding, shape (C,)."""
        return self.var <= (self.rounding * self.mean).square()


@dataclass(slots=True)
class PerInstance:
    """Statistics of an instance norm: averages over samples, as its running statistics are.

    Attributes:
        count: Number of samples.
        total_mean: Sum of the means of the samples, float64, shape (C,).
        total_var: Sum of their unbiased variances, float64, shape (C,).
        rounding: Relative rounding of the values, by the coarsest dtype that they came in.
    """

    count: int
    total_mean: Tensor
    total_var: Tensor
    rounding: float = _FLOAT64

    @classmethod
    def empty(cls, channels: int) -> PerInstance:
        """Nothing seen yet."""
        zeros = torch.zeros(channels, dtype=torch.float64)
        return cls(0, zeros, zeros.clone())

    def add(self, values: Tensor, axis: int) -> None:
        """Add the values of one activation of shape (N, ..., C, ...).

        Samples of one value a channel have no variance and are left out.
        """
        rows = values.detach().movedim(axis, 1).flatten(2).double()
        if rows.shape[2] < 2 or not len(rows):
            return
        mean, deviations = rows.mean(2), (rows - rows.mean(2, keepdim=True)).square().sum(2)
        var = deviations.sum(0) / (rows.shape[2] - 1)
        self.merge(PerInstance(len(rows), mean.sum(0).cpu(), var.cpu(), _rounding(values)))

    def merge(self, other: PerInstance) -> None:
        """Merge the statistics of other samples."""
        self.rounding = max(self.rounding, other.rounding)
        self.total_mean = self.total_mean + other.total_mean
        self.total_var = self.total_var + other.total_var
        self.count += other.count

    @property
    def mean(self) -> Tensor:
        """Average of the means."""
        return self.total_mean / max(self.count, 1)

    @property
    def var(self) -> Tensor:
        """Average of the variances."""
        return self.total_var / max(self.count, 1)

    @property
    def still(self) -> Tensor:
        """Mask of the channels that do not vary beyond rounding, shape (C,)."""
        return self.var <= (self.rounding * self.mean).square()


def _rounding(values: Tensor) -> float:
    if not values.is_floating_point():
        return _FLOAT64
    own = torch.finfo(values.dtype)
    # Sums are taken in float32 and float64 themselves; those of half precision are rounded once.
    return max(own.eps * (4 if own.bits > 16 else 1), _FLOAT64)


@dataclass(frozen=True, slots=True)
class Point:
    """A module whose output is measured.

    Attributes:
        path: Module path.
        axis: Channel axis of its output.
        channels: Length of that axis.
        calls: Number of calls in one forward pass, each measured on its own.
    """

    path: str
    axis: int
    channels: int
    calls: int = 1


def _failure(number: int, error: Exception) -> PlanError:
    lines = str(error).strip().splitlines() or ["no message"]
    return PlanError(
        f"the model raised {type(error).__name__} on batch {number} of the data: {lines[0]}",
        hint="let the data yield batches of the same kind as the example inputs",
    )


def pool(
    model: nn.Module,
    batches: Iterable[Call],
    points: Sequence[Point],
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[str, tuple[Pooled, ...]]:
    """Run the model in eval mode over batches and pool the output of each point.

    Modes, hooks and random numbers are given back, after an exception too.

    Returns:
        For each point's path the statistics of its calls.

    Raises:
        PlanError: There was no batch, the model raised on one, or an activation is not finite.
    """
    pooled = {p.path: tuple(Pooled.empty(p.channels) for _ in range(p.calls)) for p in points}
    counts: dict[str, int] = {}

    def measure(point: Point) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            call = counts.get(point.path, 0)
            counts[point.path] = call + 1
            pooled[point.path][call % point.calls].add(output, point.axis)

        return hook

    # First in line, so that what the user's hooks make of the output comes after the norm.
    handles = [
        model.get_submodule(p.path).register_forward_hook(measure(p), prepend=True) for p in points
    ]
    seen = 0
    try:
        with torch.no_grad(), seeded(0), evaluating(model), fused_attention(enabled=False):
            for batch in batches:
                counts.clear()
                try:
                    batch.clone()(model)  # the model may write to its inputs
                except Exception as error:  # forward() is user code
                    raise _failure(seen, error) from error
                seen += 1
                if progress is not None:
                    progress(seen)
    finally:
        for handle in handles:
            handle.remove()
    if points and not seen:
        raise PlanError("the data holds no batch", hint="pass a loader that yields batches")
    for path, statistics in pooled.items():
        for one in statistics:
            if not bool(one.m2.isfinite().all()):
                raise PlanError(
                    f"the output of {path or 'the model'} is not finite on this data",
                    hint="look for NaN or infinity in weights and data, or use init='reset'",
                )
    return pooled
