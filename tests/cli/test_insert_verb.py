"""``bnify insert`` from options to report and folder."""

from __future__ import annotations

import json

import pytest
import torch

import bnify
from bnify.plan import Plan

INPUT = ("--input", "32,4")


def _json(ran) -> dict:
    assert ran.stdout, ran.stderr
    return json.loads(ran.stdout)


def test_the_report_on_stdout_and_the_users_words_on_stderr(cli):
    ran = cli("insert", "net.py:Net", *INPUT)
    assert ran.code == 0
    assert "2 of 3 layers got norms; 1 left alone" in ran.stdout
    assert "fc1-2   ×2" in ran.stdout
    assert "output-head" in ran.stdout
    assert "In train mode the outputs move by" in ran.stdout
    assert ran.stdout.rstrip().splitlines()[-1].startswith("PASS")
    assert "seed" in ran.stdout
    assert "user:" not in ran.stdout
    for words in ("user: building", "user: child process", "user: running"):
        assert words in ran.stderr


def test_json_is_the_only_thing_on_stdout(cli):
    data = _json(cli("insert", "net.py:Net", *INPUT, "--format", "json", "--seed", "5"))
    assert data["schema"] == 1
    assert data["verb"] == "insert"
    assert [edit["layer"] for edit in data["plan"]["edits"]] == ["fc1", "fc2"]
    assert data["plan"]["skips"] == [
        {"layer": "fc3", "reason": "output-head", "detail": "", "layer_type": "Linear"}
    ]
    assert data["verification"]["passed"] is True
    assert data["files"] == {}
    assert data["environment"]["seed"] == 5
    assert data["environment"]["hashes"]["model"] == data["plan"]["fingerprint"]["digest"]


def test_the_folder_loads_and_computes_the_same(cli, user):
    ran = cli("insert", "net.py:Net", *INPUT, "--arg", "width=12", "-o", "out", "--no-onnx")
    assert ran.code == 0, ran.stderr
    assert {p.name for p in (user / "out").iterdir()} == {
        "model.safetensors",
        "bnify.json",
        "report.json",
    }
    assert "out/model.safetensors" in ran.stdout
    model = bnify.load("out")
    assert model.fc1.out_features == 12
    assert isinstance(model.fc2.norm, torch.nn.BatchNorm1d)
    again = cli("insert", "out", "--format", "json")
    assert again.code == 0
    assert _json(again)["plan"]["edits"] == []
    report = json.loads((user / "out" / "report.json").read_text())
    assert report["verification"]["passed"] is True
    assert report["environment"]["seed"] == 0


def test_a_dry_run_writes_nothing_and_its_plan_can_be_edited_and_applied(cli, user):
    ran = cli("insert", "net.py:Net", *INPUT, "--dry-run", "--format", "json", "-o", "out")
    assert ran.code == 0
    assert not (user / "out").exists()
    data = _json(ran)
    assert data["dry_run"] is True
    assert data["verification"] is None
    data["plan"]["edits"] = [e for e in data["plan"]["edits"] if e["layer"] != "fc2"]
    (user / "plan.json").write_text(json.dumps(data))
    ran = cli("insert", "net.py:Net", "--plan", "plan.json", "--format", "json", "-o", "out",
              "--no-onnx")  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert [e["layer"] for e in _json(ran)["plan"]["edits"]] == ["fc1"]
    assert not hasattr(bnify.load("out").fc2, "norm")
    # A plan alone and a folder are read too.
    (user / "bare.json").write_text(Plan.from_dict(data["plan"]).to_json())
    for place in ("bare.json", "out"):
        ran = cli("insert", "net.py:Net", "--plan", place, "--dry-run", "--format", "json")
        assert [e["layer"] for e in _json(ran)["plan"]["edits"]] == ["fc1"]
    text = cli("insert", "net.py:Net", *INPUT, "--dry-run").stdout
    assert "would get a norm" in text
    assert "PASS" not in text


@pytest.mark.parametrize("dry", [("--dry-run",), ("--no-onnx",)])
def test_a_plan_that_does_not_fit_is_3_with_and_without_dry_run(cli, user, dry):
    data = _json(cli("insert", "net.py:Net", *INPUT, "--dry-run", "--format", "json"))
    (user / "plan.json").write_text(json.dumps(data))
    ran = cli("insert", "net.py:Quiet", "--plan", "plan.json", *dry)
    assert ran.code == 3, ran
    assert "the plan does not fit this model" in ran.stderr
    data["plan"]["edits"][0]["channels"] = 7
    (user / "plan.json").write_text(json.dumps(data))
    ran = cli("insert", "net.py:Net", "--plan", "plan.json", *dry)
    assert ran.code == 3, ran
    assert "the plan's edit of fc1 cannot be done" in ran.stderr


def test_a_plan_and_weights_go_together(cli, user):
    import runpy

    data = _json(cli("insert", "net.py:Quiet", *INPUT, "--dry-run", "--format", "json"))
    (user / "plan.json").write_text(json.dumps(data))
    torch.save(runpy.run_path("net.py")["Quiet"]().state_dict(), "w.pt")
    ran = cli("insert", "net.py:Quiet", "--plan", "plan.json", "--weights", "w.pt")
    assert ran.code == 0, ran


def test_diff_and_code_are_shown(cli):
    ran = cli("insert", "net.py:Quiet", *INPUT, "--diff", "--print-code")
    assert "-  (fc1): Linear(" in ran.stdout
    assert "+  (fc1): LinearNorm(" in ran.stdout
    assert "def forward(self, x):" in ran.stdout
    assert "batch_norm" in ran.stdout
    assert "= None" not in ran.stdout
    data = _json(cli("insert", "net.py:Quiet", *INPUT, "--diff", "--print-code", "--format=json"))
    assert {"diff", "code"} <= set(data)


def test_weights_make_preserve_the_default_where_it_can_be(cli, user):
    import runpy

    net = runpy.run_path("net.py")["Quiet"]()
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, "w.pt")
    words = ("insert", "net.py:Quiet", *INPUT, "--weights", "w.pt", "--format", "json")

    def inits(*more: str) -> set[str]:
        ran = cli(*words, *more)
        assert ran.code == 0, ran
        return {e.get("init", "reset") for e in _json(ran)["plan"]["edits"]}

    assert inits() == {"preserve"}
    assert inits("--init", "reset") == {"reset"}
    assert inits("--norm", "layer") == {"reset"}
    ran = cli(*words, "--data", "net.py:loader", "--batches", "3", "-o", "out", "--no-onnx")
    assert ran.code == 0, ran
    assert "module." in ran.stderr, "the stripped prefix is said"
    x = torch.randn(5, 4)
    with torch.no_grad():
        assert torch.allclose(bnify.load("out")(x), net.eval()(x), atol=1e-5)
    sha = _json(ran)["environment"]["hashes"]["checkpoint"]
    assert json.loads((user / "out" / "bnify.json").read_text())["hashes"]["checkpoint"] == sha


def test_the_data_alone_gives_the_inputs(cli):
    ran = cli("insert", "net.py:Quiet", "--data", "net.py:loader", "--format", "json")
    assert ran.code == 0, ran.stderr
    assert _json(ran)["plan"]["inputs"][0]["shape"] == [64, 4]


def test_options_reach_the_plan(cli):
    ran = cli("insert", "net.py:Net", *INPUT, "--norm", "group", "--groups", "2", "--eps", "0.01",
              "--exclude", "fc2", "--include", "fc3", "--dry-run", "--format", "json")  # fmt: skip
    plan = _json(ran)["plan"]
    first = plan["edits"][0]
    assert (first["layer"], first["norm"], first["groups"]) == ("fc1", "group", 2)
    assert first["eps"] == 0.01
    assert ("fc2", "excluded") in [(s["layer"], s["reason"]) for s in plan["skips"]]


def test_nothing_to_insert_is_no_error(cli):
    for target, size in (("net.py:Normed", "4,3,8,8"), ("net.py:NoLayer", "4,3")):
        ran = cli("insert", target, "--input", size)
        assert ran.code == 0, ran.stderr
        assert "Nothing to insert" in ran.stdout
        assert "PASS" in ran.stdout


def test_an_unverified_result_is_kept_only_by_name(cli, user):
    ran = cli("insert", "net.py:Quiet", *INPUT, "--no-verify", "--keep-failed", "-o", "out",
              "--no-onnx")  # fmt: skip
    assert ran.code == 0
    assert "NOT VERIFIED" in ran.stdout
    assert not (user / "out").exists()
    assert json.loads((user / "out.unverified" / "bnify.json").read_text())["verified"] is None


@pytest.fixture
def planted_fault(monkeypatch):
    """Norms that come out with a bias off by 1 %: the rewritten model is wrong."""
    import bnify.inserts

    real = bnify.inserts.rewrite_tree

    def faulty(model, plan, norms):
        rewritten = real(model, plan, norms)
        with torch.no_grad():
            rewritten.fc1.norm.bias[0] += 0.01
        return rewritten

    monkeypatch.setattr(bnify.inserts, "rewrite_tree", faulty)


@pytest.mark.usefixtures("planted_fault")
def test_a_failed_verification_is_1_with_its_numbers_and_writes_nothing(cli, user):
    ran = cli("insert", "net.py:Quiet", *INPUT, "-o", "out", "--no-onnx")
    assert ran.code == 1, ran
    assert "FAIL" in ran.stdout
    assert "error: the result was measured and found wrong" in ran.stderr
    assert not list(user.glob("out*"))
    data = _json(cli("insert", "net.py:Quiet", *INPUT, "-o", "out", "--format", "json"))
    assert data["error"]["kind"] == "VerificationError"
    assert data["verification"]["passed"] is False


@pytest.mark.usefixtures("planted_fault")
def test_a_failed_result_is_kept_only_when_asked_and_named_so(cli, user):
    ran = cli("insert", "net.py:Quiet", *INPUT, "-o", "out", "--keep-failed", "--no-onnx")
    assert ran.code == 1
    assert not (user / "out").exists()
    assert json.loads((user / "out.failed" / "bnify.json").read_text())["verified"] is False
    assert "out.failed" in ran.stderr
    with pytest.warns(UserWarning, match="failed its verification"):
        bnify.load("out.failed")


def test_force_replaces_and_the_second_run_gives_the_same_folder(cli, user):
    words = ("insert", "net.py:Quiet", *INPUT, "-o", "out", "--no-onnx", "--quiet")
    assert cli(*words).code == 0
    first = {p.name: p.read_bytes() for p in (user / "out").iterdir()}
    assert cli(*words).code == 2
    assert cli(*words, "--force").code == 0
    assert {p.name: p.read_bytes() for p in (user / "out").iterdir()} == first


@pytest.mark.parametrize("form", ["rich", "json"])
def test_a_dry_run_shows_code_and_difference_and_writes_nothing(cli, user, form):
    ran = cli("insert", "net.py:Quiet", *INPUT, "--dry-run", "--diff", "--print-code", "-o", "out",
              "--format", form)  # fmt: skip
    assert ran.code == 0, ran
    assert "+  (fc1): LinearNorm(" in ran.stdout
    assert "def forward(self, x):" in ran.stdout
    assert "note: --dry-run writes nothing: -o out is left alone" in ran.stderr
    assert not (user / "out").exists()


ODD = """
import torch
from net import Quiet

class One(Quiet):
    def forward(self, x):
        return super().forward(x).view(1, 2)

class Branches(Quiet):
    def forward(self, x):
        return super().forward(x) * (2 if x.shape[0] == 7 else 1)
"""


def test_a_model_of_one_batch_size_gets_a_file_of_that_size(cli, user):
    (user / "odd.py").write_text(ODD)
    ran = cli("insert", "odd.py:One", "--input", "1,4", "--norm", "layer", "-o", "out")
    assert ran.code == 0, ran
    text = " ".join(ran.stdout.split())
    assert "the file takes batches of 1 only, as the model does" in text
    ran = cli("insert", "odd.py:Branches", "--input", "8,4", "-o", "no")
    if ran.code:  # torch may learn to export it
        assert "--no-onnx" in ran.stderr
        assert "static" not in ran.stderr
        assert "onnx=False" not in ran.stderr
        assert not (user / "no").exists()


@pytest.mark.parametrize("form", ["rich", "json"])
def test_a_wrong_onnx_file_is_reported_with_the_insertion(cli, user, monkeypatch, form):
    import onnx

    from bnify.exporting import checked

    real = checked.saved

    def spoiled(program, file, opset, external_above):
        norms = real(program, file, opset, external_above)
        model = onnx.load(file)
        for tensor in model.graph.initializer:
            values = onnx.numpy_helper.to_array(tensor).copy()
            if values.dtype.kind == "f":
                tensor.CopyFrom(onnx.numpy_helper.from_array(values * 1.01, tensor.name))
        onnx.save(model, file)
        return norms

    monkeypatch.setattr(checked, "saved", spoiled)
    ran = cli("insert", "net.py:Quiet", *INPUT, "-o", "out", "--format", form)
    assert ran.code == 1, ran
    assert not (user / "out").exists()
    assert "tmp" not in ran.stdout
    if form == "json":
        data = _json(ran)
        assert data["verification"]["passed"] is True
        assert data["export"]["verification"]["passed"] is False
        return
    assert ran.stdout.startswith("bnify insert  net.py:Quiet")
    assert "out/model.onnx" in ran.stdout
    assert ran.stdout.rstrip().splitlines()[-1].startswith("FAIL")
    assert "try: leave the ONNX file out: --no-onnx" in ran.stderr
