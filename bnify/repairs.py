"""The fixes of an audit: edits on a copy of the model, each kind measured before it is returned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from bnify.auditing.finding import AuditReport, Finding, Safety
from bnify.auditing.live import Live
from bnify.auditing.rules.bn201_redundant_bias import means_behind, redundant
from bnify.auditing.rules.bn203_momentum_out_of_range import proposed
from bnify.auditing.subject import Subject
from bnify.borrow import copy_model, evaluating, fused_attention, seeded, training_possible
from bnify.capture import record_example, tensor_at
from bnify.changes import Change
from bnify.double import StayInFloat64, double
from bnify.errors import NothingToFix, PlanError, VerificationError
from bnify.fingerprint import fingerprint
from bnify.folding import FoldOptions
from bnify.folds import How, fold_model, plan_fold
from bnify.plan import Edit, Plan
from bnify.result import Result
from bnify.rewrite import restructure
from bnify.structure import Call, describe, outputs_of
from bnify.verdict import Check, Verification
from bnify.verification.bench import CONDITIONING, LEAST, SEED, distance, moved_by_one_ulp
from bnify.verification.budget import verify_budget


def repair(subject: Subject, report: AuditReport, unsafe: bool) -> Result:
    """Carry out the fixes of a report's findings on a copy of the model.

    Safe fixes keep the function in eval mode, which is measured in float64 and by error budget.
    With ``unsafe`` dead channels are set to 0, and where the audit had data, statistics are
    recalibrated if that was proved to help.

    Raises:
        PlanError: There is no recorded pass to measure on, or nothing to fix.
        VerificationError: A fix that should keep the function does not.
    """
    live = subject.live
    if live is None or live.captured is None or live.call is None:
        why = (live.why_not if live is not None else "") or "there are no example inputs"
        raise PlanError(
            f"fixes are measured before they are made, and no forward pass was recorded: {why}",
            hint="pass inputs: --input 2,3,224,224"
            if live is None or live.call is None
            else "inputs that forward() runs on are what it takes",
        )
    with training_possible():
        return _Repair(subject, live, live.call, report, unsafe=unsafe).run()


#: An edit, how a saved folder makes it again, and what it does to a model.
_Fix: TypeAlias = tuple[Edit, Change | None, Callable[[nn.Module], None]]


class _Repair:
    def __init__(
        self, subject: Subject, live: Live, call: Call, report: AuditReport, *, unsafe: bool
    ) -> None:
        self.subject, self.live, self.call, self.report = subject, live, call, report
        self.unsafe = unsafe
        self.findings: dict[str, dict[str, Finding]] = {}
        for finding in report.findings:
            self.findings.setdefault(finding.code, {})[finding.module] = finding
        self.model = copy_model(live.model)
        self.edits: list[Edit] = []
        self.tree: list[Change] = []
        self.checks: list[Check] = []
        self.notes: list[str] = []
        self._acts: list[Callable[[nn.Module], None]] = []
        self._all_acts: list[Callable[[nn.Module], None]] = []

    def run(self) -> Result:
        for edit, change, act in self._safe():
            self.edits.append(edit)
            if change is not None:
                self.tree.append(change)
            act(self.model)
            self._all_acts.append(act)
            if edit.kind != "float-statistics":  # the float64 copy stays what it is
                self._acts.append(act)
        verification = self._kept(self.live.model) if self.edits else None
        if self.unsafe:
            self._unsafe()
        structure, folded = tuple(self.tree), self._fold()
        if folded is not None:
            self.edits += folded.plan.edits
            structure += folded.structure
            self.model = folded.model
        if not self.edits:
            raise NothingToFix(
                _nothing(self.report, unsafe=self.unsafe), hint="see each finding's fix"
            )
        model = self.model
        return Result(
            model,
            lambda: record_example(model, self.call).module(),
            self._plan(),
            self._verdict(verification, folded),
            self.call,
            before=str(self.live.model),
            structure=structure,
        )

    # -- fixes that keep the function ------------------------------------------------------------

    def _safe(self) -> Iterator[_Fix]:
        for path, finding in self._of("BN203"):
            wanted = float(proposed(float(finding.values["momentum"])))
            detail = f"{finding.values['momentum']:g} → {wanted}"
            change = Change(kind="set", path=path, values={"momentum": wanted})
            yield self._change(path, "set-momentum", detail, change)
        for path, _ in self._of("BN107"):
            change = Change(kind="float", path=path)
            yield self._change(path, "float-statistics", "", change)
        for path, channels, norms in redundant(self.subject):
            wanted = path in self.findings.get("BN201", {})
            means = means_behind(self.subject, path, norms) if wanted else None
            if means is None:
                continue
            change = Change(kind="none", path=path, names=("bias",))
            edit = self._edit(path, "drop-bias", "the running mean takes it up")
            edit = replace(edit, channels=channels, into=norms)
            yield edit, change, _moving_bias(path, means, change)
        for path, _ in self._of("BN301"):
            change = Change(kind="keep-eval", path=path)
            yield self._change(path, "keep-eval", "train() leaves it in eval mode", change)

    def _of(self, code: str) -> Iterator[tuple[str, Finding]]:
        """Findings of a rule at norms that are modules."""
        for path, finding in self.findings.get(code, {}).items():
            if path in self.live.modules and finding.safety is not Safety.ADVICE:
                yield path, finding

    def _change(self, path: str, kind: str, detail: str, change: Change) -> _Fix:
        def act(model: nn.Module) -> None:
            restructure(model, (change,))

        return self._edit(path, kind, detail), change, act

    # -- fixes that change it --------------------------------------------------------------------

    def _unsafe(self) -> None:
        for path, finding in self._of("BN105"):
            module = self.model.get_submodule(path)
            # Its own tensor: a parametrized weight is computed anew at every access.
            weight = module._parameters.get("weight", module._buffers.get("weight"))
            fits = weight is not None and weight.shape == (finding.values["channels"],)
            if finding.safety is Safety.UNSAFE and weight is not None and fits:
                channels = list(finding.values["indices"])
                with torch.no_grad():
                    weight[channels] = 0
                detail = f"{len(channels)} channels scaled by 0"
                self.edits.append(self._edit(path, "zero-channels", detail))
        self._recalibrate()

    def _recalibrate(self) -> None:
        measured = self.subject.measured
        wanted = [f for f in self.report.findings if f.safety is Safety.DATA]
        if not wanted or measured is None:
            return
        from bnify.auditing.recalibrate import proof, recalibratable, recalibrated

        better = recalibrated(self.model, measured)
        shown = proof(self.model, better, measured)
        if shown is None:
            return
        self.notes.append(shown.sentence)
        if not shown.helps:
            return
        self.model = better
        for path in recalibratable(measured):
            self.edits.append(self._edit(path, "recalibrate", "statistics of the data"))
        self.checks.append(
            Check(name="recalibration helps, on a copy", passed=True, detail=shown.sentence)
        )

    def _edit(self, path: str, kind: str, detail: str) -> Edit:
        module = self.live.modules.get(path)  # None for a functional norm
        kind_of = type(module).__name__ if module is not None else ""
        return Edit(layer=path, kind=kind, layer_type=kind_of, detail=detail)

    # -- folding ---------------------------------------------------------------------------------

    def _fold(self) -> Result | None:
        """Fold what BN401 (all of it) or BN208 (the first of each pair) found, in eval mode."""
        wanted = {*self.findings.get("BN208", {}), *self.findings.get("BN401", {})}
        if not wanted or self.live.model.training:
            return None
        options = FoldOptions()
        plan = plan_fold(self.model, self.call, options)
        edits = tuple(edit for edit in plan.edits if edit.layer in wanted)
        if not edits:
            return None
        return fold_model(self.model, self.call, options, replace(plan, edits=edits), How())

    # -- the verdict -----------------------------------------------------------------------------

    def _kept(self, original: nn.Module) -> Verification:
        """Original against repaired copy in eval mode: in float64, then by error budget.

        Raises:
            VerificationError: They differ.
        """
        fixed = self.model
        stand_in = copy_model(original)
        if _made_finite(stand_in, self.live):
            original, fixed = stand_in, copy_model(stand_in)
            for act in self._all_acts:
                act(fixed)
            self.notes.append("fixes were measured with 0 and 1 in place of what is not finite")
        wide = double(original).eval(), double(original).eval()
        for act in self._acts:
            act(wide[1])
        for name, call in (("example", self.call), ("fresh input", self.call.redrawn(1))):
            check = _in_float64(*wide, call, name)
            if check is not None:
                self.checks.append(check)
        verdict = verify_budget(original, fixed, self.call)
        failed = [check for check in self.checks if check.passed is False]
        if failed or not verdict.passed:
            what = failed[0].name if failed else "by error budget"
            raise VerificationError(
                f"the fixes were measured and change the function ({what})",
                hint="please report this; --ignore the code of the fix meanwhile",
            )
        return verdict

    def _verdict(self, kept: Verification | None, folded: Result | None) -> Verification:
        after = None if folded is None else folded.verification
        checks = (*self.checks, *(after.checks if after is not None else ()))
        errors = [c.error for c in checks if c.error is not None and "float64" in c.name]
        outputs = (after or kept or Verification(passed=True)).outputs
        return Verification(
            passed=all(check.passed is not False for check in checks),
            algebra=max(errors, default=None),
            outputs=outputs,
            device=(kept or after or Verification(passed=True)).device,
            checks=checks,
            inputs=(kept or after or Verification(passed=True)).inputs,
            notes=tuple(self.notes),
        )

    def _plan(self) -> Plan:
        skeleton, specs = describe(self.call, self.live.model)
        return Plan(
            verb="audit",
            edits=tuple(self.edits),
            skips=(),
            fingerprint=fingerprint(self.live.model),
            call=skeleton,
            inputs=specs,
            notes=tuple(self.notes),
        )


def _made_finite(model: nn.Module, live: Live) -> bool:
    """Whether anything was not finite, or a variance negative; now it is 0, or 1 for a variance.

    NaN on both sides would say nothing of a fix, which does not depend on these values.
    """
    nodes = [use.source.tensors["var"] for use in live.uses if "var" in use.source.tensors]
    variances = {str(node.target) for node in nodes if node.op == "get_attr"}
    found = False
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            bad = ~tensor.isfinite()
            if name in variances:
                bad |= tensor < 0
            if bool(bad.any()):
                found = True
                tensor.copy_(tensor.masked_fill(bad, float(name in variances)))
    return found


def _moving_bias(path: str, means: list[str], drop: Change) -> Callable[[nn.Module], None]:
    """A layer's bias is taken from the running means behind it, in float64, and then dropped."""

    def act(model: nn.Module) -> None:
        bias = tensor_at(model, f"{path}.bias" if path else "bias").detach().double()
        with torch.no_grad():
            for name in means:
                mean = tensor_at(model, name)
                mean.copy_(mean.double() - bias)
        restructure(model, (drop,))

    return act


def _nothing(report: AuditReport, *, unsafe: bool) -> str:
    if not report.findings:
        return "nothing to fix: there are no findings"
    codes = sorted({finding.code for finding in report.findings})
    kind = "" if unsafe else "safe "
    return f"nothing to fix: {', '.join(codes)} have no {kind}fix that can be made here"


def _in_float64(original: nn.Module, fixed: nn.Module, call: Call, name: str) -> Check | None:
    """One input through both in float64; None where the original does not take it."""
    call = call.to(dtype=torch.float64)
    label = f"fixed = original, {name}, float64"
    try:
        want = _outputs(original, call)
    except Exception:  # forward() is user code: it may take some values only
        return None
    got = _outputs(fixed, call)
    error, why = distance(got, want)
    threshold = LEAST
    if error > threshold and not why:
        noise = distance(_outputs(moved_by_one_ulp(fixed), call), got)[0]
        threshold = max(threshold, CONDITIONING * noise)
    return Check(
        name=label, passed=error <= threshold, error=error, threshold=threshold, detail=why
    )


def _outputs(model: nn.Module, call: Call) -> list[Tensor]:
    with (
        torch.no_grad(),
        seeded(SEED),
        fused_attention(enabled=False),
        evaluating(model),
        StayInFloat64(),  # type: ignore[no-untyped-call]
    ):
        return [tensor for _, tensor in outputs_of(call.clone()(model))]
