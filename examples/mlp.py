"""The article's network: three linear layers, with the activations called as functions.

bnify insert examples/mlp.py:MyNetwork --input 32,784 -o out/
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MyNetwork(nn.Module):
    """784-256-128-10, for images of 28×28 pixels as flat rows: (N, 784) to (N, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 256)
        self.fc2 = nn.Linear(256, 128)
        self.fc3 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ten classes."""
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)
