"""BN202: dropout in front of a batch norm."""

from __future__ import annotations

from collections.abc import Iterator

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject

_STEPS = 4
_SHIFT = 0.4


class DropoutBeforeNorm(Rule):
    """Elements are dropped shortly before a batch norm, which sees other variances in training.

    What it checks:
        Whether an element-wise dropout with p > 0 stands at most 4 operators in front of a batch
        norm, with no other norm in between. Dropout of whole channels (Dropout1d to 3d), DropPath
        and alpha dropout do not count. With data it is measured: the median over channels of
        log2(running variance / variance in eval mode) must be within 0.4.

    Why it is bad:
        Dropout changes the variance of what follows in train mode only. The running variance is
        that of train mode, so in eval mode the norm divides by the wrong number: a variance shift.

    Example:
        torchvision's deeplabv3: Dropout(0.5) two operators before ``classifier.2``.

    How to fix it:
        Put the dropout behind the last norm, or recalibrate the statistics in eval mode after
        training.

    Fix safety:
        Recalibration needs data and is proved on a copy; moving the dropout changes training.

    Source:
        Li, Chen, Hu & Yang (2018), "Understanding the Disharmony between Dropout and Batch
        Normalization by Variance Shift".
    """

    code = "BN202"
    name = "dropout-before-bn"
    severity = Severity.WARNING
    tiers = ("T1", "T2")
    needs = needs(Need.FORWARD)
    fix = "put the dropout behind the last norm, or recalibrate after training"
    safety = Safety.DATA
    cost = "eval mode divides by a variance that only train mode has"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        from bnify.auditing.flow import before, dropout_rate

        live = subject.live
        if live is None:
            return
        results = {use.source.result for use in live.uses}
        seen: set[str] = set()
        for use in live.uses:
            if not use.of_batch or use.kind == "frozen" or use.layer in seen:
                continue
            above = before(live, use.source.value, _STEPS, lambda node: node not in results)
            steps = {node: dropout_rate(node) for node in above}
            dropped = max(steps.values(), default=0.0)
            if not dropped:
                continue
            seen.add(use.layer)
            where = next(node for node, p in steps.items() if p == dropped)
            module = where.meta.get("module", "")
            values = {"p": dropped, "dropout": module}
            message = f"Dropout({dropped:g}) at {module or 'the root'} is at most {_STEPS} "
            message += "operators in front"
            shift = None if subject.measured is None else subject.measured.log2_ratio(use.layer)
            if shift is not None:
                if abs(shift) <= _SHIFT:
                    continue
                message += f"; running variance 2^{shift:.2f} of that in eval mode (±{_SHIFT})"
                values["log2_variance_ratio"] = shift
            yield self.finding(use.layer, message, values)
