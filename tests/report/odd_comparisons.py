"""Comparisons made up for the tests of reports: all of them by name, usual, odd and hostile."""

from __future__ import annotations

import math
from dataclasses import replace

from report.comparisons import CLAIMS, ENVIRONMENT, NORMS, cell, normal

from bnify.comparing.comparison import (
    Answer,
    Claim,
    Comparison,
    Curve,
    Difference,
    Measure,
    Verdict,
)


def two_arms() -> Comparison:
    """Only the model as it is, and one norm."""
    return normal(("none", "group"))


def all_sweeps() -> Comparison:
    """With batch sizes and initial scales."""
    made = normal()
    grid = list(made.grid)
    for norm in NORMS:
        accuracy, *_, lr, _, _, _, _ = NORMS[norm]
        for size in (2, 8, 32, 128):
            fall = {"none": 0.7, "batch": 0.45, "batch-noaffine": 0.47}.get(norm, 0.09)
            reached = accuracy - (fall if size == 2 else 0.1 * fall if size == 8 else 0)
            lost = 3 if (norm, size) == ("none", 2) else 0
            grid.append(cell(norm, "batch", size, reached, 8, lost, lr * min(1, size / 32)))
        for scale in (0.1, 0.3, 1.0, 3.0, 10.0):
            away = abs(math.log10(scale))
            fall = {"none": 0.6 * away**2}.get(norm, 0.25 * max(0.0, math.log10(scale)) ** 2)
            lost = 8 if (norm, scale) == ("none", 10.0) else 0
            grid.append(cell(norm, "init", scale, accuracy - fall, 8, lost, lr))
    return replace(made, grid=tuple(grid), cuts=("tuning_seeds is 1 and not 2.",))


def regression() -> Comparison:
    """A loss, where lower is better and a change for the better is negative."""
    made = normal()

    def loss(value: float | None) -> float | None:
        return None if value is None else (1 - value) / 5

    measures = tuple(
        replace(
            one,
            values=tuple(map(loss, one.values)),
            center=loss(one.center),
            deviation=None if one.deviation is None else one.deviation / 5,
            difference=None if one.difference is None else _mirrored(one.difference),
        )
        if one.name == "metric"
        else one
        for one in made.measures
    )
    curves = tuple(curve for curve in made.curves if curve.name not in ("validation", "train"))
    return replace(
        made,
        task="regression",
        metric="loss",
        higher_is_better=False,
        target=0.0123,
        measures=measures,
        curves=(*curves, *_losses(curves)),
        grid=tuple(
            replace(c, metric=(1 - c.metric) / 5, low=(1 - c.high) / 5, high=(1 - c.low) / 5)
            for c in made.grid
        ),
    )


def _losses(curves: tuple[Curve, ...]) -> list[Curve]:
    """The metric of a regression is its loss, so those curves are there twice."""
    return [
        replace(curve, name=curve.name.removesuffix("-loss"))
        for curve in curves
        if curve.name.endswith("-loss")
    ]


def _mirrored(found: Difference) -> Difference:
    turned = {Verdict.HIGHER: Verdict.LOWER, Verdict.LOWER: Verdict.HIGHER}
    return replace(
        found,
        mean=-found.mean / 5,
        low=-found.high / 5,
        high=-found.low / 5,
        verdict=turned.get(found.verdict, found.verdict),
    )


def everything_diverged() -> Comparison:
    """No arm trained, so there are only cells of diverged runs."""
    made = normal()
    return replace(
        made,
        arms=tuple(replace(arm, best_lr=None) for arm in made.arms),
        measures=(),
        curves=(),
        target=None,
        grid=tuple(replace(cell, metric=0.1, low=0.1, high=0.1, diverged=2) for cell in made.grid),
        claims=tuple(replace(c, answer=Answer.UNTESTED, figure="", p=None) for c in CLAIMS),
    )


def partial() -> Comparison:
    """Interrupted: six seeds, an arm left out, cuts, a censored arm, a rate at the edge."""
    made = normal(seeds=6)
    arms = [
        replace(arm, left_out="a layer has 1 value a channel, which instance norm cannot use")
        if arm.norm == "instance"
        else replace(arm, at_edge="highest" if arm.norm == "group" else "")
        for arm in made.arms
    ]
    kept = [one for one in made.measures if one.norm != "instance"]
    measures = [
        replace(one, values=(None,) * 6, center=None, censored=6, ratio=None)
        if one.name in ("steps", "time") and one.norm == "rms"
        else replace(one, values=(None,) * 4 + one.values[4:], center=None, censored=4, ratio=None)
        if one.name in ("steps", "time") and one.norm == "none"
        else replace(one, diverged=2)
        if one.name == "metric" and one.norm == "none"
        else one
        for one in kept
    ]
    return replace(
        made,
        arms=tuple(arms),
        measures=tuple(measures),
        curves=tuple(curve for curve in made.curves if curve.norm != "instance"),
        grid=tuple(cell for cell in made.grid if cell.norm != "instance"),
        cuts=("6 seeds of the 8 that were asked for.", "No sweep over batch sizes."),
        partial="Interrupted after 71 of 96 runs; --resume goes on.",
    )


def hostile() -> Comparison:
    """Text that means something to HTML, Markdown, SVG and terminals."""
    made = two_arms()
    bad = '<script>alert("x")</script> | $a_b$ & \x1b[2J \u202e `c` 日本'

    def named(item):
        return replace(item, norm=bad) if item.norm == "group" else item

    return replace(
        made,
        model=bad,
        data=bad,
        optimizer=bad,
        arms=tuple(replace(named(arm), notes=(bad,)) for arm in made.arms),
        measures=tuple(map(named, made.measures)),
        curves=tuple(map(named, made.curves)),
        grid=tuple(map(named, made.grid)),
        claims=(Claim(name=bad, claim=bad, answer=Answer.SUPPORTED, figure=bad, p=0.5),),
        cuts=(bad,),
        notes=(bad,),
        partial=bad,
        environment={**ENVIRONMENT, "device": bad, "hashes": {bad: bad}},
    )


def broken(value: float | None = math.nan) -> Comparison:
    """NaN, infinities or None wherever a number may be."""
    made = all_sweeps()
    number = math.nan if value is None else value

    def spoilt(one: Measure) -> Measure:
        against = one.difference and replace(
            one.difference, mean=number, low=number, high=number, p=number, p_holm=number
        )
        return replace(
            one,
            values=tuple(value for _ in one.values),
            center=value,
            deviation=value,
            difference=against,
            ratio=value,
        )

    return replace(
        made,
        arms=tuple(replace(a, step_ms=value, step_ratio=value) for a in made.arms),
        measures=tuple(map(spoilt, made.measures)),
        curves=tuple(
            replace(c, mean=(number,) * 12, low=(number,) * 12, high=(number,) * 12)
            for c in made.curves
        ),
        grid=tuple(replace(c, metric=number, low=number, high=number) for c in made.grid),
        target=value,
        seconds=number,
        environment=None,
    )


def nothing() -> Comparison:
    """No arm, no seed, no figure."""
    made = everything_diverged()
    return replace(made, arms=(), seeds=(), grid=(), claims=(), notes=(), environment=None)


EVERY = {
    "normal": normal,
    "two arms": two_arms,
    "all sweeps": all_sweeps,
    "regression": regression,
    "everything diverged": everything_diverged,
    "partial": partial,
    "hostile": hostile,
    "nan": broken,
    "inf": lambda: broken(math.inf),
    "minus inf": lambda: broken(-math.inf),
    "none": lambda: broken(None),
    "nothing": nothing,
}
