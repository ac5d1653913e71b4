"""Watching the norms of a model while it is trained."""

from __future__ import annotations

from bnify.watching.watcher import Watcher, watch

__all__ = ["Watcher", "watch"]
