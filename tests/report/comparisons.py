"""A comparison made up for the tests of reports; see odd_comparisons.py for others."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import product
from statistics import fmean, median, stdev

from bnify.comparing.comparison import (
    Answer,
    Arm,
    Cell,
    Claim,
    Comparison,
    Curve,
    Difference,
    Measure,
    Verdict,
)

STEPS = 500
LOOKS = (0, 1, 2, 4, 8, 16, 32, 64, 125, 250, 375, 500)
LRS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
#: norm → accuracy, its sd, best lr, steps to the target, step time, gap, spread.
NORMS = {
    "none": (0.944, 0.008, 0.1, 260, 1.0, 0.031, 700.0),
    "batch": (0.968, 0.006, 0.3, 62, 1.31, 0.028, 7.1),
    "batch-noaffine": (0.967, 0.006, 0.3, 64, 1.22, 0.026, 7.4),
    "group": (0.955, 0.009, 0.3, 90, 1.44, 0.035, 9.8),
    "layer": (0.952, 0.008, 0.3, 84, 1.18, 0.033, 8.9),
    "instance": (0.913, 0.012, 0.1, 480, 1.50, 0.051, 14.2),
    "rms": (0.949, 0.007, 0.1, 101, 1.12, 0.030, 11.0),
}
ENVIRONMENT = {
    "versions": {"bnify": "0.5.0", "python": "3.11.9", "torch": "2.9.1", "numpy": "2.1.0"},
    "platform": "linux x86_64",
    "device": "cpu",
    "threads": 1,
    "seed": 0,
    "hashes": {"model": "0123456789abcdef0123", "data": "fedcba9876543210fedc"},
}


def difference(ours: list[float], theirs: list[float]) -> Difference:
    """The paired difference, by t of 7 degrees of freedom and all sign flips."""
    pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, half = fmean(pairs), 2.365 * stdev(pairs) / math.sqrt(len(pairs))
    flips = [
        fmean(s * d for s, d in zip(f, pairs, strict=True))
        for f in product((1, -1), repeat=len(pairs))
    ]
    p = fmean(abs(flip) >= abs(mean) - 1e-12 for flip in flips)
    word = Verdict.HIGHER if mean > 0 else Verdict.LOWER
    return Difference(
        mean=mean,
        low=mean - half,
        high=mean + half,
        p=p,
        p_holm=min(1.0, 2 * p),
        verdict=word if 2 * p <= 0.05 else Verdict.UNDISTINGUISHED,
    )


def normal(norms: tuple[str, ...] = tuple(NORMS), *, seeds: int = 8) -> Comparison:
    """A classification, all norms trained, no sweeps."""
    draw = random.Random(0)
    shared = [draw.gauss(0, 0.004) for _ in range(seeds)]
    measures: list[Measure] = []
    curves: list[Curve] = []
    grid: list[Cell] = []
    values: dict[tuple[str, str, str], list[float | None]] = {}
    for norm in norms:
        accuracy, sd, best, steps, _, gap, spread = NORMS[norm]
        drawn = [accuracy + both + draw.gauss(0, sd / 2) for both in shared]
        taken = [steps * math.exp(draw.gauss(0, 0.25)) for _ in shared]
        timed = [round(s) if s <= STEPS else None for s in taken]
        values[norm, "metric", "best-lr"] = list(drawn)
        values[norm, "metric", "equal-lr"] = [
            v - (0 if best == 0.1 else abs(draw.gauss(0.012, 0.004))) for v in drawn
        ]
        for setting in ("best-lr", "equal-lr"):
            values[norm, "steps", setting] = list(timed)
            values[norm, "time", setting] = [None if t is None else t * 0.0031 for t in timed]
            values[norm, "gap", setting] = [gap + draw.gauss(0, 0.005) for _ in shared]
            for name in ("spread-start", "spread"):
                values[norm, name, setting] = [
                    spread * math.exp(draw.gauss(0, 0.2)) for _ in shared
                ]
        curves += _curves(norm, accuracy, sd, steps, spread)
        for place, lr in enumerate(LRS):
            lost = 2 if lr > 10 * best else 1 if lr > 3.1 * best else 0
            reached = (
                0.1 if lost == 2 else accuracy - 0.04 * abs(math.log10(lr / best)) - 0.2 * lost
            )
            grid.append(cell(norm, "lr", LRS[place], reached, 2, lost, lr))
    for (norm, name, setting), found in values.items():
        measures.append(
            _measure(norm, name, setting, found, values[norms[0], name, setting], norms)
        )
    return Comparison(
        model="net.py:Net",
        data="digits: 1,077 / 360 / 360 samples of (1, 8, 8)",
        task="classification",
        metric="accuracy",
        higher_is_better=True,
        reference=norms[0],
        arms=tuple(
            Arm(
                norm=norm,
                norms=0 if norm == "none" else 4,
                parameters=21_000,
                step_ms=3.1 * NORMS[norm][4],
                step_ratio=NORMS[norm][4],
                best_lr=NORMS[norm][2],
            )
            for norm in norms
        ),
        seeds=tuple(range(seeds)),
        target=0.897,
        steps=STEPS,
        batch_size=32,
        optimizer="sgd, momentum 0.9",
        measures=tuple(measures),
        curves=tuple(curves),
        grid=tuple(grid),
        claims=CLAIMS,
        notes=("Times are of one machine and vary with what else runs on it.",),
        seconds=118.4,
        environment=ENVIRONMENT,
    )


def _measure(norm, name, setting, found, theirs, norms) -> Measure:
    known = [v for v in found if v is not None]
    lost = len(found) - len(known)
    mean = name in ("metric", "gap")
    center = fmean(known) if mean else None
    if not mean and lost <= len(found) / 2:
        center = median([math.inf if v is None else v for v in found])
    against = None
    if norm != norms[0]:
        filled = [[2.0 * STEPS if v is None else v for v in side] for side in (found, theirs)]
        against = difference(*filled)
    rated = not mean and norm != norms[0]
    return Measure(
        norm=norm,
        setting=setting,
        name=name,
        lr=NORMS[norm][2] if setting == "best-lr" else NORMS[norms[0]][2],
        seeds=tuple(range(len(found))),
        values=tuple(found),
        center=center,
        deviation=stdev(known) if mean and len(known) > 1 else None,
        censored=lost,
        difference=against,
        ratio=median(_ratios(found, theirs)) if rated and center is not None else None,
    )


def _ratios(ours, theirs) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True) if a and b] or [1.0]


def _curves(norm: str, accuracy: float, sd: float, steps: int, spread: float) -> list[Curve]:
    def curve(name: str, mean: list[float], half: list[float]) -> Curve:
        low = tuple(m - h for m, h in zip(mean, half, strict=True))
        high = tuple(m + h for m, h in zip(mean, half, strict=True))
        return Curve(norm=norm, name=name, steps=LOOKS, mean=tuple(mean), low=low, high=high)

    grown = [1 - math.exp(-2.2 * at / steps) for at in LOOKS]
    rising = [0.1 + (accuracy - 0.1) * g for g in grown]
    widths = [0.01 + 4 * sd * g * (1 - g) + sd / 2 for g in grown]
    loss = [2.3 * (1 - g) + 0.02 for g in grown]
    spreads = [spread * (1.6 - 0.6 * g) for g in grown]
    return [
        curve("validation", rising, widths),
        curve("train", [v + 0.01 for v in rising], widths),
        curve("validation-loss", [v + 0.1 for v in loss], [0.05 * v for v in loss]),
        curve("train-loss", loss, [0.1 * v for v in loss]),
        curve("spread", spreads, [0.2 * v for v in spreads]),
    ]


def cell(norm, axis, at, metric, runs, lost, lr) -> Cell:
    half = 0.0 if runs == 1 else 0.02
    return Cell(
        norm=norm,
        axis=axis,
        at=at,
        metric=metric,
        low=metric - half,
        high=metric + half,
        runs=runs,
        diverged=lost,
        lr=lr,
    )


CLAIMS = (
    Claim(
        name="fewer-steps",
        claim="Normalization needs fewer steps to the same accuracy",
        answer=Answer.SUPPORTED,
        figure="batch 62 steps against 260 (0.24×), fewer in 8 of 8 pairs",
        p=0.047,
    ),
    Claim(
        name="faster",
        claim="Normalization trains faster",
        answer=Answer.UNDISTINGUISHED,
        figure="batch 0.25 s against 0.81 s, and a step takes 1.31×",
        p=0.21,
    ),
    Claim(
        name="affine-cost",
        claim="The affine parameters reduce the cost",
        answer=Answer.CONTRADICTED,
        figure="they add 2C parameters a layer, and the accuracy differs by 0.001",
        p=0.0004,
    ),
    Claim(
        name="small-batches",
        claim="Group norm is better for small batches",
        answer=Answer.UNTESTED,
        figure="--sweep batch would test it",
    ),
)


def two_seeds_missing(norm: str) -> Comparison:
    """A norm of which two runs failed, so that it has fewer values than there are seeds."""
    made = normal()
    fewer = tuple(
        replace(m, seeds=m.seeds[2:], values=m.values[2:]) if m.norm == norm else m
        for m in made.measures
    )
    return replace(made, measures=fewer)
