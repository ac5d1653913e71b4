"""Inputs drawn from what an ONNX file declares."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from bnify.errors import SpecError, UsageError
from bnify.spec import draw_onnx_inputs


def _file(tmp_path, *inputs: tuple, stored: str | None = None) -> str:
    values = [helper.make_tensor_value_info(*one) for one in inputs]
    tensors = [helper.make_tensor(stored, TensorProto.FLOAT, [1], [0.0])] if stored else []
    graph = helper.make_graph([], "g", values, [], tensors)
    path = tmp_path / "a.onnx"
    onnx.save(helper.make_model(graph), path)
    return str(path)


class Swapped(nn.Module):
    def forward(self, mask, ids):
        return ids * mask


class Other(nn.Module):
    def forward(self, a, b):
        return a * b


INPUTS = (("ids", TensorProto.INT64, ["batch", 5]), ("mask", TensorProto.BOOL, [3, 5]))


def test_names_types_and_shapes_are_the_files(tmp_path):
    path = _file(tmp_path, *INPUTS, ("w", TensorProto.FLOAT, [1]), stored="w")
    call, note = draw_onnx_inputs(path)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in call.kwargs.items()} == {
        "ids": (torch.int64, (2, 5)),
        "mask": (torch.bool, (3, 5)),
    }
    assert "--input ids=2,5:int64 --input mask=3,5:bool" in note
    assert set(draw_onnx_inputs(path, model=Swapped())[0].kwargs) == {"ids", "mask"}
    assert len(draw_onnx_inputs(path, model=Other())[0].args) == 2
    again = draw_onnx_inputs(path, seed=1)[0]
    assert not torch.equal(again.kwargs["ids"], call.kwargs["ids"])


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([("x", TensorProto.FLOAT, ["n", "length"])], r"leaves axis 1 \(length\) open"),
        ([("x", TensorProto.FLOAT, None)], "leaves its shape open"),
        ([("x", TensorProto.STRING, [2])], "no tensor that can be drawn"),
        ([], "declares no input"),
    ],
)
def test_what_the_file_leaves_open_is_asked_for(tmp_path, inputs, words):
    with pytest.raises(UsageError, match=words):
        draw_onnx_inputs(_file(tmp_path, *inputs))


def test_junk_is_no_file(tmp_path):
    (tmp_path / "junk.onnx").write_bytes(b"no model")
    with pytest.raises(SpecError, match="cannot be read as an ONNX file"):
        draw_onnx_inputs(tmp_path / "junk.onnx")
