"""Inputs of another size than the recorded one, which a recording may take for a fact."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

#: Half of this is still an image that most networks take.
_LONG: Final = 32


def _other_image(tensor: Tensor) -> Tensor:
    """One more element along every axis behind the second, and half of them along a long one.

    Half as high and one wider tries both directions, and that for half a forward pass.
    """
    sizes = {axis: tensor.shape[axis] + 1 for axis in range(2, tensor.ndim)}
    if tensor.ndim > 3 and tensor.shape[2] >= _LONG:
        sizes[2] = tensor.shape[2] // 2 + 1
    return _cycled(tensor, sizes)


def _one_token_more(tensor: Tensor) -> Tensor:
    """One more element along the second axis."""
    return _cycled(tensor, {1: tensor.shape[1] + 1} if tensor.ndim > 1 else {})


def _cycled(tensor: Tensor, sizes: dict[int, int]) -> Tensor:
    """The tensor at other sizes of these axes: its elements repeated, or left out."""
    for axis, size in sizes.items():
        held = tensor.shape[axis]
        if held:
            tensor = tensor.index_select(axis, torch.arange(size, device=tensor.device) % held)
    return tensor


#: Ways to another size, tried in turn.
OTHER_SIZES: Final = (_other_image, _one_token_more)
