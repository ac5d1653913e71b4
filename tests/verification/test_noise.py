from __future__ import annotations

import torch
from torch import Tensor, nn

from bnify.structure import as_call
from bnify.verification import TorchRunner, measure
from bnify.verification.noise import noise_floor


def floor_of(model: nn.Module, x: Tensor) -> tuple[float, list[str]]:
    runner = TorchRunner(model)
    floor, notes = noise_floor(runner, measure(runner, as_call(x)).cases[0])
    return floor[0], notes


def deep() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers)


def test_a_deep_net_has_a_floor_of_a_few_units_in_the_last_place() -> None:
    floor, notes = floor_of(deep(), torch.randn(2, 8, 8, 8))
    assert 0 < floor < 1e-5
    said = " ".join(notes)
    assert "the batch in reverse" in said
    assert "oneDNN off" in said
    assert "channels last" in said


def test_exact_arithmetic_has_none() -> None:
    assert floor_of(nn.ReLU(), torch.randn(2, 3))[0] == 0.0


class Ranks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(float(x.shape[0]))[:, None]


def test_what_changes_the_result_is_no_noise() -> None:
    floor, notes = floor_of(Ranks(), torch.randn(4, 3))
    assert floor == 0.0
    assert notes[0] == (
        "noise floor without the batch in reverse: it changes the result, not its rounding"
    )


class NoChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1)  # a view that another memory layout does not allow


def test_a_variant_that_raises_is_left_out_and_said() -> None:
    _, notes = floor_of(NoChannelsLast(), torch.randn(2, 3, 4, 4))
    assert any(note.startswith("noise floor without channels last: ") for note in notes)


def test_onednn_is_given_back() -> None:
    before = torch.backends.mkldnn.enabled
    floor_of(deep(), torch.randn(2, 8, 8, 8))
    assert torch.backends.mkldnn.enabled is before
