"""A healthy run of 500 steps has no finding, nor have loops that look odd and are fine."""

from __future__ import annotations

import pytest
import torch
from loops import EVERY, batch, loss_of, network, passes, sgd, train
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from bnify.watching import watch


@pytest.mark.parametrize("given", [True, False], ids=["optimizer", "any optimizer"])
def test_a_healthy_run_of_500_steps_has_no_finding(given, capsys):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    average = AveragedModel(model, use_buffers=True)
    with watch(model, optimizer if given else None, average=average) as watcher:
        for step in range(500):
            train(model, optimizer)
            average.update_parameters(model)
            if step % 100 == 50:
                model.eval()
                passes(model, 12)
                model.train()
    assert watcher.steps == 500
    assert watcher.findings == ()
    assert set(watcher.unchecked) == {"BN302"}
    assert capsys.readouterr() == ("", "")


class Recurrent(nn.Module):
    """An LSTM with batch norm over its last states, for (N, 3, 8, 8) as sequences of 24 values."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.bn = nn.LSTM(24, 16, batch_first=True), nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.bn(self.lstm(x.flatten(1).unflatten(1, (8, 24)))[0][:, -1]))


class Last(nn.Module):
    """(N, C, T) to (N, T, C)."""

    def forward(self, x):
        return x.mT


def transformer() -> nn.Sequential:
    """Layer norms only, behind a stem with batch norm."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    stem = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.BatchNorm2d(8), nn.Flatten(2))
    return nn.Sequential(stem, Last(), layer, nn.Flatten(), nn.Linear(128, 4))


@pytest.mark.parametrize(
    ("make", "size", "lr"),
    [(network, 2, 1e-3), (Recurrent, 32, 1e-2), (transformer, 16, 1e-3), (network, 16, 1e-6)],
    ids=["batches of 2", "recurrent", "transformer", "small steps"],
)
def test_500_steps_of_other_networks(make, size, lr):
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    with watch(model) as watcher:
        for _ in range(500):
            optimizer.zero_grad()
            loss_of(model, size).backward()
            optimizer.step()
    assert watcher.findings == ()


def test_accumulated_gradients_with_an_uneven_end_are_no_fault():
    model, accumulate = network(), 4
    optimizer = sgd(model)
    with watch(model, every=EVERY) as watcher:
        for _epoch in range(8):
            for number in range(1, 12):  # 11 batches: 3 are left over for the next step
                loss_of(model).backward()
                if number % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
        train(model, optimizer, 20)  # another schedule from here on
        train(model, optimizer, 20, accumulate=8)
    assert watcher.findings == ()


class Pair(nn.Module):
    """A generator and a discriminator in one module, each with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6))
        self.d = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))


def test_two_optimizers_and_several_passes_a_step_are_no_fault():
    pair = Pair()
    of_g, of_d = sgd(pair.g), sgd(pair.d)
    with watch(pair, every=EVERY) as watcher:
        for _ in range(30):
            for _critic in range(3):
                fake = pair.g(torch.randn(64, 4)).detach()
                of_d.zero_grad()
                (pair.d(fake).mean() - pair.d(torch.randn(64, 6)).mean()).backward()
                of_d.step()
            of_g.zero_grad()
            pair.d(pair.g(torch.randn(64, 4))).mean().neg().backward()
            of_g.step()
    assert watcher.steps == 120
    assert watcher.findings == ()


def test_a_discriminator_that_takes_no_gradient_while_the_generator_is_trained():
    pair = Pair()
    of_g, of_d = sgd(pair.g), sgd(pair.d)
    with watch(pair, every=EVERY) as watcher:
        for _ in range(30):
            fake = pair.g(torch.randn(64, 4))
            pair.d.requires_grad_(False)
            of_g.zero_grad()
            pair.d(fake).mean().neg().backward()
            of_g.step()
            pair.d.requires_grad_(True)
            of_d.zero_grad()
            (pair.d(fake.detach()).mean() - pair.d(torch.randn(64, 6)).mean()).backward()
            of_d.step()
        pair.requires_grad_(False)  # for what comes after training
    assert watcher.findings == ()


def test_a_critic_that_is_trained_alone_for_long_is_no_fault():
    pair = Pair()
    of_g, of_d = sgd(pair.g), sgd(pair.d)
    with watch(pair, every=EVERY) as watcher:
        for round_ in range(12):
            for _critic in range(60 if round_ == 2 else 5):
                of_d.zero_grad()
                fake = pair.g(torch.randn(64, 4)).detach()
                (pair.d(fake).mean() - pair.d(torch.randn(64, 6)).mean()).backward()
                of_d.step()
            of_g.zero_grad()
            pair.d(pair.g(torch.randn(64, 4))).mean().neg().backward()
            of_g.step()
    assert watcher.findings == ()


def test_closures_that_run_as_often_as_they_need_are_no_fault():
    for seed in range(3):
        torch.manual_seed(seed)
        model = network()
        optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model, 32)
            loss.backward()
            return loss

        with watch(model, every=EVERY) as watcher:
            for _ in range(60):
                optimizer.step(closure)
        assert watcher.findings == (), seed


def test_another_accumulation_at_every_step_is_no_fault():
    model = network()
    optimizer = sgd(model)
    numbers = torch.randint(1, 13, (80,), generator=torch.Generator().manual_seed(2)).tolist()
    with watch(model, every=EVERY) as watcher:
        for number in numbers:
            train(model, optimizer, accumulate=number)
    assert watcher.findings == ()


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_checkpoint_repeats_is_no_fault(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = checkpoint(self.body, self.stem(x), use_reentrant=reentrant)
            return self.head(x.mean((2, 3)))

    model = Checkpointed()
    with watch(model, every=EVERY) as watcher:
        train(model, sgd(model), 25)
    assert watcher.findings == ()


def test_statistics_made_anew_by_update_bn_are_no_fault():
    model = network()
    optimizer = sgd(model)
    with watch(model, every=EVERY) as watcher:
        train(model, optimizer, 45)
        torch.optim.swa_utils.update_bn([batch() for _ in range(20)], model)
        train(model, optimizer, 45)
    assert watcher.findings == ()
