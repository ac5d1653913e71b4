"""Two processes on the CPU (gloo), as ``torchrun`` starts them; on a GPU one alone (nccl)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("two_ranks.py")


def run(task: str, folder: Path, env: dict[str, str], backend: str = "gloo", size: int = 2) -> None:
    """Run a task in so many processes; each has to end well."""
    ranks = [
        subprocess.Popen(
            [
                *(sys.executable, "-X", "faulthandler", str(WORKER)),
                *(task, str(rank), str(folder), backend, str(size)),
            ],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, words in zip(ranks, said, strict=True):
        assert rank.returncode == 0, words


@pytest.mark.parametrize(
    "task",
    [
        *("trains", "merges", "fails", "one_has_none", "loader_fails", "unlike", "calibrates"),
        *("falls_back", "synchronises", "saves", "once"),
    ],
)
def test_two_ranks(task, tmp_path, child_env):
    run(task, tmp_path, child_env)


def test_a_world_of_one(tmp_path, child_env):
    run("calibrates", tmp_path, child_env, size=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_world_of_one_on_a_gpu(tmp_path, child_env):
    """nccl has no CPU: what is exchanged goes over the device (two ranks on one are refused)."""
    run("calibrates", tmp_path, child_env, backend="nccl", size=1)
