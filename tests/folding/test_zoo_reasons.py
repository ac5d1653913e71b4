"""What the norms of the zoo stay for: no layer beside them could take them, shown by force."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnify
import laws
import zoo
from bnify import Reason, api
from bnify.structure import as_call
from forcing import backward_, bend, by_force, forward_, run

LINEAR = (nn.Linear, nn.modules.conv._ConvNd)


def beside(model: nn.Module, norm: str, x: Any, most: int = 4) -> Iterator[tuple[str, str]]:
    """Layers that ran closest to a norm and have its number of channels, and on which side."""
    order: list[tuple[str, nn.Module]] = []
    hooks = [
        module.register_forward_hook(lambda m, a, y, name=name: order.append((name, m)))
        for name, module in model.named_modules()
        if name == norm or isinstance(module, LINEAR)
    ]
    with torch.no_grad():
        as_call(x).clone()(model)
    for hook in hooks:
        hook.remove()
    place = [name for name, _ in order].index(norm)
    channels = model.get_submodule(norm).num_features
    found = []
    for index, (name, module) in enumerate(order):
        weight = getattr(module, "weight", None)
        if name == norm or weight is None or getattr(module, "transposed", False):
            continue
        if index < place and weight.shape[0] == channels:
            found.append((place - index, name, "before"))
        depthwise = getattr(module, "groups", 1) == channels == weight.shape[0]
        if index > place and (weight.shape[1] == channels or depthwise):
            found.append((index - place, name, "after"))
    yield from ((name, side) for _, name, side in sorted(found)[:most])


WITH_SKIPS = (
    "own:PreActivation",
    "own:BertLike",
    "own:GptLike",
    "own:TorchTransformer",
    "own:Mixer",
    "timm:mobileone_s0",
    "timm:repghostnet_050",
    "timm:dpn48b",
    "timm:edgenext_xx_small",
    "timm:mobilevit_xxs",
    "timm:pvt_v2_b0",
    "timm:inception_next_atto",
    "timm:convnextv2_atto",
    "timm:ConvMixer",
    "torchvision:densenet121",
)


def convmixer() -> nn.Module:
    """A narrow one: padded depthwise convolutions behind norms, norms between activations."""
    from timm.models.convmixer import ConvMixer

    return ConvMixer(dim=24, depth=3, kernel_size=5, patch_size=7, num_classes=10)


CONVMIXER = zoo.Entry(name="timm:ConvMixer", make=convmixer, make_inputs=zoo.image, test_pixels=49)


def small(entry: zoo.Entry) -> Any:
    """Inputs that are small where that saves time: the reasons do not depend on the size."""
    pixels = {"timm:mobileone_s0": 32, "timm:repghostnet_050": 32}
    x = entry.inputs(2, pixels.get(entry.name))
    return as_call(x).to(dtype=torch.float64)


def some(skips: list[bnify.Skip], most: int = 2) -> list[bnify.Skip]:
    """The first and the last of them."""
    return skips if len(skips) <= most else [skips[0], skips[-1]]


def test_every_zoo_model_of_the_test_command_whose_norms_stay_is_checked():
    """A model that leaves a norm behind is held to the check below."""
    for entry in zoo.small():
        plan = api.plan_for_fold(entry.build(), entry.inputs(2))
        assert not plan.skips or entry.name in WITH_SKIPS, entry.name


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_SKIPS)
def test_what_a_zoo_model_keeps_could_not_be_folded(name):
    entry = CONVMIXER if name == CONVMIXER.name else zoo.entry(name)
    model, x = laws.hostile_(entry.build(), 7).double(), small(entry)
    plan = bnify.fold(model, x, verify=False).plan
    by_reason: dict[Reason, list[bnify.Skip]] = {}
    for skip in plan.skips:
        by_reason.setdefault(skip.reason, []).append(skip)
    assert by_reason
    want = run(copy.deepcopy(model), x)
    allowed = max(1e-12, 100 * laws.one_ulp_noise(model, x))
    for reason, skips in by_reason.items():
        for skip in some(skips):
            norm = model.get_submodule(skip.layer)
            if reason is Reason.BATCH_STATISTICS:
                assert bend(norm, seen_by(model, skip.layer, x)) > 1e-3, skip
                continue
            assert bend(norm_alone(norm), seen_by(model, skip.layer, x)) <= 1e-12, skip
            tried = list(beside(copy.deepcopy(model), skip.layer, x))
            assert tried, skip
            for layer, side in tried:
                push = backward_ if side == "before" else forward_
                forced = by_force_keeping_act(model, skip.layer, layer, push)
                gap = laws.worst_error(want, run(forced, x))
                assert gap > 10 * allowed, f"{skip} could go into {layer}"


def seen_by(model: nn.Module, norm: str, x: Any) -> Tensor:
    """What a norm is given."""
    seen: list[Tensor] = []
    working = copy.deepcopy(model)
    working.get_submodule(norm).register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
    run(working, x)
    return seen[0]


def norm_alone(norm: nn.Module) -> nn.Module:
    """A norm without the activation that it may hold."""
    alone = nn.BatchNorm2d(norm.num_features, eps=norm.eps).double().eval()
    alone.load_state_dict(dict(norm.state_dict()), strict=False)
    return alone


def by_force_keeping_act(
    model: nn.Module, norm: str, layer: str, push: Callable[..., None]
) -> nn.Module:
    """As :func:`by_force`, with the activation of a norm that holds one."""
    forced = by_force(model, norm, layer, push)
    held = getattr(model.get_submodule(norm), "act", None)
    if held is not None:
        parent, _, leaf = norm.rpartition(".")
        setattr(forced.get_submodule(parent), leaf, copy.deepcopy(held))
    return forced


@pytest.mark.slow
def test_the_check_of_the_zoo_can_fail():
    """A norm that does fold is found out by it: some layer beside it takes it exactly."""
    entry = zoo.entry("torchvision:resnet18")
    model, x = laws.hostile_(entry.build(), 7).double(), small(entry)
    want = laws.run64(model, x)
    (first, *_) = (n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    gaps = [
        laws.worst_error(want, run(by_force(model, first, layer, backward_), x))
        for layer, side in beside(copy.deepcopy(model), first, x)
        if side == "before"
    ]
    assert min(gaps) <= 1e-11
