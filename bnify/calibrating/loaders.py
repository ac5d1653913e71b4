"""Loaders that draw their order from a generator of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def rewound(data: Any) -> Iterator[None]:
    """Generators of a loader and its samplers get their state back at the end.

    So the next pass is in the same order, as one of a loader that draws from the global random
    state is after a fixed seed.

    Args:
        data: Anything that yields batches, or has such a thing as its ``source``.
    """
    before = [(generator, generator.get_state()) for generator in _generators(data)]
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)


def _generators(data: Any) -> Iterator[torch.Generator]:
    for loader in (data, getattr(data, "source", None)):
        samplers = (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
        for owner in (loader, *samplers, getattr(samplers[1], "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                yield generator
