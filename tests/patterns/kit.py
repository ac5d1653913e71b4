"""What a pattern is, and the few words that the patterns are written in."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import laws

#: Reasons that may be given, one of them; a single one is a string.
Reasons = str | tuple[str, ...]
#: Any reason will do: the spec leaves it open.
ANY: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A small model whose norms must fold, or must stay for a reason.

    Norms are named as in a plan: by module path, and by owner, γ or mean where they are
    functional. Where several names would be right they are separated by ``|``.

    Attributes:
        name: What it shows.
        make: Builds the model, in eval mode, its statistics hostile; always the same.
        inputs: Builds example inputs.
        options: Options of ``bnify.fold``.
        folds: Norms that must fold.
        skips: Norms that must stay, each with the reason, or the reasons that would be true.
        either: Norms that may fold or stay (or not be listed): only the function counts.
        kind: The kind of every edit; empty where it is left open.
        convolutions: How many convolutions may run afterwards; None where they stay.
        left: How many norms run afterwards; by default as many as stay.
        dtype: What the model is made of before it is folded.
        note: Why, where it is not obvious.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    folds: tuple[str, ...] = ()
    skips: Mapping[str, Reasons] = field(default_factory=dict)
    either: Mapping[str, Reasons] = field(default_factory=dict)
    kind: str = ""
    convolutions: int | None = None
    left: int | None = None
    dtype: torch.dtype = torch.float64
    note: str = ""

    @property
    def norms(self) -> tuple[str, ...]:
        """Every norm that the pattern speaks of."""
        return (*self.folds, *self.skips, *self.either)


class Net(nn.Module):
    """Parts by name, and a forward that is written beside them."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


class Line(nn.Module):
    """Parts one after the other: modules, and functions of one value."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.order = list(parts)
        self.functions = {n: p for n, p in parts.items() if not isinstance(p, nn.Module)}
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)

    def forward(self, x: Any) -> Any:
        for name in self.order:
            x = self.functions[name](x) if name in self.functions else getattr(self, name)(x)
        return x


def draw(*shape: int) -> Callable[[], Tensor]:
    """Example inputs N(0, 1)."""
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(7))


def ids(high: int, *shape: int) -> Callable[[], Tensor]:
    """Integers below ``high``, every one of them seen if there is room."""
    return lambda: (torch.arange(torch.Size(shape).numel()) * 5 % high).view(shape)


def both(*makers: Callable[[], Any]) -> Callable[[], tuple[Any, ...]]:
    """Several positional inputs."""
    return lambda: tuple(make() for make in makers)


IMAGE = draw(3, 4, 8, 8)
SIGNAL = draw(3, 4, 9)
VECTOR = draw(3, 6)
TOKENS = draw(3, 5, 6)


def values(*shape: int) -> nn.Parameter:
    """A parameter N(0, 1) from the current seed."""
    return nn.Parameter(torch.randn(*shape))


def net(forward: Callable[..., Any], **parts: Callable[[], Any]) -> Callable[[], Net]:
    """What builds a network with ``conv`` (4 to 6 channels), ``bn`` and other parts."""

    def build() -> Net:
        made = {name: part() for name, part in parts.items()}
        return Net(forward, conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6), **made)

    return build


def bn2(channels: int = 6) -> Callable[[], nn.Module]:
    return lambda: nn.BatchNorm2d(channels)


def conv2(*shape: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*shape, **options)


def pattern(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Callable[[], Any] = IMAGE,
    folds: str | tuple[str, ...] = (),
    skips: Mapping[str, Reasons] | None = None,
    tune: Callable[[Any], Any] | None = None,
    **more: Any,
) -> Pattern:
    """A pattern from what builds its model.

    Args:
        name: See :class:`Pattern`.
        build: Builds the model; it is seeded, and its norms are made hostile afterwards.
        inputs: See :class:`Pattern`.
        folds: One name, or several.
        skips: See :class:`Pattern`.
        tune: Changes the hostile model once more, for conditions on values.
        **more: Other fields of :class:`Pattern`.
    """

    def make() -> nn.Module:
        seed = zlib.crc32(name.encode())
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = build().eval()
            laws.hostile_(model, seed)
            if tune is not None:
                tune(model)
        return model

    folded = (folds,) if isinstance(folds, str) else folds
    return Pattern(name=name, make=make, inputs=inputs, folds=folded, skips=skips or {}, **more)


# -- conditions on values, for ``tune`` ------------------------------------------------------------


def positive(*names: str) -> Callable[[nn.Module], None]:
    """Every scale of these norms is positive."""

    def tune(model: nn.Module) -> None:
        for name in names or ("bn",):
            weight = model.get_submodule(name).weight
            weight.abs_().clamp_(min=0.3)

    return tune


def shiftless(*names: str) -> Callable[[nn.Module], None]:
    """The shift of these norms is exactly 0: β = 0 and mean = 0."""

    def tune(model: nn.Module) -> None:
        for name in names or ("bn",):
            norm = model.get_submodule(name)
            norm.bias.zero_()
            norm.running_mean.zero_()

    return tune
