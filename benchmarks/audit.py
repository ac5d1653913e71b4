"""What an audit costs: a large checkpoint in time and memory, a model in forward passes.

    python benchmarks/audit.py [--only resnet18,vit_b_16] [--small] [--no-zoo]

(a) A .safetensors file of 500 MB with 300 norms is audited in a child process. Fails above 1 second
of CPU time, the start of the interpreter included, or above 150 MB of memory, or if torch is
loaded. (b) CPU time of ``bnify.audit(model, inputs)`` over that of one forward pass, for every
model of the zoo, at the model's own image size (224 px unless it demands another) and batch 2, on
one thread. Fails if the median is above 4 forward passes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from capture_zoo import fastest  # makes the zoo importable
from safetensors.numpy import save_file

import zoo
from bnify.audits import audit
from bnify.structure import as_call

MEGABYTES, NORMS = 500, 300
SECONDS, MEMORY, PASSES = 1.0, 150.0, 4.0
CHANNELS = 256

CHILD = """
import json, sys, time
started = time.process_time()
from bnify.audits import audit
report = audit(sys.argv[1])
ended = time.process_time()
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(json.dumps({
    "audit": ended - started, "process": ended, "peak": peak / 1024, "norms": report.norms,
    "findings": len(report.findings), "torch": "torch" in sys.modules,
}))
"""


def write_checkpoint(path: Path) -> None:
    """A file of 500 MB: 300 convolutions, each with its trained batch norm."""
    draw = np.random.default_rng(0)
    values = MEGABYTES * 2**20 // 4 // NORMS - 4 * CHANNELS
    weight = draw.standard_normal((CHANNELS, values // CHANNELS), dtype=np.float32)
    tensors = {}
    for i in range(NORMS):
        tensors[f"layers.{i}.conv.weight"] = weight
        tensors[f"layers.{i}.bn.weight"] = draw.uniform(0.5, 1.5, CHANNELS).astype(np.float32)
        tensors[f"layers.{i}.bn.bias"] = draw.standard_normal(CHANNELS, dtype=np.float32)
        tensors[f"layers.{i}.bn.running_mean"] = draw.standard_normal(CHANNELS, dtype=np.float32)
        tensors[f"layers.{i}.bn.running_var"] = draw.uniform(0.1, 9, CHANNELS).astype(np.float32)
        tensors[f"layers.{i}.bn.num_batches_tracked"] = np.array(1000, dtype=np.int64)
    save_file(tensors, path)


def checkpoint(rounds: int) -> bool:
    """Audit the large file in child processes; print the least, and say whether it is enough."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "large.safetensors")
        write_checkpoint(path)
        size = path.stat().st_size / 2**20
        runs = [
            json.loads(
                subprocess.run(
                    [sys.executable, "-c", CHILD, str(path)],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for _ in range(rounds)
        ]
    audit_seconds, whole, peak = (min(run[k] for run in runs) for k in ("audit", "process", "peak"))
    loaded = any(run["torch"] for run in runs)
    norms, findings = runs[0]["norms"], runs[0]["findings"]
    print(f"{size:.0f} MB, {norms} norms, {findings} findings" + ", torch was loaded" * loaded)
    print(f"audit, with its imports   {audit_seconds:6.3f} CPU s")
    print(f"whole process             {whole:6.3f} CPU s (limit {SECONDS:.0f})")
    print(f"peak memory               {peak:6.1f} MB    (limit {MEMORY:.0f})")
    return norms == NORMS and not loaded and whole <= SECONDS and peak <= MEMORY


def models(options: argparse.Namespace) -> bool:
    """Audit the zoo; print each model's cost and the median, and say whether it is enough."""
    wanted = [part for part in options.only.split(",") if part]
    costs, failed = [], 0
    print(f"\n{'model':<46}{'forward s':>10}{'audit s':>9}{'cost':>7}  findings")
    for entry in zoo.ZOO:
        if options.small and not entry.small:
            continue
        if wanted and not any(part in entry.name for part in wanted):
            continue
        try:
            model, inputs = entry.build(), entry.inputs(2, entry.pixels)
            call = as_call(inputs)
            with torch.no_grad():
                call(model)  # warms up
                forward = fastest(lambda call=call, model=model: call(model), 3)
            report = audit(model, inputs)
            spent = fastest(lambda inputs=inputs, model=model: audit(model, inputs), 2)
        except Exception as error:  # a benchmark reports what any model raises and goes on
            first = str(error).strip().splitlines() or [""]
            print(f"{entry.name:<46}FAIL {type(error).__name__}: {first[0][:90]}", flush=True)
            failed += 1
            continue
        counts = ", ".join(f"{n} {severity}" for severity, n in report.counts().items() if n)
        cost = spent / forward
        print(f"{entry.name:<46}{forward:10.3f}{spent:9.3f}{cost:7.1f}  {counts}", flush=True)
        # Our own few-thousand-weight nets run for microseconds: their cost says nothing.
        if not entry.name.startswith("own:"):
            costs.append(cost)
        gc.collect()
    median = statistics.median(costs) if costs else 0.0
    print(f"\nmedian cost at 224 px: {median:.2f} forward passes (limit {PASSES:.0f})")
    return not failed and median <= PASSES


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="names or parts of names, comma-separated")
    parser.add_argument("--small", action="store_true", help="the models of the test command")
    parser.add_argument("--no-zoo", action="store_true", help="the large checkpoint only")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    passed = checkpoint(options.rounds)
    if not options.no_zoo:
        passed = models(options) and passed
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
