"""``init="stats"`` in networks that amplify rounding: neither refused, nor waved through."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bnify
from bnify import inserts
from bnify.norms import each_norm
from bnify.structure import as_call
from bnify.verification.standardised import NAME, check_standardised
from foldnets import random_fold_network

#: Networks of the generator that amplify what a dropped bias rounds differently.
SEEDS = [70087, 81065]


def insert(seed: int) -> bnify.Result:
    net, x = random_fold_network(seed)
    call = as_call(x.double())
    data = [call.resized(n).redrawn(seed + i, 1.0 + i).args[0] for i, n in enumerate((4, 2, 6))]
    return bnify.insert(
        *(net.double(), x.double()),
        init="stats",
        data=data,
        drop_bias=True,
        include="*",
        per_call=True,
    )


def the_check(result: bnify.Result) -> object:
    return next(check for check in result.verification.checks if check.name == NAME)


@pytest.mark.parametrize("seed", SEEDS)
def test_rounding_that_the_network_amplifies_is_no_fault(seed):
    result = insert(seed)
    assert result.verification.passed
    check = the_check(result)
    assert check.passed
    assert check.error < check.threshold < 1e-4


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_wrong_statistic_in_such_a_network_is_a_fault(seed, name, monkeypatch):
    def wrong(result: nn.Module, order, statistics, pool):
        layer = result.get_submodule(order[0][0].edit.carrier)
        norm = each_norm(layer.norm)[0]
        with torch.no_grad():
            getattr(norm, name)[0] += 1e-3 * (1 + norm.running_var[0])
        return check_standardised(result, order, statistics, pool)

    monkeypatch.setattr(inserts, "check_standardised", wrong)
    with pytest.raises(bnify.VerificationError) as caught:
        insert(seed)
    assert the_check(caught.value.result).passed is False
