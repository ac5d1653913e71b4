"""Checkpoints without code: what is read of them, what is assumed, and BN103."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import bnify
from bnify.auditing.checkpoint import checkpoint_subject, checkpoint_tensors
from bnify.audits import audit
from bnify.errors import WeightsError

VECTORS = ("mean", "var", "weight", "bias")


def block(channels=4):
    return nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())


class Net(nn.Module):
    """Two stages of two blocks each, by name."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.stages = nn.ModuleList(nn.ModuleList([Block(), Block()]) for _ in range(2))
        self.norm = nn.LayerNorm(4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.act = nn.ReLU()


def trained(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for vector, low in ((module.running_mean, -1), (module.running_var, 0.5)):
                vector.uniform_(low, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-1, 1, generator=generator)
            module.num_batches_tracked.fill_(1000)
    return model


def codes(report):
    return [(f.code, f.module) for f in report.findings]


def subject(path, **options):
    return checkpoint_subject(path, path.name, **options)


# -- what is read ----------------------------------------------------------------------------------


@given(
    mean=st.lists(st.floats(width=16), min_size=1, max_size=5),
    var=st.floats(width=16),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    wrapped=st.sampled_from(["", "module.", "_orig_mod.", "module._orig_mod."]),
)
@settings(max_examples=40, deadline=None)
def test_both_formats_and_the_live_model_say_the_same(mean, var, dtype, wrapped):
    model = nn.Sequential(nn.Linear(2, len(mean)), nn.BatchNorm1d(len(mean)), block(2)).to(dtype)
    model[1].running_mean.copy_(torch.tensor(mean, dtype=torch.float64))
    model[1].running_var.fill_(var)
    model[1].num_batches_tracked.fill_(3)
    state = {wrapped + name: tensor for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        files = (Path(folder, "a.safetensors"), Path(folder, "a.pt"))
        save_file(state, files[0])
        torch.save(state, files[1])
        subjects = [subject(file) for file in files]
        reports = [audit(target, select=["BN1"]) for target in (*files, model)]
    assert len({s.digest for s in subjects}) == 1
    assert subjects[0].tensors == subjects[1].tensors
    assert {codes(report).__repr__() for report in reports} == {repr(codes(reports[0]))}
    for states in zip(*(s.norms for s in subjects), model_norms(model), strict=True):
        assert len({(s.path, s.dtype, s.batches, s.channels) for s in states}) == 1
        for name in VECTORS:
            for other in states[1:]:
                np.testing.assert_array_equal(getattr(states[0], name), getattr(other, name))


def model_norms(model):
    from bnify.auditing.live import Live

    return tuple(Live.of(model, None).states())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_statistics(tmp_path, dtype):
    state = {"bn.running_mean": torch.zeros(3).to(dtype), "bn.running_var": torch.full((3,), 0.75)}
    state["bn.running_var"] = state["bn.running_var"].to(dtype)
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt")
    for file in ("a.safetensors", "a.pt"):
        (norm,) = subject(tmp_path / file).norms
        assert norm.var.tolist() == [0.75] * 3
        assert f"torch.{norm.dtype}" == str(dtype)


def test_a_safetensors_file_is_audited_without_torch(tmp_path, run_python):
    save_file(trained(Net()).bfloat16().state_dict(), tmp_path / "a.safetensors")
    code = (
        "import sys; from bnify.audits import audit; report = audit('a.safetensors');"
        "assert 'torch' not in sys.modules and 'onnx' not in sys.modules;"
        "print(report.norms, {f.code for f in report.findings})"
    )
    ran = run_python("-c", code, cwd=tmp_path)
    assert (ran.code, ran.stdout.strip()) == (0, "5 {'BN107'}"), ran.stderr


def test_only_the_vectors_of_norms_are_read(tmp_path, monkeypatch):
    save_file(
        {"big": torch.zeros(10**6), **trained(block()).state_dict()}, tmp_path / "a.safetensors"
    )
    read = []
    real = Path.open

    def opened(self, *args, **kwargs):
        stream = real(self, *args, **kwargs)
        if self.name == "a.safetensors":
            read.append(stream)
        return stream

    monkeypatch.setattr(Path, "open", opened)
    state = subject(tmp_path / "a.safetensors")
    assert len(state.norms) == 1
    assert state.tensors["big"] == ((10**6,), "float32")
    assert len(read) == 2 + 5  # first bytes and header; five vectors


def test_what_is_assumed_is_said(tmp_path):
    state = {f"model.{name}": tensor for name, tensor in trained(block()).state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.ckpt")
    report = audit(tmp_path / "a.ckpt")
    assert report.findings == ()
    assert report.kind == "checkpoint"
    assert report.tiers == ("T0",)
    assert "eps nor momentum: 1e-5 and 0.1 were assumed" in report.notes[-1]
    assert "the weights under 'state_dict' were audited" in report.notes
    assert "the prefix 'model.' was stripped from every name" in report.notes
    assert "BN201" in report.unchecked


def test_a_prefix_that_not_all_names_have_stays(tmp_path):
    state = {f"module.{name}": tensor for name, tensor in trained(block()).state_dict().items()}
    torch.save({**state, "n_averaged": torch.tensor(3)}, tmp_path / "swa.pt")
    assert [norm.path for norm in subject(tmp_path / "swa.pt").norms] == ["1"]
    torch.save({**state, "head.weight": torch.zeros(1)}, tmp_path / "a.pt")
    assert [norm.path for norm in subject(tmp_path / "a.pt").norms] == ["module.1"]


def test_a_bare_norm_and_odd_neighbours(tmp_path):
    torch.save(trained(nn.BatchNorm2d(3)).state_dict(), tmp_path / "a.pt")
    (norm,) = subject(tmp_path / "a.pt").norms
    assert norm.path == ""
    state = {
        "layer.running_mean": torch.zeros(3),  # a layer with statistics: its weight is no scale
        "layer.running_var": torch.ones(3) * 2,
        "layer.weight": torch.zeros(3, 4, 1, 1),
        "observations.running_mean": torch.zeros(8, 8, 2),  # not by channel
        "observations.running_var": torch.ones(8, 8, 2),
        "cut.running_mean": torch.zeros(3),
        "cut.running_var": torch.ones(4),
        "count.running_mean": torch.zeros(1, 3, 1, 1),
        "count.running_var": torch.ones(1, 3, 1, 1),
        "count.num_batches_tracked": torch.tensor(float("nan")),
    }
    torch.save(state, tmp_path / "b.pt")
    found = subject(tmp_path / "b.pt")
    assert [norm.path for norm in found.norms] == ["layer", "count"]
    assert found.norms[0].weight is None
    assert found.norms[1].batches is None
    assert any("cut was not audited" in note for note in found.assumed)


# -- several state dicts ---------------------------------------------------------------------------


def training_checkpoint(path, ema=None):
    model = trained(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save({**content, **({"ema": ema.state_dict()} if ema is not None else {})}, path)
    return path


def test_every_state_dict_with_norms_is_audited(tmp_path):
    path = training_checkpoint(tmp_path / "a.pt", trained(Net(), seed=1))
    found = subject(path)
    assert {norm.part for norm in found.norms} == {"model", "ema"}
    assert len(found.norms) == 10
    assert "ema.stages.0.1.norm1" in [norm.path for norm in found.norms]
    assert found.assumed[0] == "2 sets of weights were audited: model, ema"
    only = subject(path, key="ema")
    assert len(only.norms) == 5
    assert "stages.0.1.norm1" in [norm.path for norm in only.norms]
    with pytest.raises(WeightsError, match="nothing under 'nothing'"):
        subject(path, key="nothing")


def test_a_stale_average_in_the_same_file(tmp_path):
    stale = trained(Net(), seed=1)
    for module in stale.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    report = audit(training_checkpoint(tmp_path / "a.pt", stale), select=["BN307"])
    assert len(report.findings) == 5
    assert report.findings[0].module == "ema.bn"
    healthy = training_checkpoint(tmp_path / "b.pt", trained(Net(), seed=2))
    assert audit(healthy).findings == ()
    alone = audit(training_checkpoint(tmp_path / "c.pt"), select=["BN307"])
    assert "BN307" in alone.unchecked


def test_a_file_without_norms(tmp_path):
    torch.save({"model": nn.Linear(2, 2).state_dict()}, tmp_path / "a.pt")
    report = audit(tmp_path / "a.pt")
    assert (report.norms, report.findings) == (0, ())


# -- BN103 -----------------------------------------------------------------------------------------


def without(state, *ends, module=""):
    return {
        name: tensor
        for name, tensor in state.items()
        if not (name.startswith(module) and name.endswith(ends))
    }


def missing(tmp_path, state, target=None, name="a.safetensors"):
    save_file(state, tmp_path / name)
    path = tmp_path / name
    if target is None:
        return codes(audit(path, select=["BN103"]))
    return codes(audit(target, checkpoint=path, select=["BN103"]))


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("ends", [STATISTICS, STATISTICS[:2], STATISTICS[:1], STATISTICS[1:2]])
@pytest.mark.parametrize("module", ["stages.0.1.norm1", "stages.1.0.norm1"])
def test_103_a_twin_or_a_counter_gives_it_away(tmp_path, ends, module):
    state = without(trained(Net()).state_dict(), *ends, module=module)
    assert missing(tmp_path, state) == [("BN103", module)]


def test_103_by_its_name(tmp_path):
    state = trained(
        nn.ModuleDict({"bn1": nn.BatchNorm1d(2), "bn2": nn.BatchNorm1d(2)})
    ).state_dict()
    assert missing(tmp_path, without(state, *STATISTICS, module="bn1")) == [("BN103", "bn1")]


def test_103_under_the_model_all_can_be_missing(tmp_path):
    model = trained(Net())
    state = without(model.state_dict(), *STATISTICS)
    assert missing(tmp_path, state) == []  # nothing in the file says so
    expected = [("BN103", p) for p, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert missing(tmp_path, state, model) == expected
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    assert missing(tmp_path, wrapped, model) == expected
    assert missing(tmp_path, model.state_dict(), model) == []
    assert "BN103" in audit(model).unchecked


def test_103_traps(tmp_path):
    state = trained(Net()).state_dict()
    assert missing(tmp_path, state) == []
    # One part of four: the rest is elsewhere.
    part = without(state, *STATISTICS, module="stages.0.1")
    save_file(part, tmp_path / "model-00002-of-00004.safetensors")
    report = audit(tmp_path / "model-00002-of-00004.safetensors")
    assert report.findings == ()
    assert "BN103" in report.unchecked
    assert any("part 2 of 4" in note for note in report.notes)
    # Batch norm in early blocks, layer norm under the same name in later ones.
    mixed = Net()
    mixed.stages[1][1].norm1 = nn.LayerNorm(4)
    mixed.stages[1][1].qkv = nn.Linear(4, 12)
    assert missing(tmp_path, trained(mixed).state_dict()) == []
    sequence = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.LayerNorm(4))
    assert missing(tmp_path, trained(sequence).state_dict()) == []
    untracked = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 4))
    assert missing(tmp_path, untracked.state_dict()) == []


# -- folders and names -----------------------------------------------------------------------------


def test_a_folder_that_bnify_wrote(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(),\n"
        "                         nn.Flatten(), nn.Linear(80, 2))\n"
    )
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 2)
    )
    bnify.insert(model, torch.randn(2, 3, 8, 8)).save(tmp_path / "out", onnx=False)
    recipe = json.loads((tmp_path / "out" / "bnify.json").read_text())
    recipe["spec"] = {"kind": "file", "target": "net.py:net", "path": "../net.py"}
    recipe["spec"]["attribute"] = "net"
    (tmp_path / "out" / "bnify.json").write_text(json.dumps(recipe))
    report = audit(tmp_path / "out")
    assert (report.kind, report.norms) == ("model", 2)
    assert report.tiers == ("T0", "T1")
    assert ("BN102", "") in codes(report)
    assert "BN206" not in report.unchecked  # the plan remembers inputs


def test_names_that_a_terminal_would_obey_are_written_out(tmp_path):
    state = {f"\x1b[31m\nbn.{n}": t for n, t in nn.BatchNorm2d(2).state_dict().items()}
    state["\x1b[31m\nbn.running_var"] = torch.full((2,), -1.0)
    torch.save(state, tmp_path / "a.pt")
    (finding,) = audit(tmp_path / "a.pt", select=["BN101"]).findings
    assert finding.module == "\\x1b[31m\\nbn"


def test_checkpoint_tensors_are_as_the_file_names_them(tmp_path):
    state = {f"module.{name}": tensor for name, tensor in block().half().state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"model": state, "ema": state | {"x": torch.zeros(2)}}, tmp_path / "a.pt")
    assert checkpoint_tensors(tmp_path / "a.safetensors")["module.0.weight"] == (
        (4, 4, 1, 1),
        "float16",
    )
    assert "ema.x" in checkpoint_tensors(tmp_path / "a.pt")
    assert "x" in checkpoint_tensors(tmp_path / "a.pt", key="ema")
