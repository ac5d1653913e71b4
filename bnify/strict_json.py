"""JSON that any reader takes: ``inf`` and ``nan`` have no JSON number, so they become strings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def dumps(data: Any) -> str:
    """The data as indented JSON with a newline at its end; what JSON lacks is written as text."""
    return json.dumps(_strict(data), indent=2, allow_nan=False) + "\n"


def _strict(tree: Any) -> Any:
    if isinstance(tree, float):
        return tree if tree - tree == 0 else str(tree)
    if isinstance(tree, Mapping):
        return {str(key): _strict(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_strict(value) for value in tree]
    return tree if tree is None or isinstance(tree, (bool, int, str)) else str(tree)
