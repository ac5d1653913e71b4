"""Checkpoint → model: strict both ways, every adaptation said, the model untouched on failure."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bnify.errors import WeightsError
from bnify.spec import describe_checkpoint, load_weights


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 1)
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 2)
        self.register_buffer("mask", torch.zeros(2, 2))

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).mean((2, 3)))


def trained(seed=1, **options):
    """A network with hostile numbers: negative gammas, tiny variances, an -inf mask."""
    torch.manual_seed(seed)
    model = Net(**options)
    with torch.no_grad():
        model.bn.weight.normal_()
        model.bn.running_mean.normal_(std=100)
        model.bn.running_var.uniform_(1e-12, 1e3)
        model.mask.fill_(float("-inf"))
    return model


def weights(seed=1, **options):
    return {name: value.clone() for name, value in trained(seed, **options).state_dict().items()}


def same(model, state):
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state)


def refused(model, path, **options):
    """The error of a load that must fail and leave every value of the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, path, **options)
    assert same(model, before)
    assert "\n" not in caught.value.message
    return caught.value


@pytest.fixture
def saved(tmp_path):
    """Write a checkpoint: ``saved(tree)`` by torch.save, ``saved(state, "a.safetensors")``."""

    def write(tree, name="a.pt", **options):
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_file(tree, path)
        else:
            torch.save(tree, path, **options)
        return path

    return write


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.safetensors", {}),
        ("a.pt", {}),
        ("a.ckpt", {"_use_new_zipfile_serialization": False}),
        ("a.bin", {}),
    ],
)
def test_each_format_restores_every_value(saved, name, options):
    path = saved(weights(), name, **options)
    model = Net()
    report = load_weights(model, path)
    assert same(model, weights())
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (report.key, report.prefix, report.missing, report.unexpected) == (None, "", (), ())
    assert report.notes == ()


def test_the_format_is_told_from_the_bytes_not_the_suffix(saved, tmp_path):
    path = saved(weights(), "a.safetensors").rename(tmp_path / "a.pt")
    model = Net()
    load_weights(model, path)
    assert same(model, weights())


# -- where in the file ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        (lambda w: {"state_dict": w, "epoch": 3}, "state_dict"),
        (lambda w: {"model_state_dict": w, "rng_state": torch.ones(5)}, "model_state_dict"),
        (lambda w: {"model": w, "best": torch.tensor(0.9)}, "model"),
        (lambda w: {"outer": {"ema": w}}, "outer.ema"),
        (lambda w: {"models": [w]}, "models.0"),
        (lambda w: {"a": w, "b": w}, "a"),
    ],
)
def test_nested_weights_are_found(saved, tree, key):
    model = Net()
    report = load_weights(model, saved(tree(weights())))
    assert same(model, weights())
    assert report.key == key


def test_an_optimizer_is_no_set_of_weights(saved):
    model = trained()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 2, 2)).sum().backward()
    optimizer.step()
    tree = {"optimizer": optimizer.state_dict(), "net": weights()}
    assert load_weights(Net(), saved(tree)).key == "net"


def test_several_sets_of_weights_are_never_guessed(saved):
    path = saved({"model": weights(1), "ema": {"state_dict": weights(2)}})
    error = refused(Net(), path)
    assert "several sets of weights: model, ema.state_dict" in error.message
    assert "--weights-key model" in error.hint
    model = Net()
    assert load_weights(model, path, key="ema").key == "ema.state_dict"
    assert same(model, weights(2))
    load_weights(model, path, key="ema.state_dict")
    assert same(model, weights(2))


def test_only_one_set_fits_the_model(saved):
    other = {"blocks.0.weight": torch.ones(3)}
    assert load_weights(Net(), saved({"g": other, "d": weights()})).key == "d"


def test_keys_with_dots_and_keys_that_are_not_there(saved):
    path = saved({"a.b": {"c": weights()}, "other": {"x": 1}})
    assert load_weights(Net(), path, key="a.b.c").key == "a.b.c"
    error = refused(Net(), path, key="ema")
    assert "nothing under 'ema': there is a.b, other" in error.message
    error = refused(Net(), path, key="other")
    assert "holds no weights under 'other': a dict of x (int)" in error.message
    assert error.hint == "--weights-key a.b.c"


@pytest.mark.parametrize(
    ("tree", "fragment"),
    [({}, "an empty dict"), ({"epoch": 3}, "epoch (int)"), (torch.ones(2), "a Tensor")],
)
def test_no_weights_at_all(saved, tree, fragment):
    assert fragment in refused(Net(), saved(tree)).message


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.model.", "student.net."]
)
def test_a_common_prefix_is_stripped_and_said(saved, prefix):
    model = Net()
    path = saved({prefix + name: value for name, value in weights().items()})
    report = load_weights(model, path)
    assert same(model, weights())
    assert report.prefix == prefix
    assert repr(prefix) in report.notes[0]


def test_a_prefix_that_is_the_models_own_stays(saved):
    model = nn.Sequential()
    model.add_module("module", nn.Linear(2, 2))
    report = load_weights(model, saved(dict(model.state_dict())))
    assert report.prefix == ""


# -- strictness ----------------------------------------------------------------------------------


def test_missing_and_unexpected_are_listed_and_can_be_named(saved):
    state = weights()
    del state["head.bias"]
    path = saved(state | {"aux.weight": torch.ones(1), "epoch": 3})
    error = refused(Net(), path)
    assert "1 missing (head.bias), 2 unexpected (aux.weight, epoch)" in error.message
    assert "--allow-missing" in error.hint
    refused(Net(), path, allow_missing=["head.*"])
    refused(Net(), path, allow_missing=["head.*"], allow_unexpected=["aux.*"])
    model = Net()
    kept = model.head.bias.clone()
    report = load_weights(
        model, path, allow_missing=["head.*"], allow_unexpected=["aux.*", "epoch"]
    )
    assert (report.missing, report.unexpected) == (("head.bias",), ("aux.weight", "epoch"))
    assert torch.equal(model.head.bias, kept)
    assert torch.equal(model.conv.weight, state["conv.weight"])


@pytest.mark.parametrize("globs", [[], ["*"], ["bn.*"]])
def test_missing_running_statistics_must_be_named(saved, globs):
    state = weights()
    del state["bn.running_mean"], state["bn.running_var"]
    path = saved(state)
    error = refused(Net(), path, allow_missing=globs)
    assert "2 missing (bn.running_mean, bn.running_var)" in error.message
    assert "plausible nonsense" in error.hint
    report = load_weights(Net(), path, allow_missing=["*.running_*"])
    assert report.missing == ("bn.running_mean", "bn.running_var")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_missing_batch_counter_is_said_only(saved, name):
    state = weights()
    del state["bn.num_batches_tracked"]
    report = load_weights(Net(), saved(state, name))
    assert report.missing == ()
    assert "bn.num_batches_tracked" in report.notes[0]


def test_other_shapes_are_listed_with_both(saved):
    path = saved(weights(width=5))
    error = refused(Net(), path)
    assert "7 of another shape" in error.message
    assert "conv.weight ([5, 3, 1, 1] in the file, [4, 3, 1, 1] in the model)" in error.message
    assert "… 2 more" in error.message


def test_another_head_is_left_out_when_both_lists_name_it(saved):
    state = weights()
    state["head.weight"], state["head.bias"] = torch.ones(9, 4), torch.ones(9)
    path = saved(state)
    refused(Net(), path, allow_missing=["head.*"])
    model = Net()
    kept = model.head.weight.clone()
    report = load_weights(model, path, allow_missing=["head.*"], allow_unexpected=["head.*"])
    assert torch.equal(model.head.weight, kept)
    assert torch.equal(model.conv.weight, state["conv.weight"])
    assert set(report.unexpected) == set(report.missing) == {"head.weight", "head.bias"}


def test_nothing_in_common_shows_both_sides(saved):
    error = refused(Net(), saved({"encoder.w": torch.ones(1)}))
    assert "no name in common; the file has encoder.w, the model has mask" in error.message


def test_a_tied_weight_that_the_file_has_once_is_said(saved):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(3, 4)
            self.out = nn.Linear(4, 3, bias=False)
            self.out.weight = self.embed.weight

    model = Tied()
    report = load_weights(model, saved({"embed.weight": torch.full((3, 4), 7.0)}, "a.safetensors"))
    assert torch.equal(model.out.weight, torch.full((3, 4), 7.0))
    assert report.missing == ()
    assert "out.weight is tied to embed.weight" in report.notes[0]


def test_other_dtypes_are_copied_and_said(saved):
    state = {n: v.half() if n.startswith("head") else v for n, v in weights().items()}
    model = Net()
    report = load_weights(model, saved(state))
    assert model.head.weight.dtype == torch.float32
    assert report.notes == ("2 tensors copied from float16 to float32: head.weight, head.bias",)


def test_complex_weights_do_not_lose_their_half(saved):
    state = weights()
    state["head.bias"] = state["head.bias"].to(torch.complex64)
    assert "complex in the file, real in the model" in refused(Net(), saved(state)).message


def test_the_models_own_renaming_hook_has_its_say(saved):
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.new = nn.Linear(2, 2)

        def _load_from_state_dict(self, state, prefix, *args):
            for name in [n for n in state if n.startswith(f"{prefix}old.")]:
                state[name.replace("old.", "new.")] = state.pop(name)
            super()._load_from_state_dict(state, prefix, *args)

    model = Renamed()
    path = saved({"old.weight": torch.ones(2, 2), "old.bias": torch.zeros(2)})
    load_weights(model, path)
    assert torch.equal(model.new.weight, torch.ones(2, 2))
    refused(Renamed(), saved({"old.weight": torch.ones(2, 2)}))


def test_weight_norm_checkpoints_of_the_old_kind_load(saved):
    old = {"weight_g": torch.ones(2, 1), "weight_v": torch.ones(2, 3), "bias": torch.zeros(2)}
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    load_weights(model, saved(old))
    assert torch.allclose(model.weight, torch.full((2, 3), 3**-0.5))


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv.weight", "bn.running_mean", "bn.running_var", "bn.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(saved, name, value):
    state = weights()
    state[name].view(-1)[1] = value
    error = refused(Net(), saved(state))
    assert f"1 tensor with values that are not finite: {name} (1 of" in error.message


def test_a_value_that_overflows_the_models_dtype_is_not_finite(saved):
    state = weights()
    state["head.bias"] = torch.tensor([1e300, 0.0], dtype=torch.float64)
    assert "head.bias (1 of 2)" in refused(Net(), saved(state)).message


def test_infinity_in_a_mask_is_fine(saved):
    assert torch.isinf(weights()["mask"]).all()
    load_weights(Net(), saved(weights()))


# -- description -----------------------------------------------------------------------------------


def test_a_checkpoint_is_described_in_one_line(saved):
    text = describe_checkpoint(saved({"model": weights(), "epoch": 3}))
    assert text.startswith("10 tensors under 'model', 47 values: mask [2, 2], conv.weight")
    assert text.endswith("…")
    assert describe_checkpoint(saved({"epoch": 3})) == "no tensors"


def test_what_stays_at_random_and_globs_for_nothing_are_said(saved):
    state = Net().state_dict()
    del state["head.bias"]
    path = saved(state)
    report = load_weights(
        Net(), path, allow_missing=["head.*", "tail.*"], allow_unexpected=["aux.*"]
    )
    assert "1 tensor of the model left at the initial values, as allowed: head.bias" in report.notes
    assert "--allow-missing 'tail.*' matches nothing that is missing" in report.notes
    assert "--allow-unexpected 'aux.*' matches nothing that is unexpected" in report.notes
    assert not any("head.*" in note for note in report.notes)
