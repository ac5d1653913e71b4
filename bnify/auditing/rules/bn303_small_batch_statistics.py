"""BN303: so few values share a channel in a batch that its statistics are noise."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median_low
from typing import TYPE_CHECKING, Any

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject

if TYPE_CHECKING:
    from bnify.auditing.live import Live

_LEAST = 32


class SmallBatchStatistics(Rule):
    """A batch norm takes its statistics from fewer than 32 values a channel.

    What it checks:
        The number n of values that share a channel in one batch, N·H·W, counted where the norm
        runs: below 32 in train mode. With a ``loader`` it is scaled to the batch size of that. A
        norm in eval mode is an info; frozen norms, look-alikes with constant statistics and
        instance norms are left out.

    Why it is bad:
        A variance from n values is off by sqrt(2/(n-1)) of itself: 25 % at 32 values, 82 % at 4.
        Training then fits the noise of its batches, which eval mode does not have.

    Example:
        ``BatchNorm1d`` behind global pooling, trained with 8 samples on each device: n = 8.

    How to fix it:
        Larger batches, synchronised statistics over devices, group norm instead, or frozen norms
        in fine-tuning.

    Fix safety:
        Unsafe: each of these changes what is trained.

    Source:
        Wu & He (2018), "Group Normalization": the error of a ResNet-50 rises from 23.6 % at 32
        samples to 34.7 % at 2. The noise is that of a variance of n normal values.
    """

    code = "BN303"
    name = "small-batch-statistics"
    severity = Severity.WARNING
    tiers = ("T2", "T3")
    needs = needs(Need.DATA, Need.LOOP)
    fix = "larger batches, SyncBatchNorm, group norm, or freeze the norm"
    safety = Safety.ADVICE
    cost = "training fits the noise of its batches, which eval mode does not have"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        for path, count, size, severity in (*_measured(subject), *_observed(subject)):
            if count >= _LEAST:
                continue
            noise = (2 / (count - 1)) ** 0.5 if count > 1 else None
            said = "no variance" if noise is None else f"sqrt(2/(n-1)) = {noise:.2f} noise"
            values: dict[str, Any] = {"values_per_channel": count, "batch": size, "noise": noise}
            yield self.finding(
                path,
                f"{count} value{'' if count == 1 else 's'} a channel in a batch of {size} "
                f"(below {_LEAST}): {said}",
                values,
                severity=severity,
            )


def _measured(subject: Subject) -> Iterator[tuple[str, int, int, Severity]]:
    """Norms, their values a channel and the batch size, in batches as the loader makes them."""
    measured, live = subject.measured, subject.live
    if measured is None or live is None:
        return
    here = median_low(measured.sizes)
    there = getattr(subject.loader, "batch_size", None)
    size = there if isinstance(there, int) and there > 0 else here
    for path, data in measured.norms.items():
        severity = None if data.instance or data.constant else _severity(live, path)
        if severity is not None:
            yield path, data.per_batch * size // max(here, 1), size, severity


def _observed(subject: Subject) -> Iterator[tuple[str, int, int, Severity]]:
    """The same of a training loop; one value a channel is BN205's."""
    for path, calls in (subject.observed.calls if subject.observed else {}).items():
        if calls.batch and calls.values is not None and calls.values > 1:
            yield path, calls.values, calls.samples, Severity.WARNING


def _severity(live: Live, path: str) -> Severity | None:
    """A warning in train mode, an info where it may be trained again; None for a frozen norm."""
    norm = next((n for n in live.norms if n.path == path), None)
    if norm is None:  # functional: the mode of the model decides
        return Severity.WARNING if live.model.training else Severity.INFO
    if norm.frozen:
        return None
    if norm.module.training:
        return Severity.WARNING
    parameters = list(norm.module.parameters(recurse=False))
    frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
    return None if frozen else Severity.INFO
