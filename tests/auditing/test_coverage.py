"""What cannot be run is audited as far as it goes, and the report says how far that is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bnify
from bnify.errors import CaptureError, PlanError, UsageError

X = torch.randn(2, 3, 8, 8)
#: Rules that need a recorded forward pass, whatever else they need.
OF_A_PASS = {"BN201", "BN202", "BN205", "BN206", "BN207", "BN208", "BN210", "BN211", "BN404"}


class Net(nn.Module):
    """One block with a momentum from TensorFlow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.99)

    def forward(self, x):
        return self.n(self.a(x))


class Reads(Net):
    """It branches on a value, which a pass without values could not."""

    def forward(self, x):
        return super().forward(x * 2 if x.mean().item() > 100 else x)


class Raises(Net):
    def forward(self, x):
        raise ValueError("not today")


def codes(report: bnify.AuditReport) -> set[str]:
    return {finding.code for finding in report.findings}


def test_a_model_that_reads_values_is_recorded_on_values():
    report = bnify.audit(Reads(), X)
    assert {"BN201", "BN203"} <= codes(report)
    assert any("other inputs may take another path" in note for note in report.notes)
    assert not OF_A_PASS & set(report.unchecked)


@pytest.mark.parametrize(
    ("make", "why"),
    [(Raises, "not today"), (lambda: Net().to("meta"), "meta device")],
    ids=["raises", "meta"],
)
def test_a_model_that_does_not_run_is_audited_by_its_modules(make, why):
    report = bnify.audit(make(), X)
    assert "BN203" in codes(report)
    assert "BN201" not in codes(report)
    assert set(report.unchecked) >= OF_A_PASS
    assert all(why in report.unchecked[code] for code in OF_A_PASS - {"BN404"})
    assert any(why in note for note in report.notes)


def test_a_model_without_inputs_says_what_inputs_would_enable():
    report = bnify.audit(Net())
    assert set(report.unchecked) >= OF_A_PASS
    assert all("--input" in report.unchecked[code] for code in OF_A_PASS - {"BN404"})


def test_counting_norms():
    assert bnify.audit(nn.BatchNorm2d(3), X).norms == 1  # the root, which goes by its tensors
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    report = bnify.audit(net, X)
    assert (report.norms, report.others) == (1, 1)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: bnify.audit(Net, X), CaptureError, "no torch.nn.Module"),
        (lambda: bnify.audit(None), CaptureError, "no torch.nn.Module"),
        (lambda: bnify.audit(nn.DataParallel(Net()), X), PlanError, "wrapped by DataParallel"),
        (lambda: bnify.audit(Net(), X, precision="int4"), UsageError, "int4"),
        (lambda: bnify.audit(Net(), X, optimizer="sgd"), UsageError, "param_groups"),
        (lambda: bnify.audit(Net(), X, select=["BN9"]), UsageError, "fits no rule"),
    ],
)
def test_what_cannot_be_right_is_said_in_one_line(call, error, text):
    with pytest.raises(error, match=text) as raised:
        call()
    assert "\n" not in raised.value.message
    assert raised.value.hint


def test_rules_are_chosen_by_code_prefix_and_name():
    for select in ("BN203", ["bn20"], "momentum-out-of-range,BN1", ["ALL"]):
        assert "BN203" in codes(bnify.audit(Net(), X, select=select))
    assert "BN203" not in codes(bnify.audit(Net(), X, ignore="BN2"))
    assert bnify.audit(Net(), X, select="BN203").exit_code() == 1
    assert bnify.audit(Net(), X, select="BN201").exit_code() == 0
    assert bnify.audit(Net(), X, select="BN201").exit_code("info") == 1
