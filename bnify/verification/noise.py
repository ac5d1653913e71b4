"""The noise floor: how far a model's outputs move when only the order of its arithmetic does.

It stands in for the error budget where the model cannot run in float64. It is measured, never
assumed: the batch in another order, other kernels, another memory layout, an unoptimised session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

from bnify.borrow import copy_model
from bnify.structure import Call
from bnify.verification.cases import Case
from bnify.verification.runners import OnnxRunner, Outputs, Runner, TorchRunner, first_line

# A variant that moves the outputs by this many units in the last place is no reordering of the
# same arithmetic (a model that mixes the samples of a batch, say): it must not widen anything.
_TOO_MUCH: Final = 1e4


def noise_floor(reference: Runner, case: Case) -> tuple[list[float], list[str]]:
    """Worst relative L2 change of each output over the variants, and what was measured.

    Args:
        reference: What is run again in other ways.
        case: The input, with the reference's outputs on it.
    """
    floor = [0.0] * len(case.reference)
    notes = []
    for label, run in _variants(reference, case.call):
        try:
            outputs = run()
        except Exception as error:  # the user's model runs in a way it may not support
            notes.append(f"noise floor without {label}: {first_line(error)}")
            continue
        moved = [_moved(got, want) for (_, got), (_, want) in zip(outputs, case.reference)]  # noqa: B905
        if len(outputs) != len(floor) or any(
            change > _limit(want) for change, (_, want) in zip(moved, case.reference, strict=True)
        ):
            notes.append(f"noise floor without {label}: it changes the result, not its rounding")
            continue
        floor = [max(pair) for pair in zip(floor, moved, strict=True)]
        notes.append(f"noise floor with {label}: {max(moved, default=0.0):.1e}")
    return floor, notes


def _limit(tensor: Tensor) -> float:
    if not tensor.is_floating_point():
        return 0.0
    return min(0.1, _TOO_MUCH * torch.finfo(tensor.dtype).eps)


def _moved(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    difference, size = (got.double() - want.double()).norm(), want.double().norm()
    if difference == 0:
        return 0.0
    return float(difference / size) if size else float("inf")


def _variants(reference: Runner, call: Call) -> Iterator[tuple[str, Callable[[], Outputs]]]:
    size = call.batch
    if size is not None and size > 1:
        yield "the batch in reverse", lambda: _reversed(reference, call, size)
    if isinstance(reference, OnnxRunner):
        plain = OnnxRunner(
            reference.source, reference.asked_for, optimize=False, model=reference.model
        )
        yield "graph optimization off", lambda: plain.run(call)
    if isinstance(reference, TorchRunner):
        yield "oneDNN off", lambda: _without_onednn(reference, call)
        if any(tensor.ndim == 4 for _, tensor in call.tensors()):
            yield "channels last", lambda: _channels_last(reference, call)


def _reversed(reference: Runner, call: Call, size: int) -> Outputs:
    def flip(tensor: Tensor) -> Tensor:
        return tensor.flip(0) if tensor.ndim and tensor.shape[0] == size else tensor

    return [(name, flip(tensor)) for name, tensor in reference.run(call.map(flip))]


def _without_onednn(reference: TorchRunner, call: Call) -> Outputs:
    # Not mkldnn.flags(): it resets the precision settings too, and warns about Intel GPUs.
    onednn: Any = torch.backends.mkldnn
    before = onednn.enabled
    try:
        onednn.enabled = False
        return reference.run(call)
    finally:
        onednn.enabled = before


def _channels_last(reference: TorchRunner, call: Call) -> Outputs:
    def relaid(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    model = copy_model(reference.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TorchRunner(model, reference.where, reference.dtype).run(call.map(relaid))
