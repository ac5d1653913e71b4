"""BN403: folded weights whose range a number format does not hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject

if TYPE_CHECKING:
    from bnify.auditing.live import Live
    from bnify.auditing.onnx_file import OnnxFile
    from bnify.auditing.state import Vector

#: As in bnify.ranges, which knows torch: a file is audited without it.
INT8_STEPS: Final = 127
INT8_LEAST: Final = 4.0
SHARE: Final = 0.01
FP16_MOST: Final = 65504.0


class FoldRange(Rule):
    """Folding spreads or magnifies the weights of a layer beyond what the target holds.

    What it checks:
        The weights as they are after folding, for the precision of ``--target``. ``int8`` with
        one scale a tensor: a channel keeps ``127 * max|w_c| / max|w|`` steps on either side of
        zero; a finding where at least 1 % of the channels keep fewer than 4. Channels and layers
        that are all zero are left out. ``fp16``: a number above 65504 is an error.

    Why it is bad:
        The scale of a norm may differ by orders of magnitude between channels. Folded, the small
        channels round to 0 beside the large ones in int8; in fp16 a large one is infinite.

    Example:
        Depthwise convolutions of MobileNets: running variances near 0 in some channels give
        scales of 100 and more there, and every other channel is left with a step or two.

    How to fix it:
        Quantize with one scale a channel, equalise the channels across layers (Nagel et al.), or
        zero the channels whose variance vanished (BN105).

    Fix safety:
        Unsafe: equalising and zeroing change rounding, or the function.

    Source:
        Nagel et al. (2019), Data-Free Quantization, section 3; IEEE 754 half precision.
    """

    code = "BN403"
    name = "fold-range"
    severity = Severity.ERROR
    tiers = ("T1", "T0x")
    needs = needs((Need.PRECISION, Need.EVAL), (Need.PRECISION, Need.ONNX))
    fix = "quantize with one scale a channel, or equalise the channels across layers"
    safety = Safety.ADVICE
    cost = "channels that round to nothing (int8), or infinite weights (fp16)"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a layer that takes a norm."""
        for layer, share, channels, largest in _layers(subject):
            if subject.precision == "int8" and share >= SHARE:
                yield self.finding(
                    layer,
                    f"{share:.1%} of {channels} channels keep fewer than {INT8_LEAST:.0f} of "
                    f"{INT8_STEPS} int8 steps after folding (threshold {SHARE:.0%})",
                    {"share": share, "threshold": SHARE, "channels": channels, "target": "int8"},
                    severity=Severity.WARNING,
                )
            elif subject.precision == "fp16" and not largest <= FP16_MOST:
                yield self.finding(
                    layer,
                    f"reaches {largest:.4g} after folding, above {FP16_MOST:.0f}, the most that "
                    "fp16 holds",
                    {"largest": largest, "threshold": FP16_MOST, "target": "fp16"},
                    fix="keep the layer in fp32 or bf16, or zero the channel",
                )


#: Layer, share of its channels that int8 ruins, number of channels, largest number.
_Measured: TypeAlias = tuple[str, float, int, float]


def _layers(subject: Subject) -> Iterator[_Measured]:
    if subject.onnx is not None:
        yield from _of_file(subject.onnx)
    elif subject.live is not None:
        yield from _of_model(subject.live)


def narrow_share(largest: Vector) -> float:
    """Share of the channels that keep fewer than 4 of 127 steps, zero channels left out.

    Args:
        largest: max|w_c| by channel, shape (C,).
    """
    sizes = np.nan_to_num(largest, nan=np.inf)
    sizes = sizes[sizes > 0]
    if not sizes.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        return float((INT8_STEPS * (sizes / sizes.max()) < INT8_LEAST).mean())


def _of_file(file: OnnxFile) -> Iterator[_Measured]:
    from bnify.auditing.onnx_folds import folded_rows

    for fold in file.folds:
        rows, bias = folded_rows(fold, file.constants)
        if rows.size:
            largest = max(float(rows.max()), 0.0 if bias is None else float(np.abs(bias).max()))
            yield fold.layer, narrow_share(rows), rows.size, largest


def _of_model(live: Live) -> Iterator[_Measured]:
    """Layers in the order in which the fold wrote them; their biases count for fp16 alone."""
    from bnify.ranges import narrow_share as share_of

    folded, draft = live.folded, live.draft
    if folded is None or draft is None:
        return
    found: dict[str, _Measured] = {}
    for name, pending in folded.changes.weights.items():
        weight = pending.of(draft.tensor(name).detach())
        if not weight.numel():
            continue
        kind, groups = pending.kernel.kind, pending.kernel.groups
        outputs_last = kind in ("matmul", "embedding")
        share = share_of(
            weight.T if outputs_last else weight, groups if kind == "conv_transpose" else 0
        )
        layer = _owner(name)
        found[layer] = _worst(
            found.get(layer),
            (layer, share, pending.kernel.outputs(weight.shape), float(weight.abs().max())),
        )
    for name, value in folded.changes.values.items():
        layer = _owner(name)
        if value.numel() and layer in found:
            found[layer] = _worst(found[layer], (layer, 0.0, 0, float(value.abs().max())))
    yield from found.values()


def _owner(name: str) -> str:
    """Module path of a tensor; the tensor's own name where it is the root's."""
    return name.rpartition(".")[0] or name


def _worst(one: _Measured | None, other: _Measured) -> _Measured:
    """The worse of two tensors of a layer, each number for itself."""
    if one is None:
        return other
    largest = one[3] if not one[3] <= other[3] else other[3]  # NaN stays
    share, channels = max(one[1:3], other[1:3])
    return one[0], share, channels, largest
