"""The last finite running statistics of each norm, and putting them back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from bnify.auditing.finding import Finding, Safety
from bnify.auditing.live import NormModule
from bnify.auditing.state import NormState, Vector


class Kept:
    """Copies of running statistics on the host, each from the last look that found it finite."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, Vector, Vector]] = {}

    def keep(self, states: Iterable[NormState], step: int) -> None:
        """Keep what is finite."""
        for state in states:
            if _usable(state):
                self._last[state.path] = step, state.mean, state.var

    def offer(self, finding: Finding) -> Finding:
        """The finding; of statistics that can be put back, with that as its fix."""
        if finding.code != "BN101" or finding.safety is not Safety.DATA:  # γ or β are broken too
            return finding
        if finding.module not in self._last:
            return finding
        step, _, _ = self._last[finding.module]
        return replace(finding, fix=f"watcher.restore() puts back those of step {step}")

    def restore(self, norms: Iterable[NormModule], states: Iterable[NormState]) -> Iterator[str]:
        """Put back the statistics of norms where they are not finite; the paths of those."""
        broken = {state.path for state in states if not _usable(state)}
        for norm in norms:
            if norm.path in broken and norm.path in self._last:
                _, mean, var = self._last[norm.path]
                _put(norm.module, "running_mean", mean)
                _put(norm.module, "running_var", var)
                yield norm.path


def _usable(state: NormState) -> bool:
    finite = np.isfinite(state.mean).all() and np.isfinite(state.var).all()
    return bool(finite and (state.var >= 0).all())


def _put(module: nn.Module, name: str, values: Vector) -> None:
    buffer = module.get_buffer(name)
    with torch.no_grad():
        buffer.copy_(torch.from_numpy(values).view(buffer.shape))
