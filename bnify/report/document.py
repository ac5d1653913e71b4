"""What a report says, before anything decides how it looks: blocks of plain text."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column.

    Attributes:
        name: Its heading.
        numeric: Aligned to the right and never wrapped.
        code: Holds names from the user's code.
        short: Never wrapped.
    """

    name: str
    numeric: bool = False
    code: bool = False
    short: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings; a column without any content is not shown."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    def without_empty_columns(self) -> Table:
        """The same table without the columns that no row fills."""
        used = [i for i, _ in enumerate(self.columns) if any(row[i] for row in self.rows)]
        return Table(
            self.title,
            tuple(self.columns[i] for i in used),
            tuple(tuple(row[i] for i in used) for row in self.rows),
        )


@dataclass(frozen=True, slots=True)
class Items:
    """A short list of sentences."""

    title: str
    items: tuple[str, ...]


class Mark(StrEnum):
    """A verdict in one word, which never depends on colour."""

    PASS = "PASS"
    FAIL = "FAIL"
    NONE = "NOT VERIFIED"
    UNDECIDED = "UNDECIDED"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The one line that a reader in a hurry reads."""

    mark: Mark
    text: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A sentence or two."""

    text: str


@dataclass(frozen=True, slots=True)
class Prose:
    """Paragraphs, a line each; names from code stand in double backticks, code is indented by 4.

    Attributes:
        title: A heading, or empty.
        text: The paragraphs; ``- `` begins an item of a list.
    """

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values, one pair a line."""

    title: str
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Code:
    """Text in a language, shown as it is."""

    title: str
    language: str
    text: str


Block: TypeAlias = "Table | Items | Verdict | Paragraph | Prose | Facts | Code"


@dataclass(frozen=True, slots=True)
class Document:
    """A report: a title and its blocks in order."""

    title: str
    blocks: tuple[Block, ...]
