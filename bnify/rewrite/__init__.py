"""REWRITE: one plan, carried out on the recording and on the module tree."""

from bnify.rewrite.check import check_edits, check_fingerprint
from bnify.rewrite.folded import fold_tree, folded_copy, folded_module, restructure
from bnify.rewrite.graph import rewrite_graph
from bnify.rewrite.initial import Statistics, initial_norms, points
from bnify.rewrite.tree import rewrite_tree

__all__ = [
    "Statistics",
    "check_edits",
    "check_fingerprint",
    "fold_tree",
    "folded_copy",
    "folded_module",
    "initial_norms",
    "points",
    "restructure",
    "rewrite_graph",
    "rewrite_tree",
]
