"""Does the cost of planning and rewriting grow with the number of layers, or with its square?

    python benchmarks/scale.py

CPU seconds of ``bnify.insert(..., verify=False)`` less those of the recording, which has its own
benchmark, for 1,000 and 2,000 linear layers. Fails above 2.5×.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise

import torch
from torch import nn

import bnify
from bnify.capture import record

LIMIT = 2.5


def deep(layers: int) -> nn.Sequential:
    """``layers`` linear layers of width 4, each with its activation."""
    modules: list[nn.Module] = []
    for _ in range(layers):
        modules += [nn.Linear(4, 4), nn.ReLU()]
    return nn.Sequential(*modules)


def cpu_seconds(layers: int, repeats: int) -> tuple[float, float, int]:
    """Least seconds to record, least seconds to plan and rewrite, and the number of edits."""
    model, inputs = deep(layers), torch.randn(8, 4)
    recordings, rewrites, edits = [], [], 0
    for _ in range(repeats):
        started = time.process_time()
        for train in (False, True):
            record(model, inputs, train=train)
        recordings.append(time.process_time() - started)
        started = time.process_time()
        result = bnify.insert(model, inputs, verify=False)
        rewrites.append(time.process_time() - started - recordings[-1])
        edits = len(result.plan.edits)
    return min(recordings), min(rewrites), edits


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="500,1000,2000")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [int(size) for size in options.sizes.split(",")]
    cpu_seconds(20, 1)
    seconds = {}
    print(f"{'layers':>8}{'edits':>8}{'record s':>10}{'plan+rewrite s':>16}")
    for size in sizes:
        recording, seconds[size], edits = cpu_seconds(size, options.repeats)
        print(f"{size:8}{edits:8}{recording:10.2f}{seconds[size]:16.2f}", flush=True)
    worst = 0.0
    for small, large in pairwise(sizes):
        ratio = seconds[large] / seconds[small] / (large / small / 2)
        worst = max(worst, ratio)
        print(f"{large} against {small} layers: {ratio:.2f}x for twice as many")
    print(f"limit {LIMIT}x: {'PASS' if worst <= LIMIT else 'FAIL'}")
    return 1 if worst > LIMIT else 0


if __name__ == "__main__":
    raise SystemExit(main())
