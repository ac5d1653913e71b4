"""A fold that is wrong is never handed out: planted faults, and what cannot be decided."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnify
import bnify.folds
import bnify.refold
import laws
from bnify import Reason
from bnify.changes import Changes
from patterns.kit import Line
from replaying import assert_untouched, fingerprint_of

X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(2))


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Three blocks whose norms fold backwards; well conditioned."""
    torch.manual_seed(4)
    net = Line(
        a=nn.Conv2d(3, 6, 3), na=nn.BatchNorm2d(6), ta=nn.Tanh(),
        b=nn.Conv2d(6, 5, 3), nb=nn.BatchNorm2d(5), tb=nn.Tanh(),
        c=nn.Conv2d(5, 4, 3), nc=nn.BatchNorm2d(4), tc=nn.Tanh(),
    )  # fmt: skip
    return laws.hostile_(net.eval(), 4).to(dtype)


#: The layer with the fault, and a channel of it that is alive: its scale is not 0.
FAULTY = "b"


def live(net: nn.Module) -> int:
    return int(net.nb.weight.abs().argmax())


Fault = Callable[[Tensor, Tensor], None]


def weight_by(relative: float) -> Fault:
    """One channel of the weight is off by a factor."""

    def fault(weight: Tensor, bias: Tensor) -> None:
        weight[live(model())] *= 1 + relative

    return fault


def bias_by(absolute: float) -> Fault:
    """One channel of the bias is off by a number."""

    def fault(weight: Tensor, bias: Tensor) -> None:
        bias[live(model())] += absolute

    return fault


def swapped(weight: Tensor, bias: Tensor) -> None:
    """Two channels' biases change places."""
    bias[[0, 1]] = bias[[1, 0]]


def not_folded(weight: Tensor, bias: Tensor) -> None:
    """The norm is gone and the layer has not taken it."""
    weight.copy_(model().b.weight)
    bias.copy_(model().b.bias)


Change = Callable[[nn.Module], None]

#: Where trees and graphs of a fold are made: what is handed out, and verification's own copies.
TREES = ((bnify.folds, "folded_copy"), (bnify.folds, "fold_tree"), (bnify.refold, "fold_tree"))
GRAPHS = ((bnify.folds, "folded_module"), (bnify.refold, "folded_module"))


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Plant a fault in whatever a fold of the faulty layer makes: trees, graphs, or both.

    ``handed_out`` leaves the float64 copies of verification right; with ``least`` it takes so many
    folds together to go wrong.
    """
    planted: list[str] = []

    def wrap(place: Any, name: str, fault: Change, least: int) -> None:
        real = getattr(place, name)

        def faulty(*arguments: Any, **options: Any) -> nn.Module:
            done = real(*arguments, **options)
            (changes,) = (a for a in arguments if isinstance(a, Changes))
            scaled = {n for n in changes.weights if n.endswith("weight")}
            if f"{FAULTY}.weight" in scaled and len(scaled) >= least:
                with torch.no_grad():
                    fault(done)
                planted.append(name)
            return done

        monkeypatch.setattr(place, name, faulty)

    def planting(
        fault: Fault | Change,
        *,
        tree: bool = False,
        graph: bool = False,
        handed_out: bool = False,
        least: int = 1,
        of_model: bool = False,
    ) -> None:
        change = fault if of_model else in_layer(fault)
        for place, name in (*(TREES if tree else ()), *(GRAPHS if graph else ())):
            if place is bnify.folds or not handed_out:
                wrap(place, name, change, least)

    yield planting
    assert planted, "no fault was planted"


def in_layer(fault: Fault) -> Change:
    """The fault on tensors of their own: verification lets models share some."""

    def change(made: nn.Module) -> None:
        layer = made.get_submodule(FAULTY)
        own = {leaf: getattr(layer, leaf).detach().clone() for leaf in ("weight", "bias")}
        fault(own["weight"], own["bias"])
        for leaf, tensor in own.items():
            tensor = nn.Parameter(tensor) if leaf in layer._parameters else tensor
            setattr(layer, leaf, tensor)

    return change


def assert_undone(net: nn.Module, result: bnify.Result, x: Tensor) -> None:
    """The faulty fold is undone and reported; the others are made, and right."""
    assert {s.layer: s.reason for s in result.plan.skips} == {"nb": Reason.VERIFICATION_FAILED}
    assert {e.layer for e in result.plan.edits} == {"na", "nc"}
    assert result.passed
    error = laws.worst_error(laws.run64(net, x), laws.run64(result.model, x))
    assert error <= (1e-12 if net.a.weight.dtype == torch.float64 else 1e-6)


FAULTS = {
    "a weight by a millionth": weight_by(1e-6),
    "a weight by a billionth": weight_by(1e-9),
    "a weight by a percent": weight_by(1e-2),
    "a weight of the other sign": weight_by(-2.0),
    "a bias by a millionth": bias_by(1e-6),
    "two biases swapped": swapped,
    "a norm dropped": not_folded,
}


def test_without_a_fault_everything_folds_and_passes():
    result = bnify.fold(model(), X.double())
    assert len(result.plan.edits) == 3
    assert result.plan.skips == ()
    assert result.verification.algebra <= 1e-13
    names = [check.name for check in result.verification.checks]
    assert names[0] == "result = original, float64"
    assert "recording = module" in names


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_fault_in_the_result_is_undone_and_reported(plant, fault, dtype):
    plant(fault, tree=True)
    net, x = model(dtype), X.to(dtype)
    before = fingerprint_of(net)
    result = bnify.fold(net, x)
    assert_untouched(before, fingerprint_of(net))
    assert_undone(net, result, x)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_in_the_recording_alone_is_undone_and_reported(plant, fault):
    plant(fault, graph=True)
    net = model()
    assert_undone(net, bnify.fold(net, X.double()), X.double())


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_in_both_is_undone_and_reported(plant, fault):
    """Recording and module agree, and both are wrong: only the original tells."""
    plant(fault, tree=True, graph=True)
    net = model()
    assert_undone(net, bnify.fold(net, X.double()), X.double())


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_in_an_emitted_graph_is_undone_and_reported(plant, fault):
    plant(fault, graph=True)
    net = model()
    assert_undone(net, bnify.fold(net, X.double(), emit="graph"), X.double())


@pytest.mark.parametrize(
    "fault",
    [weight_by(1e-3), bias_by(1e-2), swapped, not_folded],
    ids=["weight", "bias", "swapped", "not folded"],
)
def test_a_fault_in_what_is_handed_out_alone_is_found(plant, fault):
    """The algebra in float64 is right, the float32 model that the user gets is not."""
    plant(fault, tree=True, handed_out=True)
    net = model(torch.float32)
    result = bnify.fold(net, X)
    assert_undone(net, result, X)


def test_a_fault_without_verification_is_handed_out(plant):
    """So it is verification that finds the faults above."""
    plant(weight_by(1e-6), tree=True)
    net = model()
    result = bnify.fold(net, X.double(), verify=False)
    assert len(result.plan.edits) == 3
    assert laws.worst_error(laws.run64(net, X), laws.run64(result.model, X)) > 1e-9


@pytest.mark.parametrize("inplace", [False, True])
def test_a_fault_that_no_single_fold_has_is_an_error_with_the_result(plant, inplace):
    """Nothing can be undone then: the model is left as it was, and the error says what failed."""
    plant(weight_by(1e-2), tree=True, least=2)
    net = model()
    before = fingerprint_of(net)
    with pytest.raises(
        bnify.VerificationError, match=r"wrong \(result = original, float64"
    ) as info:
        bnify.fold(net, X.double(), inplace=inplace)
    assert_untouched(before, fingerprint_of(net))
    result = info.value.result
    assert result is not None
    assert result.passed is False
    assert not result.verification.passed
    failed = [check for check in result.verification.checks if check.passed is False]
    assert failed[0].error > failed[0].threshold
    assert info.value.hint


def lose_activation(made: nn.Module) -> None:
    """An activation lost with its norm changes no tensor."""
    made.tb = nn.Identity()


def break_down(made: nn.Module) -> None:
    """The next layer takes no such input."""
    made.tb = nn.Linear(1, 1).to(made.b.weight.dtype)


@pytest.mark.parametrize("fault", [lose_activation, break_down])
def test_a_structure_that_is_wrong_is_undone_as_well(plant, fault):
    plant(fault, tree=True, of_model=True)
    net = model()
    assert_undone(net, bnify.fold(net, X.double()), X.double())


# -- what cannot be decided ------------------------------------------------------------------------


class Chaos(nn.Module):
    """The logistic map, fifty times: one ulp of a weight fills the whole output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.bn(self.conv(x)))
        for _ in range(50):
            y = 3.99 * y * (1 - y)
        return y


def said(net: nn.Module, x: Tensor) -> str:
    """Everything a user is told about a fold that could not be confirmed."""
    try:
        result = bnify.fold(net, x)
        words = ""
    except bnify.VerificationError as error:
        result, words = error.result, f"{error.message} {error.hint}"
    assert result is not None
    checks = result.verification.checks
    parts = [words, *(s.detail for s in result.plan.skips), *(c.detail for c in checks)]
    return " ".join([*parts, *result.plan.notes, *result.verification.notes])


def test_an_ill_conditioned_network_says_so():
    net, x = laws.hostile_(Chaos().eval(), 1).double(), X.double()
    assert laws.one_ulp_noise(net, x) > 1e-6
    assert "ill-conditioned" in said(net, x)


def test_an_ill_conditioned_fold_is_not_called_wrong():
    """It is exact: that it was 'found wrong' would be no true reason."""
    assert "wrong" in Reason.VERIFICATION_FAILED.sentence
    net, x = laws.hostile_(Chaos().eval(), 1).double(), X.double()
    try:
        skips = bnify.fold(net, x).plan.skips
    except bnify.VerificationError as error:
        skips = error.result.plan.skips
    for skip in skips:
        assert skip.reason is not Reason.VERIFICATION_FAILED or "ill-cond" in skip.detail, skip


class Logarithm(nn.Module):
    """Not finite on any input: the logarithm of what is negative somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(self.bn(self.conv(x)))


def test_an_original_that_is_not_finite_fails_and_the_error_says_why():
    net = laws.hostile_(Logarithm().eval(), 1).double()
    before = fingerprint_of(net)
    with pytest.raises(bnify.VerificationError, match="not finite") as info:
        bnify.fold(net, X.double())
    assert_untouched(before, fingerprint_of(net))
    assert info.value.result is not None
    assert info.value.result.passed is False


# -- other dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_models_are_verified_in_float64(dtype):
    net, x = model(dtype), X.to(dtype)
    result = bnify.fold(net, x)
    assert result.passed
    assert len(result.plan.edits) == 3
    assert result.verification.algebra <= 1e-12
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    truth = laws.run64(net, x)
    with torch.no_grad():
        own, got = net(x).double(), result.model(x).double()
    assert laws.relative_error(truth[0], got) <= 10 * laws.relative_error(truth[0], own)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fault_in_a_narrow_model_is_found(plant, dtype):
    plant(weight_by(1e-6), tree=True)  # far below what the dtype itself can show
    result = bnify.fold(model(dtype), X.to(dtype))
    assert {s.layer: s.reason for s in result.plan.skips} == {"nb": Reason.VERIFICATION_FAILED}


class Locked(nn.Module):
    """Runs in float32 and in nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return self.bn(self.conv(x)).relu()


def test_a_model_without_float64_is_compared_in_its_own_dtype_and_says_so():
    result = bnify.fold(laws.hostile_(Locked().eval(), 3), X)
    assert result.passed
    assert any("does not run in float64" in note for note in result.verification.notes)
    assert any("float32 only" in note for note in result.verification.notes)


def test_a_fault_in_a_model_without_float64_is_found(monkeypatch):
    def wrapped(real: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def faulty(*arguments: Any, **options: Any) -> nn.Module:
            done = real(*arguments, **options)
            with torch.no_grad():
                done.conv.weight = nn.Parameter(done.conv.weight * (1 + 1e-3))
            return done

        return faulty

    for place, name in TREES:
        monkeypatch.setattr(place, name, wrapped(getattr(place, name)))
    result = bnify.fold(laws.hostile_(Locked().eval(), 3), X)
    assert {s.layer: s.reason for s in result.plan.skips} == {"bn": Reason.VERIFICATION_FAILED}


def test_verification_leaves_the_result_in_eval_mode_and_shares_nothing():
    net = model()
    result = bnify.fold(net, X.double())
    assert not any(module.training for module in result.model.modules())
    theirs = {p.data_ptr() for p in net.parameters()} | {b.data_ptr() for b in net.buffers()}
    ours = {p.data_ptr() for p in result.model.parameters()}
    assert not theirs & ours
