"""How often running statistics are updated between two steps: read on the host, without hooks.

A tensor has a version, a number on the host that every write in place raises, in any mode of
gradients. That of ``num_batches_tracked`` (of the running mean in an instance norm, which does not
count) says how many passes in train mode there were, without looking at the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import sub
from typing import Any, Final

from torch import Tensor, nn

from bnify.auditing.live import NormModule
from bnify.auditing.observed import Burst

#: A burst is more than ``_TIMES`` the updates of the steps beside it, and ``_MORE``. Accumulation
#: over k batches leaves at most k - 1 for the next step, which makes 2k - 1.
_TIMES: Final = 2
_MORE: Final = 4


class UpdateCounter:
    """Counts the updates before each optimizer step.

    Only what stands out between two other steps is a burst: a count that has changed for good
    (another gradient accumulation, another number of critic steps) is none. Writes are counted,
    which may be two for an update: DDP's broadcast and compiled code write once more.

    Attributes:
        bursts: Path of a norm → its largest burst.
    """

    def __init__(self) -> None:
        self.bursts: dict[str, Burst] = {}
        self._pending: dict[str, Burst] = {}
        self._paths: list[str] = []
        self._counters: list[Tensor] = []
        self._versions: list[int] = []
        self._last: list[list[int]] = []
        #: At the last look: version of each counter, and the batches that it says.
        self._looked: dict[str, tuple[int, int | None]] = {}

    def stepped(self, step: int) -> None:
        """An optimizer step is over; the one before it may turn out to have had a burst."""
        now = self._now()
        counts = list(map(sub, now, self._versions))
        self._versions = now
        self._last = [*self._last[-2:], counts]
        if len(self._last) < 3 or max(self._last[1], default=0) <= _MORE:
            return
        for path, before, middle, after in zip(self._paths, *self._last, strict=True):
            usual = max(before, after)
            if min(before, after) > 0 and middle > _TIMES * usual + _MORE:
                known = self._pending.get(path)
                if known is None or middle > known.writes:
                    self._pending[path] = Burst(step - 1, middle, usual)

    def look(self, norms: Sequence[NormModule], batches: Mapping[str, int | None]) -> None:
        """Settle what is pending, and count on these norms from now on.

        Statistics that were made anew in between (``update_bn`` sets them back, and then runs
        whole epochs in train mode) are no fault: fewer batches are in them than were written.

        Args:
            norms: The norms as they are now.
            batches: ``num_batches_tracked`` of each.
        """
        for path, tensor in zip(self._paths, self._counters, strict=True):
            version, then = self._looked[path]
            now, written = batches.get(path), tensor._version - version
            anew = then and now is not None and now - then < written / 2
            if path in self._pending and not anew:
                self.bursts[path] = self._pending[path]
        self._pending.clear()
        pairs = [(n.path, _counter(n.module)) for n in norms if n.tracked and not n.frozen]
        kept = [(path, tensor) for path, tensor in pairs if tensor is not None]
        if [id(tensor) for _, tensor in kept] != [id(tensor) for tensor in self._counters]:
            self._paths, self._counters = [p for p, _ in kept], [t for _, t in kept]
            self._versions, self._last = self._now(), []
        self._looked = {path: (t._version, batches.get(path)) for path, t in kept}

    def _now(self) -> list[int]:
        return [tensor._version for tensor in self._counters]


def _counter(module: Any) -> Tensor | None:
    """The buffer whose writes are counted."""
    counter = getattr(module, "num_batches_tracked", None)
    if not isinstance(counter, Tensor) or isinstance(module, nn.modules.instancenorm._InstanceNorm):
        counter = module.running_mean
    # Tensors made under inference_mode have no version.
    if counter is None or counter.is_inference() or nn.parameter.is_lazy(counter):
        return None
    return counter
