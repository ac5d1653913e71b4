"""The bench of the algebra checks: two realisations of one plan, and the ways to run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from bnify.borrow import copy_model, fused_attention, in_mode, seeded
from bnify.double import StayInFloat64
from bnify.layers import CallNorms
from bnify.plan import Plan
from bnify.structure import Call, outputs_of, run_graph
from bnify.verdict import Check
from bnify.verification.measures import is_exact, mismatch, relative_l2

LEAST = 1e-12
CONDITIONING = 100.0
ILL_CONDITIONED = 1e-6
SEED = 0


class Realised(Protocol):
    """One plan carried out twice, independently, on float64 copies."""

    wide: bool
    why_narrow: str
    model: nn.Module
    call: Call
    plan: Plan

    def tree(self) -> nn.Module:
        """A fresh rewritten copy of the model, in eval mode."""

    def graph(self, *, train: bool) -> fx.GraphModule:
        """A fresh rewritten recording."""

    def recorded(self) -> fx.GraphModule:
        """The eval recording before any edit."""

    @property
    def baked(self) -> str:
        """Why a recording cannot follow what an edit changes; empty where it can."""


class Bench:
    """The models under test and the ways to run them."""

    def __init__(self, realised: Realised) -> None:
        self.wide = realised.wide
        self.model = realised.model
        self.plan = realised.plan
        self.call = realised.call
        self.tree = realised.tree()
        self.graph = realised.graph
        self.fresh_tree = realised.tree
        self.recorded = realised.recorded
        self.preserves = all(edit.init == "preserve" for edit in self.plan.edits)
        # Without float64 the two realisations still run the same operators.
        self.least = LEAST if self.wide else 1e-5
        #: What a check has seen that is no fault, but should be known.
        self.notes: list[str] = []

    def fresh(self) -> Call:
        """Another input of the same shapes."""
        return self.call.redrawn(1)

    def original_runs(self, call: Call) -> bool:
        """Whether the original takes this input: it may be made for some values only."""
        try:
            self.outputs(self.model, call)
        except Exception:  # forward() is user code
            return False
        return True

    def recording_holds(self, call: Call) -> bool:
        """Whether the recording, unedited, is the original on this input: no branch is baked in."""
        plain = self.recorded()
        with torch.no_grad():
            got = self.guarded(lambda: run_graph(plain, call))
        error, why = distance(got, self.outputs(self.model, call))
        return not why and error < 1e-6

    def guarded(self, function: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Run with fixed random numbers, without the fused attention path."""
        with seeded(SEED), fused_attention(enabled=False):
            if not self.wide:
                return function()
            with StayInFloat64():  # type: ignore[no-untyped-call]
                return function()

    def outputs(self, model: nn.Module, call: Call, *, train: bool = False) -> list[Tensor]:
        """Outputs of a module tree."""

        def forward() -> list[Tensor]:
            with torch.no_grad(), in_mode(model, train=train):
                return [t for _, t in outputs_of(call.clone()(model))]

        return self.guarded(forward)

    def error(
        self,
        got: list[Tensor],
        want: list[Tensor],
        noise: Callable[[], float],
        name: str,
        detail: str = "",
    ) -> Check:
        """A check of two lists of tensors, with the conditioning measured when it matters."""
        error, why = distance(got, want)
        threshold = self.least
        if error > threshold and not why:
            measured = noise()
            threshold = max(threshold, CONDITIONING * measured)
            if measured > ILL_CONDITIONED:
                return Check(
                    name=name,
                    passed=None,
                    error=None,
                    detail=f"ill-conditioned (one ulp moves it by {measured:.0e}), "
                    "cannot be decided on this input",
                )
        return Check(
            name=name,
            passed=error <= threshold,
            error=error,
            threshold=threshold,
            detail=why or detail,
        )


def distance(got: list[Tensor], want: list[Tensor]) -> tuple[float, str]:
    """Worst relative error of two lists, and what makes them incomparable."""
    if len(got) != len(want):
        return float("inf"), f"{len(got)} outputs, expected {len(want)}"
    worst = 0.0
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.dtype == b.dtype and torch.equal(a, b):
            continue  # bit-equal, and so free of NaN: the usual case
        why = mismatch(a, b)
        if why is not None:
            return float("inf"), f"output {index}: {why}"
        if is_exact(b):
            if not torch.equal(a, b):
                return float("inf"), f"output {index}: integers differ"
            continue
        finite = b.isfinite()
        worst = max(worst, relative_l2(a[finite], b[finite]))
    return worst, ""


def move_one_ulp(model: nn.Module) -> None:
    """Move every weight by one unit in the last place, up or down at random, in place."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            signs = (torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1).to(
                parameter
            )
            if parameter.dtype in (torch.float32, torch.float64):
                towards = torch.full_like(parameter, float("inf")) * signs
                parameter.copy_(torch.nextafter(parameter, towards))
            else:  # torch has no nextafter for half precision
                parameter.mul_(1 + signs * torch.finfo(parameter.dtype).eps)


def moved_by_one_ulp(model: nn.Module) -> nn.Module:
    """A copy whose every weight is one unit in the last place away, up or down at random."""
    moved = copy_model(model)
    move_one_ulp(moved)
    return moved


def one_ulp_noise(bench: Bench, model: nn.Module, call: Call, *, train: bool = False) -> float:
    """How far outputs move when every weight moves by one unit in the last place at random."""
    moved = moved_by_one_ulp(model)
    return distance(
        bench.outputs(moved, call, train=train), bench.outputs(model, call, train=train)
    )[0]


def preserving_noise(bench: Bench, call: Call) -> float:
    """What one unit in the last place moves, in the original or in the result, whichever is more.

    The result subtracts a mean and adds it again: on an input far from the data that the mean is
    of, it rounds in units of the mean. Its β, which holds the mean too, is moved here.
    """
    return max(one_ulp_noise(bench, model, call) for model in (bench.model, bench.tree))


class Trained:
    """One training step's forward and backward, and what it leaves behind."""

    def __init__(self, bench: Bench, module: nn.Module) -> None:
        call = bench.call.clone()

        def step() -> list[Tensor]:
            if isinstance(module, fx.GraphModule):
                outputs = run_graph(module, call)
            else:
                outputs = [t for _, t in outputs_of(call(module))]
            generator = torch.Generator().manual_seed(11)
            loss: Tensor | None = None
            for output in outputs:
                if output.requires_grad and output.is_floating_point():
                    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
                    term = (output * weights.to(output)).sum()
                    loss = term if loss is None else loss + term
            # Before the backward pass: a checkpoint runs its norms a second time in it.
            self.buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
            self.batches = {
                id(one): int(tracked)
                for one in module.modules()
                if isinstance(tracked := getattr(one, "num_batches_tracked", None), Tensor)
            }
            self.calls = {id(m): m.call for m in module.modules() if isinstance(m, CallNorms)}
            if loss is not None:
                loss.backward()  # type: ignore[no-untyped-call]
            return [output.detach() for output in outputs]

        self.outputs = bench.guarded(step)
        self.calls_after = {id(m): m.call for m in module.modules() if isinstance(m, CallNorms)}
        self.gradients = {
            name: parameter.grad
            for name, parameter in module.named_parameters()
            if parameter.grad is not None
        }
