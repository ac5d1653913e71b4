"""Train-mode drift: how far the result's outputs in train mode are from the original's.

Equal outputs in eval mode say nothing about training: batch norm uses the batch's own statistics
there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnify.borrow import copy_model, fused_attention, in_mode, seeded
from bnify.layers import without_synchronisation
from bnify.structure import Call, outputs_of
from bnify.verdict import Drift
from bnify.verification.measures import mismatch, relative_l2


def train_drift(original: nn.Module, result: nn.Module, call: Call) -> Drift | None:
    """Relative L2 distance of the train-mode outputs, both on copies and with the same dropout.

    None where the outputs cannot be compared.
    """
    with fused_attention(enabled=False):
        try:
            want, got = _train_outputs(original, call), _train_outputs(result, call)
        except Exception:  # forward() is user code
            return None  # the user's model may be made for one batch size, or for eval mode only
    pairs = [
        (a, b)
        for a, b in zip(got, want, strict=False)
        if b.is_floating_point() and mismatch(a, b) is None and bool(b.isfinite().all())
    ]
    if not pairs or len(got) != len(want):
        return None
    worst = max(relative_l2(a, b) for a, b in pairs)
    return Drift(batch_size=call.batch or 1, rel_l2=worst)


def _train_outputs(model: nn.Module, call: Call) -> list[Tensor]:
    working = without_synchronisation(copy_model(model))
    with torch.no_grad(), seeded(0), in_mode(working, train=True):
        return [tensor for _, tensor in outputs_of(call.clone()(working))]
