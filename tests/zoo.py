"""The zoo: models that bnify must handle, as factories with example inputs.

``ZOO`` holds all of them for the benchmark; ``small()`` those quick enough for the test command.
Weights are random: nothing is downloaded. Import torchvision's and timm's models only through
here, inside the factories, so that a test that needs none of them pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import nets
from mlp import MyNetwork


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model.

    Attributes:
        name: ``"torchvision:resnet18"``, ``"timm:levit_128s"`` or ``"own:UNet"``.
        make: Builds the model; call :meth:`build`, which seeds.
        make_inputs: ``(batch, pixels)`` to what ``bnify.insert`` takes as inputs.
        pixels: Image size in benchmarks.
        test_pixels: Image size in tests: the smallest that the model takes, or nearly so.
        small: Quick enough for the test command.
    """

    name: str
    make: Callable[[], nn.Module]
    make_inputs: Callable[[int, int], Any]
    pixels: int = 224
    test_pixels: int = 64
    small: bool = False

    def build(self, seed: int = 0) -> nn.Module:
        """A fresh model in eval mode, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make().eval()
            for parameter in model.parameters():  # a head that starts at 0 hides every fault
                if parameter.ndim > 1 and not parameter.detach().any():
                    nn.init.normal_(parameter, std=0.02)
            return model

    def inputs(self, batch: int = 2, pixels: int | None = None, seed: int = 0) -> Any:
        """Example inputs, at ``test_pixels`` unless told otherwise."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make_inputs(batch, pixels or self.test_pixels)


def image(batch: int, pixels: int) -> torch.Tensor:
    """An RGB image batch (N, 3, pixels, pixels), N(0, 1)."""
    return torch.randn(batch, 3, pixels, pixels)


def _torchvision(name: str, *, pixels: int = 224, test: int = 64, small: bool = False, **arguments):
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **arguments)

    return Entry(
        name=f"torchvision:{name}",
        make=make,
        make_inputs=image,
        pixels=pixels,
        test_pixels=test,
        small=small,
    )


def _timm(
    name: str, *, pixels: int = 224, test: int | None = None, small: bool = False, **arguments
):
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **arguments)

    return Entry(
        name=f"timm:{name}",
        make=make,
        make_inputs=image,
        pixels=pixels,
        test_pixels=test or pixels,
        small=small,
    )


def _own(make: type[nn.Module], make_inputs: Callable[[int, int], Any]) -> Entry:
    return Entry(name=f"own:{make.__name__}", make=make, make_inputs=make_inputs, small=True)


def _ids(length: int, vocabulary: int) -> Callable[[int, int], Any]:
    return lambda batch, _: torch.randint(1, vocabulary, (batch, length))


def _floats(*shape: int) -> Callable[[int, int], Any]:
    return lambda batch, _: torch.randn(batch, *shape)


def _bert(batch: int, _: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, 12, dtype=torch.long)
    mask[0, 9:] = 0
    return {"input_ids": torch.randint(1, 100, (batch, 12)), "attention_mask": mask}


def _two(batch: int, _: int) -> Any:
    from bnify.structure import Call

    return Call((torch.randn(batch, 3, 16, 16),), {"table": torch.randn(batch, 5), "scale": 2.0})


OWN = (
    _own(MyNetwork, _floats(784)),
    _own(nets.UNet, _floats(3, 16, 16)),
    _own(nets.BertLike, _bert),
    _own(nets.GptLike, _ids(10, 100)),
    _own(nets.LstmTagger, _ids(7, 50)),
    _own(nets.GruTextCnn, _floats(8, 20)),
    _own(nets.NestedOutputs, _floats(3, 12, 12)),
    _own(nets.DataclassOutputs, _floats(12)),
    _own(nets.TwoInputs, _two),
    _own(nets.Siamese, lambda batch, _: (torch.randn(batch, 10), torch.randn(batch, 10))),
    _own(nets.SqueezeExcite, _floats(3, 16, 16)),
    _own(nets.PlainResidual, _floats(3, 16, 16)),
    _own(nets.PreActivation, _floats(3, 12, 12)),
    _own(nets.ConvAutoencoder, _floats(1, 16, 16)),
    _own(nets.Video, _floats(2, 4, 8, 8)),
    _own(nets.Parametrized, _floats(4, 9)),
    _own(nets.TorchTransformer, _floats(5, 6)),
    _own(nets.CrossAttention, _floats(5, 6)),
    _own(nets.Mixer, _floats(3, 12, 12)),
    _own(nets.FunctionalWeights, _floats(3, 8, 8)),
)

_SEG = {"weights_backbone": None}

TORCHVISION = (
    _torchvision("alexnet"),
    _torchvision("vgg11", test=32),
    _torchvision("vgg11_bn", test=32),
    _torchvision("squeezenet1_1", small=True),
    _torchvision("resnet18", small=True),
    _torchvision("resnet50"),
    _torchvision("resnext50_32x4d"),
    _torchvision("densenet121"),
    _torchvision("mobilenet_v2", small=True),
    _torchvision("mobilenet_v3_small", small=True),
    _torchvision("mobilenet_v3_large"),
    _torchvision("shufflenet_v2_x0_5", small=True),
    _torchvision("mnasnet0_5", small=True),
    _torchvision("googlenet", init_weights=False),
    _torchvision("inception_v3", pixels=299, test=96, init_weights=False),
    _torchvision("efficientnet_b0"),
    _torchvision("efficientnet_v2_s"),
    _torchvision("regnet_y_400mf", small=True),
    _torchvision("regnet_x_400mf"),
    _torchvision("convnext_tiny"),
    _torchvision("vit_b_16", test=224),
    _torchvision("swin_t"),
    _torchvision("swin_v2_t"),
    _torchvision("maxvit_t", test=224),
    _torchvision("fcn_resnet50", **_SEG),
    _torchvision("deeplabv3_mobilenet_v3_large", **_SEG),
    _torchvision("lraspp_mobilenet_v3_large", **_SEG),
)

TIMM = (
    # norm and activation in one module (BatchNormAct2d)
    _timm("efficientnet_lite0", test=64),
    _timm("mobilenetv4_conv_small", test=64, small=True),
    _timm("resnetv2_50", test=64),
    _timm("dla34", test=64),
    _timm("ghostnet_050", test=64, small=True),
    _timm("hardcorenas_a", test=64),
    _timm("tf_mixnet_s", test=64),
    _timm("inception_v4", pixels=299, test=96),
    _timm("xception41", pixels=299, test=96),
    _timm("densenetblur121d", test=64),
    _timm("cspresnet50", test=64),
    _timm("vovnet39a", test=64),
    _timm("lcnet_050", test=64, small=True),
    _timm("regnetz_b16", test=64),
    # reparameterisable
    _timm("repvgg_a0", test=64),
    _timm("mobileone_s0", test=64, small=True),
    _timm("repghostnet_050", test=64, small=True),
    _timm("fastvit_t8", pixels=256),
    _timm("repvit_m0_9", test=64),
    # norm-free and weight-standardised
    _timm("nf_resnet50", test=64),
    _timm("nfnet_l0", test=64),
    _timm("resnetv2_50x1_bit", test=64),
    # attention, and attention with convolutions
    _timm("deit_tiny_patch16_224"),
    _timm("beit_base_patch16_224"),
    _timm("cait_xxs24_224"),
    _timm("xcit_nano_12_p16_224"),
    _timm("crossvit_9_240", pixels=240),
    _timm("levit_128s"),
    _timm("efficientformer_l1"),
    _timm("coatnet_nano_rw_224"),
    _timm("edgenext_xx_small", test=64, small=True),
    _timm("mobilevit_xxs", test=64, small=True),
    _timm("volo_d1_224"),
    _timm("pit_ti_224"),
    _timm("tnt_s_legacy_patch16_224"),
    _timm("twins_svt_small"),
    _timm("visformer_tiny"),
    _timm("pvt_v2_b0", test=64, small=True),
    _timm("convit_tiny"),
    _timm("tiny_vit_5m_224"),
    _timm("halonet26t", pixels=256),
    _timm("lambda_resnet26t", pixels=256),
    # tokens and channels without attention
    _timm("mixer_s32_224"),
    _timm("resmlp_12_224"),
    _timm("gmlp_ti16_224"),
    _timm("convmixer_768_32", test=64),
    _timm("poolformer_s12", test=64),
    _timm("inception_next_atto", test=64, small=True),
    _timm("convnextv2_atto", test=64, small=True),
    _timm("starnet_s1", test=64, small=True),
    # residual and multi-branch families
    _timm("hrnet_w18_small", test=64),
    _timm("dpn48b", test=64, small=True),
    _timm("res2net50_14w_8s", test=64),
    _timm("selecsls42b", test=64),
    _timm("skresnet18", test=64, small=True),
    _timm("resnest14d", test=64, small=True),
    _timm("seresnet18", test=64),
    _timm("tresnet_m", test=64),
    _timm("pnasnet5large", pixels=331, test=96),
)

ZOO: tuple[Entry, ...] = (*OWN, *TORCHVISION, *TIMM)


def small() -> Iterator[Entry]:
    """The entries that the test command runs."""
    return (entry for entry in ZOO if entry.small)


def entry(name: str) -> Entry:
    """The entry of this name, ``"torchvision:resnet18"`` or plain ``"resnet18"``."""
    for found in ZOO:
        if name in (found.name, found.name.partition(":")[2]):
            return found
    raise KeyError(name)
