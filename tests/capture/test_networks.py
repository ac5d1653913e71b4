"""Recordings of whole networks: drawn at random, and the zoo."""

from __future__ import annotations

import pytest

from laws import hostile_, random_network, seeds
from replaying import check_replay
from zoo import small


@pytest.mark.parametrize("seed", seeds(60))
def test_random_networks_replay_bit_for_bit(seed):
    _, inputs = random_network(seed)
    check_replay(lambda: random_network(seed)[0], inputs, fresh=1)


@pytest.mark.parametrize("entry", list(small()), ids=lambda e: e.name)
def test_the_zoo_replays_bit_for_bit(entry):
    check_replay(lambda: hostile_(entry.build()), entry.inputs(), gradients=False, fresh=0)
