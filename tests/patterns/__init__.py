"""Named patterns of folding: small models whose norms must fold, or must stay for a reason."""

from __future__ import annotations

from patterns.affines import AFFINE_TAILS
from patterns.asked import ASKED
from patterns.backward import BACKWARD
from patterns.forward import FORWARD
from patterns.joins import JOINS, LAYOUTS
from patterns.kit import Pattern
from patterns.passages import PASSAGES
from patterns.refusals import REFUSALS
from patterns.sharing import MORE_THAN_A_NORM, SHARING
from patterns.sources import SOURCES

PATTERNS: tuple[Pattern, ...] = (
    *SOURCES,
    *BACKWARD,
    *FORWARD,
    *PASSAGES,
    *JOINS,
    *LAYOUTS,
    *REFUSALS,
    *SHARING,
    *MORE_THAN_A_NORM,
    *AFFINE_TAILS,
    *ASKED,
)

__all__ = ["PATTERNS", "Pattern"]
