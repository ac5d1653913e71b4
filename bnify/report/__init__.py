"""Any result as text: for a person (rich), a program (json) or a pull request (md)."""

from __future__ import annotations

from bnify.report.render import Format, Style, render, render_error

__all__ = ["Format", "Style", "render", "render_error"]
