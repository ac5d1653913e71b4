"""What the reports on insertions and folds share: rows for layers that are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from bnify.plan import Skip
from bnify.report.document import Column, Table
from bnify.report.repeats import Row, collapse, without_numbers

#: Rows above which layers of different widths share one.
MANY: Final = 24


def skip_table(skips: tuple[Skip, ...], what: str) -> Table:
    """What is left alone, and why; ``what`` is the heading of its paths."""

    def alike(skip: Skip) -> tuple[Any, ...]:
        return (skip.layer_type, skip.reason, without_numbers(skip.detail))

    return Table(
        "Left alone",
        (
            Column(what, code=True),
            Column("", short=True),
            Column("Type", short=True),
            Column("Reason", short=True),
            Column("Why"),
        ),
        tuple(_skip_row(row) for row in collapse(skips, lambda skip: skip.layer, alike)),
    ).without_empty_columns()


def _skip_row(row: Row[Skip]) -> tuple[str, ...]:
    skip = row.first
    detail = example([item.detail for item in row.items])
    why = f"{skip.reason.sentence}: {detail}" if detail else skip.reason.sentence
    return (row.label or "(root)", row.count, skip.layer_type, skip.reason.value, why)


def example(texts: Sequence[str]) -> str:
    """The text that several layers share, or the first one's where they differ by numbers."""
    return texts[0] if len(set(texts)) == 1 else f"for example {texts[0]}"


def span(numbers: Sequence[int]) -> str:
    """``"64"`` or ``"64 to 512"``."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
