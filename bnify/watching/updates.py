"""How often running statistics are updated between two steps: read on the host, without hooks.

A tensor has a version, a number on the host that every write in place raises, in any mode of
gradients. That of ``num_batches_tracked`` (of the running mean in an instance norm, which does not
count) says how many passes in train mode there were, without looking at the tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from operator import sub
from typing import Any, Final

from torch import Tensor, nn

from bnify.auditing.live import NormModule
from bnify.auditing.observed import Burst

#: A burst is more than ``_TIMES`` the updates of other steps, and ``_MORE``. Accumulation over k
#: batches leaves at most k - 1 for the next step, which makes 2k - 1.
_TIMES: Final = 2
_MORE: Final = 4
#: So many steps in a row may be one burst; more are another way to train (critic steps).
_LONGEST: Final = 2
#: Steps before anything can stand out, and the share of them that must be alike (give or take 1):
#: closures and bags of any size have no usual count.
_LEAST: Final = 5
_ALIKE: Final = 0.75
#: Rows of counts that are kept until they are looked at.
_ROWS: Final = 256


class _Series:
    """The counts of one norm, step by step, and what stands out of them."""

    __slots__ = ("counts", "high", "length")

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.high: Burst | None = None
        self.length = 0

    def add(self, step: int, count: int, times: int) -> Burst | None:
        """Count ``times`` steps from ``step`` on, each with so many updates.

        Returns:
            A burst that is over with this.
        """
        if not count:  # a step of another optimizer after the same pass
            return None
        usual = self._usual()
        self.counts[count] += times
        if usual is None or not _stands_out(count, usual):
            return self.close()
        if self.high is None or count > self.high.writes:
            self.high = Burst(step, count, usual)
        self.length += times
        return None

    def close(self) -> Burst | None:
        """The burst that was going on, if it was one."""
        burst = self.high if self.length <= _LONGEST else None
        self.high, self.length = None, 0
        return burst

    def _usual(self) -> int | None:
        """The most updates of an ordinary step; None where steps are not alike."""
        total = self.counts.total()
        if total < _LEAST:
            return None
        mode = max(self.counts, key=self.counts.__getitem__)
        alike = sum(self.counts[count] for count in (mode - 1, mode, mode + 1))
        if alike < _ALIKE * total:
            return None
        return max(count for count in self.counts if not _stands_out(count, mode))


def _stands_out(count: int, usual: int) -> bool:
    return count > _TIMES * usual + _MORE


class UpdateCounter:
    """Counts the updates before each optimizer step.

    Only what stands out for a step or two is a burst: a count that has changed for good (another
    gradient accumulation, another number of critic steps) is none. Writes are counted, which may
    be two for an update: DDP's broadcast and compiled code write once more.

    Attributes:
        bursts: Path of a norm → its largest burst.
        any: Whether anything was counted at all.
    """

    def __init__(self) -> None:
        self.bursts: dict[str, Burst] = {}
        self.any = False
        self._paths: list[str] = []
        self._counters: list[Tensor] = []
        self._versions: list[int] = []
        self._series: dict[str, _Series] = {}
        self._pending: dict[str, Burst] = {}
        #: First step, number of steps and count of each norm, of steps that are alike.
        self._rows: list[tuple[int, int, list[int]]] = []
        #: At the last look: version of each counter, and the batches that it says.
        self._looked: dict[str, tuple[int, int | None]] = {}

    def stepped(self, step: int) -> None:
        """An optimizer step is over."""
        now = [tensor._version for tensor in self._counters]
        counts = list(map(sub, now, self._versions))
        self._versions = now
        if self._rows and self._rows[-1][2] == counts:
            first, times, _ = self._rows[-1]
            self._rows[-1] = first, times + 1, counts
            return
        if len(self._rows) == _ROWS:
            self._digest()
        self._rows.append((step, 1, counts))

    def ended(self, step: int) -> None:
        """The loop is over: what came after its last step is judged as if another step came."""
        self.stepped(step + 1)
        self._digest()
        for path, series in self._series.items():
            self._note(path, series.close())

    def look(self, norms: Sequence[NormModule], batches: Mapping[str, int | None]) -> None:
        """Settle what is over, and count on these norms from now on.

        Statistics that were made anew in between (``update_bn`` sets them back, and then runs
        whole epochs in train mode) are no fault: fewer batches are in them than were written.

        Args:
            norms: The norms as they are now.
            batches: ``num_batches_tracked`` of each.
        """
        self._digest()
        for path, tensor in zip(self._paths, self._counters, strict=True):
            version, then = self._looked[path]
            now, written = batches.get(path), tensor._version - version
            if then and now is not None and now - then < written / 2:
                self._pending.pop(path, None)
                self._series[path].close()
        self.bursts |= self._pending
        self._pending.clear()
        pairs = [(n.path, counter_of(n.module)) for n in norms if n.tracked and not n.frozen]
        kept = [(path, tensor) for path, tensor in pairs if tensor is not None]
        if [id(tensor) for _, tensor in kept] != [id(tensor) for tensor in self._counters]:
            self._paths, self._counters = [p for p, _ in kept], [t for _, t in kept]
            self._versions = [tensor._version for tensor in self._counters]
            self._series = {path: self._series.get(path, _Series()) for path in self._paths}
        self._looked = {path: (t._version, batches.get(path)) for path, t in kept}

    def _digest(self) -> None:
        for step, times, counts in self._rows:
            self.any = self.any or any(counts)
            for path, count in zip(self._paths, counts, strict=True):
                self._note(path, self._series[path].add(step, count, times))
        self._rows.clear()

    def _note(self, path: str, burst: Burst | None) -> None:
        known = self._pending.get(path)
        if burst is not None and (known is None or burst.writes > known.writes):
            self._pending[path] = burst


def counter_of(module: Any) -> Tensor | None:
    """The buffer of a norm whose writes are counted; None where none has a version."""
    counter = getattr(module, "num_batches_tracked", None)
    if not isinstance(counter, Tensor) or isinstance(module, nn.modules.instancenorm._InstanceNorm):
        counter = module.running_mean
    # Tensors made under inference_mode have no version.
    if counter is None or counter.is_inference() or nn.parameter.is_lazy(counter):
        return None
    return counter
