"""What norms are called with: in the first steps, by what raised, and by counts later on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from loops import EVERY, batch, codes, loss_of, network, passes, sgd, train
from torch import nn

from bnify.auditing.finding import Severity
from bnify.watching import watch


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_train_mode_without_gradients_in_the_first_steps(mode):
    model = network()
    optimizer = sgd(model)
    with watch(model, every=EVERY) as watcher:
        train(model, optimizer, 2)
        with mode():
            model(batch())
        train(model, optimizer, EVERY - 2)
        assert codes(watcher) == {("BN309", "1"), ("BN309", "5")}
        values = watcher.findings[0].values
        assert (values["without_gradient"], values["calls"]) == (1, 4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_validation_in_train_mode_later_on(mode):
    model = network()
    optimizer = sgd(model)
    with watch(model, every=EVERY) as watcher:
        train(model, optimizer, 21)
        assert watcher.findings == ()
        with mode():
            for _ in range(6):
                model(batch())
        train(model, optimizer, EVERY - 1)
        assert codes(watcher) == {("BN309", "1"), ("BN309", "5")}
        values = watcher.findings[0].values
        assert (values["writes"], values["usual"], values["before_step"]) == (7, 1, 22)


def test_a_validation_in_train_mode_after_the_last_step():
    model = network()
    optimizer = sgd(model)
    with watch(model, every=EVERY) as watcher:
        train(model, optimizer, EVERY + 2)
        passes(model, 7)
    assert codes(watcher) == {("BN309", "1"), ("BN309", "5")}
    assert "7 times after optimizer step 12" in watcher.findings[0].message


def test_a_validation_in_train_mode_beside_two_optimizers_of_one_pass():
    model = network()
    body, head = sgd(model[:5]), sgd(model[5:])
    with watch(model, every=EVERY) as watcher:
        for number in range(2 * EVERY):
            body.zero_grad()
            head.zero_grad()
            loss_of(model).backward()
            body.step()
            head.step()
            if number == EVERY:
                passes(model, 6)
    assert codes(watcher) == {("BN309", "1"), ("BN309", "5")}


def test_a_validation_in_train_mode_beside_accumulated_gradients():
    model = network()
    optimizer = sgd(model)
    with watch(model, every=EVERY) as watcher:
        train(model, optimizer, EVERY, accumulate=4)
        passes(model, 9)
        train(model, optimizer, EVERY, accumulate=4)
    assert codes(watcher) == {("BN309", "1"), ("BN309", "5")}


def test_norms_that_run_without_gradients_from_some_step_on():
    model = network()
    optimizer = sgd(model)
    with watch(model, every=EVERY) as watcher:
        train(model, optimizer, 2 * EVERY)
        for _ in range(EVERY):
            optimizer.zero_grad()
            with torch.no_grad():
                features = model[:9](batch())
            model[9](features).sum().backward()
            optimizer.step()
        assert codes(watcher) == {("BN309", "1"), ("BN309", "5")}
        assert "no gradient reached" in watcher.findings[0].message


def test_a_frozen_backbone_under_no_grad():
    class Tuned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = network()[:9]
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            with torch.no_grad():
                x = self.backbone(x)
            return self.head(x)

    model = Tuned()
    with watch(model, every=EVERY, ignore=["BN301"]) as watcher:
        train(model, sgd(model), EVERY)
    assert codes(watcher) == {("BN309", "backbone.1"), ("BN309", "backbone.5")}


class Pooled(nn.Sequential):
    """Its norm has one value a sample and channel."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(8, 8, 1),
            nn.BatchNorm2d(8),
            nn.Flatten(),
            nn.Linear(8, 4),
        )


@pytest.mark.parametrize("after", [0, 2 * EVERY])
def test_a_batch_of_one(after):
    model = Pooled()
    optimizer = sgd(model)
    watcher = watch(model, every=EVERY)
    with pytest.raises(ValueError, match="more than 1 value per channel"), watcher:
        for _ in range(after):
            optimizer.zero_grad()
            loss_of(model, 64).backward()
            optimizer.step()
        assert watcher.findings == ()
        model(batch(1))
    assert [(f.code, f.module, f.severity) for f in watcher.findings] == [
        ("BN205", "3", Severity.ERROR)
    ]
    assert watcher.findings[0].values["batch"] == 1


def test_a_batch_of_one_in_an_error_that_was_raised_from_it():
    model = Pooled()
    watcher = watch(model)
    with pytest.raises(RuntimeError, match="mine"), watcher:
        try:
            model(batch(1))
        except ValueError as error:
            raise RuntimeError("mine") from error
    assert codes(watcher) == {("BN205", "3")}


def test_another_error_is_not_taken_for_a_batch_of_one():
    model = Pooled()
    watcher = watch(model)
    with pytest.raises(ValueError, match="mine"), watcher:
        raise ValueError("mine")
    assert watcher.findings == ()


def test_few_values_a_channel():
    model = Pooled()
    with watch(model, every=EVERY) as watcher:
        train(model, sgd(model), 3)  # batches of 8
        assert codes(watcher) == {("BN303", "3")}
        assert watcher.findings[0].values["values_per_channel"] == 8
        assert watcher.findings[0].values["batch"] == 8


def test_small_batches_on_several_devices(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = Pooled()
    with watch(model, select=["BN302"]) as watcher:
        train(model, sgd(model), 3)
    assert codes(watcher) == {("BN302", "3")}
    assert watcher.findings[0].values["world"] == 2


def test_the_batch_of_a_list_of_images(monkeypatch):
    class Stacking(Pooled):
        def forward(self, images):
            return super().forward(torch.stack(images))

    monkeypatch.setenv("WORLD_SIZE", "2")
    model = Stacking()
    with watch(model, select=["BN302"]) as watcher:
        optimizer = sgd(model)
        for _ in range(3):
            model(list(batch(8))).sum().backward()
            optimizer.step()
    assert watcher.findings[0].values["samples"] == 8


class Shared(nn.Module):
    """One norm for two places."""

    def __init__(self, *, same: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.same = same

    def forward(self, x):
        y = self.conv(x)
        other = y if self.same else y.relu()
        return self.head((self.bn(y) + self.bn(other)).mean((2, 3)))


def test_a_norm_at_two_places():
    model = Shared(same=False)
    with watch(model) as watcher:
        train(model, sgd(model), 3)
        assert codes(watcher) == {("BN206", "bn")}
        assert watcher.findings[0].values["calls"] == 2


def test_a_norm_that_runs_twice_on_one_value_and_a_model_that_is_called_twice_are_fine():
    model = Shared(same=True)
    optimizer = sgd(model)
    with watch(model) as watcher:
        for _ in range(3):
            optimizer.zero_grad()
            (loss_of(model) + loss_of(model)).backward()
            optimizer.step()
    assert watcher.findings == ()


def test_passes_in_several_threads_are_not_one():
    model = network()
    with watch(model) as watcher, ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for loss in pool.map(lambda _: loss_of(model), range(8)):
                loss.backward()
            watcher.step()
    assert watcher.findings == ()
