"""Whether the default comparison ends within its budget, and what it has to cut for it.

    python benchmarks/compare_budget.py

Runs ``bnify compare`` as a user would, on the article's network with digits and on a small CNN
with glyphs, and prints the wall clock of the whole command beside the budget.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 120
CASES = (("examples/mlp.py:MyNetwork", "digits"), ("examples/cnn.py:SmallCNN", "glyphs"))


def main() -> None:
    """Run both, one after the other."""
    for spec, data in CASES:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            words = ["compare", spec, "--data", data, "-o", str(out), "--budget", str(BUDGET)]
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "bnify", *words, "--format", "json"],
                cwd=ROOT,
                check=True,
                stdout=subprocess.DEVNULL,
            )
            took = time.perf_counter() - started
            result = json.loads((out / "report.json").read_text())
        arms = [arm["norm"] for arm in result["arms"] if not arm["left_out"]]
        print(f"{spec} on {data}: {took:.0f} s of {BUDGET} s")
        print(f"  {len(result['seeds'])} seeds of {len(arms)} arms: {', '.join(arms)}")
        for cut in result["cuts"] or ["nothing"]:
            print(f"  cut: {cut}")


if __name__ == "__main__":
    main()
