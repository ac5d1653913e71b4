"""``bnify explain``: the page of an audit rule, offline."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from bnify.cli import options as o
from bnify.cli.session import Session
from bnify.errors import UsageError


def explain(
    ctx: typer.Context,
    rule: Annotated[
        Optional[str],  # noqa: UP045 - typer reads the annotation at run time
        typer.Argument(metavar="[CODE]", help="BN102, or stats-never-updated.", show_default=False),
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="A table of all rules.", rich_help_panel=o.RULES),
    ] = False,
    fmt: o.FormatOption = o.Form.RICH,
    color: o.ColorOption = o.Color.AUTO,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,  # noqa: ARG001 - read before parsing, so that it holds for usage errors
) -> None:
    """Say what a rule of bnify audit checks, why it is bad, and how to fix it.

    Example: bnify explain BN102
    """
    session = Session(ctx, fmt=fmt, color=color, quiet=quiet, verbose=verbose)
    if (rule is None) != every:
        raise UsageError(
            "give one rule, or --all", hint="bnify explain BN102, or bnify explain --all"
        )
    from bnify.auditing.pages import find_rule, page_of
    from bnify.auditing.rules import RULES
    from bnify.report.audited import render_page
    from bnify.report.pages import page_document, rules_document

    head = {"schema": 1, "verb": "explain"}
    if rule is not None:
        page = page_of(find_rule(rule))
        document, data = page_document(page), {**head, "rule": page.to_dict()}
    else:
        document = rules_document(RULES)
        data = {**head, "rules": [page_of(one).to_dict() for one in RULES]}
    session.streams.emit(
        render_page(
            document,
            data,
            fmt,
            width=session.streams.width(),
            color=session.color,
            encoding=session.streams.encoding,
        )
    )
