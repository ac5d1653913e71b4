"""One recipe a kind of norm: measured when planned, equal whenever it is built."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from comparing.arming import Block, SmallCNN, image, planned, running, same_weights
from torch import nn

import bnify.inserts
from bnify.comparing import arms as arms_module
from bnify.comparing.arms import plan_arms
from bnify.comparing.question import NORMS
from bnify.errors import CaptureError, PlanError, SpecError
from bnify.structure import Call
from mlp import MyNetwork

# -- models without norms --------------------------------------------------------------------------


def test_the_articles_network():
    reference, arms = planned(MyNetwork(), torch.randn(4, 784), batch_size=32)
    assert reference == "none"
    assert list(arms) == list(NORMS)
    assert arms["instance"].left_out == (
        "no layer takes an instance norm: fc1, fc2 (one-value-per-channel), fc3 (output-head)"
    )
    assert running(arms) == [norm for norm in NORMS if norm != "instance"]
    plain = sum(p.numel() for p in MyNetwork().parameters())
    expected = {"none": (0, 0), "batch": (2, 768), "batch-noaffine": (2, 0), "rms": (2, 384)}
    for norm, (norms, added) in expected.items():
        assert (arms[norm].norms, arms[norm].parameters) == (norms, plain + added)


def test_a_small_cnn_takes_every_kind():
    _, arms = planned(SmallCNN(), image(2, 1, 8, 8))
    assert running(arms) == list(NORMS)
    assert {arm.norms for norm, arm in arms.items() if norm != "none"} == {2}


@pytest.mark.parametrize(
    ("make", "shape"), [(MyNetwork, (4, 784)), (SmallCNN, (2, 1, 8, 8)), (Block, (2, 3, 8, 8))]
)
def test_building_keeps_weights_and_draws_nothing(make, shape):
    """Arms made of equal instances share every weight, and training starts at one random state."""
    torch.manual_seed(3)
    base, inputs = make(), torch.randn(shape)
    before = copy.deepcopy(base.state_dict())
    modes = [m.training for m in base.modules()]
    rng = torch.get_rng_state()
    _, arms = planned(base, inputs)
    assert [m.training for m in base.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert base.state_dict().keys() == before.keys()
    assert all(p.grad is None for p in base.parameters())
    assert running(arms)
    for norm in running(arms):
        instances = [copy.deepcopy(base) for _ in range(2)]
        made = [arms[norm].build(instance) for instance in instances]
        assert made[0] is instances[0]
        same_weights(made[0], base)
        one, other = (m.state_dict() for m in made)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize(("make", "shape"), [(SmallCNN, (2, 1, 8, 8)), (Block, (2, 3, 8, 8))])
def test_recipes_survive_pickling_and_planning_again(make, shape):
    base, inputs = make(), image(*shape)
    _, arms = planned(base, inputs)
    _, again = planned(base, inputs)
    assert arms == again
    sent = pickle.loads(pickle.dumps(arms))
    assert sent == arms
    for norm in running(arms):
        one, other = (a[norm].build(copy.deepcopy(base)).eval() for a in (arms, sent))
        assert torch.equal(one(inputs), other(inputs))


def test_an_arm_is_built_once_and_on_its_own_model():
    _, arms = planned(SmallCNN(), image(2, 1, 8, 8))
    model = arms["batch"].build(SmallCNN())
    with pytest.raises(PlanError, match="does not fit"):
        arms["batch"].build(model)
    with pytest.raises(PlanError, match="does not fit"):
        arms["batch"].build(SmallCNN(8))


def test_group_norm_of_too_few_channels_is_told():
    _, arms = planned(SmallCNN(4), image(2, 1, 8, 8), ("none", "group"))
    assert any("where group norm is layer norm" in note for note in arms["group"].notes)
    _, arms = planned(SmallCNN(16), image(2, 1, 8, 8), ("none", "group"))
    assert not any("where group norm is layer norm" in note for note in arms["group"].notes)


@pytest.mark.parametrize(
    ("model", "shape", "why"),
    [
        (nn.Sequential(nn.Linear(4, 3)), (2, 4), r"0 \(output-head\)"),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), (2, 4), "no Linear and no Conv"),
        (nn.Linear(4, 3), (2, 4), r"the root \(output-head\)"),
    ],
)
def test_a_model_that_takes_no_norm_is_an_error(model, shape, why):
    with pytest.raises(PlanError, match=f"no norm can be put anywhere in .*{why}"):
        planned(model, torch.randn(shape))


def test_one_kind_with_a_place_is_enough():
    _, arms = planned(MyNetwork(), torch.randn(4, 784), ("none", "instance", "layer"))
    assert running(arms) == ["none", "layer"]
    with pytest.raises(PlanError, match="one-value-per-channel"):
        planned(MyNetwork(), torch.randn(4, 784), ("none", "instance"))
    assert running(planned(nn.Linear(4, 3), torch.randn(2, 4), ("none",))[1]) == ["none"]


def test_the_reference_comes_first_where_nobody_asked_for_it():
    reference, arms = planned(MyNetwork(), torch.randn(4, 784), ("layer", "layer", "as-is"))
    assert (reference, list(arms)) == ("none", ["none", "layer", "as-is"])
    assert arms["as-is"].left_out == "the model has no norms of its own: see none"
    reference, arms = planned(Block(), image(2, 3, 8, 8), ("group",))
    assert (reference, list(arms)) == ("as-is", ["as-is", "group"])
    _, arms = planned(Block(), image(2, 3, 8, 8), ("group", "as-is"))
    assert list(arms) == ["group", "as-is"]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_training_batch_size_decides(batch_size):
    _, arms = planned(MyNetwork(), torch.randn(4, 784), batch_size=batch_size)
    assert ("batch" in running(arms)) == (batch_size > 1)


class TiedLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))


def test_tied_layers_stay_tied_and_count_once():
    _, arms = planned(TiedLinears(), torch.randn(4, 8), ("none", "batch"))
    assert arms["none"].parameters == sum(p.numel() for p in TiedLinears().parameters())
    made = arms["batch"].build(TiedLinears())
    assert made.b.weight is made.a.weight
    assert arms["batch"].norms == 1


def test_frozen_parameters_stay_frozen():
    model = SmallCNN()
    model.conv1.requires_grad_(False)
    _, arms = planned(model, image(2, 1, 8, 8), ("none", "batch"))
    made = arms["batch"].build(copy.deepcopy(model))
    assert not made.conv1.weight.requires_grad
    assert made.conv1.norm.weight.requires_grad
    wholly = SmallCNN().requires_grad_(False)
    _, arms = planned(wholly, image(2, 1, 8, 8), ("none", "batch", "batch-noaffine"))
    assert running(arms) == ["batch"]
    assert "takes a gradient" in arms["none"].left_out


class WritesItsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = F.relu(F.layer_norm(self.a(x), (8,)))
        return self.c(F.relu(self.b(x)))


def test_a_norm_in_a_forward_is_told():
    reference, arms = planned(WritesItsNorm(), torch.randn(4, 8), ("none", "batch"))
    assert reference == "none"
    assert any("a keeps the norm" in note for note in arms["batch"].notes)


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Sequential(
            nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)
        ),
        lambda: nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)),
    ],
)
def test_group_norm_that_is_layer_norm_is_not_tested_twice(model):
    norms = ("none", "batch", "layer", "group", "rms")
    _, arms = plan_arms(model(), Call((image(4, 6),)), norms, batch_size=4)
    arms = {arm.norm: arm for arm in arms}
    assert arms["group"].left_out.endswith("where group norm is layer norm: see layer")
    assert arms["group"].same_as == "layer"
    assert not arms["layer"].left_out
    _, arms = plan_arms(model(), Call((image(4, 6),)), ("none", "group"), batch_size=4)
    assert not arms[-1].left_out, "without layer norm it stands for itself"


# -- faults ----------------------------------------------------------------------------------------


def test_an_insertion_that_was_found_wrong_is_left_out(monkeypatch):
    """The planted fault: the tree gets a group norm less than planned; other kinds all theirs."""
    honest = bnify.inserts.rewrite_tree

    def one_less(model, plan, norms):
        kept = [edit for edit in plan.edits if edit.norm != "group" or edit.layer != "conv2"]
        return honest(model, replace(plan, edits=tuple(kept)), norms)

    monkeypatch.setattr(bnify.inserts, "rewrite_tree", one_less)
    _, arms = planned(SmallCNN(), image(2, 1, 8, 8))
    assert "group" not in running(arms)
    assert "measured and found wrong" in arms["group"].left_out
    assert "\n" not in arms["group"].left_out
    assert running(arms) == [norm for norm in NORMS if norm != "group"]


class Picky(SmallCNN):
    def forward(self, x):
        if self.training and hasattr(self.conv1, "norm") and "Group" in repr(self.conv1.norm):
            raise ValueError("no groups here\nsecond line")
        return super().forward(x)


class PickyBlock(Block):
    def forward(self, x):
        return super().forward(x) * self.bn0.num_groups


def test_a_model_that_raises_with_a_norm_leaves_that_arm_out():
    _, arms = planned(Picky(), image(2, 1, 8, 8))
    assert "no groups here" in arms["group"].left_out
    assert "\n" not in arms["group"].left_out
    assert "batch" in running(arms)
    model = PickyBlock(lambda c: nn.GroupNorm(4, c))
    _, arms = planned(model, image(2, 3, 8, 8), ("none", "batch", "group"))
    assert running(arms) == ["as-is", "group"]
    assert "num_groups" in arms["batch"].left_out


def test_a_training_batch_that_the_model_refuses_leaves_arms_out():
    class Fixed(SmallCNN):
        def forward(self, x):
            return super().forward(x.view(2, 1, 8, 8)) if not self.training else super().forward(x)

    with pytest.raises(SpecError, match="Block raised"):
        planned(Block(), image(2, 3, 0, 8))
    _, arms = planned(Fixed(), image(2, 1, 8, 8), ("none", "layer"), batch_size=6)
    assert not running(arms)
    assert "Fixed with none raised" in arms["none"].left_out


def test_a_forward_that_raises_is_an_error():
    with pytest.raises((CaptureError, SpecError)):
        planned(SmallCNN(), image(2, 3, 8, 8))


def test_an_arm_that_was_left_out_builds_nothing():
    _, arms = planned(Block(), image(2, 3, 8, 8))
    with pytest.raises(PlanError, match="batch was left out: the model's own"):
        arms["batch"].build(Block())


def test_names_in_a_line_are_few():
    assert arms_module._names([*"abcdefg"]) == "a, b, c, d and 3 more"
