"""Audits by data: lost and foreign statistics are found, and drift alone is no fault."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnify
from bnify.auditing.live import Live
from bnify.auditing.measured import measure
from bnify.structure import Call
from trained import Frozen, Functional, Images, batches, digits, train

DATA = ("BN303", "BN305", "BN306")


@pytest.fixture(scope="module")
def healthy():
    return train(Images)


@pytest.fixture(scope="module")
def functional():
    return train(Functional)


def found(model, data, **options):
    report = bnify.audit(model, data=data, **options)
    return report, {(f.code, f.module): f for f in report.findings if f.code in DATA}


def lost(model, *paths):
    model = copy.deepcopy(model)
    for path in paths:
        norm = model.get_submodule(path)
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
    return model


def images(data):
    return [x for x, _ in data]


# -- clean controls -------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [True, False])
def test_a_healthy_net_has_no_finding_by_data(healthy, labelled):
    report, data = found(healthy, batches() if labelled else images(batches()))
    assert data == {}
    assert report.tiers == ("T0", "T1", "T2")
    assert not {"BN303", "BN305", "BN306"} & set(report.unchecked)
    assert any(note == "8 batches of data, 256 samples" for note in report.notes)
    assert any(("accuracy" if labelled else "no labels") in note for note in report.notes)


def test_drift_alone_is_no_error():
    # Trap 11: inputs three times as large; the divergence is that of lost statistics.
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )
    report, data = found(train(net), batches(scale=3))
    assert set(data) == {("BN306", "1")}
    drift = data["BN306", "1"]
    assert drift.severity == "warning"
    assert drift.values["divergence"] > 1
    assert "check preprocessing" in drift.message
    assert report.exit_code() == 0


def test_both_modes_bad_is_no_normalization_problem(healthy):
    wrong = [(x, (y + 1 + torch.arange(len(y)) % 8) % 10) for x, y in batches()]
    report, data = found(lost(healthy, "bn2"), wrong)
    assert not any(code == "BN305" for code, _ in data)
    assert not any(f.severity == "error" for f in data.values())
    assert any("not a normalization problem" in note for note in report.notes)


@pytest.mark.parametrize("labelled", [True, False])
def test_an_untrained_net_is_not_judged(labelled):
    report, data = found(Images().eval(), batches() if labelled else images(batches()))
    assert not {"BN305", "BN306"} & {code for code, _ in data}
    assert any("untrained" in note for note in report.notes)


def test_predictions_at_random_are_noise_and_no_fault():
    # Settled statistics and weights as initialised: any two batches say something else.
    torch.manual_seed(0)
    net = Images()
    with torch.no_grad():
        for x, _ in batches() * 12:
            net.train()(x)
    _, data = found(net.eval(), images(batches()))
    assert data["BN305", ""].severity == "info"
    assert "noise" in data["BN305", ""].message
    assert not any(f.severity == "error" for f in data.values())


def test_sorted_batches_are_no_fault_of_the_statistics(healthy):
    # In train mode each batch of one class is normalized away; eval mode is the better one.
    x, y = digits()
    sorted_ = [(x[y == k][:32], y[y == k][:32]) for k in range(8)]
    measured = measure(Live.of(healthy, Call((x[:8],))), sorted_, 8)
    assert measured.accuracy > measured.train_accuracy + 0.1
    assert not {c for c, _ in found(healthy, sorted_)[1]} & {"BN305"}


# -- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [True, False])
def test_lost_statistics(healthy, labelled):
    data = batches() if labelled else images(batches())
    report, by_data = found(lost(healthy, "bn1", "bn2", "bn3"), data)
    gap = by_data["BN305", ""]
    assert gap.severity == "error"
    assert "BN102" in gap.message
    assert "threshold" in gap.message
    assert {("BN306", p) for p in ("bn1", "bn2", "bn3")} < set(by_data)
    assert all(f.severity == "error" for f in by_data.values())
    assert gap.values["proof"]["measure"] == ("accuracy" if labelled else "agreement")
    assert "on a copy" in gap.fix
    never = [f for f in report.findings if f.code == "BN102"]
    assert all(f.values["proof"] == gap.values["proof"] for f in never)
    assert len(never) == 3


def test_statistics_frozen_on_another_domain():
    net = train(Images, inputs=lambda x: 0.3 * x - 1)
    for norm in (net.bn1, net.bn2, net.bn3):
        norm.momentum = 0.0  # frozen while the weights go on to learn the true domain
    train(net)
    for norm in (net.bn1, net.bn2, net.bn3):
        norm.momentum = 0.1
    _, data = found(net, batches())
    assert data["BN305", ""].severity == "error"
    assert "from bn1 on the statistics are of other data" in data["BN305", ""].message
    assert "check preprocessing" in data["BN306", "bn1"].message
    assert "check preprocessing" not in data["BN306", "bn2"].message


def test_momentum_of_the_other_convention():
    _, data = found(train(lambda: Images(momentum=0.99), odd_end=True), batches())
    gap = data["BN305", ""]
    assert gap.severity == "error"
    assert "momentum" in gap.message
    assert "BN203" in gap.message


def test_negative_and_nan_statistics_are_proved_too(healthy):
    net = copy.deepcopy(healthy)
    net.bn2.running_var[3] = float("nan")
    net.bn3.running_var[0] = -4.0
    report, data = found(net, batches())
    bad = {f.module: f for f in report.findings if f.code == "BN101"}
    assert set(bad) == {"bn2", "bn3"}
    assert bad["bn2"].values["proof"]["before"] == 0
    assert bad["bn2"].values["proof"]["after"] > 0.95
    assert "BN101" in data["BN305", ""].message
    assert any("NaN or infinite in eval mode" in note for note in report.notes)


# -- every spelling of a norm ---------------------------------------------------------------------


def test_tokens_and_functional_norms_are_counted_where_they_run(functional):
    _, data = found(functional.train(), batches(size=16, count=2))
    functional.eval()
    measured = measure(Live.of(functional, Call((torch.randn(4, 1, 8, 8),))), batches(), 8)
    assert {path: n.per_batch for path, n in measured.norms.items()} == {"norm": 256, "scale": 32}
    assert {k for k in data if k[0] == "BN303"} == {("BN303", "scale")}  # 16 values; norm has 128
    assert "16 values a channel in a batch of 16" in data["BN303", "scale"].message


def test_pooled_statistics_are_those_of_the_input(functional):
    data = batches(size=20, count=5)
    measured = measure(Live.of(functional, Call((data[0][0],))), iter(data), 4)
    assert measured.sizes == (20,) * 4
    rows = torch.cat([functional.embed(x.reshape(-1, 8)) for x, _ in data[:4]]).detach().double()
    got = measured.norms["norm"]
    assert got.count == len(rows) == 640
    assert torch.allclose(torch.from_numpy(got.mean), rows.mean(0), rtol=1e-12)
    assert torch.allclose(torch.from_numpy(got.var), rows.var(0), rtol=1e-12)
    ratio = torch.log2(functional.norm.running_var.double() + 1e-5) - torch.log2(rows.var(0) + 1e-5)
    median = ratio.sort().values[[7, 8]].mean()  # of an even number
    assert measured.log2_ratio("norm") == pytest.approx(float(median), rel=1e-9)
    assert measured.log2_ratio("embed") is None


def test_a_functional_norm_that_lost_its_statistics(functional):
    net = copy.deepcopy(functional)
    net.mean.zero_()
    net.var.fill_(1)
    _, data = found(net, batches())
    assert data["BN306", "scale"].severity == "error"
    assert data["BN305", ""].values["proof"]["helps"]


def test_a_look_alike_holds_constants_unless_they_are_lost(healthy):
    net = copy.deepcopy(healthy)
    net.bn1, net.bn2 = Frozen(healthy.bn1), Frozen(healthy.bn2)
    measured = measure(Live.of(net, Call((batches()[0][0],))), batches(), 8)
    own = measure(Live.of(healthy, Call((batches()[0][0],))), batches(), 8)
    assert list(measured.norms) == ["bn1", "bn2", "bn3"]
    for path in measured.norms:
        assert measured.divergence(path) == pytest.approx(own.divergence(path), rel=1e-3)
        assert measured.norms[path].per_batch == own.norms[path].per_batch
    assert found(net, batches())[1] == {}
    _, drifted = found(net, batches(scale=3))
    assert drifted["BN306", "bn1"].severity == "info"
    assert "constants" in drifted["BN306", "bn1"].message
    _, gone = found(lost(net, "bn1"), batches())
    assert gone["BN305", ""].values["proof"]["helps"]
    assert "BN102" in gone["BN305", ""].message


def test_weight_standardisation_is_no_norm():
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:  # trap 3
            flat = self.weight.reshape(1, self.out_channels, -1)
            weight = F.batch_norm(flat, None, None, training=True).view_as(self.weight)
            return F.conv2d(x, weight, self.bias)

    net = nn.Sequential(Standardised(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    measured = measure(Live.of(net, Call((torch.randn(4, 1, 8, 8),))), batches(), 2)
    assert list(measured.norms) == ["1"]


# -- how much data, and which ---------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(16, 16), (32, 7)])
def test_too_little_data_is_said_and_not_guessed(healthy, size, count):
    report, data = found(lost(healthy, "bn1"), batches(size, count), batches=count)
    assert ("BN305", "") not in data
    assert "8 batches of 32 samples or more" in report.unchecked["BN305"]
    assert data["BN306", "bn1"].severity == "warning"  # an error only together with BN305
    report, data = found(lost(healthy, "bn1"), batches(8, 2))
    assert "there are 16" in report.unchecked["BN306"]
    assert not any(code == "BN306" for code, _ in data)


@pytest.mark.parametrize(("mode", "severity"), [(True, "warning"), (False, "info")])
def test_small_batches(healthy, mode, severity):
    net = copy.deepcopy(healthy).train(mode)
    _, data = found(net, batches(8, 2))
    small = data["BN303", "bn3"]
    assert {k for k in data if k[0] == "BN303"} == {("BN303", "bn3")}
    assert small.severity == severity
    assert small.values["noise"] == pytest.approx(math.sqrt(2 / 7))
    assert "8 values a channel in a batch of 8 (below 32)" in small.message
    loader = DataLoader(TensorDataset(*digits()), batch_size=64)
    assert ("BN303", "bn3") not in found(net, batches(8, 2), loader=loader)[1]
    for parameter in net.bn3.parameters():
        parameter.requires_grad = False
    frozen = found(net.eval(), batches(8, 2))[1]
    assert ("BN303", "bn3") not in frozen


def test_a_loader_of_dicts_and_labels_of_other_kinds(healthy):
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(healthy)

        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.net(pixel_values)
            loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
            return {**loss, "logits": logits}

    want = [n for n in bnify.audit(healthy, data=batches()).notes if "accuracy" in n]
    dicts = [{"pixel_values": x, "labels": y, "id": torch.arange(len(y))} for x, y in batches()]
    numbered = [(x, torch.arange(500, 500 + len(y)), y) for x, y in batches()]
    one_hot = [(x, F.one_hot(y, 10).float()) for x, y in batches()]
    nested = [[{"pixel_values": x}, y[:, None]] for x, y in batches()]
    cases = ((ByName(), dicts), (ByName(), nested), (healthy, numbered), (healthy, one_hot))
    for model, data in cases:
        assert [n for n in bnify.audit(model, data=data).notes if "accuracy" in n] == want


@pytest.mark.parametrize("kind", ["numbers", "one-output", "image"])
def test_outputs_without_classes_are_not_compared_by_prediction(healthy, kind):
    net = copy.deepcopy(healthy)
    data = [(x, torch.randn(len(x), 10)) for x, _ in batches()]
    if kind == "one-output":
        net.fc2 = nn.Linear(32, 1)
        data = [(x, y.float()) for x, y in batches()]
    if kind == "image":
        net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1)).eval()
        data = [x.expand(-1, 3, -1, -1) for x, _ in batches()]
    report, by_data = found(net, data)
    assert ("BN305", "") not in by_data
    assert "scores of classes" in report.unchecked["BN305"]
    assert any("not compared by prediction" in note for note in report.notes)
    assert not any(f.severity == "error" for f in by_data.values())


@pytest.mark.parametrize("fault", ["shape", "nan", "raises", "weights", "empty", "no-batches"])
def test_what_cannot_be_run_is_one_error_that_names_the_batch(healthy, fault):
    data, words, net = batches(), "batch 2", copy.deepcopy(healthy)
    match fault:
        case "shape":
            data[2] = (torch.randn(32, 64), data[2][1])
        case "nan":
            data[2][0][5, 0, 3, 3] = float("nan")
        case "raises":
            data[2] = (torch.randn(32, 1, 9, 9), data[2][1])
        case "weights":
            net.fc2.weight.data[1] = float("nan")
            words = "NaN or infinite on batch 0"
        case "empty":
            data, words = [], "no batch"
        case "no-batches":
            data, words = 5, "yields no batches"
    with pytest.raises(bnify.BnifyError, match=words) as caught:
        bnify.audit(net, data=data)
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_data_for_a_file_is_refused(tmp_path, healthy):
    torch.save(healthy.state_dict(), tmp_path / "net.pt")
    with pytest.raises(bnify.UsageError, match="without one"):
        bnify.audit(tmp_path / "net.pt", data=batches())
