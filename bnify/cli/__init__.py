"""The ``bnify`` command. Nothing here imports torch: verbs do, when they run."""

from __future__ import annotations

from bnify.cli.run import main

__all__ = ["main"]
