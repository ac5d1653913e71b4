"""Ten linear layers without norms: how far do gradients get?

bnify compare examples/deep.py:DeepNetwork --data digits --norms none,batch,layer,group
"""

from __future__ import annotations

from itertools import pairwise

from torch import nn


class DeepNetwork(nn.Sequential):
    """784, nine times 64, 10, for images of 28×28 pixels as flat rows: (N, 784) to (N, 10)."""

    def __init__(self, depth: int = 10, width: int = 64) -> None:
        layers: list[nn.Module] = []
        for before, after in pairwise([784, *[width] * (depth - 1), 10]):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers[:-1])
