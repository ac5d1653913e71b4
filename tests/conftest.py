"""What every test stands on: one torch thread, an importable torchvision, and child processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
STUB = ROOT / "tests" / "stub"

sys.path.insert(0, str(STUB))
import torchvision_ops  # noqa: E402

# A shell that starts the tests in the background has Ctrl-C ignored, in all child processes too.
signal.signal(signal.SIGINT, signal.default_int_handler)
torchvision_ops.install()
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--overwrite-golden", action="store_true", help="write golden files instead of comparing"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs CUDA")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_seed() -> Iterator[None]:
    """Each test starts at the same random state and leaves torch's global switches alone."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == default, "the test left another default dtype behind"
    assert torch.is_grad_enabled(), "the test left gradients off"


class Ran(NamedTuple):
    """A finished child process."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def child_env() -> dict[str, str]:
    """Environment for child processes: this checkout importable, torchvision too, one thread."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTEST_"))}
    for name in ("NO_COLOR", "FORCE_COLOR", "CI", "TERM", "COLUMNS", "PYTHONWARNINGS"):
        kept.pop(name, None)
    inherited = kept.get("PYTHONPATH", "")
    paths = [str(STUB), str(ROOT), *([inherited] if inherited else [])]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "COLUMNS": "100",
    }


@pytest.fixture(scope="session")
def run_python(child_env: dict[str, str]) -> Callable[..., Ran]:
    """Run ``python ARGS``: ``run_python("-c", "...", cwd=tmp_path)`` gives what it Ran."""

    def run(
        *args: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        timeout: float = 300.0,
    ) -> Ran:
        done = subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=cwd,
            env={**child_env, **(env or {})},
            input=stdin if stdin is not None else "",
            capture_output=True,
            timeout=timeout,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def run_cli(run_python: Callable[..., Ran]) -> Callable[..., Ran]:
    """Run ``python -m bnify ARGS`` in a child process: ``run_cli("insert", ...) -> Ran``."""

    def run(*args: str | Path, **kwargs) -> Ran:
        return run_python("-m", "bnify", *args, **kwargs)

    return run
