"""The verdict on a fold: original against result in float64, then in the model's own dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from bnify.borrow import evaluating, fused_attention, seeded, sharing_copy
from bnify.capture import Captured
from bnify.devices import full_precision
from bnify.double import StayInFloat64
from bnify.errors import BnifyError
from bnify.structure import Call, outputs_of, run_graph
from bnify.verdict import Check, OutputVerdict, Verification
from bnify.verification.bench import (
    CONDITIONING,
    ILL_CONDITIONED,
    LEAST,
    SEED,
    distance,
    moved_by_one_ulp,
)
from bnify.verification.measures import UNCOMPARABLE, Distance, is_exact, mismatch
from bnify.verification.measures import distance as measured

#: The error of a result may be this many times the original's own, or this large.
BUDGET, FLOOR = 10.0, 1e-6


class Refolds(Protocol):
    """A fold, done again on float64 copies."""

    wide: bool
    why_narrow: str
    as_graph: bool
    model: nn.Module
    call: Call
    truth: list[Tensor]

    @property
    def baked(self) -> str:
        """Why a recording need not be the model on other inputs; empty where it is."""

    def tree(self) -> nn.Module:
        """The folded model."""

    def graph(self) -> fx.GraphModule:
        """The folded recording."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """What will be handed out, in the model's own dtype.

    Attributes:
        model: The folded model.
        captured: The recording of the original, with its outputs.
        as_graph: Whether ``model`` is a recording, which takes the tensors of the call.
    """

    model: nn.Module
    captured: Captured
    as_graph: bool = False


def verify_fold(again: Refolds, delivered: Delivered) -> Verification:
    """Measure a fold before anybody gets it."""
    with full_precision():
        return _Fold(again, delivered).verify()


def unchanged() -> Verification:
    """The verdict on a fold of nothing: the result is a copy."""
    check = Check(name="result = original", passed=True, detail="nothing was changed")
    return Verification(passed=True, checks=(check,), notes=("nothing was changed",))


class _Fold:
    def __init__(self, again: Refolds, delivered: Delivered) -> None:
        self.again = again
        self.delivered = delivered
        self.tree = again.tree()
        self.least = LEAST if again.wide else 1e-5
        self.inputs: list[str] = []
        self._given: list[Tensor] | None = None

    def verify(self) -> Verification:
        checks: list[Check] = []
        for name, check in (
            ("result = original", self._example),
            ("recording = module", self._recording),
            ("result = original, fresh input", self._fresh),
            ("fused attention = plain attention", self._fused),
        ):
            try:
                checks.extend(check())
            except BnifyError as error:
                checks.append(Check(name=name, passed=None, detail=error.message))
            except Exception as error:  # forward() is user code, and what we made of it raised
                lines = str(error).strip().splitlines() or [type(error).__name__]
                checks.append(
                    Check(name=name, passed=False, detail=f"the result raised: {lines[0]}")
                )
        checks = self._decided(checks)
        outputs = self._budget()
        notes = []
        if not self.again.wide:
            notes.append(
                f"the model does not run in float64 ({self.again.why_narrow}): compared in its "
                "own dtype"
            )
        verdicts = [check.passed for check in checks if check.passed is not None]
        passed = bool(verdicts) and all(verdicts) and all(o.passed for o in outputs)
        errors = [check.error for check in checks if check.error is not None]
        first = next(self.delivered.model.parameters(), None)
        return Verification(
            passed=passed,
            algebra=max(errors, default=None) if self.again.wide else None,
            outputs=outputs,
            device=str(first.device if first is not None else torch.device("cpu")),
            checks=tuple(checks),
            inputs=tuple(self.inputs),
            notes=tuple(notes),
        )

    # -- in float64 ------------------------------------------------------------------------------

    def _example(self) -> Iterator[Check]:
        self.inputs.append("example")
        truth = self.again.truth
        name = "result = original, float64" if self.again.wide else "result = original"
        if not all(bool(t.isfinite().all()) for t in truth if t.is_floating_point()):
            why = "the original's own output is not finite: nothing can be compared"
            yield Check(name=name, passed=False, detail=why)
            return
        yield self._compared(name, self._on_example(), truth, self.again.call)

    def _on_example(self) -> list[Tensor]:
        if self._given is None:
            self._given = self._run(self.tree, self.again.call)
        return self._given

    def _recording(self) -> Iterator[Check]:
        if self.again.as_graph:
            return
        name = "recording = module, float64"
        graph = self.again.graph()
        got = self._guarded(lambda: run_graph(graph, self.again.call))
        check = self._compared(name, got, self._on_example(), self.again.call)
        if check.passed is False and self.again.baked:
            check = replace(check, passed=None, error=None, detail=self.again.baked)
        yield check

    def _fresh(self) -> Iterator[Check]:
        """Another input, and where the model takes it another batch size."""
        if self.again.as_graph and self.again.baked:
            return
        size = self.again.call.batch
        calls = [self.again.call.redrawn(1)]
        if size is not None and not self.again.as_graph:
            others = (size - 1, size + 1) if size > 1 else (size + 1,)
            calls = [calls[0].resized(n) for n in others] + calls
        for call in calls:
            try:
                want = self._run(self.again.model, call)
            except Exception:  # forward() is user code: it may take one batch size only
                continue
            if not all(bool(t.isfinite().all()) for t in want if t.is_floating_point()):
                continue
            label = "fresh input" if call.batch == size else f"fresh input, batch {call.batch}"
            self.inputs.append(f"redrawn (seed 1), batch {call.batch}")
            yield self._compared(
                f"result = original, {label}", self._run(self.tree, call), want, call
            )
            return
        yield Check(
            name="result = original, fresh input",
            passed=None,
            detail="the original does not run on inputs drawn at random",
        )

    def _fused(self) -> Iterator[Check]:
        """The fused attention path must give what the plain one gives."""
        fused = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
        if self.again.as_graph or not any(isinstance(m, fused) for m in self.again.model.modules()):
            return
        with torch.no_grad(), seeded(SEED), fused_attention(enabled=True), evaluating(self.tree):
            got = [t for _, t in outputs_of(self.again.call.clone()(self.tree))]
        yield self._compared(
            "fused attention = plain attention", got, self.again.truth, self.again.call
        )

    def _decided(self, checks: list[Check]) -> list[Check]:
        """Where conditioning left everything open, other inputs are tried."""
        if any(check.passed is not None for check in checks if "original" in check.name):
            return checks
        for seed in (2, 3, 4):
            call = self.again.call.redrawn(seed, scale=0.1 if seed == 4 else 1.0)
            try:
                want = self._run(self.again.model, call)
                got = self._run(self.tree, call)
            except Exception:  # forward() is user code
                continue
            self.inputs.append(f"redrawn (seed {seed})")
            check = self._compared(f"result = original, input {seed}", got, want, call)
            checks.append(check)
            if check.passed is not None:
                return checks
        why = "ill-conditioned on every input tried: whether the function is kept is not known"
        return [*checks, Check(name="result = original", passed=False, detail=why)]

    def _compared(self, name: str, got: list[Tensor], want: list[Tensor], call: Call) -> Check:
        error, why = distance(got, want)
        threshold = self.least
        if error > threshold and not why:
            noise = self._noise(call)
            threshold = max(threshold, CONDITIONING * noise)
            if noise > ILL_CONDITIONED:
                open_why = f"ill-conditioned (one ulp moves it by {noise:.0e}), cannot be decided"
                return Check(name=name, passed=None, detail=f"{open_why} on this input")
        return Check(
            name=name, passed=error <= threshold, error=error, threshold=threshold, detail=why
        )

    def _noise(self, call: Call) -> float:
        """How far the folded model's outputs move with one ulp of its weights."""
        moved = moved_by_one_ulp(self.tree)
        return distance(self._run(moved, call), self._run(self.tree, call))[0]

    def _run(self, model: nn.Module, call: Call) -> list[Tensor]:
        def forward() -> list[Tensor]:
            with torch.no_grad(), evaluating(model):
                if self.again.as_graph and isinstance(model, fx.GraphModule):
                    return run_graph(model, call)
                return [t for _, t in outputs_of(call.clone()(model))]

        return self._guarded(forward)

    def _guarded(self, function: Callable[[], list[Tensor]]) -> list[Tensor]:
        with torch.no_grad(), seeded(SEED), fused_attention(enabled=False):
            if not self.again.wide:
                return function()
            with StayInFloat64():  # type: ignore[no-untyped-call]
                return function()

    # -- in the model's own dtype ----------------------------------------------------------------

    def _budget(self) -> tuple[OutputVerdict, ...]:
        """Each output against the float64 truth, beside the original's own error."""
        delivered, captured = self.delivered, self.delivered.captured
        # A copy: a model may keep something of its forward pass.
        model, call = sharing_copy(delivered.model), captured.call
        try:
            with torch.no_grad(), seeded(SEED), fused_attention(enabled=False), evaluating(model):
                if delivered.as_graph and isinstance(model, fx.GraphModule):
                    got = [("", t) for t in run_graph(model, call)]
                else:
                    got = outputs_of(call.clone()(model))
        except Exception:  # the checks above say so
            return ()
        names = [name for name, _ in got]
        verdicts = []
        for index, (_, tensor) in enumerate(got):
            if index >= len(self.again.truth) or index >= len(captured.outputs):
                break
            name = names[index] or f"output {index}"
            verdicts.append(
                _within_budget(name, tensor, captured.outputs[index], self.again.truth[index])
            )
        return tuple(verdicts)


def _within_budget(name: str, got: Tensor, own: Tensor, truth: Tensor) -> OutputVerdict:
    """One output in the model's own dtype, beside the original in that dtype."""
    why = mismatch(got, own) or ""
    if is_exact(own):
        why = why or ("" if torch.equal(got, own) else "integers differ")
        gap = UNCOMPARABLE if why else measured(got, own)
        return _verdict(name, gap, None, passed=not why, detail=why)
    if why or not bool(truth.isfinite().all()):
        detail = why or "the output is not finite"
        return _verdict(name, UNCOMPARABLE, None, passed=False, detail=detail)
    gap, base = measured(got, truth), measured(own, truth)
    least = FLOOR if own.dtype in (torch.float32, torch.float64) else torch.finfo(own.dtype).eps
    allowed = max(base.rel_l2, least / BUDGET)
    ratio = gap.rel_l2 / allowed
    return _verdict(name, gap, ratio, passed=ratio <= BUDGET)


def _verdict(
    name: str, gap: Distance, ratio: float | None, *, passed: bool, detail: str = ""
) -> OutputVerdict:
    return OutputVerdict(
        name=name,
        rel_l2=gap.rel_l2,
        max_abs=gap.max_abs,
        max_abs_over_rms=gap.max_abs_over_rms,
        budget_ratio=ratio,
        tolerance=gap.tolerance,
        top1=gap.top1,
        passed=passed,
        detail=detail,
    )
