"""Recalibration is exact, proved on a copy, and leaves the audited model as it is."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnify
from bnify.auditing.live import Live
from bnify.auditing.measured import measure
from bnify.auditing.proved import with_proof
from bnify.auditing.recalibrate import proof, recalibratable, recalibrated
from bnify.auditing.subject import Subject
from bnify.structure import Call
from trained import Frozen, Functional, Images, batches, train


@pytest.fixture(scope="module")
def healthy():
    return train(Images)


def measured_on(model, data):
    return measure(Live.of(model, Call((batches()[0][0],))), data, 8)


def losing(model, *paths, mean=0.0, var=1.0):
    model = copy.deepcopy(model)
    for path in paths:
        model.get_submodule(path).running_mean.fill_(mean)
        model.get_submodule(path).running_var.fill_(var)
    return model


def accuracy(model, data):
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in data) / sum(
            len(y) for _, y in data
        )


FAULTS = {
    "lost": lambda net: losing(net, "bn1", "bn2", "bn3"),
    "one lost": lambda net: losing(net, "bn2"),
    "far": lambda net: losing(net, "bn1", mean=50.0, var=1e-3),
    "nan": lambda net: losing(net, "bn2", var=float("nan")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_proof_is_what_the_copy_does(healthy, fault):
    net = FAULTS[fault](healthy)
    measured = measured_on(net, batches())
    got = measured.proof
    assert got.measure == "accuracy"
    assert got.helps
    assert (got.batches, got.samples, got.norms) == (8, 256, 3)
    want = accuracy(net, batches())
    assert got.before == pytest.approx(0.0 if fault == "nan" else want)
    better = recalibrated(net, measured)
    assert got.after == pytest.approx(accuracy(better, batches()))
    assert got.after > 0.95
    report = bnify.audit(net, data=batches())
    gap = next(f for f in report.findings if f.code == "BN305")
    assert gap.fix == f"recalibrate: accuracy {got.before:.3f} -> {got.after:.3f} on a copy"
    assert gap.values["proof"] == got.to_dict()
    assert gap.safety == "data"


def test_statistics_do_not_rest_on_wrong_ones_before_them(healthy):
    good = recalibrated(healthy, measured_on(healthy, batches()))
    far = losing(healthy, "bn1", mean=50.0, var=1e-3)
    again = recalibrated(far, measured_on(far, batches()))
    for name, tensor in good.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_first_statistics_are_those_of_the_data(healthy):
    data = batches()
    better = recalibrated(healthy, measured_on(healthy, data))
    with torch.no_grad():
        inputs = healthy.conv1(torch.cat([x for x, _ in data])).double()
    assert torch.allclose(better.bn1.running_mean.double(), inputs.mean((0, 2, 3)), rtol=1e-5)
    assert torch.allclose(better.bn1.running_var.double(), inputs.var((0, 2, 3)), rtol=1e-5)
    changed = {
        name
        for name, tensor in better.state_dict().items()
        if not torch.equal(tensor, healthy.state_dict()[name])
    }
    assert changed == {f"bn{i}.running_{what}" for i in (1, 2, 3) for what in ("mean", "var")}


def test_a_recalibrated_model_counts_as_converged(healthy):
    net = losing(healthy, "bn1", "bn2", "bn3")
    for norm in (net.bn1, net.bn2, net.bn3):
        norm.num_batches_tracked.fill_(3)
    report = bnify.audit(net, data=batches())
    under = [f for f in report.findings if f.code == "BN104"]
    assert len(under) == 3
    assert all(f.values["proof"]["helps"] for f in under)
    better = recalibrated(net, measured_on(net, batches()))
    assert int(better.bn1.num_batches_tracked) == 29
    again = bnify.audit(better, data=batches())
    assert not {"BN102", "BN104", "BN305", "BN306"} & {f.code for f in again.findings}


def test_where_it_does_not_help_the_fix_says_so(healthy):
    class Idle(nn.Module):
        """A norm that drifts, and is scaled by 0."""

        def __init__(self) -> None:
            super().__init__()
            self.idle, self.net = nn.BatchNorm2d(1), copy.deepcopy(healthy)
            self.idle.weight.data.zero_()
            self.idle.running_mean.fill_(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x + self.idle(x))

    report = bnify.audit(Idle().eval(), data=batches())
    drift = next(f for f in report.findings if f.code == "BN306")
    assert (drift.module, drift.severity, drift.safety) == ("idle", "warning", "advice")
    assert drift.fix.startswith("recalibration does not help here: accuracy 0.9")
    assert not drift.values["proof"]["helps"]


def test_without_labels_modes_are_compared(healthy):
    net = losing(healthy, "bn1", "bn2", "bn3")
    got = measured_on(net, [x for x, _ in batches()]).proof
    assert got.measure == "agreement"
    assert got.before < 0.9 < 0.95 < got.after
    assert "agreement with norms in train mode" in got.sentence


def test_outputs_without_classes_are_compared_by_distance(healthy):
    net = losing(healthy, "bn1", "bn2", "bn3")
    net.fc2 = nn.Linear(32, 1)
    got = measured_on(net, [(x, y.float()) for x, y in batches()]).proof
    assert got.measure == "distance"
    assert got.helps
    assert got.after < 0.5 * got.before
    report = bnify.audit(net, data=[(x, y.float()) for x, y in batches()])
    drift = [f for f in report.findings if f.code == "BN306"]
    assert len(drift) == 3
    assert all("recalibrate: distance" in f.fix for f in drift)


def test_functional_norms_and_constants():
    net = train(Functional)
    net.mean.zero_()
    net.var.fill_(1)
    measured = measured_on(net, batches())
    assert recalibratable(measured) == ("norm", "scale")
    better = recalibrated(net, measured)
    assert not torch.equal(better.mean, net.mean)
    assert measured.proof.after == pytest.approx(accuracy(better, batches()))

    images = train(Images)
    images.bn2 = Frozen(images.bn2)
    measured = measured_on(images, batches())
    assert recalibratable(measured) == ("bn1", "bn3")
    assert torch.equal(recalibrated(images, measured).bn2.running_var, images.bn2.running_var)


def test_a_repaired_copy_gets_statistics_of_its_own(healthy):
    net = losing(healthy, "bn1", "bn2", "bn3")
    measured = measured_on(net, batches())
    repaired = copy.deepcopy(net)
    repaired.conv1.bias = None  # as --fix drops it
    better = recalibrated(repaired, measured)
    own = recalibrated(net, measured)
    moved = own.bn1.running_mean - net.conv1.bias
    assert torch.allclose(better.bn1.running_mean, moved, atol=1e-6)
    got = proof(repaired, better, measured)
    assert got.after == pytest.approx(measured.proof.after)


def test_tracked_instance_norm_keeps_its_own_kind_of_statistics():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)).mean((2, 3))

    net = Net().eval()
    nn.init.normal_(net.norm.weight)
    data = [x for x, _ in batches()]
    better = recalibrated(net, measured_on(net, data))
    with torch.no_grad():
        inputs = net.conv(torch.cat(data)).double()
    assert torch.allclose(better.norm.running_mean.double(), inputs.mean((0, 2, 3)), atol=1e-6)
    want = inputs.var((2, 3)).mean(0)  # what PyTorch averages: variances of samples
    assert torch.allclose(better.norm.running_var.double(), want, rtol=1e-5)


class Stateful(nn.Module):
    """Draws random numbers in eval mode, counts its calls, keeps a norm in train mode."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = F.dropout(x, 0.01, training=True)
        x = x + 0 * random.random() + 0 * np.random.standard_normal()  # noqa: NPY002
        return self.inner(x)


def drawn():
    return np.random.get_state()[1].tolist()  # noqa: NPY002 - the global one is the law here


@pytest.mark.parametrize("train_mode", [True, False])
def test_the_model_and_its_surroundings_stay_as_they_are(healthy, train_mode):
    net = Stateful(losing(healthy, "bn1", "bn2", "bn3")).train(train_mode)
    net.inner.bn2.train(not train_mode)
    net.inner.bn1.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(net.state_dict())
    tensors = {name: id(tensor) for name, tensor in net.state_dict(keep_vars=True).items()}
    modes = [module.training for module in net.modules()]
    states = torch.get_rng_state(), random.getstate(), drawn()
    data = batches()
    copies = copy.deepcopy(data)
    report = bnify.audit(net, data=iter(data))
    assert any("proof" in f.values for f in report.findings)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert {n: id(t) for n, t in net.state_dict(keep_vars=True).items()} == tensors
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert drawn() == states[2]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    assert sum(hooks) == 1
    assert all(
        torch.equal(a, b)
        for x, y in zip(data, copies, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_a_one_shot_iterator_is_read_once_and_no_further(healthy):
    read = []

    def loader():
        for batch in batches(count=8) * 2:
            read.append(1)
            yield batch

    data = loader()
    report = bnify.audit(losing(healthy, "bn2"), data=data, batches=8)
    assert len(read) == 8
    assert any(f.code == "BN305" and f.values["proof"]["batches"] == 8 for f in report.findings)
    assert len(list(data)) == 8  # the rest is the caller's


def test_the_proof_is_computed_once_and_only_where_it_is_wanted(healthy, monkeypatch):
    from bnify.auditing import recalibrate

    calls = []
    real = recalibrate.proof
    monkeypatch.setattr(recalibrate, "proof", lambda *a: calls.append(1) or real(*a))
    bnify.audit(healthy, data=batches())
    assert calls == []
    bnify.audit(losing(healthy, "bn1", "bn2", "bn3"), data=batches())
    assert calls == [1]


def test_both_modes_draw_the_same_numbers_and_batches_do_not():
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(10, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            return 1e-3 * self.norm(x.flatten(1)[:, :10]) + torch.randn(len(x), 10)

    measured = measured_on(Drawing(), batches())
    assert measured.agreement > 0.99
    said = [tuple(one.tolist()) for one in measured.kept.said]
    assert len(set(said)) == len(said) == 8


def test_a_finding_without_data_stays_as_it_is(healthy):
    finding = next(f for f in bnify.audit(losing(healthy, "bn2")).findings if f.code == "BN102")
    assert with_proof(finding, Subject()) is finding
    assert "proof" not in finding.values
