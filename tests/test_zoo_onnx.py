"""Insert, export, verify: the whole line on models with real edits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bnify
from zoo import ZOO, Entry

NAMES = (
    "own:MyNetwork",
    "own:UNet",
    "own:LstmTagger",
    "own:GruTextCnn",
    "own:TwoInputs",
    "own:SqueezeExcite",
    "own:PlainResidual",
    "own:ConvAutoencoder",
    "own:Video",
    "own:Parametrized",
    "own:CrossAttention",
    "torchvision:squeezenet1_1",
    "torchvision:mobilenet_v3_small",
    "timm:edgenext_xx_small",
    "timm:inception_next_atto",
)
ENTRIES = {entry.name: entry for entry in ZOO}


@pytest.mark.parametrize("name", NAMES)
def test_rewritten_model_exports_and_the_file_is_within_budget(name: str, tmp_path: Path) -> None:
    entry: Entry = ENTRIES[name]
    inputs = entry.inputs()
    model = bnify.insert(entry.build(), inputs, verify=False)
    assert model.plan.edits
    _unsettle(model.model)

    exported = bnify.export(model.model.eval(), inputs, tmp_path / "model.onnx")

    assert exported.verification.passed
    assert exported.norms_before >= len(model.plan.edits)
    batches = [check for check in exported.verification.checks if "batch size" in check.name]
    assert [(check.name, check.passed) for check in batches] == [("batch size 1, 5", True)]
    assert all(
        o.budget_ratio is None or o.budget_ratio <= 10 for o in exported.verification.outputs
    )


def _unsettle(model: torch.nn.Module) -> None:
    """Fresh norms are nearly the identity, which hides faults: give them a past."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if ".norm." not in f".{name}" or not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        with torch.no_grad():
            tensor.copy_(noise.abs() + 0.1 if name.endswith("running_var") else noise)
