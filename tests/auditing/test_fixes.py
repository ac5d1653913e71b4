"""Fixes: each is made on a copy, keeps the function, and is gone from the next audit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import bnify
import bnify.repairs
import laws
from bnify.audits import audit
from bnify.errors import NothingToFix, PlanError, VerificationError
from patterns.kit import Line
from replaying import assert_untouched, fingerprint_of

X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(3))


def faulty() -> nn.Module:
    """A redundant bias, a TensorFlow momentum, a half-frozen norm, a norm behind a norm."""
    torch.manual_seed(5)
    net = Line(
        a=nn.Conv2d(3, 8, 3), na=nn.BatchNorm2d(8, momentum=0.99), ta=nn.Tanh(),
        b=nn.Conv2d(8, 8, 3, bias=False), nb=nn.BatchNorm2d(8), nc=nn.BatchNorm2d(8),
        p=nn.AdaptiveAvgPool2d(1), f=nn.Flatten(), c=nn.Linear(8, 4),
    )  # fmt: skip
    for parameter in net.nb.parameters():
        parameter.requires_grad = False
    return laws.hostile_(net, 5).train()


def made(result) -> dict[str, str]:
    return {edit.layer: edit.kind for edit in result.plan.edits}


def test_safe_fixes_keep_the_function_and_end_the_findings():
    net = faulty().double()  # a float32 mean would round what it takes up
    before = fingerprint_of(net)
    report = audit(net, X.double())
    result = report.fix()
    assert_untouched(before, fingerprint_of(net))
    assert made(result) == {"na": "set-momentum", "a": "drop-bias", "nb": "keep-eval"}
    assert result.verification.passed
    assert result.verification.algebra < 1e-10
    laws.assert_same_function(net, result.model, X.double())
    left = {f.code for f in audit(result.model, X.double()).findings}
    assert left.isdisjoint({"BN201", "BN203", "BN301"})
    assert left <= {f.code for f in report.findings}


def test_train_mode_is_kept_too_where_a_bias_was_dropped():
    net = faulty()
    for parameter in net.parameters():
        parameter.requires_grad = True
    result = audit(net, X, select=["BN201"]).fix()
    want = laws.run64(net, X, train=True)
    assert laws.worst_error(want, laws.run64(result.model, X, train=True)) < 1e-6


def test_a_kept_norm_stays_in_eval_mode():
    result = audit(faulty(), X, select=["BN301"]).fix()
    for model in (
        result.model,
        copy.deepcopy(result.model),
        pickle.loads(pickle.dumps(result.model)),
    ):
        model.train()
        assert not model.nb.training
        assert model.na.training
        before = model.nb.running_mean.clone()
        model(X)
        assert torch.equal(model.nb.running_mean, before)
        assert isinstance(model.nb, nn.BatchNorm2d)
    assert type(result.strip().nb) is nn.BatchNorm2d


def test_an_eval_model_is_folded():
    net = faulty().eval()
    pair = audit(net, X, select=["BN208"]).fix()
    assert made(pair) == {"nb": "fold-backward"}
    assert isinstance(pair.model.nb, nn.Identity)
    assert isinstance(pair.model.nc, nn.BatchNorm2d)
    everything = audit(net, X, select=["BN401", "BN201"]).fix()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in everything.model.modules())
    assert everything.verification.passed
    assert torch.allclose(everything.model(X), net(X), atol=1e-5)


@pytest.mark.parametrize("fold", [False, True])
def test_a_fixed_model_is_saved_and_loaded(tmp_path, fold):
    net = faulty().train(not fold)
    result = audit(net, X).fix()
    result.save(tmp_path / "out", onnx=False)
    loaded = bnify.load(tmp_path / "out", model=faulty())
    assert torch.equal(loaded(X), result.model.eval()(X))
    if fold:
        assert isinstance(loaded.na, nn.Identity)
    else:
        assert loaded.na.momentum == 0.01
        assert not loaded.train().nb.training


def test_half_precision_statistics_become_float(tmp_path):
    net = laws.hostile_(Line(a=nn.Conv2d(3, 8, 3, bias=False), n=nn.BatchNorm2d(8))).bfloat16()
    report = audit(net, X.bfloat16(), select=["BN107"])
    assert [f.module for f in report.findings] == ["n"]
    result = report.fix()
    assert made(result) == {"n": "float-statistics"}
    assert result.model.n.running_var.dtype is torch.float32
    assert result.model.a.weight.dtype is torch.bfloat16
    assert result.model(X.bfloat16()).dtype is torch.bfloat16
    result.save(tmp_path / "out", onnx=False)
    fresh = Line(a=nn.Conv2d(3, 8, 3, bias=False), n=nn.BatchNorm2d(8)).bfloat16()
    loaded = bnify.load(tmp_path / "out", model=fresh)
    assert loaded.n.running_var.dtype is torch.float32
    assert torch.equal(loaded(X.bfloat16()), result.model.eval()(X.bfloat16()))


def test_nothing_to_fix_is_said():
    clean = Line(a=nn.Conv2d(3, 4, 3, bias=False), r=nn.ReLU())
    with pytest.raises(PlanError, match="there are no findings"):
        audit(clean, X).fix()
    with pytest.raises(PlanError, match="no forward pass was recorded"):
        audit(faulty()).fix()
    unused = Line(a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4, eps=1e-3), m=nn.BatchNorm2d(4))
    with pytest.raises(PlanError, match="BN204 have no safe fix"):
        audit(unused, X, select=["BN204"]).fix()


def test_only_findings_are_fixed():
    """What was ignored, by code or by the report's reader, stays."""
    result = audit(faulty(), X, ignore=["BN203", "BN301"]).fix()
    assert made(result) == {"a": "drop-bias"}
    assert result.model.na.momentum == 0.99


def test_a_fix_that_changes_the_function_is_not_returned(monkeypatch):
    real = bnify.repairs._moving_bias

    def wrong(path, means, drop):
        act = real(path, means, drop)

        def planted(model):
            act(model)
            with torch.no_grad():
                model.na.running_mean[0] += 1e-3

        return planted

    monkeypatch.setattr(bnify.repairs, "_moving_bias", wrong)
    with pytest.raises(VerificationError, match="change the function"):
        audit(faulty(), X, select=["BN201"]).fix()


def test_a_dropped_bias_makes_no_untrained_model_look_trained():
    net = Line(
        a=nn.Conv2d(3, 4, 3),
        n=nn.BatchNorm2d(4),
        r=nn.ReLU(),
        b=nn.Conv2d(4, 4, 3, bias=False),
        m=nn.BatchNorm2d(4),
    ).train()
    result = audit(net, X, select=["BN201"]).fix()
    left = audit(result.model, X, select=["BN102"]).findings
    assert [(f.module, f.severity) for f in left] == [("", "info")] or not left


@pytest.mark.parametrize("seed", laws.seeds(25))
def test_safe_fixes_of_random_networks(seed):
    """The law: whatever can be fixed keeps the function; the audited model is as it was."""
    net, x = laws.random_network(seed)
    before = fingerprint_of(net)
    report = audit(net, x)
    if not any(f.code in ("BN201", "BN203", "BN301") for f in report.findings):
        return
    result = report.fix()
    assert_untouched(before, fingerprint_of(net))
    assert result.verification.passed
    assert {e.layer for e in result.plan.edits}
    left = {(f.code, f.module) for f in audit(result.model, x).findings}
    fixed = {(f.code, f.module) for f in report.findings if f.code in ("BN201", "BN203", "BN301")}
    assert not left & fixed


# -- fixes that change the function ----------------------------------------------------------------


def test_a_vanishing_channel_is_set_to_zero_only_when_asked():
    net = laws.hostile_(Line(a=nn.Conv2d(3, 8, 3, bias=False), n=nn.BatchNorm2d(8), r=nn.ReLU()))
    with torch.no_grad():
        net.n.weight.fill_(1.0)
        net.n.running_var.fill_(1.0)
        net.n.running_var[2] = 1e-9
    report = audit(net, X, select=["BN105"])
    assert [f.safety for f in report.findings] == ["unsafe"]
    with pytest.raises(NothingToFix):
        report.fix()
    result = report.fix(unsafe=True)
    assert made(result) == {"n": "zero-channels"}
    assert result.model.n.weight.tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
    assert not audit(result.model, X, select=["BN105"]).findings or (
        audit(result.model, X, select=["BN105"]).findings[0].severity == "info"
    )


def lost_statistics() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A classifier that is right with the statistics of its data, which it has lost."""
    torch.manual_seed(7)
    net = Line(
        a=nn.Linear(6, 16, bias=False), n=nn.BatchNorm1d(16), r=nn.ReLU(), b=nn.Linear(16, 3)
    )
    draw = torch.Generator().manual_seed(7)
    x = 5 + 4 * torch.randn(8, 64, 6, generator=draw)
    with torch.no_grad():
        net.n.weight.uniform_(0.5, 1.5)
        net.n.bias.uniform_(-1, 1)
        net.train()
        net.n.momentum = None
        for batch in x:
            net(batch)
        net.n.momentum = 0.1
        net.eval()
        logits = net(x.flatten(0, 1))
        net.b.bias -= logits.mean(0)  # no class of its own has it easy
        batches = [(batch, net(batch).argmax(1)) for batch in x]
        net.n.reset_running_stats()
    return net, batches


def test_recalibration_is_made_where_it_was_proved():
    net, batches = lost_statistics()
    report = audit(net, data=batches, select=["BN1", "BN3"])
    assert {f.code for f in report.findings} >= {"BN102", "BN305"}
    with pytest.raises(NothingToFix):
        report.fix()
    result = report.fix(unsafe=True)
    assert made(result) == {"n": "recalibrate"}
    assert any("accuracy" in note for note in result.plan.notes)
    right = sum(int((result.model.eval()(x).argmax(1) == y).sum()) for x, y in batches)
    assert right / 512 > 0.99
    assert not audit(result.model.eval(), data=batches, select=["BN1", "BN3"]).findings


def test_recalibration_that_does_not_help_is_not_made():
    net, batches = lost_statistics()
    wrong = [(x, net(x).argmax(1)) for x, _ in batches]  # right with what seems to be lost
    report = audit(net, data=wrong, select=["BN102"])
    with pytest.raises(NothingToFix):
        report.fix(unsafe=True)
