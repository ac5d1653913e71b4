"""BN205: a batch norm that gets one value a channel from one sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.observed import Observed
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject


class OneValuePerChannel(Rule):
    """At batch size 1 a batch norm has a single value a channel, and train mode raises.

    What it checks:
        The size of what every batch norm normalizes in a pass at batch size 1, over its channels.
        With the training loader, whether its last batch has one sample. In a training loop: the
        passes that are looked at, and the one that raised.

    Why it is bad:
        The variance of one value is 0, so PyTorch raises "Expected more than 1 value per channel
        when training". A loader with ``drop_last=False`` reaches that once an epoch if the number
        of samples leaves a remainder of 1; two values a channel give ±1 and nothing else.

    Example:
        The pooling branch of deeplabv3 (``classifier.0.convs.4``): global pooling, a 1×1
        convolution, a batch norm on 1×1 pixels.

    How to fix it:
        ``DataLoader(..., drop_last=True)``, or a group norm in that place.

    Fix safety:
        Another norm changes the function.

    Source:
        ``torch.nn.functional.batch_norm``, which refuses it; Chen et al. (2017), "Rethinking Atrous
        Convolution", for the pooling branch.
    """

    code = "BN205"
    name = "one-value-per-channel"
    severity = Severity.WARNING
    tiers = ("T1", "T3")
    needs = needs(Need.FORWARD, Need.LOOP)
    fix = "DataLoader(..., drop_last=True), or a group norm here"
    safety = Safety.ADVICE
    cost = "training raises on a batch of 1, and learns little on a batch of 2"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm; an error where the loader has such a batch."""
        if subject.observed is not None:
            yield from self._observed(subject.observed)
        live = subject.live
        if live is None or live.captured is None:
            return
        size = live.captured.call.batch or 0
        # A norm with more values than samples has several from each: no second pass for those.
        if not any(use.of_batch and use.per_channel <= size for use in live.uses):
            return
        last = last_batch(subject.loader)
        for layer, count in live.values_alone().items():
            if count != 1:
                continue
            message = "one sample gives 1 value a channel"
            values: dict[str, Any] = {"values_per_channel": 1}
            if last is not None:
                message += f"; the loader's last batch has {last}"
                values["last_batch"] = last
            severity = Severity.ERROR if last == 1 else self.severity
            yield self.finding(layer, message, values, severity=severity)

    def _observed(self, observed: Observed) -> Iterator[Finding]:
        for layer, calls in observed.calls.items():
            if calls.batch and calls.values == 1:
                samples = calls.samples
                yield self.finding(
                    layer,
                    f"1 value a channel in train mode, in a batch of {samples}",
                    {"values_per_channel": 1, "batch": samples},
                    severity=Severity.ERROR,
                )


def last_batch(loader: Any) -> int | None:
    """Number of samples in the last batch of a loader; None where it cannot be told.

    Only ``batch_size``, ``drop_last`` and the length of ``dataset`` (or of ``sampler``) are read.
    """
    size = getattr(loader, "batch_size", None)
    if not isinstance(size, int) or size < 1:
        return None
    if getattr(loader, "drop_last", False):
        return size
    for holder in (getattr(loader, "sampler", None), getattr(loader, "dataset", None)):
        try:
            count = len(holder)  # type: ignore[arg-type]
        except TypeError:
            continue
        return count % size or min(size, count)
    return None
