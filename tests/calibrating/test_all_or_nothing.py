"""Tensors that cannot be written: every norm keeps its statistics, and one clear line says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnify
from bnify.calibrations import calibrate
from trained import Frozen

DATA = [torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(s)) + 5 for s in (0, 1)]


def three() -> nn.Sequential:
    return nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(3)))


class Sealed(Tensor):
    """A tensor of the user's that can be read and never written; copies are plain."""

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.as_subclass(Tensor).clone()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.copy_ and type(args[0]) is cls:
            raise RuntimeError("sealed")
        return super().__torch_function__(func, types, args, kwargs)


def test_a_buffer_whose_elements_share_memory():
    model = three()
    model[1].running_mean = torch.zeros(1).expand(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(bnify.PlanError, match=r"the elements of 1\.running_mean share memory"):
        calibrate(model, DATA)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    model[1].running_mean = model[1].running_mean.clone()
    calibrate(model, DATA)
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


def test_constants_may_share_memory():
    frozen = Frozen(nn.BatchNorm2d(3))
    frozen.running_mean = torch.ones(1).expand(3)
    found = calibrate(nn.Sequential(nn.BatchNorm2d(3), frozen), DATA)
    assert [norm.name for norm in found.updated] == ["0"]


def test_norms_before_one_that_refuses_its_values_get_the_old_ones_back():
    model = three()
    model[1].running_var = torch.ones(3).as_subclass(Sealed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(bnify.PlanError, match="statistics of 1 cannot be written: sealed"):
        calibrate(model, DATA)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
