"""What an output is held to: the error budget, or what stands in where float64 is impossible.

With truth t (the reference in float64), reference r and candidate c, each output on each input:

    own = max(‖r - t‖ / ‖t‖, FLOOR / k)        err = ‖c - t‖ / ‖t‖        PASS iff err ≤ k · own

so an error below FLOOR always passes, and the ratio err / own is the one number to look at. An
input on which k times the own error reaches the size of the output itself decides nothing; an
output that no input decides fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, Protocol

from torch import Tensor

from bnify.verdict import OutputVerdict
from bnify.verification.cases import Case, Origin, is_finite
from bnify.verification.measures import (
    UNCOMPARABLE,
    Distance,
    distance,
    is_exact,
    mismatch,
    relative_l2,
    rms,
)

FLOOR: Final = 1e-6
# An output this much smaller than on the first input has cancelled to rounding noise there.
_CANCELLED: Final = 1e-6
# The own error of so few values may be small by luck; the median over the inputs bounds it then.
_FEW: Final = 32


@dataclass(frozen=True, slots=True)
class Ruling:
    """The verdict on one output on one input, and whether that input could decide anything."""

    verdict: OutputVerdict
    decided: bool = True


class Rule(Protocol):
    """How one output on one input is judged; shapes and dtypes are known to be equal."""

    @property
    def name(self) -> str:
        """``"error budget"``, ``"noise floor"`` or ``"tolerance"``."""

    @property
    def threshold(self) -> float | None:
        """The ratio that is allowed; None for plain tolerances."""

    def rule(self, case: Case, index: int, got: Tensor) -> Ruling:
        """Judge a finite floating-point output."""


class ErrorBudget:
    """The candidate may be off by k times what the reference itself is off."""

    name = "error budget"

    def __init__(self, cases: Sequence[Case], k: float) -> None:
        self.threshold = k
        first = cases[0].truth or [] if cases else []
        self._scales = [_CANCELLED * rms(truth) for _, truth in first]
        self._own = {case.label: self._own_errors(case) for case in cases}
        self._typical = [median(errors) for errors in zip(*self._own.values(), strict=True)]

    def _own_errors(self, case: Case) -> list[float]:
        pairs = zip(case.reference, case.truth or [], self._scales, strict=True)
        return [relative_l2(own, truth, scale) for (_, own), (_, truth), scale in pairs]

    def own_error(self, case: Case, index: int) -> float:
        """Relative L2 error of the reference itself on this input, bounded from below."""
        own = self._own[case.label][index]
        if case.reference[index][1].numel() < _FEW:
            own = max(own, self._typical[index])
        return max(own, FLOOR / self.threshold)

    def rule(self, case: Case, index: int, got: Tensor) -> Ruling:
        """Judge by the ratio of the candidate's error to the reference's own."""
        k = self.threshold
        name, truth = (case.truth or [])[index]
        far = distance(got, truth, self._scales[index])
        own = self.own_error(case, index)
        ratio = far.rel_l2 / own
        passed = ratio <= k
        said = "" if passed else f"{ratio:.3g}x the reference's own float32 error (limit {k:g}x)"
        if passed and own * k >= 1:
            said = f"its own float32 error of {own:.1e} is too large to decide anything"
        # Zeros are worth trying, but on them weights do not take part: they clear nobody.
        decided = own * k < 1 and case.origin is not Origin.ZEROS
        return Ruling(_verdict(name, far, ratio, passed, said), decided)


class NoiseFloor:
    """No float64: the candidate may differ by k times what reordering moves the reference."""

    name = "noise floor"

    def __init__(self, floor: Sequence[float], k: float) -> None:
        self.threshold = k
        self._floor = [max(value, FLOOR / k) for value in floor]

    def rule(self, case: Case, index: int, got: Tensor) -> Ruling:
        """Judge by the ratio of the difference to the noise floor."""
        name, want = case.reference[index]
        far, floor = distance(got, want), self._floor[index]
        passed = far.rel_l2 <= self.threshold * floor
        said = f"{far.rel_l2 / floor:.3g}x the noise floor {floor:.1e} (limit {self.threshold:g}x)"
        return Ruling(_verdict(name, far, None, passed, said))


class Tolerance:
    """No float64: the user's word, ``|candidate - reference| ≤ atol + rtol·|reference|``."""

    name = "tolerance"
    threshold = None

    def __init__(self, rtol: float, atol: float) -> None:
        self.rtol, self.atol = rtol, atol

    def rule(self, case: Case, index: int, got: Tensor) -> Ruling:
        """Judge element by element."""
        name, want = case.reference[index]
        gap = (got.double() - want.double()).abs()
        passed = bool((gap <= self.atol + self.rtol * want.double().abs()).all())
        said = f"held to rtol {self.rtol:g}, atol {self.atol:g}"
        return Ruling(_verdict(name, distance(got, want), None, passed, said))


def rule_output(rule: Rule, case: Case, index: int, got: Tensor) -> Ruling:
    """Judge one output: shape, dtype and non-finite values first, integers exactly."""
    name, want = case.reference[index]
    wrong = mismatch(got, want)
    if wrong is not None:
        return Ruling(_verdict(name, UNCOMPARABLE, None, False, wrong))
    if not is_finite(want):
        return refused(name, "the reference's own output is not finite")
    if not is_exact(want):
        return rule.rule(case, index, got)
    different = int((got != want).sum())
    differ = "integer differs" if want.numel() == 1 else "integers differ"
    said = f"{different} of {want.numel()} {differ}" if different else ""
    return Ruling(_verdict(name, distance(got, want), None, not different, said))


def refused(name: str, detail: str) -> Ruling:
    """An output that is not there to be judged."""
    return Ruling(_verdict(name, UNCOMPARABLE, None, False, detail))


def worst(name: str, rulings: Sequence[tuple[str, Ruling]]) -> OutputVerdict:
    """One verdict for an output over all inputs: the worst of each number.

    Args:
        name: The output.
        rulings: Label of the input and the ruling on it.
    """
    verdicts = [ruling.verdict for _, ruling in rulings]
    ratios = [verdict.budget_ratio for verdict in verdicts if verdict.budget_ratio is not None]
    shares = [verdict.top1 for verdict in verdicts if verdict.top1 is not None]
    failed = [(label, ruling) for label, ruling in rulings if not ruling.verdict.passed]
    decided = any(ruling.decided for _, ruling in rulings)
    said = next((f"on {label}: {ruling.verdict.detail}" for label, ruling in failed), "")
    if not said and not decided:
        why = next((verdict.detail for verdict in verdicts if verdict.detail), "")
        said = f"ill-conditioned on every input: {why}"
    elif not said:
        # Where there was a budget there is nothing to add; the stand-ins say how they judged.
        said = verdicts[-1].detail if verdicts[-1].budget_ratio is None else ""
    return OutputVerdict(
        name=name,
        rel_l2=max((verdict.rel_l2 for verdict in verdicts), default=float("inf")),
        max_abs=max((verdict.max_abs for verdict in verdicts), default=float("inf")),
        max_abs_over_rms=max((v.max_abs_over_rms for v in verdicts), default=float("inf")),
        budget_ratio=max(ratios, default=None),
        tolerance=max((verdict.tolerance for verdict in verdicts), default=float("inf")),
        top1=min(shares, default=None),
        passed=not failed and decided,
        detail=said,
    )


def _verdict(
    name: str, far: Distance, ratio: float | None, passed: bool, detail: str
) -> OutputVerdict:
    return OutputVerdict(
        name=name,
        rel_l2=far.rel_l2,
        max_abs=far.max_abs,
        max_abs_over_rms=far.max_abs_over_rms,
        budget_ratio=ratio,
        tolerance=far.tolerance,
        top1=far.top1,
        passed=passed,
        detail=detail,
    )
