"""Does the cost of planning and rewriting grow with the number of layers, or with its square?

    python benchmarks/scale.py

CPU seconds of each stage of ``bnify.insert(..., verify=False)`` for 1,000 and 2,000 linear layers.
Fails if all stages but the recording, which has its own benchmark, take more than 2.5 times as long
for twice as many layers.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from itertools import pairwise

import torch
from torch import nn

import bnify

LIMIT = 2.5


def deep(layers: int) -> nn.Sequential:
    """``layers`` linear layers of width 4, each with its activation."""
    modules: list[nn.Module] = []
    for _ in range(layers):
        modules += [nn.Linear(4, 4), nn.ReLU()]
    return nn.Sequential(*modules)


def cpu_seconds(layers: int, repeats: int) -> tuple[dict[str, float], int]:
    """Least CPU seconds of each stage of an insertion, and the number of edits."""
    model, inputs = deep(layers), torch.randn(8, 4)
    least: dict[str, float] = {}
    edits = 0
    for _ in range(repeats):
        gc.collect()
        marks: list[tuple[str, float]] = []
        result = bnify.insert(
            model,
            inputs,
            verify=False,
            progress=lambda stage, marks=marks: marks.append((stage, time.process_time())),
        )
        marks.append(("end", time.process_time()))
        for (stage, started), (_, ended) in pairwise(marks):
            least[stage] = min(ended - started, least.get(stage, math.inf))
        edits = len(result.plan.edits)
    return least, edits


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="1000,2000")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [int(size) for size in options.sizes.split(",")]
    cpu_seconds(20, 1)
    seconds = {}
    for size in sizes:
        stages, edits = cpu_seconds(size, options.repeats)
        seconds[size] = sum(spent for stage, spent in stages.items() if stage != "recording")
        words = ", ".join(f"{stage} {spent:.2f} s" for stage, spent in stages.items())
        print(f"{size:6} layers, {edits:5} edits: {words}", flush=True)
    worst = 0.0
    for small, large in pairwise(sizes):
        ratio = seconds[large] / seconds[small] / (large / small / 2)
        worst = max(worst, ratio)
        print(f"{large} against {small} layers: {ratio:.2f}x for twice as many")
    print(f"limit {LIMIT}x: {'PASS' if worst <= LIMIT else 'FAIL'}")
    return 1 if worst > LIMIT else 0


if __name__ == "__main__":
    raise SystemExit(main())
