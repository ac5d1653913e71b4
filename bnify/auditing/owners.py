"""Whose statistics an operator reads: the norms of a working copy, by their tensors and modules."""

from __future__ import annotations

from collections import defaultdict
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
        #: Names of the running mean and variance of each norm.
        self.names: dict[str, tuple[str, str]] = {}
        #: Norms whose running mean is another's, and that other one.
        self.sharing: dict[str, str] = {}
        self._by_mean: dict[int, str] = {}
        self._by_scale: defaultdict[int, set[str]] = defaultdict(set)
        #: An id is that of one tensor for as long as it lives: forward() may put another in place.
        self._held: list[Tensor] = []
        self.modules: list[Written] = []
        for norm in live.norms:
            module: Any = working.get_submodule(norm.path)
            self.modules.append(Written(norm.path, module))
            if norm.tracked:
                dot = f"{norm.path}." if norm.path else ""
                self.names[norm.path] = (f"{dot}running_mean", f"{dot}running_var")
            mean, scale = module._buffers.get("running_mean"), module._parameters.get("weight")
            if mean is not None:
                first = self._is_mean_of(mean, norm.path)
                if first != norm.path and norm.tracked:
                    self.sharing[norm.path] = first
            if scale is not None:
                self._is_scale_of(scale, norm.path)
        for use in live.uses:
            role = "mean" if "mean" in use.source.tensors else "weight"
            node = use.source.tensors.get(role)
            if use.of_batch and node is not None and node.op == "get_attr":
                tensor = tensor_or_none(working, str(node.target))
                if tensor is not None and role == "mean":
                    self._is_mean_of(tensor, use.layer)
                elif tensor is not None:
                    self._is_scale_of(tensor, use.layer)
                self._name(use.layer, use.source.tensors)

    def owner(self, given: Mapping[str, Any], inside: str | None = None) -> str | None:
        """Path of the norm that an operator with these arguments is; None where it is none known.

        Statistics tell norms apart, and so does the module that runs; a scale may be shared.

        Args:
            given: The operator's arguments by name.
            inside: Path of the innermost norm module that is running.
        """
        found = self.by_mean(given)
        if found is not None or inside is not None:
            return inside if found is None else found
        owners = self._by_scale.get(id(given.get("weight")), set())
        return next(iter(owners)) if len(owners) == 1 else None

    def by_mean(self, given: Mapping[str, Any]) -> str | None:
        """Path of the norm that keeps the running mean among these arguments; None for no known."""
        return self._by_mean.get(id(given.get("running_mean")))

    def _is_mean_of(self, tensor: Tensor, path: str) -> str:
        self._held.append(tensor)
        return self._by_mean.setdefault(id(tensor), path)

    def _is_scale_of(self, tensor: Tensor, path: str) -> None:
        self._held.append(tensor)
        self._by_scale[id(tensor)].add(path)

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
