"""Export: what is refused, what is written, and that nothing is written that was not measured."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnify.exporting.checked as checked
from bnify.errors import (
    BnifyError,
    CaptureError,
    DeviceError,
    ExportError,
    UsageError,
    VerificationError,
)
from bnify.exporting import export_onnx, refuse_train_mode
from laws import hostile_


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.ln = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.fc(self.ln(x.mean((2, 3))))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def net() -> nn.Module:
    return hostile_(Net(), seed=1).eval()


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_file(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})


def test_the_file_computes_what_the_model_computes_at_any_batch(
    net: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = copy.deepcopy(net.state_dict())
    export = export_onnx(net, X, tmp_path / "net.onnx")
    assert capfd.readouterr() == ("", "")
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            want = net(x)
        got = torch.from_numpy(run_file(export.path, x)[0])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (export.norms_before, export.norms_after) == (2, 1)
    assert export.dynamic_batch
    assert export.verification is not None
    assert export.verification.passed
    assert export.verification.device == "cpu (CPUExecutionProvider)"
    assert export.verification.checks[0].name == "unoptimised file"
    assert "batch size 1, 5" in [check.name for check in export.verification.checks]
    assert listed(tmp_path) == ["net.onnx"]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    json.dumps(export.to_dict())


def test_an_example_of_one_sample_still_gives_a_dynamic_batch(net: nn.Module, tmp_path) -> None:
    path = export_onnx(net, X[:1], tmp_path / "net.onnx").path
    assert run_file(path, torch.randn(6, 3, 8, 8))[0].shape == (6, 5)


def test_no_path_of_this_machine_is_in_the_file(net: nn.Module, tmp_path: Path) -> None:
    path = export_onnx(net, X, tmp_path / "net.onnx", optimize=False).path
    data = path.read_bytes()
    here = str(Path(__file__).resolve().parent)
    assert here.encode() not in data
    assert str(Path(torch.__file__).parent).encode() not in data
    assert b"stack_trace" not in data
    scopes = [
        prop.value
        for node in onnx.load(path).graph.node
        for prop in node.metadata_props
        if prop.key.endswith("name_scopes")
    ]
    assert any("'bn'" in scope for scope in scopes)


# -- train mode --------------------------------------------------------------------------------


def test_a_norm_left_in_train_mode_is_refused_and_named(net: nn.Module, tmp_path: Path) -> None:
    net.bn.train()
    with pytest.raises(ExportError, match="bn is in train mode") as caught:
        export_onnx(net, X, tmp_path / "net.onnx")
    assert "model.eval()" in caught.value.hint
    assert not any(tmp_path.iterdir())


def test_a_model_in_train_mode_is_refused(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"bn is in train mode \(and 1 more norm\)"):
        export_onnx(net.train(), X, tmp_path / "net.onnx")
    with pytest.raises(ExportError, match="Linear is in train mode"):
        refuse_train_mode(nn.Linear(2, 2))


def test_other_kinds_of_norm_are_known() -> None:
    from timm.layers import BatchNormAct2d

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_var", torch.ones(2))
            self.act = nn.ReLU()

    own = (nn.InstanceNorm2d(2), nn.SyncBatchNorm(2), nn.GroupNorm(1, 2), nn.RMSNorm(2))
    for norm in (*own, BatchNormAct2d(2), Own()):
        model = nn.Sequential(nn.ReLU(), norm).eval()
        refuse_train_mode(model)
        norm.train()
        with pytest.raises(ExportError, match="1 is in train mode"):
            refuse_train_mode(model)


def test_a_norm_is_none_by_its_name() -> None:
    class Normalize(nn.Module):
        """Scales pixels; train and eval are the same."""

    model = nn.Sequential(Normalize(), nn.BatchNorm2d(2)).eval()
    model[0].train()
    refuse_train_mode(model)


# -- the inputs it is checked on ---------------------------------------------------------------


def test_the_users_batches_are_what_the_file_is_checked_on(net: nn.Module, tmp_path: Path) -> None:
    data = [(torch.rand(4, 3, 8, 8), torch.zeros(4)) for _ in range(3)]
    export = export_onnx(net, X, tmp_path / "net.onnx", data=iter(data), batches=2)
    assert export.verification.inputs == ("data 0", "data 1", "batch 1", "batch 5")
    export = export_onnx(net, X, tmp_path / "net.onnx", data=torch.rand(4, 3, 8, 8))
    assert export.verification.inputs == ("data 0", "batch 1", "batch 5")
    with pytest.raises(CaptureError, match="the data yield no batch"):
        export_onnx(net, X, tmp_path / "net.onnx", data=[])


def test_a_fault_that_only_the_data_shows_is_found_on_the_data(tmp_path, monkeypatch) -> None:
    """A file that is wrong above 100 passes on inputs at random and fails on the user's."""

    class Clipped(nn.Module):
        def __init__(self, limit: float) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)
            self.limit = limit

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.clamp(max=self.limit))

    model, faulty = Clipped(1e6).eval(), Clipped(100.0).eval()
    faulty.load_state_dict(model.state_dict())
    real = checked.exported
    monkeypatch.setattr(checked, "exported", lambda _, *args, **kw: real(faulty, *args, **kw))
    x = torch.randn(3, 4)
    assert export_onnx(model, x, tmp_path / "net.onnx").verification.passed
    with pytest.raises(VerificationError):
        export_onnx(model, x, tmp_path / "net.onnx", data=[x * 1000])


def test_the_seeds_of_the_redrawn_inputs_are_those_asked_for(net: nn.Module, tmp_path) -> None:
    export = export_onnx(net, X, tmp_path / "net.onnx", seeds=(8, 9))
    assert {"normal (seed 8)", "normal x10 (seed 9)"} <= set(export.verification.inputs)
    assert not any("seed 1)" in label for label in export.verification.inputs)


@pytest.mark.parametrize(
    ("model", "x", "operator"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.randn(3, 4), "Gemm"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), X, "Conv"),
    ],
)
def test_bfloat16_on_the_cpu_is_told_the_way_out(model, x, operator, tmp_path: Path) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16).eval()
    with pytest.raises(ExportError) as caught:
        export_onnx(half, x.to(torch.bfloat16), tmp_path / "net.onnx")
    assert caught.value.message.startswith(f"onnxruntime on CPU has no bfloat16 {operator}")
    assert caught.value.hint == "export a float32 copy (model.float())"
    assert "bnify-tmp" not in caught.value.message
    assert export_onnx(half.float(), x, tmp_path / "net.onnx").verification.passed


# -- batch axis --------------------------------------------------------------------------------


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 12) * torch.arange(24.0).view(2, 12)


def test_a_batch_that_cannot_be_dynamic_says_what_to_do(tmp_path: Path) -> None:
    model = FixedBatch().eval()
    with pytest.raises(ExportError, match="FixedBatch cannot be exported") as caught:
        export_onnx(model, torch.randn(2, 3, 4), tmp_path / "net.onnx")
    assert "--static-batch" in caught.value.hint
    assert "try" not in caught.value.hint
    assert "\n" not in caught.value.message
    assert "\x1b" not in caught.value.message
    assert not any(tmp_path.iterdir())
    export = export_onnx(model, torch.randn(2, 3, 4), tmp_path / "net.onnx", dynamic_batch=False)
    assert not export.dynamic_batch
    assert export.notes == ("the file takes batches of 2 only",)
    assert any("dropped batch 1" in note for note in export.verification.notes)


def test_a_static_file_is_no_failure_and_said(net: nn.Module, tmp_path: Path) -> None:
    export = export_onnx(net, X, tmp_path / "net.onnx", dynamic_batch=False)
    assert export.verification.passed
    check = export.verification.checks[-1]
    assert (check.passed, check.detail) == (None, "the file is fixed at batch 2")


class Nested(nn.Module):
    @dataclass
    class Out:
        logits: Tensor
        states: dict[str, Tensor]
        loss: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, table: Tensor, states: dict[str, list[Tensor]]) -> Out:
        y = self.fc(x) + table.sum()
        h = states["h"]
        return self.Out(logits=y, states={"first": h[0] * 2, "sum": h[0] + h[1]})


@pytest.mark.parametrize("keywords", [False, True])
def test_nested_inputs_and_dataclass_outputs(tmp_path: Path, keywords: bool) -> None:
    model = Nested().eval()
    x, table = torch.randn(3, 4), torch.randn(7, 2)
    states = {"h": [torch.randn(3, 5), torch.randn(3, 5)]}
    inputs = {"x": x, "table": table, "states": states} if keywords else (x, table, states)
    export = export_onnx(model, inputs, tmp_path / "net.onnx")
    assert [output.name for output in export.verification.outputs] == [
        "logits",
        "states.first",
        "states.sum",
    ]
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in onnx.load(export.path).graph.input
    }
    assert shapes["x"] == ["batch", 4]
    assert shapes["table"] == [7, 2]
    assert [shape for name, shape in shapes.items() if "states" in name] == [["batch", 5]] * 2


def test_a_model_without_a_batch_axis_is_static(tmp_path: Path) -> None:
    class Scalar(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    export = export_onnx(Scalar().eval(), torch.tensor(3.0), tmp_path / "net.onnx")
    assert not export.dynamic_batch
    assert export.notes == ("no input has a batch axis: the file is static",)


# -- opset -------------------------------------------------------------------------------------


def test_the_opset_is_the_one_asked_for_or_an_error(net: nn.Module, tmp_path: Path) -> None:
    export = export_onnx(net, X, tmp_path / "net.onnx", opset=21)
    assert export.opset == 21
    assert onnx.load(export.path).opset_import[0].version == 21
    before = export.path.read_bytes()
    with pytest.raises(UsageError, match=r"opset 13 cannot be written.* 18 and up"):
        export_onnx(net, X, tmp_path / "net.onnx", opset=13)
    assert export.path.read_bytes() == before
    assert listed(tmp_path) == ["net.onnx"]


# -- what is written, and when -----------------------------------------------------------------


class Unexportable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_a_failed_export_is_one_line_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match="Unexportable cannot be exported: ") as caught:
        export_onnx(Unexportable().eval(), X, tmp_path / "net.onnx")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400
    assert "branches on values" in caught.value.hint
    assert not any(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_an_existing_file_needs_force(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        export_onnx(net, X, path, force=False)
    assert path.read_text() == "precious"


def test_the_path_must_be_an_onnx_file(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not end in \.onnx"):
        export_onnx(net, X, tmp_path / "net.pb")


def test_a_place_that_cannot_be_written_is_an_error(net: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BnifyError, match="cannot write") as caught:
        export_onnx(net, X, tmp_path / "file" / "net.onnx")
    assert caught.value.exit_code == 3


def test_weights_go_beside_the_file_above_the_threshold(net: nn.Module, tmp_path: Path) -> None:
    export = export_onnx(net, X, tmp_path / "net.onnx", external_above=100)
    assert export.external_data == "net.onnx.data"
    assert listed(tmp_path) == ["net.onnx", "net.onnx.data"]
    assert export.verification.passed
    with torch.no_grad():
        want = net(X)
    torch.testing.assert_close(torch.from_numpy(run_file(export.path, X)[0]), want)


def spoil(monkeypatch: pytest.MonkeyPatch, *, optimised_only: bool) -> None:
    """An exporter that gets one weight wrong: in every file, or in the optimiser only."""
    real = checked.saved

    def spoiled(program, file: Path, opset, external_above: int) -> int:
        norms = real(program, file, opset, external_above)
        if optimised_only and file.parent.name == "unoptimised":
            return norms
        model = onnx.load(file)
        tensor = next(t for t in model.graph.initializer if t.name == "fc.bias")
        values = onnx.numpy_helper.to_array(tensor).copy()
        values[1] += 0.01
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        onnx.save(model, file)
        return norms

    monkeypatch.setattr(checked, "saved", spoiled)


def test_a_wrong_file_is_not_put_in_place(net: nn.Module, tmp_path: Path, monkeypatch) -> None:
    spoil(monkeypatch, optimised_only=False)
    with pytest.raises(VerificationError, match="does not compute what the model") as caught:
        export_onnx(net, X, tmp_path / "net.onnx")
    assert not any(tmp_path.iterdir())
    verification = caught.value.result.verification
    assert not verification.passed
    assert verification.checks[0].name == "unoptimised file"
    assert verification.checks[0].passed is False
    assert "fc" in verification.first_divergent


def test_a_fault_of_the_optimiser_is_told_apart(net: nn.Module, tmp_path, monkeypatch) -> None:
    spoil(monkeypatch, optimised_only=True)
    with pytest.raises(VerificationError) as caught:
        export_onnx(net, X, tmp_path / "net.onnx")
    verification = caught.value.result.verification
    assert verification.checks[0].passed is True
    assert (
        "only the optimised file fails: export with optimize=False (--no-optimize)"
        in verification.notes
    )


def test_a_wrong_file_is_kept_only_when_asked_and_named_so(
    net: nn.Module, tmp_path: Path, monkeypatch
) -> None:
    spoil(monkeypatch, optimised_only=False)
    with pytest.raises(VerificationError, match=r"kept as net\.failed\.onnx") as caught:
        export_onnx(net, X, tmp_path / "net.onnx", keep_failed=True)
    assert listed(tmp_path) == ["net.failed.onnx"]
    assert caught.value.result.path == tmp_path / "net.failed.onnx"


def test_without_verification_nothing_is_claimed(net: nn.Module, tmp_path: Path) -> None:
    assert export_onnx(net, X, tmp_path / "net.onnx", verify=False).verification is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_asked_for_before_anything_is_done(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(DeviceError):
        export_onnx(net, X, tmp_path / "net.onnx", device="cuda")


def test_norms_in_functions_and_subgraphs_are_counted(tmp_path: Path) -> None:
    from onnxscript import ir

    from bnify.exporting import count_norms

    text = """<ir_version: 9, opset_import: ["" : 20, "own" : 1]>
    g (float[N,4] x, bool c, float[4] w) => (float[N,4] y) {
        y = If (c) <
            then_branch = t () => (float[N,4] a) { a = LayerNormalization (x, w) },
            else_branch = e () => (float[N,4] b) { b = own.f (x, w) }
        >
    }
    <domain: "own", opset_import: ["" : 20]>
    f (x, w) => (y) { y = LayerNormalization (x, w) }"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    assert count_norms(model) == 2


@pytest.mark.gpu
def test_export_on_cuda_says_where_the_file_ran(net: nn.Module, tmp_path: Path) -> None:
    export = export_onnx(net.cuda(), X.cuda(), tmp_path / "net.onnx", device="cuda")
    assert export.verification.passed
    names = [check.name for check in export.verification.checks]
    assert "torch on cuda:0 against float64" in names
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        assert export.verification.device == "cpu (CPUExecutionProvider)"


class Eigenvalues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x.mT @ x).real


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> int:
        return x.ndim


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no such luck")


def keyword_named() -> nn.Module:
    net = nn.Sequential()
    net.add_module("class", nn.Linear(4, 4))
    return net


@pytest.mark.parametrize(
    ("model", "message", "hint"),
    [
        (Eigenvalues(), "No ONNX function found", "others that ONNX has"),
        (Nothing(), "Nothing returns no tensor", "return what it computes"),
        (Fails(), "no such luck", "forward() itself fails"),
        (keyword_named(), "the module name 'class'", "rename the module 'class'"),
    ],
)
def test_the_hint_of_a_failed_export_is_about_its_cause(model, message, hint, tmp_path) -> None:
    with pytest.raises(ExportError) as caught:
        export_onnx(model.eval(), torch.randn(3, 4), tmp_path / "net.onnx")
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "static" not in caught.value.hint
    assert not any(tmp_path.iterdir())
