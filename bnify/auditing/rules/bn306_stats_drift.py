"""BN306: the running statistics are not those of the data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.proved import with_proof
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject
from bnify.auditing.verdict import at_fault, mode_gap

if TYPE_CHECKING:
    from bnify.auditing.live import Live
    from bnify.auditing.measured import Measured

_INFO, _WARNING, _ERROR = 0.02, 0.1, 0.3
_SAMPLES = 32
#: Operators by a constant that leave the raw input what it is: normalization in the model.
_BY_CONSTANT: Final = frozenset({"add", "sub", "mul", "div"})


class StatisticsDrift(Rule):
    """The input of a norm has another distribution on the data than its running statistics say.

    What it checks:
        Mean and variance of each norm's input in eval mode, pooled over all batches, against the
        running ones: the Kullback-Leibler divergence of two Gaussians for each channel, ε added to
        both variances. Its median over channels is an info above 0.02 and a warning above 0.1, both
        plus 1 / (number of samples) for the noise of small data. It is an error only above 0.3 and
        where eval mode is worse for it (BN305). The first norm drifting, at the raw input, says:
        check the preprocessing.

    Why it is bad:
        Drift alone need not be: the same divergence was measured on inputs three times as large
        at accuracy 0.984, and with lost statistics at 0.40. With BN305 it is the cause, and says
        where it starts.

    Example:
        A model for images in [0, 1] that is fed 0 to 255: ``bn1`` has a divergence of thousands.

    How to fix it:
        Check the preprocessing first. If the data are as they should be, recalibrate.

    Fix safety:
        Needs data. It is proved on a copy: the finding has accuracy (or agreement) before and
        after.

    Source:
        Kullback & Leibler (1951); Schneider et al. (2020), "Improving robustness against common
        corruptions by covariate shift adaptation".
    """

    code = "BN306"
    name = "stats-drift"
    severity = Severity.WARNING
    tiers = ("T2",)
    needs = needs(Need.DATA)
    fix = "check preprocessing, then recalibrate the statistics on data"
    safety = Safety.DATA
    cost = "eval mode normalizes with statistics of other data"

    def unmet(self, subject: Subject) -> str:
        """Enough samples."""
        measured = subject.measured
        if measured is None or not measured.norms or measured.samples >= _SAMPLES:
            return ""
        return f"{_SAMPLES} samples of data or more: there are {measured.samples}"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        measured, live = subject.measured, subject.live
        if measured is None or live is None or measured.untrained:
            return
        worse = mode_gap(measured) in (Severity.ERROR, Severity.WARNING)
        explained = {norm.path for _, norms in at_fault(subject.norms) for norm in norms}
        first = next((path for path in measured.norms if path in measured.states), None)
        noise = 1 / measured.samples
        for path, divergence in drifted(measured, _INFO):
            warning = divergence > _WARNING + noise
            limit = (_WARNING if warning else _INFO) + noise
            data = measured.norms[path]
            message = (
                f"KL divergence of the data from the running statistics {divergence:.3f}, median "
                f"of {data.mean.size} channels (threshold {limit:.3g})"
            )
            if warning and path == first and path not in explained and sees_raw_input(live, path):
                message += "; its input is the raw input: check preprocessing"
            severity = Severity.WARNING if warning else Severity.INFO
            if divergence > _ERROR + noise and worse:
                severity = Severity.ERROR
            values = {"divergence": divergence, "threshold": limit, "channels": data.mean.size}
            if data.constant and measured.states[path].fresh:
                continue  # no statistics, but an affine map that was built as such
            if data.constant:
                yield self.finding(
                    path,
                    f"{message}; it holds constants",
                    values,
                    severity=Severity.INFO,
                    fix="",
                    safety=Safety.ADVICE,
                )
            else:
                yield with_proof(self.finding(path, message, values, severity=severity), subject)


def drifted(measured: Measured, limit: float = _WARNING) -> Iterator[tuple[str, float]]:
    """Norms that are off by more than the limit, in the order of execution, and by how much."""
    for path in measured.norms:
        divergence = measured.divergence(path)
        if divergence is not None and divergence > limit + 1 / max(measured.samples, 1):
            yield path, divergence


def sees_raw_input(live: Live, path: str) -> bool:
    """Whether at most one convolution or linear layer is between a norm and the model's input."""
    from bnify import ops
    from bnify.auditing.flow import live_inputs

    use = next((use for use in live.uses if use.layer == path), None)
    if use is None:
        return False
    node, layers = use.source.value, 0
    while node.op == "call_function":
        name = ops.name_of(node)
        layers += name in ops.WEIGHT_POSITION
        sources = live_inputs(live, node)
        arranges = name in ops.VIEWS or name in _BY_CONSTANT or name in ops.WEIGHT_POSITION
        if len(sources) != 1 or layers > 1 or not arranges:
            return False
        node = sources[0]
    return node.op == "placeholder"
