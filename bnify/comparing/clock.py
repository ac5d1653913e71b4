"""The seconds of a comparison, those before it was interrupted and resumed included."""

from __future__ import annotations

import math
import time


class Clock:
    """Counts on from what a run folder has seen.

    Args:
        elapsed: Seconds that earlier processes spent.
        budget: Seconds in all; 0 for no limit.
    """

    def __init__(self, elapsed: float, budget: float) -> None:
        self._started = time.monotonic() - elapsed
        self.budget = budget or math.inf

    def now(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._started

    @property
    def left(self) -> float:
        """Seconds of the budget that are left; infinite without one."""
        return self.budget - self.now()
