"""What a report on a comparison says to a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bnify.comparing.comparison import Comparison
from bnify.report.comparison_tables import (
    beyond_interval,
    claims_table,
    diverged_in,
    fit_table,
    metric_table,
    sweep_table,
    training_table,
)
from bnify.report.comparison_words import (
    headline,
    listed,
    machine,
    rate,
    seeds_in_words,
    trained,
    without_figures,
)
from bnify.report.document import Block, Document, Facts, Items, Paragraph, Table
from bnify.report.numbers import seconds


def comparison_document(
    comparison: Comparison, *, files: Mapping[str, str] | None = None
) -> Document:
    """The report on a comparison for a terminal, or as Markdown.

    Args:
        comparison: What was found.
        files: What was written, name → path.
    """
    blocks: list[Block] = [Paragraph(headline(comparison)), *results(comparison)]
    if comparison.claims:
        blocks.append(claims_table(comparison))
    blocks += [table for _, table in sweeps(comparison)]
    blocks += remarks(comparison)
    blocks.append(Facts("Made with", made_with(comparison)))
    if files:
        blocks.append(Facts("Written", tuple(files.items())))
    return Document(f"bnify compare  {comparison.model}", tuple(blocks))


def results(comparison: Comparison) -> list[Block]:
    """The tables of the measures: at each norm's best learning rate, then at an equal one."""
    if not trained(comparison):
        return []
    return [
        *_metric_blocks(comparison, "best-lr"),
        *(t for t in (training_table(comparison), fit_table(comparison)) if len(t.columns) > 1),
        *_metric_blocks(comparison, "equal-lr"),
    ]


def _metric_blocks(comparison: Comparison, setting: str) -> list[Block]:
    """The table of the test metric, and what must be said right under it."""
    table = metric_table(comparison, setting)
    if not table.rows:
        return []
    words = []
    if lost := diverged_in(comparison, setting):
        words.append(f"Diverged here: {lost}; scored as the best constant answer.")
    if odd := beyond_interval(comparison, setting):
        words.append(
            f"The interval of {listed(odd)} leaves out 0, but verdicts are by the sign-flip test "
            "after Holm's correction over the norms, which asks for more."
        )
    return [table, *([Paragraph(" ".join(words))] if words else [])]


def sweeps(comparison: Comparison) -> list[tuple[str, Table]]:
    """The grids as tables, by axis."""
    tables = [(axis, sweep_table(comparison, axis)) for axis in ("lr", "batch", "init")]
    return [(axis, table) for axis, table in tables if table is not None]


def remarks(comparison: Comparison) -> list[Block]:
    """What has to be known of the figures: what is missing, cut or odd."""
    blocks: list[Block] = []
    if comparison.partial:
        blocks.append(Items("Not all runs were done", (comparison.partial,)))
    for title, items in (
        ("Left out", without_figures(comparison)),
        ("Cut to fit the budget", comparison.cuts),
        ("Notes", (*comparison.notes, *_of_arms(comparison))),
    ):
        if items:
            blocks.append(Items(title, tuple(items)))
    return blocks


def _of_arms(comparison: Comparison) -> list[str]:
    """Notes on single arms, and learning rates that were chosen at the end of what was tried."""
    norms: dict[str, list[str]] = {}
    for arm in comparison.arms:
        for note in arm.notes:
            norms.setdefault(note, []).append(arm.norm)
    notes = [f"{', '.join(arms)}: {note}" for note, arms in norms.items()]
    for edge, mark, other in (("lowest", "≤", "lower"), ("highest", "≥", "higher")):
        arms = [f"{a.norm} ({rate(a.best_lr)})" for a in trained(comparison) if a.at_edge == edge]
        if arms:
            notes.append(
                f"{mark}: the best learning rate of {', '.join(arms)} is the {edge} that was "
                f"tried, so a {other} one may be better."
            )
    return notes


def made_with(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    """How the figures came about, in pairs of name and value."""
    environment = comparison.environment or {}
    pairs = [
        ("data", comparison.data),
        ("task", f"{comparison.task}, compared by {comparison.metric}"),
        ("training", f"{comparison.steps} steps of {comparison.batch_size} samples"),
        ("optimizer", comparison.optimizer),
        ("seeds", seeds_in_words(comparison.seeds)),
        ("machine", machine(environment)),
    ]
    if environment.get("seed") is not None:
        pairs.append(("base seed", str(environment["seed"])))
    hashes: Mapping[str, Any] = environment.get("hashes") or {}
    pairs += [(f"{name} SHA-256", str(value)[:16]) for name, value in hashes.items() if value]
    if comparison.seconds > 0:
        pairs.append(("wall clock", seconds(comparison.seconds)))
    return tuple(pairs)
