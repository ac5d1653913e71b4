"""A saved folder gives the same model back, and says so when it cannot."""

from __future__ import annotations

import json
import signal
import stat
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnify
from bnify import saved
from bnify.errors import PlanError, SpecError, UsageError, WeightsError
from bnify.saved.state import restore, state_of

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.fc1 = nn.Linear(width, 16)
        self.fc2 = nn.Linear(16, 2)

    def forward(self, x):
        x = torch.relu(self.conv(x)).mean((2, 3))
        return self.fc2(torch.relu(self.fc1(x)))
"""


class Tied(nn.Module):
    """One matrix under two names, a buffer that is a view of another, and a half buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.mid = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.register_buffer("table", torch.arange(12.0))
        self.register_buffer("window", self.table[3:9])
        self.register_buffer("halves", torch.ones(3, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.mid(F.relu(self.a(x)))) + self.window)


def _hostile(model: nn.Module) -> nn.Module:
    """Statistics as after a hard training, not as initialised."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(3.0, 10.0)
                module.running_var.uniform_(1e-6, 50.0)
                module.weight.normal_()
                module.weight[0] = 0.0
                module.bias.normal_(-2.0)
    return model


@pytest.fixture
def net_file(tmp_path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


def _result(net_file: Path, inputs: Tensor, **options) -> bnify.Result:
    from bnify.spec import load_model

    source = load_model(f"{net_file}:Net", arguments={"width": 4})
    result = bnify.insert(source.model, inputs, verify=False, **options)
    result.source = saved.source_of(source, arguments={"width": 4}, pretrained=False)
    _hostile(result.model)
    return result


def test_a_folder_rebuilds_the_model_from_its_spec(net_file, tmp_path):
    x = torch.randn(4, 3, 8, 8)
    result = _result(net_file, x)
    assert result.save(tmp_path / "out", onnx=False) == tmp_path / "out"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "bnify.json", "report.json"}
    loaded = bnify.load(tmp_path / "out")
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(x), result.model.eval()(x))
    assert list(loaded.state_dict()) == list(result.model.state_dict())
    assert result.files["weights"] == str(tmp_path / "out" / "model.safetensors")


def test_folder_and_code_move_together_and_hold_no_absolute_path(net_file, tmp_path, monkeypatch):
    x = torch.randn(4, 3, 8, 8)
    result = _result(net_file, x)
    result.save(tmp_path / "out", onnx=False)
    for name in ("bnify.json", "report.json"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    net_file.rename(moved / "net.py")
    (tmp_path / "out").rename(moved / "out")
    assert torch.equal(bnify.load(moved / "out")(x), result.model.eval()(x))
    # Without its neighbour, the code is looked for from the current folder.
    (tmp_path / "far" / "away").mkdir(parents=True)
    (moved / "out").rename(tmp_path / "far" / "away" / "out")
    (tmp_path / "far" / "here").mkdir()
    monkeypatch.chdir(tmp_path / "far" / "here")
    with pytest.raises(SpecError, match=r"made from net\.py:Net, and \.\./net\.py is not there"):
        bnify.load(tmp_path / "far" / "away" / "out")
    (moved / "net.py").rename(tmp_path / "far" / "net.py")
    assert torch.equal(bnify.load(tmp_path / "far" / "away" / "out")(x), result.model.eval()(x))


def test_changed_code_and_changed_weights_are_said(net_file, tmp_path):
    x = torch.randn(4, 3, 8, 8)
    result = _result(net_file, x)
    result.save(tmp_path / "out", onnx=False)
    net_file.write_text(NET + "\n# a comment\n")
    with pytest.warns(UserWarning, match=r"net\.py has changed since"):
        bnify.load(tmp_path / "out")
    net_file.write_text(NET)
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "out" / "model.safetensors"
    tensors = load_file(weights)
    tensors["fc2.bias"] += 1.0
    save_file(tensors, weights)
    with pytest.warns(UserWarning, match=r"model\.safetensors .* has changed"):
        loaded = bnify.load(tmp_path / "out")
    assert torch.allclose(loaded(x), result.model.eval()(x) + 1.0)


def test_code_that_no_longer_fits_is_an_error(net_file, tmp_path):
    _result(net_file, torch.randn(4, 3, 8, 8)).save(tmp_path / "out", onnx=False)
    net_file.write_text(NET.replace("nn.Linear(16, 2)", "nn.Linear(16, 3)"))
    with (
        pytest.warns(UserWarning, match="has changed"),
        pytest.raises((WeightsError, PlanError), match=r"fc2"),
    ):
        bnify.load(tmp_path / "out")


def test_a_live_model_has_no_spec_and_the_error_says_what_to_pass(tmp_path):
    torch.manual_seed(3)
    model = Tied()
    x = torch.randn(5, 6)
    result = bnify.insert(model, x, include=["a"], verify=False)
    _hostile(result.model)
    result.save(tmp_path / "out", onnx=False)
    with pytest.raises(SpecError, match="saved from a live model") as caught:
        bnify.load(tmp_path / "out")
    assert "model=" in caught.value.hint
    loaded = bnify.load(tmp_path / "out", model=Tied())
    assert torch.equal(loaded(x), result.model.eval()(x))


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    from safetensors import safe_open

    result = bnify.insert(Tied(), torch.randn(5, 6), verify=False)
    result.save(tmp_path / "out", onnx=False)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "b.weight" not in names
    assert {"a.weight", "table", "window", "halves"} <= names
    assert saved.read(tmp_path / "out").aliases == {"b.weight": "a.weight"}
    loaded = bnify.load(tmp_path / "out", model=Tied())
    assert loaded.b.weight is loaded.a.weight
    assert loaded.halves.dtype == torch.float16


def test_the_stored_dtype_wins_over_the_codes(tmp_path):
    result = bnify.insert(Tied().double(), torch.randn(5, 6).double(), verify=False)
    result.save(tmp_path / "out", onnx=False)
    state = saved.read(tmp_path / "out").state()
    fresh = bnify.insert(Tied(), torch.randn(5, 6), verify=False).model
    restore(fresh, state, where="out")
    assert fresh.a.weight.dtype == torch.float64
    assert fresh.b.weight is fresh.a.weight


def test_weights_that_do_not_fit_leave_the_model_untouched():
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    state = state_of(nn.Linear(3, 3))
    with pytest.raises(WeightsError, match=r"bias is \(3,\), the model's is \(2,\) \(and 1 more\)"):
        restore(model, state, where="out")
    del state.tensors["bias"]
    with pytest.raises(WeightsError, match="bias is missing"):
        restore(model, state, where="out")
    assert torch.equal(model.weight, before)


class Stateful(nn.Linear):
    """Keeps something beside its tensors."""

    kept: object = None

    def get_extra_state(self) -> object:
        return self.kept

    def set_extra_state(self, state: object) -> None:
        self.kept = state


def test_extra_state_is_kept_as_json_or_refused():
    model = Stateful(2, 2)
    model.kept = {"steps": [1, 2]}
    state = state_of(model)
    fresh = Stateful(2, 2)
    restore(fresh, state, where="out")
    assert fresh.kept == {"steps": [1, 2]}
    model.kept = object()
    with pytest.raises(WeightsError, match="extra state of type object"):
        state_of(model)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.LazyLinear(3), "is lazy"),
        (lambda: nn.Linear(2, 3, device="meta"), "on the meta device"),
    ],
)
def test_tensors_without_values_are_refused(make, why):
    with pytest.raises(WeightsError, match=why):
        state_of(make())


def test_the_report_has_versions_device_seed_and_hashes(net_file, tmp_path):
    import hashlib

    result = _result(net_file, torch.randn(4, 3, 8, 8))
    written = saved.write(result, tmp_path / "out", onnx=False, seed=7)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    made = report["environment"]
    assert made["seed"] == 7
    assert made["device"] == "cpu"
    assert made["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert made["hashes"]["weights"] == hashlib.sha256(weights).hexdigest()
    assert made["hashes"]["model"] == result.plan.fingerprint.digest
    assert report["plan"]["edits"][0]["layer"] == "conv"
    assert written.report["files"]["weights"] == str(tmp_path / "out" / "model.safetensors")
    assert report["files"]["weights"] == "model.safetensors"
    recipe = json.loads((tmp_path / "out" / "bnify.json").read_text())
    assert recipe["spec"]["path"] == "../net.py"
    assert recipe["spec"]["arguments"] == {"width": 4}


def test_files_have_the_users_permissions(net_file, tmp_path):
    _result(net_file, torch.randn(4, 3, 8, 8)).save(tmp_path / "out", onnx=False)
    plain = tmp_path / "plain"
    plain.write_text("")
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_saving_twice_gives_the_same_bytes(net_file, tmp_path):
    result = _result(net_file, torch.randn(4, 3, 8, 8))
    result.save(tmp_path / "one", onnx=False)
    first = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    with pytest.raises(UsageError, match="exists already"):
        result.save(tmp_path / "one", onnx=False)
    result.save(tmp_path / "one", onnx=False, force=True)
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"has no bnify\.json"),
        ("{", "cannot be read"),
        ("[]", "schema 'list'"),
        ('{"schema": 99}', "schema 99"),
    ],
)
def test_a_folder_that_is_none_is_an_error(tmp_path, text, message):
    (tmp_path / "out").mkdir()
    if text is not None:
        (tmp_path / "out" / "bnify.json").write_text(text)
    with pytest.raises(SpecError, match=message):
        saved.read(tmp_path / "out")


def test_damaged_weights_are_an_error(net_file, tmp_path):
    _result(net_file, torch.randn(4, 3, 8, 8)).save(tmp_path / "out", onnx=False)
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(WeightsError, match="cannot be read"):
        bnify.load(tmp_path / "out")


# Saves again and again over the same folder until it is killed from outside.
WRITER = """
import sys, torch, bnify
from torch import nn
torch.set_num_threads(1)
model = nn.Sequential(*(m for n in (64, 700, 700) for m in (nn.Linear(n, 700), nn.ReLU())))
result = bnify.insert(model, torch.randn(4, 64), verify=False)
print("ready", flush=True)
while True:
    result.save(sys.argv[1], onnx=False, force=True)
    print("saved", flush=True)
"""


def test_a_kill_while_writing_leaves_a_whole_folder(tmp_path, child_env):
    import subprocess
    import sys
    import time

    target = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)], env=child_env, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    while b"saved" not in child.stdout.readline():
        pass
    time.sleep(0.037)  # somewhere in the middle of one of the next saves
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    from bnify.atomic import recover

    recover(target)
    folder = saved.read(target)
    assert set(folder.state().tensors) >= {"0.weight", "0.norm.weight", "4.bias"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Writes with a limit on the size of files, as a full disk would have it.
FULL = """
import resource, sys, torch, bnify
from torch import nn
result = bnify.insert(nn.Sequential(nn.Linear(64, 700), nn.ReLU(), nn.Linear(700, 2)),
                      torch.randn(4, 64), verify=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    result.save(sys.argv[1], onnx=False)
except bnify.BnifyError as error:
    print(type(error).__name__, error.exit_code, error.message)
"""


@pytest.mark.parametrize("limit", [100_000, 500])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, run_python, limit):
    ran = run_python("-c", FULL, tmp_path / "out", str(limit))
    assert "OutputError 3 cannot write" in ran.stdout, ran
    assert list(tmp_path.iterdir()) == []
