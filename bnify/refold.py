"""One fold on float64 copies: what its algebra check compares."""

from __future__ import annotations

import torch
from torch import fx, nn

from bnify.borrow import copy_model, sharing_copy
from bnify.capture import Captured, record
from bnify.double import double
from bnify.errors import PlanError
from bnify.folding import Folded, FoldOptions, fold_graph
from bnify.layers import without_synchronisation
from bnify.rewrite import fold_tree, folded_module


class Refolded:
    """The original and the folded model in float64; everything is made when it is asked for.

    Args:
        captured: The recording that was folded, in the model's own dtype.
        options: The options of the fold.
        folded: The fold.

    Attributes:
        captured: The recording.
        as_graph: Whether the result is a graph.
        wide: Whether everything is in float64; set to False where the model cannot run in it.
        why_narrow: Why it cannot.
    """

    def __init__(self, captured: Captured, options: FoldOptions, folded: Folded) -> None:
        self.captured = captured
        self.as_graph = options.as_graph
        self.wide, self.why_narrow = True, ""
        self._options = options
        self._folded = folded
        self._original: nn.Module | None = None

    @property
    def baked(self) -> str:
        """Why a recording need not be the model on other inputs; empty where it is."""
        if self.captured.escapes:
            where = self.captured.escapes[0].module or type(self.captured.model).__name__
            return f"{where} takes tensor values to Python, which a recording bakes in"
        return self.captured.unreplayable

    def original(self) -> nn.Module:
        """The original."""
        if self._original is None:
            copied = double(self.captured.model) if self.wide else copy_model(self.captured.model)
            self._original = without_synchronisation(copied).eval()
        return self._original

    def narrow(self, why: str) -> None:
        """From now on everything is in the model's own dtype."""
        self.wide, self.why_narrow, self._original = False, why, None

    def tree(self, *, keep: bool = False) -> nn.Module:
        """The folded model, made of the original, which is gone then unless ``keep``."""
        if keep:
            return fold_tree(sharing_copy(self.original()), self._folded.changes, shared=True)
        original, self._original = self.original(), None
        return fold_tree(original, self._folded.changes)

    def graph(self) -> fx.GraphModule:
        """The folded recording: recorded and folded again, since a recording bakes dtypes in.

        Raises:
            PlanError: The fold comes out otherwise; that is a fault.
        """
        call = self.captured.call
        if self.wide:
            call = call.to(dtype=torch.float64)
        captured = record(self.original(), call, wide=self.wide, borrow=True)
        wanted = {edit.layer: edit for edit in self._folded.edits}
        again = fold_graph(captured, self._options, only=wanted)
        found = {(e.layer, e.kind, e.into) for e in again.edits}
        for edit in self._folded.edits:
            if (edit.layer, edit.kind, edit.into) not in found:
                raise PlanError(f"{edit.layer} folds otherwise in float64")
        return folded_module(captured, again.graph, again.changes, own=False)
