"""The article's claims, measured: its own network, a small CNN and a deep one, on digits.

    python examples/compare_digits/compare.py

Every kind of norm, ten seeds, and sweeps over learning rates, batch sizes and initial scales: about
an hour on two cores. The deep network is there for its gradients: four arms, no sweeps. Reports
land beside this file and are committed; ``docs/claims.md`` is made of them by ``make docs``.
Killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import bnify

HERE = Path(__file__).resolve().parent
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("examples/mlp.py:MyNetwork", {}),
    "cnn": ("examples/cnn.py:SmallCNN", {}),
    "deep": (
        "examples/deep.py:DeepNetwork",
        {"norms": ("none", "batch", "layer", "group"), "sweep": ()},
    ),
}
KEPT = ("report.html", "report.json", "results.csv")
#: For a test of this file, in seconds rather than minutes.
QUICK: dict[str, Any] = {
    "norms": ("none", "batch"),
    "seeds": 2,
    "tuning_seeds": 1,
    "epochs": 1,
    "lrs": (0.03, 0.3),
    "batch_sizes": (32, 128),
    "init_scales": (1.0, 3.0),
}


def main() -> None:
    """Compare on each network, and keep the reports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("out/compare_digits"))
    parser.add_argument("--keep", type=Path, default=HERE, help="where the reports go")
    parser.add_argument("--quick", action="store_true", help="a few runs, to try this file")
    options = parser.parse_args()
    os.chdir(HERE.parents[1])  # the SPECs are as a user types them at the root
    for name, (spec, own) in MODELS.items():
        runs = options.runs / name
        result = bnify.compare(
            spec,
            "digits",
            **{
                "sweep": ("lr", "batch", "init"),
                "budget": 0,
                **own,
                **(QUICK if options.quick else {}),
            },
            jobs=2,
            output=runs,
            resume=(runs / "run.json").exists(),
            progress=say,
        )
        kept = options.keep / name
        kept.mkdir(parents=True, exist_ok=True)
        for file in KEPT:
            shutil.copy(runs / file, kept / file)
        print(f"{name}: {result.seconds:.0f} s")
        for claim in result.claims:
            print(f"  {claim.answer.value:<16} {claim.claim}")


def say(progress: Any) -> None:
    """A line now and then."""
    if progress.total and progress.done % 50 == 0:
        left = "" if progress.left is None else f", about {progress.left / 60:.0f} min left"
        print(f"{progress.doing}: {progress.done} of {progress.total}{left}", flush=True)


if __name__ == "__main__":
    main()
