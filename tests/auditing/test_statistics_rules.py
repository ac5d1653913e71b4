"""BN102 to BN108 and BN307: each fires on its fault, and is silent on what only looks like it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bnify.auditing.engine import chosen, run_rules
from bnify.auditing.finding import Severity
from bnify.auditing.rules import RULES
from bnify.auditing.state import NormState
from bnify.auditing.subject import Subject
from bnify.audits import audit


def norm(path="bn", channels=8, seed=0, **changes):
    """A healthy trained norm; changes are vectors or single values for all channels."""
    draw = np.random.default_rng([seed, *path.encode()])
    vectors = {
        "mean": draw.normal(size=channels),
        "var": draw.uniform(0.5, 2, channels),
        "weight": draw.uniform(0.5, 1.5, channels),
        "bias": draw.normal(size=channels),
    }
    for name in vectors.keys() & changes.keys():
        value = changes.pop(name)
        vectors[name] = None if value is None else np.full(channels, value, dtype=np.float64)
    return NormState(path=path, **vectors, **{"batches": 1000, **changes})


def fresh(path="bn", **changes):
    return norm(path, **{"mean": 0, "var": 1, "weight": 1, "bias": 0, "batches": 0, **changes})


def found(code, *norms, **given_):
    """``(severity, module)`` of each finding of a rule, and the findings."""
    subject = Subject(kind="checkpoint", norms=norms, **given_)
    findings = run_rules(subject, chosen([code])).findings
    for finding in findings:
        assert finding.code == code
        assert "\n" not in finding.message
    return [(str(f.severity), f.module) for f in findings]


def message(code, *norms, **given_):
    subject = Subject(kind="checkpoint", norms=norms, **given_)
    (finding,) = run_rules(subject, chosen([code])).findings
    return finding.message


def test_healthy_norms_are_silent():
    norms = tuple(norm(f"bn{i}", seed=i) for i in range(4))
    assert run_rules(Subject(kind="checkpoint", norms=norms), RULES).findings == ()


# -- BN102 ---------------------------------------------------------------------------------------


def test_102_beside_an_updated_norm():
    assert found("BN102", norm("a"), fresh("b"), fresh("c")) == [("error", "b"), ("error", "c")]
    assert "while 1 of 2 norms are updated" in message("BN102", norm("a"), fresh("b"))


@pytest.mark.parametrize("moved", [{"weight": [1, 1, 1, 2]}, {"bias": [0, 0, 0, 1e-30]}])
def test_102_its_own_parameters_have_moved(moved):
    assert found("BN102", fresh("a", channels=4, **moved), fresh("b")) == [("error", "a")]


def test_102_an_untrained_model_is_one_note():
    zero = fresh("b", weight=0)  # the last norm of a residual branch, by design
    assert found("BN102", fresh("a"), zero, fresh("c", weight=None, bias=None)) == [("info", "")]
    assert "untrained: all 3 norms" in message("BN102", fresh("a"), zero, fresh("c"))
    assert found("BN102") == []


@given(st.integers(0, 7), st.sampled_from(["mean", "var"]))
def test_102_one_channel_that_moved_by_the_least_is_an_update(channel, which):
    start = {"mean": 0.0, "var": 1.0}[which]
    vector = np.full(8, start)
    vector[channel] = np.nextafter(np.float32(start), np.float32(9))
    assert found("BN102", norm("a"), fresh("b", **{which: vector})) == []


def test_102_traps():
    assert found("BN102", norm("a", batches=0), norm("b", batches=0)) == []  # a ported checkpoint
    constant = fresh("b", frozen=True, bias=3)  # statistics folded into scale and shift
    assert found("BN102", norm("a"), constant) == []
    assert found("BN102", fresh("a"), norm("b", frozen=True)) == [("info", "")]


# -- BN104 ---------------------------------------------------------------------------------------


@given(
    batches=st.integers(1, 400),
    momentum=st.floats(0.001, 0.4),
    values=st.floats(-3, 3),
)
@settings(max_examples=30, deadline=None)
def test_104_what_is_left_is_what_torch_leaves(batches, momentum, values):
    module = nn.BatchNorm1d(1, momentum=momentum, dtype=torch.float64)
    module.running_mean.fill_(1)  # an initial part that shows
    for _ in range(min(batches, 60)):
        module(torch.zeros(2, 1, dtype=torch.float64))
    n = int(module.num_batches_tracked)
    (finding,) = audit(module, select=["BN104"]).findings or (None,)
    left = float(module.running_mean)
    assert (finding is not None) == (left > 0.05)
    if finding is not None:
        assert finding.values["left"] == pytest.approx(left)
        assert f"after {n} batches" in finding.message


def test_104_traps():
    assert found("BN104", norm(batches=28)) == [("warning", "bn")]
    assert found("BN104", norm(batches=29)) == []
    assert found("BN104", norm(batches=0), norm("b", batches=None)) == []
    assert found("BN104", norm(batches=3, momentum=None)) == []  # a true average
    assert found("BN104", norm(batches=3, momentum=0.0)) == []  # BN203's
    assert found("BN104", norm(batches=3, frozen=True)) == []
    assert "momentum 0.0003" in message("BN104", norm(batches=50, momentum=0.0003))
    assert "e-" not in message("BN104", norm(batches=50, momentum=0.00003))


# -- BN105 ---------------------------------------------------------------------------------------


def channels(value, *, rest=1.0, at=3, count=8):
    vector = np.full(count, rest)
    vector[at] = value
    return vector


def test_105_magnified_and_only_counted():
    loud = norm(var=channels(1e-9), weight=1)
    assert found("BN105", loud) == [("warning", "bn")]
    assert "a gain of up to 316 in 1 of 8 channels" in message("BN105", loud)
    # 1/sqrt(eps) = 316 times as loud, and a scale 1/100 as large: below 10 × the median.
    quiet = norm(var=channels(1e-9), weight=channels(0.01))
    assert found("BN105", quiet) == [("info", "bn")]
    assert "in 1 of 8 channels, none with a gain above 10 × the median" in message("BN105", quiet)


def test_105_traps():
    assert found("BN105", norm(var=channels(2e-5), weight=1)) == []  # above eps
    assert found("BN105", norm(var=channels(2e-5), weight=1, eps=1e-3)) == [("warning", "bn")]
    assert found("BN105", norm(var=1e-9, weight=1)) == [("info", "bn")]  # all alike: no outlier
    assert found("BN105", norm(var=channels(-1.0)), norm("b", var=channels(np.nan))) == []
    assert found("BN105", norm(weight=channels(1e4))) == []  # a large scale alone


# -- BN106 ---------------------------------------------------------------------------------------


def test_106_channels_and_whole_layers():
    assert found("BN106", norm(weight=channels(9e-4))) == [("info", "bn")]
    assert found("BN106", norm(weight=channels(-9e-4))) == [("info", "bn")]  # by its size
    assert found("BN106", norm("a"), norm("b", weight=0)) == [("warning", "b")]
    assert found("BN106", norm("a"), norm("c"), norm("b", weight=1e-9)) == [("warning", "b")]
    text = message("BN106", norm("a"), norm("b", weight=0))
    assert text.startswith("all 8 channels are dead")


def test_106_traps():
    # 16 of the 53 scales of a fresh resnet50 are 0 by design.
    zeros = [fresh(f"bn{i}", weight=0 if i < 16 else 1) for i in range(53)]
    assert found("BN106", *zeros) == []
    assert found("BN106", norm(weight=None, bias=None)) == []
    assert found("BN106", norm(weight=channels(1.1e-3))) == []
    assert found("BN106", norm(weight=1e-6)) == []  # small throughout: there is no other measure
    assert found("BN106", norm(weight=channels(np.nan))) == []


# -- BN107 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_107_low_precision(dtype):
    assert found("BN107", norm(dtype=dtype), norm("b")) == [("warning", "bn")]


def test_107_where_it_cannot_work():
    assert found("BN107", norm(dtype="bfloat16", momentum=0.01)) == [("error", "bn")]
    assert found("BN107", norm(dtype="bfloat16", momentum=2.0**-6)) == [("warning", "bn")]
    assert found("BN107", norm(dtype="bfloat16", momentum=0.01, frozen=True)) == [("info", "bn")]
    assert found("BN107", norm(dtype="float16", var=channels(3.1e4))) == [("error", "bn")]
    assert found("BN107", norm(dtype="float16", var=channels(2.9e4))) == [("warning", "bn")]
    assert found("BN107", norm(dtype="bfloat16", var=channels(1e6))) == [("warning", "bn")]


def test_107_a_bfloat16_average_stops_short_of_a_small_momentum():
    """The bound of the page: it stops within 1/(256·m) of the value, and not before 1/(512·m)."""
    for momentum in (1 / 16, 1 / 64, 1 / 128):
        average = torch.tensor(1.0, dtype=torch.bfloat16)
        value = 1 + 1 / (512 * momentum)
        for _ in range(10_000):
            moved = ((1 - momentum) * average.float() + momentum * value).bfloat16()
            if moved == average:
                break
            average = moved
        assert abs(float(average) - value) >= 1 / (512 * momentum) * 0.99


def test_107_traps():
    assert found("BN107", norm(dtype="float32"), norm("b", dtype="float64")) == []


# -- BN108 ---------------------------------------------------------------------------------------


def test_108_uneven_counts():
    norms = [norm(f"bn{i}", batches=1000) for i in range(5)]
    assert found("BN108", *norms, norm("twice", batches=2000)) == [("info", "twice")]
    assert found("BN108", *norms, norm("half", batches=500)) == [("info", "half")]
    assert found("BN108", *norms, norm("near", batches=1499), norm("by", batches=501)) == []


def test_108_traps():
    norms = [norm(f"bn{i}", batches=1000) for i in range(5)]
    assert found("BN108", *norms, norm("ported", batches=0), norm("none", batches=None)) == []
    assert found("BN108", *[norm(f"bn{i}", batches=0) for i in range(3)]) == []
    assert found("BN108", norm(batches=-5)) == []
    # A model and its average in one file: each is measured by itself.
    average = [norm(f"ema.bn{i}", batches=10, part="ema") for i in range(2)]
    assert found("BN108", *norms, *average) == []


# -- BN307 ---------------------------------------------------------------------------------------


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def trained(model, steps=20):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 4) * 3 + 1).square().sum().backward()
        optimizer.step()
    return model


def test_307_an_average_of_parameters_only():
    model = network()
    average = copy.deepcopy(model)
    trained(model)
    with torch.no_grad():
        for own, other in zip(average.parameters(), model.parameters(), strict=True):
            own.lerp_(other, 0.5)
    (finding,) = audit(average, reference=model, select=["BN307"]).findings
    assert (finding.severity, finding.module) == (Severity.ERROR, "1")
    assert "model that was averaged has others, of 20 batches" in finding.message


@pytest.mark.parametrize("buffers", [True, False])
def test_307_torch_s_averaged_model(buffers):
    model = network()
    average = AveragedModel(model, use_buffers=buffers)
    trained(model)
    average.update_parameters(model)
    assert audit(average, reference=model, select=["BN307"]).findings == ()
    average.module[1].reset_running_stats()
    (finding,) = audit(average, reference=model, select=["BN307"]).findings
    assert finding.module == "module.1"


def test_307_traps():
    model = network()
    average = copy.deepcopy(model)
    assert audit(average, reference=model, select=["BN307"]).findings == ()  # both untrained
    trained(model)
    assert audit(average, reference=model, select=["BN307"]).findings == ()  # not begun
    assert audit(model, reference=average, select=["BN307"]).findings == ()  # the other way round
    report = audit(model, select=["BN307"])
    assert "--reference" in report.unchecked["BN307"]
    other = audit(nn.BatchNorm1d(3), reference=model, select=["BN307"])
    assert other.findings == ()
    assert any("no norm of Sequential has the path" in note for note in other.notes)


def test_307_without_scale_and_shift_the_other_parameters_count():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, affine=False))
    average = copy.deepcopy(model)
    trained(model)
    with torch.no_grad():
        average[0].weight.lerp_(model[0].weight, 0.5)
    assert len(audit(average, reference=model, select=["BN307"]).findings) == 1
