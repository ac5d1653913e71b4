"""Files that must not run, and files that are no checkpoints."""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bnify.errors import WeightsError
from bnify.spec import describe_checkpoint, load_weights


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


class Settings:
    """What a training script leaves in its checkpoints."""

    def __init__(self, rate=0.1):
        self.rate = rate


@pytest.fixture
def settings(monkeypatch):
    """A class Settings in an importable module ``training.config``."""
    package, module = ModuleType("training"), ModuleType("training.config")
    kind = type("Settings", (), {"__module__": "training.config"})
    module.Settings, package.config = kind, module
    monkeypatch.setitem(sys.modules, "training", package)
    monkeypatch.setitem(sys.modules, "training.config", module)
    return kind()


def refused(path, **options):
    with pytest.raises(WeightsError) as caught:
        load_weights(nn.Linear(2, 2), path, **options)
    assert "\n" not in caught.value.message
    return caught.value


ZIP = {"_use_new_zipfile_serialization": True}
LEGACY = {"_use_new_zipfile_serialization": False}


@pytest.mark.parametrize(
    "options", [ZIP, LEGACY, ZIP | {"pickle_protocol": 4}, LEGACY | {"pickle_protocol": 4}]
)
def test_a_payload_does_not_run(tmp_path, options):
    planted = tmp_path / "planted"
    tree = {"model": nn.Linear(2, 2).state_dict(), "extra": Payload(planted)}
    torch.save(tree, tmp_path / "evil.pt", **options)
    error = refused(tmp_path / "evil.pt")
    assert not planted.exists()
    assert "pathlib.Path.touch" in error.message or "pathlib" in error.message
    assert "--unsafe-pickle" in error.hint
    with pytest.raises(WeightsError):
        describe_checkpoint(tmp_path / "evil.pt")
    assert not planted.exists()
    load_weights(nn.Linear(2, 2), tmp_path / "evil.pt", unsafe_pickle=True)
    assert planted.exists()  # the payload was real


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_plain_pickle_does_not_run(tmp_path, protocol):
    planted = tmp_path / "planted"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Payload(planted), protocol=protocol))
    error = refused(tmp_path / "evil.pt")
    assert not planted.exists()
    assert "touch" in error.message or "getattr" in error.message


def test_os_system_is_refused_whoever_trusts_it(tmp_path):
    planted = tmp_path / "planted"

    class Shell:
        def __reduce__(self):
            import os

            return os.system, (f"touch {planted}",)

    torch.save({"w": Shell()}, tmp_path / "evil.pt")
    error = refused(tmp_path / "evil.pt")
    assert "system" in error.message
    wanted = error.hint.split("--trust-global ")[1].split()[0]
    refused(tmp_path / "evil.pt", trust_globals=[wanted])
    assert not planted.exists()


@pytest.mark.parametrize("options", [ZIP, LEGACY])
def test_what_a_refused_file_wants_is_listed_and_can_be_trusted(tmp_path, settings, options):
    state = nn.Linear(2, 2).state_dict()
    torch.save({"model": state, "settings": settings}, tmp_path / "a.pt", **options)
    error = refused(tmp_path / "a.pt")
    assert "wants training.config.Settings" in error.message
    assert "_rebuild_tensor" not in error.message
    assert error.hint.startswith("--trust-global training.config.Settings if you know")
    report = load_weights(
        nn.Linear(2, 2), tmp_path / "a.pt", trust_globals=["training.config.Settings"]
    )
    assert report.key == "model"
    assert "training" in refused(tmp_path / "a.pt").message  # trusted for that one load only


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("no_such_module.Thing", "no such module"),
        ("torch.nn.NoSuchThing", "NoSuchThing"),
        ("nodots", "no such module"),
    ],
)
def test_a_trusted_name_that_is_nothing(tmp_path, name, fragment):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pt")
    assert fragment in refused(tmp_path / "a.pt", trust_globals=[name]).message


def test_a_whole_pickled_model(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    torch.save(model, tmp_path / "a.pt")
    error = refused(tmp_path / "a.pt")
    assert "is a whole pickled model, not weights" in error.message
    assert "torch.nn.modules.linear.Linear" in error.message
    assert "state_dict()" in error.hint
    into = nn.Linear(2, 2)
    report = load_weights(into, tmp_path / "a.pt", unsafe_pickle=True)
    assert report.prefix == "0."
    assert torch.equal(into.weight, model[0].weight)


def test_an_unsafe_pickle_without_its_code(tmp_path, settings, monkeypatch):
    torch.save({"settings": settings}, tmp_path / "a.pt")
    monkeypatch.delitem(sys.modules, "training.config")
    monkeypatch.delitem(sys.modules, "training")
    error = refused(tmp_path / "a.pt", unsafe_pickle=True)
    assert "needs code that is not there" in error.message
    assert "No module named 'training'" in error.message


# -- no checkpoints ------------------------------------------------------------------------------


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "fragment", "hint"),
    [
        (b"", "is empty", "download it again"),
        (LFS, "Git LFS pointer", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "web page", "download it again"),
        (b"\x89HDF\r\n\x1a\n", "HDF5", "PyTorch"),
        (b"PK\x03\x04 and nothing more", "damaged, cut short, or none", "again"),
        (b"\x80\x02}q\x00", "damaged, cut short, or none", "again"),
        (b"random bytes that are nothing at all", "damaged, cut short, or none", "again"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, suffix, content, fragment, hint):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    error = refused(path)
    assert fragment in error.message
    assert hint in error.hint
    assert path.name in error.message


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", ["a.pt", "legacy.pt", "a.safetensors"])
def test_truncated_files(tmp_path, name, keep):
    path = tmp_path / name
    state = nn.Linear(50, 50).state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name == "a.pt")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert "cannot be read as a checkpoint" in refused(path).message


def test_a_missing_file(tmp_path):
    assert "No such file" in refused(tmp_path / "gone.pt").message


def test_archives_of_other_kinds(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    assert "TorchScript archive" in refused(tmp_path / "script.pt").message
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "it holds readme.txt" in refused(tmp_path / "other.pt").message


@pytest.mark.parametrize(
    ("files", "fragment", "hint"),
    [
        (["model.safetensors", "config.json"], "is a folder", "model.safetensors"),
        ([".metadata", "__0_0.distcp"], "distributed checkpoint (FSDP)", "dcp_to_torch"),
        (["latest", "zero_to_fp32.py"], "DeepSpeed", "zero_to_fp32.py"),
        (["mp_rank_00_model_states.pt"], "DeepSpeed", "zero_to_fp32.py"),
        (["pytorch_model.bin.index.json"], "split into several files", "one file"),
        ([], "is a folder", "pass one file"),
    ],
)
def test_folders(tmp_path, files, fragment, hint):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("")
    error = refused(folder)
    assert fragment in error.message
    assert hint in error.hint


def test_indexes_and_other_json(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    assert "the index of a checkpoint split into 2 files" in refused(index).message
    (tmp_path / "config.json").write_text(' {"a": 1}')
    assert "is a JSON file" in refused(tmp_path / "config.json").message
