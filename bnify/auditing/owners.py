"""Whose statistics an operator reads: the norms of a working copy, by their tensors and modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from bnify.auditing.live import Live
from bnify.capture import tensor_at


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """A norm whose arithmetic is its module's own: it is measured by a hook."""

    path: str
    module: Any


class Norms:
    """The norms of a working copy, by the tensors and modules that they are known by.

    Args:
        live: The model under audit.
        working: A copy of the model.
        constant: Paths of norms that have no train mode: look-alikes that hold constants.
    """

    def __init__(self, live: Live, working: nn.Module, constant: frozenset[str]) -> None:
        self.working = working
        self.constant = constant
        self.by_tensor: dict[int, str] = {}
        #: Names of the running mean and variance of each norm.
        self.names: dict[str, tuple[str, str]] = {}
        self.modules: list[Written] = []
        for norm in live.norms:
            module: Any = working.get_submodule(norm.path)
            self.modules.append(Written(norm.path, module))
            if norm.tracked:
                dot = f"{norm.path}." if norm.path else ""
                self.names[norm.path] = (f"{dot}running_mean", f"{dot}running_var")
            for tensor in (module._buffers.get("running_mean"), module._parameters.get("weight")):
                if tensor is not None:
                    self.by_tensor.setdefault(id(tensor), norm.path)
        for use in live.uses:
            node = use.source.tensors.get("mean", use.source.tensors.get("weight"))
            if use.of_batch and node is not None and node.op == "get_attr":
                tensor = tensor_or_none(working, str(node.target))
                if tensor is not None:
                    self.by_tensor.setdefault(id(tensor), use.layer)
                self._name(use.layer, use.source.tensors)

    def owner(self, given: Mapping[str, Any]) -> str | None:
        """Path of the norm that an operator with these arguments is; None where it is none known.

        Args:
            given: The operator's arguments by name.
        """
        tensors = (given.get(key) for key in ("running_mean", "weight"))
        found = (self.by_tensor.get(id(tensor)) for tensor in tensors)
        return next((path for path in found if path is not None), None)

    def _name(self, path: str, tensors: Mapping[str, fx.Node]) -> None:
        found = [tensors[role] for role in ("mean", "var") if role in tensors]
        if len(found) == 2 and all(node.op == "get_attr" for node in found):
            mean, var = (str(node.target) for node in found)
            if all(tensor_or_none(self.working, name) is not None for name in (mean, var)):
                self.names.setdefault(path, (mean, var))


def tensor_or_none(model: nn.Module, name: str) -> Tensor | None:
    """A tensor of a model by its name; None for a constant of the recording."""
    try:
        return tensor_at(model, name)
    except AttributeError:
        return None
