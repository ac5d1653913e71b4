"""Vectors of norms on the host, one transfer a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from bnify.auditing.live import Live
from bnify.auditing.state import NormState, Vector


def states_of(
    lives: Iterable[Live], beside: Iterable[Tensor] = ()
) -> tuple[tuple[tuple[NormState, ...], ...], tuple[Vector, ...]]:
    """The norms of each model, and other tensors, read together.

    Returns:
        Per model its norms with running statistics, and each tensor beside as a flat float64
        vector.
    """
    lives = tuple(lives)
    beside = tuple(t for t in beside if not (nn.parameter.is_lazy(t) or t.is_meta))
    wanted: list[Tensor] = []

    def note(tensor: Tensor) -> Vector:
        wanted.append(tensor)
        return np.zeros(1)

    for live in lives:
        for _ in live.states(note):
            pass
    known = transferred([*wanted, *beside])

    def read(tensor: Tensor) -> Vector:
        # What is computed anew at each access (parametrizations) is read on its own.
        return known[id(tensor)] if id(tensor) in known else transferred([tensor])[id(tensor)]

    return tuple(tuple(live.states(read)) for live in lives), tuple(known[id(t)] for t in beside)


def transferred(tensors: Iterable[Tensor]) -> dict[int, Vector]:
    """Tensors as flat float64 vectors by their ``id``, with one wait for each device."""
    devices: dict[torch.device, dict[int, Tensor]] = {}
    for tensor in tensors:
        devices.setdefault(tensor.device, {})[id(tensor)] = tensor
    return {key: vector for held in devices.values() for key, vector in _of_one_device(held)}


def _of_one_device(held: dict[int, Tensor]) -> Iterator[tuple[int, Vector]]:
    # As bytes, so that all dtypes travel together; the widest first, so that all stay aligned.
    items = sorted(held.items(), key=lambda item: -item[1].element_size())
    with torch.no_grad():
        flat = torch.cat([t.detach().reshape(-1).view(torch.uint8) for _, t in items]).cpu()
    start = 0
    for key, tensor in items:
        end = start + tensor.numel() * tensor.element_size()
        yield key, flat[start:end].view(tensor.dtype).double().numpy()
        start = end
