"""A folder with a user's files, and the command line in this process where a child adds nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bnify.cli.run import run

NET = '''
import os
import torch
from torch import nn


class Net(nn.Module):
    """Prints while it is built and while it runs, as code from a notebook does."""

    def __init__(self, width: int = 8):
        super().__init__()
        print("user: building")
        os.system("echo user: child process")
        self.fc1 = nn.Linear(4, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, 2)

    def forward(self, x):
        print("user: running")
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Quiet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(4, 8)
        self.fc2 = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class Raises(Quiet):
    def forward(self, x):
        raise ValueError("no such luck")


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


class NoLayer(nn.Module):
    def forward(self, x):
        return x + 1


def loader():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        yield torch.randn(64, 4, generator=generator) * 3 + 1, torch.zeros(64)
'''

NORMED = '''
import torch
from torch import nn


class Net(nn.Module):
    """A redundant bias, a momentum as TensorFlow has it, and norms in two places."""

    def __init__(self, momentum=0.99):
        super().__init__()
        print("user: building")
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4, momentum=momentum)
        self.head = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        print("user: running")
        x = self.head(torch.relu(self.bn(self.conv(x))))
        return self.fc(torch.relu(x).mean((2, 3)))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x)


def loader():
    for seed in range(20):
        yield torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.zeros(8)
'''


class Ran(NamedTuple):
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def user(tmp_path, monkeypatch) -> Path:
    """A folder with ``net.py``, which is the current one."""
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "FORCE_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.fixture
def cli(user, capfd) -> Callable[..., Ran]:
    """Run a command line in this process: ``cli("insert", "net.py:Net", ...)``."""

    def call(*words: object) -> Ran:
        capfd.readouterr()
        code = run([str(word) for word in words], restore=True)
        return Ran(code, *capfd.readouterr())

    return call


@pytest.fixture
def net(user):
    """``normed.py`` and ``good.safetensors`` in the current folder; gives the state dict."""
    (user / "normed.py").write_text(NORMED)
    namespace: dict = {}
    exec(NORMED, namespace)
    model = namespace["Net"]()
    generator = torch.Generator().manual_seed(0)
    for norm in (model.bn, model.head[1]):
        nn.init.uniform_(norm.weight, 0.5, 2.0, generator=generator)
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2.0, generator=generator)
        norm.num_batches_tracked.fill_(1000)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, user / "good.safetensors")
    return state
