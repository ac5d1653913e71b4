"""One pass over one process's share of the data: what reached each norm, pooled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, Final

from torch import Tensor, nn
from torch import distributed as dist

from bnify.auditing.batches import Batch, read
from bnify.auditing.live import Live
from bnify.auditing.owners import Norms
from bnify.auditing.passes import run_probed
from bnify.auditing.probe import Probe, Seen
from bnify.borrow import copy_model, seeded
from bnify.calibrating.spread import Spread
from bnify.errors import PlanError
from bnify.layers import without_synchronisation
from bnify.pooled import PerInstance, Pooled
from bnify.ranks import several_ranks
from bnify.structure import Call, first_call, started

#: With fewer batches their spread is no estimate.
LEAST_BATCHES: Final = 8


@dataclass(slots=True)
class Shard:
    """What one process saw.

    Attributes:
        seen: What reached each norm, in the order of execution.
        names: Names of the running mean and variance of each norm.
        spreads: How far batches are apart, by norm; empty without a tolerance.
        batches: Number of batches.
        samples: Number of samples.
        stopped: Whether it stopped early.
        unclear: Look-alikes that were left out: their channels could be on two axes.
    """

    seen: dict[str, Seen] = field(default_factory=dict)
    names: dict[str, tuple[str, str]] = field(default_factory=dict)
    spreads: dict[str, Spread] = field(default_factory=dict)
    batches: int = 0
    samples: int = 0
    stopped: bool = False
    unclear: set[str] = field(default_factory=set)

    def merge(self, other: Shard) -> None:
        """Merge what another process saw."""
        for path, seen in other.seen.items():
            own = self.seen.get(path)
            if own is None:
                self.seen[path] = seen
            else:
                own.pooled.merge(seen.pooled)  # type: ignore[arg-type]  # both of one kind
                own.sizes.update(seen.sizes)
        for path, spread in other.spreads.items():
            known = self.spreads.get(path)
            if known is None:
                self.spreads[path] = spread
            else:
                known.merge(spread)
        self.names.update(other.names)
        self.batches += other.batches
        self.samples += other.samples
        self.stopped |= other.stopped
        self.unclear |= other.unclear


def run_shard(
    model: nn.Module,
    batches: Iterator[Batch],
    constant: frozenset[str],
    *,
    tolerance: float | None,
    progress: Callable[[str], None],
) -> Shard:
    """Run a copy of the model over batches, every norm with the statistics of its batch.

    Args:
        model: The model; it is not touched.
        batches: The data, read one at a time.
        constant: Paths of look-alikes that hold constants.
        tolerance: Stop when the standard error of every norm is at most this.
        progress: Called with ``"batch 3"``.

    Raises:
        PlanError: A batch cannot be run; its number is named.
    """
    working = without_synchronisation(copy_model(model)).eval()
    norms = Buffers(Live.of(model, None), working, constant)
    probe = _Pass(norms, spreads=tolerance is not None)
    shard = Shard(seen={}, names=norms.names, spreads=probe.spreads)
    rank, size = (dist.get_rank(), dist.get_world_size()) if several_ranks() else (0, 1)
    with seeded(0):  # a loader draws seeds and order from the global random state
        for batch in batches:
            run_probed(working, probe, batch, number=batch.number * size + rank)
            shard.batches += 1
            shard.samples += batch.samples
            progress(f"batch {shard.batches}")
            if tolerance is not None and shard.batches >= LEAST_BATCHES:
                found = {p: s for p, s in probe.found.items() if p in norms.names}
                errors = (probe.spreads[path].error(one.pooled) for path, one in found.items())
                if found and all(error <= tolerance for error in errors):
                    shard.stopped = True
                    break
    shard.seen, shard.unclear = probe.found, probe.unclear
    for path, first in norms.sharing.items():  # what reached either is in the statistics of both
        if first in shard.seen:
            shard.seen[path] = replace(copy.deepcopy(shard.seen[first]), path=path)
        if first in shard.spreads:
            shard.spreads[path] = copy.deepcopy(shard.spreads[first])
    return shard


def stream(data: Any, limit: int | None, model: nn.Module, example: Call | None) -> Iterator[Batch]:
    """At most so many batches of the data, as calls of the model on its device.

    Args:
        data: One tensor or dict, or anything that yields batches; no more of it is read.
        limit: How many batches; None for all.
        model: The model.
        example: Inputs of the kind to look for in a batch; None takes the first batch's.

    Raises:
        PlanError: The data is not iterable, or a batch is nothing that forward takes or holds NaN.
    """
    iterator = islice(started(data), limit)
    for first in iterator:
        if example is None:
            example = first_call(first, model)
        if example is None:
            raise PlanError(
                f"the first batch of the data is a {type(first).__name__} that forward() cannot "
                "take",
                hint="pass inputs= beside data",
            )
        yield from read(chain([first], iterator), example, model)


class Buffers(Norms):
    """Norms of a working copy, functional ones too that keep their statistics as buffers.

    Without a recording those are found as they run.
    """

    def by_mean(self, given: Mapping[str, Any]) -> str | None:
        """Path of the norm; one that is met for the first time gets its name here.

        Tensors that forward() puts in the place of buffers (``functional_call``) are known by the
        names that they have at this moment, and by nothing else: an id outlives no tensor.
        """
        known = super().by_mean(given)
        if known is not None:
            return known
        mean, var = given.get("running_mean"), given.get("running_var")
        if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
            return None
        buffers = {id(tensor): name for name, tensor in self.working.named_buffers()}
        names = buffers.get(id(mean)), buffers.get(id(var))
        if names[0] is None or names[1] is None:
            return None
        for path, pair in self.names.items():
            if pair[0] == names[0]:
                return path
        scales = {id(tensor): name for name, tensor in self.working.named_parameters()}
        path = scales.get(id(given.get("weight")), names[0])
        if path in self.names:  # a scale that is another's too
            path = names[0]
        self.names[path] = (names[0], names[1])
        return path


class _Pass(Probe):
    """Norms run with the statistics of their batch, a single value a channel included.

    What they were before has no part in it, so wrong statistics of one norm reach no other.
    """

    def __init__(self, norms: Norms, *, spreads: bool) -> None:
        super().__init__(norms, train=True, alone=True)
        self.spreads: dict[str, Spread] = {}
        self._measured: dict[str, Seen] = {}
        self._wanted = spreads

    def pooled(self, seen: Seen, batch: Pooled | PerInstance) -> None:
        """Merge the statistics of one call, and compare them with those of others."""
        super().pooled(seen, batch)
        if not self._wanted:
            return
        if self._measured.get(seen.path) is not seen:  # a call inside it counts, as in found
            self._measured[seen.path] = seen
            self.spreads[seen.path] = Spread.empty(batch.mean.numel())
        self.spreads[seen.path].add(batch)
