"""Two processes on the CPU (gloo), as ``torchrun`` starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("two_ranks.py")


@pytest.mark.parametrize(
    "task", ["trains", "merges", "fails", "falls_back", "synchronises", "saves", "once"]
)
def test_two_ranks(task, tmp_path, child_env):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-X", "faulthandler", str(WORKER), task, str(rank), str(tmp_path)],
            env=child_env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, words in zip(ranks, said, strict=True):
        assert rank.returncode == 0, words
