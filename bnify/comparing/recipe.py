"""A model that can be built again and again from a seed, here or in another process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bnify.borrow import copy_model, seeded
from bnify.errors import SpecError
from bnify.spec import model_factory
from bnify.spec.usercode import a_type, call_factory


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a model is built of.

    Attributes:
        source: A SPEC, a class or factory, or a network whose weights every run starts from.
        arguments: Keyword arguments of the class or factory.
    """

    source: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For titles: the SPEC, or the name of the class or factory."""
        if isinstance(self.source, str):
            return self.source
        named = type(self.source) if isinstance(self.source, nn.Module) else self.source
        return getattr(named, "__name__", type(named).__name__)

    def factory(self) -> Callable[[int], nn.Module]:
        """What builds a fresh model from a seed; code is loaded once.

        Raises:
            UsageError: The SPEC cannot be right.
            SpecError: It gives no model.
        """
        source = self.source
        if isinstance(source, str):
            return model_factory(source, self.arguments)
        if isinstance(source, nn.Module):
            return lambda _: copy_model(source)
        if not callable(source):
            raise SpecError(
                f"the model is {a_type(source)}",
                hint="pass a class, a factory, a network, or a SPEC such as 'net.py:MyNetwork'",
            )

        def build(seed: int) -> nn.Module:
            with seeded(seed):
                made = call_factory(source, self.arguments, self.name)
            if not isinstance(made, nn.Module):
                raise SpecError(f"{self.name} gives {a_type(made)}, not an nn.Module")
            return made

        return build

    def fixed(self) -> bool:
        """Whether two seeds give the same initial weights, as those of a network given as such."""
        build = self.factory()
        first, second = (dict(build(seed).named_parameters()) for seed in (0, 1))
        return all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def scale_weights(model: nn.Module, factor: float) -> None:
    """Multiply the weights (two or more dimensions), not biases, scales and shifts, in place."""
    if factor != 1:
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(factor)
