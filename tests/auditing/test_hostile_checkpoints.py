"""Files that are damaged, made to harm, or no checkpoints: one line, and nothing is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from bnify.audits import audit
from bnify.errors import BnifyError, SpecError, WeightsError


def refused(path, kind=WeightsError):
    with pytest.raises(kind) as caught:
        audit(path)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 3
    assert caught.value.hint
    return caught.value.message


def written(tmp_path, data, name="a.safetensors"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def tensor(shape=(1,), offsets=(0, 4), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def with_header(header, data=b"\0" * 4):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = json.dumps(tensor())
HEADERS = {
    "a header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "a header of 2^62 bytes": struct.pack("<Q", 2**62) + b"{}",
    "a header of 2^64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "seven bytes": b"\0" * 7,
    "overlapping offsets": with_header({"a": tensor(), "b": tensor()}),
    "offsets beyond the file": with_header({"a": tensor(offsets=(0, 8), shape=(2,))}),
    "offsets of 2^63": with_header({"a": tensor(offsets=(2**63, 2**63 + 4))}),
    "offsets backwards": with_header({"a": tensor(offsets=(4, 0))}),
    "a gap": with_header({"a": tensor(), "b": tensor(offsets=(8, 12))}, b"\0" * 12),
    "bytes after the end": with_header({"a": tensor()}, b"\0" * 9),
    "a negative shape": with_header({"a": tensor((-1,))}),
    "a shape that overflows": with_header({"a": tensor((2**40, 2**40))}),
    "offsets that do not fit shape and dtype": with_header({"a": tensor((3,))}),
    "an unknown dtype": with_header({"a": tensor(dtype="Q4")}),
    "a shape that is no list": with_header({"a": {**tensor(), "shape": "1"}}),
    "a fraction for a shape": with_header({"a": tensor((0.5,))}),
    "duplicate names": with_header(f'{{"a":{ONE},"a":{ONE}}}'.encode()),
    "no JSON": with_header(b"{not json at all}"),
    "a list for a header": with_header(b"[]"),
    "deep nesting": with_header(b'{"a":' + b"[" * 10**5),
    "no UTF-8": with_header(b'{"\xff\xfe":1}'),
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers(tmp_path, what):
    message = refused(written(tmp_path, HEADERS[what]))
    assert "cannot be read as a checkpoint" in message


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
@pytest.mark.parametrize(
    ("data", "fragment"),
    [
        (b"", "is empty"),
        (LFS, "Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"PK\x03\x04 and nothing more", "damaged"),
        (b"\x80\x02}q\x00", "damaged"),
        (b"nothing that anyone would know", "damaged"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, suffix, data, fragment):
    assert fragment in refused(written(tmp_path, data, f"a{suffix}"))


def test_no_file_and_no_regular_file(tmp_path):
    assert "there is no file" in refused(tmp_path / "gone.safetensors", SpecError)
    refused(tmp_path / ("long" * 200 + ".safetensors"), BnifyError)
    refused("nul\0.pt", BnifyError)
    os.mkfifo(tmp_path / "pipe.pt")
    assert "no regular file" in refused(tmp_path / "pipe.pt")


# -- checkpoints in several parts ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("__0_0.distcp", "one part of a distributed checkpoint (FSDP)"),
        ("mp_rank_00_model_states.pt", "one part of a DeepSpeed checkpoint"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "one part of a DeepSpeed checkpoint"),
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "one part of a DeepSpeed checkpoint"),
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "one part of a DeepSpeed checkpoint"),
    ],
)
def test_one_part_of_a_distributed_checkpoint(tmp_path, name, fragment):
    torch.save({"module": nn.BatchNorm2d(2).state_dict()}, tmp_path / name)
    assert fragment in refused(tmp_path / name)


@pytest.mark.parametrize(
    ("files", "fragment"),
    [
        ([".metadata", "__0_0.distcp"], "distributed checkpoint (FSDP)"),
        (["latest", "zero_to_fp32.py", "global_step10"], "DeepSpeed"),
        (["mp_rank_00_model_states.pt"], "DeepSpeed"),
        (["model.safetensors.index.json"], "split into several files"),
        (["model.safetensors"], "is a folder"),
        ([], "is a folder"),
    ],
)
def test_folders(tmp_path, files, fragment):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("")
    assert fragment in refused(folder)


def test_an_index(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    assert "split into 2 files" in refused(path)


# -- pickles ---------------------------------------------------------------------------------------


class Shell:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".safetensors"])
def test_a_pickle_does_not_run(tmp_path, form, suffix):
    planted, path = tmp_path / "planted", tmp_path / f"evil{suffix}"
    tree = {"model": nn.BatchNorm2d(2).state_dict(), "x": Shell(planted)}
    if form == "plain":
        path.write_bytes(pickle.dumps(Shell(planted)))
    else:
        torch.save(tree, path, _use_new_zipfile_serialization=form == "zip")
    message = refused(path)
    assert not planted.exists()
    if form == "zip":
        assert "system" in message


def test_a_tree_that_holds_itself_or_branches_without_end(tmp_path):
    state = nn.BatchNorm1d(2).state_dict()
    loop = {"model": state}
    loop["again"] = loop
    torch.save(loop, tmp_path / "loop.pt")
    assert audit(tmp_path / "loop.pt").norms == 1
    tree = {"model": state}
    for _ in range(60):  # 2^60 ways to the same state dict
        tree = {"a": tree, "b": tree}
    torch.save(tree, tmp_path / "tree.pt")
    assert audit(tmp_path / "tree.pt").norms == 1


def test_shapes_beyond_memory(tmp_path):
    huge = torch.zeros(1).expand(2**50)
    state = {"bn.running_mean": huge, "bn.running_var": huge, "bn.weight": huge}
    torch.save(state, tmp_path / "a.pt")
    assert audit(tmp_path / "a.pt").norms == 0


def test_tensors_without_values(tmp_path):
    torch.save(nn.BatchNorm2d(2, device="meta").state_dict(), tmp_path / "a.pt")
    assert "meta device" in refused(tmp_path / "a.pt")


def test_an_archive_that_unpacks_to_far_more(tmp_path):
    stored = io.BytesIO()
    torch.save({"w": torch.zeros(5_000_000)}, stored)
    with (
        zipfile.ZipFile(stored) as source,
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert "is compressed" in refused(tmp_path / "a.pt")


def test_odd_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name in ("../../etc/passwd", "a" * 5000, "x/\x1b[2J.bin"):
            archive.writestr(name, "hello")
    message = refused(tmp_path / "a.pt")
    assert "is a zip file, but no checkpoint" in message


# -- by chance -------------------------------------------------------------------------------------


GOOD = save(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict())
_STREAM = io.BytesIO()
torch.save(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict(), _STREAM)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_changed_and_cut_files_give_a_report_or_one_line(suffix, data, tmp_path_factory):
    good = GOOD if suffix == "safetensors" else _STREAM.getvalue()
    raw = bytearray(good[: data.draw(st.integers(0, len(good)) | st.just(len(good)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if raw:
            raw[data.draw(st.integers(0, min(len(raw), 900) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"changed.{suffix}"
    path.write_bytes(raw)
    message = ""
    try:
        audit(path)
    except WeightsError as error:
        message = error.message
    assert "\n" not in message


def test_values_of_all_kinds_make_findings_and_no_warnings(tmp_path):
    """Infinite, negative, subnormal and the largest values, in every vector of a norm."""
    odd = np.array([np.nan, np.inf, -np.inf, -1, 0, 5e-324, 1.8e308, 1e-300], dtype=np.float64)
    state = {
        f"{kind}{i}.{name}": torch.from_numpy(np.roll(odd, i))
        for kind in "ab"
        for i in range(3)
        for name in ("running_mean", "running_var", "weight", "bias")
    }
    state |= {f"a{i}.num_batches_tracked": torch.tensor(n) for i, n in enumerate((-1, 2**62, 1))}
    save_file(state, tmp_path / "a.safetensors")
    report = audit(tmp_path / "a.safetensors")
    assert {f.module for f in report.findings if f.code == "BN101"} == {
        f"{kind}{i}" for kind in "ab" for i in range(3)
    }
    assert json.loads(json.dumps(report.to_dict()))["counts"]["error"] == 6
