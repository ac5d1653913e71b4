"""``bnify calibrate`` from options to report and folder."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import bnify
from bnify.calibrations import calibrate
from trained import Images, batches, train

NET = """
import torch
from trained import Images as Net
from trained import batches


def labelled():
    print("user: loading")
    return batches(32, 12)


def images():
    return [x for x, _ in batches(32, 12)]


def nothing():
    return []


def infinite():
    while True:
        yield from batches(32, 12)


class Told(torch.utils.data.TensorDataset):
    def __getitem__(self, index):
        print("user: image", index)
        return super().__getitem__(index)


data = Told(*map(torch.cat, zip(*batches(32, 12))))
generator = torch.Generator().manual_seed(0)
own_order = torch.utils.data.DataLoader(data, 32, shuffle=True, generator=generator)


def bad():
    return [*images(), images()[0].repeat(1, 3, 1, 1)]
"""


@pytest.fixture(scope="module")
def stale():
    """A trained network whose statistics are those of other data."""
    model = train(Images)
    with torch.no_grad():
        for norm in (model.bn1, model.bn2, model.bn3):
            norm.running_mean.add_(norm.running_var.sqrt() * 2)
            norm.running_var.mul_(5)
    return model


@pytest.fixture
def weights(stale, user):
    (user / "images.py").write_text(NET)
    save_file(stale.state_dict(), user / "stale.safetensors")
    return "--weights", "stale.safetensors"


def test_statistics_are_written_and_reported(cli, user, weights, stale):
    ran = cli(
        *("calibrate", "images.py:Net", *weights, "--data", "images.py:labelled"),
        *("-o", "out", "--format", "json"),
    )
    assert ran.code == 0, ran.stderr
    assert "user: loading" in ran.stderr
    said = json.loads(ran.stdout)
    assert (said["schema"], said["verb"], said["batches"], said["samples"]) == (
        1,
        "calibrate",
        12,
        384,
    )
    assert said["accuracy"]["before"] < 0.8 < 0.95 < said["accuracy"]["after"]
    assert said["verification"]["passed"]
    assert said["environment"]["hashes"]["checkpoint"]
    assert set(said["files"]) == {"weights", "recipe", "onnx", "report"}
    assert {path.name for path in (user / "out").iterdir()} == {
        "model.safetensors",
        "bnify.json",
        "model.onnx",
        "report.json",
    }
    written = load_file(user / "out" / "model.safetensors")
    want = Images()
    want.load_state_dict(stale.state_dict())
    calibrate(want, batches(32, 12))
    for name, tensor in want.state_dict().items():
        assert torch.equal(written[name], tensor), name
    report = json.loads((user / "out" / "report.json").read_text())
    assert [norm["name"] for norm in report["norms"]] == ["bn1", "bn2", "bn3"]
    assert report["export"]["verification"]["passed"]
    loaded = bnify.load(user / "out")
    x = batches(32, 1)[0][0]
    assert torch.equal(loaded(x), want.eval()(x))
    assert bnify.verify(loaded, user / "out" / "model.onnx", x).passed


def test_a_person_reads_the_drift_and_what_it_was_worth(cli, weights):
    ran = cli("calibrate", "images.py:Net", *weights, "--data", "images.py:labelled")
    assert ran.code == 0, ran.stderr
    assert "3 norms got the statistics of 384 samples in 12 batches." in ran.stdout
    assert "Accuracy on these batches: 0." in ran.stdout
    assert "Drift, the worst first" in ran.stdout
    assert ran.stdout.index("bn1") > 0
    assert "PASS" in ran.stdout
    again = cli(
        *("calibrate", "images.py:Net", *weights, "--data", "images.py:images"),
        *("--format", "md", "--batches", 3),
    )
    assert again.code == 0, again.stderr
    assert "96 samples in 3 batches" in again.stdout
    assert "Accuracy" not in again.stdout
    assert "- bn3: only 96 values a channel" in again.stdout


def test_an_early_end_is_told_of(cli, weights):
    ran = cli(
        *("calibrate", "images.py:Net", *weights, "--data", "images.py:images"),
        *("--tolerance", 0.2),
    )
    assert ran.code == 0, ran.stderr
    assert "stopped after 8 batches" in ran.stdout
    assert "Std. error" in ran.stdout


def test_accuracy_is_on_the_batches_that_were_used_and_on_no_others(cli, weights, stale):
    words = ("calibrate", "images.py:Net", *weights, "--format", "json")
    ran = cli(*words, "--data", "images.py:infinite", "--tolerance", 0.2)
    assert ran.code == 0, ran.stderr
    said = json.loads(ran.stdout)
    used = batches(32, 12)[: said["batches"]]
    assert said["batches"] == 8
    assert said["accuracy"] == pytest.approx(both(stale, used))
    ran = cli(*words, "--data", "images.py:own_order", "--batches", 2)
    assert ran.code == 0, ran.stderr
    order = [int(number) for number in re.findall(r"user: image (\d+)", ran.stderr)]
    assert order[-64:] == order[-128:-64] != order[:64]  # the example, calibration, accuracy
    x, y = map(torch.cat, zip(*batches(32, 12), strict=True))
    used = [(x[taken], y[taken]) for taken in torch.tensor(order[-64:]).split(32)]
    assert json.loads(ran.stdout)["accuracy"] == pytest.approx(both(stale, used))


def both(stale, used) -> dict[str, float]:
    """Accuracy before and after."""
    after = Images()
    after.load_state_dict(stale.state_dict())
    calibrate(after, used)
    return {"before": right(stale, used), "after": right(after.eval(), used)}


@torch.no_grad()
def right(model, used) -> float:
    found = [(model(x).argmax(1) == y).double() for x, y in used]
    return float(torch.cat(found).mean())


def test_a_folder_can_be_calibrated_again(cli, user, weights):
    first = ("calibrate", "images.py:Net", *weights, "--data", "images.py:images", "--no-onnx")
    assert cli(*first, "-o", "out").code == 0
    ran = cli("calibrate", "out", "--data", "images.py:images", "-o", "again", "--no-onnx")
    assert ran.code == 0, ran.stderr
    assert {path.name for path in (user / "again").iterdir()} == {
        "model.safetensors",
        "bnify.json",
        "report.json",
    }
    one, two = (load_file(user / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert cli(*first, "-o", "out").code == 2
    assert cli(*first, "-o", "out", "--force").code == 0


def test_statistics_that_a_checkpoint_lacks_or_lost(cli, user, weights, stale):
    state = {n: t for n, t in stale.state_dict().items() if not n.startswith("bn2.running")}
    state["bn1.running_var"] = torch.full((8,), float("nan"))
    save_file(state, user / "lost.safetensors")
    ran = cli(
        *("calibrate", "images.py:Net", "--weights", "lost.safetensors"),
        *("--data", "images.py:labelled", "--format", "json"),
    )
    assert ran.code == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["accuracy"]["after"] > 0.95
    assert said["norms"][0]["drift"] == "inf"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((), 2, "statistics are taken from data"),
        (("--data", "images.py:images", "--batches", 0), 2, "at least one is needed"),
        (("--data", "images.py:images", "--tolerance", 3), 2, "--tolerance 3.0 is no share"),
        (("--data", "images.py:nothing"), 3, "yields no batch"),
        (("--data", "images.py:missing"), 3, "missing"),
        (("--data", "images.py:bad"), 3, "RuntimeError on batch 12 of the data"),
        (("--data", "images.py:images", "--device", "cuda:99"), 3, "cuda"),
    ],
)
def test_what_cannot_be_done(cli, user, weights, words, code, says):
    ran = cli("calibrate", "images.py:Net", *weights, *words, "-o", "out")
    assert ran.code == code, ran.stderr
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""
    assert not (user / "out").exists()


def test_a_model_without_norms(cli, user):
    ran = cli("calibrate", "net.py:Quiet", "--data", "net.py:loader", "--batches", 2)
    assert ran.code == 0, ran.stderr
    assert "Nothing to calibrate" in ran.stdout


def test_outputs_that_are_not_finite_are_refused(cli, user):
    (user / "tiny.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.bn = nn.BatchNorm1d(2, eps=0.0)\n"
        "    def forward(self, x):\n"
        "        return self.bn(x * torch.tensor([1.0, 0.0]))\n"
        "def loader():\n"
        "    return [torch.randn(8, 2) for _ in range(3)]\n"
    )
    ran = cli("calibrate", "tiny.py:Net", "--data", "tiny.py:loader", "-o", "out")
    assert ran.code == 1, ran.stderr
    assert "the calibrated model is not used: not finite: output" in ran.stderr
    assert "FAIL" in ran.stdout
    assert not (user / "out").exists()
