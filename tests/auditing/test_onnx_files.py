"""ONNX files as subjects: what is read, under which names, and what hostile files do."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import bnify
import bnify.exporting
import laws
from bnify.auditing.onnx_file import onnx_subject
from bnify.audits import audit
from bnify.errors import WeightsError
from foldparts import FrozenScale, FrozenSteps
from onnxfiles import conv, conv_norm, external, kernel, model_of, norm, saved, statistics, stored


def subject_of(tmp_path, model):
    return onnx_subject(saved(tmp_path / "net.onnx", model), "net.onnx")


def codes(report, *only):
    return {f.module: f.code for f in report.findings if not only or f.code in only}


# -- what is read ----------------------------------------------------------------------------------


def test_a_norm_with_its_vectors_and_attributes(tmp_path):
    vectors = statistics()
    nodes = [conv("x", "conv", "h"), norm("h", "bn", "y", epsilon=1e-3, momentum=0.99)]
    model = model_of(nodes, [kernel("conv", 4, 3, 3, 3), *stored("bn", vectors)])
    subject = subject_of(tmp_path, model)
    (state,) = subject.norms
    assert (state.path, state.eps, state.momentum) == ("bn", 1e-3, 0.01)
    assert (state.batches, state.dtype, state.training) == (None, "float32", None)
    for name, vector in zip(
        ("weight", "bias", "running_mean", "running_var"),
        (state.weight, state.bias, state.mean, state.var),
        strict=True,
    ):
        np.testing.assert_array_equal(vector, vectors[name].astype(np.float64))
    assert subject.kind == "onnx"
    assert len(subject.onnx.norms) == 1


def behind(kind, vectors, tmp_path):
    """The statistics of a norm behind some operators that exporters leave."""
    var = vectors.pop("running_var")
    tensors = [kernel("conv", 4, 3, 3, 3), *stored("bn", vectors)]
    nodes = [conv("x", "conv", "h")]
    inner = "raw"
    match kind:
        case "identity":
            tensors.append(numpy_helper.from_array(var, "raw"))
            nodes.append(helper.make_node("Identity", ["raw"], ["twice"]))
            nodes.append(helper.make_node("Identity", ["twice"], ["bn.running_var"]))
        case "constant":
            value = numpy_helper.from_array(var)
            nodes.append(helper.make_node("Constant", [], ["bn.running_var"], value=value))
        case "floats":
            floats = [float(v) for v in var]
            nodes.append(helper.make_node("Constant", [], ["bn.running_var"], value_floats=floats))
        case "cast":
            tensors.append(numpy_helper.from_array(var.astype(np.float16), inner))
            nodes.append(helper.make_node("Cast", [inner], ["bn.running_var"], to=1))
        case "reshape":
            tensors.append(numpy_helper.from_array(var.reshape(1, 4, 1, 1), inner))
            tensors.append(numpy_helper.from_array(np.array([-1]), "shape"))
            nodes.append(helper.make_node("Reshape", [inner, "shape"], ["bn.running_var"]))
        case "bfloat16":
            bits = (var.view(np.uint32) >> 16).astype(np.uint16)
            raw = helper.make_tensor(inner, TensorProto.BFLOAT16, [4], bits.tobytes(), raw=True)
            tensors.append(raw)
            nodes.append(helper.make_node("Cast", [inner], ["bn.running_var"], to=1))
        case "external":
            (tmp_path / "w.bin").write_bytes(b"\0" * 8 + var.tobytes())
            tensors.append(external("bn.running_var", "w.bin", offset="8", length="16"))
    return model_of([*nodes, norm("h", "bn", "y")], tensors)


BEHIND = ["identity", "constant", "floats", "cast", "reshape", "bfloat16", "external"]


@pytest.mark.parametrize("kind", BEHIND)
@pytest.mark.parametrize("fault", [-1.0, float("nan"), float("inf"), None])
def test_statistics_are_found_wherever_the_exporter_put_them(tmp_path, kind, fault):
    vectors = statistics()
    vectors["running_var"] = np.array([1, fault or 0.5, 2, 0.25], np.float32)
    model = behind(kind, dict(vectors), tmp_path)
    if kind != "external":
        onnx.checker.check_model(model, full_check=True)  # it passes all of them
    path = saved(tmp_path / "net.onnx", model)
    report = audit(path, select=["BN101"])
    assert codes(report) == ({"bn": "BN101"} if fault is not None else {})
    assert report.exit_code() == (fault is not None)
    np.testing.assert_array_equal(onnx_subject(path, "").norms[0].var, vectors["running_var"])


@pytest.mark.parametrize(("kind", "dtype"), [("bfloat16", "bfloat16"), ("cast", "float16")])
def test_the_type_is_the_one_that_is_stored(tmp_path, kind, dtype):
    model = behind(kind, statistics(), tmp_path)
    assert subject_of(tmp_path, model).norms[0].dtype == dtype


def branches():
    """An If with a norm in each branch; their statistics lie outside."""

    def branch(prefix):
        out = helper.make_tensor_value_info(f"{prefix}_y", TensorProto.FLOAT, None)
        return helper.make_graph([norm("h", prefix, f"{prefix}_y")], prefix, [], [out])

    nodes = [
        conv("x", "conv", "h"),
        helper.make_node("Constant", [], ["on"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["on"], ["y"], then_branch=branch("a"), else_branch=branch("b")),
    ]
    bad = statistics() | {"running_var": np.array([1, -1, 1, 1], np.float32)}
    tensors = [kernel("conv", 4, 3, 3, 3), *stored("a", statistics()), *stored("b", bad)]
    return model_of(nodes, tensors), ["a", "b"], {"b"}


def called_twice():
    """One local function with a norm in it, called with two sets of vectors."""
    names = ["weight", "bias", "running_mean", "running_var"]
    body = helper.make_node("BatchNormalization", ["v", *names], ["out"], name="bn")
    body.attribute.add(name="epsilon", ref_attr_name="eps", type=onnx.AttributeProto.FLOAT)
    function = helper.make_function(
        "local", "Norm", ["v", *names], ["out"], [body], [helper.make_opsetid("", 20)], ["eps"]
    )
    nodes = [conv("x", "conv", "h")]
    for x, prefix, y in (("h", "a", "g"), ("g", "b", "y")):
        inputs = [x, *(f"{prefix}.{name}" for name in names)]
        nodes.append(helper.make_node("Norm", inputs, [y], name=prefix, domain="local", eps=1e-2))
    bad = statistics() | {"running_mean": np.full(4, np.inf, np.float32)}
    tensors = [kernel("conv", 4, 3, 3, 3), *stored("a", statistics()), *stored("b", bad)]
    return model_of(nodes, tensors, functions=[function]), ["a", "b"], {"b"}


@pytest.mark.parametrize("build", [branches, called_twice])
def test_subgraphs_and_functions_are_walked(tmp_path, build):
    model, paths, bad = build()
    report = audit(saved(tmp_path / "net.onnx", model), select=["BN101"])
    assert set(codes(report)) == bad
    subject = subject_of(tmp_path, model)
    assert sorted(state.path for state in subject.norms) == paths
    if build is called_twice:
        assert {state.eps for state in subject.norms} == {0.01}


def test_no_two_norms_have_one_name(tmp_path):
    nodes = [conv("x", "conv", "a")]
    nodes += [norm(a, "bn", b) for a, b in ("ab", "bc", "cy")]
    model = model_of(nodes, [kernel("conv", 4, 3, 3, 3), *stored("bn", statistics())])
    assert [s.path for s in subject_of(tmp_path, model).norms] == ["bn", "bn#2", "bn#3"]


def test_names_are_the_modules_or_the_nodes_or_the_outputs(tmp_path):
    def named(name, scope=None, owner="t"):
        vectors = {"w": 1.0, "b": 0.0, "m": 0.0, "v": 1.0}
        tensors = [kernel("conv", 4, 3, 3, 3)]
        for key, value in vectors.items():
            tensors.append(numpy_helper.from_array(np.full(4, value, np.float32), f"{owner}{key}"))
        node = helper.make_node(
            "BatchNormalization", ["h", *(f"{owner}{k}" for k in vectors)], ["y"], name=name
        )
        if scope:
            node.metadata_props.add(key=scope[0], value=scope[1])
        model = model_of([conv("x", "conv", "h"), node], tensors)
        return subject_of(tmp_path, model).norms[0].path

    assert named("") == "y"
    assert named("odd\nname\x1b[31m") == "odd?name?[31m"
    assert named("/layer1/layer1.0/bn1/BatchNormalization") == "layer1.0.bn1"
    scopes = "['', 'stem', 'stem.norm', 'op_1']"
    assert named("node_1", ("pkg.torch.onnx.name_scopes", scopes)) == "stem.norm"
    scopes = ": m.Net/stem: m.Stem/stem.norm: torch.nn.BatchNorm2d/op_1: aten.op"
    assert named("node_1", ("namespace", scopes)) == "stem.norm"


class Zoo(nn.Module):
    """A norm in every spelling."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.2)
        self.scale, self.steps = FrozenScale(4), FrozenSteps(4)
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.layer = nn.LayerNorm(4)

    def forward(self, x):
        x = self.instance(self.steps(torch.relu(self.scale(torch.relu(self.bn(self.conv(x)))))))
        return self.layer(x.mean((2, 3)))


@pytest.mark.filterwarnings("ignore")  # of the legacy exporter
@pytest.mark.parametrize("legacy", [False, True])
def test_exported_models_keep_paths_and_vectors(tmp_path, legacy):
    net = laws.hostile_(Zoo().eval(), 1)
    path, x = tmp_path / "net.onnx", torch.randn(2, 3, 8, 8)
    if legacy:
        kept = torch.onnx.TrainingMode.PRESERVE
        torch.onnx.export(net, (x,), path, dynamo=False, do_constant_folding=False, training=kept)
    else:
        bnify.export(net, x, path, optimize=False, verify=False)
    subject = onnx_subject(path, "net.onnx")
    found = {state.path: state for state in subject.norms}
    assert list(found) == ["bn", "scale", "steps", "instance"]
    assert {path for path, state in found.items() if state.frozen} == {"scale", "steps"}
    for path, state in found.items():
        module = net.get_submodule(path)
        assert state.eps == pytest.approx(module.eps)
        np.testing.assert_allclose(state.mean, module.running_mean.numpy())
        np.testing.assert_allclose(state.var, module.running_var.numpy())
        np.testing.assert_allclose(state.weight, module.weight.detach().numpy())
    assert found["bn"].momentum == pytest.approx(0.2)
    assert subject.onnx.others == 1


def test_weights_beside_a_file_are_read(tmp_path):
    path = tmp_path / "net.onnx"
    net = laws.hostile_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), 1)
    with torch.no_grad():
        net[1].running_var[2] = -1
    bnify.exporting.export_onnx(
        net, torch.randn(2, 3, 8, 8), path, optimize=False, verify=False, external_above=0
    )
    assert codes(audit(path, select=["BN101"])) == {"1": "BN101"}
    (tmp_path / "net.onnx.data").unlink()
    with pytest.raises(WeightsError, match="not beside it"):
        onnx_subject(path, "net.onnx")


def test_weight_standardisation_is_no_norm(tmp_path):
    """Trap 3."""
    tensors = [kernel("conv", 4, 3, 3, 3), *stored("bn", statistics())]
    model = model_of([norm("conv.weight", "bn", "w"),
                      helper.make_node("Conv", ["x", "w"], ["y"])], tensors)  # fmt: skip
    assert subject_of(tmp_path, model).onnx.norms == ()


def test_torch_is_not_imported_for_a_file(tmp_path, run_python):
    path = saved(tmp_path / "net.onnx", conv_norm(running_var=np.full(4, -1, np.float32)))
    ran = run_python(
        "-c",
        f"""
import sys
from pathlib import Path
from bnify.auditing.onnx_file import onnx_subject
subject = onnx_subject(Path({str(path)!r}), "net")
assert "torch" not in sys.modules and len(subject.norms) == 1
""",
    )
    assert ran.code == 0, ran.stderr
