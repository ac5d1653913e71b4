"""Models with norms for the folding benchmarks: those of the zoo, and more of the same families.

``MODELS`` holds only models that run a norm which is an affine map in eval mode, or a LayerScale;
their images are as small as the model allows. Weights are random and norms hostile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import laws
import zoo
from zoo import Entry, image

#: Models of the zoo that run no batch norm, in any spelling, and have no LayerScale.
_WITHOUT = frozenset(
    {
        *(e.name for e in zoo.OWN),
        *(f"torchvision:{n}" for n in ("alexnet", "vgg11", "squeezenet1_1")),
        *(f"torchvision:{n}" for n in ("vit_b_16", "swin_t", "swin_v2_t")),
        *(f"timm:{n}" for n in ("nf_resnet50", "nfnet_l0", "resnetv2_50x1_bit")),
        *(f"timm:{n}" for n in ("deit_tiny_patch16_224", "pit_ti_224", "twins_svt_small")),
        *(f"timm:{n}" for n in ("tnt_s_legacy_patch16_224", "pvt_v2_b0", "convit_tiny")),
        *(f"timm:{n}" for n in ("mixer_s32_224", "gmlp_ti16_224", "crossvit_9_240")),
    }
)


def _timm(name: str, pixels: int = 64) -> Entry:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return Entry(name=f"timm:{name}", make=make, make_inputs=image, test_pixels=pixels)


def _of(name: str, make: Callable[[], nn.Module], inputs: Any = image, pixels: int = 64) -> Entry:
    return Entry(name=name, make=make, make_inputs=inputs, test_pixels=pixels)


def _frozen(name: str) -> Callable[[], nn.Module]:
    """A torchvision model with frozen batch norms, as detectors use it."""

    def make() -> nn.Module:
        import torchvision

        norm = torchvision.ops.misc.FrozenBatchNorm2d
        return torchvision.models.get_model(name, weights=None, norm_layer=norm)

    return make


def _transformers(
    model: str, config: str, width: Callable[[Any], dict[str, Any]] | None = None, **options: Any
) -> Callable[[], nn.Module]:
    """A model of transformers by the names of its class and its configuration."""

    def make() -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**options, **(width(transformers) if width else {}))
        return getattr(transformers, model)(made)

    return make


def _pixels(batch: int, pixels: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, pixels, pixels)}


_SMALL = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 2, 1, 1]}


def _resnet(transformers: Any) -> dict[str, Any]:
    backbone = transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[32, 48, 64, 96],
        depths=[1, 1, 1, 1],
        out_features=["stage4"],
    )
    return {"backbone_config": backbone}


MORE = (
    # pre-activation and dense families: norms between nonlinear values
    _timm("densenet121"),
    _timm("resnetv2_50d"),
    _timm("dpn68"),
    _timm("dpn68b"),
    _timm("legacy_xception"),
    _timm("hrnet_w18_small_v2"),
    # mobile families, norm and activation in one module
    _timm("efficientnet_b0"),
    _timm("tf_efficientnet_b0"),
    _timm("tf_efficientnetv2_b0"),
    _timm("mobilenetv2_050"),
    _timm("mobilenetv3_small_100"),
    _timm("mobilenetv3_large_100"),
    _timm("tf_mobilenetv3_small_minimal_100"),
    _timm("fbnetc_100"),
    _timm("semnasnet_075"),
    _timm("tinynet_e"),
    _timm("rexnet_100"),
    _timm("ghostnetv2_100"),
    _timm("mobilevitv2_050"),
    # regular families
    _timm("regnetx_002"),
    _timm("regnety_002"),
    _timm("gernet_s"),
    _timm("resnet26t"),
    _timm("resnext26ts"),
    _timm("ecaresnet26t"),
    _timm("ese_vovnet19b_dw"),
    _timm("hgnetv2_b0"),
    _timm("fasternet_t0"),
    _timm("darknet53"),
    # reparameterisable
    _timm("repvgg_b0"),
    _timm("mobileone_s1"),
    _timm("repghostnet_080"),
    _timm("repvit_m1"),
    _timm("fastvit_sa12"),
    # attention with norms of convolutions
    _timm("levit_conv_128s", 224),
    _timm("efficientvit_b0"),
    _timm("efficientvit_m0", 224),
    _timm("swiftformer_xs", 224),
    _timm("efficientformerv2_s0", 224),
    _timm("botnet26t_256", 256),
    # LayerScale
    _timm("convnext_atto"),
    _timm("convnext_pico"),
    _timm("deit3_small_patch16_224", 224),
    # look-alikes, and norms of transformers
    _of("torchvision:resnet18, frozen", _frozen("resnet18")),
    _of("torchvision:resnet50, frozen", _frozen("resnet50")),
    _of("transformers:resnet", _transformers("ResNetModel", "ResNetConfig", **_SMALL), _pixels),
    _of("transformers:regnet", _transformers("RegNetModel", "RegNetConfig", **_SMALL), _pixels),
    _of(
        "transformers:mobilenet_v2",
        _transformers("MobileNetV2Model", "MobileNetV2Config", depth_multiplier=0.35),
        _pixels,
    ),
    _of(
        "transformers:levit",
        _transformers("LevitForImageClassification", "LevitConfig"),
        _pixels,
        224,
    ),
    _of("transformers:cvt", _transformers("CvtModel", "CvtConfig", depth=[1, 2, 3]), _pixels),
    _of(
        "transformers:segformer",
        _transformers("SegformerForSemanticSegmentation", "SegformerConfig", depths=[1, 1, 1, 1]),
        _pixels,
    ),
    _of(
        "transformers:patchtst",
        _transformers(
            "PatchTSTModel",
            "PatchTSTConfig",
            num_input_channels=3,
            context_length=32,
            patch_length=8,
            stride=8,
            num_hidden_layers=2,
            d_model=32,
            num_attention_heads=4,
            ffn_dim=48,
        ),
        lambda batch, _: {"past_values": torch.randn(batch, 32, 3)},
    ),
    _of(
        "transformers:conformer",
        _transformers(
            "Wav2Vec2ConformerModel",
            "Wav2Vec2ConformerConfig",
            num_hidden_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            intermediate_size=48,
            conv_dim=[16, 16],
            conv_kernel=[10, 3],
            conv_stride=[5, 2],
            num_feat_extract_layers=2,
            num_conv_pos_embedding_groups=4,
            num_conv_pos_embeddings=16,
        ),
        lambda batch, _: {"input_values": torch.randn(batch, 800)},
    ),
    _of(
        "transformers:detr",
        _transformers(
            "DetrModel",
            "DetrConfig",
            _resnet,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
        ),
        _pixels,
    ),
)

MODELS: tuple[Entry, ...] = (*(e for e in zoo.ZOO if e.name not in _WITHOUT), *MORE)
#: Quick ones, one of each family that matters.
QUICK = (
    "torchvision:resnet18",
    "torchvision:mobilenet_v2",
    "torchvision:regnet_y_400mf",
    "torchvision:resnet18, frozen",
    "timm:densenet121",
    "timm:dpn48b",
    "timm:ghostnet_050",
    "timm:repghostnet_050",
    "timm:mobileone_s0",
    "timm:repvgg_a0",
    "timm:convnext_atto",
    "timm:levit_128s",
    "transformers:detr",
)


def hostile(entry: Entry) -> nn.Module:
    """The model with random weights, and norms and LayerScales that have seen the worst."""
    model = entry.build()
    for _, norm in laws.norms_of(model):
        for name, value in (("eps", 1e-5), ("num_batches_tracked", None)):
            if not hasattr(norm, name):  # frozen look-alikes have neither
                setattr(norm, name, value)
    laws.hostile_(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            values = parameter.view(-1)
            if values.numel() > 1 and values[0] != 0 and bool((values == values[0]).all()):
                # A fresh LayerScale is 1e-6 everywhere: whatever is done to it would not show.
                size = 0.1 + 0.4 * torch.rand(values.shape, generator=generator)
                sign = torch.where(torch.rand(values.shape, generator=generator) < 0.3, -1.0, 1.0)
                values.copy_(sign * size)
    return model
