"""One plan, carried out twice on float64 copies: what the algebra checks compare."""

from __future__ import annotations

import torch
from torch import fx, nn

from bnify.borrow import copy_model
from bnify.capture import record
from bnify.double import double
from bnify.layers import without_synchronisation
from bnify.plan import Plan
from bnify.rewrite import Statistics, initial_norms, rewrite_graph, rewrite_tree
from bnify.structure import Call


class Realisations:
    """The rewritten recording and the rewritten module, made anew at every call.

    Args:
        model: The original; it is not touched.
        plan: The plan.
        call: The example inputs.
        statistics: What ``init="preserve"`` starts from.
        seed: Random state of the recordings.

    Attributes:
        wide: Whether everything is in float64; False where the model cannot run in it.
        why_narrow: Why it cannot.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        call: Call,
        statistics: Statistics | None,
        *,
        seed: int = 0,
    ) -> None:
        self.plan = plan
        self.wide, self.why_narrow = True, ""
        self.model: nn.Module = double(model)
        self.call = call.to(dtype=torch.float64).clone()
        self._statistics = statistics
        self._seed = seed
        try:
            self._eval = record(self.model, self.call, seed=seed, wide=True)
        except Exception as error:  # the user's model runs, for the first time in float64
            self.wide, self.why_narrow = False, (str(error).strip() or "?").splitlines()[0]
            self.model, self.call = copy_model(model), call.clone()
            self._eval = record(self.model, self.call, seed=seed)

    @property
    def baked(self) -> str:
        """Why a recording cannot follow what an edit changes; empty where it can."""
        if self._eval.escapes:
            where = self._eval.escapes[0].module or type(self.model).__name__
            return f"{where} takes tensor values to Python, which a recording bakes in"
        if not self._eval.composite:
            return "the model differentiates inside forward, which a recording does not follow"
        return ""

    def tree(self) -> nn.Module:
        """A rewritten copy of the model, in eval mode."""
        norms = self._norms()
        rewritten = rewrite_tree(copy_model(self.model), self.plan, norms)
        return without_synchronisation(rewritten).eval()

    def recorded(self) -> fx.GraphModule:
        """The eval recording before any edit."""
        return self._eval.module()

    def graph(self, *, train: bool) -> fx.GraphModule:
        """The rewritten recording."""
        captured = self._eval
        if train:
            captured = record(self.model, self.call, train=True, seed=self._seed, wide=self.wide)
        return rewrite_graph(captured, self.plan, self._norms())

    def _norms(self) -> dict[str, nn.Module]:
        """The plan's norms; those that start from scratch get a past.

        Fresh norms are all alike and nearly the identity: a norm left out, or two that change
        places, would hardly show.
        """
        norms = initial_norms(self.model, self.plan, self._statistics)
        kept = {edit.carrier for edit in self.plan.edits if edit.init == "preserve"}
        generator = torch.Generator().manual_seed(17)
        for carrier, norm in norms.items():
            for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
                if carrier in kept or not tensor.is_floating_point():
                    continue
                drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                with torch.no_grad():
                    tensor.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)
        return norms
