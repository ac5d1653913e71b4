"""Borrowed state is given back, also when something raises in between."""

from __future__ import annotations

import gc
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

from bnify.borrow import (
    copy_model,
    evaluating,
    fused_attention,
    in_mode,
    seeded,
    without_cyclic_collection,
)
from bnify.errors import CaptureError


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_every_module_gets_its_own_mode_back(train, raises):
    model = small().train()
    model[1].eval()
    before = modes(model)
    try:
        with in_mode(model, train=train) as borrowed:
            assert borrowed is model
            assert set(modes(model)) == {train}
            if raises:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert raises
    assert modes(model) == before
    with evaluating(model):
        assert set(modes(model)) == {False}
    assert modes(model) == before


def test_a_train_method_of_the_users_is_heard_and_may_fail():
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True):
            super().train(mode)
            if not mode:
                raise RuntimeError
            self[1].eval()
            return self

    model = Frozen(*small())
    with in_mode(model, train=True):
        assert modes(model) == [True, True, False, True]
    model[0].train(False)
    before = modes(model)
    with pytest.raises(RuntimeError), in_mode(model, train=False):
        pass
    assert modes(model) == before


@pytest.mark.parametrize("raises", [False, True])
def test_random_numbers_of_all_three_come_back(raises):
    def state():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002

    def numbers():
        return float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002

    before = state()
    try:
        with seeded(3):
            first = numbers()
            if raises:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert state() == before
    with seeded(3):
        assert numbers() == first
    with seeded(2**40 + 1):
        assert numbers() != first


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="CUDA runs: nothing is left for its start")
def test_the_seed_that_cuda_starts_with_is_the_callers():
    torch.manual_seed(5)
    left = torch.cuda._lazy_seed_tracker.get_calls()
    with seeded(3):
        torch.rand(2)
    assert torch.cuda._lazy_seed_tracker.get_calls() == left


def test_the_fused_path_comes_back():
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ZeroDivisionError), fused_attention(enabled=not before):
        assert torch.backends.mha.get_fastpath_enabled() is not before
        raise ZeroDivisionError
    assert torch.backends.mha.get_fastpath_enabled() is before


# -- copies ----------------------------------------------------------------------------------------


def test_a_copy_has_its_own_tensors_and_keeps_tying_and_hooks():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    copied = copy_model(model)
    assert copied[0].weight is copied[1].weight
    assert copied[0].weight is not model[0].weight
    assert len(copied[0]._forward_hooks) == 1
    with torch.no_grad():
        copied[0].weight.zero_()
    assert model[0].weight.any()


def test_caches_with_a_history_are_copied_detached():
    model = small()
    model.cache = model(torch.randn(4, 3))
    model.more = {"a": [model.cache * 2], "b": (model.cache,)}
    copied = copy_model(model)
    assert torch.equal(copied.cache, model.cache)
    assert not copied.cache.requires_grad
    assert copied.more["b"][0] is copied.cache
    assert model.cache.requires_grad


def test_what_stands_for_an_object_in_the_copy():
    model = small()
    other = nn.Parameter(torch.zeros(3, 3))
    copied = copy_model(model, {id(model[0].weight): other})
    assert copied[0].weight is other


def test_what_cannot_be_copied_is_named():
    model = small()
    model.lock = threading.Lock()
    with pytest.raises(
        CaptureError, match=r"Sequential cannot be copied: TypeError.*lock"
    ) as error:
        copy_model(model)
    assert error.value.hint


class Itself(nn.Sequential):
    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("inner", [False, True])
def test_a_copy_with_a_module_of_the_original_is_refused(inner):
    one = Itself(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model = nn.Sequential(nn.Linear(3, 3), one) if inner else one
    named = "1" if inner else "the model"
    with pytest.raises(
        CaptureError, match=rf"copy of {named} \(Itself\) is the module itself"
    ) as error:
        copy_model(model)
    assert "return a new module" in error.value.hint


def test_removing_parametrizations_from_a_copy_leaves_the_original_alone():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    x = torch.randn(2, 3)
    want = model(x)
    copied = copy_model(model)
    nn.utils.parametrize.remove_parametrizations(copied[0], "weight")
    assert torch.equal(model(x), want)
    assert torch.equal(copied(x), want)


@pytest.mark.parametrize("before", [True, False])
def test_the_cycle_collector_is_as_it_was(before):
    was = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        with pytest.raises(KeyError), without_cyclic_collection():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is before
    finally:
        (gc.enable if was else gc.disable)()


def test_empty_containers_of_a_copy_are_its_own():
    model = nn.Linear(2, 2)
    model.cache = shared = {}
    model.again = shared
    copied = copy_model(model)
    copied.cache["x"] = 1
    assert copied.again is copied.cache
    assert not model.cache
    copied.register_forward_hook(lambda *_: None)
    assert not model._forward_hooks
