"""What folding did to the range of the weights, and which number formats it no longer fits.

A norm's scale s = γ / sqrt(var + eps) may differ by orders of magnitude between channels. Once it
is in the weights, one scale for the whole tensor (int8) or 5 bits of exponent (float16) may be too
little for them. Rule BN403 of the audit judges with the same numbers.

int8, one scale a tensor. With step q = max|W| / 127 a channel c has 127 · max|W_c| / max|W| steps
    on either side of zero. Below 4 steps (3 bits with the sign) it is ruined: a warning when that
    is so in 1 % of the channels. Channels that are all zero lose nothing and are left out.
float16. Above 65504 a number becomes infinite: an error. Nonzero numbers below 2⁻²⁴, the smallest
    that float16 has, vanish or round to it: a warning when that is so for 1 % of a tensor's; a few
    in a million are so in any tensor that is distributed around 0.
magnification. max|W'| / max|W| above 1/sqrt(2 · 1e-5) = 224, which a norm with |γ| = 1 and the
    usual eps reaches where its variance is as small as eps: such a channel carries no signal, and
    what it carries is magnified (rule BN105 looks at the same limit in a checkpoint).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from torch import Tensor

#: Steps of int8 on either side of zero, and how many of them a channel needs.
INT8_STEPS: Final = 127
INT8_LEAST: Final = 4.0
#: Share of channels, or of a tensor's numbers, from which a fault counts.
SHARE: Final = 0.01
FP16_MOST: Final = 65504.0
FP16_LEAST: Final = 2.0**-24
MAGNIFICATION: Final = (2e-5) ** -0.5


@dataclass(frozen=True, slots=True)
class RangeWarning:
    """A weight whose range a number format does not hold after folding.

    Attributes:
        layer: Module path of the weight; the tensor's own name for one of the root module.
        kind: ``"int8"``, ``"fp16-overflow"``, ``"fp16-underflow"`` or ``"magnification"``.
        value: What was measured: the share of channels or numbers, the largest number, the ratio.
        threshold: What it was compared with.
        sentence: Both in words.
    """

    layer: str
    kind: str
    value: float
    threshold: float
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """The warning as JSON-ready data."""
        return asdict(self)


def range_warnings(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    targets: tuple[str, ...] = ("int8", "fp16"),
    transposed: Mapping[str, int] | None = None,
) -> tuple[RangeWarning, ...]:
    """Judge the tensors that a fold wrote.

    Args:
        before: The tensors as they were, by fully qualified name; those that a fold added (a
            bias) may be missing.
        after: The tensors that were written, by the same names.
        targets: Number formats to judge for: ``"int8"`` (one scale a tensor), ``"fp16"``.
        transposed: Groups of the weights of transposed convolutions by name; their channels lie
            in axis 1 of [in, out/groups, *k], blocked by groups. All others' lie in axis 0.

    Returns:
        The warnings in the order of ``after``, at most one of each kind a tensor.
    """
    groups = transposed or {}
    found: list[RangeWarning] = []
    for name, tensor in after.items():
        if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        old = before.get(name)
        if "int8" in targets and tensor.ndim > 1:
            found.extend(_int8(name, old, tensor, groups.get(name, 0)))
        if "fp16" in targets:
            found.extend(_fp16(name, tensor))
        found.extend(_magnified(name, old, tensor))
    return tuple(found)


def largest_magnification(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> tuple[str, float] | None:
    """The written weight that grew most and its max|W'| / max|W|; None where there is none.

    Tensors that are in one of the two only, and vectors (a bias moves by the norm's shift), are
    left out; so are weights that were all zero and still are. A ratio below 1 means that every
    weight shrank.
    """
    ratios = {
        name: magnification(before[name], tensor)
        for name, tensor in after.items()
        if name in before and tensor.ndim > 1 and tensor.numel()
    }
    known = {name: ratio for name, ratio in ratios.items() if not math.isnan(ratio)}
    if not known:
        return None
    name = max(known, key=lambda one: known[one])
    return name, known[name]


def magnification(before: Tensor, after: Tensor) -> float:
    """max|W'| / max|W|; NaN where both are 0, infinite where only W is or W' is not finite."""
    old, new = _largest(before), _largest(after)
    if old == 0:
        return math.nan if new == 0 else math.inf
    return new / old


def narrow_share(weight: Tensor, groups: int = 0) -> float:
    """Share of the channels that keep fewer than 4 of 127 steps under one scale for the tensor.

    Args:
        weight: At least two axes, channels first (or as ``groups`` says).
        groups: Groups of a transposed convolution, whose weight is [in, out/groups, *k]; 0 for
            all other layers.
    """
    largest = _channels(weight, groups).abs().nan_to_num(nan=math.inf).amax(dim=1)
    nonzero = largest[largest > 0]
    if not nonzero.numel():
        return 0.0
    steps = INT8_STEPS * (nonzero / nonzero.max())
    return float((steps < INT8_LEAST).double().mean())


def _channels(weight: Tensor, groups: int) -> Tensor:
    """A weight as float64 [channels, numbers of each channel]."""
    weight = weight.detach().abs().double()
    if groups:  # [groups · in/groups, out/groups, k] to [groups, out/groups, in/groups · k]
        blocked = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        weight = blocked.transpose(1, 2)
        return weight.reshape(weight.shape[0] * weight.shape[1], -1)
    return weight.reshape(weight.shape[0], -1)


def _int8(name: str, old: Tensor | None, new: Tensor, groups: int) -> Iterator[RangeWarning]:
    share = narrow_share(new, groups)
    if share >= SHARE:
        was = ""
        if old is not None and old.ndim > 1:
            was = f" ({narrow_share(old, groups):.1%} before)"
        yield RangeWarning(
            _layer(name),
            "int8",
            share,
            SHARE,
            f"{name}: {share:.1%} of its channels{was} keep fewer than {INT8_LEAST:.0f} of "
            f"{INT8_STEPS} steps in int8 with one scale a tensor",
        )


def _fp16(name: str, new: Tensor) -> Iterator[RangeWarning]:
    largest = _largest(new)
    if largest > FP16_MOST:
        yield RangeWarning(
            _layer(name),
            "fp16-overflow",
            largest,
            FP16_MOST,
            f"{name} reaches {largest:.3g}, more than float16 holds ({FP16_MOST:.0f})",
        )
    sizes = new.detach().abs()
    nonzero = int((sizes > 0).sum())
    lost = int(((sizes > 0) & (sizes < FP16_LEAST)).sum())
    share = lost / nonzero if nonzero else 0.0
    if share >= SHARE:
        yield RangeWarning(
            _layer(name),
            "fp16-underflow",
            share,
            SHARE,
            f"{name}: {share:.1%} of its numbers are below {FP16_LEAST:.1g}, the smallest of "
            "float16",
        )


def _magnified(name: str, old: Tensor | None, new: Tensor) -> Iterator[RangeWarning]:
    if old is None or new.ndim < 2:  # a bias moves by the norm's shift: no scale tells of it
        return
    ratio = magnification(old, new)
    if ratio > MAGNIFICATION:
        yield RangeWarning(
            _layer(name),
            "magnification",
            ratio,
            MAGNIFICATION,
            f"{name} grew by a factor of {ratio:.3g}: a channel with a variance near eps was "
            "folded into it",
        )


def _largest(tensor: Tensor) -> float:
    """max|W| in float64, infinite where a number is not finite."""
    return float(tensor.detach().abs().double().nan_to_num(nan=math.inf).max())


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name
