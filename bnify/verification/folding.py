"""The verdict on a fold: original against result in float64, then in the model's own dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, fx, nn

from bnify.borrow import (
    evaluating,
    fused_attention,
    seeded,
    sharing_copy,
    without_cyclic_collection,
)
from bnify.devices import full_precision
from bnify.double import StayInFloat64
from bnify.errors import BnifyError, CaptureError
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
from bnify.verification.measures import distance as measured
from bnify.verification.own_dtype import BUDGET, FLOOR, finite, within_budget
from bnify.verification.refolds import Delivered, Refolds
from bnify.verification.sizes import OTHER_SIZES

#: Above this relative error the model's own dtype says too little, and float64 decides.
_NEAR = 1e-3


def verify_fold(again: Refolds, delivered: Delivered) -> Verification:
    """Measure a fold before anybody gets it.

    The algebra is judged in float64 on the first sample of the example, original against result.
    The recording is run against the module in the model's own dtype, where two programs of the
    same operators are bit-equal; the same goes for a fresh input, within the error budget. What is
    not clear there is decided in float64.
    """
    with full_precision(), without_cyclic_collection():
        return _Fold(again, delivered).verify()


def unchanged() -> Verification:
    """The verdict on a fold of nothing: the result is a copy."""
    check = Check(name="result = original", passed=True, detail="nothing was changed")
    return Verification(passed=True, checks=(check,), notes=("nothing was changed",))


class _Fold:
    def __init__(self, again: Refolds, delivered: Delivered) -> None:
        self.again = again
        self.captured = again.captured
        # A copy: a model may keep something of its forward pass.
        self.model = sharing_copy(delivered.model)
        self.original = sharing_copy(self.captured.model)
        self.graph = delivered.graph
        self.inputs: list[str] = []
        self.outputs: tuple[OutputVerdict, ...] = ()
        self.own_error = 0.0
        self.names: list[str] = []
        self._given: tuple[Call, list[Tensor]] | None = None
        self._suspect = False
        self._casts = self.captured.casts
        self._drawn = self.captured.call.redrawn(1)
        self._judged: tuple[Call, list[Tensor]] | None = None

    def verify(self) -> Verification:
        checks: list[Check] = []
        steps = (
            ("result = original", self._algebra),
            ("recording = module", self._recording),
            ("result = original, fresh input", self._fresh),
            ("fused attention = plain attention", self._fused),
        )
        for name, step in steps:
            try:
                checks.extend(step())
            except BnifyError as error:
                checks.append(Check(name=name, passed=False, detail=error.message))
            except Exception as error:  # forward() is user code, and what we made of it raised
                lines = str(error).strip().splitlines() or [type(error).__name__]
                why = f"the result raised: {lines[0]}"
                checks.append(Check(name=name, passed=False, detail=why))
        notes = []
        if not self.again.wide:
            notes.append(
                f"the model does not run in float64 ({self.again.why_narrow}): compared in its "
                "own dtype"
            )
        verdicts = [check.passed for check in checks if check.passed is not None]
        errors = [c.error for c in checks if c.error is not None and "float64" in c.name]
        first = next(self.model.parameters(), None)
        return Verification(
            passed=bool(verdicts) and all(verdicts) and all(o.passed for o in self.outputs),
            algebra=max(errors, default=None),
            outputs=self.outputs,
            device=str(first.device if first is not None else torch.device("cpu")),
            checks=tuple(checks),
            inputs=tuple(self.inputs),
            notes=tuple(notes),
        )

    # -- in float64 ------------------------------------------------------------------------------

    def _algebra(self) -> Iterator[Check]:
        """Original against result in float64, on the first sample where the model takes one."""
        call = self.captured.call
        sizes = [call.batch]
        if not self.again.as_graph and call.batch is not None and call.batch > 1:
            sizes.insert(0, 1)
        truth, used = self._truth([call if n is None else call.resized(n) for n in sizes])
        name = "result = original, float64" if self.again.wide else "result = original"
        self.inputs.append(f"example, batch {used.batch}" if used.batch else "example")
        if not finite(truth):
            why = "the original's own output is not finite: nothing can be compared"
            yield Check(name=name, passed=False, detail=why)
            return
        tree = self.again.graph() if self.again.as_graph else self.again.tree()
        check = self._compared(name, tree, used, truth)
        if check.passed is False and self.again.wide and not self._casts:
            self._casts = True  # in float64 it may cast where the recorded pass did not
            yield from self._algebra()
            return
        yield check
        self._judged = (used, truth)
        if check.passed is None:
            yield from self._decided(name)

    def _truth(self, calls: list[Call]) -> tuple[list[Tensor], Call]:
        """What the original gives on the first of these inputs that it takes, in float64."""
        for wide, casts in dict.fromkeys([(True, self._casts), (True, True), (False, True)]):
            error: Exception | None = None
            self._casts = casts
            for call in calls:
                try:
                    return self._run(self.again.original(), self._cast(call)), call
                except Exception as raised:  # forward() is user code
                    error = raised
            if wide and casts and error is not None:
                self.again.narrow((str(error).strip() or "?").splitlines()[0])
        raise CaptureError(f"the original does not run: {self.again.why_narrow}")

    def _decided(self, name: str) -> Iterator[Check]:
        """Where conditioning left everything open, other inputs are tried."""
        for seed in (2, 3, 4):
            call = self.captured.call.redrawn(seed, scale=0.1 if seed == 4 else 1.0)
            try:
                want = self._run(self.again.original(), self._cast(call))
            except Exception:  # forward() is user code
                continue
            self.inputs.append(f"redrawn (seed {seed})")
            tree = self.again.graph() if self.again.as_graph else self.again.tree()
            check = self._compared(f"{name}, input {seed}", tree, call, want)
            yield check
            if check.passed is not None:
                return
        why = "ill-conditioned on every input tried: whether the function is kept is not known"
        yield Check(name=name, passed=False, detail=why)

    def _compared(self, name: str, tree: nn.Module, call: Call, want: list[Tensor]) -> Check:
        """A float64 model against what it should give, with its conditioning where it matters."""
        call = self._cast(call)
        got = self._run(tree, call)
        error, why = distance(got, want)
        threshold = LEAST if self.again.wide else 1e-5
        if error > threshold and not why:
            noise = distance(self._run(moved_by_one_ulp(tree), call), got)[0]
            threshold = max(threshold, CONDITIONING * noise)
            if noise > ILL_CONDITIONED:
                open_why = f"ill-conditioned (one ulp moves it by {noise:.0e}), cannot be decided"
                return Check(name=name, passed=None, detail=f"{open_why} on this input")
        return Check(
            name=name, passed=error <= threshold, error=error, threshold=threshold, detail=why
        )

    def _cast(self, call: Call) -> Call:
        return call.to(dtype=torch.float64) if self.again.wide else call

    def _run(
        self, model: nn.Module, call: Call, *, own: bool = False, fused: bool = False
    ) -> list[Tensor]:
        """The output tensors of a model; ``own`` runs in the model's own dtype."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(seeded(SEED))
            stack.enter_context(fused_attention(enabled=fused))
            stack.enter_context(evaluating(model))
            if self.again.wide and self._casts and not own:
                stack.enter_context(StayInFloat64())  # type: ignore[no-untyped-call]
            if isinstance(model, fx.GraphModule) and "custom_gradients" in model.meta:
                return run_graph(model, call)
            named = outputs_of(call.clone()(model))
            self.names = [name for name, _ in named]
            return [tensor for _, tensor in named]

    # -- in the model's own dtype ----------------------------------------------------------------

    def _on_fresh(self) -> tuple[Call, list[Tensor]]:
        """The result on an input in the recorded shape, half of its samples drawn anew.

        Where only the result does not take it, that is for :meth:`_fresh` to find; where the
        original does not take it either, it is the example.
        """
        if self._given is None:
            call, got = self._mixed(), None
            try:
                got = self._run(self.model, call, own=True)
            except Exception:  # forward() is user code: it may take some values only
                self._suspect = True
            self._suspect = self._suspect or not finite(got or [])
            if self._suspect and self._original_on(call) is None:
                self._suspect, got, call = False, None, self.captured.call
            self._given = (call, self._run(self.model, call, own=True) if got is None else got)
        return self._given

    def _mixed(self) -> Call:
        """The example with the second half of its samples drawn anew; a single sample is."""
        size = self.captured.call.batch
        if size is None or size < 2:
            return self._drawn
        drawn = iter([tensor for _, tensor in self._drawn.tensors()])

        def mix(tensor: Tensor) -> Tensor:
            other = next(drawn)
            if not tensor.ndim or tensor.shape[0] != size:
                return tensor
            return torch.cat([tensor[: size // 2], other[size // 2 :]])

        return self.captured.call.map(mix)

    def _original_on(self, call: Call) -> list[Tensor] | None:
        """What the original makes of an input; None where it does not take it."""
        try:
            want = self._run(self.original, call, own=True)
        except Exception:  # forward() is user code
            return None
        return want if finite(want) else None

    def _recording(self) -> Iterator[Check]:
        """The folded recording against the folded module: two programs of the same operators."""
        if self.again.as_graph:
            return
        if self.again.baked:
            yield Check(name="recording = module", passed=None, detail=self.again.baked)
            return
        call, given = self._on_fresh()
        error, why = distance(self._run(self.graph(), call, own=True), given)
        if error == 0.0 and not why:
            yield Check(name="recording = module", passed=True, error=0.0, threshold=0.0)
            return
        wanted = self._run(self.again.tree(keep=True), self._cast(self.captured.call))
        name = "recording = module, float64"
        yield self._compared(name, self.again.graph(), self.captured.call, wanted)

    def _fresh(self) -> Iterator[Check]:
        """Fresh samples, at another size where the model takes one; what is unclear, in float64.

        A recording may take a size for a fact. That the module is the recording on fresh samples
        in the recorded shape has been seen by then.
        """
        if self.again.as_graph and self.again.baked:
            return
        self.outputs = self._budget()
        for name, what, call in self._probes():
            want = self._original_on(call)
            if want is not None:
                self.inputs.append(what)
                yield self._near(name, call, want)
                if what.startswith("redrawn"):
                    return
                break
        why = "the original does not take inputs drawn at random"
        yield Check(name="result = original, fresh input", passed=None, detail=why)

    def _probes(self) -> Iterator[tuple[str, str, Call]]:
        """Inputs that the recording has not seen, the most telling first."""
        name, example = "result = original, fresh input", self.captured.call
        fresh = self._on_fresh()[0]
        sizes = () if self.again.as_graph or self._suspect else OTHER_SIZES
        for resized in sizes:
            call = self._drawn.map(resized)
            yield f"{name} of another size", "redrawn (seed 1), another size", call
        if fresh is not example:
            yield name, "redrawn (seed 1)", fresh
        for resized in sizes:
            call = example.map(resized)
            yield "result = original, another size", "example, another size", call

    def _near(self, name: str, call: Call, want: list[Tensor]) -> Check:
        """The result beside the original in their own dtype; what is unclear, in float64."""
        fresh, given = self._on_fresh()
        got = given if call is fresh else self._run(self.model, call, own=True)
        error, why = distance(got, want)
        allowed = min(2 * BUDGET * max(self.own_error, FLOOR / BUDGET), _NEAR)
        if error <= allowed and not why:
            return Check(name=name, passed=True, error=error, threshold=allowed, detail="own dtype")
        truth = self._run(self.again.original(), self._cast(call))
        tree = self.again.graph() if self.again.as_graph else self.again.tree()
        check = self._compared(f"{name}, float64", tree, call, truth)
        if check.passed and self.again.wide:  # the algebra is right: is what is handed out?
            verdicts = [within_budget("", *each) for each in zip(got, want, truth, strict=True)]
            if not all(verdict.passed for verdict in verdicts):
                return Check(name=name, passed=False, error=error, threshold=allowed)
        return check

    def _fused(self) -> Iterator[Check]:
        """The fused attention path must give what the plain one gives."""
        fused = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
        if self.again.as_graph or not any(isinstance(m, fused) for m in self.model.modules()):
            return
        call = self.captured.call
        tree = self.again.tree(keep=True)
        truth = self._run(self.again.original(), self._cast(call))
        got = self._run(tree, self._cast(call), fused=True)
        error, why = distance(got, truth)
        name = "fused attention = plain attention, float64"
        if error > LEAST and not why:  # compared with the plain path, where conditioning counts
            yield self._compared(name, tree, call, got)
            return
        yield Check(name=name, passed=not why, error=error, threshold=LEAST, detail=why)

    def _budget(self) -> tuple[OutputVerdict, ...]:
        """Each output against the float64 truth, beside the original's own error."""
        if self._judged is None:
            return ()
        call, truth = self._judged
        rows = self._rows(call, truth)
        if rows is not None:
            verdicts = self._verdicts(*rows, truth)
            if all(verdict.passed for verdict in verdicts):
                return verdicts
        got, own = (self._run(m, call, own=True) for m in (self.model, self.original))
        return self._verdicts(got, own, truth)

    def _verdicts(
        self, got: list[Tensor], own: list[Tensor], truth: list[Tensor]
    ) -> tuple[OutputVerdict, ...]:
        verdicts = []
        self.own_error = 0.0
        for index, (a, b, c) in enumerate(zip(got, own, truth, strict=False)):
            name = self.names[index] if index < len(self.names) else f"output {index}"
            verdicts.append(within_budget(name, a, b, c))
            if b.is_floating_point() and b.shape == c.shape:
                self.own_error = max(self.own_error, measured(b, c).rel_l2)
        return tuple(verdicts)

    def _rows(self, call: Call, truth: list[Tensor]) -> tuple[list[Tensor], list[Tensor]] | None:
        """Result and original in their own dtype on the input that the truth is of, if known.

        A first sample alone is the first of two batches: of the one that the result has run on,
        and of the example, which the original was recorded on. So it is if the original comes near
        the truth there.
        """
        batch, given = self._on_fresh()
        own, size = self.captured.outputs, batch.batch
        alike = size is not None and all(
            a.ndim > 0 and a.shape[0] == b.shape[0] == size and a.shape[1:] == c.shape[1:]
            for a, b, c in zip(given, own, truth, strict=False)
        )
        if call.batch != 1 or size == 1 or not alike:
            return None
        if not len(given) == len(own) == len(truth):
            return None
        rows = [a[:1] for a in given], [b[:1] for b in own]
        near = [c.to(b.dtype) for b, c in zip(own, truth, strict=True)]
        return rows if distance(rows[1], near)[0] < _NEAR else None
