"""ONNX files that are damaged or made to do harm: one line, or a report; nothing else."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from bnify.auditing.onnx_file import onnx_subject
from bnify.audits import audit
from bnify.errors import BnifyError
from onnxfiles import (
    CHANNELS,
    conv,
    conv_norm,
    external,
    kernel,
    model_of,
    norm,
    saved,
    statistics,
    stored,
)


def one_line(path):
    """The error for a file: one line, with a hint or none."""
    with pytest.raises(BnifyError) as caught:
        audit(path)
    assert "\n" not in caught.value.message
    return caught.value.message


def claiming(model):
    model.graph.initializer[1].dims[0] = 1 << 50


def circle(model):
    model.graph.node.extend([helper.make_node("Relu", ["b"], ["a"]),
                             helper.make_node("Relu", ["a"], ["b"])])  # fmt: skip


def recursive(model):
    node = helper.make_node("F", ["v"], ["o"], domain="local")
    model.functions.append(helper.make_function(
        "local", "F", ["v"], ["o"], [node], [helper.make_opsetid("local", 1)]))  # fmt: skip
    model.graph.node.append(helper.make_node("F", ["h"], ["z"], domain="local"))


def short_of_results(model):
    node = helper.make_node("Relu", ["v"], ["o"])
    model.functions.append(helper.make_function(
        "local", "F", ["v"], ["o"], [node], [helper.make_opsetid("", 20)]))  # fmt: skip
    model.graph.node.append(helper.make_node("F", ["h"], ["z", "more"], domain="local"))


def not_text(model):
    model.graph.node[1].name = "name"
    data = model.SerializeToString().replace(b"name", b"na\xffe")
    model.ParseFromString(data)


def bomb(model):
    """Each function calls the next one 8 times: 8^20 calls of nothing."""
    for level in range(20):
        calls = [helper.make_node(f"F{level + 1}", [], [], domain="local")] * (8 * (level < 19))
        opset = [helper.make_opsetid("local", 1)]
        model.functions.append(helper.make_function("local", f"F{level}", [], [], calls, opset))
    model.graph.node.append(helper.make_node("F0", [], [], domain="local"))


HOSTILE = {
    "bomb": (bomb, "its functions come to"),
    "claims": (claiming, "claims"),
    "shape": (lambda m: m.graph.initializer[1].dims.append(3), "its shape needs"),
    "negative": (lambda m: m.graph.initializer[1].dims.__setitem__(0, -4), "has the shape"),
    "circle": (circle, "circle"),
    "dangling": (lambda m: m.graph.node[1].input.__setitem__(0, "nowhere"), "nothing makes"),
    "output": (lambda m: m.graph.output[0].__setattr__("name", "nowhere"), "nothing makes"),
    "recursive": (recursive, "calls itself"),
    "results": (short_of_results, "nothing makes"),
    "text": (not_text, "no text"),
    "inputs": (lambda m: m.graph.node[1].input.pop(), "lacks inputs"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_graphs_are_one_line(tmp_path, case):
    damage, words = HOSTILE[case]
    model = conv_norm()
    damage(model)
    assert words in one_line(saved(tmp_path / "net.onnx", model))


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "a/../../w", "..\\w", "C:\\w", ""])
def test_weights_outside_the_folder_are_refused(tmp_path, location):
    (tmp_path / "w.bin").write_bytes(b"\0" * 16)
    folder = tmp_path / "inner"
    folder.mkdir()
    model = conv_norm()
    model.graph.initializer[4].CopyFrom(external("bn.running_var", location))
    assert "outside the folder" in one_line(saved(folder / "net.onnx", model))


@pytest.mark.parametrize("entries", [{"offset": "9"}, {"length": "99"}, {"offset": "x"},
                                     {"offset": "-1"}, {"length": "4"}])  # fmt: skip
def test_weights_beside_the_file_that_are_too_short(tmp_path, entries):
    (tmp_path / "w.bin").write_bytes(b"\0" * 16)
    model = conv_norm()
    model.graph.initializer[4].CopyFrom(external("bn.running_var", "w.bin", **entries))
    assert "bn.running_var" in one_line(saved(tmp_path / "net.onnx", model))


@pytest.mark.parametrize("content", [b"", b"hello, world\n" * 50, b"\x08", bytes(range(256)) * 9,
                                     b"version https://git-lfs.github.com/spec/v1\n"])  # fmt: skip
def test_what_is_no_onnx_file(tmp_path, content):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    assert "cannot be read as an ONNX file" in one_line(path)


def test_a_folder_and_a_missing_file(tmp_path):
    (tmp_path / "a.onnx").mkdir()
    one_line(tmp_path / "a.onnx")
    one_line(tmp_path / "b.onnx")


def test_bytes_that_change_end_in_an_error_or_a_report(tmp_path):
    """Whatever the bytes are, the audit ends with findings or with one line."""
    data = conv_norm().SerializeToString()
    path, rng = Path(tmp_path / "net.onnx"), random.Random(0)
    for round_number in range(300):
        changed = bytearray(data[: rng.randrange(1, len(data))] if round_number % 3 else data)
        for _ in range(rng.choice((0, 1, 5, 40))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(bytes(changed))
        with contextlib.suppress(BnifyError):
            audit(path)


def test_a_signalling_nan_and_a_huge_epsilon(tmp_path):
    bits = np.array([0x7F800001, 0, 0x3F800000, 0x7FFFFFFF], np.uint32).view(np.float32)
    model = conv_norm(running_var=bits)
    model.graph.node[1].attribute.add(name="epsilon", f=3e38, type=onnx.AttributeProto.FLOAT)
    report = audit(saved(tmp_path / "net.onnx", model), select=["BN101"])
    assert report.findings[0].values["nonfinite"] == {"running_var": 2}


def test_statistics_of_another_length_are_left_out(tmp_path):
    model = conv_norm(running_mean=np.zeros(CHANNELS + 1, np.float32))
    subject = onnx_subject(saved(tmp_path / "net.onnx", model), "net.onnx")
    assert subject.norms == ()
    assert "bn" in subject.assumed[-1]
    assert len(subject.onnx.norms) == 1


def test_a_long_chain_of_operators_is_no_recursion(tmp_path):
    nodes = [helper.make_node("Identity", [f"v{i}"], [f"v{i + 1}"]) for i in range(5000)]
    tensors = [kernel("conv", 4, 3, 3, 3), *stored("bn", statistics())]
    tensors[-1].name = "v0"
    nodes.append(helper.make_node("Identity", ["v5000"], ["bn.running_var"]))
    model = model_of([*nodes, conv("x", "conv", "h"), norm("h", "bn", "y")], tensors)
    assert len(onnx_subject(saved(tmp_path / "net.onnx", model), "net.onnx").onnx.norms) == 1
