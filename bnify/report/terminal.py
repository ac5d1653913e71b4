"""A report for a terminal: tables that fit 80 columns, ASCII where the output needs it."""

from __future__ import annotations

import io
import re
import unicodedata
from dataclasses import dataclass, replace
from typing import Final

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from bnify.report.document import (
    Block,
    Code,
    Document,
    Facts,
    Items,
    Mark,
    Paragraph,
    Prose,
    Table,
    Verdict,
)

_ASCII_LINES: Final = box.Box(
    "    \n    \n -- \n    \n    \n    \n    \n    \n",
    ascii=True,
)
_ASCII_CHARACTERS: Final = str.maketrans(
    {
        "×": "x", "–": "-", "—": "-", "…": "...", "‖": "||", "≤": "<=", "≥": ">=", "√": "sqrt",
        "−": "-", "·": "*", "→": "->", "←": "<-", "γ": "gamma", "β": "beta", "ε": "eps",
        "σ": "sigma", "μ": "mu", "µ": "u", "²": "^2", "₂": "2", "\u2018": "'", "\u2019": "'",
        "\u201c": '"', "\u201d": '"', "\u00a0": " ", "±": "+/-",
    }
)  # fmt: skip
_MARK_STYLES: Final = {
    Mark.PASS: "bold green",
    Mark.FAIL: "bold red",
    Mark.NONE: "bold yellow",
    Mark.UNDECIDED: "bold yellow",
}
_WORD_STYLES: Final = {
    "pass": "green",
    "FAIL": "bold red",
    "undecided": "yellow",
    "error": "bold red",
    "warning": "yellow",
    "info": "cyan",
}


def to_terminal(document: Document, *, width: int, color: bool, encoding: str) -> str:
    """The document as text, lines no longer than ``width``.

    Args:
        document: What to say.
        width: Columns of the terminal.
        color: Add ANSI colours.
        encoding: Of the output; characters that it lacks are replaced by readable ones.
    """
    ascii_only = not encodes("─×✓", encoding)
    out = io.StringIO()
    console = Console(
        file=out,
        width=max(width, 20),
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=not color,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
        _environ={},
    )
    console.print(Text(_plain(document.title, ascii_only), style="bold"))
    for block in document.blocks:
        console.print()
        for part in _parts(block, ascii_only, width):
            # Code keeps its lines: it is there to be copied.
            console.print(part, soft_wrap=isinstance(block, Code))
    text = out.getvalue()
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def encodes(characters: str, encoding: str) -> bool:
    """Whether the encoding has all of these characters."""
    try:
        characters.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def clean(text: str) -> str:
    """Text from user code without control characters, which could drive the terminal."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") else "�" for c in text
    )


def fitted(text: str, encoding: str) -> str:
    """Text without control characters, and without what the encoding lacks."""
    text = _plain(text, not encodes(text, encoding))
    return text if encodes(text, encoding) else text.encode(encoding, "replace").decode(encoding)


def _plain(text: str, ascii_only: bool) -> str:
    text = clean(text)
    return text.translate(_ASCII_CHARACTERS).replace("�", "?") if ascii_only else text


def _parts(block: Block, ascii_only: bool, width: int) -> list[RenderableType]:
    match block:
        case Paragraph(text):
            return [Text(_plain(text, ascii_only))]
        case Verdict(mark, text):
            line = Text(mark.value, style=_MARK_STYLES[mark])
            return [line.append(f"  {_plain(text, ascii_only)}", style="default")]
        case Prose(title, text):
            paragraphs = [_prose(_plain(line, ascii_only)) for line in text.split("\n")]
            return [_heading(title, ascii_only), *paragraphs] if title else paragraphs
        case Items(title, items):
            lines: list[RenderableType] = [_heading(title, ascii_only)]
            lines += [_item(_plain(item, ascii_only)) for item in items]
            return lines
        case Facts(title, pairs):
            grid = RichTable.grid(padding=(0, 2))
            grid.add_column(no_wrap=True)
            grid.add_column(overflow="fold")
            for name, value in pairs:
                grid.add_row(_plain(name, ascii_only), _plain(value, ascii_only))
            return [_heading(title, ascii_only), Padding(grid, (0, 0, 0, 2))]
        case Code(title, _, text):
            return [_heading(title, ascii_only), Text(_plain(text, ascii_only))]
        case Table():
            drawn = next((t for t in (block, _tight(block)) if _least_width(t) <= width), None)
            heading = _heading(block.title, ascii_only)
            if drawn is not None:
                return [heading, _table(drawn, ascii_only, width)]
            return [heading, *_stacked(block, ascii_only)]


def _heading(title: str, ascii_only: bool) -> Text:
    return Text(_plain(title, ascii_only), style="bold cyan")


def _prose(line: str) -> RenderableType:
    """A paragraph, an item or a line of code; code keeps its indentation."""
    body = line.lstrip()
    if body.startswith("- ") and line == body:
        return _item(body[2:].replace("``", "`"))
    return Padding(Text(body.replace("``", "`")), (0, 0, 0, 2 + len(line) - len(body)))


def _item(text: str) -> RenderableType:
    grid = RichTable.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("-", text)
    return Padding(grid, (0, 0, 0, 2))


_GAP: Final = 3
#: What a column of text needs, and one with whole sentences.
_WRAPPED: Final = 10
_SENTENCES: Final = 24
#: Longer words are broken where a column of text gets narrow.
_LONGEST_WORD: Final = 16
_LONG: Final = 100
_PIECES: Final = re.compile(r"[^., /]*(?:[., /]+|$)")


@dataclass(frozen=True, slots=True)
class _Path:
    """A path, broken behind its dots where it must be."""

    text: str

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(_longest_piece(self.text), max(len(self.text), 1))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [""]
        for piece in _PIECES.findall(self.text):
            if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > options.max_width:
                lines.append("")
            lines[-1] += piece
        for line in lines:
            yield Text(line.rstrip(), overflow="fold")


def _longest_piece(text: str) -> int:
    return max(len(piece.rstrip()) for piece in _PIECES.findall(text))


def _table(table: Table, ascii_only: bool, width: int) -> RichTable:
    """The table as rich draws it; no column may take what another one needs at least."""
    spare = width - _least_width(table)
    drawn = RichTable(
        box=_ASCII_LINES if ascii_only else box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        show_edge=False,
        header_style="bold",
    )
    for column, least in zip(table.columns, _least_widths(table), strict=True):
        fixed = column.numeric or column.short
        drawn.add_column(
            _plain(column.name, ascii_only),
            justify="right" if column.numeric else "left",
            no_wrap=fixed,
            overflow="fold",
            min_width=least,
            max_width=None if fixed else least + spare,
        )
    for row in table.rows:
        cells = [_plain(cell, ascii_only) for cell in row]
        drawn.add_row(
            *(
                _Path(cell) if column.code else Text(cell, style=_WORD_STYLES.get(cell, ""))
                for cell, column in zip(cells, table.columns, strict=True)
            )
        )
    return drawn


def _least_widths(table: Table) -> list[int]:
    """The least columns can be without losing anything: text wraps, numbers and words do not."""
    widths = []
    for index, column in enumerate(table.columns):
        heading = max(map(len, column.name.split("\n")))
        widest = max(heading, *(len(row[index]) for row in table.rows))
        least = _SENTENCES if widest > _LONG else _WRAPPED
        if column.code:
            least = max(least, *(_longest_piece(row[index]) for row in table.rows))
        else:
            words = (word for row in table.rows for word in row[index].split())
            least = max(least, min(_LONGEST_WORD, max(map(len, words), default=0)))
        fixed = column.numeric or column.short
        widths.append(widest if fixed else min(widest, least))
    return widths


def _least_width(table: Table) -> int:
    widths = _least_widths(table)
    return sum(widths) + _GAP * (len(widths) - 1)


def _tight(table: Table) -> Table:
    """The table with a line for every word of its headings."""
    columns = tuple(replace(one, name=one.name.replace(" ", "\n")) for one in table.columns)
    return replace(table, columns=columns)


def _stacked(table: Table, ascii_only: bool) -> list[RenderableType]:
    """A table that is too wide for the terminal, as one paragraph a row; indents survive a wrap."""
    lines: list[RenderableType] = []
    for row in table.rows:
        filled: list[str] = []
        for column, cell in zip(table.columns, row, strict=True):
            if cell and column.name:
                filled.append(f"{column.name}: {cell}")
            elif cell:  # it belongs to what stands before it
                filled[-1:] = [f"{filled[-1]}  {cell}" if filled else cell]
        for number, line in enumerate(filled):
            text = Text(_plain(line, ascii_only), overflow="fold")
            lines.append(Padding(text, (0, 0, 0, 4 if number else 2)))
    return lines
