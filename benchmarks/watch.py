"""What ``bnify.watch`` costs: its share of a training step at ``every=50``.

    python benchmarks/watch.py [--rounds 15] [--only cnn]

A small MLP, a small CNN and resnet18 are trained on random images, on one thread: rounds of 50
steps without a watcher and rounds with one, in turn, each round once around the interval. Figures:
the CPU time that the watcher itself takes (50 counted steps and a look), over that of a round; and
the difference of the two medians, which has the noise of the machine in it. Fails if the first is
above 2 %, but for steps below a millisecond, which are shown and not judged. The first three steps,
which have forward hooks, are measured apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from time import process_time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / "stub")]
import torchvision_ops

torchvision_ops.install()
from torchvision.models import resnet18

from bnify.watching import Watcher, watch

EVERY, LIMIT = 50, 0.02
#: Seconds of a step below which the limit is not asked for: a look costs what it costs.
SHORT = 1e-3


def cnn() -> nn.Module:
    """Three convolutions with batch norm."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after)]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Module:
    """Three narrow linear layers with batch norm."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in ((192, 64), (64, 64), (64, 64)):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


class Timed:
    """A watcher whose own time is added up: it is told of each step by hand."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher
        self.spent = 0.0

    def step(self) -> None:
        """Count a step."""
        started = process_time()
        self.watcher.step()
        self.spent += process_time() - started


class Training:
    """A model, its optimizer and one batch."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model = model.train()
        self.images = images
        self.labels = torch.randint(0, 10, (len(images),))
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def run(self, steps: int, timed: Timed | None = None) -> float:
        """CPU seconds of so many steps."""
        started = process_time()
        for _ in range(steps):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.images), self.labels).backward()
            self.optimizer.step()
            if timed is not None:
                timed.step()
        return process_time() - started


def measure(name: str, training: Training, rounds: int) -> bool:
    """Print one line; whether the watcher's share is within the limit."""
    training.run(5)
    # Nothing is said: to the watcher each round without it is one long step, which BN309 names.
    timed = Timed(watch(training.model, every=EVERY, on_finding=lambda _finding: None))
    timed.watcher.start()
    first = training.run(3, timed) / 3
    plain, watched, own = [], [], []
    for number in range(rounds):
        kinds = (False, True) if number % 2 else (True, False)
        for with_watcher in kinds:
            if not with_watcher:
                plain.append(training.run(EVERY))
                continue
            timed.spent = 0.0
            watched.append(training.run(EVERY, timed))
            own.append(timed.spent / (watched[-1] - timed.spent))
    timed.watcher.stop()
    step = statistics.median(plain) / EVERY
    share = statistics.median(own)
    difference = statistics.median(watched) / statistics.median(plain) - 1
    spread = statistics.quantiles(plain, n=4)
    noise = (spread[2] - spread[0]) / statistics.median(plain)
    print(
        f"{name:<28}{1000 * step:9.2f}{100 * share:9.2f} %{100 * difference:+9.2f} %"
        f"{100 * noise:9.2f} %{100 * (first / step - 1):+9.1f} %",
        flush=True,
    )
    return share <= LIMIT or step < SHORT


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="part of a name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = {
        "mlp, 32 of 192": lambda: Training(mlp(), torch.randn(32, 3, 8, 8)),
        "cnn, 32 of 32x32": lambda: Training(cnn(), torch.randn(32, 3, 32, 32)),
        "resnet18, 8 of 64x64": lambda: Training(resnet18(), torch.randn(8, 3, 64, 64)),
    }
    print(f"{'':<28}{'step ms':>9}{'own':>11}{'differ':>11}{'noise':>11}{'first 3':>11}")
    passed = True
    for name, make in cases.items():
        if options.only in name:
            passed = measure(name, make(), options.rounds) and passed
    print(f"limit: {100 * LIMIT:.0f} % of a step\n{'PASS' if passed else 'FAIL'}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
