"""Reports on calibrations: the worst drift first, and everything that is odd."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bnify.calibrating.result import Calibrated, Calibration
from bnify.report import render


def norm(name: str, shift: float, ratio: float = 1.0, **more) -> Calibrated:
    before = torch.zeros(4, dtype=torch.float64)
    var = torch.ones(4, dtype=torch.float64)
    values = {
        "name": name,
        "kind": "BatchNorm2d",
        "count": 4096,
        "mean_before": before,
        "var_before": var / ratio,
        "mean": before + shift,
        "var": var,
        "eps": 0.0,
        "updated": True,
    }
    return Calibrated(**{**values, **more})


FOUND = Calibration(
    norms=(
        norm("layer1.bn", 0.25),
        norm("layer2.bn", 0.1, 9.0, notes=("only 512 values a channel",)),
        norm("layer3.bn", 0.0, notes=("only 64 values a channel",)),
        *(norm(f"head.{i}", 0, updated=False, notes=("it was not reached",)) for i in range(3)),
    ),
    batches=12,
    samples=384,
    ranks=2,
    accuracy_before=0.4,
    accuracy_after=0.983,
    notes=("DistributedSampler repeats 1 of 61 samples",),
)


def test_the_worst_comes_first():
    text = render(FOUND, "md", target="net.py:Net")
    assert text.startswith("# bnify calibrate  net.py:Net\n")
    assert (
        "3 norms got the statistics of 384 samples in 12 batches on 2 ranks; 3 left as they were."
        in text
    )
    assert "Accuracy on these batches: 0.400 before, 0.983 after." in text
    assert text.index("layer2.bn") < text.index("layer1.bn") < text.index("layer3.bn")
    row = next(line for line in text.splitlines() if line.startswith("| `layer2.bn`"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["4", "4,096", "0.1", "9"]
    assert "`head.0-2` | ×3 | it was not reached" in text
    assert "- layer2.bn: only 512 values a channel (and so on for 1 more norm)" in text
    assert "- DistributedSampler repeats 1 of 61 samples" in text


def test_it_fits_a_narrow_terminal_without_unicode():
    text = render(FOUND, "rich", width=80, encoding="ascii")
    assert max(map(len, text.splitlines())) <= 80
    text.encode("ascii")


def test_many_norms_are_cut_and_said_to_be():
    many = replace(FOUND, norms=tuple(norm(f"bn{i}", i / 10) for i in range(53)))
    text = render(many, "md")
    assert "bn33`" in text
    assert "bn32`" not in text
    assert "33 more norms drifted 3.2 σ in the mean and ×1 in the variance or less." in text


@pytest.mark.parametrize(("after", "worse"), [(0.39, True), (0.4, False)])
def test_a_loss_of_accuracy_is_said_plainly(after, worse):
    text = render(replace(FOUND, accuracy_after=after), "rich")
    assert ("It is worse" in text) == worse


def test_lost_statistics_have_no_number():
    lost = norm("bn", 0.0, var_before=torch.full((4,), float("nan"), dtype=torch.float64))
    text = render(Calibration(norms=(lost,), batches=1, samples=2), "md")
    assert "was not finite" in text
    assert "nan" not in text
    data = json.loads(render(Calibration(norms=(lost,)), "json"))
    assert data["norms"][0]["drift"] == "inf"


def test_nothing_to_calibrate():
    text = render(Calibration(batches=1, samples=2), "rich")
    assert "Nothing to calibrate: 2 samples in 1 batch, and no norm keeps running" in text
