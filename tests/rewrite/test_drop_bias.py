"""A dropped bias lives on in the running mean: the function, and every checkpoint, stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bnify
import laws


def cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 49, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0, 3)
    return model


X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_bias_is_gone_where_there_was_one():
    result = bnify.insert(cnn(), X, drop_bias=True)
    assert [(e.layer, e.drop_bias) for e in result.plan.edits] == [
        ("0", True),
        ("2", False),
        ("5", True),
    ]
    keys = set(result.model.state_dict())
    assert "0.bias" not in keys
    assert "7.bias" in keys
    assert {key for key in keys if "dropped" in key} == {"0.dropped_bias", "5.dropped_bias"}
    assert result.verification.passed
    assert not laws.training_step(result.model, X)


@pytest.mark.parametrize("norm", ["batch", "sync", "batch-noaffine"])
def test_reset_in_eval_is_the_function_with_the_bias_kept(norm):
    kept = bnify.insert(cnn(), X, norm=norm).model
    dropped = bnify.insert(cnn(), X, norm=norm, drop_bias=True).model
    assert laws.worst_error(laws.run64(kept, X), laws.run64(dropped, X)) < 1e-6


def test_preserve_with_a_dropped_bias_is_the_original():
    model = cnn().double()
    result = bnify.insert(model, X.double(), init="preserve", data=X.double(), drop_bias=True)
    laws.assert_same_function(model, result.model, X)


def test_train_mode_is_the_same_with_and_without():
    kept = bnify.insert(cnn().double(), X.double()).model
    dropped = bnify.insert(cnn().double(), X.double(), drop_bias=True).model
    assert (
        laws.worst_error(laws.run64(kept, X, train=True), laws.run64(dropped, X, train=True))
        < 1e-12
    )


def test_an_old_checkpoint_gives_the_old_function():
    """The bias of the checkpoint is folded in at load, not lost."""
    model = bnify.insert(cnn(0), X, drop_bias=True).model
    other = cnn(5)
    loaded = model.load_state_dict(other.state_dict(), strict=False)
    assert loaded.unexpected_keys == []
    assert all(".norm." in key for key in loaded.missing_keys)
    want = bnify.insert(other, X).model
    assert laws.worst_error(laws.run64(want, X), laws.run64(model, X)) < 1e-6
    model.load_state_dict(cnn(6).state_dict(), strict=False)  # and again
    want = bnify.insert(cnn(6), X).model
    assert laws.worst_error(laws.run64(want, X), laws.run64(model, X)) < 1e-6


def test_a_checkpoint_of_an_undropped_insertion_loads():
    kept = bnify.insert(cnn(3), X).model
    for _ in range(3):
        laws.training_step(kept, X, lr=0.01)
    dropped = bnify.insert(cnn(0), X, drop_bias=True).model
    dropped.load_state_dict(kept.state_dict())  # strict
    assert laws.worst_error(laws.run64(kept, X), laws.run64(dropped, X)) < 1e-5


def test_its_own_checkpoint_loads_strictly():
    model = bnify.insert(cnn(3), X, drop_bias=True).model
    laws.training_step(model, X)
    fresh = bnify.insert(cnn(4), X, drop_bias=True).model
    fresh.load_state_dict(model.state_dict())
    assert laws.worst_error(laws.run64(model, X), laws.run64(fresh, X)) == 0


def test_old_checkpoints_load_after_a_save_and_a_resume(tmp_path):
    """What was dropped is part of the state: another instance has dropped another bias."""
    old = cnn(7)
    want = bnify.insert(old, X).model
    saved = bnify.insert(cnn(3), X, drop_bias=True)
    saved.save(tmp_path / "out", onnx=False)
    resumed = bnify.insert(cnn(4), X, drop_bias=True).model
    resumed.load_state_dict(saved.model.state_dict())
    for model in (bnify.load(tmp_path / "out", model=cnn(4)), resumed):
        loaded = model.load_state_dict(old.state_dict(), strict=False)
        assert all(".norm." in key for key in loaded.missing_keys)
        assert laws.worst_error(laws.run64(want, X), laws.run64(model, X)) < 1e-6


def test_loading_does_not_change_the_checkpoint():
    state = cnn(5).state_dict()
    before = {key: value.clone() for key, value in state.items()}
    bnify.insert(cnn(0), X, drop_bias=True).model.load_state_dict(state, strict=False)
    assert set(state) == set(before)
    assert all(torch.equal(state[key], before[key]) for key in before)


def test_tokens_and_several_calls():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
            nn.init.normal_(self.a.bias)

        def forward(self, x):
            return self.head(torch.relu(self.a(torch.relu(self.a(x)))).mean(1))

    x = torch.randn(16, 5, 6)
    model = Net()
    result = bnify.insert(
        model, x, include="a", per_call=True, drop_bias=True, init="preserve", data=x
    )
    assert result.verification.passed
    assert laws.worst_error(laws.run64(model, x), laws.run64(result.model, x)) < 1e-6
    other = Net()
    fresh = bnify.insert(Net(), x, include="a", per_call=True, drop_bias=True).model
    fresh.load_state_dict(other.state_dict(), strict=False)
    want = bnify.insert(other, x, include="a", per_call=True).model
    assert laws.worst_error(laws.run64(want, x), laws.run64(fresh, x)) < 1e-6


def test_an_old_checkpoint_after_its_own():
    """Which bias sits in the running mean is part of the state: it survives a resume."""
    saved = bnify.insert(cnn(3), X, drop_bias=True).model.state_dict()
    model = bnify.insert(cnn(0), X, drop_bias=True).model
    model.load_state_dict(saved)
    model.load_state_dict(cnn(5).state_dict(), strict=False)
    want = bnify.insert(cnn(5), X).model
    assert laws.worst_error(laws.run64(want, X), laws.run64(model, X)) < 1e-6


class SecondReader(nn.Module):
    """Something besides the layer reads its bias: a penalty, say."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.a, self.b = how, nn.Linear(6, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.b(torch.relu(self.a(x))))
        if self.how == "always" or (self.how == "in training" and self.training):
            y = y + self.a.bias.pow(2).sum()
        if self.how == "another layer":
            y = torch.nn.functional.linear(y, self.head.weight.new_ones(8, 8), self.a.bias)
        if self.how == "its dtype only":
            y = y.to(self.a.bias.dtype)
        return self.head(y)


SAMPLES = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("init", ["reset", "preserve", "stats"])
@pytest.mark.parametrize("how", ["always", "in training", "another layer"])
def test_a_bias_that_something_else_reads_stays(how, init):
    model = SecondReader(how)
    result = bnify.insert(model, SAMPLES, init=init, data=[SAMPLES], drop_bias=True, inplace=True)
    edits = {edit.layer: edit for edit in result.plan.edits}
    assert {layer: edit.drop_bias for layer, edit in edits.items()} == {"a": False, "b": True}
    assert "something else reads it" in edits["a"].detail
    assert any("the bias of 1 layer, first a" in note for note in result.plan.notes)
    assert result.verification.passed
    assert not laws.training_step(model, SAMPLES)


def test_a_bias_that_two_layers_share_is_dropped_from_both():
    model = SecondReader("no")
    model.b.bias = model.a.bias
    result = bnify.insert(model.double(), SAMPLES.double(), init="preserve", drop_bias=True)
    assert [edit.drop_bias for edit in result.plan.edits] == [True, True]
    laws.assert_same_function(model, result.model, SAMPLES)


@pytest.mark.parametrize("init", ["reset", "preserve", "stats"])
def test_a_model_that_asks_for_a_dropped_bias_is_refused_with_the_cause(init):
    """Nothing that a recording shows reads it, but ``forward`` cannot do without."""
    model = SecondReader("its dtype only")
    with pytest.raises(bnify.VerificationError, match="NoneType") as caught:
        bnify.insert(model, SAMPLES, init=init, data=[SAMPLES], drop_bias=True, inplace=True)
    assert "leave drop_bias out" in caught.value.hint
    assert model.a.bias is not None
