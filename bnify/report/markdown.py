"""A report as Markdown, for a pull request or a summary of a CI job."""

from __future__ import annotations

import re
from itertools import groupby

from bnify.report.document import (
    Block,
    Code,
    Column,
    Document,
    Facts,
    Items,
    Paragraph,
    Prose,
    Table,
    Verdict,
)
from bnify.report.terminal import clean


def to_markdown(document: Document) -> str:
    """The document as GitHub-flavoured Markdown."""
    parts = [f"# {_escaped(document.title)}", *(_block(block) for block in document.blocks)]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return _escaped(text)
        case Verdict(mark, text):
            return f"**{mark.value}** {_escaped(text)}"
        case Prose(title, text):
            heading = f"## {_escaped(title)}\n\n" if title else ""
            return heading + _prose(text)
        case Items(title, items):
            return "\n".join([f"## {_escaped(title)}\n", *(f"- {_escaped(i)}" for i in items)])
        case Facts(title, pairs):
            lines = [f"- {_escaped(name)}: {_code(value)}" for name, value in pairs]
            return "\n".join([f"## {_escaped(title)}\n", *lines])
        case Code(title, language, text):
            fence = _fence(text)
            body = clean(text).rstrip("\n")
            return f"## {_escaped(title)}\n\n{fence}{language}\n{body}\n{fence}"
        case Table():
            return _table(block)


def _prose(text: str) -> str:
    """Paragraphs with inline code; indented lines become a block of code."""
    parts: list[str] = []
    for is_code, lines in groupby(text.split("\n"), key=lambda line: line.startswith("    ")):
        if is_code:
            body = "\n".join(clean(line.removeprefix("    ")) for line in lines)
            parts.append(f"{_fence(body)}python\n{body}\n{_fence(body)}")
        else:
            parts += [_spans(line) for line in lines]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).strip("\n")


def _spans(line: str) -> str:
    """A paragraph in which ``names`` are code."""
    pieces = re.split(r"``(.+?)``", line)
    return "".join(_code(p) if i % 2 else _escaped(p) for i, p in enumerate(pieces))


def _table(table: Table) -> str:
    head = "| " + " | ".join(_escaped(column.name) for column in table.columns) + " |"
    rule = "| " + " | ".join("---:" if c.numeric else "---" for c in table.columns) + " |"
    rows = []
    for row in table.rows:
        cells = [_cell(text, column) for text, column in zip(row, table.columns, strict=True)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"## {_escaped(table.title)}\n", head, rule, *rows])


def _cell(text: str, column: Column) -> str:
    return (_code(text) if column.code else _escaped(text)).replace("\n", " ")


def _escaped(text: str) -> str:
    """Text whose characters mean themselves."""
    text = re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", clean(text))
    return text.replace("\n", " ")


def _code(text: str) -> str:
    """Text as inline code, backticks and bars of its own included."""
    text = clean(text).replace("|", "\\|").replace("\n", " ")
    if not text:
        return ""
    fence = _fence(text, shortest=1)
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def _fence(text: str, shortest: int = 3) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(shortest, longest + 1)
