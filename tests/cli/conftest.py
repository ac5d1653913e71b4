"""A folder with a user's files, and the command line in this process where a child adds nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

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
