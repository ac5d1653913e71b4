"""Layers that differ only in their numbers, as one row: ``layer1.0-2.conv1-2``."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

T = TypeVar("T")

_NUMBER = re.compile(r"\d+")


def without_numbers(text: str) -> str:
    """The text with each number replaced by ``#``."""
    return _NUMBER.sub("#", text)


@dataclass(frozen=True, slots=True)
class Row(Generic[T]):
    """Items that say the same about layers whose paths differ only in numbers.

    Attributes:
        label: The paths in one text, exact: ``"layer1.0-2.conv1"``.
        items: The items, at least one, in their order.
    """

    label: str
    items: tuple[T, ...]

    @property
    def first(self) -> T:
        """The item that stands for the others."""
        return self.items[0]

    @property
    def count(self) -> str:
        """``"×6"`` for six layers, empty for one."""
        return f"×{len(self.items)}" if len(self.items) > 1 else ""


def collapse(
    items: Iterable[T], path: Callable[[T], str], same: Callable[[T], Hashable]
) -> list[Row[T]]:
    """Group items in the order in which their groups begin.

    Args:
        items: Anything about a layer.
        path: The layer's path.
        same: What two items must have in common besides the pattern of their paths.
    """
    groups: dict[Hashable, list[tuple[int, T]]] = {}
    for position, item in enumerate(items):
        groups.setdefault((without_numbers(path(item)), same(item)), []).append((position, item))
    rows = []
    for group in groups.values():
        for label, members in _products([(path(item), i) for i, (_, item) in enumerate(group)]):
            chosen = [group[i] for i in sorted(members)]
            rows.append((chosen[0][0], Row(label, tuple(item for _, item in chosen))))
    return [row for _, row in sorted(rows, key=lambda entry: entry[0])]


_Box: TypeAlias = tuple[tuple[str, ...], ...]


def _products(paths: Sequence[tuple[str, int]]) -> list[tuple[str, list[int]]]:
    """Paths of one pattern as few exact products of numbers: label and members.

    A label stands for every combination of its numbers, so only paths that make up all of them
    are merged: first those that differ in the last number, then in the one before, and so on.
    """
    boxes: dict[_Box, list[int]] = {}
    for text, member in paths:
        boxes.setdefault(tuple((n,) for n in _NUMBER.findall(text)), []).append(member)
    for slot in reversed(range(len(next(iter(boxes))))):
        merged: dict[tuple[_Box, _Box], tuple[_Box, list[int]]] = {}
        for box, members in boxes.items():
            rest = (box[:slot], box[slot + 1 :])
            if rest in merged:
                known, before = merged[rest]
                joined = (*known[:slot], (*known[slot], *box[slot]), *known[slot + 1 :])
                merged[rest] = (joined, before + members)
            else:
                merged[rest] = (box, list(members))
        boxes = dict(merged.values())
    pieces = _NUMBER.split(paths[0][0])
    return [(_label(pieces, box), members) for box, members in boxes.items()]


def _label(pieces: Sequence[str], box: Sequence[Sequence[str]]) -> str:
    text = pieces[0]
    for numbers, piece in zip(box, pieces[1:], strict=True):
        text += ranges(numbers) + piece
    return text


def ranges(numbers: Iterable[str]) -> str:
    """``["0", "1", "2", "5"]`` as ``"0-2,5"``; numbers with leading zeros are listed."""
    texts = sorted(set(numbers), key=lambda text: (int(text), text))
    runs: list[list[str]] = []
    for text in texts:
        follows = runs and int(text) == int(runs[-1][-1]) + 1
        plain = text == str(int(text)) and bool(runs) and runs[-1][-1] == str(int(runs[-1][-1]))
        if follows and plain:
            runs[-1].append(text)
        else:
            runs.append([text])
    parts = [run if len(run) < 2 else [run[0], run[-1]] for run in runs]
    return ",".join("-".join(part) for part in parts)
