"""Data as users have them, when to stop, and what is reported."""

from __future__ import annotations

import json

import pytest
import torch
from normed import hostile, images
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import bnify
from bnify.calibrating.scoring import accuracy
from bnify.calibrating.spread import Spread
from bnify.calibrations import calibrate
from bnify.pooled import Pooled
from bnify.strict_json import dumps
from trained import Frozen

LABELS = torch.arange(61) % 5


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(images(), LABELS, strict=True)


def state(data, **options) -> dict[str, Tensor]:
    model = hostile()
    calibrate(model, data, **options)
    return model.state_dict()


KINDS = {
    "pairs": lambda: list(zip(images().split(20), LABELS.split(20), strict=True)),
    "loader": lambda: DataLoader(TensorDataset(images(), LABELS), batch_size=20),
    "iterable dataset": lambda: DataLoader(Stream(), batch_size=20),
    "one-shot": lambda: iter(images().split(20)),
    "dicts": lambda: [{"x": x, "labels": 0} for x in images().split(20)],
    "nested": lambda: [({"x": x}, torch.zeros(1)) for x in images().split(20)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_kind(kind):
    want = state(list(images().split(20)))
    got = state(KINDS[kind]())
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def test_lists_of_samples_may_end_with_a_shorter_one():
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3).double()

        def forward(self, images: list[Tensor], targets: list | None = None) -> list[Tensor]:
            return [self.norm(one[None]) for one in images]

    x, model = images(5), Detector().eval()
    calibrate(model, [(list(part), [{}] * len(part)) for part in x.split(2)])
    assert torch.allclose(model.norm.running_mean, x.mean((0, 2, 3)), rtol=1e-12)


def test_one_tensor_is_one_batch():
    want = state([images()])
    assert all(torch.equal(t, want[n]) for n, t in state(images()).items())
    assert all(torch.equal(t, want[n]) for n, t in state({"x": images()}).items())


def test_a_shuffling_loader_leaves_the_random_numbers_alone_and_repeats_itself():
    loader = DataLoader(TensorDataset(images()), batch_size=7, shuffle=True)
    models = hostile(), hostile()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for model in models:
        calibrate(model, loader, batches=3)
    assert torch.equal(torch.get_rng_state(), before)
    first = models[0].state_dict()
    assert all(torch.equal(t, first[n]) for n, t in models[1].state_dict().items())


def test_no_more_is_read_than_asked_for():
    read: list[int] = []

    def loader():
        for x in images().split(5):
            read.append(1)
            yield x

    data = loader()
    found = calibrate(hostile(), data, batches=3)
    assert (found.batches, found.samples, len(read)) == (3, 15, 3)
    assert len(list(data)) == 10  # the rest is the caller's


def test_memory_does_not_grow_with_the_number_of_batches():
    alive: list[int] = []
    living = 0

    class Watched(Tensor):
        def __del__(self) -> None:
            nonlocal living
            living -= 1

    def loader():
        nonlocal living
        for x in images(60).split(3):
            living += 1
            alive.append(living)
            yield x.as_subclass(Watched)

    living = 0
    found = calibrate(nn.Sequential(nn.BatchNorm2d(3).double()).eval(), loader())
    assert found.batches == 20
    assert max(alive) < 12


# -- stopping early -------------------------------------------------------------------------------


def gaussian(batches: int, size: int = 50) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 4, generator=generator) for _ in range(batches)]


def test_the_standard_error_is_estimated_from_the_batches():
    """Of images whose values are all alike, only their number counts."""
    alone, alike = Spread.empty(3), Spread.empty(3)
    whole = [Pooled.empty(3), Pooled.empty(3)]
    generator = torch.Generator().manual_seed(0)
    for size in [40, 60, 50] * 60:
        x = torch.randn(size, 3, generator=generator, dtype=torch.float64) + 5
        for spread, values, total in zip(
            (alone, alike), (x, x.repeat_interleave(10, 0)), whole, strict=True
        ):
            batch = Pooled.empty(3)
            batch.add(values, 1)
            total.merge(batch)
            spread.add(batch)
    samples = 60 * 150
    for spread, total in zip((alone, alike), whole, strict=True):
        # The largest of three channels, each known to within a tenth from 180 batches.
        assert spread.error(total) == pytest.approx(samples**-0.5, rel=0.25)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_an_offset_does_not_stop_it(offset):
    data = [batch.double() + offset for batch in gaussian(20)]
    found = calibrate(nn.Sequential(nn.BatchNorm1d(4)).double().eval(), data, tolerance=0.01)
    assert not found.stopped
    assert found.norms[0].error == pytest.approx(1000**-0.5, rel=0.5)
    assert not any("do not vary" in note for note in found.norms[0].notes)


def test_it_stops_when_the_error_is_small_enough_and_says_so():
    model = nn.Sequential(nn.BatchNorm1d(4)).eval()
    found = calibrate(model, gaussian(100), tolerance=0.04)
    assert found.stopped
    assert 8 <= found.batches < 40
    assert found.norms[0].error <= 0.04
    assert f"stopped after {found.batches} batches" in found.notes[0]
    never = calibrate(model, gaussian(20), tolerance=0.001)
    assert not never.stopped
    assert never.batches == 20
    assert "all 20 batches were used" in never.notes[0]
    few = calibrate(model, gaussian(3), tolerance=0.5)
    assert "fewer than 8 batches" in few.notes[0]
    silent = calibrate(model, gaussian(20))
    assert (silent.stopped, silent.notes, silent.norms[0].error) == (False, (), None)


# -- what is reported -----------------------------------------------------------------------------


class Odd(nn.Module):
    """A norm that is never reached, constants, a constant channel, an overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.never = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3)
        self.frozen = Frozen(nn.BatchNorm2d(3).double())
        self.frozen.running_var.fill_(4)
        self.over = nn.BatchNorm2d(3).double()
        self.plain = nn.BatchNorm2d(3, track_running_stats=False)
        self.group = nn.GroupNorm(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 1] = 7
        huge = x.clone()
        huge[0, 2, 0, 0] = float("inf")
        return self.frozen(self.bn(x)), self.over(huge)


def test_what_is_odd_is_reported():
    model = Odd().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = calibrate(model, images(20))
    notes = {norm.name: norm.notes for norm in found.norms}
    assert notes["never"] == ("the data did not reach it",)
    assert notes["frozen"] == ("a look-alike without momentum, whose statistics are constants",)
    assert notes["over"] == ("what reaches it is not finite in 1 of 3 channels",)
    assert notes["bn"] == (
        "only 720 values a channel; 1000 or more are steadier",
        "1 of 3 channels do not vary on this data",
    )
    assert [norm.name for norm in found.updated] == ["bn"]
    assert [norm.name for norm in found.left] == ["frozen", "over", "never"]
    assert found.norms[0].count == 720
    changed = {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in changed), name


def test_a_single_value_has_no_variance():
    with pytest.raises(bnify.PlanError, match="a single value a channel has no variance"):
        calibrate(nn.Sequential(nn.BatchNorm1d(3)), torch.randn(1, 3))
    norm = nn.InstanceNorm1d(3, track_running_stats=True)
    with pytest.raises(bnify.PlanError, match="single value a channel in every sample"):
        calibrate(nn.Sequential(norm).eval(), torch.randn(4, 3, 1))


def test_a_model_without_norms_is_left_in_peace():
    found = calibrate(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), torch.randn(4, 3))
    assert found.norms == ()
    assert found.notes == ("no norm keeps running statistics: there is nothing to calibrate",)


class VarianceAlone(nn.Module):
    """As EvoNorm-B0: a running variance, and no mean."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x / self.running_var.sqrt()


def test_other_statistics_are_told_of():
    said = "0 (VarianceAlone) keeps running_var alone: not of a kind that is calibrated"
    alone = calibrate(nn.Sequential(VarianceAlone()), torch.randn(4, 3))
    assert alone.notes == (f"{said}, left as it was",)
    model = nn.Sequential(VarianceAlone(), nn.BatchNorm1d(3), VarianceAlone())
    beside = calibrate(model, torch.randn(4, 3))
    assert [norm.name for norm in beside.updated] == ["1"]
    assert beside.notes == (f"{said}, left as it was (and 1 more)",)


def test_drift_is_in_units_of_the_standard_deviation():
    model = nn.Sequential(nn.BatchNorm1d(2, eps=0.0).double()).eval()
    x = torch.randn(500, 2, dtype=torch.float64) * 3
    calibrate(model, x)
    norm = model[0]
    norm.running_mean += 2 * norm.running_var.sqrt()
    norm.running_var /= 4
    found = calibrate(model, x).norms[0]
    assert found.shift == pytest.approx(2)
    assert found.ratio == pytest.approx(4)
    assert found.drift == pytest.approx((4 + torch.tensor(4.0).log().square()) ** 0.5)


def test_a_calibration_is_json():
    model = hostile()
    model.bn2.running_var.fill_(float("nan"))
    found = calibrate(model, images().split(20))
    data = json.loads(dumps(found.to_dict()))
    assert (data["schema"], data["verb"], data["batches"], data["samples"]) == (
        1,
        "calibrate",
        4,
        61,
    )
    by_name = {norm["name"]: norm for norm in data["norms"]}
    assert by_name["bn2"]["drift"] == "inf"
    assert by_name["bn1"]["after"]["mean"] == model.bn1.running_mean.tolist()
    assert repr(found) == "Calibration(5 of 5 norms, 4 batches, 61 samples)"
    assert found.updated[0].name == "bn2"
    with pytest.raises(AttributeError):
        found.batches = 3


def test_accuracy_needs_labels_of_classes():
    model = hostile()
    loader = DataLoader(TensorDataset(images(), LABELS), batch_size=20, shuffle=True)
    with torch.no_grad():
        want = float((model(images()).argmax(1) == LABELS).double().mean())
    assert accuracy(model, loader) == pytest.approx(want)
    assert accuracy(model, list(images().split(20))) is None
    assert accuracy(model, [(x, torch.randn(20, 5)) for x in images(60).split(20)]) is None
