"""Record every model of the zoo: nodes, whether a replay gives the model's outputs, and the cost.

    python benchmarks/capture_zoo.py [--only resnet18,vit_b_16] [--small] [--markdown]

Cost is CPU time of ``bnify.capture.record`` over that of one forward pass, at the model's own
image size (224 px unless it demands another) and batch 2, on one thread. Fails if a model is not
captured, if a replay differs, or if the median cost is above 2.5 forward passes.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "stub"), str(TESTS), str(TESTS.parent / "examples")]

import torch

import torchvision_ops
import zoo
from bnify.capture import record
from bnify.structure import as_call, outputs_of

torchvision_ops.install()
LIMIT = 2.5
# Recording turns fused attention off, which rounds differently.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """What one model gave; ``error`` is relative, ``failure`` empty where it worked."""

    name: str
    nodes: int = 0
    forward: float = 0.0
    cost: float = 0.0
    error: float = 0.0
    failure: str = ""

    @property
    def verdict(self) -> str:
        """``"equal"``, the relative error, or what went wrong."""
        if self.failure:
            return f"FAIL {self.failure}"
        if self.error <= TOLERANCE:
            return "equal" if self.error == 0 else f"{self.error:.0e}"
        return f"FAIL differs by {self.error:.1e}"


def measure(entry: zoo.Entry) -> Row:
    """Build, run, record, replay."""
    try:
        model, call = entry.build(), as_call(entry.inputs(2, entry.pixels))
        with torch.no_grad():
            want = [tensor for _, tensor in outputs_of(call.clone()(model))]  # and warms up
            forward = fastest(lambda: call(model), 3)
        captured = record(model, call)
        recording = fastest(lambda: record(model, call), 2)
        got = captured.replay()
    except Exception as error:  # a benchmark reports what any model raises and goes on
        first = str(error).strip().splitlines() or [""]
        return Row(entry.name, failure=f"{type(error).__name__}: {first[0][:90]}")
    if len(want) != len(got):
        return Row(entry.name, failure=f"{len(got)} outputs instead of {len(want)}")
    return Row(
        entry.name,
        nodes=len(captured.graph.nodes),
        forward=forward,
        cost=recording / forward,
        error=max(difference(a, b) for a, b in zip(want, got, strict=True)),
    )


def fastest(action: Callable[[], object], repeats: int) -> float:
    """The least CPU seconds of several runs: noise only ever adds."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
    return min(times)


def difference(want: torch.Tensor, got: torch.Tensor) -> float:
    """Relative error in the 2-norm; infinite where shape, dtype or finiteness differ."""
    if want.shape != got.shape or want.dtype != got.dtype:
        return float("inf")
    if torch.equal(want, got):
        return 0.0
    gap = (got.double() - want.double()).norm() / want.double().norm()
    return float(gap) if gap.isfinite() else float("inf")


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="names or parts of names, comma-separated")
    parser.add_argument("--small", action="store_true", help="the models of the test command")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wanted = [part for part in options.only.split(",") if part]
    rows = []
    line = "| {} | {} | {} | {} | {} |" if options.markdown else "{:<46}{:>6}{:>10}{:>8}  {}"
    print(line.format("model", "nodes", "forward s", "cost", "outputs"))
    if options.markdown:
        print("|---|--:|--:|--:|---|")
    for entry in zoo.ZOO:
        if options.small and not entry.small:
            continue
        if wanted and not any(part in entry.name for part in wanted):
            continue
        row = measure(entry)
        rows.append(row)
        numbers = (
            (row.nodes, f"{row.forward:.3f}", f"{row.cost:.1f}") if row.nodes else ("", "", "")
        )
        print(line.format(row.name, *numbers, row.verdict), flush=True)
        gc.collect()
    failed = [row for row in rows if row.verdict.startswith("FAIL")]
    # Our own few-thousand-weight nets run for microseconds: their cost says nothing at 224 px.
    costs = [row.cost for row in rows if row.nodes and not row.name.startswith("own:")]
    median = statistics.median(costs) if costs else 0.0
    print(f"\n{len(rows) - len(failed)} of {len(rows)} captured with equal outputs")
    print(f"median cost at 224 px: {median:.2f} forward passes (limit {LIMIT})")
    return 1 if failed or median > LIMIT else 0


if __name__ == "__main__":
    raise SystemExit(main())
