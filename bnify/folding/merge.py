"""Linear branches and chains that are one layer."""

from __future__ import annotations


def merge_all(draft, waiting, only, without):
    return []
