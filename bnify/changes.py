"""What a fold does to a model: tensors that get other values, and changes of the module tree.

Changes are plain data, so that a saved folder can make them again without a recording.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from bnify.algebra import Kernel, scale_, scaled
from bnify.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change of the module tree.

    Attributes:
        kind: ``"identity"``: the module passes its input on. ``"children"``: of the module its
            children ``names`` are left, one after the other. ``"shift"``: it adds a constant of
            this ``shape``, and then come its children ``names``. ``"affine"``: it scales and
            shifts by constants of this ``shape``. ``"zero"``: it returns the number 0.
            ``"bias"``: it gets a bias of this ``shape``. ``"bake"``: its parametrized or hooked
            tensors ``names`` become plain. ``"none"``: its parameters ``names`` become None.
            ``"weight"``: its weight gets this ``shape``, and it the attributes of ``values``.
            ``"clone"``: the place gets a copy of its own of a module that is registered elsewhere
            too. ``"constant"``: its padding gets the ``value`` of ``values``. ``"set"``: its
            attributes get ``values``. ``"float"``: its tensors become float32. ``"keep-eval"``:
            ``train()`` leaves it in eval mode.
        path: Module path.
        names: Names of children or tensors.
        shape: Shape of what is new.
        values: Attributes, JSON-ready.
    """

    kind: str
    path: str
    names: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The change as JSON-ready data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_dict` wrote.

        Raises:
            SpecError: It is no change.
        """
        try:
            return cls(
                kind=data["kind"],
                path=data.get("path", ""),
                names=tuple(data.get("names", ())),
                shape=tuple(data.get("shape", ())),
                values=dict(data.get("values", {})),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise SpecError(f"a change of the model cannot be read: {data!r} ({error})") from None


@dataclass(slots=True)
class Scaled:
    """A weight that is to be multiplied by channel; worked out when it is written.

    Attributes:
        kernel: How the weight is laid out.
        out: Factor of each output channel, float64; None for 1.
        inp: Factor of each input channel, float64; None for 1.
        dense: What is multiplied, float64, where that is no longer the weight itself.
    """

    kernel: Kernel
    out: Tensor | None = None
    inp: Tensor | None = None
    dense: Tensor | None = None

    def scale_in_place(self, weight: Tensor) -> bool:
        """Scale a float64 weight where it is; False where it is another, or rounds."""
        if self.dense is not None or weight.dtype is not torch.float64:
            return False
        if self.out is not None:
            scale_(weight, self.kernel, self.out, "out")
        if self.inp is not None:
            scale_(weight, self.kernel, self.inp, "inp")
        return True

    def of(self, weight: Tensor) -> Tensor:
        """The new weight, float64, on the weight's device."""
        base = weight if self.dense is None else self.dense.to(weight.device)

        def place(factor: Tensor | None) -> Tensor | None:
            return None if factor is None else factor.to(weight.device)

        return scaled(base, self.kernel, place(self.out), place(self.inp))


@dataclass(slots=True)
class Changes:
    """Everything a fold does to a model.

    Attributes:
        weights: Weights to be scaled, by name.
        values: New values of other tensors, float64, by name; some are new themselves.
        tree: Changes of the module tree, in order.
        graph_only: Names of values that the module tree keeps elsewhere.
        neutral: Names of parameters that multiply by 1 or add 0 from now on.
    """

    weights: dict[str, Scaled] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    tree: list[Change] = field(default_factory=list)
    graph_only: set[str] = field(default_factory=set)
    neutral: list[str] = field(default_factory=list)
