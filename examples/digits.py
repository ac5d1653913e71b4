"""scikit-learn's handwritten digits at the article's size: flat rows of 28×28 pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class Split(NamedTuple):
    """Training and test images, (N, 784) in [0, 1], with labels 0 to 9."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(seed: int = 0) -> Split:
    """1,437 training and 360 test images, split at random by the seed."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, (28, 28), mode="bilinear", align_corners=False).flatten(1)
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[360:], order[:360]
    return Split(images[train], labels[train], images[test], labels[test])


def loader(batch_size: int = 32, seed: int = 0) -> Iterator[list[Tensor]]:
    """Batches of (images, labels), for ``--data examples/digits.py:loader``."""
    data = digits(seed)
    return iter(DataLoader(TensorDataset(data.images, data.labels), batch_size))
