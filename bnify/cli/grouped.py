"""``--help`` in sections, in plain text: quick to start, and readable in any terminal."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

_OTHER = "General"


class GroupedCommand(TyperCommand):
    """A command whose options are listed under the headings they were declared with."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options section by section, in the order of their declaration."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            is_argument = parameter.param_type_name == "argument"
            panel = getattr(parameter, "rich_help_panel", None) or _OTHER
            sections.setdefault("Arguments" if is_argument else panel, []).append(record)
        general = sections.pop(_OTHER, [])
        for heading, records in (*sections.items(), (_OTHER, general)):
            with formatter.section(heading):
                formatter.write_dl(records)
