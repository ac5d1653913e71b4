"""``bnify audit``: what it takes, what it repairs, and how it says it."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file

INPUT = ("--input", "2,3,8,8")


GOOD = ("audit", "normed.py:Net", "--weights", "good.safetensors", *INPUT)


def found(ran):
    """``{("BN201", "conv"), ...}`` of a run with ``--format json``."""
    data = json.loads(ran.stdout)
    return {(f["code"], f["module"]) for f in data["findings"]}


def audit(cli, *words):
    ran = cli(*words, "--format", "json")
    return ran, found(ran)


# -- targets -------------------------------------------------------------------------------------


def test_a_model_with_weights_and_inputs(cli, net):
    ran, findings = audit(cli, *GOOD)
    assert findings == {("BN201", "conv"), ("BN203", "bn")}
    assert ran.code == 1
    data = json.loads(ran.stdout)
    assert (data["verb"], data["target"], data["kind"]) == ("audit", "normed.py:Net", "model")
    assert (data["norms"], data["tiers"]) == (2, ["T0", "T1"])
    assert data["environment"]["versions"]["torch"]
    assert "user: running" not in ran.stdout


def test_without_inputs_what_needs_a_pass_is_listed_as_unchecked(cli, net):
    ran, findings = audit(cli, *GOOD[:4])
    assert findings == {("BN203", "bn")}
    unchecked = json.loads(ran.stdout)["unchecked"]
    assert "--input" in unchecked["BN201"]
    assert "BN203" not in unchecked


def test_a_model_that_does_not_take_the_inputs_is_audited_as_far_as_it_goes(cli, net):
    ran, findings = audit(cli, *GOOD[:4], "--input", "2,7,8,8")
    assert ran.code == 1
    assert findings == {("BN203", "bn")}
    data = json.loads(ran.stdout)
    assert "no forward pass was recorded" in " ".join(data["notes"])
    assert "BN201" in data["unchecked"]


def test_a_safetensors_file_is_audited_without_torch(run_python, net, user):
    code = (
        "import sys; from bnify.cli.run import run\n"
        "code = run(['audit', 'good.safetensors', '--format', 'concise'], restore=True)\n"
        "print(code, 'torch' in sys.modules)"
    )
    ran = run_python("-c", code, cwd=user)
    assert ran.stdout.splitlines()[-1] == "0 False", ran.stderr
    assert "0 findings in 2 batch norms (T0)" in ran.stderr


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_missing_statistics_are_a_finding_and_no_error(cli, net, suffix):
    del net["bn.running_mean"], net["bn.running_var"]
    (save_file if suffix == "safetensors" else torch.save)(net, f"lost.{suffix}")
    for words in ((f"lost.{suffix}",), ("normed.py:Net", "--weights", f"lost.{suffix}", *INPUT)):
        ran, findings = audit(cli, "audit", *words)
        assert ("BN103", "bn") in findings, words
        assert ran.code == 1
    other = cli("fold", "normed.py:Net", "--weights", f"lost.{suffix}", *INPUT)
    assert other.code == 3
    assert "running_mean" in other.stderr


def test_values_that_are_not_finite_are_a_finding_and_no_error(cli, net):
    net["head.1.running_var"][1] = torch.nan
    net["fc.weight"][0, 0] = torch.inf
    save_file(net, "nan.safetensors")
    for words in (("nan.safetensors",), ("normed.py:Net", "--weights", "nan.safetensors", *INPUT)):
        ran, findings = audit(cli, "audit", *words)
        assert ("BN101", "head.1") in findings
        assert ran.code == 1


def test_weights_that_lack_more_are_an_error_as_ever(cli, net):
    del net["fc.weight"]
    save_file(net, "less.safetensors")
    ran = cli("audit", "normed.py:Net", "--weights", "less.safetensors")
    assert ran.code == 3
    assert "1 missing (fc.weight)" in ran.stderr
    ran = cli("audit", "normed.py:Net", "--weights", "less.safetensors", "--allow-missing", "fc.*")
    assert ran.code == 1


def test_a_part_of_a_checkpoint_is_chosen_by_key(cli, net):
    bad = {name: tensor.clone() for name, tensor in net.items()}
    bad["bn.running_var"][0] = -1
    torch.save({"model": net, "ema": bad}, "both.pt")
    assert audit(cli, "audit", "both.pt", "--weights-key", "model")[1] == set()
    assert audit(cli, "audit", "both.pt", "--weights-key", "ema")[1] == {("BN101", "bn")}
    words = ("audit", "normed.py:Net", "--weights", "both.pt", "--weights-key", "ema")
    assert ("BN101", "bn") in audit(cli, *words)[1]


def test_a_model_without_norms_says_so(cli, net):
    ran = cli("audit", "normed.py:Plain", "--input", "2,4")
    assert ran.code == 0
    assert ran.stdout.splitlines()[-1] == "no batch norm found; 0 findings"


def test_a_registry_brings_its_inputs(cli, user):
    ran = cli("audit", "torchvision:vgg11_bn", "--format", "concise", "--select", "BN201")
    assert "8 layers: features." in ran.stdout
    assert "BN201" in ran.stdout
    assert ran.code == 0


@pytest.mark.parametrize("sharded", [".metadata", "zero_to_fp32.py", "a.safetensors.index.json"])
def test_a_sharded_checkpoint_is_named_for_what_it_is(cli, user, sharded):
    (user / "step").mkdir()
    (user / "step" / sharded).write_text("{}")
    ran = cli("audit", "step")
    assert ran.code == 3
    assert "checkpoint" in ran.stderr
    assert "not written by bnify" not in ran.stderr


@pytest.mark.parametrize(
    ("content", "code"),
    [(None, 3), (b"", 3), (b"\x08\0\0\0\0\0\0\0{broken}", 3), (b"\x80\x04.", 3)],
)
def test_files_that_cannot_be_read(cli, user, content, code):
    for name in ("a.safetensors", "a.pt"):
        if content is not None:
            (user / name).write_bytes(content)
        ran = cli("audit", name, "--format", "json")
        assert ran.code == code
        error = json.loads(ran.stdout)["error"]
        assert name in error["message"]
        assert "\n" not in error["message"]
        assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("--input", "2,3"),
        ("--data", "normed.py:loader"),
        ("--eval",),
        ("--arg", "a=1"),
        ("--fix", "--diff"),
        ("--pretrained",),
        ("--weights", "good.safetensors"),
    ],
)
def test_what_only_a_model_can_take_is_refused_for_a_file(cli, net, words):
    ran = cli("audit", "good.safetensors", *words)
    assert ran.code == 2
    assert words[0] in ran.stderr


def test_eval_audits_the_model_as_deployed(cli, net):
    source = Path("normed.py").read_text()
    freeze = source.replace(
        "self.fc = nn.Linear(4, 2)\n\n    def forward(self, x):\n        print",
        "self.fc = nn.Linear(4, 2)\n        self.bn.requires_grad_(False)\n\n"
        "    def forward(self, x):\n        print",
        1,
    )
    Path("frozen.py").write_text(freeze)
    words = ("audit", "frozen.py:Net", "--weights", "good.safetensors", "--select", "BN301")
    assert audit(cli, *words)[1] == {("BN301", "bn")}
    assert audit(cli, *words, "--eval")[1] == set()


def test_an_onnx_file_whose_statistics_are_no_statistics(cli, net, user):
    net["bn.running_var"][2] = -1  # of which the exporter and the checker take no notice
    constants = {name: onnx.numpy_helper.from_array(t.numpy(), name) for name, t in net.items()}
    names = ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"]
    node = onnx.helper.make_node("BatchNormalization", ["x", *names], ["y"], name="bn")
    values = [onnx.helper.make_tensor_value_info(n, 1, [2, 4, 8, 8]) for n in ("x", "y")]
    graph = onnx.helper.make_graph(
        [node], "g", values[:1], values[1:], [constants[name] for name in names]
    )
    onnx.save(onnx.helper.make_model(graph), "net.onnx")
    ran, findings = audit(cli, "audit", "net.onnx")
    assert {code for code, _ in findings} >= {"BN101"}
    assert ran.code == 1
    assert json.loads(ran.stdout)["tiers"] == ["T0x"]
    ran = cli("audit", "net.onnx", "--weights-key", "a")
    assert ran.code == 2


def test_data_make_it_the_tier_that_measures(cli, net):
    ran = cli(*GOOD[:4], "--data", "normed.py:loader", "--batches", "8", "--format", "json")
    data = json.loads(ran.stdout)
    assert data["tiers"] == ["T0", "T1", "T2"], ran.stderr
    assert "BN306" not in data["unchecked"]
    assert "BN306" in json.loads(cli(*GOOD, "--format", "json").stdout)["unchecked"]


def test_the_model_that_was_averaged(cli, net):
    average = {name: tensor.clone() for name, tensor in net.items()}
    for name in average:
        if name.endswith(("weight", "bias")):
            average[name] += 0.1
    for norm in ("bn", "head.1"):
        average[f"{norm}.running_mean"].zero_()
        average[f"{norm}.running_var"].fill_(1)
    save_file(average, "ema.safetensors")
    words = ("--reference", "good.safetensors", "--select", "BN307")
    ran, findings = audit(cli, "audit", "ema.safetensors", *words)
    assert findings == {("BN307", "bn"), ("BN307", "head.1")}, ran.stdout
    model = ("audit", "normed.py:Net", "--weights", "ema.safetensors")
    assert audit(cli, *model, *words)[1] == findings
    assert audit(cli, "audit", "good.safetensors", *words)[1] == set()


# -- fixes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [("--fix",), ("--diff",), ("--unsafe-fixes",), ("-o", "out"), ("--unsafe-fixes", "--diff")],
)
def test_options_of_fixes_that_mean_nothing_alone(cli, net, words):
    ran = cli(*GOOD, *words)
    assert ran.code == 2
    assert "--fix" in ran.stderr
    assert "user: building" not in ran.stderr


def test_fix_shows_the_difference_and_what_is_left(cli, net):
    ran = cli(*GOOD, "--fix", "--diff")
    assert ran.code == 0, ran.stderr
    assert "momentum=0.01" in ran.stdout
    assert "bias=False" in ran.stdout
    assert "PASS" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "0 findings in 2 batch norms (T0, T1); 2 fixed"


def test_a_fixed_model_is_written_and_audited_as_any_other(cli, net, user):
    ran = cli(*GOOD, "--fix", "-o", "out", "--format", "json")
    assert ran.code == 0, ran.stderr
    data = json.loads(ran.stdout)
    assert {(f["code"], f["module"]) for f in data["fixed"]["solved"]} == {
        ("BN201", "conv"),
        ("BN203", "bn"),
    }
    assert data["fixed"]["verification"]["passed"] is True
    assert {p.name for p in (user / "out").iterdir()} >= {"model.safetensors", "bnify.json"}
    assert audit(cli, "audit", "out", "--ignore", "BN401")[1] == set()
    words = ("verify", "normed.py:Net", "out", "--weights", "good.safetensors", *INPUT)
    assert cli(*words).code == 0
    ran = cli(*GOOD, "--fix", "-o", "out")
    assert ran.code == 2
    assert "exists already" in ran.stderr


def test_what_is_ignored_is_not_fixed(cli, net):
    ran = cli(*GOOD, "--ignore", "BN201", "--fix", "--diff")
    changed = [line for line in ran.stdout.splitlines() if line.startswith("+  ")]
    assert len(changed) == 1
    assert "momentum=0.01" in changed[0]


def test_nothing_to_fix_is_said_and_is_no_error(cli, net):
    ran = cli(*GOOD, "--select", "BN204", "--fix", "--diff")
    assert ran.code == 0
    assert "nothing to fix" in ran.stderr


def test_fixes_need_a_recorded_pass(cli, net):
    ran = cli(*GOOD[:4], "--fix", "--diff")
    assert ran.code == 3
    assert "--input" in ran.stderr


# -- formats -------------------------------------------------------------------------------------


def test_each_format_is_the_only_thing_on_stdout(cli, net):
    for form in ("rich", "concise", "json", "sarif", "github", "md"):
        ran = cli(*GOOD, "--format", form)
        assert ran.code == 1
        assert "BN203" in ran.stdout
        assert "user:" not in ran.stdout


def test_sarif_points_at_the_class_and_github_too(cli, net):
    log = json.loads(cli(*GOOD, "--format", "sarif").stdout)
    place = log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "normed.py"
    line = Path("normed.py").read_text().splitlines().index("class Net(nn.Module):") + 1
    assert place["region"]["startLine"] == line
    assert f"file=normed.py,line={line},title=BN201" in cli(*GOOD, "--format", "github").stdout


def test_sarif_of_a_checkpoint_points_at_the_file(cli, net):
    net["bn.running_var"][0] = -1
    save_file(net, "bad.safetensors")
    log = json.loads(cli("audit", "bad.safetensors", "--format", "sarif").stdout)
    place = log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "bad.safetensors"


def test_an_ascii_terminal(run_cli, net, user):
    ran = run_cli(*GOOD, cwd=user, env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"})
    assert ran.code == 1
    assert ran.stdout.isascii()
