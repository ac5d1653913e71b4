"""What a verification of a fold is given: the fold again in float64, and what is handed out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import fx, nn

from bnify.capture import Captured


class Refolds(Protocol):
    """A fold on float64 copies."""

    captured: Captured
    as_graph: bool
    wide: bool
    why_narrow: str

    @property
    def baked(self) -> str:
        """Why a recording need not be the model on other inputs; empty where it is."""

    def original(self) -> nn.Module:
        """The original."""

    def narrow(self, why: str) -> None:
        """From now on everything is in the model's own dtype."""

    def tree(self, *, keep: bool = False) -> nn.Module:
        """The folded model, made of the original, which is gone then unless ``keep``."""

    def graph(self) -> fx.GraphModule:
        """The folded recording."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """What will be handed out, in the model's own dtype.

    Attributes:
        model: The folded model, or the folded recording where that is the result.
        graph: The folded recording, to be compared with the model.
    """

    model: nn.Module
    graph: Callable[[], fx.GraphModule]
