"""What a watcher says, to whom, and what it refuses."""

from __future__ import annotations

import logging

import pytest
from loops import EVERY, batch, hooks_of, network, passes, sgd, train
from torch import nn

import bnify
from bnify.errors import CaptureError, UsageError, VerificationError
from bnify.watching import watch


def test_one_line_a_rule_on_stderr_and_each_finding_once(capsys):
    model = network()
    model[1].momentum = model[5].momentum = 0.99
    optimizer = sgd(model)
    with watch(model, every=5) as watcher:
        train(model, optimizer, 25)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "bnify watch: step 3: error BN203 momentum-out-of-range: 2 layers: 1 …: momentum 0.99 is "
        "not in (0, 0.5); running statistics are those of the last batch, or never move; "
        "fix: set momentum to 0.01 (1 - 0.99)\n"
    )
    assert [f.module for f in watcher.findings] == ["1", "5"]


def test_a_callback_gets_each_finding_and_stderr_nothing(capsys):
    model = network()
    model[1].momentum = model[5].momentum = 0.99
    got = []
    with watch(model, on_finding=got.append) as watcher:
        train(model, sgd(model), 3)
    assert tuple(got) == watcher.findings
    assert len(got) == 2
    assert capsys.readouterr().err == ""


def test_a_logger_gets_records(caplog, capsys):
    model = network()
    model[1].momentum = 0.99
    with watch(model, on_finding=logging.getLogger("mine")):
        train(model, sgd(model), 3)
    assert [(r.name, r.levelname) for r in caplog.records] == [("mine", "ERROR")]
    assert "BN203" in caplog.text
    assert capsys.readouterr().err == ""


def test_strict_raises_at_errors_only():
    model = network()
    optimizer = sgd(model)
    with pytest.raises(VerificationError, match="BN203") as caught:  # noqa: SIM117
        with watch(model, every=EVERY, strict=True) as watcher:
            train(model, optimizer, EVERY)
            passes(model, 12)
            train(model, optimizer, EVERY)
            assert {f.code for f in watcher.findings} == {"BN309"}
            model[1].momentum = 0.99
            train(model, optimizer, EVERY)
    assert "0.01" in caught.value.hint
    assert watcher.steps == 3 * EVERY
    assert hooks_of(model) == 0


def test_select_and_ignore():
    model = network()
    model[1].momentum = 0.99
    model[5].requires_grad_(False)
    for options, expected in [
        ({"select": ["BN2"]}, {"BN203"}),
        ({"ignore": ["momentum-out-of-range"]}, {"BN301"}),
    ]:
        with watch(model, **options) as watcher:
            assert {f.code for f in watcher.check()} == expected


@pytest.mark.parametrize(
    ("options", "text"),
    [
        *(({"every": n}, f"every={n!r}") for n in (0, -3, 1.5, float("nan"), True, "50", None)),
        ({"select": ["BN102"]}, "none of these rules"),
        ({"select": ["BN999"]}, "fits no rule"),
        ({"optimizer": object()}, "no torch.optim.Optimizer"),
    ],
)
def test_what_cannot_be_right(options, text):
    with pytest.raises(UsageError, match=text) as caught:
        watch(network(), **options)
    assert caught.value.hint


def test_a_class_is_no_model():
    with pytest.raises(CaptureError, match=r"no torch\.nn\.Module"):
        watch(nn.BatchNorm2d)
    with pytest.raises(CaptureError, match=r"the average is a type, no torch\.nn\.Module"):
        watch(network(), average=nn.BatchNorm2d)


def test_a_callback_that_raises_gets_all_the_same():
    model = network()
    model[1].momentum = model[5].momentum = 0.99
    got = []

    def tell(finding):
        got.append(finding.module)
        raise KeyError(finding.module)

    with pytest.raises(KeyError, match="5"), watch(model, on_finding=tell):
        train(model, sgd(model), 3)
    assert got == ["1", "5"]
    assert hooks_of(model) == 0


def test_an_ordinary_audit_says_what_would_enable_the_rule_of_loops():
    report = bnify.audit(network(), batch())
    assert "bnify.watch" in report.unchecked["BN309"]
    assert "T3" not in report.tiers
