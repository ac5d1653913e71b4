"""Real models: clean ones have nothing above info, known faults are found with the right count."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import zoo
from bnify.audits import audit

CLEAN = (
    "resnet18",
    "regnet_y_400mf",
    "mnasnet1_0",
    "mobilenet_v3_small",
    "googlenet",
    "shufflenet_v2_x1_0",
)
pytestmark = pytest.mark.slow


def torchvision(name: str, **options) -> nn.Module:
    from torchvision import models

    if name == "googlenet":  # its own initialisation takes scipy a minute
        options["init_weights"] = False
    return models.get_model(name, weights=None, **options)


def worse_than_info(report) -> list[str]:
    return [f"{f.code} {f.module}: {f.message}" for f in report.findings if f.severity != "info"]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", CLEAN)
def test_clean_convolutional_networks(name, train):
    report = audit(torchvision(name).train(train), torch.randn(2, 3, 96, 96))
    assert not worse_than_info(report)
    assert report.norms > 15


@pytest.mark.parametrize("name", ["torchvision:convnext_tiny", "timm:deit_tiny_patch16_224"])
def test_networks_without_batch_norm_get_no_advice(name):
    entry = zoo.entry(name)
    report = audit(entry.make(), entry.inputs())
    assert (report.norms, report.findings) == (0, ())
    assert report.others > 10


def test_a_language_model_gets_no_advice():
    entry = next(e for e in zoo.OWN if "Bert" in e.name)
    report = audit(entry.make(), entry.inputs())
    assert (report.norms, report.findings) == (0, ())


@pytest.mark.parametrize(
    ("name", "count"), [("vgg11_bn", 8), ("vgg13_bn", 10), ("vgg16_bn", 13), ("vgg19_bn", 16)]
)
def test_redundant_biases_of_vgg(name, count):
    report = audit(torchvision(name), torch.randn(2, 3, 64, 64), select=["BN201"])
    assert Counter(f.code for f in report.findings) == {"BN201": count}


def test_deeplab_has_dropout_before_a_norm_and_a_norm_of_one_value():
    from torchvision.models import segmentation

    net = segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
    report = audit(net, torch.randn(2, 3, 64, 64), ignore=["BN201"])
    above = {f.code: f.module for f in report.findings if f.severity == "warning"}
    assert above == {"BN202": "classifier.2", "BN205": "classifier.0.convs.4.2"}


@pytest.mark.parametrize("drawn", [True, False])
def test_initialisation_of_scales_is_no_training(drawn):
    """DCGAN draws γ around 1; torchvision can start residual branches at γ = 0."""
    net = torchvision("resnet50", zero_init_residual=not drawn)
    if drawn:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
    report = audit(net, select=["BN102", "BN106"])
    assert [(f.code, f.severity, f.module) for f in report.findings] == [("BN102", "info", "")]


def test_weight_standardisation_is_no_norm():
    entry = zoo.entry("timm:nf_resnet50")
    report = audit(entry.make(), entry.inputs())
    assert (report.norms, report.findings) == (0, ())


def test_tokens_in_the_batch_are_no_single_values():
    entry = zoo.entry("timm:levit_128s")
    report = audit(entry.make(), entry.inputs(), select=["BN205", "BN207", "BN201"])
    # Its two heads normalize one vector a sample; the 50 norms on tokens have many values each.
    assert Counter(f.code for f in report.findings) == {"BN205": 2}
    assert all(f.module.startswith("head") for f in report.findings)
