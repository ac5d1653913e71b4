"""The algebra of folding: channel affines, and what they do to the weights of linear layers.

A norm with running statistics is ``y_c = s_c · x_c + t_c`` along one channel axis. A linear layer
absorbs it from behind or from the front (``g`` groups, ``o`` outputs, ``i`` inputs, ``k`` taps)::

    s ⊙ (W x + b) + t   =  W' x + b'    W'[o,i,k] = s[o] · W[o,i,k]    b' = s ⊙ b + t
    W (s ⊙ x + t) + b   =  W' x + b'    W'[o,i,k] = W[o,i,k] · s[i]    b' = b + Σ_ik W[o,i,k] t[i]

The second ``b'`` holds where every tap sees ``t``, that is: where nothing is padded with zeros.

All functions are pure. They take any floating dtype on any device, compute in float64 without
gradients, and return new float64 tensors: the caller rounds once, when it writes. They check
shapes (`ValueError`: a mistake of the caller, not of the user) and nothing else. Whether a fold is
*allowed* is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Final, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Kind: TypeAlias = Literal["linear", "conv", "conv_transpose", "matmul", "embedding", "vector"]

#: Layouts with the output channels on axis 0; the others have them on axis 1, or have one axis.
_OUTPUTS_FIRST: Final = frozenset({"linear", "conv"})
_CONVS: Final = frozenset({"conv", "conv_transpose"})
_WITHOUT_INPUTS: Final = frozenset({"embedding", "vector"})


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """A map of channels, ``y_c = scale_c · x_c + shift_c``.

    Both vectors are copied into float64, so that an affine keeps its values when the parameters
    that it was read from are written.

    Attributes:
        scale: Float64, shape ``(C,)``.
        shift: Float64, shape ``(C,)``.
    """

    scale: Tensor
    shift: Tensor

    def __post_init__(self) -> None:
        if self.scale.ndim != 1 or self.scale.shape != self.shift.shape:
            shapes = f"{tuple(self.scale.shape)} and {tuple(self.shift.shape)}"
            raise ValueError(f"scale and shift are two vectors of one length, got {shapes}")
        for name in ("scale", "shift"):
            value = getattr(self, name).detach().to(torch.float64, copy=True)
            object.__setattr__(self, name, value)

    def then(self, outer: Affine) -> Affine:
        """``outer(self(x))``: scale ``s₂·s₁``, shift ``s₂·t₁ + t₂``, on the device of `self`."""
        _check_length(outer.scale, self.scale.numel(), "the outer affine")
        scale, shift = outer.scale.to(self.scale.device), outer.shift.to(self.scale.device)
        return Affine(scale * self.scale, scale * self.shift + shift)

    @classmethod
    def identity(cls, channels: int, device: torch.device | str | None = None) -> Affine:
        """``y = x`` for this many channels."""
        ones = torch.ones(channels, dtype=torch.float64, device=device)
        return cls(ones, torch.zeros_like(ones))

    def pick(self, index: Tensor) -> Affine:
        """The affine whose channel ``j`` is channel ``index[j]`` of this one.

        Args:
            index: Int64, shape ``(C',)``; channels may be left out and repeated.
        """
        index = index.to(self.scale.device)
        return Affine(self.scale.index_select(0, index), self.shift.index_select(0, index))


def norm_affine(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Affine:
    """Normalization with fixed statistics: ``s = γ / √(var + eps)``, ``t = β − s·mean``.

    Args:
        weight: γ, ``C`` elements; absent means 1.
        bias: β, ``C`` elements; absent means 0.
        mean: Running mean, ``C`` elements.
        var: Running (biased or not: as stored) variance, ``C`` elements.
        eps: What is added to the variance.
    """
    centre, spread = _vector(mean, mean), _vector(var, mean)
    channels = centre.numel()
    for name, value in (("var", spread), ("weight", weight), ("bias", bias)):
        if value is not None:
            _check_length(value, channels, name)
    gain = torch.ones_like(spread) if weight is None else _vector(weight, mean)
    scale = gain / (spread + eps).sqrt()
    shift = -scale * centre
    return Affine(scale, shift if bias is None else shift + _vector(bias, mean))


@dataclass(frozen=True, slots=True)
class Kernel:
    """How a weight is laid out.

    ==============  ======================  =============================================
    kind            shape                   computes
    ==============  ======================  =============================================
    linear          ``(out, in)``           ``x @ W.T``
    conv            ``(out, in/g, *k)``     convolution, groups ``g``
    conv_transpose  ``(in, out/g, *k)``     transposed convolution, groups ``g``
    matmul          ``(in, out)``           ``x @ W``
    embedding       ``(num, dim)``          rows ``W[i]``: outputs ``dim``, no inputs
    vector          ``C`` elements          γ, β or a bias: outputs ``C``, no inputs
    ==============  ======================  =============================================

    Attributes:
        kind: One of the above.
        groups: Of a convolution, else 1.
    """

    kind: Kind
    groups: int = 1

    def __post_init__(self) -> None:
        if self.groups < 1 or (self.groups > 1 and self.kind not in _CONVS):
            raise ValueError(f"a weight of kind {self.kind} in {self.groups} groups")

    def outputs(self, weight_shape: Sequence[int]) -> int:
        """Number of output channels of a weight of this shape."""
        blocks, axis = self._blocks(weight_shape), self._output_axis
        return blocks[0] * blocks[axis]

    def inputs(self, weight_shape: Sequence[int]) -> int:
        """Number of input channels of a weight of this shape.

        Raises:
            ValueError: An embedding or a vector, which read no channels.
        """
        if self.kind in _WITHOUT_INPUTS:
            raise ValueError(f"a weight of kind {self.kind} has no input channels")
        blocks, axis = self._blocks(weight_shape), 3 - self._output_axis
        return blocks[0] * blocks[axis]

    @property
    def _output_axis(self) -> int:
        """Axis of the output channels in `_blocks`; the inputs are on the other of 1 and 2."""
        return 1 if self.kind in _OUTPUTS_FIRST else 2

    def _blocks(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape as ``(g, a/g, b, *k)``: ``a, b`` its first two axes; a vector ``(1, 1, C)``."""
        if self.kind == "vector":
            return (1, 1, prod(shape))
        if len(shape) < 2 or (self.kind not in _CONVS and len(shape) > 2):
            raise ValueError(f"{tuple(shape)} is no shape of a weight of kind {self.kind}")
        if shape[0] % self.groups:
            raise ValueError(f"{shape[0]} channels do not divide into {self.groups} groups")
        return (self.groups, shape[0] // self.groups, *shape[1:])

    def _factor(self, values: Tensor, weight: Tensor, axis: int) -> Tensor:
        """A vector over channels, group-blocked, shaped to multiply the blocks along `axis`."""
        blocks = self._blocks(weight.shape)
        channels = "outputs" if axis == self._output_axis else "inputs"
        _check_length(values, blocks[0] * blocks[axis], f"factors of the {channels}")
        shape = [1] * len(blocks)
        shape[0], shape[axis] = blocks[0], blocks[axis]
        return _vector(values, weight).view(shape)


def scaled(
    weight: Tensor, kernel: Kernel, out: Tensor | None = None, inp: Tensor | None = None
) -> Tensor:
    """``W'[o,i,k] = out[o] · W[o,i,k] · inp[i]``, where inputs and outputs meet in their group.

    Args:
        weight: As `kernel` says; its memory format is kept.
        kernel: The layout.
        out: Factors of the output channels, shape ``(outputs,)``.
        inp: Factors of the input channels, shape ``(inputs,)``.

    Returns:
        Float64, the shape of `weight`; never the same memory.
    """
    kernel._blocks(weight.shape)
    result = weight.detach().to(torch.float64, copy=True)
    if out is not None:
        scale_(result, kernel, out, "out")
    if inp is not None:
        scale_(result, kernel, inp, "inp")
    return result


def scale_(weight: Tensor, kernel: Kernel, factor: Tensor, side: Literal["out", "inp"]) -> None:
    """Multiply a float64 weight by output or by input channel, in place; see :func:`scaled`."""
    axis = kernel._output_axis
    if side == "inp":
        kernel.inputs(weight.shape)
        axis = 3 - axis
    values = kernel._factor(factor, weight, axis)
    # Splitting the first axis is a view in any memory format.
    shape = kernel._blocks(weight.shape)
    blocks: Tensor = weight.view(shape) if kernel.kind == "vector" else _split(weight, shape)
    blocks.mul_(values)


def _split(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    return weight.unflatten(0, shape[:2])  # type: ignore[no-any-return,no-untyped-call]


def shifted(weight: Tensor, kernel: Kernel, shift: Tensor) -> Tensor:
    """``Σ_ik W[o,i,k] · shift[i]``: what a constant input adds where every tap sees it.

    Args:
        weight: As `kernel` says. For a transposed convolution this is the sum over all taps, which
            an output sees only with kernel 1 and stride 1: the caller checks.
        kernel: The layout.
        shift: Shape ``(inputs,)``.

    Returns:
        Float64, shape ``(outputs,)``.
    """
    _check_length(shift, kernel.inputs(weight.shape), "shifts of the inputs")
    blocks = _blocked(_float64(weight), kernel)
    taps = blocks.flatten(3).sum(3) if blocks.ndim > 3 else blocks
    if kernel._output_axis == 2:
        taps = taps.mT
    columns = _vector(shift, weight).view(kernel.groups, -1, 1)
    return (taps @ columns).flatten()


def embedding_rows(weight: Tensor, affine: Affine) -> Tensor:
    """``W'[n,c] = s[c] · W[n,c] + t[c]``: rows that come out of the table already mapped.

    Args:
        weight: Shape ``(num, C)``.
        affine: Of ``C`` channels.

    Returns:
        Float64, shape ``(num, C)``.
    """
    rows = scaled(weight, Kernel("embedding"), out=affine.scale)
    return rows + _vector(affine.shift, weight)


def identity_kernel(
    weight_shape: Sequence[int], kernel: Kernel, scale: Tensor | None = None
) -> Tensor:
    """The weight that computes ``scale ⊙ x``: ``W[c, c mod (in/g), centre] = scale[c]``, else 0.

    A convolution with it keeps its input where ``padding = dilation · (k − 1) / 2`` and stride 1.

    Args:
        weight_shape: Of a linear layer or a convolution with as many outputs as inputs, and an odd
            number of taps on every spatial axis.
        kernel: Kind linear or conv.
        scale: Shape ``(C,)``; absent means 1.

    Returns:
        Float64, shape `weight_shape`, on the device of `scale`.
    """
    if kernel.kind not in _OUTPUTS_FIRST:
        raise ValueError(f"no identity of kind {kernel.kind}")
    channels, spatial = kernel.outputs(weight_shape), tuple(weight_shape[2:])
    if channels != kernel.inputs(weight_shape) or any(k % 2 == 0 for k in spatial):
        raise ValueError(f"no identity of shape {tuple(weight_shape)}, groups {kernel.groups}")
    values = torch.ones(channels) if scale is None else scale
    _check_length(values, channels, "scale")
    values = _vector(values, values)
    weight = values.new_zeros(tuple(weight_shape))
    each = torch.arange(channels, device=values.device)
    centre = [torch.full_like(each, k // 2) for k in spatial]
    return weight.index_put_((each, each % weight_shape[1], *centre), values)


def padded_kernel(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """A smaller kernel written as a larger one: zero taps around the same centre.

    The larger convolution computes the same with ``dilation · (K − k) / 2`` more padding.

    Args:
        weight: Shape ``(·, ·, *k)``.
        shape: The spatial shape ``K``; on every axis not smaller, by an even number.

    Returns:
        Float64, shape ``(·, ·, *K)``.
    """
    small, large = tuple(weight.shape[2:]), tuple(shape)
    pairs = list(zip(small, large, strict=False))
    if len(small) != len(large) or any(a > b or (b - a) % 2 for a, b in pairs):
        raise ValueError(f"a kernel {small} has no place in the centre of a kernel {large}")
    # F.pad lists the last axis first, each axis with its two sides.
    sides = [(b - a) // 2 for a, b in reversed(pairs) for _ in range(2)]
    return F.pad(weight.detach().to(torch.float64, copy=True), sides)


def grouped_to(weight: Tensor, groups_from: int, groups_to: int) -> Tensor:
    """A convolution with fewer groups that computes the same: its blocks on the diagonal, else 0.

    Args:
        weight: Shape ``(out, in / groups_from, *k)``.
        groups_from: Groups of `weight`.
        groups_to: Groups of the result; divides `groups_from`.

    Returns:
        Float64, shape ``(out, in / groups_to, *k)``.
    """
    if groups_to < 1 or groups_from % groups_to:
        raise ValueError(f"a weight in {groups_from} groups is none in {groups_to}")
    blocks = _blocked(_float64(weight), Kernel("conv", groups_from))
    _, outs, ins, *taps = blocks.shape
    ratio = groups_from // groups_to
    result = blocks.new_zeros(groups_to, ratio, outs, ratio, ins, *taps)
    # The diagonal (block row = block column) comes last: (groups_to, outs, ins, *taps, ratio).
    blocks = blocks.reshape(groups_to, ratio, outs, ins, *taps)
    result.diagonal(dim1=1, dim2=3).copy_(blocks.movedim(1, -1))
    return result.reshape(weight.shape[0], ratio * ins, *taps)


def chained_linear(
    first_w: Tensor, first_b: Tensor | None, second_w: Tensor, second_b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Two layers as one: ``W[o,i,k] = Σ_m W₂[o,m,k] W₁[m,i]``, ``b = b₂ + Σ_mk W₂[o,m,k] b₁[m]``.

    Exact for layers without groups, where the second pads nothing with zeros or `first_b` is
    absent; both are for the caller to know. The first has stride 1 and no padding; the result takes
    stride, dilation and padding of the second.

    Args:
        first_w: Linear or 1×1 convolution, shape ``(m, in)`` or ``(m, in, 1, …)``.
        first_b: Shape ``(m,)``.
        second_w: Linear or convolution, shape ``(out, m, *k)``.
        second_b: Shape ``(out,)``.

    Returns:
        Weight ``(out, in, *k)`` and bias ``(out,)``, in float64; no bias where neither has one.
    """
    taps = second_w.ndim - 2
    if prod(first_w.shape[2:]) != 1 or first_w.ndim not in (2, 2 + taps):
        raise ValueError(f"the first layer has a kernel {tuple(first_w.shape[2:])}")
    if first_w.shape[0] != second_w.shape[1]:
        raise ValueError(f"{first_w.shape[0]} outputs into {second_w.shape[1]} inputs")
    inner, outer = _float64(first_w).to(second_w.device).flatten(1), _float64(second_w)
    weight = torch.tensordot(outer, inner, dims=([1], [0])).movedim(-1, 1).contiguous()
    if first_b is None:
        return weight, None if second_b is None else second_b.detach().to(torch.float64, copy=True)
    bias = shifted(second_w, Kernel("conv" if taps else "linear"), first_b)
    return weight, bias if second_b is None else bias + _vector(second_b, second_w)


def magnification(before: Tensor, after: Tensor) -> float:
    """``max |after| / max |before|``: what a fold did to the range of a tensor.

    1.0 where either has no element or `before` is zero throughout.
    """
    if not before.numel() or not after.numel():
        return 1.0
    old, new = (float(t.detach().abs().amax()) for t in (before, after))
    return 1.0 if old == 0.0 else new / old


def _blocked(weight: Tensor, kernel: Kernel) -> Tensor:
    """A float64 weight as ``(g, a/g, b, *k)``; splitting the first axis keeps memory formats."""
    return weight.reshape(kernel._blocks(weight.shape))


def _vector(values: Tensor, beside: Tensor) -> Tensor:
    """Values over channels as a flat float64 vector on the device of another tensor."""
    return _float64(values).flatten().to(beside.device)


def _float64(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64)


def _check_length(values: Tensor, channels: int, name: str) -> None:
    if values.numel() != channels:
        raise ValueError(f"{name}: {values.numel()} values for {channels} channels")
