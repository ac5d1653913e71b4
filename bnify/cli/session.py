"""One run of a verb: its streams, its words on stderr, its result on stdout."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

import typer

from bnify.cli.streams import Streams, wants_color, wants_progress


class Session:
    """What every verb needs besides its own options.

    Args:
        ctx: Typer's context; its ``obj`` holds the streams.
        fmt: ``rich``, ``json`` or ``md``.
        color: ``auto``, ``always`` or ``never``.
        quiet: Say nothing on stderr but errors.
        verbose: Say more: warnings of the libraries, the exporter's own output.
    """

    def __init__(
        self, ctx: typer.Context, *, fmt: str, color: str, quiet: bool, verbose: bool
    ) -> None:
        streams: Streams = ctx.obj
        self.streams = streams
        self.fmt = fmt
        self.quiet = quiet
        self.verbose = verbose
        self.color = wants_color(color, terminal=streams.is_terminal(), environment=os.environ)
        self._shown = wants_progress(quiet=quiet, stream=streams.error, environment=os.environ)
        self._said: set[str] = set()
        self._status: Any = None

    @contextmanager
    def work(self) -> Iterator[None]:
        """User code may run inside: what it prints goes to stderr, warnings become one line."""
        before = warnings.showwarning
        with ExitStack() as stack:
            stack.enter_context(redirect_stdout(self.streams.error))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("default")
            warnings.showwarning = self._warned
            try:
                yield
            finally:
                warnings.showwarning = before

    def _warned(
        self, message: Warning | str, category: type[Warning], *_where: object, **_more: object
    ) -> None:
        """A warning as one line; those for the authors of libraries only with ``-v``."""
        for_authors = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning)
        if issubclass(category, for_authors) and not self.verbose:
            return
        self.warn(" ".join(str(message).split()))

    def note(self, text: str) -> None:
        """Something worth knowing, once."""
        self._say_once(f"note: {text}")

    def warn(self, text: str) -> None:
        """Something that may be wrong, once."""
        self._say_once(f"warning: {text}")

    def detail(self, text: str) -> None:
        """Something for ``-v``."""
        if self.verbose and text.strip():
            self.streams.say(text.rstrip())

    def _say_once(self, text: str) -> None:
        if not self.quiet and text not in self._said:
            self._said.add(text)
            self.streams.say(text)

    @contextmanager
    def step(self, doing: str) -> Iterator[None]:
        """Show what is being done while it lasts, to a person at a terminal."""
        if not self._shown:
            yield
            return
        from rich.console import Console

        with Console(file=self.streams.error, highlight=False).status(f"{doing} ...") as status:
            self._status = status
            try:
                yield
            finally:
                self._status = None

    def doing(self, what: str) -> None:
        """Show a further word on the step that is being done."""
        if self._status is not None:
            self._status.update(f"{what} ...")

    def emit(self, result: Any, **about: Any) -> None:
        """Write the report on a result to stdout."""
        from bnify.report import render

        self.streams.emit(
            render(
                result,
                self.fmt,
                width=self.streams.width(),
                color=self.color,
                encoding=self.streams.encoding,
                **about,
            )
        )
