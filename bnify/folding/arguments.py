"""What an operator was called with, by the names of its schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from bnify import ops


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound |= dict(zip((a.name for a in schema.arguments), node.args, strict=False))
    return {name: number(value) for name, value in (bound | dict(node.kwargs)).items()}


def number(value: Any) -> Any:
    """A value with the recorded number for each node that stands for a symbolic one."""
    if isinstance(value, fx.Node) and "number" in value.meta:
        return value.meta["number"]
    if isinstance(value, (list, tuple)):
        return type(value)(number(item) for item in value)
    return value


def rerun(node: fx.Node, replacement: Callable[[fx.Node], Tensor]) -> Any:
    """Run an operator again with other tensors for the values that it reads."""

    def fill(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return value.meta["number"] if "number" in value.meta else replacement(value)
        if isinstance(value, (list, tuple)):
            return type(value)(fill(item) for item in value)
        if isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        return value

    target: Any = node.target
    with torch.no_grad():
        return target(*fill(tuple(node.args)), **fill(dict(node.kwargs)))


def place_of(node: fx.Node) -> str:
    """Where in the model an operator is, for people: ``"layer1.0.add"``."""
    if node.op == "output":
        return "the output"
    module = node.meta.get("module", "")
    name = ops.name_of(node) if node.op == "call_function" else str(node.target)
    return f"{module}.{name}" if module and node.op == "call_function" else name
