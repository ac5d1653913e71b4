"""``bnify compare`` as a user meets it: options, streams, formats, exit codes, files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from bnify.cli.options import Optimizer, Task
from bnify.comparing.question import BATCH_SIZES, INIT_SCALES, NORMS, OPTIMIZERS, Question

TRAIN = """
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        print("user: building")
        self.a, self.b = nn.Linear(4, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def datasets():
    print("user: data")
    parts = []
    for seed, samples in enumerate((120, 40, 40)):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(samples, 4, generator=generator)
        parts.append((x, (x[:, 0] + x[:, 1] > 0).long()))
    return parts


def loss(output, targets):
    print("user: loss")
    return nn.functional.cross_entropy(output, targets)
"""
QUICK = ["--norms", "none,batch", "--seeds", "2", "--tuning-seeds", "1", "--epochs", "1"]
QUICK += ["--lrs", "0.1", "--batch-size", "8", "--budget", "0", "--jobs", "1"]
COMPARE = ["compare", "train.py:Small", "--data", "train.py:datasets", *QUICK]


@pytest.fixture(autouse=True)
def train(user):
    (user / "train.py").write_text(TRAIN)


def test_the_result_alone_is_on_stdout(cli):
    ran = cli(*COMPARE, "--loss", "train.py:loss", "--arg", "width=16")
    assert ran.code == 0, ran.stderr
    assert ran.stdout.startswith("bnify compare")
    assert "user:" not in ran.stdout
    assert "user: building" in ran.stderr
    assert "2 seeds over 1 norm cannot reach p < 0.05: 6 seeds can" in ran.stdout


def test_json_is_data_and_says_the_same_as_the_files(cli, user):
    ran = cli(*COMPARE, "-o", "out", "--format", "json")
    data = json.loads(ran.stdout)
    assert (data["schema"], data["verb"]) == (1, "compare")
    assert [arm["norm"] for arm in data["arms"]] == ["none", "batch"]
    written = json.loads((user / "out" / "report.json").read_text())
    assert written["measures"] == data["measures"]
    with (user / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    metric = next(m for m in data["measures"] if m["name"] == "metric" and m["norm"] == "batch")
    found = [
        float(row["value"])
        for row in rows
        if (row["norm"], row["measure"], row["setting"]) == ("batch", "metric", "best-lr")
    ]
    assert found == metric["values"]
    assert len(list((user / "out" / "trials").iterdir())) == 6


def test_markdown_and_quiet(cli):
    ran = cli(*COMPARE, "--format", "md", "--quiet")
    assert ran.stdout.startswith("# bnify compare")
    assert "note:" not in ran.stderr


def test_an_output_is_neither_overwritten_nor_mixed_with_other_files(cli, user):
    assert cli(*COMPARE, "-o", "out").code == 0
    again = cli(*COMPARE, "-o", "out")
    assert again.code == 2
    assert "--resume" in again.stderr
    assert cli(*COMPARE, "-o", "out", "--force").code == 0
    (user / "out" / "mine.txt").write_text("precious")
    refused = cli(*COMPARE, "-o", "out", "--force")
    assert refused.code == 2
    assert "mine.txt" in refused.stderr
    assert Path("out/mine.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare"], "missing argument 'SPEC'"),
        (["compare", "train.py:Small"], "no data to train on"),
        ([*COMPARE, "--norms", "none,bath"], "unknown norm 'bath'"),
        ([*COMPARE, "--norms", ""], "no norms to compare"),
        ([*COMPARE, "--lrs", "a,b"], "--lrs a,b are not numbers"),
        ([*COMPARE, "--lrs", "-1"], "lrs are numbers above 0"),
        ([*COMPARE, "--batch-sizes", "2.5"], "--batch-sizes 2.5 are not whole numbers"),
        ([*COMPARE, "--sweep", "depth"], "unknown sweep 'depth'"),
        ([*COMPARE, "--seeds", "1"], "seeds=1 is out of range"),
        ([*COMPARE, "--budget", "soon"], "--budget soon is not a number"),
        ([*COMPARE, "--jobs", "0"], "jobs=0"),
        ([*COMPARE, "--engine", "slurm"], "unknown engine 'slurm'"),
        ([*COMPARE, "--device", "gpu"], "unknown device 'gpu'"),
        ([*COMPARE, "--resume"], "-o, which is missing"),
        ([*COMPARE, "--resume", "-o", "nowhere"], "nowhere"),
        ([*COMPARE, "--data", "digit"], "did you mean digits"),
        ([*COMPARE, "--data", "mnist"], "names no folder"),
        ([*COMPARE, "--image-size", "16"], "image_size=16"),
    ],
)
def test_wrong_command_lines_are_refused_in_one_line(cli, user, words, message):
    ran = cli(*words)
    assert ran.code == 2, ran
    assert ran.stdout == ""
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ran.stderr
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert {path.name for path in user.iterdir()} <= {"net.py", "train.py"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "train.py:Smal", "--data", "train.py:datasets"], "did you mean"),
        (["compare", "train.py:Small", "--data", "train.py:nothing"], "has no 'nothing'"),
        (["compare", "train.py:Small", "--data", "mnist:nowhere"], "there is no folder"),
        ([*COMPARE, "--loss", "train.py:Lost"], "has no 'Lost'"),
        ([*COMPARE, "--batch-size", "500"], "more than the 120 training samples"),
        (["compare", "net.py:NoLayer", "--data", "train.py:datasets"], "NoLayer"),
        (["compare", "net.py:Raises", "--data", "train.py:datasets"], "no such luck"),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(cli, words, message):
    ran = cli(*words, "--jobs", "1")
    assert ran.code == 3, ran
    assert ran.stdout == ""
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_words_of_the_options_are_those_of_python(cli):
    assert [word.value for word in Optimizer] == list(OPTIMIZERS)
    assert {word.value for word in Task} == {"auto", "classification", "regression"}
    import inspect

    from bnify.cli.compare import compare as verb
    from bnify.comparisons import compare

    given, ours = inspect.signature(verb).parameters, inspect.signature(compare).parameters
    assert given["norms"].default == ",".join(NORMS)
    assert given["batch_sizes"].default == ",".join(map(str, BATCH_SIZES))
    assert given["init_scales"].default == ",".join(f"{scale:g}" for scale in INIT_SCALES)
    question = Question()
    for name in ("seeds", "budget", "epochs", "batch_size", "momentum", "tuning_seeds", "target"):
        assert given[name].default == ours[name].default == getattr(question, name), name
