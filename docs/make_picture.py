"""Turns the true, coloured output of a command into an SVG of a terminal; used by generate.py."""

from __future__ import annotations

import io

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text


def picture(output: str, command: str, width: int = 96) -> str:
    """An SVG of the command and its output (with ANSI colours), ``width`` columns wide."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold green"), f"bnify {command}"))
    console.print(Text.from_ansi(output))
    return console.export_svg(title="bnify", theme=MONOKAI, unique_id="bnify")
