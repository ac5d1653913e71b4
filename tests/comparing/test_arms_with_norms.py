"""Arms of models that have norms: as they are, and with each kind in their place."""

from __future__ import annotations

import copy

import pytest
import torch
from comparing.arming import Block, image, planned, running, same_weights
from torch import nn

import laws


def test_own_batch_norms_are_the_batch_arm():
    reference, arms = planned(Block(), image(2, 3, 8, 8))
    assert reference == "as-is"
    assert arms["batch"].left_out == "the model's own norms are batch norms: see as-is"
    assert running(arms) == [
        *("as-is", "none", "batch-noaffine", "group", "layer", "instance", "rms")
    ]
    assert arms["as-is"].norms == arms["group"].norms == 4
    assert arms["none"].norms == 0
    assert any("stem, conv1, conv2, down.0" in note for note in arms["none"].notes)
    assert arms["as-is"].parameters == arms["none"].parameters + 2 * (16 + 3 * 32)
    assert not arms["as-is"].notes


def test_as_is_computes_what_a_fresh_model_does():
    fresh = Block().double()
    trained = laws.hostile_(copy.deepcopy(fresh))
    x = image(4, 3, 8, 8).double()
    _, arms = planned(trained, x)
    made = arms["as-is"].build(copy.deepcopy(trained))
    for train in (True, False):
        assert torch.equal(made.train(train)(x), fresh.train(train)(x))


BY_HAND = {
    "batch-noaffine": lambda c: nn.BatchNorm2d(c, affine=False),
    "group": lambda c: nn.GroupNorm(c // 8, c),
    "layer": lambda c: nn.GroupNorm(1, c),
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
    "none": lambda _: nn.Identity(),
}


@pytest.mark.parametrize("norm", BY_HAND)
def test_an_arm_equals_the_model_written_by_hand(norm):
    own = laws.hostile_(Block().double())
    x = image(4, 3, 8, 8).double()
    _, arms = planned(own, x)
    made = arms[norm].build(copy.deepcopy(own))
    hand = Block(BY_HAND[norm]).double()
    weights = {k: v for k, v in own.state_dict().items() if "bn" not in k and "down.1" not in k}
    hand.load_state_dict(weights, strict=False)
    for train in (True, False, True):
        got, want = made.train(train)(x), hand.train(train)(x)
        assert laws.relative_error(want, got) < 1e-10
    got.square().sum().backward()
    want.square().sum().backward()
    assert laws.relative_error(hand.stem.weight.grad, made.stem.weight.grad) < 1e-10


def test_scales_that_start_at_zero_start_at_one_everywhere():
    model = Block()
    nn.init.zeros_(model.bn2.weight)
    x = image(4, 3, 8, 8)
    _, arms = planned(model, x)
    assert arms["as-is"].notes == (
        "scales that the model starts at 0 start at 1 in every arm: bn2",
    )
    made = arms["as-is"].build(copy.deepcopy(model))
    assert bool((made.bn2.weight == 1).all())
    assert bool((model.bn2.weight == 0).all())
    nn.init.ones_(model.bn2.weight)
    model.bn2.bias.data += 0.5
    notes = planned(model, x)[1]["as-is"].notes
    assert notes == ("scales and shifts start at 1 and 0 in every arm, not as in bn2",)


class HalfOdd(Block):
    """One norm that cannot go, one that never runs."""

    class Odd(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input) + input

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = self.Odd(32)
        self.unused = nn.BatchNorm2d(4)


def test_norms_that_cannot_go_stay_and_are_named():
    model, x = HalfOdd(), image(4, 3, 8, 8)
    _, arms = planned(model, x)
    (note,) = arms["as-is"].notes
    assert "bn1 (Odd) (its own forward computes something else)" in note
    assert "unused (BatchNorm2d) (the forward pass in eval mode never runs it)" in note
    made = arms["group"].build(copy.deepcopy(model))
    assert type(made.bn1) is HalfOdd.Odd
    assert type(made.bn2) is nn.GroupNorm
    assert (arms["group"].norms, arms["none"].norms, arms["as-is"].norms) == (4, 1, 4)


def test_where_nothing_can_be_swapped_as_is_is_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), HalfOdd.Odd(4))
    reference, arms = planned(model, image(2, 3, 4, 4))
    assert (reference, running(arms)) == ("as-is", ["as-is"])
    assert arms["group"].left_out == (
        "no norm of the model can be swapped: 1 (its own forward computes something else)"
    )


def test_a_kind_that_fits_some_places_stays_as_is_in_the_others():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
            self.fc, self.bn1 = nn.Linear(16, 32), nn.BatchNorm1d(32)

        def forward(self, x):
            return self.bn1(self.fc(self.bn(self.conv(x)).mean((2, 3))))

    model = laws.hostile_(Pooled())
    _, arms = planned(model, image(4, 3, 6, 6))
    assert arms["instance"].notes == (
        "the model's own norm stays where instance norm cannot be: bn1 (one value per channel)",
    )
    made = arms["instance"].build(copy.deepcopy(model))
    assert type(made.bn) is nn.InstanceNorm2d
    assert type(made.bn1) is nn.BatchNorm1d
    assert bool((made.bn1.weight == 1).all())  # it starts afresh all the same


def test_a_kind_that_fits_nowhere_is_left_out():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    _, arms = planned(model, torch.randn(4, 4))
    assert arms["instance"].left_out == (
        "an instance norm can take no place: 1 (one value per channel)"
    )


def test_torchvisions_resnet():
    import torchvision

    model = torchvision.models.resnet18(num_classes=4)
    _, arms = planned(model, image(2, 3, 32, 32), ("none", "batch", "group"), batch_size=4)
    assert running(arms) == ["as-is", "none", "group"]
    made = arms["group"].build(copy.deepcopy(model))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in made.modules())
    assert arms["group"].norms == 20


def test_timms_norms_with_activation():
    import timm

    model = timm.create_model("test_efficientnet", num_classes=4).double()
    x = image(2, 3, 32, 32).double()
    _, arms = planned(model, x, ("none", "batch", "group"), batch_size=4)
    assert "batch norms" in arms["batch"].left_out
    made = arms["group"].build(copy.deepcopy(model))
    same_weights(made, model)
    hand = copy.deepcopy(model)  # the same class of timm, with its forward: the norm alone differs
    for path, norm in list(laws.norms_of(hand)):
        group = timm.layers.GroupNormAct(
            norm.num_features, made.get_submodule(path).norm.num_groups
        )
        group.drop, group.act = norm.drop, norm.act
        parent, _, leaf = path.rpartition(".")
        setattr(hand.get_submodule(parent), leaf, group.double())
    for train in (True, False):
        got, want = made.train(train)(x), hand.train(train)(x)
        assert laws.relative_error(want, got) < 1e-10
