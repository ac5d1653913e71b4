"""Checkpoints from before an insertion, and from after it, in the model after it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import bnify
import laws
import nets

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), weight_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 2)
    ).double()


NETWORKS = {
    "mlp": (mlp, X),
    "cnn": (lambda: nets.PlainResidual().double(), torch.randn(4, 3, 16, 16).double()),
    "transposed": (lambda: nets.ConvAutoencoder().double(), torch.randn(4, 1, 16, 16).double()),
    "tokens": (lambda: nets.Mixer().double(), torch.randn(4, 3, 12, 12).double()),
}


@pytest.mark.parametrize("drop_bias", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_one_from_before_gives_the_old_outputs(name, drop_bias):
    """Not only that of the weights the norms were measured with: any, for the norm is no change."""
    make, x = NETWORKS[name]
    measured, other = make().eval(), make().eval()
    result = bnify.insert(
        measured, x, init="preserve", data=[x], drop_bias=drop_bias, include="*", verify=False
    )
    model = result.model.eval()
    assert any(edit.drop_bias for edit in result.plan.edits) == drop_bias
    for checkpoint in (other, measured):
        missing, unexpected = model.load_state_dict(checkpoint.state_dict(), strict=False)
        assert not unexpected
        assert missing
        assert all(".norm." in key or key.startswith("norm.") for key in missing)
        error = laws.worst_error(laws.run64(checkpoint, x), laws.run64(model, x))
        assert error < 1e-10


@pytest.mark.parametrize("drop_bias", [False, True])
def test_one_from_before_after_training_has_moved_the_norms(drop_bias):
    """Old weights under trained norms: the difference is that of the norms, and nothing else."""
    base = mlp().eval()
    model = bnify.insert(base, X, init="preserve", drop_bias=drop_bias, verify=False).model
    with torch.no_grad():
        model[0].norm.weight.mul_(2)
    plain = copy.deepcopy(model)
    model.load_state_dict(base.state_dict(), strict=False)
    assert laws.worst_error(laws.run64(plain, X), laws.run64(model, X)) < 1e-12


@pytest.mark.parametrize("init", ["reset", "preserve", "stats"])
@pytest.mark.parametrize("drop_bias", [False, True])
def test_one_from_after_goes_into_a_fresh_insertion_bit_by_bit(drop_bias, init):
    trained = bnify.insert(mlp(), X, init=init, drop_bias=drop_bias, verify=False).model
    optimizer = torch.optim.AdamW(bnify.param_groups(trained, weight_decay=0.1), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        trained.train()(X).square().mean().backward()
        optimizer.step()
    fresh = bnify.insert(mlp(), 2 * X, init=init, drop_bias=drop_bias, verify=False).model
    fresh.load_state_dict(trained.state_dict())
    for (name, a), b in zip(trained.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(trained.eval()(X), fresh.eval()(X))
    theirs = torch.optim.AdamW(bnify.param_groups(fresh, weight_decay=0.1), lr=0.01)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, opt in ((trained, optimizer), (fresh, theirs)):
        opt.zero_grad()
        net.train()(X).square().mean().backward()
        opt.step()
    assert all(
        torch.equal(a, b) for a, b in zip(trained.parameters(), fresh.parameters(), strict=True)
    )


# -- a dropped bias that the checkpoint does not have, or has in another size ----------------------


class SharedBias(nn.Module):
    """Two layers with one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.b.bias = self.a.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.a(x).relu()).relu())


def test_a_dropped_bias_that_the_checkpoint_lacks_is_missing(tmp_path):
    """As one that two layers share, of which a file has one name."""
    safetensors = pytest.importorskip("safetensors.torch")
    old = SharedBias().double()
    model = bnify.insert(SharedBias().double(), X, init="preserve", drop_bias=True).model
    safetensors.save_model(old, str(tmp_path / "old.safetensors"))
    state = safetensors.load_file(tmp_path / "old.safetensors")
    (lost,) = {"a.bias", "b.bias"} - set(state)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert [key for key in missing if ".norm." not in key] == [lost]
    state[lost] = old.a.bias
    missing, _ = model.load_state_dict(state, strict=False)
    assert all(".norm." in key for key in missing)
    assert laws.worst_error(laws.run64(old, X), laws.run64(model, X)) < 1e-10
    own = model.state_dict()
    model.load_state_dict(own)
    del own["a.dropped_bias"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"a.bias\"\. "):
        model.load_state_dict(own)


def test_a_checkpoint_of_other_sizes_is_refused_with_all_of_them():
    model = bnify.insert(mlp(), X, drop_bias=True, verify=False).model
    before = copy.deepcopy(model.state_dict())
    other = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8)).double()
    with pytest.raises(RuntimeError, match="loading state_dict") as caught:
        model.load_state_dict(other.state_dict(), strict=False)
    assert "size mismatch for 0.weight" in str(caught.value)
    assert "size mismatch for 0.dropped_bias" in str(caught.value)
    for key in ("0.dropped_bias", "0.norm.running_mean"):
        assert torch.equal(before[key], model.state_dict()[key])
