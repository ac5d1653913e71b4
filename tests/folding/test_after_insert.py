"""What insertion puts in, folding takes out: the model is itself again, and plain."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnify
import laws
import nets
import zoo
from bnify import api
from bnify.structure import Call
from counting import count_norms
from replaying import assert_untouched, fingerprint_of

CHUNKS = 4


def batches(x: Any, count: int = 2) -> list[Any]:
    """Data whose statistics are neither the example's nor those of N(0, 1)."""
    call = x if isinstance(x, Call) else Call((x,), {})
    return [call.redrawn(20 + i, 1.5).args[0] for i in range(count)]


def assert_itself_again(model: nn.Module, x: Tensor, **options: Any) -> bnify.Result:
    """Insert with ``preserve``, fold, and compare with the model in float64.

    Within the one-ulp rule, which is at most 1e-10 wherever the network is well conditioned.
    """
    before = fingerprint_of(model)
    inserted = bnify.insert(model, x, init="preserve", data=batches(x), verify=False, **options)
    assert inserted.plan.edits, "nothing was inserted"
    folded = bnify.fold(inserted.model, x, verify=False)
    assert_untouched(before, fingerprint_of(model))
    assert count_norms(inserted.model, x).batch > count_norms(model, x).batch
    laws.assert_same_function(model, folded.model, x)
    noise = laws.one_ulp_noise(model, x)
    if noise < 1e-13:
        error = laws.worst_error(laws.run64(model, x), laws.run64(folded.model, x))
        assert error <= 1e-10
    return folded


@pytest.mark.parametrize("number", range(CHUNKS))
def test_random_networks_are_themselves_again(number):
    done = 0
    for seed in laws.seeds(60)[number::CHUNKS]:
        net, x = laws.random_network(seed)
        net, x = net.double(), x.double()
        if not api.plan(net, x).edits:
            continue
        try:
            folded = assert_itself_again(net, x)
            laws.assert_same_function(net, folded.model, x * 2 - 1)
            new = {skip.layer for skip in folded.plan.skips if skip.layer.endswith(".norm")}
            assert new == set(), f"inserted norms are left: {folded.plan.skips}"
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        done += 1
    assert done >= 10, "fewer than 40 networks in all"


def test_random_networks_fold_with_verification():
    for seed in range(0, 12, 3):
        net, x = laws.random_network(seed)
        net, x = net.double(), x.double()
        inserted = bnify.insert(net, x, init="preserve", data=batches(x), verify=False)
        assert bnify.fold(inserted.model, x).passed, seed


def narrow(model: nn.Module, most: int = 64) -> nn.Module:
    """The same network, its hidden Linear layers cut to this width: a gigabyte less to copy."""
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for number, (name, linear) in enumerate(linears):
        before = linear.in_features if number == 0 else most
        after = linear.out_features if number + 1 == len(linears) else most
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Linear(before, after))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alexnet", "vgg11", "squeezenet1_1"])
def test_plain_networks_are_themselves_again(name):
    entry = zoo.entry(name)
    model, x = narrow(entry.build()).double(), entry.inputs(2).double()
    folded = assert_itself_again(model, x)
    assert folded.plan.skips == ()
    left = count_norms(folded.model, x)
    assert left.batch == left.scales == 0
    plain = folded.strip()
    assert classes_of_bnify(plain) == set()
    assert type(plain) is type(model)


@pytest.mark.parametrize("options", [{}, {"position": "after-act"}, {"drop_bias": True}])
@pytest.mark.parametrize("make", [nets.PlainResidual, nets.ConvAutoencoder])
def test_every_way_of_inserting_is_taken_back(make, options):
    model = make().double().eval()
    x = torch.randn(4, 1 if make is nets.ConvAutoencoder else 3, 16, 16, dtype=torch.float64)
    inserted = bnify.insert(model, x, init="preserve", data=batches(x), verify=False, **options)
    assert inserted.plan.edits
    folded = bnify.fold(inserted.model, x)
    laws.assert_same_function(model, folded.model, x)
    if not options.get("position"):  # behind an activation a padded convolution may follow
        assert folded.plan.skips == ()
    else:
        truths = {"padded-forward", "nonlinearity-between", "no-absorber", "another-consumer"}
        assert {skip.reason.value for skip in folded.plan.skips} <= truths


def test_trained_norms_fold_as_well():
    """Not only the identity: the norms that were trained meanwhile go in with what they learned."""
    model, x = nets.PlainResidual().double(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    inserted = bnify.insert(model, x, verify=False).model
    laws.hostile_(inserted.eval(), 9)
    folded = bnify.fold(inserted, x)
    assert folded.plan.skips == ()
    laws.assert_same_function(inserted, folded.model, x)
    assert laws.worst_error(laws.run64(model, x), laws.run64(folded.model, x)) > 1e-2


# -- nothing of bnify is left ----------------------------------------------------------------------


def classes_of_bnify(model: nn.Module) -> set[str]:
    """Classes, bases, hooks and parametrizations in a module tree that bnify defines."""
    found = set()
    for module in model.modules():
        kinds = type(module).__mro__
        found |= {k.__name__ for k in kinds if k.__module__.split(".")[0] == "bnify"}
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for hook in hooks.values():
                if getattr(hook, "__module__", "").split(".")[0] == "bnify":
                    found.add(repr(hook))
    return found


class Grouped(nn.Module):
    """Layers whose norm leaves an added shift: what remains must be plain, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.other = nn.Conv2d(6, 6, 1, groups=2)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.other(torch.relu(self.conv(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("make", [nets.UNet, nets.PlainResidual, nets.SqueezeExcite, Grouped])
def test_a_stripped_fold_has_no_class_of_bnify(make):
    model = make().eval()
    x = torch.randn(4, 3, 16, 16)
    inserted = bnify.insert(model, x, verify=False)
    assert classes_of_bnify(inserted.model), "the check can fail"
    folded = bnify.fold(inserted.model, x, verify=False)
    plain = folded.strip()
    assert classes_of_bnify(plain) == set()
    with torch.no_grad():
        assert torch.equal(plain(x), folded.model(x))


def test_a_stripped_fold_is_unpickled_without_bnify(tmp_path, run_python):
    x = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 4)
    )
    inserted = bnify.insert(model, x, verify=False)
    laws.hostile_(inserted.model.eval(), 2)
    folded = bnify.fold(inserted.model, x)
    assert folded.plan.edits
    saved = {"model": folded.strip(), "x": x, "y": folded.model(x).detach()}
    assert pickle.loads(pickle.dumps(saved["model"])) is not None
    torch.save(saved, tmp_path / "plain.pt")
    script = """
import sys
sys.modules["bnify"] = None  # any import of it fails
import torch
saved = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(saved["model"](saved["x"]), saved["y"])
print("same")
"""
    ran = run_python("-c", script, tmp_path / "plain.pt")
    assert (ran.code, ran.stdout.strip()) == (0, "same"), ran.stderr
    torch.save({**saved, "model": inserted.model}, tmp_path / "ours.pt")
    assert run_python("-c", script, tmp_path / "ours.pt").code != 0, "the check cannot fail"


def test_what_a_fold_leaves_in_a_slot_is_unpickled_without_bnify(tmp_path, run_python):
    """An added shift, the activation of a norm, the zero of a merge: plain torch, all of them."""
    from patterns import PATTERNS

    wanted = {"shift", "children", "zero", "affine"}
    seen: dict[str, nn.Module] = {}
    for pattern in PATTERNS:
        if pattern.options.get("emit") == "graph" or seen.keys() >= wanted:
            continue
        result = bnify.fold(
            pattern.make().to(pattern.dtype),
            pattern_inputs(pattern),
            verify=False,
            **pattern.options,
        )
        for change in result.structure:
            if change.kind in wanted - seen.keys():
                seen[change.kind] = result.strip().get_submodule(change.path)
    assert seen.keys() == wanted
    torch.save(list(seen.values()), tmp_path / "slots.pt")
    script = """
import sys
sys.modules["bnify"] = None
import torch
print(len(torch.load(sys.argv[1], weights_only=False)))
"""
    ran = run_python("-c", script, tmp_path / "slots.pt")
    assert (ran.code, ran.stdout.strip()) == (0, str(len(wanted))), ran.stderr


def pattern_inputs(pattern: Any) -> Any:
    from bnify.structure import as_call

    return as_call(pattern.inputs()).to(dtype=pattern.dtype)
