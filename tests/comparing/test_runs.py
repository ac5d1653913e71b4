"""Whole comparisons: equal bits, killed and resumed, interrupted, cut, and hostile models."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import bnify
from bnify.errors import PlanError, SpecError, UsageError
from bnify.report import render
from bnify.report.comparison_html import to_html

NET = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 12)
        self.b = nn.Linear(12, 12)
        self.c = nn.Linear(12, 3)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def blobs(samples=240, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (samples,), generator=generator)
    x = torch.randn(samples, 6, generator=generator)
    x[torch.arange(samples), y] += 1.5
    return x, y


def datasets():
    return blobs(240, 0), blobs(80, 1), blobs(80, 2)
"""
OPTIONS = ["--norms", "none,batch,layer", "--seeds", "3", "--tuning-seeds", "1", "--epochs", "12"]
OPTIONS += ["--lrs", "0.03,0.3", "--batch-size", "16", "--budget", "0"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def net():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def blobs(samples=240, seed=0, classes=3):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (samples,), generator=generator)
    x = torch.randn(samples, 6, generator=generator)
    x[torch.arange(samples), y] += 1.5
    return x, y


def datasets():
    return blobs(240, 0), blobs(80, 1), blobs(80, 2)


def quick(factory=net, data=datasets, **options):
    given = {
        "norms": ("none", "batch", "layer"),
        "seeds": 3,
        "tuning_seeds": 1,
        "epochs": 4,
        "lrs": (0.03, 0.3),
        "batch_size": 16,
        "budget": 0,
    }
    return bnify.compare(factory, data, **(given | options))


def command(folder, *more):
    words = [sys.executable, "-m", "bnify", "compare", "net.py:Net", "--data", "net.py:datasets"]
    return [*words, *OPTIONS, "-o", str(folder), *more]


def run(where, folder, *more, code=0):
    done = subprocess.run(
        command(folder, *more), cwd=where, env=ONE_THREAD, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def where(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    where = tmp_path_factory.mktemp("whole")
    (where / "net.py").write_text(NET)
    run(where, "out", "--jobs", "1")
    return reproducible(where / "out")


def reproducible(folder):
    """A comparison's figures without what the wall clock has a part in."""
    data = json.loads((folder / "report.json").read_text())
    return without_clock(data.get("comparison", data))


def without_clock(data):
    data = dict(data)
    data.pop("seconds")
    data.pop("files", None)
    data["environment"] = {k: v for k, v in data["environment"].items() if k != "engine"}
    data["arms"] = [
        {k: v for k, v in arm.items() if not k.startswith("step_")} for arm in data["arms"]
    ]
    data["measures"] = [m for m in data["measures"] if m["name"] != "time"]
    # Two of the claims are about time, and Holm's correction is over all of them.
    timed = ("trains-faster", "affine-reduces-cost")
    data["claims"] = [
        {**c, "figure": c["figure"].split(" (p = ")[0], "p": None}
        for c in data["claims"]
        if c["name"] not in timed
    ]
    return data


def test_one_process_and_two_give_the_same_numbers(where, uninterrupted):
    run(where, "two", "--jobs", "2")
    assert reproducible(where / "two") == uninterrupted


def test_another_seed_gives_other_numbers():
    figures = [without_clock(quick(seed=seed).to_dict()) for seed in (0, 0, 1)]
    assert figures[0] == figures[1]
    assert figures[0]["measures"] != figures[2]["measures"]


@pytest.mark.slow
def test_killed_ten_times_and_resumed_it_ends_in_the_same_figures(where, uninterrupted):
    random_wait = random.Random(5)
    folder, killed, begun = where / "out", 0, 0
    while killed < 10:
        begun += 1
        assert begun < 40, f"{killed} of {begun} kills met a running process"
        process = subprocess.Popen(
            command("out", "--jobs", "2", *_more(folder)),
            cwd=where,
            env=ONE_THREAD,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        # At most one more trial a time, so that there is something left to kill ten times.
        before = count(folder)
        while process.poll() is None and count(folder) == before and begun > 1:
            time.sleep(0.01)
        time.sleep(random_wait.uniform(0, 0.15) + 2 * (begun == 1))
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        if process.returncode == -signal.SIGKILL:
            killed += 1
            continue
        assert process.returncode == 0, said.decode()  # too late: it was done, and begins anew
        assert reproducible(folder) == uninterrupted
        shutil.rmtree(folder)
    run(where, "out", "--jobs", "2", *_more(folder))
    assert reproducible(folder) == uninterrupted


def _more(folder):
    started = (folder / "run.json").exists()
    return ["--resume"] if started else ["--force"] if folder.exists() else []


def count(folder):
    return len(list((folder / "trials").glob("*.json"))) if (folder / "trials").exists() else 0


def test_interrupted_it_reports_what_there_is_and_goes_on(where, uninterrupted):
    process = subprocess.Popen(
        command("out", "--jobs", "2"),
        cwd=where,
        env=ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    while count(where / "out") < 9 and process.poll() is None:  # tuned, and a first seed
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted after" in out
    assert "--resume" in err
    assert "Traceback" not in err
    partial = json.loads((where / "out" / "report.json").read_text())
    assert partial["partial"].startswith("interrupted after")
    assert (where / "out" / "report.html").exists()
    run(where, "out", "--resume")
    assert reproducible(where / "out") == uninterrupted


def test_a_resumed_run_that_is_complete_trains_nothing(where):
    run(where, "out")
    before = {p.name: p.stat().st_mtime_ns for p in (where / "out" / "trials").iterdir()}
    run(where, "out", "--resume")
    assert {p.name: p.stat().st_mtime_ns for p in (where / "out" / "trials").iterdir()} == before


def test_another_question_is_not_resumed(where):
    run(where, "out")
    said = run(where, "out", "--resume", "--seeds", "4", code=2).stderr
    assert "seeds" in said
    (where / "net.py").write_text(NET + "\n# changed\n")
    said = run(where, "out", "--resume", code=2).stderr
    assert "the file of the model has changed" in said
    assert "exists already" in run(where, "out", code=2).stderr


def test_a_budget_that_ends_cuts_whole_seeds_and_says_so(tmp_path):
    result = quick(epochs=150, seeds=6, budget=9, output=tmp_path / "out")
    assert result.cuts
    assert result.seconds < 9 + 4
    assert len(result.seeds) >= 1
    for measure in result.measures:
        assert len(measure.values) == len(result.seeds)
    again = quick(epochs=150, seeds=6, budget=9, output=tmp_path / "out", resume=True)
    assert again.cuts == result.cuts
    assert without_clock(again.to_dict()) == without_clock(result.to_dict())


def test_a_budget_too_small_for_anything_says_how_much_it_takes():
    with pytest.raises(SpecError, match=r"budget of 1 s is too small .* takes about"):
        quick(epochs=3000, budget=1)


def taking_advice(error, *args, **options):
    """Compare with the budget that an error names; again if the machine got busier meanwhile."""
    for _ in range(3):
        advised = float(re.search(r"--budget (\S+),", error.hint)[1])
        try:
            return quick(*args, budget=advised, **options)
        except SpecError as again:
            error = again
    raise error


def test_a_budget_that_ends_before_one_seed_is_refused_with_one_that_is_enough():
    """Tuning takes most of it: at a pace that the first steps do not show."""
    with pytest.raises(SpecError, match="is too small") as caught:
        quick(Slow, epochs=4, budget=2, norms=("none", "batch"))
    assert caught.value.exit_code == 3
    assert "0.0 s" not in caught.value.message
    result = taking_advice(caught.value, Slow, epochs=4, norms=("none", "batch"))
    assert len(result.seeds) >= 2


def test_a_budget_that_a_report_would_use_up_is_refused_too(tmp_path):
    options = {"epochs": 2, "norms": ("none", "batch")}
    with pytest.raises(SpecError, match="too small to train one seed of every norm") as caught:
        quick(budget=4, output=tmp_path / "out", **options)
    result = taking_advice(caught.value, output=tmp_path / "out", force=True, **options)
    assert len(result.seeds) >= 2


def test_a_small_budget_is_not_kept_for_a_report_that_nobody_wants():
    assert len(quick(epochs=2, seeds=3, budget=6, norms=("none", "batch")).seeds) == 3


class Slow(nn.Sequential):
    """Each evaluation waits, which the pilot does not time."""

    def __init__(self):
        super().__init__(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x):
        if not self.training:
            time.sleep(0.02)
        return super().forward(x)


# -- what cannot be compared -----------------------------------------------------------------------


class Plain(nn.Module):
    """Nothing to normalize."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6, 3))

    def forward(self, x):
        return x @ self.scale


def test_a_model_without_layers_is_refused_in_one_line():
    with pytest.raises(PlanError) as caught:
        quick(Plain)
    assert "\n" not in caught.value.message


def test_one_class_is_refused():
    parts = [(x, torch.zeros_like(y)) for x, y in datasets()]
    with pytest.raises(SpecError, match="class"):
        quick(data=lambda: parts)


def test_a_loss_that_is_never_finite_is_refused():
    with pytest.raises(SpecError, match="not finite at the first step"):
        quick(loss=lambda output, _: output.sum() * float("nan"))


def test_a_loss_that_raises_is_told():
    with pytest.raises(SpecError, match="no such loss"):
        quick(loss=_raise)


def _raise(output, targets):
    raise ValueError("no such loss")


class Leaving(nn.Sequential):
    """Ends the program after some steps."""

    after, steps = 0, 0

    def __init__(self):
        super().__init__(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x):
        Leaving.steps += self.training
        if self.training and Leaving.steps > Leaving.after:
            raise SystemExit(3)
        return super().forward(x)


@pytest.mark.parametrize("after", [0, 8, 30])
def test_a_model_that_ends_the_program_is_told(after, monkeypatch):
    monkeypatch.setattr(Leaving, "after", after)
    monkeypatch.setattr(Leaving, "steps", 0)
    with pytest.raises(SpecError, match=r"SystemExit\(3\)"):
        quick(Leaving, norms=("none", "batch"))


def test_fewer_samples_than_a_batch_are_refused():
    with pytest.raises(SpecError, match="a batch of 512 is more than the 240 training samples"):
        quick(batch_size=512)


def test_an_arm_that_diverges_is_told_and_the_others_go_on():
    """Inputs of 1e12 overflow in a few steps, unless a norm brings them back."""
    big = tuple((x * 1e12, y) for x, y in datasets())
    result = quick(data=lambda: big, norms=("none", "batch"), lrs=(0.01,))
    arms = {arm.norm: arm for arm in result.arms}
    assert arms["none"].left_out
    assert "diverged" in arms["none"].left_out
    assert "\n" not in arms["none"].left_out
    assert not arms["batch"].left_out
    assert result.measure("batch", "metric") is not None


@pytest.mark.parametrize("norms", [("none",), ("none", "instance"), ("none", "as-is")])
def test_one_arm_is_no_comparison(norms):
    with pytest.raises((SpecError, PlanError)) as caught:
        quick(norms=norms)
    assert "nothing to compare none with" in caught.value.message or "no norm" in str(caught.value)


class Stateful(nn.Sequential):
    """A module with extra state, which is no tensor."""

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        pass


def test_a_model_with_extra_state_is_compared():
    layers = lambda: Stateful(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))  # noqa: E731
    assert quick(layers, norms=("none", "batch"), seeds=2).measure("batch", "metric") is not None


def test_a_model_that_refuses_a_batch_size_of_the_sweep_is_told():
    class Picky(nn.Sequential):
        def forward(self, x):
            if self.training and len(x) == 8:
                raise ValueError("not eight")
            return super().forward(x)

    with pytest.raises(SpecError, match="not eight"):
        quick(
            lambda: Picky(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)),
            sweep=("batch",),
            batch_sizes=(8, 16),
        )


def test_norms_that_have_no_place_are_told_and_the_others_go_on():
    result = quick(norms=("none", "batch", "instance"))
    arms = {arm.norm: arm for arm in result.arms}
    assert "one-value-per-channel" in arms["instance"].left_out
    assert result.measure("batch", "metric") is not None


def test_a_model_with_norms_is_compared_as_it_is():
    def normed():
        return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))

    result = quick(normed, norms=("batch", "layer", "none"))
    assert result.reference == "as-is"
    assert {m.norm for m in result.measures} == {"as-is", "layer", "none"}


def test_a_regression_is_compared_by_its_loss():
    parts = [(x, x[:, :1] * 2) for x, _ in datasets()]
    result = quick(
        lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 1)), data=lambda: parts
    )
    assert (result.task, result.metric, result.higher_is_better) == ("regression", "loss", False)
    found = result.measure("none", "metric")
    assert found is not None
    assert all(value < 4 for value in found.values)


def test_all_sweeps_have_their_cells():
    result = quick(norms=("none", "batch"), sweep=("lr", "batch", "init"), seeds=2, epochs=2)
    axes = {axis: {c.at for c in result.grid if c.axis == axis} for axis in ("lr", "batch", "init")}
    assert axes == {
        "lr": {0.03, 0.3},
        "batch": {2.0, 8.0, 32.0, 128.0},
        "init": {0.1, 0.3, 1.0, 3.0, 10.0},
    }


def test_the_callers_model_and_threads_are_left_alone():
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    result = quick(model)
    assert any("same weights" in note for note in result.notes)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("options", "said"),
    [({"jobs": 0}, "jobs=0"), ({"resume": True}, "no folder"), ({"device": "tpu"}, "device")],
)
def test_options_that_cannot_be_right_are_refused_before_any_work(options, said):
    with pytest.raises(UsageError, match=said):
        quick(**options)


def test_progress_counts_up_and_ends():
    seen = []
    quick(progress=seen.append)
    training = [p for p in seen if p.doing == "training" and p.total]
    assert training[-1].done == training[-1].total
    assert [p.done for p in training] == sorted(p.done for p in training)
    assert all(p.left is None or p.left >= 0 for p in training)


def test_interrupted_anywhere_it_still_reports():
    """Ctrl-C after each of the runs in turn: before tuning is done, and before a seed is whole."""
    left = total = 0

    def interrupt(progress):
        nonlocal left
        left -= progress.total > 0
        if left == 0:
            raise KeyboardInterrupt

    while True:
        left = total + 1
        result = quick(progress=interrupt, seeds=2, norms=("none", "batch"))
        assert result.to_dict()
        assert render(result, "rich")
        assert to_html(result)
        if not result.partial:
            break
        total += 1
    assert total >= 8
