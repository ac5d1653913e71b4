"""How long folding takes beside other tools, what it holds in memory, and what it brings.

    python benchmarks/fold_speed.py [--only times,memory,scale,latency] [--quick] [--json FILE]

times    CPU seconds on one thread of ``bnify.fold(verify=False)``, ``torch.jit.trace`` + ``freeze``
         and ``torch.fx`` fuse, in turns, medians; and what verification adds, in forward passes of
         the same model and inputs. A recording runs the model once, symbolic tracing does not, so
         resnet50 is there at 64 and at 224 px.
memory   Resident memory of a child process that folds with ``inplace=True, verify=False``: the
         highest during the fold, above what the process held before it, over the bytes of the
         model's parameters and buffers. Everything counts: activations, temporaries, Python's own
         objects. Memory goes back to the system as soon as it is freed.
scale    CPU seconds of folding 2,000 norms over 1,000.
latency  Before and after folding, in turns, eager and in onnxruntime, whose own optimisation (and
         the exporter's) folds norms too.

Fails if folding without verification takes longer than trace + freeze on any model, more than 2.5
times fx fuse on resnet50 at 64 px, if verification adds more than 12 forward passes on any, if
memory is above 1.3 times the model's, or if 2,000 norms cost more than 2.5 times as much as 1,000.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "stub"), str(TESTS), str(TESTS.parent), str(TESTS.parent / "examples")]

import torch
from fold_models import hostile
from peers import fx_fuse, jit_freeze
from torch import nn

import counting
import torchvision_ops
import zoo

torchvision_ops.install()
FUSE_LIMIT, VERIFY_LIMIT, MEMORY_LIMIT, SCALE_LIMIT = 2.5, 12.0, 1.3, 2.5
#: Names and image sizes; 0 is the model's own. The first is the one that fx fuse is compared on.
TIMED = (
    ("resnet50", 64),
    ("resnet50", 224),
    ("mobilenet_v2", 0),
    ("densenet121", 0),
    ("efficientnet_b0", 0),
    ("regnet_y_400mf", 0),
    ("inception_v3", 0),
    ("levit_128s", 0),
    ("mobileone_s0", 0),
    ("convmixer_768_32", 64),
)
LATENCY = ("mobilenet_v2", "resnet50", "densenet121")


def fold(model: nn.Module, inputs: Any, **options: Any) -> Any:
    """``bnify.fold``, imported here so that the other tools can be measured without it."""
    import bnify

    return bnify.fold(model, inputs, **options)


# -- times -----------------------------------------------------------------------------------------


def medians(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each action, in turns; every other round backwards."""
    for action in actions.values():  # caches, imports, kernels
        action()
    spent: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds):
        for name, action in list(actions.items())[:: -1 if number % 2 else 1]:
            gc.collect()
            started = time.process_time()
            action()
            spent[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in spent.items()}


def times(name: str, pixels: int, rounds: int) -> dict[str, float]:
    """Seconds of folding with each tool, of one forward pass and of a verified fold."""
    entry = zoo.entry(name)
    model = hostile(entry)
    inputs = entry.inputs(2, pixels or entry.pixels)
    actions: dict[str, Callable[[], object]] = {
        "fold": lambda: fold(model, inputs, verify=False),
        "freeze": lambda: jit_freeze(model, inputs),
        "fuse": lambda: fx_fuse(model, inputs),
        "forward": lambda: counting.call(model, inputs),
    }
    try:
        fx_fuse(model, inputs)
    except Exception:  # many models cannot be traced symbolically
        del actions["fuse"]
    found = medians(actions, rounds)
    verified = medians(
        {
            "verified": lambda: fold(model, inputs),
            "fold": lambda: fold(model, inputs, verify=False),
        },
        max(1, rounds // 2),
    )
    found["extra"] = (verified["verified"] - verified["fold"]) / found["forward"]
    return found


def report_times(quick: bool, results: dict[str, Any]) -> Iterator[str]:
    """Print the table; yield what is above its limit."""
    print(f"{'CPU s':30}{'fold':>8}{'freeze':>8}{'ratio':>7}{'fuse':>8}{'ratio':>7}", end="")
    print(f"{'forward':>9}{'verification':>16}")
    rows = results["times"] = {}
    for name, pixels in TIMED[:3] if quick else TIMED:
        what = f"{name} {pixels or zoo.entry(name).pixels} px"
        found = rows[what] = times(name, pixels, 3 if quick else 7)
        freeze = found["fold"] / found["freeze"]
        fuse = found["fold"] / found["fuse"] if "fuse" in found else float("nan")
        print(
            f"{what:30}{found['fold']:8.3f}{found['freeze']:8.3f}{freeze:7.2f}"
            f"{found.get('fuse', float('nan')):8.3f}{fuse:7.2f}{found['forward']:9.3f}"
            f"{found['extra']:7.1f} forwards",
            flush=True,
        )
        if freeze >= 1:
            yield f"{what}: {freeze:.2f}x of trace + freeze, limit 1"
        if (name, pixels) == TIMED[0] and not fuse <= FUSE_LIMIT:
            yield f"{what}: {fuse:.2f}x of fx fuse, limit {FUSE_LIMIT}"
        if found["extra"] > VERIFY_LIMIT:
            yield f"{what}: verification adds {found['extra']:.1f} forwards, limit {VERIFY_LIMIT}"
    extra = statistics.median(found["extra"] for found in rows.values())
    print(f"verification adds {extra:.1f} forward passes in the median (limit {VERIFY_LIMIT} each)")


# -- memory ----------------------------------------------------------------------------------------


def memory_child(name: str) -> None:
    """Runs in the child: fold in place and print what was resident when, in bytes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warm = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    fold(warm, torch.randn(2, 3, 8, 8), inplace=True, verify=False)  # imports
    entry = zoo.entry(name)
    model, inputs = hostile(entry), entry.inputs()
    counting.call(model, inputs)  # what kernels keep
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    forward = _highest(lambda: counting.call(model, inputs))
    folding = _highest(lambda: fold(model, inputs, inplace=True, verify=False))
    print(json.dumps({"model": held, "forward": forward, "folding": folding}))


def _highest(action: Callable[[], object]) -> int:
    """Bytes by which resident memory rose at its highest above where it stood before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the highest so far
    before = _status("VmRSS")
    action()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def report_memory(quick: bool, results: dict[str, Any]) -> Iterator[str]:
    """Run the children, print, yield what is above its limit."""
    if not Path("/proc/self/clear_refs").exists():
        print("memory: not measured, needs Linux")
        return
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # Freed memory goes back at once, so that what is resident is what is held.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    results["memory"] = {}
    for name in ("resnet50",) if quick else ("resnet50", "vgg11_bn", "inception_v4"):
        done = subprocess.run(
            [sys.executable, __file__, "--memory-child", name],
            env=environment,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if done.returncode:
            yield f"memory of {name}: {done.stderr.strip().splitlines()[-1]}"
            continue
        found = results["memory"][name] = json.loads(done.stdout.splitlines()[-1])
        ratio = 1 + found["folding"] / found["model"]
        print(
            f"{name:24}{found['model'] / 2**20:8.0f} MiB of parameters; at the highest "
            f"{ratio:.2f}x while folding in place, "
            f"{1 + found['forward'] / found['model']:.2f}x in one forward pass",
            flush=True,
        )
        if ratio > MEMORY_LIMIT:
            yield f"memory of {name}: {ratio:.2f}x the model's, limit {MEMORY_LIMIT}"


# -- scale -----------------------------------------------------------------------------------------


def chain(norms: int) -> nn.Sequential:
    """``norms`` times a 1×1 convolution of width 4, a batch norm and an activation."""
    layers: list[nn.Module] = []
    for _ in range(norms):
        layers += [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def report_scale(quick: bool, results: dict[str, Any]) -> Iterator[str]:
    """Twice as many norms, print, yield what is above its limit."""
    small = 250 if quick else 1000
    inputs = torch.randn(2, 4, 2, 2)
    nets = {count: chain(count) for count in (small, 2 * small)}
    found = medians(
        {
            str(count): lambda net=net: fold(net, inputs, verify=False)
            for count, net in nets.items()
        },
        3,
    )
    results["scale"] = found
    ratio = found[str(2 * small)] / found[str(small)]
    print(
        f"{small} norms {found[str(small)]:.2f} s, {2 * small} norms "
        f"{found[str(2 * small)]:.2f} s: {ratio:.2f}x for twice as many (limit {SCALE_LIMIT}x)"
    )
    if ratio > SCALE_LIMIT:
        yield f"{2 * small} norms: {ratio:.2f}x of {small}, limit {SCALE_LIMIT}"


# -- latency ---------------------------------------------------------------------------------------


def report_latency(quick: bool, results: dict[str, Any]) -> Iterator[str]:
    """Latency before and after; promises nothing, so nothing can fail."""
    from bnify.exporting import export_onnx
    from bnify.latency import eager_latency, onnx_latency

    seconds = 2.0 if quick else 10.0
    print(f"{'224 px, batch 1, 1 thread':30}{'eager ms':>20}{'ratio':>7}", end="")
    print(f"{'onnxruntime ms':>20}{'ratio':>7}")
    results["latency"] = {}
    for name in LATENCY[:1] if quick else LATENCY:
        entry = zoo.entry(name)
        model = hostile(entry)
        folded = fold(model, entry.inputs(2, 64), verify=False).model
        one = entry.inputs(1, 224)
        eager = eager_latency(model, folded, one, seconds=seconds)
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / f"{side}.onnx" for side in ("before", "after")]
            for side, file in zip((model, folded), files, strict=True):
                export_onnx(side, entry.inputs(2, 224), file, verify=False)
            onnx = onnx_latency(*files, one, model=model, threads=1, seconds=seconds)
        results["latency"][name] = [eager.to_dict(), onnx.to_dict()]
        cells = "".join(
            f"{f'{1e3 * one.before:.2f} → {1e3 * one.after:.2f}':>20}{one.ratio:7.2f}"
            for one in (eager, onnx)
        )
        print(f"{name:30}{cells}", flush=True)
    yield from ()


PARTS = {
    "times": report_times,
    "memory": report_memory,
    "scale": report_scale,
    "latency": report_latency,
}


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--quick", action="store_true", help="fewer models and rounds")
    parser.add_argument("--json", default="", metavar="FILE", help="write all figures there")
    parser.add_argument("--memory-child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_child:
        memory_child(options.memory_child)
        return 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {"torch": torch.__version__, "threads": 1}
    above: list[str] = []
    for part in options.only.split(","):
        above += PARTS[part](options.quick, results)
        print()
    print("\n".join(f"FAIL {one}" for one in above) if above else "PASS")
    if options.json:
        results["above"] = above
        Path(options.json).write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 1 if above else 0


if __name__ == "__main__":
    raise SystemExit(main())
