"""``bnify doctor``: what is installed, what computes where, and what is missing."""

from __future__ import annotations

import typer

from bnify.cli import options as o
from bnify.cli.session import Session


def doctor(
    ctx: typer.Context,
    fmt: o.FormatOption = o.Form.RICH,
    color: o.ColorOption = o.Color.AUTO,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,  # noqa: ARG001 - read before parsing, so that it holds for usage errors
) -> int:
    """Show versions, execution providers and devices, and what is missing.

    Ends with 3 when something is missing that bnify needs.

    Example: bnify doctor
    """
    session = Session(ctx, fmt=fmt, color=color, quiet=quiet, verbose=verbose)
    with session.work():
        from bnify.doctor import examine

        with session.step("looking around"):
            found = examine()
    session.emit(found)
    return 0 if found["ok"] else 3
