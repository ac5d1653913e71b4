"""Linear layers of any kind, run by torch, and how close two float64 results are.

Errors are judged element by element against the sum of the magnitudes that went into the element
(the law on absolute values), so that a channel of a million hides no fault in its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from bnify.algebra import Affine, Kernel, scaled, shifted

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
seeds = st.integers(0, 2**31)
#: What a scale may be: either sign, zero, of a tiny variance, of a huge one.
HOSTILE = torch.tensor([-1.7, 0.0, 1e6, -3e5, 1e-6, 1.0, 0.4, -0.02], dtype=torch.float64)


def close(got: Tensor, want: Tensor, magnitude: Tensor, rtol: float = 1e-12) -> bool:
    """Element by element within `rtol` of the magnitudes that were summed; NaN is not close."""
    assert got.dtype == want.dtype == torch.float64
    assert got.shape == want.shape == magnitude.shape
    return bool(((got - want).abs() <= rtol * magnitude).all())


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def hostile(channels: int) -> Tensor:
    return HOSTILE[torch.randint(len(HOSTILE), (channels,))] * (0.5 + torch.rand(channels).double())


@dataclass(frozen=True)
class Layer:
    """A linear layer with its weights, run by torch."""

    kind: str
    weight: Tensor
    bias: Tensor | None = None
    groups: int = 1
    stride: int = 1
    dilation: int = 1
    padding: int = 0

    @property
    def kernel(self) -> Kernel:
        return Kernel(self.kind, self.groups)  # type: ignore[arg-type]

    @property
    def outputs(self) -> int:
        return self.kernel.outputs(self.weight.shape)

    @property
    def inputs(self) -> int:
        return self.kernel.inputs(self.weight.shape)

    @property
    def space(self) -> int:
        return self.weight.ndim - 2

    def along(self, values: Tensor) -> Tensor:
        """Values over channels, shaped to meet an input or output of this layer."""
        return values.view(-1, *[1] * self.space)

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "linear":
            return F.linear(x, self.weight, self.bias)
        if self.kind == "matmul":
            return x @ self.weight if self.bias is None else x @ self.weight + self.bias
        run: Any = (CONVS if self.kind == "conv" else TRANSPOSED)[self.space]
        return run(
            x, self.weight, self.bias,
            stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups,
        )  # fmt: skip

    def magnitude(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.abs()
        return replace(self, weight=self.weight.abs(), bias=bias)(x.abs())

    def sample(self) -> Tensor:
        return randn(2, self.inputs, *[6 - self.space // 2 + i for i in range(self.space)])

    def absorb_output(self, affine: Affine) -> Layer:
        bias = torch.zeros(self.outputs).double() if self.bias is None else self.bias
        return replace(
            self,
            weight=scaled(self.weight, self.kernel, out=affine.scale),
            bias=affine.scale * bias + affine.shift,
        )

    def absorb_input(self, affine: Affine) -> Layer:
        bias = torch.zeros(self.outputs).double() if self.bias is None else self.bias
        return replace(
            self,
            weight=scaled(self.weight, self.kernel, inp=affine.scale),
            bias=bias + shifted(self.weight, self.kernel, affine.shift),
        )


@st.composite
def layers(draw: st.DrawFn, kinds: str = "linear matmul conv conv_transpose") -> Layer:
    torch.manual_seed(draw(seeds))
    kind = draw(st.sampled_from(kinds.split()))
    few = st.integers(1, 3)
    if kind in ("linear", "matmul"):
        return _with_bias(draw, Layer(kind, randn(draw(few), draw(few))))
    space, groups = draw(few), draw(st.integers(1, 4))
    taps = [draw(few) for _ in range(space)]
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding = draw(st.integers(0, 1))
    weight = randn(groups * draw(few), draw(few), *taps)
    return _with_bias(draw, Layer(kind, weight, None, groups, stride, dilation, padding))


def _with_bias(draw: st.DrawFn, layer: Layer) -> Layer:
    return replace(layer, bias=randn(layer.outputs) if draw(st.booleans()) else None)


def assume_output(layer: Layer) -> None:
    """Leave out a transposed convolution that crops away all it makes."""
    if layer.kind != "conv_transpose":
        return
    made = [
        (size - 1) * layer.stride + layer.dilation * (taps - 1) + 1
        for size, taps in zip(layer.sample().shape[2:], layer.weight.shape[2:], strict=True)
    ]
    assume(min(made) > 2 * layer.padding)
