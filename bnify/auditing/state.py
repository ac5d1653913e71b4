"""A norm as its vectors: what a checkpoint, an ONNX file and a live model all have.

numpy and nothing else: a checkpoint is audited without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Vector: TypeAlias = NDArray[np.float64]

EPS = 1e-5
MOMENTUM = 0.1
#: A γ that spreads no more than this may be as it was drawn.
DRAWN = 0.1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NormState:
    """One norm with fixed statistics: batch norm, its look-alikes, tracked instance norm.

    Attributes:
        path: Module path of the norm, name of an ONNX node.
        mean: Running mean, float64, shape (C,).
        var: Running variance, float64, shape (C,).
        weight: γ; None where it has none.
        bias: β; None where it has none.
        batches: ``num_batches_tracked``; None where it keeps none.
        dtype: Of the statistics as stored: ``"float32"``, ``"bfloat16"``.
        eps: ε; assumed where only vectors are known.
        momentum: PyTorch's, the weight of the new batch; None for a cumulative average.
        frozen: A look-alike whose statistics are constants (FrozenBatchNorm2d).
        training: Whether its module is in train mode; None where there is no module.
        part: Which of several models in one file it belongs to; medians are taken within one.
    """

    path: str
    mean: Vector
    var: Vector
    weight: Vector | None = None
    bias: Vector | None = None
    batches: int | None = None
    dtype: str = "float32"
    eps: float = EPS
    momentum: float | None = MOMENTUM
    frozen: bool = False
    training: bool | None = None
    part: str = ""

    @property
    def channels(self) -> int:
        """Number of channels."""
        return int(self.mean.size)

    @property
    def fresh(self) -> bool:
        """Whether its statistics are exactly as initialised: mean 0 and variance 1 throughout."""
        return bool(np.all(self.mean == 0) and np.all(self.var == 1))

    @property
    def moved(self) -> bool:
        """Whether γ or β look trained: β is not 0, or γ is more than drawn around a constant.

        Some networks draw γ at the start, from N(1, 0.02²) as DCGAN does, or set it to 0 in places.
        """
        if self.bias is not None and bool(np.any(self.bias != 0)):
            return True
        with np.errstate(all="ignore"):  # BN101 tells of what is not finite
            return self.weight is not None and float(np.std(self.weight)) > DRAWN

    @property
    def finite(self) -> bool:
        """Whether every value is finite and no variance is negative."""
        vectors = (self.mean, self.var, self.weight, self.bias)
        return all(v is None or bool(np.isfinite(v).all()) for v in vectors) and bool(
            np.all(self.var >= 0)
        )

    @property
    def gamma(self) -> Vector:
        """|γ|, 1 throughout where there is none."""
        return np.ones_like(self.mean) if self.weight is None else np.abs(self.weight)

    @property
    def gain(self) -> Vector:
        """|γ| / sqrt(var + ε) by channel: how much the norm magnifies its input."""
        with np.errstate(all="ignore"):
            result: Vector = self.gamma / np.sqrt(self.var + self.eps)
        return result
