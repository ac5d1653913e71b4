"""The verdict by error budget: clean candidates pass, every planted fault trips it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnify.errors import CaptureError
from bnify.structure import Call, as_call
from bnify.verdict import Verification
from bnify.verification import TorchRunner, measure, verify_budget
from laws import hostile_


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


X = Call((torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)),))


@pytest.fixture
def net() -> nn.Module:
    return hostile_(ConvNet(), seed=3).eval()


def worst(verdict: Verification) -> float:
    return max(output.budget_ratio or 0.0 for output in verdict.outputs)


def test_a_model_is_within_its_own_budget(net: nn.Module) -> None:
    verdict = verify_budget(net, net, X)
    assert verdict.passed
    assert worst(verdict) <= 1.0
    assert verdict.device == "cpu"
    assert verdict.first_divergent is None
    assert verdict.inputs[:3] == ("example", "normal (seed 1)", "normal x10 (seed 1)")
    assert "zeros" in verdict.inputs
    assert verdict.inputs[-2:] == ("batch 1 (seed 1)", "batch 5 (seed 1)")


def test_other_kernels_stay_within_the_budget(net: nn.Module) -> None:
    relaid = copy.deepcopy(net).to(memory_format=torch.channels_last)
    verdict = verify_budget(net, relaid, X)
    assert verdict.passed
    assert verdict.outputs[0].top1 == 1.0


def drop_eps(net: ConvNet) -> None:
    net.bn2.eps = 0.0


def beta_off_by_one_percent(net: ConvNet) -> None:
    with torch.no_grad():
        net.bn1.bias[2] *= 1.01


def swap_channels(net: ConvNet) -> None:
    with torch.no_grad():
        net.conv2.weight[[0, 5]] = net.conv2.weight[[5, 0]]


def leave_a_norm_out(net: ConvNet) -> None:
    net.bn2 = nn.Identity()


@pytest.mark.parametrize(
    ("plant", "where"),
    [
        (drop_eps, "bn2"),
        (beta_off_by_one_percent, "bn1"),
        (swap_channels, "conv2"),
        (leave_a_norm_out, "bn2"),
    ],
)
def test_planted_faults_are_caught_and_named(net: nn.Module, plant, where: str) -> None:
    broken = copy.deepcopy(net)
    plant(broken)
    verdict = verify_budget(net, broken, X)
    assert not verdict.passed
    assert worst(verdict) > 10
    assert verdict.first_divergent == where
    assert "the reference's own float32 error (limit 10x)" in verdict.outputs[0].detail


def test_k_is_the_limit(net: nn.Module) -> None:
    broken = copy.deepcopy(net)
    beta_off_by_one_percent(broken)
    assert not verify_budget(net, broken, X, localise=False).passed
    assert verify_budget(net, broken, X, k=1e5, localise=False).outputs[0].budget_ratio


class Then(nn.Module):
    """The net, and then something with its output."""

    def __init__(self, net: nn.Module, function) -> None:
        super().__init__()
        self.net, self.function = net, function

    def forward(self, x: Tensor):
        return self.function(self.net(x))


def nan_in_one_place(y: Tensor) -> Tensor:
    return y.index_fill(0, torch.tensor([0]), math.nan)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda y: y[:, :4], "shape"),
        (lambda y: y.double(), "dtype float64, expected float32"),
        (lambda y: (y, y), "2 outputs, expected 1"),
        (nan_in_one_place, "values are NaN, expected 0"),
        (lambda y: y * math.inf, "values are"),
        (lambda y: y.view(-1, 7), "the candidate raises"),
    ],
)
def test_outputs_that_differ_in_kind_fail(net: nn.Module, function, says: str) -> None:
    verdict = verify_budget(net, Then(net, function), X, localise=False)
    assert not verdict.passed
    assert says in verdict.outputs[0].detail
    assert verdict.outputs[0].rel_l2 == math.inf


def test_integer_outputs_are_exact(net: nn.Module) -> None:
    reference = Then(net, lambda y: {"y": y, "top": y.argmax(1)})
    same = verify_budget(reference, reference, X)
    assert same.passed
    off = Then(net, lambda y: {"y": y, "top": (y.argmax(1) + 1) % 5})
    verdict = verify_budget(reference, off, X, localise=False)
    assert not verdict.passed
    assert [output.passed for output in verdict.outputs] == [True, False]
    assert verdict.outputs[1].detail == "on example: 4 of 4 integers differ"


def test_an_example_that_is_not_finite_never_passes() -> None:
    model = nn.Linear(3, 2)
    call = as_call(torch.tensor([[1.0, math.inf, 0.0]]))
    verdict = verify_budget(model, model, call)
    assert not verdict.passed
    assert (
        verdict.checks[0].detail == "the reference's outputs on the input 'example' are not finite"
    )


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


def test_redrawn_inputs_the_original_cannot_take_are_dropped_and_reported() -> None:
    verdict = verify_budget(Root(), Root(), as_call(torch.rand(2, 30) + 1))
    assert verdict.passed
    assert verdict.inputs == ("example", "zeros")
    assert "dropped normal (seed 1): the reference's outputs are not finite" in verdict.notes


def test_redrawn_inputs_on_which_the_original_raises_are_dropped() -> None:
    def small(x: Tensor) -> Tensor:
        if x.abs().max() > 8:
            raise ValueError("out of range")
        return x * 3

    model = Then(nn.Identity(), small)
    verdict = verify_budget(model, model, as_call(torch.ones(2, 3)))
    assert verdict.passed
    assert any(
        "normal x10 (seed 2): the reference raises: out of range" in n for n in verdict.notes
    )


def test_an_example_on_which_the_original_raises_is_an_error(net: nn.Module) -> None:
    with pytest.raises(CaptureError, match="the reference raises on the input 'example'"):
        verify_budget(net, net, as_call(torch.randn(2, 4, 8, 8)))


def test_integers_are_redrawn_in_their_range_and_masks_kept() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.embed(ids) * mask[..., None]

    call = Call((torch.randint(0, 7, (3, 5)), torch.ones(3, 5, dtype=torch.bool)))
    tokens = Tokens()
    verdict = verify_budget(tokens, tokens, call)
    assert verdict.passed
    assert verdict.inputs[:3] == ("example", "integers (seed 1)", "integers (seed 2)")


def test_the_users_data_replaces_redrawn_inputs(net: nn.Module) -> None:
    batches = [(torch.randn(4, 3, 8, 8), torch.zeros(4)) for _ in range(3)]
    verdict = verify_budget(net, net, X, data=batches, batches=2)
    assert verdict.inputs == ("data 0", "data 1", "batch 1", "batch 5")


def test_a_fault_at_other_batch_sizes_only_is_caught(net: nn.Module) -> None:
    wrong = Then(net, lambda y: y if y.shape[0] != 1 else y * 1.01)
    verdict = verify_budget(net, wrong, X, localise=False)
    assert not verdict.passed
    check = next(check for check in verdict.checks if check.name == "batch size 1, 5")
    assert check.passed is False
    assert check.detail.startswith("at batch 1: ")
    assert "own float32 error" in check.detail


# -- where float64 says nothing -----------------------------------------------------------------


class Locked(nn.Module):
    """Refuses float64, as an extension with float32 kernels does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise TypeError("float32 only")
        return self.net(x)


def test_without_float64_the_noise_floor_decides_and_says_so(net: nn.Module) -> None:
    verdict = verify_budget(Locked(net), Locked(net), X)
    assert verdict.passed
    assert verdict.outputs[0].budget_ratio is None
    assert verdict.notes[0] == (
        "budget: unavailable: the model does not run in float64: float32 only"
    )
    assert verdict.checks[0].name == "noise floor"
    assert "limit 10x" in verdict.outputs[0].detail
    assert any(note.startswith("noise floor with oneDNN off") for note in verdict.notes)


def test_without_float64_a_fault_still_fails(net: nn.Module) -> None:
    broken = copy.deepcopy(net)
    beta_off_by_one_percent(broken)
    verdict = verify_budget(Locked(net), Locked(broken), X, localise=False)
    assert not verdict.passed


def test_a_model_that_mixes_its_batch_does_not_widen_the_noise_floor(net: nn.Module) -> None:
    def position(y: Tensor) -> Tensor:
        return y + torch.arange(float(y.shape[0]))[:, None]

    reference = Locked(Then(net, position))
    broken = copy.deepcopy(net)
    beta_off_by_one_percent(broken)
    verdict = verify_budget(reference, Locked(Then(broken, position)), X, localise=False)
    assert not verdict.passed
    said = "noise floor without the batch in reverse: it changes the result, not its rounding"
    assert said in verdict.notes


def test_the_users_tolerances_are_their_word_only_without_a_budget(net: nn.Module) -> None:
    broken = copy.deepcopy(net)
    beta_off_by_one_percent(broken)
    loose = verify_budget(Locked(net), Locked(broken), X, rtol=0.5, atol=0.5, localise=False)
    assert loose.passed
    assert loose.outputs[0].detail == "held to rtol 0.5, atol 0.5"
    tight = verify_budget(Locked(net), Locked(broken), X, rtol=1e-7, localise=False)
    assert not tight.passed
    unused = verify_budget(net, broken, X, rtol=0.5, atol=0.5, localise=False)
    assert not unused.passed
    assert "rtol and atol are not used: the error budget is available" in unused.notes


class CastsInside(nn.Module):
    """Computes in float32 by hand, as many norms and attentions do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.scale = torch.full((3, 1, 1), 1.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x * self.scale).float() + torch.zeros(5) + torch.ones(5, dtype=torch.float32)
        return y.softmax(-1, dtype=torch.float32)


def test_casts_inside_the_model_do_not_spoil_the_truth(net: nn.Module) -> None:
    measured = measure(TorchRunner(CastsInside(net)), X)
    assert measured.unavailable is None
    assert all(t.dtype == torch.float64 for case in measured.cases for _, t in case.truth or [])
    by_hand = copy.deepcopy(net).double()(X.args[0].double() * 1.5)
    want = (by_hand + 1).softmax(-1)
    torch.testing.assert_close((measured.cases[0].truth or [])[0][1], want, rtol=1e-12, atol=0)


# -- verdicts that must not come about by accident ----------------------------------------------


def test_an_ill_conditioned_model_cannot_be_passed_by_anything() -> None:
    cancel = Then(nn.Identity(), lambda x: (x + 3e7) - 3e7)
    assert not verify_budget(
        cancel, Then(nn.Identity(), torch.zeros_like), as_call(torch.randn(4, 50))
    ).passed
    verdict = verify_budget(cancel, cancel, as_call(torch.randn(4, 50)), seeds=())
    assert not verdict.passed
    assert "ill-conditioned on every input" in verdict.outputs[0].detail


def test_one_input_that_decides_is_enough() -> None:
    # Near zero the sum cancels; a thousand times larger inputs it carries well.
    model = Then(nn.Identity(), lambda x: (x + 2e6) - 2e6)
    call = as_call(torch.randn(4, 50))
    batches = [torch.randn(4, 50), torch.randn(4, 50) * 1e4]
    assert verify_budget(model, model, call, data=batches).passed


def test_outputs_of_exact_arithmetic_have_an_absolute_floor() -> None:
    double = Then(nn.Identity(), lambda x: x * 2)  # exact: the own error is 0
    ulp = Then(nn.Identity(), lambda x: x * 2 * (1 + 2e-7))
    off = Then(nn.Identity(), lambda x: x * 2 * (1 + 2e-6))
    call = as_call(torch.randn(4, 50))
    assert verify_budget(double, ulp, call).passed
    assert not verify_budget(double, off, call, localise=False).passed


def test_an_output_of_one_value_is_not_judged_by_a_lucky_error(net: nn.Module) -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*[nn.Linear(64, 64) for _ in range(12)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x).sum()

    model = Scalar()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.layers:  # the same function, summed in another order
            order = torch.randperm(64)
            layer.weight.copy_(layer.weight)
            layer.forward = lambda x, w=layer, o=order: F.linear(x[:, o], w.weight[:, o], w.bias)
    assert verify_budget(model, other, as_call(torch.randn(2, 64))).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_are_their_own_baseline(net: nn.Module, dtype: torch.dtype) -> None:
    half = copy.deepcopy(net).to(dtype)
    call = X.to(dtype=dtype)
    verdict = verify_budget(half, half, call)
    assert verdict.passed
    assert 1e-5 < verdict.outputs[0].rel_l2 < 0.05
    broken = copy.deepcopy(half)
    swap_channels(broken)
    with torch.no_grad():
        broken.fc.weight.mul_(1.5)
    assert not verify_budget(half, broken, call, localise=False).passed


def test_the_models_leave_as_they_came(net: nn.Module) -> None:
    net.bn1.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    x = X.args[0].clone()
    verify_budget(net, net, Call((x,)))
    assert modes == [module.training for module in net.modules()]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(x, X.args[0])


def test_a_model_that_writes_into_its_input_harms_nobody() -> None:
    model = Then(nn.Identity(), lambda x: x.mul_(2).add_(1))
    verdict = verify_budget(model, model, as_call(torch.randn(2, 3)))
    assert verdict.passed


def test_dropout_that_forgot_eval_is_at_least_repeatable() -> None:
    model = Then(nn.Identity(), lambda x: F.dropout(x + 1, 0.5))  # training=True by default
    assert verify_budget(model, model, as_call(torch.randn(4, 50))).passed
