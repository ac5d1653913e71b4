"""BN302: batch norm on several devices, each with a small batch."""

from __future__ import annotations

import os
from collections.abc import Iterator

from bnify.auditing.finding import Finding, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject

_VALUES, _SAMPLES = 32, 4


class DistributedWithoutSync(Rule):
    """In a distributed run each device normalizes by its own few samples.

    What it checks:
        Under several processes, batch norms that are no SyncBatchNorm: whether a channel has fewer
        than 32 values in a device's batch, or the batch at most 4 samples. The batch size is the
        training loader's, else the example's.

    Why it is bad:
        Every rank computes its own statistics and keeps its own running ones; with few values they
        are noise, and the checkpoint holds those of rank 0.

    Example:
        Detection on 8 GPUs with 2 images each.

    How to fix it:
        ``nn.SyncBatchNorm.convert_sync_batchnorm(model)``, or a group norm.

    Fix safety:
        It changes training; eval mode stays the same.

    Source:
        PyTorch documentation of ``torch.nn.SyncBatchNorm``; Peng et al. (2018), "MegDet".
    """

    code = "BN302"
    name = "ddp-without-sync"
    severity = Severity.WARNING
    tiers = ("T1", "T3")
    needs = needs((Need.WORLD, Need.FORWARD), (Need.WORLD, Need.LOOP))
    fix = "nn.SyncBatchNorm.convert_sync_batchnorm(model), or a group norm"
    cost = "statistics of a few samples, different on every rank"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        for layer, size, values in _recorded(subject) or _observed(subject):
            if values < _VALUES or size <= _SAMPLES:
                yield self.finding(
                    layer,
                    f"{size} samples and {values} values a channel on each of {world} devices "
                    f"(at least {_SAMPLES + 1} and {_VALUES})",
                    {"samples": size, "values_per_channel": values, "world": world},
                )


def _recorded(subject: Subject) -> list[tuple[str, int, int]]:
    """Plain batch norms, samples and values a channel on one device; of the loader's batches."""
    from torch import nn

    live = subject.live
    if live is None or live.captured is None:
        return []
    recorded = live.captured.call.batch or 1
    size = getattr(subject.loader, "batch_size", None)
    size = size if isinstance(size, int) else recorded
    least: dict[str, int] = {}
    for use in live.uses:
        if use.kind != "batch" or use.of_weight or isinstance(live.owner(use), nn.SyncBatchNorm):
            continue
        values = use.per_channel * size // recorded
        least[use.layer] = min(values, least.get(use.layer, values))
    return [(layer, size, values) for layer, values in least.items()]


def _observed(subject: Subject) -> list[tuple[str, int, int]]:
    """The same of a training loop."""
    return [
        (layer, calls.samples, calls.values)
        for layer, calls in (subject.observed.calls if subject.observed else {}).items()
        if calls.batch and not calls.synchronised and calls.values is not None
    ]
