"""The law of folding on real architectures: what is left, why, and the function is the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnify
import laws
import nets
import zoo
from counting import NormCount, count_norms
from replaying import assert_untouched, fingerprint_of

#: What may stay where a norm stands between nonlinear, shared or padded values.
STUCK = {"another-consumer", "nonlinearity-between", "padded-forward"}


def timm(name: str, pixels: int = 64) -> zoo.Entry:
    """A model that the zoo itself does not hold."""

    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return zoo.Entry(
        name=f"timm:{name}", make=make, make_inputs=zoo.image, pixels=224, test_pixels=pixels
    )


def hostile_scales_(model: nn.Module, seed: int) -> None:
    """Layer scales of both signs: fresh ones are all 1e-6, and hide what comes behind them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("gamma", "layer_scale", "gamma_1", "gamma_2"):
                sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                spread = torch.rand(parameter.shape, generator=generator) + 0.3
                parameter.copy_(sign * spread)


def built(entry: zoo.Entry, pixels: int | None = None, seed: int = 3) -> tuple[nn.Module, Tensor]:
    """The model in float64 with hostile norms, and inputs: a fold then rounds nowhere else."""
    model = laws.hostile_(entry.build(), seed)
    hostile_scales_(model, seed)
    return model.double(), entry.inputs(2, pixels).double()


def folded(model: nn.Module, x: Any, **options: Any) -> tuple[bnify.Result, NormCount, NormCount]:
    """Fold, and hold the result to the laws: same function, original untouched, all listed."""
    untouched = fingerprint_of(model)
    result = bnify.fold(model, x, **{"verify": False, **options})
    assert_untouched(untouched, fingerprint_of(model))
    assert not any(module.training for module in result.model.modules())
    laws.assert_same_function(model, result.model, x)
    before = count_norms(copy.deepcopy(model), x)
    return result, before, count_norms(result.model, x)


# -- nothing is left -------------------------------------------------------------------------------

COMPLETE = (
    zoo.entry("timm:levit_128s"),
    zoo.entry("torchvision:efficientnet_b0"),
    zoo.entry("timm:efficientnet_lite0"),
    timm("efficientnet_b0"),
    zoo.entry("torchvision:mobilenet_v3_small"),
    timm("mobilenetv3_small_050"),
    zoo.entry("torchvision:regnet_x_400mf"),
    zoo.entry("torchvision:regnet_y_400mf"),
    timm("regnetx_002"),
    timm("regnety_002"),
    zoo.entry("timm:regnetz_b16"),
    zoo.entry("torchvision:shufflenet_v2_x0_5"),
    zoo.entry("timm:tf_mixnet_s"),
)


@pytest.mark.slow
@pytest.mark.parametrize("entry", COMPLETE, ids=lambda e: e.name)
def test_no_norm_is_left(entry):
    model, x = built(entry)
    result, before, after = folded(model, x)
    assert before.batch > 20, "the model should have norms"
    assert after.left(before) == 0
    assert result.plan.skips == ()
    assert len(result.plan.edits) == before.batch
    assert after.convolutions == before.convolutions


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm:levit_128s", "torchvision:regnet_y_400mf"])
def test_a_verified_fold_of_a_float32_model_passes(name):
    entry = zoo.entry(name)
    model, x = laws.hostile_(entry.build(), 5), entry.inputs(2)
    result = bnify.fold(model, x)
    assert result.passed
    assert result.verification.algebra <= 1e-11
    assert result.plan.skips == ()
    assert all(p.dtype == torch.float32 for p in result.model.parameters())


# -- something is left -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("torchvision:densenet121", 64),
        ("timm:resnetv2_50", 32),
        ("timm:convmixer_768_32", 35),
        ("timm:dpn48b", 64),
    ],
)
def test_what_is_left_has_a_reason(name, pixels):
    model, x = built(zoo.entry(name), pixels)
    result, before, after = folded(model, x)
    assert {skip.reason.value for skip in result.plan.skips} <= STUCK
    assert all(skip.detail for skip in result.plan.skips)
    assert len(result.plan.edits) + len(result.plan.skips) == before.batch
    assert after.left(before) == len(result.plan.skips)
    assert result.plan.edits


# -- merging ---------------------------------------------------------------------------------------

REPARAMETERISABLE = (
    zoo.entry("timm:repvgg_a0"),
    zoo.entry("timm:mobileone_s0"),
    zoo.entry("timm:repghostnet_050"),
    zoo.entry("timm:repvit_m0_9"),
    timm("fastvit_t8"),
)


@pytest.mark.slow
@pytest.mark.parametrize("entry", REPARAMETERISABLE, ids=lambda e: e.name)
def test_merging_leaves_no_more_than_timm_does(entry):
    from timm.utils.model import reparameterize_model

    model, x = built(entry)
    by_hand = reparameterize_model(copy.deepcopy(model)).double().eval()
    result, before, after = folded(model, x, merge=True)
    theirs = count_norms(by_hand, x)
    assert after.batch <= theirs.batch
    assert after.left(before) <= theirs.left(before)
    assert after.left(before) == 0
    if "repghost" in entry.name:  # its identity branches are bare norms: nothing to merge away
        assert after.convolutions <= before.convolutions
    else:
        assert after.convolutions < before.convolutions
        assert after.convolutions <= theirs.convolutions
    assert any(edit.kind == "merge" for edit in result.plan.edits)


@pytest.mark.slow
def test_merging_in_the_module_keeps_its_class_and_methods():
    model, x = built(zoo.entry("timm:mobileone_s0"))
    merged = bnify.fold(model, x, merge=True, verify=False).model
    assert type(merged) is type(model)
    with torch.no_grad():
        want, got = model.forward_features(x), merged.forward_features(x)
    assert laws.relative_error(want, got) <= max(1e-12, 100 * laws.one_ulp_noise(model, x))


# -- affine maps that are no norms -----------------------------------------------------------------


def small_convnext() -> nn.Module:
    """torchvision's ConvNeXt, whose blocks multiply by their scale in their own forward."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    settings = [CNBlockConfig(16, 24, 2), CNBlockConfig(24, 32, 2), CNBlockConfig(32, None, 1)]
    return ConvNeXt(settings, num_classes=10)


CONVNEXTS = (
    timm("convnext_atto"),
    zoo.Entry(
        name="torchvision:ConvNeXt", make=small_convnext, make_inputs=zoo.image, test_pixels=64
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("entry", CONVNEXTS, ids=lambda e: e.name)
def test_a_convnext_loses_its_layer_scale(entry):
    model, x = built(entry)
    result, before, after = folded(model, x, affines=True)
    assert before.scales > 0
    assert before.neutral == 0
    assert after.scales - after.neutral == 0, "a layer scale still scales"
    graph, _, left = folded(model, x, affines=True, emit="graph")
    assert isinstance(graph.model, torch.fx.GraphModule)
    assert left.scales == 0
    assert {e.layer for e in graph.plan.edits} >= {e.layer for e in result.plan.edits}


@pytest.mark.slow
def test_without_the_option_a_layer_scale_stays():
    model, x = built(CONVNEXTS[0])
    result, before, after = folded(model, x)
    assert after.scales == before.scales > 0
    assert result.plan.edits == ()


class Encoder(nn.Module):
    """Pre-norm blocks with separate projections; every LayerNorm is read by Linears only."""

    class Block(nn.Module):
        def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
            super().__init__()
            self.ln1, self.ln2 = norm(width), norm(width)
            self.q, self.k, self.v = (nn.Linear(width, width, bias=i > 0) for i in range(3))
            self.out = nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

        def forward(self, x: Tensor) -> Tensor:
            y = self.ln1(x)
            scores = self.q(y) @ self.k(y).transpose(-1, -2) / math.sqrt(y.shape[-1])
            x = x + self.out(scores.softmax(-1) @ self.v(y))
            return x + self.down(torch.nn.functional.gelu(self.up(self.ln2(x))))

    def __init__(self, width: int = 12, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.blocks = nn.ModuleList(self.Block(width, norm) for _ in range(2))
        self.ln = norm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x).mean(1))


def tails(model: nn.Module) -> set[str]:
    """Paths of layer norms whose scale or shift does something."""
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm))
        and not (
            (module.weight is None or bool((module.weight == 1).all()))
            and (getattr(module, "bias", None) is None or not module.bias.any())
        )
    }


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_that_only_linears_read_lose_their_affine(norm):
    model = laws.hostile_(Encoder(norm=norm).eval(), 1).double()
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    result, before, after = folded(model, x, affines=True, verify=True)
    assert len(tails(model)) == 5
    assert tails(result.model) == set()
    assert result.plan.skips == ()
    assert after.other == before.other, "the normalization itself stays"
    assert result.passed


@pytest.mark.parametrize(
    ("make", "inputs", "stay"),
    [
        # each but the last LayerNorm is read by the residual as well
        (
            nets.TorchTransformer,
            lambda: torch.randn(4, 5, 6),
            {"encoder.layers.0.norm1", "encoder.layers.0.norm2", "encoder.layers.1.norm1"},
        ),
        (
            nets.BertLike,
            lambda: torch.randint(1, 100, (4, 12)),
            {"norm", *(f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2))},
        ),
        # the head's weight is the embedding's
        (nets.GptLike, lambda: torch.randint(1, 100, (4, 10)), {"ln_f"}),
        (nets.Mixer, lambda: torch.randn(4, 3, 12, 12), {"norm1"}),  # mixes tokens, not channels
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_norms_that_others_read_keep_their_affine(make, inputs, stay):
    model = laws.hostile_(make().eval(), 2).double()
    x = inputs()
    x = x.double() if x.is_floating_point() else x
    result, _, _ = folded(model, x, affines=True, verify=True)
    assert tails(result.model) == stay
    assert {skip.layer for skip in result.plan.skips} == stay
    truths = {"another-consumer", "value-is-output", "tied-weights", "wrong-axis", "no-absorber"}
    assert {skip.reason.value for skip in result.plan.skips} <= truths
    assert result.passed


def test_input_normalization_goes_into_the_stem():
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
            self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
            self.stem = nn.Conv2d(3, 6, 3)
            self.bn = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.stem((x - self.mean) / self.std)).relu()

    model = laws.hostile_(Normalized().eval(), 4).double()
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    _, before, after = folded(model, x, affines=True, emit="graph")
    assert before.batch == before.scales == 1
    assert after.batch == after.scales == 0


# -- the laws themselves can fail ------------------------------------------------------------------


@pytest.mark.slow
def test_a_zoo_fold_off_by_a_millionth_would_be_seen():
    model, x = built(zoo.entry("torchvision:mobilenet_v3_small"))
    result, _, _ = folded(model, x)
    with torch.no_grad():
        conv = next(m for m in result.model.modules() if isinstance(m, nn.Conv2d))
        live = int(conv.weight.flatten(1).abs().sum(1).argmax())
        conv.weight[live] *= 1 + 1e-6
    with pytest.raises(AssertionError, match="outputs differ"):
        laws.assert_same_function(model, result.model, x)
