"""Calibration beside ``torch.optim.swa_utils.update_bn``: error, time, and memory.

    python benchmarks/calibrate.py [--only errors,times,memory] [--quick] [--json FILE]

errors   Largest error of mean and variance over all channels of a float64 network's first norm,
         whose input depends on no other norm: against ``torch.var_mean`` over the concatenated
         activations, in units of the standard deviation and relative to the variance. Loaders:
         shuffled, sorted by class, ragged (sizes 2 to 61). ``update_bn`` averages over batches
         with equal weight, whatever their size, and cannot take a last batch of 1.
times    CPU seconds for one batch, in turns, medians: ``bnify.calibrate``, ``update_bn`` (forward
         passes in train mode), and one plain forward pass in train and in eval mode. What is done
         once (a copy of the model, checks) is told apart by the time for two batches.
memory   Resident memory of a child process at its highest while it calibrates with 20 and with 200
         batches that are made as they are read.

Fails if an error of calibrate is above 1e-12, if a batch costs more than 1.3 forward passes in
train mode (what update_bn needs as well), or if 200 batches hold 5 % more memory than 20.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "stub"), str(TESTS), str(TESTS.parent), str(TESTS.parent / "examples")]

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import torchvision_ops
import zoo

torchvision_ops.install()
ERROR_LIMIT, COST_LIMIT, MEMORY_LIMIT = 1e-12, 1.3, 1.05
#: Names, image sizes and batch sizes.
TIMED = (
    ("resnet18", 64, 32),
    ("mobilenet_v2", 64, 32),
    ("densenet121", 64, 16),
    ("vgg11_bn", 64, 16),
)


def calibrate(model: nn.Module, data: Any) -> Any:
    """``bnify.calibrations.calibrate``, imported here so that memory can be measured without it."""
    from bnify.calibrations import calibrate as run

    return run(model, data)


# -- errors ----------------------------------------------------------------------------------------


def digits() -> Tensor:
    """1,797 images of digits, (N, 64), float64, sorted by class."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    return torch.tensor(raw.data)[torch.tensor(raw.target).argsort(stable=True)] / 16


def loaders() -> dict[str, list[Tensor]]:
    """The same images in batches of different kinds."""
    images = digits()
    shuffled = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    sizes: list[int] = []
    while sum(sizes) < len(images):
        sizes.append(min(len(images) - sum(sizes), 2 + (37 * len(sizes)) % 60))
    return {
        "shuffled": list(shuffled.split(64)),
        "sorted": list(images.split(64)),
        "ragged": list(images.split(sizes)),
    }


def errors() -> list[dict[str, Any]]:
    """Errors of both on each loader."""
    rows = []
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU()).double()
    for name, batches in loaders().items():
        with torch.no_grad():
            values = torch.cat([net[0](x) for x in batches])
        var, mean = torch.var_mean(values, 0)
        for tool, run in (("calibrate", lambda m, d: calibrate(m, d)), ("update_bn", _update)):
            model = copy.deepcopy(net)
            run(model, batches)
            norm = model[1]
            rows.append(
                {
                    "loader": name,
                    "tool": tool,
                    "mean": float(((norm.running_mean - mean) / var.sqrt()).abs().max()),
                    "var": float(((norm.running_var - var) / var).abs().max()),
                }
            )
    return rows


def _update(model: nn.Module, batches: list[Tensor]) -> None:
    update_bn(batches, model)


# -- times -----------------------------------------------------------------------------------------


def times(name: str, pixels: int, size: int, rounds: int, count: int = 12) -> dict[str, float]:
    """CPU seconds for one batch."""
    _keep_freed_memory()
    entry = zoo.entry(name)
    torch.manual_seed(0)
    model = entry.make().eval()
    batches = [torch.randn(size, 3, pixels, pixels) for _ in range(count)]
    trained = copy.deepcopy(model).train()

    def forward(module: nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                module(batch)

    actions: dict[str, Callable[[], object]] = {
        "calibrate": lambda: calibrate(model, batches),
        "two": lambda: calibrate(model, batches[:2]),
        "update_bn": lambda: update_bn(batches, trained),
        "train": lambda: forward(trained),
        "eval": lambda: forward(model),
    }
    for action in actions.values():  # caches, imports, kernels
        action()
    spent: dict[str, list[float]] = {key: [] for key in actions}
    for number in range(rounds):
        for key, action in list(actions.items())[:: -1 if number % 2 else 1]:
            gc.collect()
            started = time.process_time()
            action()
            spent[key].append(time.process_time() - started)
    total = {key: statistics.median(values) for key, values in spent.items()}
    two, whole = total.pop("two"), total["calibrate"]
    found = {key: value / count for key, value in total.items()}
    found["calibrate"] = (whole - two) / (count - 2)
    return found | {"once": two - 2 * found["calibrate"]}


def _keep_freed_memory() -> None:
    """Let glibc's allocator reuse what was freed: else it is chance who pays for fresh pages."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# -- memory ----------------------------------------------------------------------------------------


def made(count: int) -> Iterator[Tensor]:
    """Batches that nobody keeps."""
    for seed in range(count):
        yield torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def memory(count: int) -> int:
    """Bytes that a child process held at most while it calibrated with so many batches."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, __file__, "--child", str(count)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(ran.stdout)


def child(count: int) -> None:
    """Calibrate, and print the highest resident memory, which here has nothing of the parent's."""
    calibrate(zoo.entry("resnet18").make().eval(), made(count))
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024)


def main() -> int:
    """Measure, print, and say whether a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="errors,times,memory")
    parser.add_argument("--quick", action="store_true", help="one model, three rounds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child is not None:
        child(arguments.child)
        return 0
    wanted = arguments.only.split(",")
    found: dict[str, Any] = {}
    failed: list[str] = []
    if "errors" in wanted:
        found["errors"] = errors()
        print(f"{'loader':10} {'':12} {'mean (σ)':>10} {'variance':>10}")
        for row in found["errors"]:
            print(f"{row['loader']:10} {row['tool']:12} {row['mean']:10.1e} {row['var']:10.1e}")
            if row["tool"] == "calibrate" and max(row["mean"], row["var"]) > ERROR_LIMIT:
                failed.append(f"error on {row['loader']} data above {ERROR_LIMIT:g}")
    if "times" in wanted:
        found["times"] = {}
        columns = ("calibrate", "update_bn", "train", "eval", "once")
        print(f"\n{'ms a batch':16}" + "".join(f"{column:>11}" for column in columns))
        for name, pixels, size in TIMED[:1] if arguments.quick else TIMED:
            row = found["times"][name] = times(name, pixels, size, 3 if arguments.quick else 7)
            cost = row["calibrate"] / row["train"]
            print(
                f"{name:16}" + "".join(f"{row[column] * 1e3:11.1f}" for column in columns),
                f"  {cost:.2f} forward passes in train mode,",
                f"{row['calibrate'] / row['eval']:.2f} in eval mode",
            )
            if cost > COST_LIMIT:
                failed.append(f"{name}: a batch costs {cost:.2f} forward passes")
    if "memory" in wanted:
        few, many = memory(20), memory(200)
        found["memory"] = {"20": few, "200": many}
        print(f"\nmemory: {few / 2**20:.0f} MiB with 20 batches, {many / 2**20:.0f} with 200")
        if many > MEMORY_LIMIT * few:
            failed.append("memory grows with the number of batches")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for line in failed:
        print(f"FAIL {line}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
