"""One recipe a kind of norm: measured when planned, equal whenever it is built."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnify.inserts
import laws
from bnify.comparing import arms as arms_module
from bnify.comparing import replacement
from bnify.comparing.arms import ArmPlan, plan_arms
from bnify.comparing.question import NORMS
from bnify.errors import CaptureError, PlanError, SpecError
from bnify.structure import Call, as_call
from mlp import MyNetwork


def planned(model: nn.Module, inputs, norms=NORMS, batch_size: int = 8):
    """The reference, and the arms by name."""
    reference, arms = plan_arms(model, as_call(inputs), norms, batch_size=batch_size)
    return reference, {arm.norm: arm for arm in arms}


def running(arms: dict[str, ArmPlan]) -> list[str]:
    return [norm for norm, arm in arms.items() if not arm.left_out]


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


class SmallCNN(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2)
        self.fc = nn.Linear(2 * width, 4)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class Block(nn.Module):
    """A residual network of one block, its norms made by ``norm(channels)``."""

    def __init__(self, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn0 = norm(16)
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False)
        self.bn1 = norm(32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn2 = norm(32)
        self.down = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), norm(32))
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        x = F.relu(self.bn0(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(F.relu(y + self.down(x)).mean((2, 3)))


def same_weights(made: nn.Module, base: nn.Module) -> None:
    """Every tensor of the base but those of norms, bit for bit."""
    norms = {path for path, _ in laws.norms_of(base)}
    have = dict(made.named_parameters(remove_duplicate=False))
    for name, tensor in base.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] not in norms:
            assert torch.equal(have[name], tensor), name


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


# -- models with norms -----------------------------------------------------------------------------


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


# -- transformers: the fused kernel is layer norm's ------------------------------------------------


def encoder_layer(**options) -> nn.TransformerEncoderLayer:
    options = {"batch_first": True, "dropout": 0.0, **options}
    return nn.TransformerEncoderLayer(16, 2, 32, dtype=torch.float64, **options)


def explicit(layer: nn.TransformerEncoderLayer, x: Tensor, norm) -> Tensor:
    """A post-norm encoder layer written down, its norms given by ``norm(x)``."""
    attended = F.multi_head_attention_forward(
        *(x.transpose(0, 1),) * 3,
        16,
        2,
        layer.self_attn.in_proj_weight,
        layer.self_attn.in_proj_bias,
        *(None, None, False, 0.0),
        layer.self_attn.out_proj.weight,
        layer.self_attn.out_proj.bias,
        training=False,
        need_weights=False,
    )[0].transpose(0, 1)
    x = norm(x + attended)
    return norm(x + layer.linear2(F.relu(layer.linear1(x))))


def batch(x: Tensor) -> Tensor:
    return F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2)


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (16,))


@pytest.mark.parametrize(
    ("kind", "train", "norm"),
    [
        ("batch", True, batch),
        ("batch", False, lambda x: x / (1 + 1e-5) ** 0.5),
        ("rms", True, rms),
        ("rms", False, rms),
        ("none", True, lambda x: x),
        ("none", False, lambda x: x),
        ("as-is", True, lambda x: F.layer_norm(x, (16,))),
        ("as-is", False, lambda x: F.layer_norm(x, (16,))),
    ],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_an_encoder_layer_runs_its_new_norms(kind, train, norm, gradients):
    assert torch.backends.mha.get_fastpath_enabled()
    layer, x = encoder_layer(), image(3, 5, 16).double()
    _, arms = planned(layer, x)
    made = arms[kind].build(copy.deepcopy(layer)).train(train)
    with torch.set_grad_enabled(gradients):
        got, want = made(x), explicit(layer, x, norm)
    assert laws.relative_error(want, got) < 1e-10
    assert layer.activation_relu_or_gelu == 1
    assert made.activation_relu_or_gelu == (kind == "as-is")


@pytest.mark.parametrize("kind", ["rms", "batch"])
def test_an_encoder_with_padding_takes_no_nested_tensors(kind):
    model = nn.TransformerEncoder(encoder_layer(), 2)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    call = Call((), {"src": image(3, 5, 16).double(), "src_key_padding_mask": mask})
    _, arms = plan_arms(model, call, [kind], batch_size=3)
    made = {arm.norm: arm for arm in arms}[kind].build(copy.deepcopy(model)).eval()
    slow = call(made)
    with torch.no_grad():
        fast = call(made)
    assert laws.relative_error(slow[~mask], fast[~mask]) < 1e-12


def test_kinds_of_an_encoder():
    _, arms = planned(encoder_layer(), image(3, 5, 16).double())
    assert arms["layer"].left_out == "the model's own norms are layer norms: see as-is"
    assert "too few channels" in arms["group"].left_out
    assert "no form for tokens" in arms["instance"].left_out
    assert running(arms) == ["as-is", "none", "batch", "batch-noaffine", "rms"]


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


def test_a_fused_kernel_with_other_norms_would_be_caught(monkeypatch):
    """The planted fault: the fast path stays on, and the kernel reads tensors of two rms norms."""
    monkeypatch.setattr(replacement, "_leave_fast_path", lambda *_: None)
    layer, x = encoder_layer(), image(3, 5, 16).double()
    _, arms = planned(layer, x, ("none", "rms", "batch"))
    for kind in ("none", "rms", "batch"):
        assert arms[kind].left_out


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
