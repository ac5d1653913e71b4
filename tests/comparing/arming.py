"""Small networks and plans for the tests of arms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laws
from bnify.comparing.arms import ArmPlan, plan_arms
from bnify.comparing.question import NORMS
from bnify.structure import as_call


def planned(model: nn.Module, inputs, norms=NORMS, batch_size: int = 8):
    """The reference, and the arms by name."""
    reference, arms = plan_arms(model, as_call(inputs), norms, batch_size=batch_size)
    return reference, {arm.norm: arm for arm in arms}


def running(arms: dict[str, ArmPlan]) -> list[str]:
    return [norm for norm, arm in arms.items() if not arm.left_out]


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


class SmallCNN(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2)
        self.fc = nn.Linear(2 * width, 4)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class Block(nn.Module):
    """A residual network of one block, its norms made by ``norm(channels)``."""

    def __init__(self, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn0 = norm(16)
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False)
        self.bn1 = norm(32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn2 = norm(32)
        self.down = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), norm(32))
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        x = F.relu(self.bn0(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(F.relu(y + self.down(x)).mean((2, 3)))


def same_weights(made: nn.Module, base: nn.Module) -> None:
    """Every tensor of the base but those of norms, bit for bit."""
    norms = {path for path, _ in laws.norms_of(base)}
    have = dict(made.named_parameters(remove_duplicate=False))
    for name, tensor in base.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] not in norms:
            assert torch.equal(have[name], tensor), name
