"""What seeds buy: false alarms and power of the verdicts of bnify compare, simulated.

    python benchmarks/compare_power.py [--comparisons 2000] [--norms 6]

A comparison has so many norms, each with one paired difference to the reference a seed; one norm
has an effect, in standard deviations of its paired difference, and the others have none. A verdict
is a sign-flip test, corrected by Holm over the norms, at 5 %. Columns: how often the norm with the
effect is found (power), and how often any other is (false alarms; without an effect any at all).
Noise that is shared through the reference, and noise with heavy tails, are simulated too. Fails
where false alarms are above 5 % by more than their own error.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from bnify.comparing.comparison import Verdict
from bnify.comparing.statistics import holm, sign_flip, verdict

SEEDS = (6, 8, 12)
EFFECTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
Noise = Callable[[np.random.Generator, tuple[int, int]], Any]


def independent(draw: np.random.Generator, shape: tuple[int, int]) -> Any:
    """Normal noise of each difference by itself."""
    return draw.normal(size=shape)


def shared(draw: np.random.Generator, shape: tuple[int, int]) -> Any:
    """Half of the variance of each difference is the reference's."""
    own, reference = draw.normal(size=shape), draw.normal(size=(1, shape[1]))
    return (own - reference) / math.sqrt(2)


def heavy(draw: np.random.Generator, shape: tuple[int, int]) -> Any:
    """Student's t with 3 degrees of freedom, at a standard deviation of 1."""
    return draw.standard_t(3, size=shape) / math.sqrt(3)


NOISES: dict[str, Noise] = {"independent": independent, "shared": shared, "heavy tails": heavy}


def simulate(
    noise: Noise, *, effect: float, seeds: int, norms: int, comparisons: int
) -> tuple[float, float]:
    """Power and false alarms, as shares of the comparisons."""
    draw = np.random.default_rng(seeds)
    found = alarms = 0
    for _ in range(comparisons):
        differences = noise(draw, (norms, seeds))
        differences[0] += effect
        adjusted = holm([sign_flip(values) for values in differences])
        verdicts = [
            verdict(float(values.mean()), p)
            for values, p in zip(differences, adjusted, strict=True)
        ]
        found += verdicts[0] is Verdict.HIGHER
        without = verdicts[1:] if effect else verdicts
        alarms += any(said is not Verdict.UNDISTINGUISHED for said in without)
    return found / comparisons, alarms / comparisons


def main() -> int:
    """Print the table; 1 where there are too many false alarms."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comparisons", type=int, default=2000)
    parser.add_argument("--norms", type=int, default=6)
    options = parser.parse_args()
    count, worst = options.comparisons, 0.0
    print(f"{options.norms} norms, {count} simulated comparisons a cell: power / false alarms, %\n")
    print(f"{'noise':<12}{'effect':>7}" + "".join(f"{f'{n} seeds':>15}" for n in SEEDS))
    for name, noise in NOISES.items():
        for effect in EFFECTS:
            cells = []
            for seeds in SEEDS:
                power, alarms = simulate(
                    noise, effect=effect, seeds=seeds, norms=options.norms, comparisons=count
                )
                worst = max(worst, alarms)
                shown = f"{100 * power:.0f}" if effect else "–"
                cells.append(f"{f'{shown} / {100 * alarms:.1f}':>15}")
            print(f"{name:<12}{effect:>7g}" + "".join(cells), flush=True)
    most = 0.05 + 3 * math.sqrt(0.05 * 0.95 / count)
    print(f"\nmost false alarms {100 * worst:.1f} %, allowed {100 * most:.1f} %")
    return int(worst > most)


if __name__ == "__main__":
    sys.exit(main())
