"""A calibration changes running statistics, all of them or none, and nothing else."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from normed import hostile, images
from torch import Tensor, nn

import bnify
from bnify.calibrating import writing
from bnify.calibrations import calibrate


class Stateful(nn.Module):
    """Draws random numbers, counts its calls, keeps a cache, and fails on request."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = hostile()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.cache: Tensor | None = None
        self.seen_by_hook: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = F.dropout(x, 1e-3, training=True)
        x = x + 0 * random.random() + 0 * np.random.standard_normal()  # noqa: NPY002
        self.cache = self.inner(x)
        if x.shape[0] == 13:
            raise RuntimeError("unlucky\nand more")
        return self.cache


def stateful() -> Stateful:
    model = Stateful().train()
    model.inner.bn2.eval()
    model.inner.drop.eval()
    model.inner.bn1.momentum = 0.37
    model.inner.bn1.weight.requires_grad_(False)
    model.inner.fc.register_forward_hook(lambda *_: None)
    return model


def everything(model: nn.Module) -> dict:
    tensors = model.state_dict(keep_vars=True)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "ids": {name: id(tensor) for name, tensor in tensors.items()},
        "grads": {name: (t.requires_grad, t.grad) for name, t in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "types": [type(module) for module in model.modules()],
        "momentum": [getattr(module, "momentum", None) for module in model.modules()],
        "hooks": [tuple(getattr(m, h).items()) for m in model.modules() for h in hooks],
        "cache": model.cache,
        "random": (random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        "torch": torch.get_rng_state().tolist(),
        "flags": (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()),
    }


def changed(before: dict, after: dict) -> set[str]:
    """Names of tensors with other values; all else is held to be equal."""
    a, b = before.pop("values"), after.pop("values")
    assert before == after
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_statistics_are_all_that_changes():
    model = stateful()
    data = images().split(20)
    copies = [x.clone() for x in data]
    before = everything(model)
    calibrate(model, data)
    names = changed(before, everything(model))
    want = {f"inner.{n}.{s}" for n in NORMS for s in ("running_mean", "running_var", TRACKED)}
    assert names == want
    assert all(torch.equal(a, b) for a, b in zip(data, copies, strict=True))


NORMS = ("bn1", "bn2", "bn3", "twice", "bn5")
TRACKED = "num_batches_tracked"


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_within_no_grad_and_inference_mode(mode):
    model, other = stateful(), stateful()
    with getattr(torch, mode)():
        calibrate(model, images().split(20))
    calibrate(other, images().split(20))
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert not model.inner.bn1.running_mean.is_inference()
    with torch.inference_mode():
        model = stateful()
    calibrate(model, images().split(20))
    assert torch.equal(model.inner.bn5.running_var, other.inner.bn5.running_var)


def failing_loader():
    yield images(20)
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (
            lambda: [images(20), images(5), images(13)],
            bnify.PlanError,
            "^the model raised RuntimeError on batch 2 of the data: unlucky$",
        ),
        (failing_loader, OSError, "disk"),
        (
            lambda: [images(20), images(4) * float("nan")],
            bnify.PlanError,
            "batch 1 of the data holds 432 NaN values",
        ),
        (lambda: [images(20), torch.zeros(3)], bnify.PlanError, "^batch 1: a batch of the data is"),
        (list, bnify.PlanError, "the data holds no batch"),
        (lambda: 3, bnify.PlanError, "data is a int, which yields no batches"),
        (lambda: ["text"], bnify.PlanError, "first batch of the data is a str"),
        (lambda: [images(4) / 0], bnify.PlanError, "no norm could be calibrated; inner.bn1"),
    ],
)
def test_after_an_exception_the_statistics_are_the_old_ones(data, error, match):
    model = stateful()
    before = everything(model)
    with pytest.raises(error, match=match):
        calibrate(model, data())
    assert not changed(before, everything(model))


def test_an_interruption_while_writing_is_taken_back(monkeypatch):
    model = stateful()
    before = everything(model)
    put, calls = writing._put, []

    def interrupted(tensor: Tensor, value: Tensor) -> None:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        put(tensor, value)

    monkeypatch.setattr(writing, "_put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, images().split(20))
    assert len(calls) > 7
    assert not changed(before, everything(model))


def test_an_interrupted_progress_changes_nothing():
    model = stateful()
    before = everything(model)

    def stop(said: str) -> None:
        if said == "batch 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, images().split(20), progress=stop)
    assert not changed(before, everything(model))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batches": 0}, "batches=0: at least one"),
        ({"batches": "3"}, "batches='3': a whole number"),
        ({"batches": 2.5}, "batches=2.5: a whole number"),
        ({"tolerance": "0.1"}, "tolerance='0.1'"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
        ({"tolerance": 2}, "tolerance=2"),
    ],
)
def test_options_that_cannot_be_right(options, match):
    with pytest.raises(bnify.UsageError, match=match):
        calibrate(hostile(), images(20), **options)


def test_what_is_no_plain_model():
    with pytest.raises(bnify.CaptureError, match="is a type, no"):
        calibrate(nn.BatchNorm1d, images(20))
    with pytest.raises(bnify.CaptureError, match="lazy"):
        calibrate(nn.Sequential(nn.LazyBatchNorm2d()), images(20))
    scripted = nn.Sequential(torch.jit.script(nn.BatchNorm2d(3)))
    with pytest.raises(bnify.PlanError, match="TorchScript") as caught:
        calibrate(scripted, images(20))
    assert "bnify.calibrate(plain_model, data)" in caught.value.hint
    broken = hostile()
    broken.fc.weight.data[0] = float("nan")
    with pytest.raises(bnify.WeightsError, match=r"fc\.weight"):
        calibrate(broken, images(20))


def test_a_module_that_copies_as_itself_is_left_alone():
    class Itself(nn.Sequential):
        def __deepcopy__(self, memo: dict) -> Itself:
            return self

    model = nn.Sequential(Itself(nn.SyncBatchNorm(3), nn.Dropout())).train()
    kinds = [(type(module), module.training) for module in model.modules()]
    with pytest.raises(bnify.CaptureError, match=r"copy of 0 \(Itself\) is the module itself"):
        calibrate(model, images(20).float())
    assert [(type(module), module.training) for module in model.modules()] == kinds


def test_compiled_and_parallel_models_are_calibrated_in_place():
    plain, model = hostile(), hostile()
    calibrate(plain, images().split(20))
    found = calibrate(torch.compile(nn.DataParallel(model)), images().split(20))
    assert {norm.name for norm in found.norms} == set(NORMS)
    for name, tensor in copy.deepcopy(plain.state_dict()).items():
        assert torch.equal(model.state_dict()[name], tensor), name
