"""What norms and layers of an ONNX file are called: module paths where the exporter left some."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from bnify.auditing.onnx_constants import root
from bnify.auditing.onnx_graph import Op, Value
from bnify.auditing.onnx_reading import shown

#: Last parts of the names of a module's tensors, of several frameworks.
_PARTS: Final = frozenset(
    {"running_mean", "running_var", "weight", "bias", "moving_mean", "moving_variance"}
    | {"gamma", "beta", "scale", "mean", "var", "variance", "kernel"}
)


#: Names that exporters give to constants.
_MADE_UP: Final = re.compile(r"(val|_v|const|Constant)_?\d+|onnx::.*|\d+|/.*")


def place_of(op: Op, tensors: Sequence[Value | None]) -> str:
    """Name of the module that an operator comes from.

    The owner of its stored tensors comes first, unless the exporter's scope says that the operator
    ran elsewhere: an optimiser lets norms with equal numbers share one tensor.

    Args:
        op: The operator.
        tensors: Its tensors, the one that tells most first.

    Returns:
        A module path (of a norm in the root's own forward the name of a tensor), else the
        operator's own name, else that of its output.
    """
    owner = next((name for name in map(owner_of, tensors) if name), "")
    scope = op.scope or ""
    if owner and (not scope or f"{owner}.".startswith(f"{scope}.")):
        return shown(owner)
    if scope:
        return shown(scope)
    # In the root's own forward a tensor says more than torch's number of the operator.
    own = next(filter(None, map(_parameter, tensors)), "") if op.scope == "" else ""
    result = op.result
    return shown(own or op.name or (result.name if result is not None else "") or op.kind)


def _parameter(value: Value | None) -> str:
    """Name of a stored tensor that is no part of a module, unless an exporter made it up."""
    stored = root(value)
    if stored is None or stored.op is not None or stored.tensor is None:
        return ""
    return "" if _MADE_UP.fullmatch(stored.name) else stored.name


def owner_of(value: Value | None) -> str:
    """Path of the module that owns a stored tensor: ``layer1.0.bn1`` of its running mean.

    The name nearest to the reader counts: where tensors with equal numbers are stored once, an
    Identity gives them back the name that they had.
    """
    if root(value) is None:
        return ""
    while value is not None:
        path, leaf = split(value.name)
        if path and leaf in _PARTS:
            return path
        value = value.op.input(0) if value.op is not None else None
    return ""


def split(name: str) -> tuple[str, str]:
    """Owner and last part of the name of a tensor."""
    path, _, leaf = name.replace("/", ".").rpartition(".")
    return path, leaf


class Names:
    """Gives each name once; what comes again gets a number."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def unique(self, name: str) -> str:
        """The name, or ``name#2`` where it is taken."""
        found, number = name, 2
        while found in self._taken:
            found, number = f"{name}#{number}", number + 1
        self._taken.add(found)
        return found
