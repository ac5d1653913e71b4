"""Small networks trained on scikit-learn's digits in a second or two, for audits by data."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Images(nn.Module):
    """Two convolutions and a linear layer, each with batch norm; 10 classes."""

    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=momentum)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16, momentum=momentum)
        self.fc1, self.bn3 = nn.Linear(256, 32), nn.BatchNorm1d(32, momentum=momentum)
        self.drop, self.fc2 = nn.Dropout(0.2), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.fc1(x.flatten(1))))
        return self.fc2(self.drop(x))


class Functional(nn.Module):
    """Tokens flattened into the batch, and batch norm called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 10)
        self.norm = nn.BatchNorm1d(16)
        self.scale, self.shift = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("var", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        n, _, rows, _ = x.shape
        tokens = self.embed(x.reshape(n * rows, 8))  # 8 rows of a sample, one token each
        tokens = torch.relu(self.norm(tokens)).view(n, rows, 16)
        pooled = F.batch_norm(
            tokens.amax(1), self.mean, self.var, self.scale, self.shift, self.training, 0.1, 1e-5
        )
        return self.head(torch.relu(pooled))


class Frozen(nn.Module):
    """A look-alike that writes its arithmetic out and holds constants."""

    def __init__(self, like: nn.BatchNorm2d) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(like, name).detach().clone())
        self.eps = like.eps

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of shape (1, 8, 8) in [0, 1], and their labels; shuffled once."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(raw.target)[order]


def batches(size: int = 32, count: int = 8, scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """Batches of (images, labels) that :func:`train` does not use."""
    images, labels = digits()
    images, labels = images[1280:], labels[1280:]
    return [
        (images[i : i + size] * scale, labels[i : i + size]) for i in range(0, size * count, size)
    ]


def train(
    net: nn.Module | Callable[[], nn.Module],
    inputs: Callable[[Tensor], Tensor] = lambda x: x,
    *,
    epochs: int = 6,
    odd_end: bool = False,
) -> nn.Module:
    """Train in batches of 32, the same each time; back in eval mode.

    Args:
        net: The network, or what makes one.
        inputs: What is done to the images.
        epochs: How often all images are seen.
        odd_end: End with a batch of 4 images of one class.
    """
    torch.manual_seed(0)
    model = net if isinstance(net, nn.Module) else net()
    images, labels = digits()
    images, labels = images[:1280], labels[:1280]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(1280).split(32):
            loss = F.cross_entropy(model(inputs(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if odd_end:
        with torch.no_grad():
            model(inputs(images[labels == 3][:4]))
    return model.eval()
