"""``bnify fold`` from options to report and folder."""

from __future__ import annotations

import json
import runpy

import pytest
import torch

import bnify

INPUT = ("--input", "4,3,9,9")

NETS = '''
import torch
from torch import nn


def hostile(model, seed=0):
    """Statistics of a trained net at its worst: scales below 0 and at 0, tiny variances."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                n = module.num_features
                module.running_mean.copy_(torch.randn(n, generator=generator))
                module.running_var.copy_(torch.rand(n, generator=generator) * 3 + 1e-4)
                module.running_var[0] = 1e-6
                if module.affine:
                    module.weight.copy_(torch.randn(n, generator=generator))
                    module.weight[-1] = 0
                    module.bias.copy_(torch.randn(n, generator=generator))
    return model


class Blocks(nn.Module):
    """Two norms go backwards, one forwards, one cannot go."""

    def __init__(self):
        super().__init__()
        print("user: building")
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.bn3 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 4, 1)
        self.bn4 = nn.BatchNorm2d(4, track_running_stats=False)
        hostile(self)

    def forward(self, x):
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return self.bn4(self.conv3(self.bn3(x))).flatten(1)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.point = nn.Conv2d(3, 3, 1, bias=False)
        self.skip = nn.BatchNorm2d(3)
        hostile(self)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) + self.point(x) + self.skip(x))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = hostile(nn.BatchNorm2d(4))

    def forward(self, x):
        y = self.conv(x)
        return nn.functional.batch_norm(
            y, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias
        )


class Stuck(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = hostile(nn.BatchNorm2d(3))

    def forward(self, x):
        return self.bn(x)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.relu(self.conv(x))
'''


@pytest.fixture
def folder(user):
    """A folder with ``folded_nets.py``, and the weights of a trained net of it."""
    (user / "folded_nets.py").write_text(NETS)
    nets = runpy.run_path(str(user / "folded_nets.py"))
    torch.save(nets["hostile"](nets["Blocks"](), 7).state_dict(), user / "blocks.pt")
    return user


@pytest.fixture
def trained(folder):
    """The net that ``--weights blocks.pt`` gives, in eval mode."""
    model = runpy.run_path(str(folder / "folded_nets.py"))["Blocks"]()
    model.load_state_dict(torch.load(folder / "blocks.pt"))
    return model.eval()


def _json(ran) -> dict:
    assert ran.stdout, ran.stderr
    return json.loads(ran.stdout)


BLOCKS = ("folded_nets.py:Blocks", "--weights", "blocks.pt")


@pytest.mark.usefixtures("folder")
def test_the_report_on_stdout_and_the_users_words_on_stderr(cli):
    ran = cli("fold", *BLOCKS, *INPUT)
    assert ran.code == 0, ran
    text = " ".join(ran.stdout.split())
    assert "3 of 4 norms are folded (2 backwards, 1 forwards); 1 left alone" in text
    assert "batch-statistics" in text
    assert "Norms that run 4 1" in text
    assert ran.stdout.rstrip().splitlines()[-1].startswith("PASS")
    assert "train mode" not in text, "the command line itself made the model"
    assert "user:" not in ran.stdout
    assert "user: building" in ran.stderr


@pytest.mark.usefixtures("folder")
def test_json_is_the_only_thing_on_stdout(cli):
    data = _json(cli("fold", *BLOCKS, *INPUT, "--format", "json", "--seed", "5"))
    assert (data["schema"], data["verb"]) == (1, "fold")
    kinds = {edit["layer"]: (edit["kind"], edit["into"]) for edit in data["plan"]["edits"]}
    assert kinds == {
        "bn1": ("fold-backward", ["conv1"]),
        "bn2": ("fold-backward", ["conv2"]),
        "bn3": ("fold-forward", ["conv3"]),
    }
    assert [s["layer"] for s in data["plan"]["skips"]] == ["bn4"]
    assert data["verification"]["passed"] is True
    before, after = data["cost"]["before"], data["cost"]["after"]
    assert (before["norms"], after["norms"]) == (4, 1)
    # Three norms of 8 channels go, and two biases of 8 come.
    assert before["parameters"] - after["parameters"] == 3 * 16 - 2 * 8
    assert after["flops"] < before["flops"]
    assert data["magnification"]["ratio"] > 1
    assert data["warnings"], "a variance of 1e-6 tells"
    assert data["latency"] is None
    assert data["onnx"] is None
    assert data["files"] == {}
    assert data["environment"]["seed"] == 5
    assert data["environment"]["hashes"]["checkpoint"]


@pytest.mark.parametrize("extra", [(), ("--merge",)])
def test_the_folder_loads_and_is_exported_and_verified(cli, folder, trained, extra):
    ran = cli("fold", *BLOCKS, *INPUT, *extra, "-o", "out")
    assert ran.code == 0, ran
    names = {"model.safetensors", "bnify.json", "report.json", "model.onnx"}
    assert {p.name for p in (folder / "out").iterdir()} == names
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["verb"] == "fold"
    assert report["cost"]["after"]["norms"] == 1
    assert report["warnings"]
    loaded = bnify.load("out")
    folded = bnify.fold(trained, torch.randn(4, 3, 9, 9), merge=bool(extra)).model
    x = torch.randn(5, 3, 9, 9)
    with torch.no_grad():
        assert torch.equal(loaded(x), folded(x))
        assert not torch.equal(loaded(x), trained(x)), "nothing was folded"
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in loaded.modules()) == 1
    ran = cli("verify", "folded_nets.py:Blocks", "out", "--weights", "blocks.pt")
    assert ran.code == 0, ran
    ran = cli("verify", "folded_nets.py:Blocks", "out")
    assert ran.code == 1, "other weights are another function"
    assert cli("export", "out", "-o", "again.onnx").code == 0
    assert cli("verify", "out", "again.onnx").code == 0


def test_a_dry_run_writes_nothing_and_its_plan_can_be_edited_and_applied(cli, folder):
    ran = cli("fold", *BLOCKS, *INPUT, "--dry-run", "--format", "json", "-o", "out")
    assert ran.code == 0, ran
    assert not (folder / "out").exists()
    data = _json(ran)
    assert data["dry_run"] is True
    assert data["verification"] is None
    data["plan"]["edits"] = [e for e in data["plan"]["edits"] if e["layer"] != "bn2"]
    (folder / "plan.json").write_text(json.dumps(data))
    ran = cli("fold", *BLOCKS, "--plan", "plan.json", "--format", "json", "-o", "out", "--no-onnx")
    assert ran.code == 0, ran
    assert "bn2" not in [e["layer"] for e in _json(ran)["plan"]["edits"]]
    assert isinstance(bnify.load("out").bn2, torch.nn.BatchNorm2d)
    checked = cli("fold", *BLOCKS, "--plan", "out", "--dry-run", "--format", "json")
    assert "bn2" not in [e["layer"] for e in _json(checked)["plan"]["edits"]]
    assert "would be folded" in cli("fold", *BLOCKS, *INPUT, "--dry-run").stdout


@pytest.mark.parametrize("dry", [("--dry-run",), ()])
def test_a_plan_that_does_not_fit_is_3_with_and_without_dry_run(cli, folder, dry):
    data = _json(cli("fold", *BLOCKS, *INPUT, "--dry-run", "--format", "json"))
    (folder / "plan.json").write_text(json.dumps(data))
    ran = cli("fold", "folded_nets.py:Plain", "--plan", "plan.json", *dry)
    assert ran.code == 3, ran
    data["plan"]["edits"][0]["into"] = ["conv3"]
    (folder / "plan.json").write_text(json.dumps(data))
    ran = cli("fold", *BLOCKS, "--plan", "plan.json", *dry)
    assert ran.code == 3, ran
    assert "the plan's edit of bn1 cannot be done" in ran.stderr


def test_a_plan_of_the_other_verb_is_refused_by_both(cli, folder):
    (folder / "a.json").write_text(
        cli("insert", "folded_nets.py:Plain", *INPUT, "--dry-run", "--format", "json").stdout
    )
    ran = cli("fold", "folded_nets.py:Plain", "--plan", "a.json")
    assert ran.code == 3
    assert "--plan a.json is a plan to insert, not to fold" in ran.stderr
    assert "try: bnify insert SPEC --plan a.json" in ran.stderr
    (folder / "b.json").write_text(
        cli("fold", *BLOCKS, *INPUT, "--dry-run", "--format", "json").stdout
    )
    ran = cli("insert", "folded_nets.py:Blocks", "--plan", "b.json", "--dry-run")
    assert ran.code == 3
    assert "is a plan to fold, not to insert" in ran.stderr


@pytest.mark.parametrize("option", ["--merge", "--affines", "--partial", "--untie", "--emit=graph"])
def test_options_beside_a_plan_are_2(cli, folder, option):
    (folder / "plan.json").write_text("{}")
    ran = cli("fold", *BLOCKS, "--plan", "plan.json", option)
    assert ran.code == 2, ran
    assert f"{option.partition('=')[0]} shapes a plan" in ran.stderr


def test_branches_are_merged_when_asked(cli, folder):
    ran = cli("fold", "folded_nets.py:Branches", *INPUT, "--merge", "--no-onnx", "-o", "out",
              "--format", "json")  # fmt: skip
    assert ran.code == 0, ran
    data = _json(ran)
    assert {e["kind"] for e in data["plan"]["edits"]} == {"fold-backward", "merge"}
    before, after = data["cost"]["before"], data["cost"]["after"]
    assert (before["norms"], before["weighted"]) == (2, 2)
    assert (after["norms"], after["weighted"]) == (0, 1)
    text = " ".join(cli("fold", "folded_nets.py:Branches", *INPUT, "--merge").stdout.split())
    assert "All 2 norms are folded (1 backwards, 1 merged)." in text
    assert "1 layer is merged into another." in text
    plain = cli("fold", "folded_nets.py:Branches", *INPUT)
    assert plain.code == 0
    assert "merge" not in plain.stdout


def test_a_graph_is_made_and_shown_but_not_written(cli, folder):
    words = ("fold", "folded_nets.py:Functional", *INPUT, "--emit", "graph")
    ran = cli(*words, "-o", "out")
    assert ran.code == 2, ran
    assert "--emit graph gives a graph" in ran.stderr
    assert "--emit module" in ran.stderr
    assert "--print-code" in ran.stderr
    assert not (folder / "out").exists()
    data = _json(cli(*words, "-o", "out", "--format", "json"))
    assert data["error"]["kind"] == "OptionsError"
    ran = cli(*words, "--print-code")
    assert ran.code == 0, ran
    assert "def forward(self, x):" in ran.stdout
    assert "batch_norm" not in ran.stdout.partition("def forward")[2]
    data = _json(cli(*words, "--format", "json"))
    before, after = data["cost"]["before"], data["cost"]["after"]
    assert (before["norms"], after["norms"]) == (1, 0)
    assert after["parameters"] == before["parameters"] - 8, "scale and shift of 4 channels"
    (folder / "plan.json").write_text(cli(*words, "--dry-run", "--format", "json").stdout)
    ran = cli("fold", "folded_nets.py:Functional", "--plan", "plan.json", "-o", "out")
    assert ran.code == 2, "the plan makes a graph too"


@pytest.mark.usefixtures("folder")
def test_diff_and_code_are_shown_in_a_dry_run_too(cli):
    for dry in ((), ("--dry-run",)):
        ran = cli("fold", *BLOCKS, *INPUT, "--diff", "--print-code", *dry)
        assert ran.code == 0, ran
        assert "-  (bn1): BatchNorm2d(" in ran.stdout
        assert "+  (bn1): Identity()" in ran.stdout
        assert "def forward(self, x):" in ran.stdout
        assert "= None" not in ran.stdout


@pytest.mark.usefixtures("folder")
def test_nothing_to_fold_is_no_error(cli):
    for target, words in (
        ("folded_nets.py:Plain", "Nothing to fold: no norm runs in this model's forward pass."),
        ("folded_nets.py:Stuck", "Nothing to fold: the one norm is left alone"),
    ):
        ran = cli("fold", target, *INPUT)
        assert ran.code == 0, ran
        assert words in ran.stdout
        assert "Before and after" not in ran.stdout
        assert ran.stdout.rstrip().splitlines()[-1].startswith("PASS")


def test_a_checkpoint_without_running_statistics_is_3(cli, folder, trained):
    state = {k: v for k, v in trained.state_dict().items() if "running" not in k}
    torch.save(state, folder / "half.pt")
    ran = cli("fold", "folded_nets.py:Blocks", "--weights", "half.pt", *INPUT, "-o", "out")
    assert ran.code == 3, ran
    assert "running_mean" in ran.stderr
    assert "--allow-missing '*.running_*'" in ran.stderr
    assert not (folder / "out").exists()


@pytest.mark.usefixtures("folder")
def test_what_cannot_be_right_is_2(cli):
    for words, said in (
        (("--emit", "onnx"), "'--emit'"),
        (("--benchmark", "--dry-run"), "--dry-run makes nothing that --benchmark could time"),
        (("--no-verify", "-o", "out"), "is unverified and is not written"),
        (("-o", "folded_nets.py"), "folded_nets.py"),
    ):
        ran = cli("fold", "folded_nets.py:Blocks", *INPUT, *words)
        assert ran.code == 2, ran
        assert said in ran.stderr
        assert "Traceback" not in ran.stderr


def test_an_unverified_result_is_kept_only_by_name(cli, folder):
    ran = cli("fold", *BLOCKS, *INPUT, "--no-verify", "--keep-failed", "-o", "out", "--no-onnx")
    assert ran.code == 0, ran
    assert "NOT VERIFIED" in ran.stdout
    assert not (folder / "out").exists()
    kept = json.loads((folder / "out.unverified" / "bnify.json").read_text())
    assert kept["verified"] is None


@pytest.fixture
def planted_fault(monkeypatch):
    """Folded models that come out wrong; ``planted_fault(2)``: where two norms are folded."""
    import bnify.folds

    real = bnify.folds.folded_copy

    def plant(least):
        def faulty(model, changes, **more):
            folded = real(model, changes, **more)
            if sum(change.kind == "identity" for change in changes.tree) >= least:
                with torch.no_grad():
                    folded.conv1.weight.mul_(1.5)
            return folded

        monkeypatch.setattr(bnify.folds, "folded_copy", faulty)

    return plant


def test_a_failed_verification_is_1_with_its_numbers_and_kept_only_when_asked(
    cli, folder, planted_fault
):
    planted_fault(2)  # no norm is at fault by itself: nothing can be undone
    ran = cli("fold", *BLOCKS, *INPUT, "-o", "out", "--no-onnx")
    assert ran.code == 1, ran
    assert ran.stdout.rstrip().splitlines()[-1].startswith("FAIL")
    assert "error: the fold was measured and found wrong" in ran.stderr
    assert not list(folder.glob("out*"))
    ran = cli("fold", *BLOCKS, *INPUT, "-o", "out", "--keep-failed", "--no-onnx", "--format=json")
    assert ran.code == 1, ran
    data = _json(ran)
    assert data["error"]["kind"] == "VerificationError"
    assert data["verification"]["passed"] is False
    assert "out.failed" in data["error"]["hint"]
    kept = json.loads((folder / "out.failed" / "bnify.json").read_text())
    assert kept["verified"] is False


@pytest.mark.usefixtures("folder")
def test_folds_that_fail_are_undone_and_listed(cli, planted_fault):
    planted_fault(1)
    ran = cli("fold", *BLOCKS, *INPUT)
    assert ran.code == 0, ran
    assert "Nothing to fold: all 4 norms are left alone" in ran.stdout
    assert "verification-failed" in ran.stdout


@pytest.mark.parametrize("kept", [(), ("-o", "out"), ("--emit", "graph")])
def test_the_benchmark_times_both_and_compares_the_files(cli, folder, kept):
    ran = cli("fold", *BLOCKS, *INPUT, "--benchmark", *kept, "--format", "json")
    assert ran.code == 0, ran
    data = _json(ran)
    assert [one["name"] for one in data["latency"]] == ["eager", "onnxruntime"]
    for one in data["latency"]:
        assert one["before"] > 0
        assert one["after"] > 0
        assert one["rounds"] >= 5
    before, after = data["onnx"]["before"], data["onnx"]["after"]
    # The exporter folds bn1 and bn2 into their convolutions; bn3 has none before it.
    assert after["nodes"] < before["nodes"]
    assert after["norms"] <= before["norms"]
    assert (folder / "out").exists() == ("-o" in kept)


def test_a_benchmark_of_what_cannot_be_exported_says_so(cli, folder):
    (folder / "odd.py").write_text(
        "import torch\nfrom folded_nets import Blocks\n\n\n"
        "class Branching(Blocks):\n"
        "    def forward(self, x):\n"
        "        y = super().forward(x)\n"
        "        return y if y.sum() > 0 else y + 1\n"
    )
    ran = cli("fold", "odd.py:Branching", *INPUT, "--benchmark")
    assert ran.code == 0, ran
    text = " ".join(ran.stdout.split())
    assert "Latency, eager" in text
    assert "Latency, onnxruntime" not in text
    assert "not timed as ONNX files" in text


def test_force_replaces_and_the_second_run_gives_the_same_folder(cli, folder):
    words = ("fold", *BLOCKS, *INPUT, "-o", "out", "--no-onnx", "--quiet")
    assert cli(*words).code == 0
    first = {p.name: p.read_bytes() for p in (folder / "out").iterdir()}
    assert cli(*words).code == 2
    assert cli(*words, "--force").code == 0
    assert {p.name: p.read_bytes() for p in (folder / "out").iterdir()} == first


def test_an_inserted_folder_can_be_folded(cli, folder):
    """What bnify inserted, bnify folds: a norm inside the class of its layer."""
    assert cli("insert", "folded_nets.py:Plain", *INPUT, "--include", "conv", "-o", "normed",
               "--no-onnx").code == 0  # fmt: skip
    ran = cli("fold", "normed", "-o", "out", "--no-onnx", "--format", "json")
    assert ran.code == 0, ran
    assert [e["layer"] for e in _json(ran)["plan"]["edits"]] == ["conv.norm"]
    x = torch.randn(3, 3, 9, 9)
    with torch.no_grad():
        assert torch.allclose(bnify.load("out")(x), bnify.load("normed")(x), atol=1e-5)
