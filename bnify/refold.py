"""One fold, done again on float64 copies: what its algebra check compares."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from bnify.borrow import copy_model, sharing_copy
from bnify.capture import Captured, record
from bnify.double import double
from bnify.errors import PlanError
from bnify.folding import Folded, FoldOptions, fold_graph
from bnify.layers import without_synchronisation
from bnify.rewrite import fold_tree, folded_module
from bnify.structure import Call


class Refolded:
    """The original, the folded model and the folded recording in float64.

    Args:
        model: The original; it is not touched.
        call: The example inputs.
        options: The options of the fold.
        folded: The fold, made in the model's own dtype.

    Attributes:
        wide: Whether everything is in float64; False where the model cannot run in it.
        why_narrow: Why it cannot.
        model: The original.
        call: The example inputs.
        truth: What the original gives on them, recorded.
        lost: Edits that cannot be done in float64; that is a fault.

    Raises:
        PlanError: The fold comes out otherwise in float64.
    """

    def __init__(self, model: nn.Module, call: Call, options: FoldOptions, folded: Folded) -> None:
        self.edits = folded.edits
        self.as_graph = options.as_graph
        self._tree: nn.Module | None = None
        self.wide, self.why_narrow = True, ""
        self.model: nn.Module = without_synchronisation(double(model)).eval()
        self.call = call.to(dtype=torch.float64).clone()
        try:
            self.captured: Captured = record(self.model, self.call, wide=True, borrow=True)
        except Exception as error:  # the user's model runs, for the first time in float64
            self.wide, self.why_narrow = False, (str(error).strip() or "?").splitlines()[0]
            self.model = without_synchronisation(copy_model(model)).eval()
            self.call = call.clone()
            self.captured = record(self.model, self.call, borrow=True)
        self.truth: list[Tensor] = list(self.captured.outputs)
        wanted = {edit.layer: edit for edit in folded.edits}
        self.folded = fold_graph(self.captured, options, only=wanted)
        found = {(e.layer, e.kind, e.into) for e in self.folded.edits}
        lost = [e.layer for e in folded.edits if (e.layer, e.kind, e.into) not in found]
        if lost:
            raise PlanError(f"{lost[0]} folds otherwise in float64")

    @property
    def baked(self) -> str:
        """Why a recording need not be the model on other inputs; empty where it is."""
        if self.captured.escapes:
            where = self.captured.escapes[0].module or type(self.model).__name__
            return f"{where} takes tensor values to Python, which a recording bakes in"
        if self.captured.unreplayable:
            return self.captured.unreplayable
        return ""

    def tree(self) -> nn.Module:
        """The folded model, or the folded recording where that is the result."""
        if self._tree is None:
            self._tree = (
                folded_module(self.captured, self.folded.graph, self.folded.changes, own=False)
                if self.as_graph
                else fold_tree(sharing_copy(self.model), self.folded.changes, shared=True)
            )
        return self._tree

    def graph(self) -> fx.GraphModule:
        """The folded recording, on the tensors of the folded model."""
        changes = self.folded.changes
        return folded_module(self.captured, self.folded.graph, changes, self.tree(), own=False)
