"""FOLD: norms move through a recording until a linear layer absorbs them."""

from bnify.folding.engine import MERGE, Folded, fold_graph
from bnify.folding.options import FoldOptions
from bnify.folding.removal import BACKWARD, FORWARD, IN_FORWARD
from bnify.folding.untie import separable

__all__ = [
    "BACKWARD",
    "FORWARD",
    "IN_FORWARD",
    "MERGE",
    "FoldOptions",
    "Folded",
    "fold_graph",
    "separable",
]
