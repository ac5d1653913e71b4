"""Faults in tensors and settings are found within the interval, and statistics put back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from loops import EVERY, codes, network, sgd, train
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bnify.auditing.finding import Severity
from bnify.watching import watch

# -- statistics ----------------------------------------------------------------------------------


def test_statistics_that_are_not_finite_are_found_and_put_back():
    model = network()
    optimizer = sgd(model)
    with watch(model, optimizer, every=EVERY) as watcher:
        train(model, optimizer, 2 * EVERY)
        before = {name: t.clone() for name, t in model[1].named_buffers()}
        model[1].running_var[2] = float("nan")
        model[5].running_mean[0] = float("inf")
        train(model, optimizer, EVERY)
        assert codes(watcher) == {("BN101", "1"), ("BN101", "5")}
        assert all(f.values["step"] == 3 * EVERY for f in watcher.findings)
        assert all(f.severity is Severity.ERROR for f in watcher.findings)
        assert watcher.findings[0].fix == f"watcher.restore() puts back those of step {2 * EVERY}"
        assert watcher.restore() == ("1", "5")
        assert watcher.restore() == ()
        for name in ("running_mean", "running_var"):
            assert torch.equal(model[1].get_buffer(name), before[name])
        train(model, optimizer, 2 * EVERY)
        assert len(watcher.findings) == 2
        model[1].running_mean[0] = float("nan")
        train(model, optimizer, EVERY)
        assert len(watcher.findings) == 3, "a norm that was restored may break once more"
    assert json.dumps([f.to_dict() for f in watcher.findings])


def test_a_negative_variance_is_put_back_too():
    model = network()
    with watch(model) as watcher:
        model[1].running_var[0] = -1.0
        assert {f.code for f in watcher.check()} == {"BN101"}
        assert watcher.restore() == ("1",)
        assert watcher.check() == ()
    assert torch.equal(model[1].running_var, torch.ones(8))


def test_what_was_never_finite_is_not_put_back():
    model = network()
    model[1].running_var[0] = float("nan")
    with watch(model, every=EVERY) as watcher:
        train(model, sgd(model), EVERY)
        assert codes(watcher) == {("BN101", "1")}
        assert "restore" not in watcher.findings[0].fix
        assert watcher.restore() == ()


def test_a_restore_out_of_the_callback():
    model = network()
    optimizer = sgd(model)
    watcher = watch(model, every=EVERY, on_finding=lambda _finding: watcher.restore())
    with watcher:
        for _ in range(3):
            model[5].running_mean[0] = float("nan")
            train(model, optimizer, EVERY)
            assert bool(model[5].running_mean.isfinite().all())
    # The look after the first steps mends the first one.
    assert [f.values["step"] for f in watcher.findings] == [3, 2 * EVERY, 3 * EVERY]


def test_statistics_in_half_precision():
    model = network()
    model[1].running_mean = model[1].running_mean.bfloat16()
    model[1].running_var = model[1].running_var.bfloat16()
    model[1].momentum = 0.01
    with watch(model) as watcher:
        found = watcher.check()
    assert [(f.code, f.module, f.severity) for f in found] == [("BN107", "1", Severity.ERROR)]


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 2 * EVERY])
def test_a_momentum_of_099(after):
    model = network()
    optimizer = sgd(model)
    with watch(model, every=EVERY) as watcher:
        train(model, optimizer, after)
        assert watcher.findings == ()
        model[5].momentum = 0.99
        train(model, optimizer, EVERY)
        assert codes(watcher) == {("BN203", "5")}
        assert "0.01" in watcher.findings[0].fix


@pytest.mark.parametrize(("every", "after"), [(4, 0), (4, 9), (10, 0), (10, 20), (50, 101)])
def test_a_norm_that_is_frozen_by_half(every, after):
    model = network()
    optimizer = sgd(model)
    with watch(model, every=every) as watcher:
        train(model, optimizer, after)
        assert watcher.findings == ()
        model[1].requires_grad_(False)
        train(model, optimizer, max(every, 7))
        assert codes(watcher) == {("BN301", "1")}


def test_a_norm_that_is_frozen_in_eval_mode_is_fine():
    model = network()
    model[1].requires_grad_(False)
    optimizer = sgd(model)
    with watch(model, every=EVERY) as watcher:  # in train mode here, as a fresh model is
        for _ in range(3 * EVERY):
            model.train()
            model[1].eval()
            train(model, optimizer)
        model.train()  # the loop is over
        model[1].eval()
    assert watcher.findings == ()


# -- averages ------------------------------------------------------------------------------------


def test_an_average_without_statistics():
    model = network()
    optimizer = sgd(model)
    average = copy.deepcopy(model)
    with watch(model, average=average, every=EVERY) as watcher:
        train(model, optimizer, 2 * EVERY)
        assert watcher.findings == (), "the average has not begun"
        for _ in range(EVERY):
            train(model, optimizer)
            with torch.no_grad():
                for own, other in zip(average.parameters(), model.parameters(), strict=True):
                    own.lerp_(other, 0.1)
        assert codes(watcher) == {("BN307", "1"), ("BN307", "5")}
        assert all(f.severity is Severity.ERROR for f in watcher.findings)
    assert "BN307" not in watcher.unchecked


class ForgetfulAverage(AveragedModel):
    """One that leaves buffers behind; torch's copies them, if it does not average them."""

    def update_parameters(self, model):
        for own, other in zip(self.module.parameters(), model.parameters(), strict=True):
            own.data.copy_(other.data)
        self.n_averaged += 1


def test_an_averaged_model_that_forgets_buffers_is_compared_through_its_wrapper():
    model = network()
    optimizer = sgd(model)
    average = ForgetfulAverage(model)
    with watch(model, average=average, every=EVERY) as watcher:
        for _ in range(EVERY):
            train(model, optimizer)
            average.update_parameters(model)
        assert codes(watcher) == {("BN307", "1"), ("BN307", "5")}


@pytest.mark.parametrize("affine", [True, False])
def test_an_average_of_a_pretrained_model_that_is_updated_behind_its_versions(affine):
    model = network()
    if not affine:
        model[1], model[5] = nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, affine=False)
    optimizer = sgd(model)
    train(model, optimizer, 20)
    average = copy.deepcopy(model)
    with watch(model, average=average, every=EVERY) as watcher:
        for _ in range(EVERY):
            train(model, optimizer)
            for own, other in zip(average.parameters(), model.parameters(), strict=True):
                own.data.mul_(0.9).add_(other.data, alpha=0.1)
        assert codes(watcher) == {("BN307", "1"), ("BN307", "5")}
        assert "stand still" in watcher.findings[0].message


def lerp(average, model):
    """What an average without buffers does."""
    with torch.no_grad():
        for own, other in zip(average.parameters(), model.parameters(), strict=True):
            own.lerp_(other, 0.1)


def test_an_average_that_begins_in_the_middle_as_a_full_copy():
    model, optimizer = (m := network()), sgd(m)
    average = copy.deepcopy(model)
    with watch(model, average=average, every=EVERY) as watcher:
        train(model, optimizer, EVERY + 2)
        average.load_state_dict(model.state_dict())
        train(model, optimizer, EVERY - 2)
        assert watcher.findings == ()
        for _ in range(EVERY):
            train(model, optimizer)
            lerp(average, model)
        assert codes(watcher) == {("BN307", "1"), ("BN307", "5")}


def test_an_average_whose_smallest_parameters_are_frozen():
    model = network()
    stem = nn.Sequential(*(nn.Linear(3, 3).requires_grad_(False) for _ in range(8)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), stem, nn.Linear(3, 192), model)
    model.insert(4, nn.Unflatten(1, (3, 8, 8)))
    average, optimizer = copy.deepcopy(model), sgd(model)
    with watch(model, average=average, every=EVERY) as watcher:
        for _ in range(EVERY):
            train(model, optimizer)
            lerp(average, model)
        assert codes(watcher) == {("BN307", "5.1"), ("BN307", "5.5")}


class Holder(nn.Module):
    """An average beside the model itself, as some packages keep both."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.online = model
        self.ema_model = copy.deepcopy(model)


def test_an_average_inside_a_module_of_the_users():
    model = network()
    holder, optimizer = Holder(model), sgd(model)
    with watch(model, average=holder, every=EVERY) as watcher:
        for _ in range(EVERY):
            train(model, optimizer)
            lerp(holder.ema_model, model)
        assert codes(watcher) == {("BN307", "1"), ("BN307", "5")}


def test_an_average_of_another_model_is_not_called_checked():
    model = network()
    with watch(model, average=nn.Linear(2, 2)) as watcher:
        train(model, sgd(model), 3)
    assert "paths" in watcher.unchecked["BN307"]


def test_statistics_that_break_once_more_after_the_user_mended_them():
    model = network()
    optimizer = sgd(model)
    good = copy.deepcopy(model.state_dict())
    with watch(model, every=EVERY) as watcher:
        for _ in range(2):
            model[1].running_mean[0] = float("nan")
            train(model, optimizer, EVERY)
            model.load_state_dict(good)
            train(model, optimizer, EVERY)
    assert [f.code for f in watcher.findings] == ["BN101", "BN101"]


@pytest.mark.parametrize(
    "kind", ["buffers averaged", "buffers copied", "frozen norms", "never updated"]
)
def test_averages_that_are_fine(kind):
    model = network()
    optimizer = sgd(model)
    train(model, optimizer, 20)
    average = AveragedModel(model, use_buffers=kind == "buffers averaged")
    if kind == "frozen norms":
        for norm in (model[1], model[5]):
            norm.requires_grad_(False).eval()
    with watch(model, average=average, every=EVERY) as watcher:
        for _ in range(3 * EVERY):
            train(model, optimizer)
            if kind != "never updated":
                average.update_parameters(model)
    assert watcher.findings == ()
