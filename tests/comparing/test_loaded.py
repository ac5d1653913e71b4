"""A run goes on with the network, the data, the loss and the code that it began with, or not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from comparing.test_runs import ONE_THREAD, datasets, net, quick
from torch import nn
from torch.utils.data import Dataset

from bnify.comparing.run_folder import RunFolder
from bnify.errors import UsageError

FEW = {"norms": ("none", "batch"), "seeds": 2, "epochs": 1, "lrs": (0.1,)}


def begun(tmp_path, model=net, data=datasets, **options):
    """A finished run, and what goes on with it."""
    folder = tmp_path / "out"
    quick(model, data, output=folder, **FEW, **options)
    return lambda model=model, data=data, **more: quick(
        model, data, output=folder, resume=True, **FEW, **(options | more)
    )


def refused(resume, match, *given, **more):
    with pytest.raises(UsageError, match=match) as caught:
        resume(*given, **more)
    assert "\n" not in caught.value.message


def test_other_weights_are_another_network(tmp_path):
    torch.manual_seed(0)
    first, second = net(), net()
    resume = begun(tmp_path, first)
    resume(first)
    refused(resume, "the network is another", second)
    with torch.no_grad():
        second.load_state_dict(first.state_dict())
    resume(second)
    second[1] = nn.Tanh()
    refused(resume, "the network is another", second)


def test_a_number_that_a_module_keeps_is_part_of_the_network(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(net(), nn.Dropout(0.1))
    resume = begun(tmp_path, model)
    model[1].p = 0.4
    refused(resume, "the network is another", model)


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("which", [0, 1], ids=["inputs", "targets"])
def test_one_number_of_the_data_is_enough(part, which, tmp_path):
    data = datasets()
    resume = begun(tmp_path, data=data)
    resume(data=datasets())
    data[part][which][-1] += 1 if which == 0 else -data[part][1][-1] or 1
    name = ("training", "validation", "test")[part]
    refused(resume, f"the {name} data are others", data=data)


def test_numbers_of_the_loss_are_compared(tmp_path):
    resume = begun(tmp_path, loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    resume(loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    refused(resume, "the loss is another", loss=nn.CrossEntropyLoss(label_smoothing=0.2))


class Items(Dataset):
    """Samples with noise that is drawn anew each time."""

    def __init__(self, part, own=False):
        self.part, self.own = part, torch.Generator().manual_seed(0) if own else None

    def __len__(self):
        return len(self.part[0])

    def __getitem__(self, index):
        x, y = self.part
        return x[index] + 0.1 * torch.randn(6, generator=self.own), int(y[index])


def test_a_dataset_of_torchs_noise_goes_on_and_other_samples_do_not(tmp_path):
    resume = begun(tmp_path, data=[Items(part) for part in datasets()])
    resume(data=[Items(part) for part in datasets()])
    shifted = [Items((x + 1, y)) for x, y in datasets()]
    refused(resume, "the training data are others", data=shifted)


def test_a_dataset_that_cannot_be_repeated_can_be_resumed(tmp_path):
    begun(tmp_path, data=[Items(part, own=True) for part in datasets()])()


def test_a_folder_that_does_not_say_what_it_was_made_with_is_refused(tmp_path):
    resume = begun(tmp_path)
    (tmp_path / "out" / "loaded.json").unlink()
    refused(resume, "does not say which data and network")


def test_killed_before_anything_was_measured_it_begins(tmp_path):
    resume = begun(tmp_path)
    for file in (tmp_path / "out").rglob("*.json"):
        if file.name != "run.json":
            file.unlink()
    assert resume().measures


# -- source files ----------------------------------------------------------------------------------

NET = """\
from torch import nn
from {parts} import WIDTH


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x):
        return super().forward(x) * WIDTH
"""
DATA = """\
import torch
from more import SEED


def datasets():
    generator = torch.Generator().manual_seed(SEED)
    draw = lambda n: (torch.randn(n, 6, generator=generator), torch.arange(n) % 3)
    return draw(60), draw(30), draw(30)
"""


def _compare(where, spec, *more):
    words = [sys.executable, "-m", "bnify", "compare", spec, "--data", "data/d.py:datasets"]
    words += ["--norms", "none,batch", "--seeds", "2", "--tuning-seeds", "1", "--lrs", "0.1"]
    words += ["--epochs", "1", "--batch-size", "8", "--budget", "0", "--jobs", "1", "-o", "out"]
    return subprocess.run(
        [*words, *more], cwd=where, env=ONE_THREAD, capture_output=True, encoding="utf-8"
    )


@pytest.mark.parametrize("spec", ["net.py:Net", "pkg.net:Net"])
def test_a_changed_helper_module_is_named(spec, tmp_path):
    folder = tmp_path / "pkg" if spec.startswith("pkg") else tmp_path
    folder.mkdir(exist_ok=True)
    (tmp_path / "data").mkdir()
    (folder / "__init__.py").touch()
    (folder / "net.py").write_text(NET.format(parts=".parts" if folder.name == "pkg" else "parts"))
    (folder / "parts.py").write_text("WIDTH = 1.0\n")
    (tmp_path / "data" / "d.py").write_text(DATA)
    (tmp_path / "data" / "more.py").write_text("SEED = 0\n")
    done = _compare(tmp_path, spec)
    assert done.returncode == 0, done.stderr
    other_spelling = f"./{spec}" if folder == tmp_path else spec
    done = _compare(tmp_path, other_spelling, "--resume")
    assert done.returncode == 0, done.stderr
    (folder / "parts.py").write_text("WIDTH = 2.0\n")
    done = _compare(tmp_path, spec, "--resume")
    assert done.returncode == 2
    assert "the file parts.py has changed since" in done.stderr
    (folder / "parts.py").write_text("WIDTH = 1.0\n")
    (tmp_path / "data" / "more.py").write_text("SEED = 0 \n")
    assert "the file more.py has changed since" in _compare(tmp_path, spec, "--resume").stderr


def test_the_digests_are_replaced_with_the_run(tmp_path):
    torch.manual_seed(0)
    begun(tmp_path, net())
    result = quick(net(), datasets, output=tmp_path / "out", force=True, **FEW)
    assert result.measures
    assert RunFolder(tmp_path / "out").read("loaded")
