"""Networks with every kind of norm that keeps statistics, and what reaches the norms of one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activated(nn.BatchNorm2d):
    """A subclass with a forward of its own, as timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        x = F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.leaky_relu(x, 0.1)


class WrittenOut(nn.BatchNorm2d):
    """A subclass that does its arithmetic itself."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        scale = self.weight * (var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


class Net(nn.Module):
    """(N, 3, 6, 6) → (N, 5); one norm runs twice, dropout is there to be off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), Activated(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 6, 3, padding=1), WrittenOut(6)
        self.twice = nn.BatchNorm2d(6, affine=False, momentum=None)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(6, 5)
        self.bn5, self.head = nn.SyncBatchNorm(5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x = self.twice(self.drop(self.twice(self.bn3(self.conv3(x)))) + 0.3 * x)
        return self.head(torch.relu(self.bn5(self.fc(x.mean((2, 3))))))


def hostile(seed: int = 0) -> Net:
    """A float64 network: γ of both signs and 0, statistics far from any data."""
    torch.manual_seed(seed)
    model = Net().double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.affine:
                    module.weight.normal_()
                    module.weight[0] = 0
                    module.bias.normal_()
                module.running_mean.normal_().mul_(50)
                module.running_var.uniform_(1e-8, 1e-3)
    return model.eval()


def images(count: int = 61, seed: int = 1) -> Tensor:
    """Images with an offset and a trend, sorted: batches in order differ as much as they can."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 6, 6, dtype=torch.float64, generator=generator)
    return x + 20 + torch.linspace(-8, 8, count, dtype=torch.float64).view(-1, 1, 1, 1)


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What reaches each batch norm while copies of the model run, each of shape (values, C).

    Hooks go along with a copy, and what they write to does not.
    """
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):

            def keep(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                values = args[0].detach().movedim(1, -1).flatten(0, -2).clone()
                found.setdefault(name, []).append(values)

            handles.append(module.register_forward_pre_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def in_train_mode(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """What reaches each batch norm with all norms in train mode and nothing else."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if isinstance(module, nn.SyncBatchNorm):  # refuses a CPU in train mode
                module.__class__ = nn.BatchNorm1d
            module.train()
    with recorded(model) as found, torch.no_grad():
        for batch in batches:
            model(batch)
    return {name: torch.cat(values) for name, values in found.items()}
