"""What the data say of eval mode, and what the vectors say is wrong with statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bnify.auditing.finding import Severity
from bnify.auditing.state import NormState

if TYPE_CHECKING:
    from bnify.auditing.measured import Measured

_GAP, _LARGE_GAP = 0.02, 0.10
_NOISE = 0.5
_AGREEMENT, _LOW_AGREEMENT = 0.98, 0.90


def mode_gap(measured: Measured) -> Severity | None:
    """How bad eval mode is against norms in train mode; None if it is not, or not known.

    Labels decide where there are some: predictions of a model that is often wrong differ between
    any two batches. Eval mode that is better than train mode is no fault of its statistics. Without
    labels it is an info where recalibrated statistics leave half of the disagreement or more: that
    is the noise of the batches.
    """
    if measured.too_few or measured.untrained or measured.at_chance:
        return None
    agreement = 1.0 if measured.agreement is None else measured.agreement
    if measured.accuracy is not None and measured.train_accuracy is not None:
        gap = measured.train_accuracy - measured.accuracy
        if gap <= _GAP:
            return None
        bad = gap > _LARGE_GAP or agreement < _LOW_AGREEMENT
        return Severity.ERROR if bad else Severity.WARNING
    if agreement >= _AGREEMENT:
        return None
    if is_noise(measured):
        return Severity.INFO
    return Severity.ERROR if agreement < _LOW_AGREEMENT else Severity.WARNING


def is_noise(measured: Measured) -> bool:
    """Whether half of the disagreement stays with recalibrated statistics."""
    proof = measured.proof
    if proof is None or proof.measure != "agreement":
        return False
    return 1 - proof.after > _NOISE * (1 - proof.before)


def at_fault(norms: Sequence[NormState]) -> Iterator[tuple[str, list[NormState]]]:
    """Norms whose own vectors and options say why statistics are wrong, the plainest cause first.

    Yields:
        The cause in words, with the code of its rule, and the norms.
    """
    tests = (
        ("statistics are not finite (BN101)", lambda n: not n.finite),
        ("statistics are as initialised (BN102)", lambda n: n.fresh),
        ("momentum keeps little but the last batch (BN203)", lambda n: (n.momentum or 0) >= 0.5),
        ("momentum 0 keeps the statistics as they are (BN203)", lambda n: n.momentum == 0),
        ("too few batches were seen (BN104)", _underconverged),
    )
    for words, test in tests:
        found = [norm for norm in norms if not holds_constants(norm) and test(norm)]
        if found:
            yield words, found


def holds_constants(norm: NormState) -> bool:
    """A look-alike whose statistics are constants, and not lost: trained scale at 0 and 1, NaN."""
    return norm.frozen and norm.finite and not (norm.fresh and norm.moved)


def _underconverged(norm: NormState) -> bool:
    momentum, batches = norm.momentum, norm.batches
    if not momentum or not batches or momentum >= 1:
        return False
    return bool((1 - momentum) ** batches > 0.05)
